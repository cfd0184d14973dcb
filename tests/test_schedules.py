"Schedules: equal to diffusers' number by number, sound for any T, and loud about bad input."
import json, math, warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st

from diffusion_book.schedules import (SCHEDULES, DiscreteSchedule, Schedule, beta_from_abar, cosine_schedule, like,
                                      linear_schedule, noise_to, scaled_linear_schedule, schedule_from_config,
                                      sigmoid_schedule, zero_terminal_snr)

quick = settings(max_examples=30, deadline=None)
names = pytest.mark.parametrize("name", SCHEDULES)

def near(a, b, tol=1e-12):
    a, b = (torch.as_tensor(o, dtype=torch.float64) for o in (a, b))
    torch.testing.assert_close(a, b, atol=tol, rtol=0)

def quiet(make, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kw)

# ------------------------------------------------------------------ against another library
@pytest.mark.parametrize("theirs, ours", [
    (dict(beta_schedule="linear"), linear_schedule()),
    (dict(beta_schedule="linear", num_train_timesteps=200, beta_start=5e-4, beta_end=.1), linear_schedule(200)),
    (dict(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012), scaled_linear_schedule()),
    (dict(beta_schedule="squaredcos_cap_v2"), cosine_schedule()),
    (dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50), cosine_schedule(50))])
def test_equals_diffusers(theirs, ours):
    "Their index 0 is our step 1, every number to 1e-6."
    diffusers = pytest.importorskip("diffusers")
    s = diffusers.DDPMScheduler(**theirs)
    assert len(s.betas) == ours.T == len(ours.beta) - 1
    near(s.betas, ours.beta[1:], 1e-6)
    near(s.alphas_cumprod, ours.abar[1:], 1e-6)
    x0, eps = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, ours.T//2, ours.T])
    near(s.add_noise(x0, eps, t - 1), noise_to(x0, t, ours, eps)[0], 2e-5)   # theirs are float32 all along

def test_zero_terminal_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    s = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012, rescale_betas_zero_snr=True)
    ours = zero_terminal_snr(scaled_linear_schedule())
    near(s.alphas_cumprod[:-1], ours.abar[1:-1], 1e-6)
    assert ours.abar[-1] == 0 and s.alphas_cumprod[-1] < 1e-6   # theirs puts 2**-24 there

# ------------------------------------------------------------------ any T
@pytest.mark.filterwarnings("error:abar")
@names
@quick
@given(T=st.integers(20, 4000))
def test_sound_at_any_T(name, T):
    s = SCHEDULES[name](T)   # must not warn
    assert s.T == T and len(s.beta) == len(s.alpha) == len(s.abar) == T + 1
    assert s.beta[0] == 0 and s.alpha[0] == s.abar[0] == 1
    assert s.beta.dtype == s.abar.dtype == torch.float64
    assert (s.beta[1:] > 0).all() and (s.beta <= 1).all() and (s.abar.diff() < 0).all()
    assert s.signal(T) < .07
    whole = torch.arange(T + 1)
    near(s.signal(whole)**2, s.abar); near(s.noise(whole)**2, 1 - s.abar)
    near(s.abar[1:], s.abar[:-1]*s.alpha[1:])
    assert s.clock(T) == 1000 and s.clock(0) == 0
    again = schedule_from_config(json.loads(json.dumps(s.config)))
    assert torch.equal(again.abar, s.abar)

@names
@quick
@given(data=st.data())
def test_times(name, data):
    T = data.draw(st.integers(20, 2000)); n = data.draw(st.integers(1, T))
    times = SCHEDULES[name](T).times(n)
    assert len(times) == n + 1 and times[0] == T and times[-1] == 0 and not times.is_floating_point()
    assert (times.diff() < 0).all() and times.diff().max() - times.diff().min() <= 1

@names
@quick
@given(t=st.floats(0, 1000))
def test_between_the_steps(name, t):
    "An int, a float and a tensor are the same time; between two steps the signal lies between theirs."
    s = SCHEDULES[name]()
    low, high = int(t), min(int(t) + 1, 1000)
    assert s.signal(high) <= s.signal(t) <= s.signal(low)
    near(s.signal(t)**2 + s.noise(t)**2, 1.)
    assert torch.equal(s.signal(t), s.signal(torch.tensor([t], dtype=torch.float64))[0])
    assert torch.equal(s.signal(low), s.signal(float(low))) and torch.equal(s.signal(low), s.signal(torch.tensor(low)))
    if low: assert s.logsnr(high) <= s.logsnr(low)

@quick
@given(beta=st.lists(st.floats(0, .999), min_size=1, max_size=30))
def test_beta_and_abar_are_inverses(beta):
    s = quiet(DiscreteSchedule, torch.tensor(beta, dtype=torch.float64))
    if s.abar[-1] > 1e-12: near(beta_from_abar(s.abar), s.beta[1:], 1e-9)

@quick
@given(T=st.integers(2, 1000), name=st.sampled_from(sorted(SCHEDULES)))
def test_zero_terminal(T, name):
    before = quiet(DiscreteSchedule, SCHEDULES[name]().beta[1:T + 1])   # any beginning of a schedule
    s = zero_terminal_snr(before)
    assert s.abar[-1] == 0 and s.logsnr(T) == -math.inf and s.signal(T) == 0 and s.noise(T) == 1
    near(s.abar[1], before.abar[1]); assert (s.abar.diff() < 0).all()
    near(zero_terminal_snr(s).abar, s.abar, 1e-9)

# ------------------------------------------------------------------ the three traps
def test_fewer_steps_with_the_same_beta_warns():
    for T, left in (200, .3636), (50, .7765):
        with pytest.warns(UserWarning, match=rf"T = {T}: x_T is not pure noise"): s = linear_schedule(T, rescale=False)
        near(s.signal(T), left, 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for T in 20, 50, 200, 1000, 3000: assert linear_schedule(T).signal(T) < .0066

def test_warning_points_at_the_caller():
    with pytest.warns(UserWarning) as caught: linear_schedule(50, rescale=False)
    assert caught[0].filename == __file__

@pytest.mark.parametrize("T", [5, 10, 19])
def test_beta_above_one_is_an_error(T):
    with pytest.raises(ValueError, match=rf"beta: got .* over T = {T} steps"): linear_schedule(T)

def test_end_points():
    for make, a, b in (linear_schedule, 1e-4, .02), (scaled_linear_schedule, .00085, .012):
        near(make().beta[[1, 1000]], [a, b]); near(make(500).beta[[1, 500]], [2*a, 2*b])
    mid = scaled_linear_schedule(1001, rescale=False).beta[501]   # the middle of the roots, squared
    near(mid.sqrt(), (.00085**.5 + .012**.5)/2)

# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize("beta", [[.1, -.1], [.1, 1.2], [1., .5], [.1, math.nan], [], [[.1]], [math.inf]])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="^beta: got"): DiscreteSchedule(torch.tensor(beta))

@pytest.mark.parametrize("T", [0, -3, 2.5, "10", None])
@names
def test_bad_T(name, T):
    with pytest.raises(ValueError, match="^T: got"): SCHEDULES[name](T)

@pytest.mark.parametrize("t", [-1, 1001, -.001, 1000.5, math.nan, torch.tensor([3, 1001])])
def test_bad_t(t):
    s = cosine_schedule()
    for f in s.signal, s.noise, s.logsnr, s.clock:
        with pytest.raises(ValueError, match="^t: got .* wanted 0 to 1000"): f(t)

@pytest.mark.parametrize("n", [0, -1, 1001, 2.5, "many"])
def test_bad_n(n):
    with pytest.raises(ValueError, match="^n: got .* from 1 to T = 1000"): cosine_schedule().times(n)

def test_other_bad_input():
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"^t: got shape \(3,\)"): noise_to(x, torch.tensor([1, 2, 3]), cosine_schedule())
    with pytest.raises(ValueError, match=r"^t: got shape \(2, 1\)"): noise_to(x, torch.ones(2, 1), cosine_schedule())
    with pytest.raises(ValueError, match="^eps: got shape"): noise_to(x, 1, cosine_schedule(), eps=x[:1])
    with pytest.raises(TypeError, match="^x0: got dtype torch.uint8"): noise_to(x.byte(), 1, cosine_schedule())
    with pytest.raises(ValueError, match="^start, end: got"): sigmoid_schedule(start=3., end=3.)
    with pytest.raises(ValueError, match="^tau: got"): sigmoid_schedule(tau=-1.)
    with pytest.raises(ValueError, match="at least 2 steps"): zero_terminal_snr(cosine_schedule(1))
    with pytest.raises(ValueError, match="wanted one of linear, scaled_linear, cosine, sigmoid"): schedule_from_config({"name": "x"})
    with pytest.raises(ValueError, match="wanted one of"): schedule_from_config({})
    for f in Schedule().signal, Schedule().noise, Schedule().times:
        with pytest.raises(NotImplementedError): f(1)

# ------------------------------------------------------------------ noise_to
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("t", [0, 7, 7.5, 1000, torch.tensor([3, 500]), torch.tensor([3., 500.5])])
def test_noise_to_follows_dtype_and_makes_the_mix(dtype, t):
    s, x0 = cosine_schedule(), torch.rand(2, 3, 4, 5, dtype=torch.float64).mul(2).sub(1).to(dtype)
    xt, eps = noise_to(x0, t, s, generator=torch.Generator().manual_seed(0))
    assert xt.dtype == eps.dtype == dtype and xt.shape == eps.shape == x0.shape
    want = like(s.signal(t), x0.double())*x0.double() + like(s.noise(t), x0.double())*eps.double()
    near(xt, want, 8*torch.finfo(dtype).eps)
    again, _ = noise_to(x0, t, s, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, xt)

def test_one_time_per_image_is_the_images_one_by_one():
    s, x0 = linear_schedule(), torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 400, 1000])
    xt, eps = noise_to(x0, t, s, generator=torch.Generator().manual_seed(1))
    for i in range(4): assert torch.equal(xt[i:i + 1], noise_to(x0[i:i + 1], int(t[i]), s, eps[i:i + 1])[0])
    assert torch.equal(xt[0], x0[0])

def test_follows_device():
    "The meta device stands in for a GPU: nothing is computed, but every tensor must end up there."
    x0 = torch.zeros(2, 1, 4, 4, device="meta")
    for t in 5, torch.tensor([5, 9]):
        assert all(o.device.type == "meta" for o in noise_to(x0, t, cosine_schedule()))

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_follows_gpu():
    s, x0 = cosine_schedule(), torch.zeros(2, 1, 4, 4, device="cuda")
    t = torch.tensor([5, 9], device="cuda")
    assert s.signal(t).is_cuda and s.noise(t).is_cuda and s.clock(t).is_cuda and noise_to(x0, t, s)[0].is_cuda

def test_noise_to_is_the_chapters_before():
    "The same as the jump, and as a walk of forward steps (means and variances)."
    from diffusion_book.forward import forward_step
    from diffusion_book.jump import jump
    s, x0 = linear_schedule(200), torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    near(jump(x0, s.abar[77].item(), eps), noise_to(x0, 77, s, eps)[0])
    mean, factor = x0, torch.zeros_like(x0)
    for t in range(1, 78):   # no noise gives the mean; the variance adds up step by step
        mean = forward_step(mean, s.beta[t].item(), torch.zeros_like(x0))
        factor = s.alpha[t]*factor + s.beta[t]
    near(mean, s.signal(77)*x0); near(factor, torch.full_like(x0, s.noise(77)**2))


@pytest.mark.parametrize("config", [dict(name="vp", beta_min=.2, beta_max=15.), dict(name="edm", sigma_max=50.), dict(name="flow", shift=3.)])
def test_schedules_of_later_chapters_travel_too(config):
    made = schedule_from_config(config)
    again = schedule_from_config(json.loads(json.dumps(made.config)))
    t = torch.linspace(.1, 1, 5, dtype=torch.float64)*made.T
    assert type(again) is type(made) and {**made.config, **config} == made.config
    assert torch.equal(again.signal(t), made.signal(t)) and torch.equal(again.noise(t), made.noise(t))
