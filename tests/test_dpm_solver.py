"DPM-Solver++ and UniPC against quadrature, against theory on the ideal denoiser, against diffusers' schedulers, at both singular ends and with bad input."
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffusion_book.ddim import ddim
from diffusion_book.dpm_solver import dpm_solver, leap, logsnr_times, moments, node_weights, sde_dpm_solver, unipc
from diffusion_book.ideal import GaussianMixture, MixtureDenoiser
from diffusion_book.sampling import Step, ddpm, sample
from diffusion_book.schedules import Schedule, cosine_schedule, linear_schedule, scaled_linear_schedule, zero_terminal_snr

SCHEDULE = linear_schedule()
WORLD = GaussianMixture(torch.tensor([[-1., .5], [1.5, 0.], [0., -1.]], dtype=torch.float64), [.3, .4, .5], [.3, .5, .2])


class Straight(Schedule):
    "Flow matching's straight line: no data left at T, log-SNR -inf there."
    T = 1.
    def signal(self, t): return 1 - self.check(t)
    def noise(self, t): return self.check(t)
    def times(self, n=None): return torch.linspace(1, 0, (n or 1000) + 1, dtype=torch.float64)


class Exploding(Schedule):
    "The data is never shrunk, the noise grows to 80."
    T = 80.
    def signal(self, t): return torch.ones_like(self.check(t))
    def noise(self, t): return self.check(t)
    def times(self, n=None): return torch.cat([torch.logspace(math.log10(80), math.log10(.002), n or 1000, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def start(schedule, n=60, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*schedule.noise(schedule.T)


def last(sampler, denoise, x, schedule, times=None, **options):
    for step in sampler(denoise, x, schedule, times, **options): pass
    return step


# ------------------------------------------------------------------ weights
def quadrature(f, a, b, n=2000):
    "Gauss-Legendre on 20 pieces, which is exact to rounding here."
    import numpy as np
    z, w = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(a, b, 21)
    return sum(float((w*f((hi - lo)/2*z + (hi + lo)/2)).sum())*(hi - lo)/2 for lo, hi in zip(edges, edges[1:]))


@given(st.floats(.02, 8.))
def test_moments_are_the_integrals(h):
    import numpy as np
    for k, w in enumerate(moments(h, 4)):
        assert abs(w - quadrature(lambda u: np.exp(u - h)*u**k/math.factorial(k), 0, h)) < 1e-10*max(1, h**k)


@given(st.floats(.05, 4.), st.lists(st.floats(-3., 3.), min_size=2, max_size=2), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_exact_weights_integrate_every_parabola(h, others, c):
    import numpy as np
    nodes = [0., *(o*h for o in others)]
    if min(abs(a - b) for i, a in enumerate(nodes) for b in nodes[:i]) < .05*h: return
    f = lambda u: c[0] + c[1]*u + c[2]*u**2
    got = sum(w*f(o) for w, o in zip(node_weights(nodes, h), nodes))
    assert abs(got - quadrature(lambda u: np.exp(u - h)*f(u), 0, h)) < 1e-8*(1 + h**2*9)


def test_the_other_rules_change_one_moment_only():
    h, o = .7, [0., -.4]
    exact, midpoint, bh1 = (node_weights(o, h, r) for r in ("exact", "midpoint", "bh1"))
    for w in (exact, midpoint, bh1): assert abs(sum(w) + math.expm1(-h)) < 1e-12    # all are right for a constant
    assert abs(midpoint[1]*o[1] - h*moments(h, 1)[0]/2) < 1e-12 and abs(bh1[1]*o[1] - h*h/2) < 1e-12


# ------------------------------------------------------------------ order 1 is DDIM
@pytest.mark.parametrize("schedule", [SCHEDULE, cosine_schedule(), Straight(), Exploding()])
def test_order_one_is_ddim(schedule):
    denoise, x = MixtureDenoiser(WORLD, schedule), start(schedule)
    times = schedule.times(12)
    y = x
    for step, t, s in zip(dpm_solver(denoise, x, schedule, times, order=1), times, times[1:]):
        if t == schedule.T and schedule.signal(t) == 0: eps = y/schedule.noise(t)
        else: eps = (y - schedule.signal(t)*denoise(y, t))/schedule.noise(t)
        y = schedule.signal(s)*denoise(y, t) + schedule.noise(s)*eps
        torch.testing.assert_close(step.x, y, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ order of convergence
def even(n, high=6.): return SCHEDULE.time_at(torch.linspace(SCHEDULE.logsnr(SCHEDULE.T).item(), high, n + 1, dtype=torch.float64))

@pytest.fixture(scope="module")
def truth():
    "The path from T to log-SNR 6, where nothing is singular, of 20 points."
    return last(unipc, MixtureDenoiser(WORLD, SCHEDULE), start(SCHEDULE, 20, 2), SCHEDULE, even(700), order=3, lower_order_final=False).x

METHODS = [(dpm_solver, dict(order=1), 1), (dpm_solver, dict(order=2), 2), (dpm_solver, dict(order=2, rule="exact"), 2), (dpm_solver, dict(order=3), 3),
           (dpm_solver, dict(order=3, rule="halved"), 2), (dpm_solver, dict(order=2, singlestep=True), 2), (dpm_solver, dict(order=3, singlestep=True), 3),
           (dpm_solver, dict(order=3, singlestep=True, rule="exact"), 3), (unipc, dict(order=1), 2), (unipc, dict(order=2), 3), (unipc, dict(order=2, variant="bh1"), 3),
           (unipc, dict(order=3), 4), (unipc, dict(order=3, corrector=False), 3)]

@pytest.mark.parametrize("sampler, options, order", METHODS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_order_of_convergence(truth, sampler, options, order):
    "Twice the moves, 2^order times less error; within a third of an order, since 384 moves are not infinitely many."
    def error(n): return (last(sampler, MixtureDenoiser(WORLD, SCHEDULE), start(SCHEDULE, 20, 2), SCHEDULE, even(n), lower_order_final=False, **options).x - truth).square().mean().sqrt().item()
    few, many = error(144), error(288)
    assert abs(math.log2(few/many) - order) < .34, math.log2(few/many)


def test_order_three_begun_where_x0_hat_moves_is_of_order_two():
    "From T the first moves, of orders 1 and 2, have nothing to get wrong; halfway down they have."
    x = start(SCHEDULE, 20, 2)*SCHEDULE.noise(400)
    def end(n):
        times = SCHEDULE.time_at(torch.linspace(SCHEDULE.logsnr(400).item(), 6, n + 1, dtype=torch.float64))
        return last(dpm_solver, MixtureDenoiser(WORLD, SCHEDULE), x, SCHEDULE, times, order=3, lower_order_final=False).x
    goal = end(800)
    few, many = ((end(n) - goal).square().mean().sqrt().item() for n in (96, 192))
    assert 1.6 < math.log2(few/many) < 2.5

@pytest.mark.parametrize("at, third", [((1/3, 2/3), True), ((.3, .5), False)])
def test_groups_of_three_need_the_second_look_at_two_thirds(truth, at, third):
    def split(n):
        ends = torch.linspace(SCHEDULE.logsnr(SCHEDULE.T).item(), 6, n//3 + 1, dtype=torch.float64)
        inner = ends[:-1, None] + ends.diff()[:, None]*torch.tensor([0., *at], dtype=torch.float64)
        return SCHEDULE.time_at(torch.cat([inner.flatten(), ends[-1:]]))
    few, many = ((last(dpm_solver, MixtureDenoiser(WORLD, SCHEDULE), start(SCHEDULE, 20, 2), SCHEDULE, split(n), order=3, singlestep=True,
                       lower_order_final=False).x - truth).square().mean().sqrt().item() for n in (192, 384))
    assert math.log2(few/many) > 2.6 if third else math.log2(few/many) < 2.4


def test_one_move_with_exact_looks_has_one_order_more():
    "From exact states and looks: the error of a single move falls by 2^(order + 1) when everything is halved."
    denoise = MixtureDenoiser(GaussianMixture(torch.tensor([[1.]], dtype=torch.float64), .5), SCHEDULE)
    def state(t): return (SCHEDULE.signal(t) + 1.3*(.25*SCHEDULE.signal(t)**2 + SCHEDULE.noise(t)**2).sqrt()).reshape(1, 1)
    def off(h, n):
        times = SCHEDULE.time_at(-1. + 2*h*torch.arange(1, -3, -1, dtype=torch.float64))   # one ahead, at, and two behind
        looks = [(t, denoise(state(t), t)) for t in times[1:1 + n]]
        return (leap(state(times[1]), times[1], times[0], SCHEDULE, looks, "exact") - state(times[0])).abs().item()
    for n in (1, 2, 3): assert abs(math.log2(off(.1, n)/off(.05, n)) - n - 1) < .35


# ------------------------------------------------------------------ diffusers
def answer(x, t, cond=None): return (.6*x + .2*torch.sin(3*x) + t/5000).tanh()

def apart(ours, kind, n, options, schedule=SCHEDULE, **theirs):
    "The largest difference over all moves. Their index i is our time i + 1."
    peer = kind(1000, prediction_type="sample", final_sigmas_type="zero", trained_betas=schedule.beta[1:].tolist(), **theirs)
    peer.set_timesteps(n)
    times = torch.cat([peer.timesteps + 1, torch.zeros(1, dtype=torch.long)])
    x = y = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    worst = 0.
    for step, i in zip(ours(answer, x, schedule, times, **options), peer.timesteps):
        y = peer.step(answer(y, i + 1), i, y).prev_sample
        worst = max(worst, (step.x - y).abs().max().item())
    return worst

EACH = pytest.mark.parametrize("schedule", [SCHEDULE, scaled_linear_schedule()], ids=["linear", "scaled_linear"])
COUNTS = (1, 2, 5, 8, 10, 16, 20)

@EACH
@pytest.mark.parametrize("rule, name", [("midpoint", "midpoint"), ("exact", "heun")])
def test_equals_diffusers_multistep(rule, name, schedule):
    for n in COUNTS:
        for order in (1, 2): assert apart(dpm_solver, DPMSolverMultistepScheduler, n, dict(order=order, rule=rule), schedule, solver_order=order, solver_type=name) < 1e-5

@EACH
def test_equals_diffusers_multistep_three_with_half_the_curvature(schedule):
    for n in COUNTS:
        assert apart(dpm_solver, DPMSolverMultistepScheduler, n, dict(order=3, rule="halved"), schedule, solver_order=3) < 1e-5
        if n > 4: assert apart(dpm_solver, DPMSolverMultistepScheduler, n, dict(order=3), schedule, solver_order=3) > 1e-4

@EACH
@pytest.mark.parametrize("rule, name", [("midpoint", "midpoint"), ("exact", "heun")])
def test_equals_diffusers_singlestep(rule, name, schedule):
    for n in (5, 8, 10, 16, 20):
        for order in (1, 2, 3):
            assert apart(dpm_solver, DPMSolverSinglestepScheduler, n, dict(order=order, rule=rule, singlestep=True, lower_order_final=True), schedule,
                         solver_order=order, solver_type=name, lower_order_final=True) < 1e-5

@EACH
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_equals_diffusers_unipc(variant, schedule):
    for n in COUNTS:
        for order in (1, 2, 3):
            assert apart(unipc, UniPCMultistepScheduler, n, dict(order=order, variant=variant), schedule, solver_order=order, solver_type=variant) < 1e-5
        assert apart(unipc, UniPCMultistepScheduler, n, dict(order=3, variant=variant, corrector=False), schedule, solver_order=3, solver_type=variant, disable_corrector=list(range(n))) < 1e-5


# ------------------------------------------------------------------ fresh noise
@EACH
@pytest.mark.parametrize("rule, name", [("midpoint", "midpoint"), ("exact", "heun")])
def test_full_fresh_noise_equals_diffusers_sde_solver(rule, name, schedule):
    for n in COUNTS:
        for order in (1, 2):
            peer = DPMSolverMultistepScheduler(1000, prediction_type="sample", final_sigmas_type="zero", trained_betas=schedule.beta[1:].tolist(),
                                               algorithm_type="sde-dpmsolver++", solver_order=order, solver_type=name)
            peer.set_timesteps(n)
            times = torch.cat([peer.timesteps + 1, torch.zeros(1, dtype=torch.long)])
            x = y = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
            g, h = (torch.Generator().manual_seed(1) for _ in range(2))
            for step, i in zip(dpm_solver(answer, x, schedule, times, order=order, rule=rule, eta=1., generator=g), peer.timesteps):
                y = peer.step(answer(y, i + 1), i, y, variance_noise=torch.randn(x.shape, generator=h)).prev_sample
                assert (step.x - y).abs().max() < 1e-5

@given(st.floats(0, 1), st.integers(2, 12))
def test_order_one_is_ddim_with_the_same_eta(eta, n):
    denoise, x = MixtureDenoiser(WORLD, SCHEDULE), start(SCHEDULE, 5)
    def walk(sampler, **options): return sampler(denoise, x, SCHEDULE, SCHEDULE.times(n), eta=eta, generator=torch.Generator().manual_seed(1), **options)
    for ours, theirs in zip(walk(dpm_solver, order=1), walk(ddim)): torch.testing.assert_close(ours.x, theirs.x, rtol=1e-8, atol=1e-8)

def test_order_one_with_full_noise_is_ancestral_sampling_and_has_a_name():
    denoise, x, times = MixtureDenoiser(WORLD, SCHEDULE), start(SCHEDULE, 5), SCHEDULE.times(9)
    walks = [sampler(denoise, x, SCHEDULE, times, generator=torch.Generator().manual_seed(1), **options)
             for sampler, options in ((sde_dpm_solver, dict(order=1)), (dpm_solver, dict(order=1, eta=1.)), (ddpm, {}))]
    for a, b, c in zip(*walks):
        assert torch.equal(a.x, b.x)
        torch.testing.assert_close(a.x, c.x, rtol=1e-8, atol=1e-8)

@pytest.mark.parametrize("schedule", [SCHEDULE, cosine_schedule(), Straight(), Exploding()], ids=["linear", "cosine", "straight", "exploding"])
@pytest.mark.parametrize("eta", [.4, 1.])
def test_marginals_are_right_at_every_time_with_fresh_noise(schedule, eta):
    "Mean and covariance of 4,000 samples against the chain's; five standard errors of a mean are 0.06 of the spread, and 100 moves are off by less."
    denoise, n = MixtureDenoiser(WORLD, schedule), 4000
    p, m, s = WORLD.weights, WORLD.means, WORLD.std
    mean = (p[:, None]*m).sum(0)
    cov = ((m - mean).T*p) @ (m - mean) + (p*s**2).sum()*torch.eye(2, dtype=torch.float64)
    for step in dpm_solver(denoise, start(schedule, n), schedule, logsnr_times(schedule, 100, high=None), eta=eta, generator=torch.Generator().manual_seed(3)):
        a, b = schedule.signal(step.t), schedule.noise(step.t)
        wanted = a**2*cov + b**2*torch.eye(2, dtype=torch.float64)
        spread = wanted.diagonal().max().sqrt()
        assert (step.x.mean(0) - a*mean).abs().max() < .1*spread, step.t
        assert (step.x.T.cov() - wanted).abs().max() < .15*spread**2, step.t

@pytest.mark.parametrize("order, slope", [(1, 1), (2, 2), (3, 2)])
def test_the_spread_under_fresh_noise_converges_with_this_order(order, slope, monkeypatch):
    "One Gaussian: the walk is linear, so unit draws give the variance exactly. Noise takes the third order down to the second."
    denoise = MixtureDenoiser(GaussianMixture(torch.tensor([[0.]], dtype=torch.float64), .5), SCHEDULE)
    true_variance = lambda t: .25*SCHEDULE.signal(t)**2 + SCHEDULE.noise(t)**2
    def off(n):
        x, units = torch.zeros(n + 1, 1, dtype=torch.float64), iter(range(1, n + 1))
        x[0] = true_variance(SCHEDULE.T).sqrt()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", lambda shape, **kwargs: torch.eye(n + 1, dtype=torch.float64)[:, next(units), None])
            step = last(dpm_solver, denoise, x, SCHEDULE, even(n), order=order, eta=1., lower_order_final=False)
        return (step.x.square().sum() - true_variance(step.t)).abs().item()
    assert abs(math.log2(off(96)/off(192)) - slope) < .2


# ------------------------------------------------------------------ both ends
WAYS = [(dpm_solver, dict(order=p, singlestep=s, rule=r, lower_order_final=f)) for p in (1, 2, 3) for s in (False, True) for r in ("midpoint", "exact", "halved") for f in (False, True)]
WAYS += [(unipc, dict(order=p, variant=v, lower_order_final=f, corrector=c)) for p in (1, 2, 3) for v in ("bh1", "bh2") for f in (False, True) for c in (False, True)]
NOISY = [(dpm_solver, dict(order=p, eta=eta)) for p in (1, 2, 3) for eta in (.5, 1.)]      # these arrive somewhere else each time

@pytest.mark.parametrize("schedule", [zero_terminal_snr(linear_schedule()), cosine_schedule(), Straight(), Exploding()], ids=["zero_terminal", "cosine", "straight", "exploding"])
def test_every_way_is_finite_at_both_ends(schedule):
    denoise, x = MixtureDenoiser(WORLD, schedule), start(schedule, 3)
    for sampler, options in WAYS + NOISY:
        for n in (1, 2, 3, 6):
            steps = list(sampler(denoise, x, schedule, schedule.times(n), **options))
            assert len(steps) == n and steps[-1].t == 0 and all(s.x.isfinite().all() and s.x.dtype == x.dtype for s in steps), (options, n)
            torch.testing.assert_close(steps[-1].x, steps[-1].x0)      # the last move is the last answer

@pytest.mark.parametrize("schedule", [zero_terminal_snr(linear_schedule()), Straight(), Exploding()], ids=["zero_terminal", "straight", "exploding"])
def test_every_way_arrives_at_the_same_points(schedule):
    denoise, x = MixtureDenoiser(WORLD, schedule), start(schedule, 20)
    goal = last(unipc, denoise, x, schedule, logsnr_times(schedule, 300, high=None), order=3).x
    for sampler, options in WAYS[1::4]:
        off = (last(sampler, denoise, x, schedule, logsnr_times(schedule, 60, high=None), **options).x - goal).abs().max()
        assert off < (.2 if options["order"] == 1 else .05), (options, off)

def test_float32_and_float_times():
    denoise = MixtureDenoiser(WORLD, SCHEDULE)
    x = start(SCHEDULE, 5).float()
    for step in unipc(denoise, x, SCHEDULE, torch.tensor([999.5, 400.25, 33.])): assert step.x.dtype == torch.float32
    assert step.t == 33 and isinstance(step, Step)
    torch.testing.assert_close(step.x, last(unipc, denoise, x.double(), SCHEDULE, [999.5, 400.25, 33.]).x.float(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ times, mistake 11
@given(st.integers(1, 40), st.floats(-9., -4.), st.floats(2., 9.))
def test_logsnr_times_are_even(n, low, high):
    times = logsnr_times(SCHEDULE, n, low, high)
    assert len(times) == n + 1 and times[0] == 1000 and times[-1] == 0 and bool((times[1:] < times[:-1]).all())
    if n > 2: assert (SCHEDULE.logsnr(times[1:-1]) - torch.linspace(low, high, n)[1:]).abs().max() < 1e-5

@pytest.mark.parametrize("schedule", [SCHEDULE, cosine_schedule(), zero_terminal_snr(linear_schedule()), Straight(), Exploding(), scaled_linear_schedule()])
def test_logsnr_times_end_at_five_unless_told_otherwise_and_never_below_the_schedules_own_last(schedule):
    own = schedule.logsnr(schedule.times()[-2]).item()
    for high, wanted in (({}, 5.), (dict(high=7.), 7.), (dict(high=None), own), (dict(high=99.), own)):
        times = logsnr_times(schedule, 6, **high)
        assert abs(schedule.logsnr(times[-2]).item() - min(wanted, own)) < 1e-5 and times[0] == schedule.T
    short = cosine_schedule(4)      # its last look is above log-SNR 5 nowhere
    assert short.logsnr(1) < 5 and abs(logsnr_times(short, 3)[-2] - 1) < 1e-6

def test_mistake_11_the_denoiser_is_asked_at_the_times_of_the_schedule():
    for schedule in (cosine_schedule(50), Straight(), Exploding()):
        for sampler, options in WAYS[::3] + NOISY:
            asked, times = [], logsnr_times(schedule, 6)
            def spy(x, t, cond):
                asked.append(t)
                assert cond == "boot"
                return x*0
            list(sampler(spy, torch.zeros(1, 2), schedule, times, cond="boot", **options))
            assert torch.equal(torch.stack(asked), times[:-1])


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize("sampler", [dpm_solver, unipc])
def test_bad_input(sampler):
    x, good = torch.zeros(2, 2), lambda x, t, cond: x
    for order in (0, 4, 7, 1.5, "2", None):
        with pytest.raises(ValueError, match="order: got .*wanted 1, 2 or 3"): list(sampler(good, x, SCHEDULE, order=order))
    for times in ([5], [5, 5, 0], [0, 5], [1001, 0], [5, -1]):
        with pytest.raises(ValueError, match="^(times|t): got"): list(sampler(good, x, SCHEDULE, times))
    with pytest.raises(ValueError, match=r"denoise: returned shape \(2,\), wanted x's"): list(sampler(lambda x, t, cond: x[:, 0], x, SCHEDULE))
    with pytest.raises(ValueError, match="n: got 0 moves"): sample(good, x, SCHEDULE, sampler, steps=0)
    dead = Straight()
    dead.signal = lambda t: (dead.check(t) < .5)*1.
    with pytest.raises(ValueError, match="times: got log-SNRs .*finite"): list(sampler(good, x, dead, [1., .9, .2, 0.]))

def test_bad_rules_and_times():
    x, good = torch.zeros(2, 2), lambda x, t, cond: x
    with pytest.raises(ValueError, match="rule: got 'bh1', wanted 'midpoint' or"): list(dpm_solver(good, x, SCHEDULE, rule="bh1"))
    with pytest.raises(ValueError, match="variant: got 'bh3', wanted 'bh1' or 'bh2'"): list(unipc(good, x, SCHEDULE, variant="bh3"))
    for n in (0, -1, 2.5):
        with pytest.raises(ValueError, match="n: got"): logsnr_times(SCHEDULE, n)
    with pytest.raises(ValueError, match="high: got -9"): logsnr_times(SCHEDULE, 5, high=-9.)

def test_bad_fresh_noise():
    x, good = torch.zeros(2, 2), lambda x, t, cond: x
    for eta in (2, -.1, math.nan):
        with pytest.raises(ValueError, match="eta: got .*wanted 0 .*to 1"): list(dpm_solver(good, x, SCHEDULE, SCHEDULE.times(4), eta=eta))
    with pytest.raises(ValueError, match="eta: got 0.5 with singlestep, wanted 0"): list(dpm_solver(good, x, SCHEDULE, eta=.5, singlestep=True))

def test_no_noise_is_drawn():
    g = torch.Generator().manual_seed(0)
    before = g.get_state()
    for sampler in (dpm_solver, unipc): last(sampler, MixtureDenoiser(WORLD, SCHEDULE), start(SCHEDULE, 4), SCHEDULE, SCHEDULE.times(6), generator=g)
    assert torch.equal(before, g.get_state())
