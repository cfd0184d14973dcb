"The straight line, its velocity and its walks: exact fields, order of convergence, diffusers, the bridge between conventions, bad input."
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_book.ddim import ddim
from diffusion_book.edm import EDMSchedule, euler, lognormal_times
from diffusion_book.flow import (CONVENTIONS, FlowSchedule, as_schedule, bend, check_from_reversed, check_heun_walk,
                                 check_pairing_gain, check_shifted_walk, detour, effort, ot_pairs, reflow_pairs,
                                 shift_times, translate, velocity)
from diffusion_book.ideal import FiniteDenoiser, GaussianMixture, MixtureDenoiser, sliced_wasserstein
from diffusion_book.objective import Denoiser, from_x0_and_eps, simple_loss, x0_weight
from diffusion_book.sampling import ddpm, sample
from diffusion_book.schedules import (Schedule, cosine_schedule, linear_schedule, noise_to, sigmoid_schedule,
                                      zero_terminal_snr)
from diffusion_book.sde import VPSchedule, flow_velocity
from diffusion_book.toys import ToyMLP, moons
from diffusion_book.training import train
from diffusion_book.unet import UNet

FLOW = FlowSchedule()
KINDS = {"cosine": cosine_schedule(), "linear": linear_schedule(), "sigmoid": sigmoid_schedule(), "sde": VPSchedule(),
         "edm": EDMSchedule(), "flow": FLOW, "zero": zero_terminal_snr(linear_schedule())}
MIX = GaussianMixture(torch.tensor([[-1., .5], [1., -.5], [0., 1.5]], dtype=torch.float64), [.3, .2, .4], [1., 2., 1.])
inside, shifts = st.floats(.001, .999), st.floats(.05, 20)

def seeded(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))
def last(walk):
    for step in walk: pass
    return step.x


# The schedule

@given(st.floats(0, 1))
def test_the_two_shares_add_up(t):
    assert FLOW.signal(t) + FLOW.noise(t) == 1 and FLOW.noise(t) == t
    assert FLOW.signal(t).dtype == torch.float64 and FLOW.clock(t).dtype == torch.float32

@pytest.mark.parametrize("t", [-.1, 1.1, 1000, float("nan")])
def test_times_outside_are_refused(t):
    with pytest.raises(ValueError, match="wanted 0 to 1"): FLOW.signal(t)

@given(inside, shifts)
def test_the_shift_multiplies_sigma(t, shift):
    t = torch.tensor(t, dtype=torch.float64)
    moved = shift_times(t, shift)
    torch.testing.assert_close(moved/(1 - moved), shift*t/(1 - t), rtol=1e-9, atol=0)
    torch.testing.assert_close(shift_times(moved, 1/shift), t, rtol=1e-9, atol=0)

@given(st.integers(1, 60), shifts)
def test_walks_fall_from_one_to_zero(n, shift):
    times = FlowSchedule(shift).times(n)
    assert len(times) == n + 1 and times[0] == 1 and times[-1] == 0 and bool((times.diff() < 0).all())

def test_the_number_of_moves():
    assert len(FLOW.times()) == 51
    for n in (0, -1, 2.5, "3"):
        with pytest.raises(ValueError, match="n: got"): FLOW.times(n)

@pytest.mark.parametrize("bad, says", [(dict(shift=0), "shift: got 0"), (dict(shift=float("nan")), "shift"),
                                       (dict(draw="normal"), "draw: got 'normal'"), (dict(std=0), "std: got 0")])
def test_options_that_make_no_schedule(bad, says):
    with pytest.raises(ValueError, match=says): FlowSchedule(**bad)

def test_the_closed_form_of_time_at_is_the_halving():
    lam = torch.tensor([-math.inf, -30., -3, 0, 2.5, 30, math.inf], dtype=torch.float64)
    torch.testing.assert_close(FLOW.time_at(lam), Schedule.time_at(FLOW, lam), rtol=1e-9, atol=1e-12)
    assert FLOW.time_at(math.inf) == 0 and FLOW.time_at(-math.inf) == 1

WAYS = [FLOW, FlowSchedule(3.), FlowSchedule(draw="logit-normal"), FlowSchedule(.5, "logit-normal", mean=-1., std=.7)]

@pytest.mark.parametrize("schedule", WAYS, ids=repr)
def test_random_times_follow_their_density(schedule):
    n = 100_000
    t = schedule.random_times(n, seeded(1))
    assert t.shape == (n,) and bool((t > 0).all()) and bool((t <= 1).all())
    assert torch.equal(t[:9], schedule.random_times(n, seeded(1))[:9])
    fine = (torch.arange(100_000, dtype=torch.float64) + .5)/100_000
    exact = schedule.density(fine).cumsum(0)/100_000
    assert abs(exact[-1] - 1) < 1e-3
    for q in (.1, .3, .5, .9):      # 4.5 standard errors, and the sum's own error
        assert abs((t < q).double().mean() - exact[int(q*100_000) - 1]) < 4.5*(.25/n)**.5 + 1e-4, (schedule, q)

def test_logit_normal_is_edms_lognormal_sigma():
    ours = FlowSchedule(draw="logit-normal", mean=-1.2, std=1.2).random_times(500, seeded(2))
    torch.testing.assert_close(ours, lognormal_times(FLOW, -1.2, 1.2)(500, seeded(2)), rtol=1e-9, atol=0)
    shifted = FlowSchedule(math.e, draw="logit-normal").random_times(500, seeded(3))     # a shift moves the mean
    torch.testing.assert_close(shifted, FlowSchedule(draw="logit-normal", mean=1.).random_times(500, seeded(3)))


# The velocity

@pytest.mark.parametrize("t", [.05, .4, .9, 1.])
def test_velocity_is_the_probability_flow_of_the_schedule(t):
    "Chapter sde derives it from the score; here it is the mean of eps - x0."
    x, ideal = normal(50, 2), MixtureDenoiser(MIX, FLOW)
    torch.testing.assert_close(velocity(ideal, x, t, FLOW), (x - ideal(x, t))/t, rtol=1e-9, atol=1e-9)
    if t < 1: torch.testing.assert_close(velocity(ideal, x, t, FLOW), flow_velocity(ideal, x, t, FLOW), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("t", [.2, .5, .8])
def test_the_velocity_carries_the_density(t):
    "The continuity equation by differences: growth of the density at a place is minus what flows away."
    x, h, ideal = normal(200, 2, seed=4), 1e-4, MixtureDenoiser(MIX, FLOW)
    density = lambda x, t: MIX.log_prob(x, t, FLOW).exp()
    flux = lambda x: density(x, t)[:, None]*velocity(ideal, x, t, FLOW)
    rate = (density(x, t + h) - density(x, t - h))/(2*h)
    away = sum((flux(x + e) - flux(x - e))[:, i] for i, e in enumerate(h*torch.eye(2).double()))/(2*h)
    assert (rate + away).abs().max() < 1e-4*rate.abs().max()

def test_velocity_of_a_trained_flow_is_what_its_network_says():
    net = lambda x, clock, cond=None: x.sin()
    x = normal(7, 2)
    torch.testing.assert_close(velocity(Denoiser(net, FLOW, "flow"), x, .3, FLOW), x.sin(), rtol=1e-9, atol=1e-9)

def test_velocity_takes_a_time_per_point_and_refuses_wrong_shapes():
    x, ideal = normal(6, 2), MixtureDenoiser(MIX, FLOW)
    t = torch.linspace(.1, 1, 6, dtype=torch.float64)
    alone = torch.cat([velocity(ideal, x[i:i + 1], t[i], FLOW) for i in range(6)])
    torch.testing.assert_close(velocity(ideal, x, t, FLOW), alone)
    with pytest.raises(ValueError, match="denoise: returned shape"): velocity(lambda x, t, c=None: x[:1], x, .5, FLOW)
    with pytest.raises(ValueError, match="noise is 0"): velocity(ideal, x, 0, FLOW)

def test_the_marginals_are_right_at_every_time():
    "20,000 points that walk along the exact field have the mixture's noised mean and covariance on the way."
    n, x, t = 20_000, normal(20_000, 2, seed=4), 1.
    ideal, means, cov0 = MixtureDenoiser(MIX, FLOW), MIX.means, (MIX.weights*MIX.std**2).sum()*torch.eye(2).double()
    m = MIX.weights @ means
    cov0 = cov0 + ((means - m).T*MIX.weights) @ (means - m)
    for step in ddim(ideal, x, FLOW, FLOW.times(100)):
        t, x = float(step.t), step.x
        if round(t*100) % 20: continue
        want = (1 - t)**2*cov0 + t**2*torch.eye(2).double()
        assert (x.mean(0) - (1 - t)*m).abs().max() < 4.5*(want.diagonal().max()/n)**.5 + .01, t
        assert (x.T.cov() - want).abs().max() < 4.5*want.max()*(2/n)**.5 + .02, t     # .02: a hundred moves


# Walks

@pytest.mark.parametrize("shift", [1., 3., .4])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_straight_moves_are_ddim_and_euler(n, shift):
    schedule, x = FlowSchedule(shift), normal(20, 2)
    ideal, y = MixtureDenoiser(MIX, schedule), x
    times = schedule.times(n)
    for t, s in zip(times[:-1], times[1:]): y = y + (s - t)*velocity(ideal, y, t, schedule)
    for sampler in (ddim, euler): torch.testing.assert_close(last(sampler(ideal, x, schedule, times)), y, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize("end", [.2, 0.])
def test_euler_is_of_order_one(end):
    x, ideal = normal(64, 2, seed=5), MixtureDenoiser(MIX, FLOW)
    def walk(n): return last(euler(ideal, x, FLOW, torch.linspace(1, end, n + 1, dtype=torch.float64)))
    exact = 2*walk(1200) - walk(600)       # Richardson's step beyond a fine walk
    errors = [(walk(n) - exact).abs().mean().item() for n in (30, 60, 120)]
    for coarse, fine in zip(errors, errors[1:]): assert .8 < math.log2(coarse/fine) < 1.2, errors

def test_one_gaussian_walks_along_its_known_curve():
    m, c, x = torch.tensor([[2., -1.]]).double(), .5, normal(30, 2)
    ideal = MixtureDenoiser(GaussianMixture(m, c), FLOW)
    for step in ddim(ideal, x, FLOW, FLOW.times(500)):
        known = (1 - step.t)*m + ((1 - step.t)**2*c**2 + step.t**2).sqrt()*x
        assert (step.x - known).abs().max() < .03, float(step.t)

def test_one_move_lands_on_the_mean():
    data = normal(40, 3)
    out = last(ddim(FiniteDenoiser(data, FLOW), normal(5, 3, seed=1), FLOW, FLOW.times(1)))
    torch.testing.assert_close(out, data.mean(0).expand(5, 3))

@pytest.mark.parametrize("shift", [1., 3.])
@pytest.mark.parametrize("n", [1, 4, 25])
def test_walk_is_diffusers(n, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler
    ours, theirs, x = FlowSchedule(shift), FlowMatchEulerDiscreteScheduler(shift=shift), normal(16, 2).float()
    theirs.set_timesteps(sigmas=[1 - i/n for i in range(n)])
    torch.testing.assert_close(theirs.sigmas.double(), ours.times(n), rtol=0, atol=1e-6)
    ideal, y, before = MixtureDenoiser(MIX, ours), x, x
    for t, s, step in zip(theirs.timesteps, ours.times(n), euler(ideal, x, ours, ours.times(n))):
        said = from_x0_and_eps(step.x0, (before - (1 - s)*step.x0)/s, s, ours, "flow").float()
        y, before = theirs.step(said, t, y).prev_sample, step.x
        assert (y - before).abs().max() < 1e-5

def test_a_flow_can_be_walked_with_noise():
    x, ideal = normal(3000, 2, seed=6), MixtureDenoiser(MIX, FLOW)
    out = last(ddpm(ideal, x, FLOW, FLOW.times(60), generator=seeded(7)))
    true, other = MIX.sample(3000, seeded(8)), MIX.sample(3000, seeded(9))
    floor = sliced_wasserstein(true, other, generator=seeded())
    assert sliced_wasserstein(out, true, generator=seeded()) < 2.5*floor + .02

def test_the_package_takes_it_as_any_schedule():
    net = ToyMLP(generator=seeded())
    out = sample(Denoiser(net, FLOW, "flow"), (4, 2), FLOW, sampler=euler, steps=3, generator=seeded(), progress=False)
    assert out.shape == (4, 2) and out.isfinite().all()
    torch.testing.assert_close(simple_loss(Denoiser(net, FLOW, "flow"), torch.zeros(2, 2), 1., torch.ones(2, 2)), torch.ones(2))

def test_train_asks_it_for_times():
    torch.manual_seed(0)
    images, seen = torch.rand(16, 1, 8, 8, generator=seeded())*2 - 1, []
    class Spy(FlowSchedule):
        def random_times(self, n, generator=None):
            seen.append(super().random_times(n, generator))
            return seen[-1]
    train(Denoiser(UNet(channels=1, width=(8, 16), blocks=1), Spy(draw="logit-normal"), "flow"), images, steps=3,
          batch_size=8, device="cpu", progress=False)
    assert len(seen) == 3 and all(t.shape == (8,) for t in seen)

def test_a_flow_learns():
    data, net, g = moons(500, seeded()), ToyMLP(hidden=32, generator=seeded(1)), seeded(2)
    denoise, adam = Denoiser(net, FLOW, "flow"), torch.optim.Adam(net.parameters(), lr=8e-3)
    for _ in range(250):
        x0 = data[torch.randint(500, (128,), generator=g)]
        loss = simple_loss(denoise, x0, FLOW.random_times(128, g), generator=g).mean()
        adam.zero_grad(); loss.backward(); adam.step()
    x = torch.randn(500, 2, generator=seeded(3))
    with torch.no_grad(): out = last(euler(denoise, x, FLOW, FLOW.times(30)))
    assert sliced_wasserstein(out, data, generator=seeded()) < .7*sliced_wasserstein(x, data, generator=seeded())


# The same denoiser under another schedule

@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_as_schedule_is_exact(one, other):
    a, b, x0 = KINDS[one], KINDS[other], normal(200, 2)
    t = b.time_at(torch.linspace(8, -8, 200, dtype=torch.float64))
    xt, _ = noise_to(x0, t, b, generator=seeded(1))
    wrapped, own = as_schedule(MixtureDenoiser(MIX, a), a, b), MixtureDenoiser(MIX, b)
    assert (wrapped(xt, t) - own(xt, t)).abs().max() < 1e-6
    assert (wrapped(xt, t, 1) - own(xt, t, 1)).abs().max() < 1e-6, "cond must be passed on"

def test_as_schedule_at_the_two_ends():
    wrapped, x = as_schedule(MixtureDenoiser(MIX, KINDS["cosine"]), KINDS["cosine"], FLOW), normal(9, 2)
    assert wrapped(x, 1).isfinite().all() and (wrapped(x, 1) - MIX.weights @ MIX.means).abs().max() < 1e-2
    torch.testing.assert_close(wrapped(x, 0), x)
    assert wrapped(x.float(), .5).dtype == torch.float32

def test_the_flows_walk_is_ddim_in_the_models_own_schedule():
    own, x = KINDS["cosine"], normal(30, 2)
    ideal, times = MixtureDenoiser(MIX, own), torch.linspace(.95, 0, 12, dtype=torch.float64)
    there = own.time_at(FLOW.logsnr(times))
    size = lambda t, s: (s.signal(t)**2 + s.noise(t)**2).sqrt()
    ours = last(euler(as_schedule(ideal, own, FLOW), x*size(.95, FLOW), FLOW, times))
    torch.testing.assert_close(last(ddim(ideal, x*size(there[0], own), own, there)), ours, rtol=1e-6, atol=1e-6)

def test_effort_is_what_the_losses_do():
    "Draw times, bin them by log-SNR, weigh by the x0 weight: the same as `effort`, within 5 %."
    lam = torch.tensor([-3., -1., 0., 1., 3.], dtype=torch.float64)
    for schedule, kind in ((FLOW, "flow"), (FlowSchedule(2., "logit-normal"), "flow"), (FLOW, "eps"), (KINDS["cosine"], "v")):
        t = schedule.random_times(1_000_000, seeded(4)).double()
        where = schedule.logsnr(t)
        for l in lam:
            near = (where - l).abs() < .1
            got = x0_weight(t[near], schedule, kind).sum()/1_000_000/.2
            assert abs(got/effort(l, schedule, kind) - 1) < .05, (schedule, kind, float(l))

def test_flow_and_v_on_the_cosine_have_one_effort():
    lam = torch.linspace(-8, 4, 50, dtype=torch.float64)
    ratio = effort(lam, cosine_schedule(s=0), "v")/effort(lam, FLOW, "flow")
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2/math.pi), rtol=.005, atol=0)


# Straightness, pairing, reflow

@given(st.integers(2, 9), st.integers(0, 99))
def test_a_straight_walk_has_no_detour_and_no_bend(n, seed):
    times = torch.rand(n, generator=seeded(seed)).double().cumsum(0) + .01*torch.arange(n)
    path = times[:, None, None]*normal(1, 4, 3, seed=seed) + normal(1, 4, 3, seed=seed + 1)
    assert abs(detour(path) - 1) < 1e-9 and bend(path, times) < 1e-12
    assert abs(detour(path.flip(0)) - 1) < 1e-9 and bend(path.flip(0), times.flip(0)) < 1e-12

def test_detour_and_bend_of_a_corner():
    corner = torch.tensor([[[0., 0.]], [[3., 0.]], [[3., 4.]]])
    assert abs(detour(corner) - 1.4) < 1e-6
    assert abs(bend(corner, torch.tensor([0., 1., 2.])) - 1) < 1e-6      # gaps (1.5, -2) against a mean of (1.5, 2)
    with pytest.raises(ValueError, match="times: got 2"): bend(corner, torch.tensor([0., 1.]))

@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_pairing_is_the_best_of_all_orders(n, d, seed):
    from itertools import permutations
    x0, eps = normal(n, d, seed=seed), normal(n, d, seed=seed + 1)
    out = ot_pairs(x0, eps)
    best = min((x0 - eps[list(p)]).square().sum() for p in permutations(range(n)))
    torch.testing.assert_close((x0 - out).square().sum(), best)
    assert sorted(out.flatten().tolist()) == sorted(eps.flatten().tolist())

def test_pairing_images_and_wrong_shapes():
    x0, eps = normal(5, 1, 4, 4).float(), normal(5, 1, 4, 4, seed=1).float()
    assert ot_pairs(x0, eps).shape == x0.shape and ot_pairs(x0, eps).dtype == torch.float32
    with pytest.raises(ValueError, match="eps: got shape"): ot_pairs(x0, eps[:3])

def test_reflow_pairs_are_the_ends_of_the_walks():
    eps, ideal = normal(12, 2), MixtureDenoiser(MIX, FLOW)
    x0, same = reflow_pairs(ideal, eps, FLOW, steps=9)
    assert same is eps
    torch.testing.assert_close(x0, last(ddim(ideal, eps, FLOW, FLOW.times(9))))

def test_the_mean_velocity_never_makes_the_trip_dearer():
    "Liu et al. 2023: squared distance from start to end, walks against the lines they learn from."
    x = normal(2000, 2, seed=3)
    ends = last(ddim(MixtureDenoiser(MIX, FLOW), x, FLOW, FLOW.times(100)))
    lines = (MIX.sample(2000, seeded(5)) - x).square().sum(1).mean()
    assert (ends - x).square().sum(1).mean() < lines


# The bridge

def by_hand(x0, eps, sigma):
    "What each work writes for this noise level, from its own paper: (network's answer, noisy batch, own time)."
    r = math.sqrt(1 + sigma**2)
    a, b, lam = 1/r, sigma/r, -2*math.log(sigma)
    total = -2*math.log(a)                                       # .1*t + 19.9*t^2/2
    return {"DDPM": (eps, a*x0 + b*eps, float(linear_schedule().time_at(lam)) - 1),
            "fashion": (a*eps - b*x0, a*x0 + b*eps, float(cosine_schedule().time_at(lam))),
            "score SDE": (-eps/b, a*x0 + b*eps, (-.1 + math.sqrt(.01 + 2*19.9*total))/19.9),
            "EDM": (x0, x0 + sigma*eps, sigma),
            "flow": (eps - x0, (x0 + sigma*eps)/(1 + sigma), sigma/(1 + sigma)),
            "flow, reversed": (x0 - eps, (x0 + sigma*eps)/(1 + sigma), 1/(1 + sigma))}

@pytest.mark.parametrize("sigma", [.02, .3, 1., 5., 50.])
def test_every_convention_to_every_other(sigma):
    x0, eps = normal(3, 4), normal(3, 4, seed=1)
    written = by_hand(x0, eps, sigma)
    assert set(written) == set(CONVENTIONS)
    for one, here in written.items():
        for other, there in written.items():
            for got, want in zip(translate(*here, CONVENTIONS[one], CONVENTIONS[other]), there):
                want = torch.as_tensor(want, dtype=torch.float64)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=f"{one} to {other} at sigma {sigma}")

@given(st.sampled_from(list(CONVENTIONS)), st.sampled_from(list(CONVENTIONS)), st.floats(.02, 50), st.integers(0, 99))
def test_there_and_back(one, other, sigma, seed):
    "Any answer, also a wrong one, one time per row."
    a, b = CONVENTIONS[one], CONVENTIONS[other]
    own = a.own(a.schedule.time_at(torch.tensor([-2*math.log(sigma), 0.], dtype=torch.float64)))
    value, x = normal(2, 3, seed=seed), normal(2, 3, seed=seed + 1)
    for got, want in zip(translate(*translate(value, x, own, a, b), b, a), (value, x, own)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

def test_ddpms_index_is_the_papers_array():
    ddpm_, abar = CONVENTIONS["DDPM"], torch.cumprod(1 - torch.linspace(1e-4, .02, 1000, dtype=torch.float64), 0)
    for i in (0, 1, 500, 999):
        t = ddpm_.ours(i)
        torch.testing.assert_close(ddpm_.schedule.signal(t)**2, abar[i], rtol=1e-9, atol=0)
        assert ddpm_.own(t) == i

def test_reversed_time_reverses_the_arrow():
    a, b = CONVENTIONS["flow"], CONVENTIONS["flow, reversed"]
    x, u = normal(4, 2), normal(4, 2, seed=1)
    said, there, own = translate(u, x, .2, a, b)
    torch.testing.assert_close(said, -u); torch.testing.assert_close(there, x)
    assert abs(own - .8) < 1e-12

def test_a_noise_level_that_the_target_does_not_reach():
    x = normal(2, 2)
    with pytest.raises(ValueError, match="target reaches"): translate(x, x, .999, CONVENTIONS["flow"], CONVENTIONS["EDM"])
    with pytest.raises(ValueError, match="wanted 0 to"): translate(x, x, -2, CONVENTIONS["DDPM"], CONVENTIONS["flow"])


# Exercises: right answers pass, the known wrong ones are told what is wrong

def right_reversed(theirs): return lambda xt, t, cond=None: xt + t*theirs(xt, 1 - t)
def right_heun(velocity, x, times):
    for t, s in zip(times[:-1], times[1:]):
        u = velocity(x, t)
        there = x + (s - t)*u
        x = there if s == 0 else x + (s - t)*(u + velocity(there, s))/2
    return x
def right_walk(schedule, n, factor):
    even = FLOW.times(n)[1:-1]
    ends = [torch.tensor([o], dtype=torch.float64) for o in (schedule.T, 0)]
    return torch.cat([ends[0], schedule.time_at(-2*(factor*even/(1 - even)).log()), ends[1]])
def right_gain(d, batch, generator):
    x0, eps = torch.randn(batch, d, generator=generator), torch.randn(batch, d, generator=generator)
    before, after = ((x0 - e).square().sum(1).mean() for e in (eps, ot_pairs(x0, eps)))
    return (after/before).item()

def test_right_answers_pass():
    check_from_reversed(right_reversed); check_heun_walk(right_heun)
    check_shifted_walk(right_walk); check_pairing_gain(right_gain)

@pytest.mark.parametrize("check, wrong, says", [
    (check_from_reversed, lambda theirs: lambda x, t: x + t*theirs(x, t), "asked theirs at t"),
    (check_from_reversed, lambda theirs: lambda x, t: x - t*theirs(x, 1 - t), "wrong sign"),
    (check_from_reversed, lambda theirs: lambda x, t: x + theirs(x, 1 - t), "off by"),
    (check_heun_walk, lambda v, x, ts: [x := x + (s - t)*v(x, t) for t, s in zip(ts[:-1], ts[1:])][-1], "Euler"),
    (check_shifted_walk, lambda schedule, n, f: (f*schedule.times(n).double()).clamp(max=schedule.T), "ratios"),
    (check_shifted_walk, lambda schedule, n, f: right_walk(schedule, n, f)[1:-1], "times"),
    (check_shifted_walk, lambda schedule, n, f: torch.cat([torch.tensor([float(schedule.T)]), schedule.time_at(
        -(f*FLOW.times(n)[1:-1]/(1 - FLOW.times(n)[1:-1])).log()), torch.zeros(1)]), "squared"),
    (check_pairing_gain, lambda d, n, g: 1., "sorted"),
    (check_pairing_gain, lambda d, n, g: 1/right_gain(d, n, g), "between 0 and 1")])
def test_wrong_answers_are_named(check, wrong, says):
    with pytest.raises(AssertionError, match=says): check(wrong)

def test_a_walk_that_asks_at_zero_is_named():
    def at_zero(v, x, times):
        for t, s in zip(times[:-1], times[1:]): u = v(x, t); x = x + (s - t)*(u + v(x + (s - t)*u, s))/2
        return x
    with pytest.raises(AssertionError, match="asked at t = 0"): check_heun_walk(at_zero)
