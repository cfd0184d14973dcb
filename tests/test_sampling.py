"The sampler against closed forms, against diffusers' scheduler move by move, and against bad input."
import json
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_book.ideal import GaussianMixture, MixtureDenoiser
from diffusion_book.posterior import posterior
from diffusion_book.sampling import SAMPLERS, SPACINGS, Step, ddpm, descending, find_sampler, find_times, sample, save_pictures
from diffusion_book.schedules import cosine_schedule, linear_schedule, sigmoid_schedule, zero_terminal_snr

SCHEDULE = linear_schedule()


def last(denoise, x, schedule, times=None, **options):
    for step in ddpm(denoise, x, schedule, times, **options): pass
    return step


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("n", [50, 1000])
def test_equals_diffusers_move_by_move(n, variance):
    "Same betas, same guess, same noise: every state agrees. Their index i is our time i + 1."
    theirs = DDPMScheduler(1000, prediction_type="sample", clip_sample=False, variance_type=f"fixed_{variance}",
                           timestep_spacing="trailing")
    theirs.set_timesteps(n)
    times = torch.cat([theirs.timesteps + 1, torch.zeros(1, dtype=torch.long)])
    assert times.tolist() == SCHEDULE.times(n).tolist()
    def guess(x, t, cond): return (x*.3 + .1).tanh()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    y = x
    for step, i in zip(ddpm(guess, x, SCHEDULE, times, generator=torch.Generator().manual_seed(1), variance=variance),
                       theirs.timesteps):
        y = theirs.step(guess(y, i, None), i, y, generator=g).prev_sample
        if step.t == 0 and i > 0 and variance == "large": break     # theirs adds noise at the last move of strided steps
        torch.testing.assert_close(step.x, y, rtol=1e-4, atol=1e-5)    # theirs computes its curves in float32


@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule(), sigmoid_schedule(), zero_terminal_snr(linear_schedule())])
def test_a_gaussian_comes_out_as_it_is(schedule):
    "Data N(1, 0.5^2) and its exact denoiser: mean and variance of 20,000 samples within 5 standard errors and the bias of 250 moves."
    n = 20_000
    denoise = MixtureDenoiser(GaussianMixture(torch.tensor([[1.]]), .5), schedule)
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(0))
    end = last(denoise, x, schedule, schedule.times(250), generator=torch.Generator().manual_seed(1))
    assert end.t == 0
    assert abs(end.x.mean() - 1) < 5*.5/n**.5 + .01
    assert abs(end.x.var() - .25) < 5*.25*(2/n)**.5 + .01


def test_variance_bias_shrinks_with_the_moves():
    "The posterior's variance is too small for wide data; the error falls as the moves grow."
    denoise = MixtureDenoiser(GaussianMixture(torch.tensor([[0.]]), 1.), SCHEDULE)
    x = torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0))
    def lost(n): return 1 - last(denoise, x, SCHEDULE, SCHEDULE.times(n), generator=torch.Generator().manual_seed(1)).x.var().item()
    assert lost(5) > lost(20) > lost(100) > -.03


@given(st.integers(1, 60))
@settings(deadline=None, max_examples=20)
def test_lands_on_zero_and_draws_once_a_move(n):
    times, g = SCHEDULE.times(n), torch.Generator().manual_seed(0)
    end = last(lambda x, t, cond: x, torch.zeros(1, 1), SCHEDULE, times, generator=g)
    h = torch.Generator().manual_seed(0)
    for _ in range(n - 1): torch.randn(1, 1, generator=h)
    assert end.t == 0 and torch.equal(g.get_state(), h.get_state())


def test_step_fields_and_condition():
    seen = []
    def denoise(x, t, cond):
        seen.append((t.item(), cond))
        return x/2
    steps = list(ddpm(denoise, torch.ones(3, 2), SCHEDULE, torch.tensor([1000, 500, 0]), cond="boot"))
    assert seen == [(1000, "boot"), (500, "boot")] and [s.t.item() for s in steps] == [500, 0]
    assert all(isinstance(s, Step) and s.x.shape == s.x0.shape == (3, 2) for s in steps)
    torch.testing.assert_close(steps[-1].x, steps[-1].x0, rtol=1e-6, atol=1e-6)     # the last mean is the guess itself


def test_sample_takes_noise_or_shape():
    denoise = MixtureDenoiser(GaussianMixture(torch.zeros(1, 1, 2, 2), .5), SCHEDULE)
    def run(x): return sample(denoise, x, SCHEDULE, steps=5, generator=torch.Generator().manual_seed(0), progress=False)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 2, 2, generator=g)
    x = x*SCHEDULE.noise(SCHEDULE.T).float()    # the first noise is as strong as the schedule's at T
    assert torch.equal(run((3, 1, 2, 2)), sample(denoise, x, SCHEDULE, steps=5, generator=g, progress=False))


def test_sample_takes_times():
    denoise = MixtureDenoiser(GaussianMixture(torch.zeros(1, 1, 2, 2), .5), SCHEDULE)
    def run(**how): return sample(denoise, (3, 1, 2, 2), SCHEDULE, generator=torch.Generator().manual_seed(0), progress=False, **how)
    assert torch.equal(run(steps=5), run(times=SCHEDULE.times(5)))
    with pytest.raises(ValueError, match="^steps, times: got 5 and 6 times"): run(steps=5, times=SCHEDULE.times(5))
    with pytest.raises(ValueError, match="^times: got"): run(times=torch.tensor([0, 5]))


def test_learned_variance_is_asked_of_the_denoiser():
    class Doubtful(MixtureDenoiser):
        def variance(self, xt, t, s): return 2*posterior(xt, xt, t, SCHEDULE, s)[1].expand_as(xt)
    denoise = Doubtful(GaussianMixture(torch.zeros(1, 2), .5), SCHEDULE)
    def last(variance):
        x, g = torch.ones(20_000, 2), torch.Generator().manual_seed(0)
        return next(ddpm(denoise, x, SCHEDULE, torch.tensor([50, 40]), generator=g, variance=variance)).x
    ratio = last("learned").var()/last("small").var()
    assert abs(ratio - 2) < 1e-4, "same noise, twice the variance"


def test_samplers_by_name():
    assert find_sampler("ddpm") is ddpm
    with pytest.raises(ValueError, match="^sampler: got 'magic', wanted one of ddpm"): find_sampler("magic")


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_has_a_spacing(name):
    times = find_times(name)(SCHEDULE, 7)
    assert len(times) == 8 and SCHEDULE.noise(times[0]) > .99 and times[-1] == 0
    assert torch.equal(descending(times, SCHEDULE), times)
    even = torch.equal(times.double(), SCHEDULE.times(7).double())
    assert even == (name not in SPACINGS)
    with pytest.raises(ValueError, match="^n: got 0 moves"): find_times(name)(SCHEDULE, 0)


@pytest.mark.parametrize("times", [[5], [5, 5], [0, 5], [[5, 0]], [1001, 0], [5, -1]])
def test_bad_times(times):
    with pytest.raises(ValueError, match="^(times|t): got"): descending(times, SCHEDULE)


def test_bad_denoiser_and_variance():
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"denoise: returned shape \(2, 1, 4\), wanted x's"): list(ddpm(lambda x, t, c: x[..., 0], x, SCHEDULE))
    with pytest.raises(ValueError, match="variance: got 'medium'"): list(ddpm(lambda x, t, c: x, x, SCHEDULE, variance="medium"))
    with pytest.raises(ValueError, match="n: got 0 moves"): sample(lambda x, t, c: x, x, SCHEDULE, steps=0)


def test_pictures_are_written(tmp_path):
    from PIL import Image
    frames = [torch.zeros(4, 1, 8, 8), torch.ones(4, 1, 8, 8)]
    save_pictures(tmp_path/"deep"/"a.png", frames)
    save_pictures(tmp_path/"a.gif", frames)
    assert Image.open(tmp_path/"deep"/"a.png").size == (18, 18)     # two rows of two, 2 pixels between
    assert Image.open(tmp_path/"a.gif").n_frames == 2


def test_command_line(tmp_path):
    from pathlib import Path
    script = Path(sys.executable).with_name("diffusion_book_sample")
    if not script.exists(): pytest.skip("the package is not installed in this environment")
    def run(*args): return subprocess.run([script, *args], capture_output=True, text=True)
    done = run("--n", "2", "--steps", "3", "--out", str(tmp_path/"a.png"), "--seed", "4")
    assert done.returncode == 0, done.stderr
    noted = json.loads((tmp_path/"a.json").read_text())
    assert (noted["model"], noted["n"], noted["steps"], noted["seed"]) == ("fashion", 2, 3, 4)
    for args, wanted in ((("--model", "nobody"), "name: got 'nobody', wanted fashion"), (("--sampler", "magic"), "sampler: got 'magic'"),
                         (("--out", "a.bmp"), "out: got 'a.bmp'"), (("--steps", "0"), "n: got 0 moves"), (("--n", "0"), "n: got 0"),
                         (("--device", "abacus"), "device: got 'abacus'")):
        bad = run(*args, *(() if "--out" in args else ("--out", str(tmp_path/"b.png"))))
        assert bad.returncode != 0 and wanted in bad.stderr and "Traceback" not in bad.stderr, bad.stderr
    assert not (tmp_path/"b.png").exists() and not (tmp_path/"b.json").exists()


def test_the_film_begins_with_as_much_noise_as_the_first_time_has():
    from diffusion_book.edm import EDMSchedule, heun
    from diffusion_book.sampling import film_frames
    class Blank:
        schedule, card, net = EDMSchedule(), dict(size=(1, 8, 8)), torch.nn.Linear(1, 1)
        def __call__(self, xt, t, cond=None): return torch.zeros_like(xt)
    frames = film_frames(Blank(), 64, Blank.schedule.times(3), heun, seed=0)
    n = frames[0].numel()
    assert abs(frames[0].std()/Blank.schedule.T - 1) < 5/(2*n)**.5      # five standard errors of a standard deviation
