"The reverse step: equal to diffusers', to Bayes' rule on a joint Gaussian, and loud about bad input."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from diffusion_book.posterior import posterior, reverse_step, step_between
from diffusion_book.schedules import (SCHEDULES, Schedule, cosine_schedule, linear_schedule, noise_to,
                                      scaled_linear_schedule, zero_terminal_snr)

quick = settings(max_examples=40, deadline=None)
rng = lambda seed=0: torch.Generator().manual_seed(seed)
MADE = {name: make() for name, make in SCHEDULES.items()} | {"zero": zero_terminal_snr(scaled_linear_schedule()), "short": cosine_schedule(20)}
names = st.sampled_from(sorted(MADE))

def near(a, b, tol=1e-10):
    a, b = (torch.as_tensor(o, dtype=torch.float64) for o in (a, b))
    gap = (a - b).abs().max()   # broadcasts; NaN fails
    assert gap <= tol, f"off by {gap:.3g}, allowed {tol:.0e}"

# ------------------------------------------------------------------ against another library
CONFIGS = [(dict(beta_schedule="linear"), linear_schedule()),
           (dict(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012), scaled_linear_schedule()),
           (dict(beta_schedule="squaredcos_cap_v2"), cosine_schedule())]

@pytest.mark.parametrize("theirs, ours", CONFIGS)
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("moves", [1000, 50])
def test_reverse_step_equals_diffusers(theirs, ours, variance, moves):
    "Mean and variance of every step, one by one and skipped, to 1e-6; their time is ours less one."
    diffusers = pytest.importorskip("diffusers")
    s = diffusers.DDPMScheduler(**theirs, clip_sample=False, prediction_type="sample", variance_type=f"fixed_{variance}")
    if moves < 1000: s.set_timesteps(moves)
    s.betas, s.alphas, s.alphas_cumprod = ours.beta[1:], ours.alpha[1:], ours.abar[1:]   # in float64, as ours; equal to theirs in test_schedules
    s.one = torch.tensor(1., dtype=torch.float64)
    xt, x0 = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64, generator=rng())
    times = range(1000) if moves == 1000 else s.timesteps.tolist()
    for i in times[::37] if moves == 1000 else times:
        t, to = i + 1, max(i - 1000//moves + 1, 0)
        _, var = posterior(x0, xt, t, ours, to)
        if variance == "large": var = step_between(t, ours, to)[1]
        if to: near(s._get_variance(i)/var, 1, 1e-6)   # relative: some are tiny
        near(s.step(x0, i, xt, generator=rng(1)).prev_sample, reverse_step(x0, xt, t, ours, to, variance, rng(1)), 1e-6)

@pytest.mark.parametrize("theirs, ours", CONFIGS[:2])
def test_float32_step_equals_diffusers(theirs, ours):
    "As people use it: float32, the network predicts eps, nothing replaced."
    diffusers = pytest.importorskip("diffusers")
    s = diffusers.DDPMScheduler(**theirs, clip_sample=False)
    xt, eps = torch.randn(2, 2, 1, 3, 3, generator=rng())
    for t in 1, 2, 3, 10, 500, 999, 1000:
        x0 = ((xt - ours.noise(t)*eps)/ours.signal(t)).float()
        near(s.step(eps, t - 1, xt, generator=rng(1)).prev_sample, reverse_step(x0, xt, t, ours, generator=rng(1)), 2e-4)   # largest at t = 3, where 1 - abar has few digits in float32

# ------------------------------------------------------------------ against Bayes' rule
@quick
@given(name=names, data=st.data(), c=st.floats(.01, 4))
def test_conditioning_a_joint_gaussian(name, data, c):
    "(x0, xs, xt) with x0 ~ N(0, c): condition xs on both others by linear algebra."
    s = MADE[name]
    t = data.draw(st.integers(2, s.T)); to = data.draw(st.integers(1, t - 1))
    a_s, a_t, b_s, b_t = s.signal(to), s.signal(t), s.noise(to), s.noise(t)
    f = a_t/a_s
    ss, stt = a_s**2*c + b_s**2, a_t**2*c + b_t**2
    given_, cross = torch.stack([torch.stack([torch.tensor(c, dtype=torch.float64), a_t*c]), torch.stack([a_t*c, stt])]), torch.stack([a_s*c, f*ss])
    K = torch.linalg.solve(given_, cross)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    near(posterior(one, zero, t, s, to)[0], K[:1], 1e-6); near(posterior(zero, one, t, s, to)[0], K[1:], 1e-6)
    near(posterior(one, one, t, s, to)[1], ss - K@cross, 1e-6)

@quick
@given(name=names, data=st.data())
def test_jumps_compose(name, data):
    "Two jumps back are one: drawing x_r and then x_s from the posteriors is drawing x_s. And forward: s -> r -> t is s -> t."
    s = MADE[name]
    t = data.draw(st.integers(2, s.T)); r = data.draw(st.integers(1, t - 1)); q = data.draw(st.integers(0, r - 1))
    f1, v1, _ = step_between(r, s, q); f2, v2, _ = step_between(t, s, r); f, v, _ = step_between(t, s, q)
    near(f, f1*f2); near(v, f2**2*v1 + v2)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    on_xr = posterior(zero, one, r, s, q)[0]
    near(posterior(zero, one, t, s, q)[0], on_xr*posterior(zero, one, t, s, r)[0])
    near(posterior(one, zero, t, s, q)[0], posterior(one, zero, r, s, q)[0] + on_xr*posterior(one, zero, t, s, r)[0])
    near(posterior(one, one, t, s, q)[1], posterior(one, one, r, s, q)[1] + on_xr**2*posterior(one, one, t, s, r)[1])

@quick
@given(name=names, data=st.data())
def test_a_step_back_keeps_the_marginal(name, data):
    "Noise x0 to t and step back to s with the truth: mean signal(s)*x0, variance noise(s)^2, exactly."
    s = MADE[name]
    t = data.draw(st.floats(1, s.T)); to = data.draw(st.floats(0, t*.999))   # fractional times as well
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    on_xt, (on_x0, var) = posterior(zero, one, t, s, to)[0], posterior(one, zero, t, s, to)
    near(on_xt*s.signal(t) + on_x0, s.signal(to).reshape(1)); near(on_xt**2*s.noise(t)**2 + var, (s.noise(to)**2).reshape(1))
    assert 0 <= var <= step_between(t, s, to)[1] + 1e-12, "small is at most large"

def test_monte_carlo_of_a_skipped_step():
    "400,000 pairs; those near xt = 0.4: mean and variance within 4 standard errors (and the bin's own width)."
    s, g = linear_schedule(), rng()
    xs, _ = noise_to(torch.full((400_000,), -.5, dtype=torch.float64), 300, s, generator=g)
    f, v, _ = step_between(400, s, 300)
    xt = f*xs + v.sqrt()*torch.randn(xs.shape, dtype=xs.dtype, generator=g)
    found = xs[(xt - .4).abs() < .02]
    mean, var = posterior(torch.tensor([-.5]).double(), torch.tensor([.4]).double(), 400, s, 300)
    assert len(found) > 4000
    assert abs(found.mean() - mean) < 4*(var/len(found)).sqrt()
    assert abs(found.var() - var) < 4*var*(2/len(found))**.5 + .02**2
    one_step = posterior(mean, mean, 400, s)[1]
    assert abs(found.var() - one_step) > 20*var*(2/len(found))**.5, "the one-step variance must be told apart"

@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid", "scaled_linear"])
def test_two_ways_of_writing_the_mean(name):
    "Through eps and through x0_hat, at every t, in float64 to 1e-10."
    s, t = MADE[name], torch.arange(1, 1001)
    xt, eps = torch.randn(2, 1000, 5, dtype=torch.float64, generator=rng())
    col = lambda v: v[:, None]
    x0_hat = (xt - col(s.noise(t))*eps)/col(s.signal(t))
    near(posterior(x0_hat, xt, t, s)[0], (xt - col(s.beta[t]/s.noise(t))*eps)/col(s.alpha[t].sqrt()))

# ------------------------------------------------------------------ the last step, times, dtype, device
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("t", [1, 20, 1000, torch.tensor([1, 20])])
def test_last_step_adds_no_noise_and_draws_none(variance, t):
    x0, xt = torch.randn(2, 2, 1, 3, 3, generator=rng()); g = rng(3)
    before = g.get_state()
    near(reverse_step(x0, xt, t, linear_schedule(), 0, variance, g), x0, 1e-6)
    assert torch.equal(g.get_state(), before)

def test_one_time_per_image():
    s, t, to = cosine_schedule(), torch.tensor([1, 400, 1000]), torch.tensor([0, 380, 999])
    x0, xt = torch.randn(2, 3, 1, 3, 3, generator=rng())
    mean, var = posterior(x0, xt, t, s, to)
    assert var.shape == (3, 1, 1, 1)
    for i in range(3):
        m, v = posterior(x0[i:i + 1], xt[i:i + 1], int(t[i]), s, int(to[i]))
        near(mean[i:i + 1], m, 1e-6); near(var[i].reshape(()), v, 1e-6)
    out = reverse_step(x0, xt, t, s, to, generator=rng())
    near(out[0], x0[0], 1e-6)                        # this one has arrived and gets no noise
    assert not torch.allclose(out[1], mean[1], atol=1e-3)

@pytest.mark.parametrize("t", [400, 400., torch.tensor(400), torch.tensor([400, 400]), torch.tensor([400., 400.])])
def test_int_float_and_tensor_are_the_same_time(t):
    x0, xt = torch.randn(2, 2, 4, dtype=torch.float64, generator=rng())
    near(posterior(x0, xt, t, linear_schedule())[0], posterior(x0, xt, 400, linear_schedule())[0], 1e-14)
    near(reverse_step(x0, xt, t, linear_schedule(), generator=rng()), reverse_step(x0, xt, 400, linear_schedule(), generator=rng()), 1e-14)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_follows_dtype(dtype):
    x0, xt = torch.randn(2, 2, 4, generator=rng()).to(dtype)
    for t in 7, torch.tensor([7, 1000]):
        mean, var = posterior(x0, xt, t, cosine_schedule())
        assert mean.dtype == var.dtype == reverse_step(x0, xt, t, cosine_schedule(), generator=rng()).dtype == dtype

def test_follows_device():
    "The meta device stands in for a GPU."
    x0 = torch.zeros(2, 4, device="meta")
    for t in 7, torch.tensor([1, 9]):
        for o in (*posterior(x0, x0, t, cosine_schedule()), reverse_step(x0, x0, t, cosine_schedule())): assert o.device.type == "meta"

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_follows_gpu():
    x0, t = torch.zeros(2, 4, device="cuda"), torch.tensor([1, 9], device="cuda")
    for at in 7, t, t.cpu(): assert reverse_step(x0, x0, at, cosine_schedule(), generator=torch.Generator("cuda")).is_cuda

def test_same_seed_same_step():
    x0, xt = torch.randn(2, 2, 4, generator=rng())
    a, b, c = (reverse_step(x0, xt, 500, linear_schedule(), generator=rng(i)) for i in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)

def test_any_schedule_will_do():
    "A continuous one, not variance-preserving: the marginal is kept all the same."
    class Line(Schedule):
        def signal(self, t): return 1 - self.check(t)
        def noise(self, t): return self.check(t)
    s, one, zero = Line(), torch.ones(1).double(), torch.zeros(1).double()
    on_xt, (on_x0, var) = posterior(zero, one, .8, s, .3)[0], posterior(one, zero, .8, s, .3)
    near(on_xt*.2 + on_x0, [.7]); near(on_xt**2*.64 + var, [.09])

# ------------------------------------------------------------------ bad input
def test_bad_input():
    s, x = linear_schedule(), torch.zeros(2, 4)
    for t, to in ((0, None), (5, 5), (5, 6), (5, -1), (torch.tensor([5, 3]), 4), (5, math.nan), (math.nan, 0)):
        with pytest.raises(ValueError, match="^s: got .* wanted 0 <= s < t"): posterior(x, x, t, s, to)
        with pytest.raises(ValueError, match="^s: got"): reverse_step(x, x, t, s, to)
    with pytest.raises(ValueError, match="^t: got .* wanted 0 to 1000"): posterior(x, x, 1001, s)
    with pytest.raises(ValueError, match=r"^t: got shape \(3,\)"): posterior(x, x, torch.tensor([1, 2, 3]), s)
    with pytest.raises(ValueError, match=r"^x0, xt: got shapes \(2, 4\) and \(2, 5\)"): posterior(x, torch.zeros(2, 5), 3, s)
    with pytest.raises(TypeError, match="^xt: got dtype torch.int64"): posterior(x.long(), x.long(), 3, s)
    with pytest.raises(ValueError, match="^variance: got 'learned'"): reverse_step(x, x, 3, s, variance="learned")
