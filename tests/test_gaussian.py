"Properties of the Gaussian functions, the heat equation and the particles; closed forms; bad input."
import math
import pytest
import scipy.stats
import torch
from hypothesis import given, settings, strategies as st
from diffusion_book.gaussian import (diffuse_particles, expected_norm, gaussian_cdf, gaussian_pdf, heat_solution,
                                     ks_distance, tail_fraction)

QUICK = settings(max_examples=50, deadline=None)
MEAN, VAR = st.floats(-5, 5), st.floats(.01, 20)


def near(a, b, tol=1e-9): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=tol, rtol=0, check_dtype=False)


@QUICK
@given(st.floats(-8, 8), MEAN, VAR)
def test_pdf_and_cdf_agree_with_scipy(x, mean, var):
    bell = scipy.stats.norm(mean, var**.5)
    x64 = torch.tensor(x, dtype=torch.float64)
    near(gaussian_pdf(x64, mean, var), bell.pdf(x))
    near(gaussian_cdf(x64, mean, var), bell.cdf(x))


@QUICK
@given(MEAN, VAR)
def test_cdf_is_the_integral_of_the_pdf(mean, var):
    x = mean + var**.5*torch.linspace(-10, 10, 4001, dtype=torch.float64)
    near(torch.cumulative_trapezoid(gaussian_pdf(x, mean, var), x), gaussian_cdf(x[1:], mean, var), 1e-5)


@QUICK
@given(VAR, VAR)
def test_variances_add_under_convolution(a, b):
    reach = 9*(a + b)**.5
    x = torch.linspace(-reach, reach, 2**14 + 1, dtype=torch.float64)
    s = .7*(a + b)**.5
    product = gaussian_pdf(x, 0, a)*gaussian_pdf(s - x, 0, b)
    near(torch.trapezoid(product, x), gaussian_pdf(torch.tensor(s, dtype=torch.float64), 0, a + b), 1e-8)


@QUICK
@given(st.floats(0, 8))
def test_tails_match_the_cdf(k):
    near(tail_fraction(k), 2*gaussian_cdf(torch.tensor(-k, dtype=torch.float64)))


@pytest.mark.parametrize("d, wanted", [(1, math.sqrt(2/math.pi)), (2, math.sqrt(math.pi/2)), (3, 2*math.sqrt(2/math.pi))])
def test_expected_norm_closed_forms(d, wanted): near(expected_norm(d), wanted)


@QUICK
@given(st.integers(1, 100_000))
def test_expected_norm_lies_just_below_the_root(d):
    assert math.sqrt(max(d - 1, 0)) < expected_norm(d) < math.sqrt(d)
    near(expected_norm(d), scipy.stats.chi(d).mean(), 1e-4)


def test_ks_distance_agrees_with_scipy():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)*2 + 1
    near(ks_distance(x, 1, 4), scipy.stats.kstest(x.numpy(), "norm", (1, 2)).statistic)
    assert ks_distance(x, 1, 4) == ks_distance(x.view(5, 100), 1, 4)
    assert ks_distance(x) > .2


@QUICK
@given(st.floats(.01, 2), st.floats(.2, 3), st.floats(.1, 2))
def test_heat_solution_keeps_the_amount_and_spreads_by_2Dt(time, width, D):
    reach = width/2 + 9*math.sqrt(2*D*time)
    x = torch.linspace(-reach, reach, 20_001, dtype=torch.float64)
    u = heat_solution(x, time, width, D)
    near(torch.trapezoid(u, x), 1., 1e-9)
    near(torch.trapezoid(x**2*u, x), width**2/12 + 2*D*time, 1e-5)
    assert (u >= 0).all() and (u[:10_001].diff() >= -1e-15).all(), "it should rise up to the middle"
    near(u, u.flip(0))


@QUICK
@given(st.floats(.1, 2), st.floats(.2, 3), st.floats(-2, 2))
def test_heat_solution_obeys_the_heat_equation(time, width, x):
    x, h, D = torch.tensor([x - .001, x, x + .001], dtype=torch.float64), .001, .5
    left, mid, right = heat_solution(x, time, width, D)
    dt = (heat_solution(x[1], time + 1e-4, width, D) - heat_solution(x[1], time - 1e-4, width, D))/2e-4
    near(dt, D*(left - 2*mid + right)/h**2, 2e-3)


def test_heat_solution_limits():
    x = torch.linspace(-2, 2, 401, dtype=torch.float64)
    assert heat_solution(x, 0, 1.).unique().tolist() == [0, 1]
    near(heat_solution(x, .5, 1e-3), gaussian_pdf(x, 0, .5), 1e-6)       # a point becomes a bell
    far = heat_solution(torch.tensor([7.], dtype=torch.float64), .5)
    assert far > 0 and far.log().isfinite(), "the tail should not be rounded to zero"


def test_particles_follow_the_heat_equation():
    "50,000 particles, three diffusivities: Kolmogorov-Smirnov against the exact cumulative share, chance 8e-5."
    for k, D in enumerate((.1, .5, 2.)):
        n, g = 50_000, torch.Generator().manual_seed(k)
        start = (torch.rand(n, generator=g, dtype=torch.float64) - .5)*2
        end = diffuse_particles(start, .05, 8, D, generator=g)[-1]
        grid = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
        cum = torch.cumulative_trapezoid(heat_solution(grid, .4, 2., D), grid)
        share = torch.searchsorted(end.sort().values, grid[1:])/n
        assert (share - cum).abs().max() < 2.25/n**.5


def test_particles_shapes_seeds_dtype():
    x = torch.zeros(3, 2, dtype=torch.float64)
    path = diffuse_particles(x, .1, 4, generator=torch.Generator().manual_seed(1))
    assert path.shape == (5, 3, 2) and path.dtype == torch.float64 and (path[0] == 0).all()
    assert torch.equal(path, diffuse_particles(x, .1, 4, generator=torch.Generator().manual_seed(1)))
    assert diffuse_particles(x, .1, 0).shape == (1, 3, 2)


X = torch.zeros(3)
BAD = [
    (lambda: gaussian_pdf(X, 0, 0.), "var"),
    (lambda: gaussian_cdf(X, 0, -1.), "var"),
    (lambda: gaussian_pdf(X, 0, float("nan")), "var"),
    (lambda: tail_fraction(-1.), "k:"),
    (lambda: ks_distance(torch.zeros(0)), "no samples"),
    (lambda: expected_norm(0), "d:"),
    (lambda: heat_solution(X, -.1), "time"),
    (lambda: heat_solution(X, .1, 0.), "width"),
    (lambda: heat_solution(X, .1, 1., 0.), "diffusivity"),
    (lambda: diffuse_particles(X, 0., 3), "dt"),
    (lambda: diffuse_particles(X, .1, -1), "n_steps"),
    (lambda: diffuse_particles(X, .1, 3, -1.), "diffusivity"),
]


@pytest.mark.parametrize("call, words", BAD)
def test_bad_input_says_what_came(call, words):
    with pytest.raises(ValueError, match=words): call()
