"The forward step and walk: closed forms, properties over many inputs, and errors that say what came and what was wanted."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from diffusion_book.forward import check_half_life, check_step, check_variance_after, forward_step, forward_walk

unit = st.floats(0, 1, allow_nan=False)
shapes = st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple)
def rng(seed): return torch.Generator().manual_seed(seed)
def randn(shape, seed, dtype=torch.float64): return torch.randn(shape, generator=rng(seed), dtype=dtype)

@given(unit, st.floats(-9, 9), st.floats(-9, 9))
def test_step_is_the_formula_on_plain_numbers(beta, x, eps):
    want = math.sqrt(1 - beta)*x + math.sqrt(beta)*eps
    assert abs(forward_step(torch.tensor(x, dtype=torch.float64), beta, eps).item() - want) < 1e-6   # a plain eps is float32
    assert abs(forward_step(x, beta, eps).item() - want) < 1e-5

@given(shapes, unit, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_shape_dtype_and_seed(shape, beta, dtype):
    x = randn(shape, 0).to(dtype)
    a, b = (forward_step(x, beta, generator=rng(1)) for _ in range(2))
    assert a.shape == x.shape and a.dtype == dtype and torch.equal(a, b)

@given(shapes, st.integers(0, 99))
def test_ends(shape, seed):
    x, eps = randn(shape, seed), randn(shape, seed + 1)
    assert torch.equal(forward_step(x, 0, eps), x) and torch.equal(forward_step(x, 1, eps), eps)

@given(unit, st.integers(0, 99))
def test_linear_in_picture_and_noise(beta, seed):
    x, y, e, f = (randn((2, 1, 3, 3), seed + k) for k in range(4))
    both = forward_step(x + y, beta, e + f)
    assert torch.allclose(both, forward_step(x, beta, e) + forward_step(y, beta, f), atol=1e-12)

def test_one_beta_an_image():
    x, eps, beta = randn((3, 1, 2, 2), 0), randn((3, 1, 2, 2), 1), torch.tensor([0., .3, 1.])
    together = forward_step(x, beta.view(3, 1, 1, 1), eps)
    for i in range(3): assert torch.allclose(together[i], forward_step(x[i], beta[i], eps[i]), atol=1e-7)

def test_double_precision_factors_do_not_change_the_dtype():
    x = torch.zeros(2, 1, 4, 4)
    assert forward_step(x, torch.full((2, 1, 1, 1), .5, dtype=torch.float64)).dtype == torch.float32

def test_gradient_is_the_factor():
    x = randn((5,), 0).requires_grad_()
    forward_step(x, .36, generator=rng(0)).sum().backward()
    assert torch.allclose(x.grad, torch.full((5,), .8, dtype=torch.float64))

def test_variance_one_stays_one():
    n = 200_000
    x = randn((n,), 0)
    for x in forward_walk(x, torch.cat([torch.zeros(1), torch.full((20,), .3)]), rng(1)): pass
    assert abs(x.mean()) < 4/n**.5 and abs(x.var() - 1) < 4*(2/n)**.5          # 4 standard errors

def test_mean_and_variance_of_a_step():
    n, beta = 200_000, .3
    x = forward_step(torch.full((n,), -.7, dtype=torch.float64), beta, generator=rng(2))
    assert abs(x.mean() + .7*(1 - beta)**.5) < 4*(beta/n)**.5 and abs(x.var() - beta) < 4*beta*(2/n)**.5

def test_noise_of_different_pixels_is_independent():
    x = forward_step(torch.zeros(20_000, 3), .5, generator=rng(3))
    off = torch.corrcoef(x.T) - torch.eye(3)
    assert off.abs().max() < 4.5/20_000**.5

@settings(max_examples=30)
@given(st.lists(unit, min_size=0, max_size=8), shapes)
def test_walk_is_its_steps(betas, shape):
    beta, x0 = torch.tensor([0., *betas], dtype=torch.float64), randn(shape, 5)
    path, g, x = list(forward_walk(x0, beta, rng(6))), rng(6), x0
    assert len(path) == len(betas) + 1 and torch.equal(path[0], x0)
    for b, got in zip(betas, path[1:]):
        x = forward_step(x, b, generator=g)
        assert torch.equal(got, x)

def test_walk_leaves_the_picture_alone():
    x0 = torch.ones(2, 1, 4, 4)
    list(forward_walk(x0, torch.tensor([0., .5, 1.]), rng(0)))
    assert (x0 == 1).all()

nan = float("nan")
@pytest.mark.parametrize("call, error, words", [
    (lambda: forward_step(torch.zeros(2), -.1), ValueError, r"beta: got -0.1, wanted numbers in \[0, 1\]"),
    (lambda: forward_step(torch.zeros(2), 1.5), ValueError, r"beta: got 1.5, wanted numbers in \[0, 1\]"),
    (lambda: forward_step(torch.zeros(2), nan), ValueError, "beta: got nan, wanted"),
    (lambda: forward_step(torch.zeros(2, 1), torch.tensor([[.1], [2.]])), ValueError, "beta: got 0.1 to 2, wanted"),
    (lambda: forward_step(torch.zeros(2, 1, 3, 2), torch.tensor([.1, .2])), ValueError,
     r"beta: got shape \(2,\) for x of shape \(2, 1, 3, 2\), wanted one number or \(2, 1, 1, 1\)"),
    (lambda: forward_step(torch.zeros(1, 3), torch.zeros(2, 3)), ValueError, r"beta: got shape \(2, 3\)"),
    (lambda: forward_step(torch.zeros(2), .1, torch.zeros(3)), ValueError, r"eps: got shape \(3,\), wanted \(2,\)"),
    (lambda: forward_step(torch.zeros(2), .1, 0.), ValueError, r"eps: got shape \(\), wanted \(2,\)"),
    (lambda: forward_step(torch.zeros(2, dtype=torch.uint8), .1), TypeError, "x_prev: got dtype torch.uint8, wanted floating"),
    (lambda: forward_step(torch.zeros(2), .1, torch.zeros(2, dtype=torch.long)), TypeError, "eps: got dtype torch.int64, wanted"),
    (lambda: forward_walk(torch.zeros(2), torch.tensor([.1, .2])), ValueError, r"beta\[0\]: got 0.1, wanted 0"),
    (lambda: forward_walk(torch.zeros(2), torch.zeros(2, 2)), ValueError, r"beta: got shape \(2, 2\), wanted"),
    (lambda: forward_walk(torch.zeros(2), torch.zeros(0)), ValueError, r"beta: got shape \(0,\), wanted"),
    (lambda: forward_walk(torch.zeros(2), torch.tensor([0., .5, 1.5])), ValueError, "beta: got 0 to 1.5, wanted"),
    (lambda: forward_walk(torch.zeros(2, dtype=torch.long), torch.zeros(3)), TypeError, "x0: got dtype torch.int64, wanted"),
])
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words): call()

def test_checkers_pass_the_right_answers():
    check_step(lambda x, b, e: (1 - b)**.5*x + b**.5*e)
    def variance_after(v, beta):
        for b in beta: v = (1 - b)*v + b
        return v
    check_variance_after(variance_after)
    check_half_life(lambda beta: ((1 - beta).sqrt().cumprod(0) < .5).nonzero()[0])

def no_shrinking(v, beta): return v + beta.sum()
def root_in_variance(v, beta):
    for b in beta: v = (1 - b).sqrt()*v + b
    return v

@pytest.mark.parametrize("check, wrong, words", [
    (check_step, lambda x, b, e: (1 - b)**.5*x + b*e, "sqrt\\(beta\\)"),
    (check_step, lambda x, b, e: (1 - b)*x + b**.5*e, "take the root"),
    (check_step, lambda x, b, e: x + b**.5*e, "not shrunk"),
    (check_variance_after, no_shrinking, "nothing shrinks"),
    (check_variance_after, lambda v, beta: 1., "tends to"),
    (check_variance_after, root_in_variance, "multiply the variance"),
    (check_half_life, lambda beta: ((1 - beta[1:]).sqrt().cumprod(0) < .5).nonzero()[0], "off by one"),
    (check_half_life, lambda beta: ((1 - beta).cumprod(0) < .5).nonzero()[0], "multiplied 1 - beta"),
])
def test_checkers_reject_the_wrong_ones(check, wrong, words):
    with pytest.raises(AssertionError, match=words): check(wrong)
