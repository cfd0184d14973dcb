"The EDM chapter: its identities, the order of its samplers, diffusers' schedulers move by move, and bad input."
import math

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffusion_book.edm import (EDMSchedule, Preconditioned, add_churn, euler, euler_ancestral, heun, karras_sigmas,
                                karras_times, lognormal_times, sigma_of, slope, time_of_sigma)
from diffusion_book.ideal import FiniteDenoiser, GaussianMixture, MixtureDenoiser
from diffusion_book.objective import Denoiser, from_x0_and_eps, simple_loss
from diffusion_book.sampling import SAMPLERS, ddpm, find_sampler, sample
from diffusion_book.schedules import Schedule, SCHEDULES, cosine_schedule, like, linear_schedule, noise_to, zero_terminal_snr
from diffusion_book.training import train
from diffusion_book.unet import UNet

EDM, LINEAR, COSINE = EDMSchedule(), linear_schedule(), cosine_schedule()
WORLD = GaussianMixture(torch.tensor([[-1., 0.], [1.5, .5]], dtype=torch.float64), [.2, .4], [.3, .7])
close = torch.testing.assert_close


class Straight(Schedule):
    "Signal 1 - t, noise t: no signal at all at T."
    T = 1.
    def signal(self, t): return 1 - self.check(t)
    def noise(self, t): return self.check(t)
    def times(self, n=None): return torch.linspace(1, 0, (n or 20) + 1, dtype=torch.float64)


def rng(seed=0): return torch.Generator().manual_seed(seed)

def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=rng(seed), dtype=dtype)

def last(walk):
    for step in walk: pass
    return step

def begin(schedule, times, n=200): return float(schedule.noise(times[0]))*normal(n, 2)

def bump(schedule): return MixtureDenoiser(WORLD, schedule)


# ------------------------------------------------------------------ the schedule and its times
@given(st.floats(.003, 79.))
def test_clock_logsnr_and_time_agree(sigma):
    close(EDM.time_at(EDM.logsnr(sigma)), torch.tensor(sigma, dtype=torch.float64))
    close(Schedule.time_at(EDM, EDM.logsnr(sigma)), torch.tensor(sigma, dtype=torch.float64), rtol=1e-9, atol=0)   # the general search
    c_noise = math.log(sigma)/4
    assert abs(float(EDM.clock(sigma)) - 1000*(4*c_noise - math.log(.002))/math.log(80/.002)) < 1e-2


def test_edm_schedule_at_its_ends():
    assert EDM.clock(0.) == EDM.clock(.002) == 0 and EDM.clock(80.) == 1000
    assert EDM.signal(torch.zeros(3)).tolist() == [1, 1, 1] and EDM.signal(0).dtype == torch.float64
    assert EDM.time_at(-math.inf) == 80 and EDM.time_at(math.inf) == 0
    with pytest.raises(ValueError, match="t: got"): EDM.noise(81.)


@given(st.integers(2, 60), st.floats(.5, 20.))
def test_karras_sigmas_fall_and_end_right(n, rho):
    sigmas = karras_sigmas(n, .01, 50., rho)
    assert len(sigmas) == n + 1 and sigmas[0] == 50 and sigmas[-1] == 0 and abs(sigmas[-2] - .01) < 1e-9
    assert (sigmas.diff() < 0).all()
    roots = sigmas[:-1]**(1/rho)
    close(roots.diff(), roots.diff().mean().expand(n - 1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", [EDM, LINEAR, COSINE, zero_terminal_snr(LINEAR), Straight(), SCHEDULES["sigmoid"]()])
def test_karras_times_of_any_schedule(schedule):
    times = karras_times(schedule, 10)
    sigmas = sigma_of(times, schedule)
    assert times[-1] == 0 and (times.diff() < 0).all() and sigmas[0] <= 80*(1 + 1e-9)
    close(sigmas, karras_sigmas(10, float(sigmas[-2]), float(sigmas[0])), rtol=1e-5, atol=1e-9)
    assert len(karras_times(schedule, 1)) == 2


def test_karras_times_start_at_T_where_that_has_less_noise():
    schedule = EDMSchedule(sigma_max=20.)
    assert karras_times(schedule, 5)[0] == 20 and abs(karras_times(schedule, 5, sigma_max=10.)[0] - 10) < 1e-9
    assert abs(karras_times(COSINE, 5)[-2] - 1) < 1e-6     # a network for steps 1...T has seen nothing below step 1


def test_drawn_times():
    g = rng()
    assert EDM.random_times(10_000, g).min() >= .002 and EDM.random_times(10_000, g).max() <= 80
    close(EDM.random_times(50, rng(1)), EDM.random_times(50, rng(1)))
    for schedule in (EDM, COSINE, Straight()):
        t = lognormal_times(schedule, 0., .5)(20_000, rng())
        assert t.shape == (20_000,) and t.min() > 0 and t.max() <= schedule.T
        logs = sigma_of(t, schedule).log()
        assert abs(logs.mean()) < 4*.5/20_000**.5 and abs(logs.std() - .5) < 4*.5/40_000**.5    # 4 standard errors


# ------------------------------------------------------------------ preconditioning
@given(st.floats(.003, 79.), st.floats(.05, 5.))
def test_factors_are_the_papers(sigma, d):
    skip, out, size = (float(c) for c in Preconditioned(None, EDM, d).factors(sigma))
    total = sigma**2 + d**2
    assert math.isclose(skip, d**2/total) and math.isclose(out, sigma*d/total**.5) and math.isclose(size, total**-.5)
    assert math.isclose(out**2, (1 - skip)**2*d**2 + skip**2*sigma**2)      # unit variance of the target
    for other in (skip - .01, skip + .01): assert (1 - other)**2*d**2 + other**2*sigma**2 > out**2


@pytest.mark.parametrize("schedule", [EDM, LINEAR, COSINE, zero_terminal_snr(LINEAR), Straight()])
def test_target_is_what_makes_the_estimate_right(schedule):
    "A network that says the target gives x0 at every time, the first and the last included."
    x0, eps = .7*normal(4, 3), normal(4, 3, seed=1)
    for t in (0., schedule.T/1000, schedule.T/3, schedule.T):
        denoise = Preconditioned(lambda x, clock, cond: denoise.target(x0, eps, t), schedule, .7)
        xt, _ = noise_to(x0, t, schedule, eps)
        assert denoise.target(x0, eps, t).isfinite().all()
        close(denoise(xt, t), x0, rtol=1e-9, atol=1e-9)


def test_input_and_target_have_unit_variance():
    x0, eps, n = .7*normal(40_000), normal(40_000, seed=1), 40_000
    denoise = Preconditioned(None, EDM, .7)
    for sigma in (.01, .7, 60.):
        seen, said = denoise.factors(sigma)[2]*(x0 + sigma*eps), denoise.target(x0, eps, sigma)
        for v in (seen, said): assert abs(v.std() - 1) < 5/(2*n)**.5        # 5 standard errors


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
def test_v_is_preconditioning_for_unit_variance(schedule):
    net = lambda x, clock, cond: (2*x + clock.reshape(-1, 1)/500).sin()
    v, unit = Denoiser(net, schedule, "v"), Preconditioned(lambda *a: -net(*a), schedule, 1.)
    x, t = normal(5, 4), torch.tensor([1, 200, 500, 999, 1000])
    close(v(x, t), unit(x, t), rtol=1e-9, atol=1e-9)
    x0, eps = normal(2, 5, 4)
    close(unit.target(x0, eps, t), -from_x0_and_eps(x0, eps, t, schedule, "v"), rtol=1e-9, atol=1e-9)


def test_network_is_told_sigma_and_clip_is_kept():
    seen = []
    def net(x, clock, cond):
        seen.append((x, clock, cond))
        return 0*x
    denoise = Preconditioned(net, EDM, .5, clip=(-.1, .1))
    out = denoise(torch.ones(2, 3), torch.tensor([.1, 10.]), "boot")
    x, clock, cond = seen[0]
    assert out.max() <= .1 and cond == "boot" and clock[0] < clock[1]
    close(x[:, 0].double(), torch.tensor([.26, 100.25], dtype=torch.float64)**-.5, rtol=1e-5, atol=1e-5)


def test_the_plain_loss_is_the_weighted_error_and_trains():
    "Karras et al. 2022, eq. 8, by simple_loss: the target is the denoiser's own."
    denoise = Preconditioned(lambda x, clock, cond: .3*x, EDM, .5)
    x0, eps = .5*normal(6, 4), normal(6, 4, seed=1)
    t = torch.tensor([.01, .1, .5, 1., 10., 70.])
    weight = (t**2 + .25)/(t*.5)**2
    by_hand = weight*(denoise(x0 + t[:, None]*eps, t) - x0).square().mean(1)
    close(simple_loss(denoise, x0, t, eps), by_hand, rtol=1e-6, atol=1e-9)
    torch.manual_seed(0)
    denoise, losses = Preconditioned(UNet(width=(16, 16)), EDM, .5), []
    images = (.5*normal(64, 1, 1, 1) + torch.zeros(64, 1, 8, 8)).float().clamp(-1, 1)      # flat pictures: quickly learned
    train(denoise, images, steps=100, batch_size=32, lr=1e-2, progress=False, device="cpu", precision="fp32",
          watch=lambda run, loss: losses.append(loss.item()))
    assert sum(losses[-20:]) < .85*sum(losses[:20])     # the loss of a network that says nothing is 1


# ------------------------------------------------------------------ samplers: identities
@pytest.mark.parametrize("schedule", [EDM, LINEAR, COSINE, zero_terminal_snr(LINEAR), Straight()])
def test_euler_and_ancestral_are_ddim_and_ddpm(schedule):
    ddim = find_sampler("ddim")
    times = schedule.times(9)
    x, denoise = begin(schedule, times), bump(schedule)
    for a, b in zip(euler(denoise, x, schedule, times), ddim(denoise, x, schedule, times)): close(a.x, b.x, rtol=1e-9, atol=1e-9)
    for eta in (.3, 1.):
        a = euler_ancestral(denoise, x, schedule, times, eta=eta, generator=rng(1))
        b = ddim(denoise, x, schedule, times, eta=eta, generator=rng(1))
        for one, two in zip(a, b): close(one.x, two.x, rtol=1e-7, atol=1e-7)
    a, b = (last(s(denoise, x, schedule, times, generator=rng(1))) for s in (euler_ancestral, ddpm))
    close(a.x, b.x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("sampler", [euler, heun, euler_ancestral])
def test_samples_do_not_depend_on_the_clothes(name, sampler):
    schedule = SCHEDULES[name]()
    times = karras_times(schedule, 8)
    sigmas, x, denoise = sigma_of(times, schedule), begin(schedule, times), bump(schedule)
    plain = EDMSchedule(sigma_max=float(sigmas[0]))
    def dressed(y, sigma, cond=None):
        t = time_of_sigma(sigma, schedule)
        return denoise(like(schedule.signal(t), y)*y, t, cond)
    options = {} if sampler is euler else dict(generator=rng(2))
    a = last(sampler(denoise, x, schedule, times, **options)).x
    if options: options = dict(generator=rng(2))
    close(a, last(sampler(dressed, x/schedule.signal(times[0]), plain, sigmas, **options)).x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", [euler, euler_ancestral, heun])
@pytest.mark.parametrize("schedule", [EDM, COSINE, zero_terminal_snr(LINEAR), Straight()])
def test_any_schedule_any_denoiser_ends_near_the_data(schedule, sampler):
    data = normal(5, 2)
    x = sample(FiniteDenoiser(data, schedule), (20, 2), schedule, sampler, 30, generator=rng(), progress=False)
    assert torch.cdist(x.double(), data).min(1).values.max() < 1e-2


@pytest.mark.parametrize("sampler,steps,options", [(euler_ancestral, 400, {}), (heun, 60, dict(churn=10.))])
def test_a_gaussian_comes_out_as_it_is(sampler, steps, options):
    n = 20_000
    denoise = MixtureDenoiser(GaussianMixture(torch.tensor([[1.]]), .5), EDM)
    x = sample(denoise, (n, 1), EDM, sampler, steps, generator=rng(), progress=False, **options)
    assert abs(x.mean() - 1) < 5*.5/n**.5 + .005 and abs(x.std() - .5) < 5*.5/(2*n)**.5 + .01     # 5 standard errors and the bias of the moves


# ------------------------------------------------------------------ order of convergence
@pytest.mark.parametrize("sampler,order", [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("sigma_end", [0., .05])
@pytest.mark.parametrize("schedule", [EDM, LINEAR])
def test_order_of_convergence(schedule, sampler, order, sigma_end):
    def times(n): return karras_times(schedule, n) if not sigma_end else time_of_sigma(karras_sigmas(n + 1, .05, 80.)[:-1], schedule)
    x, denoise = begin(schedule, times(5), 60), bump(schedule)
    fine = last(heun(denoise, x, schedule, times(500))).x
    def off(n): return (last(sampler(denoise, x, schedule, times(n))).x - fine).norm(dim=1).median().item()
    measured = math.log2(off(40)/off(80))
    assert abs(measured - order) < .25, measured


def spread_off(n, **slip):
    "Error of the spread of Gaussian samples after Heun with churn: each move is a number, so nothing is drawn."
    def guess(x, sigma): return x*.25/(.25 + sigma**2)
    sigmas, variance = karras_sigmas(n, .05, 20.)[:-1].tolist(), 20**2 + .25
    for old, new in zip(sigmas, sigmas[1:]):
        hat = old*(1 + min(10/n, 2**.5 - 1))
        asked, length = (old if slip.get(k) else hat for k in ("asked", "length"))
        d = (1 - guess(1., asked))/hat
        y = 1 + (new - hat)*d
        variance = (variance + hat**2 - old**2)*(1 + (new - length)*(d + (y - guess(y, new))/new)/2)**2
    return abs(variance**.5 - (.05**2 + .25)**.5)


def test_churn_keeps_the_order_and_a_missing_hat_loses_it():
    def order(**slip): return math.log2(spread_off(160, **slip)/spread_off(320, **slip))
    assert abs(order() - 2) < .1 and abs(order(asked=True) - 1) < .1 and order(length=True) < .3


@pytest.mark.parametrize("churn", [3., 6.])      # 6 in 12 moves is above the cap
def test_heun_with_churn_is_algorithm_2(churn):
    "A plain transcription in sigma, on the same noise, for an EDM and for a VP schedule."
    def algorithm_2(guess, x, sigmas, churn, s_min, s_max, s_noise, g):
        for old, new in zip(sigmas, sigmas[1:]):
            gamma = min(churn/(len(sigmas) - 1), 2**.5 - 1) if s_min <= old <= s_max and new > 0 else 0.
            hat = old*(1 + gamma)
            if gamma: x = x + (hat**2 - old**2)**.5*s_noise*torch.randn(x.shape, generator=g, dtype=x.dtype)
            d = (x - guess(x, hat))/hat
            y = x + (new - hat)*d
            x = y if new == 0 else x + (new - hat)*(d + (y - guess(y, new))/new)/2
        return x
    for schedule in (EDM, LINEAR):
        times = karras_times(schedule, 12, sigma_max=40.)
        a, x = schedule.signal(times[0]), 40*normal(50, 2)
        options = dict(churn=churn, s_min=.05, s_max=30., s_noise=1.01)
        got = last(heun(bump(schedule), x*a, schedule, times, generator=rng(3), **options)).x
        wanted = algorithm_2(lambda y, s: bump(EDM)(y, s), x, sigma_of(times, schedule).tolist(), **options, g=rng(3))
        close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [2, 5, 12])
def test_draws_once_a_move_and_never_at_the_last(n):
    def draws(sampler, **options):
        g, h = rng(), rng()
        end = last(sampler(lambda x, t, c: x, torch.zeros(1, 1), LINEAR, LINEAR.times(n), generator=g, **options))
        assert end.t == 0
        k = 0
        while not torch.equal(g.get_state(), h.get_state()) and k <= n: k += torch.randn(1, 1, generator=h) is not None
        return k
    assert draws(euler) == draws(heun) == 0
    assert draws(euler_ancestral) == draws(heun, churn=5.) == n - 1


# ------------------------------------------------------------------ diffusers
def guess(x, sigma): return (.3*x/(1 + sigma**2)**.5 + .1).tanh()

def against(theirs, sampler, n, noise_seed=None, **options):
    "Walk both on the same sigmas, predictions and noise; compare every state of first-order samplers, and the end."
    theirs.set_timesteps(n)
    second = isinstance(theirs, HeunDiscreteScheduler)
    sigmas = (torch.cat([theirs.sigmas[:1], theirs.sigmas[1::2]]) if second else theirs.sigmas).double()
    x = float(sigmas[0])*normal(2, 1, 4, 4)
    draw = {} if noise_seed is None else dict(generator=rng(noise_seed))
    ours = [s.x for s in sampler(lambda y, t, c: guess(y, t), x, EDMSchedule(sigma_max=float(sigmas[0])), sigmas, **options,
                                 **({} if noise_seed is None else dict(generator=rng(noise_seed))))]
    y, states = x, []
    for i in theirs.timesteps:
        sigma = theirs.sigmas[theirs.step_index or 0].double()
        theirs.scale_model_input(y, i)
        y = theirs.step((y - guess(y, sigma))/sigma, i, y, **draw).prev_sample
        states.append(y.double())
    for a, b in zip(ours[-1:] if second else ours, states[-1:] if second else states):
        assert (a - b).abs().max() < 1e-5*max(1, a.abs().max())    # theirs are float32 numbers, which start at 150


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("n", [5, 18])
def test_equals_diffusers(n, karras):
    made = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=.02, prediction_type="epsilon")
    against(EulerDiscreteScheduler(**made, use_karras_sigmas=karras), euler, n)
    against(HeunDiscreteScheduler(**made, use_karras_sigmas=karras), heun, n, euler_above=math.inf)
    if not karras: against(EulerAncestralDiscreteScheduler(**made), euler_ancestral, n, noise_seed=4)


def test_equals_diffusers_edm_with_preconditioning():
    theirs = EDMEulerScheduler(sigma_data=.7)
    theirs.set_timesteps(18)
    close(theirs.sigmas.double(), EDM.times(18), rtol=1e-6, atol=1e-7)
    net = lambda x, clock=None, cond=None: (2*x).sin()
    x = y = 80*normal(2, 1, 4, 4)
    for i, step in zip(theirs.timesteps, euler(Preconditioned(net, EDM, .7), x, EDM, EDM.times(18))):
        y = theirs.step(net(theirs.scale_model_input(y, i)), i, y).prev_sample
        assert (step.x - y).abs().max() < 1e-5*max(1, y.abs().max())


# ------------------------------------------------------------------ bad input
def test_bad_input():
    x, d = torch.zeros(2, 2), lambda x, t, c: x
    def fails(message, f):
        with pytest.raises(ValueError, match=message): f()
    fails("n: got 0", lambda: EDM.times(0))
    fails("n: got 2.5", lambda: karras_times(COSINE, 2.5))
    fails("sigma_min, sigma_max, rho: got", lambda: karras_times(COSINE, 5, sigma_min=90.))
    fails("sigma_min, sigma_max, rho: got", lambda: EDMSchedule(sigma_min=0.))
    fails("rho: got", lambda: EDMSchedule(rho=0.))
    fails("log_std: got -1", lambda: EDMSchedule(log_std=-1.))
    fails("log_std: got 0", lambda: lognormal_times(COSINE, log_std=0.))
    fails("sigma_data: got nan", lambda: Preconditioned(d, EDM, math.nan))
    fails("eta: got 2", lambda: last(euler_ancestral(d, x, EDM, eta=2)))
    fails("churn: got -1", lambda: last(heun(d, x, EDM, churn=-1)))
    fails("s_min, s_max: got 2, 1", lambda: last(heun(d, x, EDM, s_min=2, s_max=1)))
    fails("s_noise: got 0", lambda: last(heun(d, x, EDM, s_noise=0)))
    fails("euler_above: got 0", lambda: last(heun(d, x, EDM, euler_above=0)))
    for sampler in (euler, euler_ancestral, heun):
        fails("times: got", lambda: last(sampler(d, x, EDM, [1., 2., 0.])))
        fails("t: got", lambda: last(sampler(d, x, EDM, [90., 1., 0.])))
        fails("denoise: returned shape", lambda: last(sampler(lambda x, t, c: x[:, :1], x, EDM)))
    assert {"euler", "euler_ancestral", "heun"} <= set(SAMPLERS) and find_sampler("heun") is heun


def test_churn_adds_the_difference_of_the_variances():
    x, sigma = add_churn(torch.zeros(20_000, 1, dtype=torch.float64), torch.tensor(2.), EDM, .25, generator=rng(9))
    assert abs(sigma - 2.5) < 1e-9 and abs(x.std() - 1.5) < 4*1.5/(2*20_000)**.5        # 4 standard errors


def test_heun_is_guarded_where_the_first_move_is_huge():
    "Times even in t leap over three powers of ten of sigma on the cosine schedule: no mean of two slopes fits."
    x = begin(COSINE, COSINE.times(9), 400)
    leap = sigma_of(COSINE.times(9)[:2], COSINE)
    assert leap[0]/leap[1] > 1000
    for options, fine in (({}, True), (dict(euler_above=math.inf), False)):
        assert (last(heun(bump(COSINE), x, COSINE, COSINE.times(9), **options)).x.norm(dim=1).max() < 6) == fine     # the data lie within 4


def test_churn_stays_within_the_schedule():
    for schedule in (EDM, LINEAR, zero_terminal_snr(LINEAR), Straight()):
        x, t = add_churn(torch.ones(4, 2, dtype=torch.float64), torch.tensor(schedule.T, dtype=torch.float64), schedule, .4, generator=rng())
        assert t <= schedule.T and x.isfinite().all()
        if schedule is not LINEAR: close(x, torch.ones_like(x))       # at the top there is no room
    assert slope(torch.ones(2, 2), torch.ones(2, 2), torch.tensor(1.), EDM).abs().max() == 0
