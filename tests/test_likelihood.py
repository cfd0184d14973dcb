"Bits per dimension: every term against integrals, chains and counted sets, and loud about bad input."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from diffusion_book.ideal import FiniteDenoiser, GaussianMixture, MixtureDenoiser
from diffusion_book.likelihood import (AnalyticVariance, LearnedVariance, bits_per_dim, bound_draws, bound_terms, data_term,
                                       doubt_variance, fit_variance, grey_log_prob, prior_term,
                                       variance_of, step_term, variance_loss, _near_data, _spread_picks)
from diffusion_book.posterior import posterior, step_between
from diffusion_book.sampling import ddpm, sample
from diffusion_book.schedules import SCHEDULES, cosine_schedule, linear_schedule, noise_to

quick = settings(max_examples=40, deadline=None)
rng = lambda seed=0: torch.Generator().manual_seed(seed)
MADE = {name: make() for name, make in SCHEDULES.items()} | {"short": cosine_schedule(20)}
names = st.sampled_from(sorted(MADE))

def near(a, b, tol=1e-8):
    a, b = (torch.as_tensor(o, dtype=torch.float64) for o in (a, b))
    gap = (a - b).abs().max()   # broadcasts; NaN fails
    assert gap <= tol, f"off by {gap:.3g}, allowed {tol:.0e}"

class Zero(nn.Module):
    "A network that says one number, with a gradient."
    def __init__(self, says=0.):
        super().__init__()
        self.says = nn.Parameter(torch.tensor(says))
    def forward(self, x, clock, cond=None): return self.says + 0*x

# ------------------------------------------------------------------ the data term
@quick
@given(mean=st.floats(-3, 3), log_var=st.floats(-30, 8), levels=st.integers(2, 300))
def test_levels_sum_to_one(mean, log_var, levels):
    at = torch.linspace(-1, 1, levels, dtype=torch.float64)
    log_p = grey_log_prob(at, torch.full_like(at, mean), torch.tensor(math.exp(log_var)), levels)
    assert log_p.isfinite().all() or log_var < -20, "finite unless the width is beyond any use"
    assert not log_p.isnan().any() and (log_p <= 1e-12).all()
    near(log_p.exp().sum(), 1, 1e-8)

def test_levels_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    at, mean, std = torch.linspace(-1, 1, 256, dtype=torch.float64), .37, .05
    edges = torch.cat([torch.tensor([-math.inf]), (at[1:] + at[:-1])/2, torch.tensor([math.inf])]).numpy()
    want = stats.norm.cdf(edges[1:], mean, std) - stats.norm.cdf(edges[:-1], mean, std)
    near(grey_log_prob(at, torch.full_like(at, mean), torch.tensor(std**2, dtype=torch.float64)).exp(), want, 1e-12)
    with pytest.raises(ValueError, match="levels: got 1"): grey_log_prob(at, at, torch.tensor(1.), 1)

def test_float32_images_hit_the_outer_bins():
    "Black as stored in float32 must be found in the open bin."
    x = torch.tensor([-1., 1.])
    near(grey_log_prob(x, torch.tensor([-2., 2.]), torch.tensor(1e-6)), torch.zeros(2))

def test_a_width_far_below_a_bin_far_above_all_and_plain_numbers():
    one, s = torch.ones(1, 1).double(), cosine_schedule()
    near(data_term(0*one, 0*one, one, 1, s, 1e-8*one, 255), 0, 1e-9)
    near(data_term(one, 0*one, one, 1, s, 1e12*one), math.log(2), 1e-4)
    near(data_term(one, 0*one, one, 1, s, one, None), .5 + .5*math.log(2*math.pi), 1e-9)

def test_bins_are_a_tighter_code_than_dequantised_densities():
    "A Gaussian half a bin wide, and data that follow its probabilities exactly."
    at, var = torch.linspace(-1, 1, 256, dtype=torch.float64), torch.tensor((1/255)**2, dtype=torch.float64)
    log_p = grey_log_prob(at, torch.full_like(at, .1), var)
    drawn = at[torch.multinomial(log_p.exp(), 20_000, replacement=True, generator=rng(1))]
    drawn = drawn + (2*torch.rand(drawn.shape, generator=rng(2), dtype=torch.float64) - 1)/255
    density = -(drawn - .1)**2/(2*var) - .5*torch.log(2*math.pi*var)
    assert -(density + math.log(2/255)).mean() > -(log_p.exp()*log_p).sum() + .05*math.log(2)

# ------------------------------------------------------------------ the other terms
def test_prior_against_an_integral():
    s, x0 = linear_schedule(100), torch.tensor([[.7]]).double()
    grid = torch.linspace(-12, 12, 40001, dtype=torch.float64)
    a, b = s.signal(100), s.noise(100)
    log_n = lambda m, v: -(grid - m)**2/(2*v) - .5*torch.log(2*math.pi*v)
    q = log_n(a*.7, b**2)
    near(prior_term(x0, s), (q.exp()*(q - log_n(0, b**2))).sum()*(grid[1] - grid[0]), 1e-7)

@quick
@given(name=names, data=st.data(), off=st.floats(-1, 1))
def test_step_against_an_integral(name, data, off):
    s = MADE[name]
    t = data.draw(st.integers(2, s.T)); to = data.draw(st.integers(1, t - 1))
    x0, xt = torch.tensor([[.3]]).double(), torch.tensor([[-.4]]).double()
    m1, v1 = posterior(x0, xt, t, s, to); m2, _ = posterior(x0 + off, xt, t, s, to)
    for kind in ("small", "large"):
        v2 = variance_of(kind, xt, t, s, to)
        z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
        x = m1 + v1.sqrt()*z
        log = lambda m, v: -(x - m)**2/(2*v) - .5*torch.log(2*math.pi*v)
        want = (log(m1, v1).exp()*(log(m1, v1) - log(m2, v2))).sum()*(z[1] - z[0])*v1.sqrt()
        got = step_term(x0, x0 + off, xt, t, s, to, kind)
        assert abs(got - want) <= 1e-6*(1 + want.abs())
        assert got >= -1e-12

def test_one_time_or_many():
    "A batch with its own times is the batch one by one."
    s, x0 = cosine_schedule(), torch.rand(3, 1, 4, 4, generator=rng())*2 - 1
    t, to = torch.tensor([2, 500, 1000]), torch.tensor([1, 100, 999])
    xt, _ = noise_to(x0, t, s, generator=rng(1))
    got = step_term(x0, .9*x0, xt, t, s, to, "large")
    for i in range(3): near(got[i], step_term(x0[i:i+1], .9*x0[i:i+1], xt[i:i+1], int(t[i]), s, int(to[i]), "large"), 1e-6)

def test_the_prior_is_nothing_only_where_no_signal_is_left():
    x = torch.rand(4, 1, 8, 8, generator=rng())*2 - 1
    with pytest.warns(UserWarning): unscaled = linear_schedule(100, rescale=False)
    bits = [bits_per_dim(prior_term(x, s), x).mean() for s in (linear_schedule(), cosine_schedule(), unscaled)]
    assert max(bits[:2]) < 1e-4 and bits[2] > 1e-3, bits

def test_bits():
    near(bits_per_dim(torch.tensor(6*math.log(2)), torch.zeros(5, 1, 2, 3)), 1)

# ------------------------------------------------------------------ the whole bound
BUMPS = GaussianMixture(torch.tensor([[-1., 0.], [.6, .5]]).double(), torch.tensor([.2, .3]), torch.tensor([.4, .6]))

@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_terms_add_up_to_the_log_ratio_along_chains(variance):
    "The definition without a divergence: ln q(x_1..T | x_0) - ln p(x_0..T), averaged over forward chains."
    def log_n(x, mean, var): return (-((x - mean)**2/var + torch.log(2*math.pi*var))/2).sum(1)
    s, x0 = cosine_schedule(8), BUMPS.sample(4000, rng())
    f, x, ratio, g = MixtureDenoiser(BUMPS, s), x0, 0., rng(5)
    for t in range(1, 9):
        noisy = s.alpha[t].sqrt()*x + s.beta[t].sqrt()*torch.randn(x.shape, generator=g, dtype=x.dtype)
        mean, _ = posterior(f(noisy, t), noisy, t, s)
        ratio = ratio + log_n(noisy, s.alpha[t].sqrt()*x, s.beta[t]) - log_n(x, mean, variance_of(variance, noisy, t, s))
        x = noisy
    ratio = bits_per_dim(ratio - log_n(x, 0*x, s.noise(8)**2), x0)
    terms = bound_terms(f, x0, s, variance, levels=None, generator=rng(6)).sum(1)
    se = ((ratio.var() + terms.var())/len(x0)).sqrt()
    assert abs(ratio.mean() - terms.mean()) < 4*se, "4 standard errors"

@pytest.mark.parametrize("variance", ["small", "large"])
def test_never_below_the_truth_and_closing(variance):
    x = BUMPS.sample(2000, rng())
    truth, gaps = bits_per_dim(-BUMPS.log_prob(x), x).mean(), []
    for T in (8, 32, 128):
        s = cosine_schedule(T)
        gaps.append((bound_terms(MixtureDenoiser(BUMPS, s), x, s, variance, levels=None, generator=rng(1)).sum(1).mean() - truth).item())
    assert min(gaps) > 0, gaps
    if variance == "large": assert gaps == sorted(gaps, reverse=True) and gaps[-1] < .2, gaps
    else: assert min(gaps) > .3, "near smooth data the small variance is too small, for any T"

def test_a_worse_denoiser_has_a_worse_bound():
    x, s = BUMPS.sample(2000, rng()), cosine_schedule(32)
    good = MixtureDenoiser(BUMPS, s)
    bits = [bound_terms(f, x, s, "large", levels=None, generator=rng(1)).sum(1).mean() for f in (good, lambda xt, t, cond: good(xt, t) + .1)]
    assert bits[1] > bits[0] + .01

def test_a_counted_set():
    data = (torch.randint(0, 9, (16, 1, 4, 4), generator=rng())/4 - 1).double()
    s = cosine_schedule(400)
    bits = bound_terms(FiniteDenoiser(data, s), data, s, levels=9, generator=rng(1)).sum(1).mean().item()
    assert 4/16 - 1e-3 < bits < 4/16 + .02, bits

@pytest.mark.parametrize("chances", [None, "even"])
@pytest.mark.parametrize("moves", [None, 12])
def test_the_estimate_is_unbiased(chances, moves):
    s, x = cosine_schedule(40), BUMPS.sample(4000, rng())
    f, times = MixtureDenoiser(BUMPS, s), s.times(moves)
    full = bound_terms(f, x, s, "large", times, None, rng(1)).sum(1)
    c = None if chances is None else torch.ones(len(times) - 2)
    few = bound_draws(f, x, s, ["large", "small"], times, 3, c, None, rng(2)).sum(2)
    se = ((full.var() + few[0].var())/len(x)).sqrt()
    assert abs(full.mean() - few[0].mean()) < 4*se, "4 standard errors"
    assert few.shape == (2, 4000) and not torch.equal(few[0], few[1])

def test_calls_and_seeds():
    s, x, calls = cosine_schedule(40), BUMPS.sample(10, rng()), []
    def count(xt, t, cond): calls.append(len(xt)); return 0*xt
    a = bound_draws(count, x, s, ["small", "large"], draws=3, levels=None, generator=rng(1))
    assert calls == [10]*4, "one call serves all variances"
    assert torch.equal(a, bound_draws(count, x, s, ["small", "large"], draws=3, levels=None, generator=rng(1)))

def test_picks_come_up_as_often_as_said():
    c = torch.tensor([1., 5., 0.1, 3.9])
    i, p = _spread_picks(c, 5000, 4, rng())
    share = i.flatten().bincount(minlength=4)/i.numel()
    near(share, c/c.sum(), 4*.5/20_000**.5)
    near(p, (c/c.sum())[i])
    near(_near_data(cosine_schedule().times(50)).sum(), 1)
    assert len(_near_data(cosine_schedule().times(50))) == 49

# ------------------------------------------------------------------ variances
@quick
@given(name=names, data=st.data(), c=st.floats(.01, 4))
def test_doubt_variance_is_exact_on_a_gaussian(name, data, c):
    "Condition x_s on x_t for data N(0, c)."
    s = MADE[name]
    t = data.draw(st.integers(1, s.T)); to = data.draw(st.integers(0, t - 1))
    a, b = s.signal(t), s.noise(t)
    ss = s.signal(to)**2*c + s.noise(to)**2
    f, v, _ = step_between(t, s, to)
    got = doubt_variance(c*b**2/(a**2*c + b**2), torch.zeros(1, 1).double(), t, s, to)
    assert abs(got/(ss - (f*ss)**2/(f**2*ss + v)) - 1) < 1e-5

@quick
@given(name=names, data=st.data())
def test_small_and_large(name, data):
    s = MADE[name]
    t = data.draw(st.integers(1, s.T)); to = data.draw(st.integers(0, t - 1))
    x = torch.zeros(2, 3).double()
    small, large = (variance_of(v, x, t, s, to) for v in ("small", "large"))
    assert 0 < small <= large
    near(large, step_between(t, s, to)[1], 1e-12)
    if to: near(small, posterior(x, x, t, s, to)[1], 1e-12)
    else: near(small, large/2, 1e-12)

def test_analytic_variance_finds_the_doubt():
    cloud, s = GaussianMixture(torch.zeros(1, 2).double(), .5), linear_schedule()
    x = cloud.sample(4000, rng())
    found = AnalyticVariance(MixtureDenoiser(cloud, s), x, s, generator=rng(1))
    for t, to in ((300, 299), (300, 100), (900, 0)):
        want = doubt_variance(.25*s.noise(t)**2/(.25*s.signal(t)**2 + s.noise(t)**2), x, t, s, to)
        near(found.variance(x[:4], torch.tensor(t), to)/want, 1, .12)     # 4 standard errors, and a straight line between measured times

def test_learned_mixes():
    s, x = cosine_schedule(), torch.randn(3, 1, 4, 4, generator=rng())
    small, large = (variance_of(v, x, 500, s, 400) for v in ("small", "large"))
    for v, want in ((0., small), (1., large), (2., large**2/small)): near(LearnedVariance(None, Zero(v), s).variance(x, 500, 400).detach()/want, 1, 1e-4)
    t = torch.tensor([1, 20, 1000])
    doubt = LearnedVariance(None, Zero(), s, "doubt").variance(x, t, 0*t).detach()
    near(doubt[:, 0, 0, 0]/s.noise(t)**2, 1, 1e-5)
    assert doubt.dtype == x.dtype and doubt.shape == x.shape
    with pytest.raises(ValueError, match="mix: got 'linear'"): LearnedVariance(None, Zero(), s, "linear")
    with pytest.raises(ValueError, match="net: gave"): LearnedVariance(None, lambda x, c, k: x[:1], s).variance(x, 5, 4)
    with pytest.raises(ValueError, match="variance: got 'medium'"): variance_of("medium", x, 5, s)

@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_learned_range_equals_diffusers(name):
    "Their output runs from -1 to 1, ours from 0 to 1; their time is ours less one."
    diffusers = pytest.importorskip("diffusers")
    ours = MADE[name]
    s = diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range")
    s.betas, s.alphas, s.alphas_cumprod = ours.beta[1:], ours.alpha[1:], ours.abar[1:]
    s.one, x = torch.tensor(1., dtype=torch.float64), torch.zeros(1, 1).double()
    for v in (-1., -.3, .5, 1.):
        for t in (2, 3, 50, 500, 999):
            want = s._get_variance(t - 1, predicted_variance=torch.tensor(v, dtype=torch.float64))
            near(LearnedVariance(None, Zero((v + 1)/2), ours).variance(x, t, t - 1).detach().log(), want, 1e-5)

@pytest.mark.parametrize("mix", ["log", "doubt"])
def test_the_loss_has_its_least_value_at_the_right_variance_and_leaves_the_mean_alone(mix):
    s, g = cosine_schedule(), rng()
    x0 = torch.randn(4000, 1, generator=g)
    t, to = torch.full((4000,), 300), torch.full((4000,), 200)
    xt, _ = noise_to(x0, t, s, generator=g)
    x0_hat = (s.signal(300)*xt).float().requires_grad_()     # ideal for N(0, 1)
    net = Zero(.1)
    learned = LearnedVariance(None, net, s, mix)
    opt = torch.optim.Adam([net.says], .1)
    for _ in range(120):
        loss = variance_loss(learned, x0, x0_hat, xt, t, to).mean()
        opt.zero_grad(), loss.backward(), opt.step()
    assert x0_hat.grad is None, "no gradient may reach the mean"
    want = doubt_variance(s.noise(300)**2, xt[:1], 300, s, 200)
    near(learned.variance(xt[:1], 300, 200).detach()/want, 1, .08)     # 4 standard errors of 4000 squares are 9 %, of which the small variance has no share

def test_loss_and_term_differ_by_a_constant():
    s, g = linear_schedule(), rng()
    x0 = torch.rand(5, 1, 3, 3, generator=g).double()*2 - 1
    t, to = torch.tensor([2, 10, 100, 500, 1000]), torch.tensor([1, 4, 99, 1, 900])
    xt, _ = noise_to(x0, t, s, generator=g)
    for mix in ("log", "doubt"):
        a, b = (LearnedVariance(None, Zero(v), s, mix) for v in (.1, .8))
        loss = [variance_loss(m, x0, .8*x0, xt, t, to).detach() for m in (a, b)]
        term = [step_term(x0, .8*x0, xt, t, s, to, m).detach()/9 for m in (a, b)]
        near((loss[0] - loss[1])/(term[0] - term[1]), 1, 1e-4)

def test_fit_learns_and_repeats():
    s, g = cosine_schedule(), rng()
    x0 = torch.randn(500, 1, generator=g)
    t = torch.randint(1, 1001, (500,), generator=g)
    xt, _ = noise_to(x0, t, s, generator=g)
    x0_hat = xt*s.signal(t)[:, None].float()
    runs = []
    for _ in range(2):
        net = Zero(2.)
        runs.append(fit_variance(LearnedVariance(None, net, s, "doubt"), x0, x0_hat, xt, t, 80, lr=.1, strides="any", generator=rng(3)))
    assert runs[0] == runs[1] and sum(runs[0][-10:]) < sum(runs[0][:10])
    near(net.says.detach(), 0, .3)      # the doubt of N(0, 1) is noise^2 at every t
    with pytest.raises(ValueError, match="strides: got 'two'"): fit_variance(LearnedVariance(None, net, s), x0, x0_hat, xt, t, 1, strides="two")

def test_the_sampler_takes_both():
    "On a Gaussian, ten moves with the best variance give the right spread; small gives too little, large too much."
    s, g = cosine_schedule(), rng()
    cloud = GaussianMixture(torch.zeros(1, 1).double(), .5)
    ideal = MixtureDenoiser(cloud, s)
    best = AnalyticVariance(ideal, cloud.sample(20_000, g), s, generator=g)
    noise = torch.randn(20_000, 1, generator=g, dtype=torch.float64)
    def spread(model, v): return sample(model, noise, s, steps=10, generator=rng(4), progress=False, variance=v).std().item()
    small, large, exact = spread(ideal, "small"), spread(ideal, "large"), spread(best, "learned")
    assert small < exact < large, (small, exact, large)

def test_bad_input():
    s, x = cosine_schedule(40), torch.zeros(2, 3)
    f = lambda xt, t, cond: 0*xt
    with pytest.raises(ValueError, match="draws: got 0"): bound_draws(f, x, s, draws=0)
    with pytest.raises(ValueError, match="at least two moves"): bound_draws(f, x, s, times=torch.tensor([40, 0]))
    with pytest.raises(ValueError, match="times: got"): bound_terms(f, x, s, times=torch.tensor([1, 40]))
    with pytest.raises(ValueError, match="denoise: returned shape"): bound_terms(lambda xt, t, cond: xt[:1], x, s)
    with pytest.raises(ValueError, match="down to 0"): bound_terms(f, x, s, times=torch.tensor([40, 20]))
