"The bound, the predictions and their conversions, the denoiser: properties, closed forms, bad input."
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from diffusion_book.objective import (PREDICTIONS, Denoiser, convert, elbo_weight, from_x0_and_eps, gaussian_kl,
                                      min_snr_weight, simple_loss, x0_and_eps, x0_weight)
from diffusion_book.posterior import posterior
from diffusion_book.schedules import (cosine_schedule, linear_schedule, noise_to, scaled_linear_schedule,
                                      sigmoid_schedule, zero_terminal_snr)

LINEAR, COSINE = linear_schedule(), cosine_schedule()
ZERO = zero_terminal_snr(LINEAR)
SCHEDULES = [LINEAR, COSINE, sigmoid_schedule(), scaled_linear_schedule()]
kinds, number = st.sampled_from(PREDICTIONS), st.floats(-5, 5)
positive = st.floats(.01, 100)


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def batch(n=4, seed=0, dtype=torch.float64): return torch.randn(2, n, 3, generator=seeded(seed), dtype=dtype)


# The KL divergence

@given(number, positive, number, positive)
def test_kl_is_torchs(m1, v1, m2, v2):
    ours = gaussian_kl(*(torch.tensor(o, dtype=torch.float64) for o in (m1, v1, m2, v2)))
    theirs = kl_divergence(*(Normal(torch.tensor(m, dtype=torch.float64), v**.5) for m, v in ((m1, v1), (m2, v2))))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert ours >= -1e-12

@given(number, positive)
def test_kl_of_equals_is_zero(m, v):
    m, v = torch.tensor(m), torch.tensor(v)
    assert gaussian_kl(m, v, m, v) == 0

def test_kl_takes_plain_numbers_and_broadcasts():
    assert gaussian_kl(0., 1., torch.tensor([0., 2.]), torch.tensor(1.)).tolist() == [0., 2.]

@pytest.mark.parametrize("v1, v2", [(0., 1.), (1., 0.), (-1., 1.)])
def test_kl_wants_variances_above_zero(v1, v2):
    with pytest.raises(ValueError, match="wanted both above 0"): gaussian_kl(0., torch.tensor(v1), 0., torch.tensor(v2))


# Conversions

@given(kinds, kinds, st.integers(1, 1000), st.sampled_from(range(len(SCHEDULES))), st.integers(0, 99))
def test_there_and_back(one, other, t, which, seed):
    value, xt = batch(seed=seed)
    s = SCHEDULES[which]
    back = convert(convert(value, xt, t, s, one, other), xt, t, s, other, one)
    magnified = max(1, (s.noise(t)/s.signal(t)).item(), (1/s.noise(t)).item())
    assert (back - value).abs().max() < 1e-13*magnified**2, "the way back does not undo the way there"

@given(kinds, kinds, kinds, st.integers(1, 990))
def test_a_detour_changes_nothing(one, two, three, t):
    value, xt = batch()
    straight = convert(value, xt, t, LINEAR, one, three)
    detour = convert(convert(value, xt, t, LINEAR, one, two), xt, t, LINEAR, two, three)
    torch.testing.assert_close(detour, straight, rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_truth_comes_back_at_every_t(schedule, kind):
    t = torch.arange(1, schedule.T)
    x0, eps = batch(len(t))
    xt, _ = noise_to(x0, t, schedule, eps)
    x0_hat, eps_hat = x0_and_eps(from_x0_and_eps(x0, eps, t, schedule, kind), xt, t, schedule, kind)
    torch.testing.assert_close(x0_hat, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(eps_hat, eps, rtol=0, atol=1e-9)

def test_float32_keeps_its_precision():
    x0, eps = batch(8, dtype=torch.float32)
    for t in (1, 100, 500, 1000):
        xt, _ = noise_to(x0, t, LINEAR, eps)
        for kind in PREDICTIONS:
            x0_hat, _ = x0_and_eps(from_x0_and_eps(x0, eps, t, LINEAR, kind), xt, t, LINEAR, kind)
            assert x0_hat.dtype == torch.float32
            assert (x0_hat - x0).abs().max() < 2e-6*(1 + LINEAR.noise(t)/LINEAR.signal(t))

def test_one_time_an_image_is_the_same_as_each_alone():
    value, xt = batch(4)
    t = torch.tensor([1, 10, 500, 1000])
    together = convert(value, xt, t, LINEAR, "v", "score")
    alone = [convert(value[i:i + 1], xt[i:i + 1], int(t[i]), LINEAR, "v", "score") for i in range(4)]
    assert torch.equal(together, torch.cat(alone))

def test_a_prediction_asked_for_as_itself_is_untouched_even_at_the_ends():
    value, xt = batch()
    for kind in PREDICTIONS:
        for t in (0, 1000): assert convert(value, xt, t, ZERO, kind, kind) is value

@pytest.mark.parametrize("kind", ("eps", "score"))
def test_no_signal_says_so(kind):
    value, xt = batch()
    with pytest.raises(ValueError, match="signal is 0.*says nothing about x0"): convert(value, xt, 1000, ZERO, kind, "x0")

@pytest.mark.parametrize("kind", ("x0", "v", "flow"))
def test_no_signal_is_no_obstacle_to_the_others(kind):
    x0, eps = batch()
    target = from_x0_and_eps(x0, eps, 1000, ZERO, kind)
    torch.testing.assert_close(convert(target, eps, 1000, ZERO, kind, "x0"), x0)

def test_no_noise_says_so():
    value, xt = batch()
    with pytest.raises(ValueError, match="noise is 0.*says nothing about eps"): convert(value, xt, 0, LINEAR, "x0", "eps")
    with pytest.raises(ValueError, match="noise is 0"): convert(value, xt, 0, LINEAR, "eps", "score")
    assert torch.equal(convert(value, xt, 0, LINEAR, "eps", "x0"), xt)

@pytest.mark.parametrize("predicts, to, name", [("noise", "x0", "predicts"), ("eps", "X0", "to")])
def test_unknown_predictions(predicts, to, name):
    value, xt = batch()
    with pytest.raises(ValueError, match=f"{name}: got .* wanted one of eps, x0, v, score, flow"):
        convert(value, xt, 5, LINEAR, predicts, to)

def test_times_out_of_range_and_of_the_wrong_number():
    value, xt = batch(4)
    with pytest.raises(ValueError, match="wanted 0 to 1000"): convert(value, xt, 1001, LINEAR, "eps", "x0")
    with pytest.raises(ValueError, match="wanted one time or"): convert(value, xt, torch.tensor([1, 2]), LINEAR, "eps", "x0")


# Weights

@given(kinds, st.integers(1, 999))
def test_x0_weight_is_the_ratio_of_squared_errors(kind, t):
    value, xt = batch()
    ends = [convert(v, xt, t, LINEAR, kind, "x0") for v in (value, value + .1)]
    assert x0_weight(t, LINEAR, kind).item() == pytest.approx(.01/(ends[0] - ends[1]).square().mean().item(), rel=1e-6)

@given(st.integers(2, 1000), st.sampled_from(range(len(SCHEDULES))))
def test_elbo_weight_is_the_divergence_of_the_two_steps(t, which):
    s = SCHEDULES[which]
    (x0, xt), x0_hat = batch(), batch(seed=1)[0]
    (m1, var), (m2, _) = posterior(x0, xt, t, s), posterior(x0_hat, xt, t, s)
    wanted = gaussian_kl(m1, var, m2, var).sum()
    torch.testing.assert_close(elbo_weight(t, s)*(x0 - x0_hat).square().sum(), wanted, rtol=1e-6, atol=1e-12)
    for kind in PREDICTIONS:
        if kind in ("eps", "score") and t > 900: continue   # x0_hat was not made for eps: the division magnifies
        errors = convert(x0, xt, t, s, "x0", kind) - convert(x0_hat, xt, t, s, "x0", kind)
        torch.testing.assert_close(elbo_weight(t, s, kind)*errors.square().sum(), wanted, rtol=1e-6, atol=1e-12)

def test_elbo_weight_is_hos_formula():
    t = torch.arange(2, 1001)
    beta, alpha, abar = LINEAR.beta[t], LINEAR.alpha[t], LINEAR.abar
    small = beta*(1 - abar[t - 1])/(1 - abar[t])
    torch.testing.assert_close(elbo_weight(t, LINEAR, "eps"), beta**2/(2*small*alpha*(1 - abar[t])), rtol=1e-9, atol=0)

def test_elbo_weight_wants_t_above_1():
    with pytest.raises(ValueError, match="t: got 1, wanted above 1"): elbo_weight(torch.tensor([1, 5]), LINEAR)

@pytest.mark.parametrize("schedule", [*SCHEDULES, ZERO], ids=str)
@pytest.mark.parametrize("kind", ("eps", "x0", "v"))
def test_mistake_21_min_snr_weight_is_finite_everywhere(schedule, kind):
    w = min_snr_weight(torch.arange(schedule.T + 1), schedule, kind)
    assert w.isfinite().all() and (w >= 0).all() and w.shape == (schedule.T + 1,)
    t = torch.arange(1, schedule.T)
    snr = (schedule.signal(t)/schedule.noise(t))**2
    torch.testing.assert_close(w[1:-1]*x0_weight(t, schedule, kind), snr.clamp(max=5), rtol=1e-9, atol=0)

def test_min_snr_ends():
    assert min_snr_weight(1000, ZERO, "eps") == 1 and min_snr_weight(1000, ZERO, "v") == 0
    assert min_snr_weight(0, ZERO, "eps") == 0 and min_snr_weight(0, ZERO, "x0") == 5
    assert min_snr_weight(0, ZERO, "v") == 0

def test_min_snr_bad_input():
    with pytest.raises(ValueError, match="predicts: got 'flow'"): min_snr_weight(5, LINEAR, "flow")
    with pytest.raises(ValueError, match="gamma: got 0"): min_snr_weight(5, LINEAR, gamma=0)


# The denoiser and its loss

@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 3, 8, 6)])
def test_a_network_that_knows_gives_back_the_data(kind, shape):
    x0, eps = torch.randn((2, *shape), generator=seeded(), dtype=torch.float64)
    t = torch.tensor([1, 20, 300, 700, 1000])
    knows = Denoiser(lambda xt, clock, cond=None: from_x0_and_eps(x0, eps, t, LINEAR, kind), LINEAR, kind)
    torch.testing.assert_close(knows(noise_to(x0, t, LINEAR, eps)[0], t), x0, rtol=0, atol=1e-9)
    assert simple_loss(knows, x0, t, eps).tolist() == [0]*5

def test_the_network_is_shown_the_clock_one_an_image_and_the_condition():
    seen = {}
    def spy(xt, clock, cond=None):
        seen.update(clock=clock, cond=cond)
        return 0*xt
    s, x = linear_schedule(T=50), batch()[0]
    Denoiser(spy, s)(x, 25, cond="a boot")
    assert seen["clock"].tolist() == [500.]*4 and seen["cond"] == "a boot"
    Denoiser(spy, s)(x, torch.tensor([1, 2, 3, 50]))
    assert seen["clock"].tolist() == [20., 40., 60., 1000.] and seen["cond"] is None

def test_clipping_is_off_unless_asked_for():
    x = batch()[0]
    far = lambda xt, clock, cond=None: torch.full_like(xt, 3.)
    assert (Denoiser(far, LINEAR, "x0")(x, 5) == 3).all()
    assert (Denoiser(far, LINEAR, "x0", clip=(-1, 1))(x, 5) == 1).all()
    assert (Denoiser(far, LINEAR, "x0", clip=(-1, 1)).predict(x, 5) == 3).all(), "the network's own output is not clipped"

def test_bf16_is_inside_only():
    net = torch.nn.Linear(3, 3)
    seen = []
    def spy(xt, clock, cond=None):
        out = net(xt)
        seen.append(out.dtype)
        return out
    x = batch(dtype=torch.float32)[0]
    assert Denoiser(spy, LINEAR, precision="bf16").predict(x, 5).dtype == torch.float32
    assert Denoiser(spy, LINEAR).predict(x, 5).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16): Denoiser(spy, LINEAR).predict(x, 5)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16], "an autocast around the denoiser must reach the network"

def test_the_loss_lets_gradients_through():
    w = torch.zeros((), requires_grad=True, dtype=torch.float64)
    x0, eps = batch()
    simple_loss(Denoiser(lambda xt, clock, cond=None: w*xt, LINEAR), x0, 500, eps).mean().backward()
    xt, _ = noise_to(x0, 500, LINEAR, eps)
    assert w.grad.item() == pytest.approx(-2*(xt*eps).mean().item())

@given(st.integers(1, 1000), kinds)
def test_loss_of_silence_is_the_mean_square_of_the_target(t, kind):
    x0, eps = batch()
    silent = Denoiser(lambda xt, clock, cond=None: 0*xt, LINEAR, kind)
    target = from_x0_and_eps(x0, eps, t, LINEAR, kind)
    torch.testing.assert_close(simple_loss(silent, x0, t, eps), target.square().mean(1))

def test_the_same_generator_gives_the_same_loss():
    silent = Denoiser(lambda xt, clock, cond=None: 0*xt, LINEAR)
    x0 = batch()[0]
    one, two, three = (simple_loss(silent, x0, 9, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)

def test_mistake_18_a_last_layer_that_is_not_linear_has_a_floor():
    e = torch.randn(200_000, generator=seeded(), dtype=torch.float64)
    phi, tail = math.exp(-.5)/math.sqrt(2*math.pi), .5*math.erfc(1/math.sqrt(2))
    assert (e - e.clamp(-1, 1)).square().mean().item() == pytest.approx(2*(2*tail - phi), abs=.005)
    assert (e - e.clamp(min=0)).square().mean().item() == pytest.approx(.5, abs=.01)

@pytest.mark.parametrize("args, message", [
    (dict(predicts="noise"), "predicts: got 'noise'"), (dict(clip=(1, -1)), "clip: got"),
    (dict(clip=(1, 2, 3)), "clip: got"), (dict(precision="fp16"), "precision: got 'fp16'")])
def test_bad_settings(args, message):
    with pytest.raises(ValueError, match=message): Denoiser(None, LINEAR, **args)

def test_bad_calls():
    x = batch()[0]
    denoise = Denoiser(lambda xt, clock, cond=None: xt[:2], LINEAR)
    with pytest.raises(ValueError, match=r"net: returned shape \(2, 3\), wanted xt's \(4, 3\)"): denoise(x, 5)
    with pytest.raises(TypeError, match="xt: got dtype torch.uint8"): denoise(x.byte(), 5)
    with pytest.raises(ValueError, match="t: got -1"): denoise(x, -1)
    with pytest.raises(ValueError, match="wanted one time or"): denoise(x, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="eps: got shape"): simple_loss(denoise, x, 5, x[:1])
    with pytest.raises(TypeError, match="x0: got dtype torch.int64"): simple_loss(denoise, x.long(), 5)
