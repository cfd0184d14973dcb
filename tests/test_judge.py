"Intervals against fresh draws, what `judge` gives and refuses, drawing in parts, and the command."
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_metrics import normal, skewed

from diffusion_book.judge import Score, draw_all, frechet_draws, interval, judge, resamples
from diffusion_book.metrics import Moments, frechet_distance, kernel_distance, kernel_draws, precision_recall_draws
from diffusion_book.pictures import load_fashion
from diffusion_book.sampling import Step
from diffusion_book.training import load_pretrained


# ------------------------------------------------------------------ the bootstrap
def test_resamples():
    w = resamples(40, 30, seed=3)
    assert w.shape == (40, 31) and (w[:, 0] == 1).all() and (w.sum(0) == 40).all()
    assert torch.equal(w, resamples(40, 30, seed=3)) and not torch.equal(w, resamples(40, 30, seed=4))
    assert abs((w[:, 1:] == 0).double().mean() - math.exp(-1)) < .03     # the share left out, (1 - 1/n)^n


def test_weights_mean_repeats():
    "A resample scores what the set with its rows repeated scores; for the kernel, no row meets its copy."
    x, y, w = skewed(25, 3), skewed(30, 3, 5), resamples(25, 1, 1)
    again = x.repeat_interleave(w[:, 1].long(), dim=0)
    f, k = frechet_draws(x, Moments(y), w), kernel_draws(x, y, w)
    torch.testing.assert_close(f.tolist(), [frechet_distance(Moments(o), Moments(y)) for o in (x, again)])
    v, g = w[:, 1], lambda a, b: (a @ b.T/3 + 1)**3
    pairs = v.outer(v).fill_diagonal_(0)
    naive = (pairs*g(x, x)).sum()/pairs.sum() + (g(y, y).sum() - g(y, y).trace())/(30*29) - 2*(v @ g(x, y)).sum()/(25*30)
    torch.testing.assert_close(k, torch.stack([torch.tensor(kernel_distance(x, y)).double(), naive]))


@pytest.mark.parametrize("score", ["frechet", "kernel", "recall"])
def test_interval_is_as_wide_as_the_draws_differ(score):
    "150 fresh sets: nine in ten of the bootstrap's intervals of 95 % hold the mean of all (bootstrap from 40 draws, a small n: with room)."
    y = normal(300, 2, seed=99)
    f = dict(frechet=lambda x, w: frechet_draws(x, Moments(y), w), kernel=lambda x, w: kernel_draws(x, y, w),
             recall=lambda x, w: precision_recall_draws(x, y, w, 3)[1])[score]
    all_ = [f(1.3*normal(60, 2, seed=i), resamples(60, 40, i)) for i in range(150)]
    mean = torch.stack([d[0] for d in all_]).mean()
    inside = [low <= mean <= high for low, high in (interval(d, (-math.inf, None)) for d in all_)]
    assert .82 < sum(inside)/150 <= 1, sum(inside)/150


# ------------------------------------------------------------------ judging
def test_judge():
    x = load_fashion("train")[0]
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(5))[:400]]
    found = judge(x, seed=3, draws=20)
    assert list(found) == ["frechet", "kid", "precision", "recall", "classes", "patches"]
    for key, s in found.items():
        assert s.n == s.floor_n == 400 and s.seed == 3 and s.interval[0] <= s.value <= s.interval[1], s
        if key in ("precision", "recall", "patches"): assert math.isclose(s.value, s.floor, rel_tol=.3), s     # they are training images
    assert found["recall"].better == "higher" and found["kid"].better == "lower"
    assert judge(x, seed=3, draws=20) == found
    worse = judge((x + .5*torch.randn(x.shape, generator=torch.Generator().manual_seed(0))), seed=3, draws=0)
    for key in ("frechet", "kid", "patches"): assert worse[key].value > found[key].interval[1]
    assert str(Score("thing", 1.23456, 5, 7, (1, 2), .5, 4)) == "thing: 1.235 [1, 2], n = 5, seed 7; 4 training images score 0.5"


def test_bad_images():
    x = load_fashion("test")[0][:130].clone()
    with pytest.raises(ValueError, match="images: got 100, wanted at least 129"): judge(x[:100])
    with pytest.raises(ValueError, match="images: got 3 channels, wanted 1"): judge(x.repeat(1, 3, 1, 1))
    x[7, 0, 3, 3] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite pixels in 1 of 130"): judge(x)
    with pytest.raises(ValueError, match=r"images: got \(130, 28, 28\)"): judge(x[:, 0])


def test_draw_all_hands_its_options_on():
    "In parts from one generator: as many, the first part as one call draws it; what isn't its own goes to the sampler."
    denoise, seen = load_pretrained("fashion"), []
    def one_jump(denoise, x, schedule, times, *, cond, generator, scale):
        seen.append((len(x), list(times)))
        yield Step(0, scale*x, x)
    x = draw_all(denoise, 5, None, one_jump, seed=1, batch_size=2, times=[900, 0], progress=False, scale=2.)
    g = torch.Generator().manual_seed(1)
    want = torch.cat([2*denoise.schedule.noise(900)*torch.randn(k, 1, 28, 28, generator=g) for k in (2, 2, 1)])
    torch.testing.assert_close(x, want.float())
    assert [k for k, _ in seen] == [2, 2, 1] and all(t == [900, 0] for _, t in seen)
    for bad in (dict(n=0), dict(n=2, batch_size=0)):
        with pytest.raises(ValueError, match="got 0, wanted at least 1"): draw_all(denoise, steps=1, **bad)


def test_command_line(tmp_path):
    script = tmp_path/"judge.py"
    script.write_text("from diffusion_book.judge import diffusion_book_judge\nif __name__ == '__main__': diffusion_book_judge()\n")
    def run(*args):
        env = dict(os.environ, PYTHONPATH=str(ROOT))
        return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, env=env, cwd=tmp_path)
    done = run("--n", "130", "--steps", "2", "--sampler", "heun", "--seed", "4", "--out", str(tmp_path/"s.json"))
    assert done.returncode == 0 and done.stdout.count("n = 130, seed 4") == 6, done.stderr
    noted = json.loads((tmp_path/"s.json").read_text())
    assert (noted["steps"], noted["sampler"], noted["scores"]["recall"]["n"]) == (2, "heun", 130)
    bad = run("--sampler", "magic")
    assert bad.returncode != 0 and "sampler: got 'magic'" in bad.stderr and "Traceback" not in bad.stderr, bad.stderr
