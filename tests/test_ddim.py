"DDIM against ancestral sampling, another library's scheduler, an exact answer on a line, and bad input."
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffusion_book.ddim import CountCalls, check_ddim_move, check_invert_move, check_variance_left, ddim, ddim_step, fresh_noise, invert
from diffusion_book.ideal import GaussianMixture, MixtureDenoiser
from diffusion_book.sampling import Step, ddpm, sample
from diffusion_book.schedules import Schedule, cosine_schedule, linear_schedule, noise_to, sigmoid_schedule, zero_terminal_snr

LINEAR, COSINE = linear_schedule(), cosine_schedule()
WORLD = GaussianMixture(torch.tensor([[-1.], [1.5]], dtype=torch.float64), torch.tensor([.2, .4]), torch.tensor([.3, .7]))


class Line(Schedule):
    "Flow matching's straight line."
    T = 1.
    def signal(self, t): return 1 - torch.as_tensor(t, dtype=torch.float64)
    def noise(self, t): return torch.as_tensor(t, dtype=torch.float64)
    def times(self, n=50): return torch.linspace(1, 0, n + 1, dtype=torch.float64)


class Exploding(Schedule):
    "Signal 1 throughout, the noise grows to 80."
    T = 80.
    def signal(self, t): return torch.ones_like(torch.as_tensor(t, dtype=torch.float64))
    def noise(self, t): return torch.as_tensor(t, dtype=torch.float64)
    def times(self, n=50): return torch.cat([torch.logspace(math.log10(80), -2.5, n, dtype=torch.float64), torch.zeros(1)])


def rng(seed): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def last(walk):
    for step in walk: pass
    return step.x


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, sigmoid_schedule(), zero_terminal_snr(LINEAR), Line(), Exploding()], ids=lambda s: type(s).__name__ + str(s.T))
@pytest.mark.parametrize("n", [1, 7, 40])
def test_eta_1_is_ancestral(schedule, n):
    denoise, x = MixtureDenoiser(WORLD, schedule), normal(20, 1)*schedule.noise(schedule.T)
    times = schedule.times(n)
    for a, b in zip(ddim(denoise, x, schedule, times, generator=rng(1), eta=1.), ddpm(denoise, x, schedule, times, generator=rng(1))):
        assert a.t == b.t
        torch.testing.assert_close(a.x, b.x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a.x0, b.x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0., .7])
@pytest.mark.parametrize("predicts", ["sample", "epsilon"])
def test_equals_diffusers_move_by_move(eta, predicts):
    "Same betas, same guess, same noise; their index i is our time i + 1."
    theirs = DDIMScheduler(1000, prediction_type=predicts, clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(40)
    times = torch.cat([theirs.timesteps + 1, torch.zeros(1, dtype=torch.long)])
    assert times.tolist() == LINEAR.times(40).tolist()
    def eps(x, t): return (x*.3 + .1).tanh()
    def guess(x, t, cond):
        return eps(x, t) if predicts == "sample" else (x - LINEAR.noise(t)*eps(x, t))/LINEAR.signal(t)
    y = x = normal(2, 1, 4, 4)
    g = rng(1)
    for step, i in zip(ddim(guess, x, LINEAR, times, generator=rng(1), eta=eta), theirs.timesteps):
        y = theirs.step(eps(y, i), i, y, eta=eta, generator=g).prev_sample
        torch.testing.assert_close(step.x, y, rtol=1e-4, atol=1e-5)    # theirs computes its curves in float32


@given(st.integers(1, 1000), st.floats(0, 1), st.data())
def test_noise_kept_and_fresh_add_up(t, eta, data):
    "With the true picture and noise, what is not picture has variance b_s^2 for every eta: read it off two unit inputs."
    s = data.draw(st.integers(0, t - 1))
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    sigma, b = fresh_noise(t, s, LINEAR, eta), LINEAR.noise(s)
    drawn = torch.randn(1, generator=rng(0), dtype=torch.float64)
    moved = ddim_step(zero, LINEAR.noise(t)*one, t, LINEAR, s, eta, rng(0))     # picture 0, noise exactly 1
    kept = moved - sigma*(drawn if sigma > 0 else 0)
    torch.testing.assert_close(kept**2 + sigma**2, (b**2).reshape(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ddim_step(one, LINEAR.signal(t)*one, t, LINEAR, s)[0], LINEAR.signal(s), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0., .5, 1.])
def test_marginals_of_the_known_picture(eta):
    "Walking with the true x0, the noise in each state is standard normal and independent of x0 (5 standard errors)."
    n, x0 = 20_000, WORLD.sample(20_000, rng(2))
    xt, g = noise_to(x0, 1000, COSINE, generator=rng(3))[0], rng(4)
    for t, s in ((1000, 700), (700, 300), (300, 100)):
        xt = ddim_step(x0, xt, t, COSINE, s, eta, g)
        eps = (xt - COSINE.signal(s)*x0)/COSINE.noise(s)
        assert abs(eps.mean()) < 5/n**.5 and abs(eps.var() - 1) < 5*(2/n)**.5
        assert abs((eps*(x0 - x0.mean())).mean()) < 5*x0.std()/n**.5


def cdf(x, t=0., schedule=Line()):
    a, b = schedule.signal(t), schedule.noise(t)
    return (torch.special.ndtr((x - a*WORLD.means.T)/((a*WORLD.std)**2 + b**2).sqrt())*WORLD.weights).sum(1, keepdim=True)


def exact(x, t, to):
    "On a line the deterministic walk carries quantile to quantile."
    grid = torch.linspace(-6, 6, 40_001, dtype=torch.float64)[:, None]
    return torch.tensor(np.interp(cdf(x, t), cdf(grid, to)[:, 0], grid[:, 0]))


@pytest.mark.parametrize("eta", [0., .5, 1.])
def test_marginals_of_the_ideal_guess_in_many_moves(eta):
    "Kolmogorov-Smirnov distance on the way down in 80 moves: only the moves' error without noise, chance with it."
    denoise, u = MixtureDenoiser(WORLD, Line()), (torch.arange(400, dtype=torch.float64)[:, None] + .5)/400
    x = torch.special.ndtri(u)[torch.randperm(400, generator=rng(8))]
    for k, step in enumerate(ddim(denoise, x, Line(), Line().times(80), generator=rng(10), eta=eta)):
        if k % 20 == 19:
            gap = (cdf(step.x.sort(0).values, step.t) - u).abs().max() + .5/400
            assert gap < (.03 if eta == 0 else 1.95/400**.5)      # 400 fair draws exceed that once in a thousand times


@pytest.mark.parametrize("to", [0., .2])
def test_order_of_convergence_is_one(to):
    denoise, x = MixtureDenoiser(WORLD, Line()), torch.linspace(-1.6, 1.6, 9, dtype=torch.float64)[:, None]
    def error(n): return (last(ddim(denoise, x, Line(), torch.linspace(1, to, n + 1, dtype=torch.float64))) - exact(x, 1., to)).abs().mean()
    order = math.log2(error(20)/error(80))/2
    assert .8 < order < 1.25, order


def test_order_of_inversion_is_one():
    denoise, x = MixtureDenoiser(WORLD, Line()), torch.linspace(-1.6, 1.6, 9, dtype=torch.float64)[:, None]
    picture = exact(x, 1., 0.)
    def errors(n):
        up = last(invert(denoise, picture, Line(), Line().times(n)))
        return torch.stack([(up - x).abs().mean(), (last(ddim(denoise, up, Line(), Line().times(n))) - picture).abs().mean()])
    for order in (errors(20)/errors(80)).log2()/2: assert .75 < order < 1.3, order


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, Line(), Exploding()], ids=lambda s: type(s).__name__ + str(s.T))
def test_a_guess_that_never_changes_is_exact_both_ways(schedule):
    "Then one move is the whole equation, and up and down undo each other."
    target = torch.tensor([[.3, -.8]], dtype=torch.float64)
    def guess(xt, t, cond=None): return target.expand_as(xt)
    x = normal(5, 2)*schedule.noise(schedule.T)
    for n in (1, 6): torch.testing.assert_close(last(ddim(guess, x, schedule, schedule.times(n))), target.expand(5, 2), rtol=0, atol=1e-9)
    times = schedule.times(6)[:-1]      # down to some time above 0, where the noise is still there
    down = last(ddim(guess, x, schedule, times))
    torch.testing.assert_close(last(invert(guess, down, schedule, times)), x, rtol=1e-8, atol=1e-8)


def test_draws_once_a_move_and_none_at_the_last_or_at_eta_0():
    for eta, moves, draws in ((0., 5, 0), (.3, 5, 4), (1., 1, 0)):
        g, h = rng(0), rng(0)
        last(ddim(lambda x, t, cond: x, torch.zeros(2, 3), LINEAR, LINEAR.times(moves), generator=g, eta=eta))
        for _ in range(draws): torch.randn(2, 3, generator=h)
        assert torch.equal(g.get_state(), h.get_state()), (eta, moves)


def test_fields_condition_dtype_and_times_per_image():
    seen = []
    def denoise(x, t, cond):
        seen.append((t.item(), cond))
        return x/2
    steps = list(ddim(denoise, torch.ones(3, 2), LINEAR, torch.tensor([1000, 500, 0]), cond="boot"))
    assert seen == [(1000, "boot"), (500, "boot")] and [s.t.item() for s in steps] == [500, 0]
    assert all(isinstance(s, Step) and s.x.shape == (3, 2) and s.x.dtype == torch.float32 for s in steps)
    seen.clear()
    up = list(invert(denoise, torch.ones(3, 2), LINEAR, torch.tensor([1000, 500, 0]), cond="boot"))
    assert seen == [(500, "boot")] and [s.t.item() for s in up] == [500, 1000] and up[-1].x.dtype == torch.float32
    x, t, s = torch.ones(2, 3), torch.tensor([900, 400]), torch.tensor([500, 0])
    both = ddim_step(x/2, x, t, LINEAR, s)
    torch.testing.assert_close(both, torch.cat([ddim_step(x[:1]/2, x[:1], 900, LINEAR, 500), ddim_step(x[:1]/2, x[:1], 400, LINEAR, 0)]))


def test_count_calls():
    counted = CountCalls(MixtureDenoiser(WORLD, LINEAR))
    sample(counted, normal(2, 1), LINEAR, ddim, steps=9, progress=False)
    assert counted.calls == 9 and counted.mixture is WORLD
    with pytest.raises(AttributeError): counted.nothing


@pytest.mark.parametrize("eta", [2, -.1, float("nan")])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match="eta: got .*, wanted 0"): last(ddim(lambda x, t, c: x, torch.zeros(1, 1), LINEAR, [1000, 0], eta=eta))


def test_bad_times_and_shapes():
    x = torch.zeros(2, 1, 4, 4)
    for walk in (ddim, invert):
        with pytest.raises(ValueError, match="times: got"): list(walk(lambda x, t, c: x, x, LINEAR, [0, 500, 1000]))
        with pytest.raises(ValueError, match=r"denoise: returned shape \(2, 1, 4\), wanted x's"):
            list(walk(lambda x, t, c: x[..., 0], x, LINEAR, [1000, 500, 0]))
    with pytest.raises(ValueError, match="n: got 0 moves"): sample(lambda x, t, c: x, x, LINEAR, ddim, steps=0)


# The exercises' checkers: right answers pass, the known wrong ones are told what is wrong.

def move(x0_hat, xt, t, s, schedule, eta, z, keep=True, length=None):
    sigma = fresh_noise(t, s if length is None else t - length, schedule, eta)
    b = (schedule.noise(s)**2 - (sigma**2 if keep else 0)).clamp(min=0).sqrt()
    return schedule.signal(s)*x0_hat + b*(xt - schedule.signal(t)*x0_hat)/schedule.noise(t) + sigma*z


def corrected(denoise, xs, s, t, schedule, rounds):
    xt, at = xs, s
    for _ in range(rounds + 1):
        x0_hat, at = denoise(xt, at), t
        xt = schedule.signal(t)*x0_hat + schedule.noise(t)*(xs - schedule.signal(s)*x0_hat)/schedule.noise(s)
    return xt


def variance_left(schedule, times, square=2):
    a, b = schedule.signal(times), schedule.noise(times)
    return (a[1:]*a[:-1] + b[1:]*b[:-1]).prod()**square


def test_exercise_checkers():
    check_ddim_move(move), check_invert_move(corrected), check_variance_left(variance_left)
    for kind, wanted in ((dict(keep=False), "must make room"), (dict(length=1), "whole move")):
        with pytest.raises(AssertionError, match=wanted): check_ddim_move(lambda *a: move(*a, **kind))
    with pytest.raises(AssertionError, match="ask at"): check_invert_move(lambda d, x, s, t, sch, rounds: corrected(d, x, s, t, sch, 0))
    with pytest.raises(AssertionError, match="its square"): check_variance_left(lambda sch, times: variance_left(sch, times, 1))
    with pytest.raises(AssertionError, match="both|part from"):
        check_variance_left(lambda sch, times: (sch.signal(times[1:])*sch.signal(times[:-1])).prod()**2)
