"The toy data and the toy network: their moments and shapes, what the network must be able to say, and that it learns."
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_book.ideal import GaussianMixture, MixtureDenoiser, sliced_wasserstein
from diffusion_book.objective import Denoiser, convert, simple_loss
from diffusion_book.posterior import reverse_step
from diffusion_book.schedules import cosine_schedule, noise_to
from diffusion_book.toys import (JITTER, ToyMLP, check_gaussian_floor, check_ring, check_share_of_copies, check_toy_net,
                                 moons, moons_curve, swiss_roll, swiss_roll_curve)


SHAPES = [(moons, moons_curve), (swiss_roll, swiss_roll_curve)]
both = pytest.mark.parametrize("draw, curve", SHAPES, ids=["moons", "swiss_roll"])
def seeded(seed=0): return torch.Generator().manual_seed(seed)
def along(n): return (torch.arange(n, dtype=torch.float64) + .5)/n


# The data

@both
def test_the_curve_is_standardised(draw, curve):
    "By integration along the curve, not by draws: the mean is 0, the spread 1 (within 5 %, jitter included)."
    x = curve(along(200_000))
    torch.testing.assert_close(x.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-4)
    total = (x.var(0) + JITTER**2).sqrt()
    assert (total - 1).abs().max() < .05, total

@both
def test_draws_have_the_curves_moments(draw, curve):
    n, x, centres = 100_000, draw(100_000, seeded()).double(), curve(along(100_000))
    want = centres.T.cov() + JITTER**2*torch.eye(2, dtype=torch.float64)
    assert (x.mean(0).abs() < 4*x.std(0)/n**.5 + 1e-4).all()
    torch.testing.assert_close(x.T.cov(), want, rtol=0, atol=4*2**.5/n**.5)   # 4 standard errors, at most

@both
@pytest.mark.parametrize("n", [1, 2, 17])
def test_any_number_of_points_and_the_seed_decides(draw, curve, n):
    x = draw(n, seeded(3))
    assert x.shape == (n, 2) and x.dtype == torch.float32 and x.isfinite().all()
    assert torch.equal(x, draw(n, seeded(3))) and not torch.equal(x, draw(n, seeded(4)))

@both
def test_points_stay_near_the_curve(draw, curve):
    gaps = torch.cdist(draw(5000, seeded(1)), curve(along(2000)).float()).min(1).values
    assert gaps.max() < 5*JITTER and gaps.mean() > .3*JITTER

@both
def test_a_mixture_along_the_curve_is_the_shape(draw, curve):
    x, mixture = draw(4000, seeded(2)), GaussianMixture(curve(along(200)).float(), JITTER)
    floor = max(sliced_wasserstein(x, draw(4000, seeded(s)), generator=seeded()) for s in range(5, 11))
    assert sliced_wasserstein(x, mixture.sample(4000, seeded(11)), generator=seeded()) < 1.5*floor

def test_the_moons_are_twins_turned_about_the_origin():
    u = along(100)[:50]
    torch.testing.assert_close(moons_curve(u), -moons_curve(u + .5), rtol=0, atol=1e-12)

def test_the_roll_winds_outwards_once_and_a_half():
    x = swiss_roll_curve(along(2000))*6.8 + torch.tensor([2., 2/(3*math.pi)], dtype=torch.float64)
    radius, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    assert (radius[1:] > radius[:-1]).all()
    turned = (angle[1:] - angle[:-1]).remainder(2*math.pi).sum()
    assert abs(turned - 3*math.pi) < .01

@pytest.mark.parametrize("draw", [moons, swiss_roll])
def test_no_points_are_refused(draw):
    with pytest.raises(ValueError, match="n: got 0"): draw(0)


# The network

def perturbed(**kwargs):
    net, g = ToyMLP(generator=seeded(), **kwargs).requires_grad_(False), seeded(1)
    for p in net.parameters(): p.add_(.3*torch.randn(p.shape, generator=g))
    return net

@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6), st.integers(1, 9))
def test_starts_at_zero_whatever_its_size(hidden, depth, waves, n):
    net = ToyMLP(hidden, depth, waves, seeded())
    assert torch.equal(net(torch.randn(n, 2), torch.full((n,), 300.)), torch.zeros(n, 2))
    want = (2 + 2*waves + 1)*hidden + (depth - 1)*(hidden + 1)*hidden + (hidden + 1)*2
    assert sum(p.numel() for p in net.parameters()) == want

def test_the_generator_decides_the_first_weights():
    a, b, c = (ToyMLP(generator=seeded(s)).layers[0].weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)

@given(st.floats(0, 995))
def test_one_step_on_the_clock_changes_the_answer(clock):
    net, x = perturbed(), torch.randn(4, 2, generator=seeded(2))
    now, next_ = (net(x, torch.full((4,), c)) for c in (clock, clock + 5))
    assert (now - next_).abs().max() > 1e-4

def test_no_two_times_look_alike():
    from diffusion_book.toys import _clock_waves
    w = _clock_waves(cosine_schedule(200).clock(torch.arange(201)), ToyMLP().frequencies)
    assert torch.pdist(w).min() > .01

def test_a_point_does_not_see_its_batch():
    net, x, clock = perturbed().train(), torch.randn(9, 2, generator=seeded(2)), torch.linspace(0, 1000, 9)
    alone = torch.cat([net(x[i:i + 1], clock[i:i + 1]) for i in range(9)])
    torch.testing.assert_close(net(x, clock), alone, rtol=1e-4, atol=1e-4)

def test_it_can_say_any_number():
    net = perturbed()
    net.layers[-1].weight.mul_(100)
    y = net(torch.randn(500, 2, generator=seeded()), torch.rand(500, generator=seeded())*1000)
    assert y.min() < -5 and y.max() > 5

def test_bad_input():
    net, x, clock = ToyMLP(), torch.randn(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"xt: got shape \(3, 3\), wanted \(batch, 2\)"): net(torch.zeros(3, 3), clock)
    with pytest.raises(ValueError, match=r"xt: got shape \(2,\)"): net(x[0], clock)
    with pytest.raises(ValueError, match=r"clock: got shape \(\), wanted \(3,\)"): net(x, torch.tensor(5.))
    with pytest.raises(ValueError, match="cond: got 1, wanted None"): net(x, clock, 1)
    for bad in (dict(hidden=0), dict(depth=0), dict(waves=0)):
        with pytest.raises(ValueError, match="hidden, depth, waves: got"): ToyMLP(**bad)

def test_a_denoiser_takes_it():
    schedule = cosine_schedule(200)
    denoise, x = Denoiser(ToyMLP(), schedule), torch.randn(5, 2, generator=seeded())
    torch.testing.assert_close(denoise(x, 100), x/schedule.signal(100).float())   # it says "no noise"


# Learning

@both
def test_short_training_comes_near_the_exact_answer(draw, curve):
    "A thousand steps: half of the way from saying nothing to the best possible, and more; the samples beat the noise."
    schedule, g = cosine_schedule(200), seeded(1)
    data, denoise = draw(2000, seeded()), Denoiser(ToyMLP(hidden=48, generator=seeded()), schedule)
    adam = torch.optim.Adam(denoise.net.parameters(), lr=4e-3)
    cool = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, 1000)
    for _ in range(1000):
        x0 = data[torch.randint(2000, (256,), generator=g)]
        loss = simple_loss(denoise, x0, torch.randint(1, 201, (256,), generator=g), generator=g).mean()
        adam.zero_grad(); loss.backward(); adam.step(); cool.step()
    denoise.net.requires_grad_(False)
    x0, t = draw(8000, g), torch.randint(1, 201, (8000,), generator=g)
    xt, eps = noise_to(x0, t, schedule, generator=g)
    exact = MixtureDenoiser(GaussianMixture(curve(along(200)).float(), JITTER), schedule)
    best = convert(exact(xt, t), xt, t, schedule, "x0", "eps")
    own_error = (denoise.predict(xt, t) - best).square().mean()
    assert own_error < .08, f"own error {own_error:.3f}; saying nothing has {best.square().mean():.3f}"
    x = noise = torch.randn(2000, 2, generator=g)
    for t in range(200, 0, -1): x = reverse_step(denoise(x, t), x, t, schedule, generator=g)
    fresh = draw(2000, g)
    far = lambda a: sliced_wasserstein(a, fresh, generator=seeded())
    assert far(x) < far(noise)/1.5, (far(x), far(noise))


# The checkers reject what they should (right and more wrong answers run in the solutions)

def test_checkers_reject():
    for check, wrong in ((check_ring, lambda n, generator: torch.randn(n, 2, generator=generator)),
                         (check_toy_net, lambda: torch.nn.Bilinear(2, 1, 2)),
                         (check_gaussian_floor, lambda t, schedule, c: torch.tensor(.5)),
                         (check_share_of_copies, lambda samples, training, fresh: .01)):
        with pytest.raises((AssertionError, RuntimeError)): check(wrong)
