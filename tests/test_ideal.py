"The ideal denoisers: against integration, against the slope of the density, against each other, and as sampling shows."
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_book.ideal import FiniteDenoiser, GaussianMixture, MixtureDenoiser, sliced_wasserstein
from diffusion_book.posterior import reverse_step
from diffusion_book.schedules import cosine_schedule, linear_schedule, noise_to, sigmoid_schedule, zero_terminal_snr

LINEAR, COSINE = linear_schedule(), cosine_schedule()
SCHEDULES = [LINEAR, COSINE, sigmoid_schedule(), zero_terminal_snr(LINEAR)]
schedules = st.sampled_from(range(len(SCHEDULES)))

def seeded(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(shape, generator=seeded(seed), dtype=dtype)
def close(a, b, atol=1e-9): torch.testing.assert_close(a, b, rtol=0, atol=atol)

TWO = GaussianMixture(torch.tensor([-1., .6], dtype=torch.float64), [.15, .3], [.3, .7])
RING = GaussianMixture(1.2*torch.stack([torch.arange(5).mul(2*math.pi/5).cos(), torch.arange(5).mul(2*math.pi/5).sin()], 1),
                       .12, [.3, .25, .2, .15, .1])
FINE = torch.linspace(-5, 5, 20001, dtype=torch.float64)

def random_mixture(seed, k=3, shape=(2,)):
    g = seeded(seed)
    return GaussianMixture(2*torch.randn((k, *shape), generator=g, dtype=torch.float64),
                           .1 + torch.rand(k, generator=g), .1 + torch.rand(k, generator=g))


# The mixture

@given(st.integers(0, 1000), schedules)
def test_the_noised_density_integrates_to_one(t, which):
    close((TWO.log_prob(FINE*2, t, SCHEDULES[which]).exp().sum()*1e-3), torch.tensor(1., dtype=torch.float64), 1e-6)

def test_density_is_torchs():
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
    mixture = random_mixture(3)
    theirs = MixtureSameFamily(Categorical(mixture.weights),
                               Independent(Normal(mixture.means, mixture.std[:, None].expand(-1, 2)), 1))
    x = normal(50, 2)
    close(mixture.log_prob(x), theirs.log_prob(x))

@given(st.integers(0, 50), st.integers(1, 1000), schedules)
def test_score_is_the_slope_of_the_density(seed, t, which):
    mixture, x = random_mixture(seed), normal(8, 2, seed=seed).requires_grad_()
    slope, = torch.autograd.grad(mixture.log_prob(x, t, SCHEDULES[which]).sum(), x)
    torch.testing.assert_close(mixture.score(x.detach(), t, SCHEDULES[which]), slope, rtol=1e-9, atol=1e-9)

def test_samples_have_the_mixtures_moments():
    n, x = 100_000, TWO.sample(100_000, seeded(1))
    mean = (TWO.weights*TWO.means[:, 0]).sum()
    var = (TWO.weights*(TWO.std**2 + TWO.means[:, 0]**2)).sum() - mean**2
    assert abs(x.mean() - mean) < 4*(var/n)**.5
    assert abs(x.var() - var) < 4*((x - x.mean()).pow(4).mean()/n)**.5
    shares = TWO.responsibilities(x).argmax(1).bincount(minlength=2)/n
    assert abs(shares[0] - .3) < .01   # 4 standard errors 0.006, and the bumps overlap a little

def test_samples_take_shape_and_dtype_from_the_means_and_repeat():
    for shape, dtype in (((), torch.float64), ((3,), torch.float32), ((1, 4, 4), torch.float32)):
        x = GaussianMixture(torch.zeros(2, *shape, dtype=dtype), 1.).sample(5, seeded())
        assert x.shape == (5, *shape) and x.dtype == dtype
    assert GaussianMixture([0, 1], 1.).sample(2).dtype == torch.float32, "whole numbers become floats"
    assert torch.equal(RING.sample(9, seeded(1)), RING.sample(9, seeded(1)))

@pytest.mark.parametrize("args, message", [
    (([0., 1.], 0.), "std: got 0.0"), (([0., 1.], [1., -1.]), "std: got"), (([0., 1.], [1., 1., 1.]), "std: got"),
    (([0., 1.], float("nan")), "std: got nan"), (([0., 1.], 1., [1.]), "weights: got"),
    (([0., 1.], 1., [1., -1.]), "weights: got"), (([0., 1.], 1., [0., 0.]), "weights: got"),
    ((torch.zeros(0, 2), 1.), "means: got shape"), ((torch.tensor(1.), 1.), "means: got shape")])
def test_bad_mixtures(args, message):
    with pytest.raises(ValueError, match=message): GaussianMixture(*args)


# The mixture's denoiser

@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("t", [1, 10, 100, 300, 600, 900, 1000])
def test_against_numerical_integration(schedule, t):
    xt = torch.linspace(-2, 2, 17, dtype=torch.float64)
    log_w = TWO.log_prob(FINE) - (xt[:, None] - schedule.signal(t)*FINE)**2/(2*schedule.noise(t)**2)
    close(MixtureDenoiser(TWO, schedule)(xt, t), log_w.softmax(1) @ FINE, 1e-7)

@given(st.integers(0, 50), st.integers(1, 999), schedules)
def test_tweedies_formula(seed, t, which):
    s, mixture, x = SCHEDULES[which], random_mixture(seed), normal(8, 2, seed=seed)
    a, b = s.signal(t), s.noise(t)
    by_slope = (x + b**2*mixture.score(x, t, s))/a
    torch.testing.assert_close(by_slope, MixtureDenoiser(mixture, s)(x, t), rtol=0, atol=1e-10/a.item()**2)

@given(st.integers(0, 50), st.integers(1, 1000))
def test_no_denoiser_is_better(seed, t):
    "Among many draws, the error of another guess exceeds the ideal one's by the mean square of their difference."
    n, mixture = 20_000, random_mixture(seed)
    x0 = mixture.sample(n, seeded(seed))
    xt, _ = noise_to(x0, t, COSINE, generator=seeded(seed + 1))
    ideal = MixtureDenoiser(mixture, COSINE)(xt, t)
    other = .9*ideal + .3
    excess = (other - x0).square() - (ideal - x0).square() - (other - ideal).square()
    assert abs(excess.mean()) < 5*excess.std()/(2*n)**.5 + 1e-12, "more than 5 standard errors off"

@given(st.integers(0, 50), schedules)
def test_the_ends(seed, which):
    mixture, x = random_mixture(seed), normal(4, 2, seed=seed)
    denoise = MixtureDenoiser(mixture, SCHEDULES[which])
    close(denoise(x, 0), x)
    close(MixtureDenoiser(mixture, SCHEDULES[3])(x, 1000), (mixture.weights @ mixture.means).expand(4, 2))

def test_one_gaussian_is_the_wiener_filter():
    one = GaussianMixture(torch.tensor([[.5, -.5]], dtype=torch.float64), .7)
    x, t = normal(9, 2), 300
    a, b = LINEAR.signal(t), LINEAR.noise(t)
    close(MixtureDenoiser(one, LINEAR)(x, t), one.means + a*.49/(a**2*.49 + b**2)*(x - a*one.means))

@pytest.mark.parametrize("shape", [(), (2,), (3, 4), (1, 5, 5)])
def test_any_shape_and_a_time_for_each(shape):
    mixture, x = random_mixture(1, shape=shape), normal(4, *shape)
    t = torch.tensor([1, 50, 500, 1000])
    for denoise in (MixtureDenoiser(mixture, LINEAR), FiniteDenoiser(mixture.sample(20, seeded()), LINEAR)):
        together = denoise(x, t)
        assert together.shape == x.shape and together.dtype == x.dtype
        close(together, torch.cat([denoise(x[i:i + 1], int(t[i])) for i in range(4)]))

def test_condition_names_the_component():
    x, denoise = normal(6, 2), MixtureDenoiser(RING, LINEAR)
    alone = MixtureDenoiser(GaussianMixture(RING.means[2:3], .12), LINEAR)
    close(denoise(x, 400, cond=2), alone(x, 400))
    each = denoise(x, 400, cond=torch.arange(6) % 5)
    close(each[2:3], alone(x[2:3], 400))
    mixed = sum(denoise.weights(x, 400)[:, k:k + 1]*denoise(x, 400, cond=k) for k in range(5))
    close(mixed, denoise(x, 400))

def test_dtype_follows_the_input_and_the_work_is_done_in_float64():
    x = normal(50, 2)
    for denoise in (MixtureDenoiser(RING, LINEAR), FiniteDenoiser(RING.sample(99, seeded()), LINEAR)):
        for t in (1, 300, 1000):
            assert denoise(x.float(), t).dtype == torch.float32
            close(denoise(x.float(), t).double(), denoise(x.float().double(), t), 1e-6)


# The finite set's denoiser

@given(st.integers(1, 1000), schedules, st.integers(1, 30))
def test_finite_is_a_plain_softmax_whatever_the_chunk(t, which, chunk):
    s, data, xt = SCHEDULES[which], normal(23, 2, 3, seed=1), normal(5, 2, 3, seed=2)
    d2 = (xt[:, None] - s.signal(t)*data).square().sum((2, 3))
    w = torch.softmax(-d2/(2*s.noise(t)**2), 1)
    denoise = FiniteDenoiser(data, s, chunk=chunk)
    close(denoise.weights(xt, t), w, 1e-7)
    close(denoise(xt, t), torch.einsum("bn,nij->bij", w, data), 1e-6)

@given(st.floats(.1, 3), st.integers(1, 1000), schedules)
def test_two_points_give_a_tanh(c, t, which):
    s, x = SCHEDULES[which], torch.linspace(-4, 4, 21, dtype=torch.float64)
    pair = FiniteDenoiser(torch.tensor([-c, c], dtype=torch.float64), s)
    close(pair(x, t), c*torch.tanh(s.signal(t)*c*x/s.noise(t)**2))

@given(st.integers(20, 1000), schedules)
def test_finite_is_the_mixture_with_no_width(t, which):
    points, x = normal(15, 2, seed=3), normal(6, 2, seed=4)
    thin = MixtureDenoiser(GaussianMixture(points, 1e-7), SCHEDULES[which])
    close(FiniteDenoiser(points, SCHEDULES[which])(x, t), thin(x, t), 1e-5)

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_where_the_exponents_are_enormous(dtype):
    data = normal(200, 1, 28, 28, seed=5, dtype=dtype).clamp(-1, 1)
    denoise = FiniteDenoiser(data, LINEAR)
    for t in (0, 1, 2, 10):
        xt, _ = noise_to(data[:20], t, LINEAR, generator=seeded(t))
        w = denoise.weights(xt, t)
        assert w.isfinite().all() and torch.equal(w.argmax(1), torch.arange(20))
        close(w.sum(1), torch.ones(20, dtype=torch.float64))
        assert torch.equal(denoise(xt, t), data[:20])
    far = 1e6*torch.ones(1, 1, 28, 28, dtype=dtype)
    assert denoise(far, 1).isfinite().all() and denoise(far, 1000).isfinite().all()

def test_no_signal_gives_the_mean_of_the_data():
    data, x = normal(9, 2), normal(4, 2, seed=1)
    close(FiniteDenoiser(data, SCHEDULES[3])(x, 1000), data.mean(0).expand(4, 2))

def test_one_picture_is_all_there_is():
    data = normal(1, 3)
    for t in (0, 5, 1000): close(FiniteDenoiser(data, LINEAR)(normal(4, 3, seed=1), t), data.expand(4, 3))

def test_labels_and_conditions():
    data, labels, x = normal(30, 2), torch.arange(30) % 3, normal(5, 2, seed=1)
    denoise = FiniteDenoiser(data, LINEAR, labels, chunk=7)
    close(denoise(x, 300, cond=1), FiniteDenoiser(data[labels == 1], LINEAR)(x, 300))
    w = denoise.weights(x, 300, torch.tensor([0, 1, 2, 0, 1]))
    for i, k in enumerate([0, 1, 2, 0, 1]): assert w[i, labels != k].sum() == 0

def test_gradients_flow():
    x = normal(3, 2).requires_grad_()
    for denoise in (MixtureDenoiser(RING, LINEAR), FiniteDenoiser(normal(20, 2, seed=1), LINEAR)):
        g, = torch.autograd.grad(denoise(x, 400).sum(), x)
        assert g.isfinite().all() and g.abs().sum() > 0

def test_bad_input():
    data, x = normal(6, 2), normal(3, 2)
    plain, labelled = FiniteDenoiser(data, LINEAR), FiniteDenoiser(data, LINEAR, torch.arange(6))
    mixture = MixtureDenoiser(RING, LINEAR)
    for denoise in (plain, mixture):
        with pytest.raises(ValueError, match=r"got shape \(3, 1\), wanted \(batch, 2\)"): denoise(x[:, :1], 5)
        with pytest.raises(TypeError, match="wanted a floating-point tensor"): denoise(x.long(), 5)
        with pytest.raises(TypeError, match="got list"): denoise([1., 2.], 5)
        with pytest.raises(ValueError, match="t: got"): denoise(x, 1001)
        with pytest.raises(ValueError, match="t: got"): denoise(x, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="the data have no labels"): plain(x, 5, cond=1)
    with pytest.raises(ValueError, match=r"cond: got labels \[6\]"): labelled(x, 5, cond=6)
    with pytest.raises(ValueError, match="cond: got 2 labels, wanted one or 3"): mixture(x, 5, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels: got shape"): FiniteDenoiser(data, LINEAR, torch.arange(5))
    with pytest.raises(ValueError, match="chunk: got 0"): FiniteDenoiser(data, LINEAR, chunk=0)
    with pytest.raises(ValueError, match="wanted at least one"): FiniteDenoiser(data[:0], LINEAR)
    with pytest.raises(TypeError, match="data: got dtype torch.uint8"): FiniteDenoiser(data.byte(), LINEAR)


# The distance

@given(st.integers(2, 50), st.floats(-5, 5))
def test_distance_of_a_shift_in_one_dimension_is_the_shift(n, shift):
    x = normal(n, 1)
    assert sliced_wasserstein(x, x + shift) == pytest.approx(abs(shift), abs=1e-9)

def test_distance_is_scipys_in_one_dimension():
    from scipy.stats import wasserstein_distance
    x, y = normal(80), normal(80, seed=1).exp()
    assert sliced_wasserstein(x, y) == pytest.approx(wasserstein_distance(x.numpy(), y.numpy()))

def test_distance_is_symmetric_and_blind_to_order():
    x, y = normal(60, 3), normal(60, 3, seed=1)
    d = sliced_wasserstein(x, y, generator=seeded(2))
    assert d == pytest.approx(sliced_wasserstein(y.flip(0), x, generator=seeded(2)))
    assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="wanted equal ones"): sliced_wasserstein(x, y[:5])


# Sampling with them

def walk(denoise, x, steps, seed=0):
    times, g = denoise.schedule.times(steps), seeded(seed)
    for t, s in zip(times[:-1], times[1:]): x = reverse_step(denoise(x, t), x, t, denoise.schedule, s, generator=g)
    return x

@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=str)
def test_noise_becomes_the_mixture(schedule):
    n = 4000
    x = walk(MixtureDenoiser(RING, schedule), normal(n, 2), 200)
    shares = RING.responsibilities(x).argmax(1).bincount(minlength=5)/n
    assert ((shares - RING.weights).abs() < 4*(RING.weights*(1 - RING.weights)/n).sqrt()).all(), "4 standard errors"
    truth = RING.sample(n, seeded(50))
    floor = max(sliced_wasserstein(RING.sample(n, seeded(s)), truth, generator=seeded()) for s in range(51, 57))
    assert sliced_wasserstein(x, truth, generator=seeded()) < 1.5*floor

def test_one_leap_gives_the_mean():
    x = walk(MixtureDenoiser(RING, SCHEDULES[3]), normal(50, 2), 1)
    close(x, (RING.weights @ RING.means).expand(50, 2))

def test_more_steps_come_closer():
    truth, noise = RING.sample(4000, seeded(50)).double(), normal(4000, 2)
    d = [sliced_wasserstein(walk(MixtureDenoiser(RING, LINEAR), noise, n), truth, generator=seeded()) for n in (1, 2, 5, 10, 50)]
    assert all(a > 1.2*b for a, b in zip(d, d[1:])), d

def test_a_finite_set_only_gives_itself():
    from diffusion_book.pictures import load_fashion
    images = load_fashion()[0][:300]
    x = walk(FiniteDenoiser(images, LINEAR), normal(8, 1, 28, 28, dtype=torch.float32), 50)
    distance, nearest = (x[:, None] - images).abs().amax((2, 3, 4)).min(1)
    assert distance.max() < 1e-5 and len(nearest.unique()) > 4
