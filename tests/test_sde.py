"SDE, ODE and likelihood: closed forms, orders of convergence, DDIM as Euler's method, diffusers' schedulers move by move, and bad input."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_book.ddim import ddim
from diffusion_book.ideal import GaussianMixture, MixtureDenoiser, sliced_wasserstein
from diffusion_book.posterior import step_between
from diffusion_book.sampling import ddpm
from diffusion_book.schedules import Schedule, cosine_schedule, linear_schedule, sigmoid_schedule, zero_terminal_snr
from diffusion_book.sde import VPSchedule, _move, euler_maruyama, flow_velocity, log_likelihood, sde_coefficients


class Straight(Schedule):
    "The straight line of flow matching: no signal at T."
    def signal(self, t): return 1 - self.check(t)
    def noise(self, t): return self.check(t)
    def times(self, n=None): return torch.linspace(1, 0, (n or 100) + 1, dtype=torch.float64)


class Exploding(Schedule):
    "Data never shrunk, the noise level is the time."
    T = 80.
    def signal(self, t): return torch.ones_like(self.check(t))
    def noise(self, t): return self.check(t)
    def times(self, n=None): return (torch.linspace(80**(1/7), 0, (n or 100) + 1, dtype=torch.float64)**7).clamp(max=80)


class SubVP(Straight):
    "Song et al.'s sub-VP, written without VPSchedule, so that its coefficients come by differentiation."
    def signal(self, t): return (-.05*self.check(t) - 19.9/4*self.check(t)**2).exp()
    def noise(self, t): return 1 - self.signal(t)**2


VP = VPSchedule()
SCHEDULES = {"vp": VP, "cosine": cosine_schedule(), "linear": linear_schedule(), "sigmoid": sigmoid_schedule(100),
             "zero": zero_terminal_snr(linear_schedule()), "straight": Straight(), "exploding": Exploding(), "subvp": SubVP()}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
LINE = GaussianMixture(torch.tensor([-1., .6], dtype=torch.float64), [.15, .3], [.3, .7])
PLANE = GaussianMixture(torch.tensor([[1., 0], [-.5, .8], [-.4, -1]], dtype=torch.float64), [.2, .3, .15], [.5, .3, .2])


def seeded(seed): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)
def order(errors): return [math.log2(a/b) for a, b in zip(errors, errors[1:])]


def even_angles(schedule, n):
    "Times at which atan(noise/signal) is evenly spaced, down to 0."
    theta = torch.linspace(1, 0, n + 1, dtype=torch.float64)*torch.atan2(schedule.noise(schedule.T), schedule.signal(schedule.T))
    times = schedule.time_at(-2*theta.tan().log())
    times[0], times[-1] = schedule.T, 0.
    return times


def last(sampler, denoise, x, schedule, times, **options):
    for step in sampler(denoise, x, schedule, times, **options): pass
    return step.x


# ------------------------------------------------------------------ the schedule and its coefficients
@given(st.floats(.01, 5), st.floats(0, 30), st.floats(0, 1))
@settings(deadline=None)
def test_vp_curves(low, extra, t):
    s = VPSchedule(low, low + extra)
    total = low*t + extra*t**2/2
    assert float(s.signal(t)) == pytest.approx(math.exp(-total/2))
    assert float(s.noise(t)**2) == pytest.approx(-math.expm1(-total), rel=1e-9)
    assert s.config == dict(name="vp", beta_min=low, beta_max=low + extra)


@given(st.integers(1, 300))
@settings(deadline=None)
def test_times(n):
    times = VP.times(n)
    assert len(times) == n + 1 and times[0] == 1 and times[-1] == 0 and bool((times.diff() < 0).all())


@each_schedule
def test_coefficients_are_those_of_a_short_jump(schedule):
    "From the left: over a short time h before t the jump has factor 1 + f h and variance g2 h."
    t = torch.tensor([.02, .1, .37, .5, .8, .93], dtype=torch.float64)*schedule.T
    if hasattr(schedule, "beta") and not isinstance(schedule, VPSchedule): t = torch.cat([t, t.round().clamp(min=1)])
    h = 1e-8*schedule.T
    factor, variance, _ = step_between(t, schedule, t - h)
    f, g2 = sde_coefficients(t, schedule)
    torch.testing.assert_close((factor - 1)/h, f, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(variance/h, g2, rtol=1e-4, atol=1e-6)


def test_coefficients_at_the_ends():
    f, g2 = sde_coefficients(torch.tensor([0., 1]), VP)
    torch.testing.assert_close(torch.stack([f, g2]), torch.tensor([[-.05, -10], [.1, 20]], dtype=torch.float64))
    for name in ("cosine", "linear", "subvp", "exploding"):
        f, g2 = sde_coefficients(torch.tensor([0., SCHEDULES[name].T]), SCHEDULES[name])
        assert bool(f.isfinite().all() and g2.isfinite().all() and (g2 >= 0).all()), name
    for name in ("straight", "zero"): assert sde_coefficients(SCHEDULES[name].T, SCHEDULES[name])[0] == -math.inf
    for bad in (-1, 1.01):
        with pytest.raises(ValueError, match="t: got"): sde_coefficients(bad, VP)


def test_sub_vp_as_in_the_paper():
    t = torch.tensor([.1, .4, .9], dtype=torch.float64)
    f, g2 = sde_coefficients(t, SubVP())
    torch.testing.assert_close(f, -VP.beta(t)/2)
    torch.testing.assert_close(g2, VP.beta(t)*(1 - (-2*VP.total(t)).exp()))


def test_a_subclass_has_the_coefficients_of_its_own_curves():
    "A schedule that only changes VP's noise must not be given VP's rates."
    class Written(VPSchedule):
        def noise(self, t): return 1 - self.signal(t)**2
    t = torch.tensor([.2, .5, .9], dtype=torch.float64)
    f, g2 = sde_coefficients(t, Written())
    torch.testing.assert_close(f, -VP.beta(t)/2)
    torch.testing.assert_close(g2, VP.beta(t)*(1 - (-2*VP.total(t)).exp()))


def test_rate_of_the_chain_is_its_beta():
    "beta counts from the start of the step, g2 from its end, so g2 is a little more."
    ratio = sde_coefficients(torch.arange(1, 1001), SCHEDULES["linear"])[1]/SCHEDULES["linear"].beta[1:]
    assert 1 < ratio.min() and ratio.max() < 1.02


# ------------------------------------------------------------------ the reverse SDE
def test_equals_diffusers_vp_move_by_move():
    "The textbook's rates; their 1000 times 1, .999, ..., .001 and step 1/1000 are ours."
    from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler
    theirs = ScoreSdeVpScheduler()
    theirs.set_timesteps(1000)
    def eps_of(x): return (x*.7 + .1).tanh()
    def denoise(x, t, cond): return (x - VP.noise(t)*eps_of(x))/VP.signal(t)
    x = y = normal(2, 1, 4, 4)
    g = seeded(1)
    walk = euler_maruyama(denoise, x, VP, VP.times(1000), generator=seeded(1), rates="start")
    for k, step in enumerate(walk):
        t = torch.tensor(1 - k/1000, dtype=torch.float64)     # theirs in float32 loses digits near 0
        y, mean = theirs.step_pred(eps_of(y), y, t, generator=g)
        torch.testing.assert_close(step.x, mean if k == 999 else y, rtol=1e-5, atol=1e-5)
    assert float(theirs.timesteps[500]) == pytest.approx(float(VP.times(1000)[500]), abs=1e-6)


def test_equals_diffusers_ve_move_by_move():
    "The rates of the whole move, on their ladder of noise levels."
    from diffusers import ScoreSdeVeScheduler
    theirs = ScoreSdeVeScheduler(num_train_timesteps=50, sigma_min=.01, sigma_max=50., sampling_eps=1e-5)
    theirs.set_timesteps(50)
    theirs.set_sigmas(50)
    sigmas = torch.cat([theirs.discrete_sigmas.double().flip(0), torch.zeros(1).double()])
    schedule = Exploding()
    def score(x): return -(x*.02).tanh()
    def denoise(x, t, cond): return x + t**2*score(x)
    y = normal(2, 1, 4, 4)*50
    for k, i in enumerate(range(49, 0, -1)):
        ours = next(euler_maruyama(denoise, y, schedule, sigmas[k:k + 2], generator=seeded(i))).x
        y = theirs.step_pred(score(y), torch.tensor(i/49 + 1e-6), y, generator=seeded(i)).prev_sample.double()
        assert (ours - y).abs().max() < 1e-5*y.abs().max()      # their ladder of noise levels is in float32


@pytest.mark.parametrize("rates", ["move", "start"])
@pytest.mark.parametrize("end", [0., .2])
def test_weak_order_one_on_a_gaussian(rates, end):
    "For Gaussian data each move is linear, so the variance it ends with is computed without a sample."
    def left(n, c=.25):
        var, one = (VP.signal(1)**2*c + VP.noise(1)**2).item(), torch.ones(1, dtype=torch.float64)
        times = torch.linspace(1, end, n + 1, dtype=torch.float64)
        for t, s in zip(times[:-1], times[1:]):
            a, b = VP.signal(t), VP.noise(t)
            mean, std = _move(a*c/(a**2*c + b**2)*one, one, t, s, VP, rates)
            var = (mean**2*var + (std**2 if s > 0 else 0)).item()
        return abs(var - (VP.signal(end)**2*c + VP.noise(end)**2).item())
    assert order([left(n) for n in (400, 800, 1600)]) == pytest.approx([1, 1], abs=.2)


def test_strong_order_one_on_a_mixture():
    "Moves of any length on the same Wiener path; additive noise has strong order one."
    denoise, n = MixtureDenoiser(LINE, VP), 2048
    kicks, start = normal(300, n)/n**.5, normal(300, seed=1)
    times = torch.linspace(1, .1, n + 1, dtype=torch.float64)
    def ride(m):
        x, kick, when = start, kicks.reshape(300, m, -1).sum(2)*m**.5, times[::n//m]
        for k in range(m):
            mean, std = _move(denoise(x, when[k]), x, when[k], when[k + 1], VP, "move")
            x = mean + std*kick[:, k]
        return x
    fine = ride(n)
    errors = [(ride(m) - fine).abs().median().item() for m in (32, 64, 128, 256)]
    assert sum(order(errors))/3 == pytest.approx(1, abs=.2)


def test_tends_to_ancestral_sampling():
    denoise, x = MixtureDenoiser(LINE, VP), normal(500)
    def gap(n, variance):
        ends = [last(s, denoise, x, VP, VP.times(n), generator=seeded(2), **o)
                for s, o in ((euler_maruyama, {}), (ddpm, dict(variance=variance)))]
        return (ends[0] - ends[1]).abs().median().item()
    large, small = ([gap(n, v) for n in (50, 400)] for v in ("large", "small"))
    assert order(large)[0]/3 == pytest.approx(1, abs=.25) and .4 < order(small)[0]/3 < .95      # the last moves' variance tends slowly


@each_schedule
def test_reverse_sde_reaches_the_data(schedule):
    denoise, x = MixtureDenoiser(PLANE, schedule), normal(1500, 2)*schedule.noise(schedule.T)
    got = last(euler_maruyama, denoise, x, schedule, even_angles(schedule, 100), generator=seeded(3))
    truth = PLANE.sample(1500, seeded(4))
    floor = max(sliced_wasserstein(PLANE.sample(1500, seeded(s)), truth, generator=seeded(9)) for s in range(5, 9))
    assert sliced_wasserstein(got, truth, generator=seeded(9)) < 1.5*floor + .02     # .02: the bias of 100 moves


@given(st.integers(1, 40))
@settings(deadline=None, max_examples=15)
def test_one_draw_a_move_and_none_at_the_last(n):
    g, h = seeded(0), seeded(0)
    steps = list(euler_maruyama(lambda x, t, c: x, torch.zeros(1, 1), VP, VP.times(n), generator=g))
    for _ in range(n - 1): torch.randn(1, 1, generator=h)
    assert len(steps) == n and steps[-1].t == 0 and torch.equal(g.get_state(), h.get_state())


def test_times_need_not_end_at_zero():
    g, h = seeded(0), seeded(0)
    steps = list(euler_maruyama(lambda x, t, c: x, torch.zeros(1, 1), VP, torch.tensor([1, .6, .3]), generator=g))
    for _ in range(2): torch.randn(1, 1, generator=h)
    assert steps[-1].t == pytest.approx(.3) and torch.equal(g.get_state(), h.get_state())


# ------------------------------------------------------------------ the ODE
@each_schedule
def test_velocity_in_both_forms(schedule):
    t = torch.tensor([.1, .3, .7, .9], dtype=torch.float64)*schedule.T
    x = normal(4, 2)
    (f, g2), denoise = sde_coefficients(t, schedule), MixtureDenoiser(PLANE, schedule)
    want = f[:, None]*x - g2[:, None]/2*PLANE.score(x, t, schedule)
    torch.testing.assert_close(flow_velocity(denoise, x, t, schedule), want, rtol=1e-8, atol=1e-8)
    for k in range(4): torch.testing.assert_close(flow_velocity(denoise, x[k:k + 1], t[k].item(), schedule), want[k:k + 1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["vp", "cosine", "straight", "exploding", "subvp"])
def test_ddim_is_eulers_method_in_units_of_the_signal(name):
    "x/signal goes a straight way over noise/signal, in the direction of the guessed noise."
    schedule, x = SCHEDULES[name], normal(6, 2)
    t, s = .8*schedule.T, .5*schedule.T
    denoise, (a, b), (a_s, b_s) = MixtureDenoiser(PLANE, schedule), *((schedule.signal(u), schedule.noise(u)) for u in (t, s))
    euler = a_s*(x/a + (b_s/a_s - b/a)*(x - a*denoise(x, t))/b)
    torch.testing.assert_close(last(ddim, denoise, x, schedule, torch.tensor([t, s], dtype=torch.float64)), euler, rtol=1e-9, atol=1e-9)


def test_ddim_solves_the_ode_with_order_one():
    "Against scipy's solution of the flow in plain time."
    from scipy.integrate import solve_ivp
    denoise, x = MixtureDenoiser(PLANE, VP), normal(8, 2)
    def rhs(t, y): return flow_velocity(denoise, torch.from_numpy(y).reshape(8, 2), t, VP).flatten().numpy()
    solved = torch.from_numpy(solve_ivp(rhs, (1, .01), x.flatten().numpy(), rtol=1e-9, atol=1e-9).y[:, -1]).reshape(8, 2)
    misses = [(last(ddim, denoise, x, VP, torch.linspace(1, .01, n + 1, dtype=torch.float64)) - solved).abs().median().item() for n in (100, 200, 400)]
    assert order(misses) == pytest.approx([1, 1], abs=.2)


@pytest.mark.parametrize("name", ["vp", "straight", "exploding"])
def test_quantiles_are_kept(name):
    "In one dimension paths can't cross: the share to the left of a path never changes."
    from scipy.integrate import solve_ivp
    schedule = SCHEDULES[name]
    denoise, x, ends = MixtureDenoiser(LINE, schedule), torch.linspace(-2, 2, 9, dtype=torch.float64)*schedule.noise(schedule.T), (schedule.T, .02*schedule.T)
    def share(x, t):
        z = (x[:, None] - schedule.signal(t)*LINE.means[:, 0])/((schedule.signal(t)*LINE.std)**2 + schedule.noise(t)**2).sqrt()
        return (torch.special.ndtr(z)*LINE.weights).sum(1)
    def rhs(t, y): return flow_velocity(denoise, torch.from_numpy(y), t, schedule).numpy()
    solved = torch.from_numpy(solve_ivp(rhs, ends, x.numpy(), rtol=1e-7, atol=1e-7).y[:, -1])
    torch.testing.assert_close(share(solved, ends[1]), share(x, ends[0]), rtol=0, atol=1e-5)


# ------------------------------------------------------------------ likelihood
@pytest.mark.parametrize("name", ["zero", "straight"])
@pytest.mark.parametrize("share", [0., .3])
def test_gaussian_in_closed_form(name, share):
    schedule = SCHEDULES[name]
    t, x = share*schedule.T, normal(6, 3)
    a, var = schedule.signal(t), (.7*schedule.signal(t))**2 + schedule.noise(t)**2
    closed = -(x - .5*a).square().sum(1)/(2*var) - 1.5*torch.log(2*math.pi*var)
    denoise = MixtureDenoiser(GaussianMixture(torch.full((1, 3), .5).double(), .7), schedule)
    torch.testing.assert_close(log_likelihood(denoise, x, schedule, t=t), closed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vp", "cosine", "straight", "exploding", "subvp"])
def test_mixture_in_the_plane(name):
    "What is left of the data at T bounds how right the end density can be: 0.7 % of signal for vp and subvp, 1/80 of the data for exploding."
    schedule, x = SCHEDULES[name], PLANE.sample(40, seeded(1))
    got = log_likelihood(MixtureDenoiser(PLANE, schedule), x, schedule)
    assert (got - PLANE.log_prob(x)).abs().max() < {"straight": 1e-3, "cosine": 1e-3}.get(name, .05)


def test_likelihood_has_third_order():
    schedule, x = SCHEDULES["straight"], PLANE.sample(40, seeded(1))
    errors = [(log_likelihood(MixtureDenoiser(PLANE, schedule), x, schedule, n) - PLANE.log_prob(x)).abs().median().item() for n in (32, 64, 128)]
    assert order(errors) == pytest.approx([3, 3], abs=.5)


def test_density_integrates_to_one():
    schedule, side = SCHEDULES["straight"], torch.linspace(-3, 3, 61, dtype=torch.float64)
    p = log_likelihood(MixtureDenoiser(PLANE, schedule), torch.cartesian_prod(side, side), schedule, 32).exp()
    assert p.sum()*(side[1] - side[0])**2 == pytest.approx(1, abs=1e-3)


def test_hutchinson_is_right_on_average():
    schedule, x = SCHEDULES["straight"], PLANE.sample(1, seeded(1)).repeat(400, 1)
    denoise = MixtureDenoiser(PLANE, schedule)
    guess = log_likelihood(denoise, x, schedule, 24, probes=1, generator=seeded(2))
    exact = log_likelihood(denoise, x[:1], schedule, 24)
    assert guess.std() > 1e-3 and abs(guess.mean() - exact) < 4*guess.std()/20      # 4 standard errors
    again = log_likelihood(denoise, x[:5], schedule, 24, probes=1, generator=seeded(3))
    assert torch.equal(again, log_likelihood(denoise, x[:5], schedule, 24, probes=1, generator=seeded(3)))


def test_images_keep_their_shape_and_no_gradient_is_left():
    world = GaussianMixture(torch.zeros(1, 1, 2, 2).double(), .5)
    x = normal(3, 1, 2, 2).requires_grad_()
    got = log_likelihood(MixtureDenoiser(world, Straight()), x, Straight(), 32)
    assert got.shape == (3,) and got.dtype == torch.float64 and not got.requires_grad and x.grad is None
    torch.testing.assert_close(got, world.log_prob(x.detach()), rtol=0, atol=1e-4)


# ------------------------------------------------------------------ bad input
def test_bad_input():
    x, denoise, ring = torch.zeros(2, 2), MixtureDenoiser(PLANE, VP), PLANE.sample(2, seeded(0))
    for low, high in ((0, 1), (2, 1), (-1, 1), (.1, math.inf), (math.nan, 1)):
        with pytest.raises(ValueError, match="beta_min, beta_max: got"): VPSchedule(low, high)
    for n in (0, -3, 2.5):
        with pytest.raises(ValueError, match="n: got .* wanted a whole number"): VP.times(n)
    with pytest.raises(ValueError, match="times: got"): list(euler_maruyama(denoise, x, VP, torch.tensor([0., 1.])))
    with pytest.raises(ValueError, match=r"denoise: returned shape \(2,\)"): list(euler_maruyama(lambda x, t, c: x[:, 0], x, VP, VP.times(2)))
    with pytest.raises(ValueError, match="rates: got 'end'"): list(euler_maruyama(denoise, x, VP, rates="end"))
    with pytest.raises(ValueError, match="rates are infinite"): list(euler_maruyama(denoise, x, Straight(), Straight().times(3), rates="start"))
    with pytest.raises(ValueError, match="t: got 0"): flow_velocity(denoise, x, 0, VP)
    with pytest.raises(ValueError, match="steps: got 0"): log_likelihood(denoise, ring, VP, 0)
    with pytest.raises(ValueError, match="probes: got 0"): log_likelihood(denoise, ring, VP, probes=0)
    with pytest.raises(ValueError, match="t: got 1.0"): log_likelihood(denoise, ring, VP, t=1.)
    with pytest.raises(ValueError, match="no_grad"): log_likelihood(lambda x, t, c: denoise(x, t).detach(), ring, VP)
    with pytest.raises(TypeError, match="x0: got dtype torch.int64"): log_likelihood(denoise, torch.zeros(2, 2).long(), VP)
