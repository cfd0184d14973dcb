"The jump: the same as the walk, exactly and by chance; properties over many inputs; errors that say what came and what was wanted."
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st

from diffusion_book.forward import forward_step, forward_walk
from diffusion_book.jump import check_jump_between, check_recover, check_running_product, jump


unit = st.floats(0, 1, allow_nan=False)
shapes = st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple)
def rng(seed): return torch.Generator().manual_seed(seed)
def randn(shape, seed, dtype=torch.float64): return torch.randn(shape, generator=rng(seed), dtype=dtype)
BETA = torch.cat([torch.zeros(1), torch.linspace(1e-4, .02, 1000, dtype=torch.float64)])
ABAR = (1 - BETA).cumprod(0)

@given(unit, st.floats(-9, 9), st.floats(-9, 9))
def test_jump_is_the_formula_on_plain_numbers(abar, x, eps):
    want = math.sqrt(abar)*x + math.sqrt(1 - abar)*eps
    assert abs(jump(torch.tensor(x, dtype=torch.float64), abar, eps).item() - want) < 1e-6   # a plain eps is float32
    assert abs(jump(x, abar, eps).item() - want) < 1e-5

@given(shapes, unit, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_shape_dtype_and_seed(shape, abar, dtype):
    x = randn(shape, 0).to(dtype)
    a, b = (jump(x, abar, generator=rng(1)) for _ in range(2))
    assert a.shape == x.shape and a.dtype == dtype and torch.equal(a, b)

@given(shapes, st.integers(0, 99))
def test_ends(shape, seed):
    x, eps = randn(shape, seed), randn(shape, seed + 1)
    assert torch.equal(jump(x, 1, eps), x) and torch.equal(jump(x, 0, eps), eps)

@given(unit, st.integers(0, 99))
def test_a_step_is_a_jump_with_abar_one_minus_beta(beta, seed):
    x, eps = randn((2, 3), seed), randn((2, 3), seed + 1)
    assert torch.allclose(jump(x, 1 - beta, eps), forward_step(x, beta, eps), atol=1e-7)

@given(st.lists(st.fractions(0, 1, max_denominator=50), min_size=1, max_size=12))
def test_variance_of_the_chain_is_exactly_one_minus_abar(betas):
    keep, noise, product = Fraction(1), Fraction(0), Fraction(1)
    for b in betas:
        keep, noise, product = (1 - b)*keep, (1 - b)*noise + b, product*(1 - b)
        assert keep == product and noise == 1 - product

@settings(max_examples=40)
@given(st.lists(st.floats(0, .99), min_size=1, max_size=30), st.integers(0, 99))
def test_walk_and_jump_give_the_same_picture_from_the_same_noise(betas, seed):
    beta = torch.tensor(betas, dtype=torch.float64)
    abar, each, x0 = (1 - beta).cumprod(0), randn((len(beta), 5), seed), randn((5,), seed + 1)
    x = x0
    for b, e in zip(beta, each): x = forward_step(x, b, e)
    weights = (beta*abar[-1]/abar).sqrt()
    total = (weights[:, None]*each).sum(0)                          # sqrt(1 - abar) times the whole noise
    eps = total/(1 - abar[-1]).sqrt() if abar[-1] < 1 else total
    assert torch.allclose(x, jump(x0, abar[-1], eps), atol=1e-6)    # 1 - abar loses digits where beta is tiny

def test_walking_the_chain_has_the_mean_and_variance_of_the_jump():
    n, x0 = 20_000, torch.tensor([-1., 0., .3, 1.], dtype=torch.float64)
    for t, x in enumerate(forward_walk(x0.expand(n, 4), BETA[:601], rng(0))):
        if t % 100 or not t: continue
        jumped, v = jump(x0.expand(n, 4), ABAR[t], generator=rng(t)), 1 - ABAR[t]
        for got in x, jumped:                                       # 5 standard errors: 48 numbers are compared
            assert ((got.mean(0) - ABAR[t].sqrt()*x0).abs() < 5*(v/n)**.5).all()
            assert ((got.var(0) - v).abs() < 5*v*(2/n)**.5).all()

def test_two_jumps_are_one():
    n, x0, abar_s, abar_t = 200_000, .7, .6, .2
    x = jump(jump(torch.full((n,), x0, dtype=torch.float64), abar_s, generator=rng(1)), abar_t/abar_s, generator=rng(2))
    v = 1 - abar_t
    assert abs(x.mean() - abar_t**.5*x0) < 4*(v/n)**.5 and abs(x.var() - v) < 4*v*(2/n)**.5

@given(st.floats(1e-3, 1), st.integers(0, 99))
def test_the_whole_noise_brings_the_picture_back(abar, seed):
    x0, eps = randn((3, 2), seed), randn((3, 2), seed + 1)
    back = (jump(x0, abar, eps) - (1 - abar)**.5*eps)/abar**.5
    assert torch.allclose(back, x0, atol=1e-10)

def test_one_abar_an_image():
    x, eps, abar = randn((3, 1, 2, 2), 0), randn((3, 1, 2, 2), 1), torch.tensor([0., .3, 1.])
    together = jump(x, abar.view(3, 1, 1, 1), eps)
    for i in range(3): assert torch.allclose(together[i], jump(x[i], abar[i], eps[i]), atol=1e-7)

def test_gradients():
    x0, abar = torch.tensor(.8, dtype=torch.float64, requires_grad=True), torch.tensor(.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: jump(x, a, torch.tensor(-1.5, dtype=torch.float64)), (x0, abar))

def test_the_last_signal():
    assert abs(ABAR[1000].sqrt() - .00635) < 5e-6 and ABAR[0] == 1
    short = (1 - torch.linspace(1e-4, .02, 200, dtype=torch.float64)).prod().sqrt()
    assert abs(short - .364) < 5e-4

nan = float("nan")
@pytest.mark.parametrize("call, error, words", [
    (lambda: jump(torch.zeros(2), -.1), ValueError, r"abar: got -0.1, wanted numbers in \[0, 1\]"),
    (lambda: jump(torch.zeros(2), 1.001), ValueError, r"abar: got 1.001, wanted numbers in \[0, 1\]"),
    (lambda: jump(torch.zeros(2), nan), ValueError, "abar: got nan, wanted"),
    (lambda: jump(torch.zeros(2, 1, 3, 2), ABAR[:2]), ValueError, r"abar: got shape \(2,\) for x of shape \(2, 1, 3, 2\), wanted one number or \(2, 1, 1, 1\)"),
    (lambda: jump(torch.zeros(2), .1, torch.zeros(3)), ValueError, r"eps: got shape \(3,\), wanted \(2,\)"),
    (lambda: jump(torch.zeros(2, dtype=torch.long), .1), TypeError, "x0: got dtype torch.int64, wanted floating"),
    (lambda: jump(torch.zeros(2), .1, torch.zeros(2, dtype=torch.bool)), TypeError, "eps: got dtype torch.bool, wanted"),
])
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words): call()

def between(x, s, t, e): return (t/s)**.5*x + (1 - t/s)**.5*e

def test_checkers_pass_the_right_answers():
    check_running_product(lambda beta: (1 - beta).cumprod(0))
    check_jump_between(between)
    check_recover(lambda xt, a, e: (xt - (1 - a)**.5*e)/a**.5)

@pytest.mark.parametrize("check, wrong, words", [
    (check_running_product, lambda beta: beta.cumprod(0), "multiplied beta"),
    (check_running_product, lambda beta: 1 - beta.cumsum(0), "do not add"),
    (check_running_product, lambda beta: (1 - beta).sqrt().cumprod(0), "square root"),
    (check_running_product, lambda beta: (1 - beta[1:]).cumprod(0), "index 0"),
    (check_jump_between, lambda x, s, t, e: t**.5*x + (1 - t)**.5*e, "already"),
    (check_jump_between, lambda x, s, t, e: (t/s)**.5*x + (1 - t)**.5*e, "too much noise"),
    (check_jump_between, lambda x, s, t, e: t/s*x + (1 - t/s)**.5*e, "take the root"),
    (check_recover, lambda xt, a, e: xt - (1 - a)**.5*e, "still faded"),
    (check_recover, lambda xt, a, e: (xt - (1 - a)**.5*e)/a, "its root"),
    (check_recover, lambda xt, a, e: (xt + (1 - a)**.5*e)/a**.5, "subtract"),
])
def test_checkers_reject_the_wrong_ones(check, wrong, words):
    with pytest.raises(AssertionError, match=words): check(wrong)
