"Consistency: the function, the sampler against diffusers' own, the ladder's end points, the loss, the shipped pupil."
import copy
import functools
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffusion_book.consistency import ConsistencyLoss, consistency, doubling, follow, matching_loss, pseudo_huber
from diffusion_book.ddim import CountCalls, ddim
from diffusion_book.dpm_solver import dpm_solver
from diffusion_book.ideal import GaussianMixture, MixtureDenoiser
from diffusion_book.objective import Denoiser
from diffusion_book.sampling import find_sampler, sample
from diffusion_book.schedules import cosine_schedule, like, linear_schedule, noise_to, sigmoid_schedule
from diffusion_book.toys import ToyMLP
from diffusion_book.training import load_pretrained, train
from diffusion_book.unet import UNet

COSINE = cosine_schedule()


def rng(seed=0): return torch.Generator().manual_seed(seed)


def gaussian(schedule, mean=.5, std=.5):
    return MixtureDenoiser(GaussianMixture(torch.tensor([[mean]], dtype=torch.float64), std), schedule)


def exact(schedule, mean=.5, std=.5):
    "The consistency function of one Gaussian in closed form: paths keep their number of standard deviations."
    def f(x, t, cond=None):
        a, b = like(schedule.signal(t), x), like(schedule.noise(t), x)
        return mean + std*(x - a*mean)/((a*std)**2 + b**2).sqrt()
    return f


def flow(T=1.):
    "Straight paths, made here so that this file leans on no later chapter."
    from diffusion_book.schedules import Schedule
    class Straight(Schedule):
        def signal(self, t): return 1 - self.check(t)
        def noise(self, t): return self.check(t)
        def times(self, n=None): return torch.linspace(1, 0, (n or 100) + 1, dtype=torch.float64)
    return Straight()


@pytest.mark.parametrize("schedule", [cosine_schedule(), linear_schedule(), sigmoid_schedule(), flow()])
def test_follow_has_first_order_and_reaches_the_exact_end(schedule):
    x = torch.randn(200, 1, generator=rng(), dtype=torch.float64)
    t, s = .9*schedule.T, .1*schedule.T     # away from both ends, where the curves are smooth
    where = lambda n: follow(gaussian(schedule), x, t, schedule, s, n)
    kept = exact(schedule)(x, t)    # the end, and so the state at s that leads there
    errors = [(exact(schedule)(where(n), s) - kept).abs().max().item() for n in (40, 80, 160)]
    orders = [math.log2(a/b) for a, b in zip(errors, errors[1:])]
    assert all(.85 < o < 1.15 for o in orders), f"orders {orders}, wanted 1"
    assert errors[-1] < .02


def test_follow_takes_a_time_for_each_and_equals_ddim():
    x = torch.randn(3, 1, generator=rng(), dtype=torch.float64)
    t, s = torch.tensor([1000, 600, 100]), torch.tensor([500, 0, 50])
    together = follow(gaussian(COSINE), x, t, COSINE, s, 7)
    alone = torch.cat([follow(gaussian(COSINE), x[i:i + 1], t[i], COSINE, s[i], 7) for i in range(3)])
    torch.testing.assert_close(together, alone)
    *_, step = ddim(gaussian(COSINE), x, COSINE, torch.tensor([1000, 500, 0]))
    torch.testing.assert_close(follow(gaussian(COSINE), x, 1000, COSINE, moves=2), step.x)
    with pytest.raises(ValueError, match="moves: got 0"): follow(gaussian(COSINE), x, 1000, COSINE, moves=0)


@pytest.mark.parametrize("schedule", [cosine_schedule(), linear_schedule(), flow()])
@pytest.mark.parametrize("evaluations", [1, 2, 4])
def test_marginals_are_right_at_every_time(schedule, evaluations):
    "With the exact function every state is data noised to its time: mean and variance within 5 standard errors."
    n = 20_000
    x = torch.randn(n, 1, generator=rng(), dtype=torch.float64)
    for step in consistency(exact(schedule), x, schedule, schedule.times(evaluations), generator=rng(1)):
        a, b = schedule.signal(step.t), schedule.noise(step.t)
        variance = (a*.5)**2 + b**2
        room = schedule.signal(schedule.T).item()   # the first state is noise, not data noised to T
        assert abs(step.x.mean() - a*.5) < 5*(variance/n)**.5 + room
        assert abs(step.x.var()/variance - 1) < 5*(2/n)**.5 + room
    assert step.t == 0


def test_equals_diffusers_move_by_move():
    "LCMScheduler without its own boundary (which is 1e-7 at these times). Their index i is our time i + 1."
    theirs = LCMScheduler(1000, beta_schedule="linear", beta_start=1e-4, beta_end=.02, prediction_type="sample",
                          clip_sample=False, timestep_scaling=1e6)
    theirs.set_timesteps(timesteps=[999, 759, 499, 259])
    schedule = linear_schedule()
    def guess(x, t, cond): return (x*.3 + .1).tanh()
    y = x = torch.randn(2, 1, 4, 4, generator=rng())
    g, times = rng(1), [*(theirs.timesteps + 1).tolist(), 0]
    for step, i in zip(consistency(guess, x, schedule, times, generator=rng(1)), theirs.timesteps):
        y = theirs.step(guess(y, i, None), i, y, generator=g).prev_sample
        torch.testing.assert_close(step.x, y, rtol=1e-5, atol=1e-5)


def test_one_draw_a_move_and_none_at_the_last():
    for times, draws in (([1000, 0], 0), ([1000, 500, 0], 1), ([1000, 500], 1), ([1000, 800, 300, 0], 2)):
        g, h, x = rng(), rng(), torch.zeros(1, 1, 2, 2)
        for step in consistency(lambda x, t, cond: x, x, COSINE, times, generator=g): pass
        for _ in range(draws): torch.randn(x.shape, generator=h)
        assert torch.equal(g.get_state(), h.get_state()), times


def test_sampler_by_name_counts_and_errors():
    assert find_sampler("consistency") is consistency
    counted = CountCalls(exact(COSINE))
    x = torch.randn(4, 1, generator=rng(), dtype=torch.float64)
    out = sample(counted, x, COSINE, consistency, steps=3, generator=rng(), progress=False)
    assert counted.calls == 3 and out.shape == x.shape
    assert [s.t for s in consistency(exact(COSINE), x, COSINE)] == [0]      # by itself it jumps once
    with pytest.raises(ValueError, match="n: got 0"): sample(exact(COSINE), x, COSINE, consistency, steps=0, progress=False)
    for times in ([500, 600, 0], [1000], [1001, 0]):
        with pytest.raises(ValueError): list(consistency(exact(COSINE), x, COSINE, times))
    with pytest.raises(ValueError, match="wanted x's"): list(consistency(lambda x, t, cond: x[:2], x, COSINE))


@given(st.integers(1, 400), st.integers(1, 40), st.integers(0, 200))
def test_ladder_ends_and_never_falls(K, first, more):
    last = first + more
    levels = math.ceil(math.log2(last/first)) + 1
    gaps = [doubling(k, K, first, last) for k in range(K)]
    assert all(a <= b for a, b in zip(gaps, gaps[1:]))
    if K >= levels:
        assert gaps[0] == first and gaps[-1] == last
        share = [gaps.count(g) for g in sorted(set(gaps))]
        assert len(share) == levels and max(share) - min(share) <= 1, "every level has its share of the updates"


def test_ladder_says_what_is_wrong():
    for k, K, first, last in ((10, 10, 8, 16), (-1, 10, 8, 16), (0, 10, 0, 16), (0, 10, 16, 8)):
        with pytest.raises(ValueError): doubling(k, K, first, last)


@given(st.floats(1e-3, 2.), st.integers(0, 100))
def test_pseudo_huber_is_a_distance_between_square_and_line(c, seed):
    a, b = torch.randn(2, 5, 3, 2, generator=rng(seed), dtype=torch.float64)
    d, length = pseudo_huber(a, b, c), (a - b).flatten(1).norm(dim=1)
    assert bool((pseudo_huber(a, a, c) == 0).all()) and torch.equal(d, pseudo_huber(b, a, c))
    assert bool((d <= length + 1e-12).all() and (d >= length - c - 1e-12).all() and (d <= length**2/(2*c) + 1e-12).all())


@pytest.mark.parametrize("schedule", [cosine_schedule(), linear_schedule()])
def test_loss_of_the_exact_function_shrinks_with_the_teachers_moves(schedule):
    losses = []
    for moves in (1, 4, 16):
        loss = ConsistencyLoss(schedule, 1, gaussian(schedule), first=10, last=10, moves=moves, c=1e-6)
        x0, t = .5 + .5*torch.randn(400, 1, generator=rng(), dtype=torch.float64), loss.draw_times(400, rng(1))
        losses.append(loss(exact(schedule), x0, t, generator=rng(2)).mean().item())
    assert losses[0] > 3*losses[1] > 9*losses[2] > 0, losses     # a first-order move: four times the moves, a quarter of the error


def test_target_has_no_gradient_unless_asked():
    "With the gradient stopped, the answer at the lower rung is a number: its own derivative is missing."
    class Scale(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.tensor(.3))
        def forward(self, x, t, cond=None): return self.w*x
    x0, eps = torch.randn(2, 50, 2, generator=rng())
    grads = {}
    for stop in (True, False):
        f, loss = Scale(), ConsistencyLoss(COSINE, 1, first=4, last=4, c=.1, stop=stop)
        t = torch.full((50,), 750.)
        loss(f, x0, t, eps).mean().backward()
        xt, xs = (noise_to(x0, s, COSINE, eps)[0] for s in (t, 500))
        w = torch.tensor(.3, requires_grad=True)
        other = w.detach() if stop else w
        pseudo_huber(w*xt, other*xs, .1).mean().backward()
        torch.testing.assert_close(f.w.grad, w.grad)
        grads[stop] = f.w.grad.item()
    assert grads[True] != grads[False]


def test_at_the_lowest_rung_the_target_is_the_data():
    x0, eps = torch.randn(2, 20, 2, generator=rng())
    loss = ConsistencyLoss(COSINE, 1, first=5, last=5, c=1e-4)
    perfect = lambda x, t, cond=None: x0
    assert loss(perfect, x0, torch.full((20,), 200.), eps).abs().max() < 1e-6


def test_a_ladder_of_one_gap_asks_for_the_end_of_the_walk():
    x0, eps = torch.randn(2, 20, 1, generator=rng(), dtype=torch.float64)
    loss = ConsistencyLoss(COSINE, 1, gaussian(COSINE), first=1, last=1, moves=25, c=.03)
    t = loss.draw_times(20, rng())
    assert t.unique().tolist() == [1000]
    end = follow(gaussian(COSINE), noise_to(x0, t, COSINE, eps)[0], t, COSINE, 0, 25)
    zero = lambda x, t, cond=None: torch.zeros_like(x)
    torch.testing.assert_close(loss(zero, x0, t, eps), pseudo_huber(0*end, end, .03))


def test_train_takes_the_loss_with_its_two_hooks_and_it_reaches_the_last_rung():
    torch.manual_seed(0)
    images = torch.rand(16, 1, 8, 8, generator=rng())*2 - 1
    small, loss = Denoiser(UNet(channels=1, width=(8, 16), blocks=1), COSINE, "v"), ConsistencyLoss(COSINE, updates=12, first=2, last=16)
    run = train(small, images, steps=12, batch_size=8, device="cpu", progress=False, loss=loss, draw_times=loss.draw_times, watch=loss.watch)
    assert (run.step, loss.done, len(loss.rungs) - 1) == (12, 12, 16)


def test_a_spoiled_ladder_and_updates_are_named():
    for updates in (0, -3, 2.5):
        with pytest.raises(ValueError, match="updates: got"): ConsistencyLoss(COSINE, updates)
    with pytest.raises(ValueError, match="first, last"): ConsistencyLoss(COSINE, 10, first=8, last=4)


def test_the_boundary_holds_whatever_a_v_network_says():
    net = ToyMLP(16, 2, generator=rng())
    with torch.no_grad():
        for p in net.parameters(): p.add_(torch.randn(p.shape, generator=rng(1)))
    x = torch.randn(10, 2, generator=rng())
    for schedule in (cosine_schedule(), linear_schedule(), flow()):
        for predicts in ("v", "flow"):
            assert torch.equal(Denoiser(net, schedule, predicts)(x, 0), x)


def test_shipped_pupil_is_an_ordinary_denoiser_and_draws_in_one():
    pupil, teacher = load_pretrained("fashion_one_step"), load_pretrained("fashion")
    assert pupil.predicts == "v" and pupil.schedule.config == teacher.schedule.config
    x = torch.randn(24, 1, 28, 28, generator=rng())
    with torch.no_grad():
        free = copy.copy(pupil)
        free.clip = None
        assert torch.equal(free(x, 0), x)
        one, blur = (sample(m, x, m.schedule, consistency, times=[1000, 0], progress=False) for m in (pupil, teacher))
    assert one.std(0).mean() > 5*blur.std(0).mean(), "one evaluation of the pupil differs from noise to noise"
    scores = pupil.card["scores"]
    assert scores["1_evaluations"] < scores["teacher_1_evaluation"]/10
    assert set(pupil.card["sampling_times"]) == {"1", "2", "4"}


@functools.cache
def shipping():
    "The tool that made the shipped pupil, as a module."
    path = Path(__file__).resolve().parents[1]/"tools"/"ship_one_step.py"
    spec = importlib.util.spec_from_file_location("ship_one_step", path)
    spec.loader.exec_module(tool := importlib.util.module_from_spec(spec))
    return tool


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kept_walks_are_the_books_solver_but_for_clipping(seed):
    "Nothing to clip: the same states to rounding. A narrow clip: other states, and none carried out of it at the end."
    tool, denoise = shipping(), gaussian(COSINE)
    x = torch.randn(50, 1, generator=rng(seed), dtype=torch.float64)
    denoise.clip = (-1e6, 1e6)
    theirs = [step.x for step in dpm_solver(denoise, x, COSINE, tool.times(COSINE))]
    free = tool.walk(denoise, x)[1:]
    torch.testing.assert_close(torch.stack(free), torch.stack(theirs), rtol=0, atol=1e-9)
    denoise.clip = (.4, .6)
    assert (torch.stack(tool.walk(denoise, x)[1:-1]) - torch.stack(theirs[:-1])).abs().max() > 1e-3


def test_alike_denoisers_say_no_way_and_others_the_way_from_teacher_to_own():
    x = torch.randn(100, 1, generator=rng(1), dtype=torch.float64, requires_grad=True)
    def way(own): return torch.autograd.grad(matching_loss(x, own, gaussian(COSINE), COSINE, rng()), x)[0]
    assert (way(gaussian(COSINE)) == 0).all()
    for mean in (-1., 2.):
        assert (way(gaussian(COSINE, mean))*(mean - .5) > 0).all()


def test_matching_asks_denoisers_for_every_number():
    with pytest.raises(ValueError, match="wanted x's"):
        matching_loss(torch.zeros(4, 2), lambda x, t, cond: x[:1], lambda x, t, cond: x, COSINE, rng())


def test_following_the_way_moves_a_gaussian_onto_the_teachers():
    """x = shift + exp(spread)*z, with the exact denoiser of these x beside the teacher's, ends at the teacher's mean and
    deviation. A thousand updates of 200 answers wobble: 0.05 is some five times what was seen over seeds."""
    shift, spread = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-1., -2.))
    opt, g = torch.optim.Adam([shift, spread], .01), rng(3)
    for k in range(1000):
        for group in opt.param_groups: group["lr"] = .01*(1 - k/1000)
        x = shift + spread.exp()*torch.randn(200, 1, generator=g, dtype=torch.float64)
        own = gaussian(COSINE, shift.item(), spread.exp().item())
        opt.zero_grad()
        matching_loss(x, own, gaussian(COSINE), COSINE, rng(k)).backward()
        opt.step()
    assert abs(shift.item() - .5) < .05 and abs(spread.exp().item() - .5) < .05


def test_an_update_with_and_without_matching():
    "Both move the pupil; only the second moves the denoiser of its answers; the teacher stays."
    tool, teacher = shipping(), load_pretrained("fashion")
    student = tool.copy_of(teacher)
    student.clip = None
    walks = torch.randn(8, len(tool.KEPT), 1, 28, 28, generator=rng()).half()
    match, opt = tool.Match(teacher, rng(2)), torch.optim.SGD(student.net.parameters())
    for matching in (False, True):
        nets = student.net, match.own.net, teacher.net
        before = [torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets]
        said = tool.update(student, opt, match, walks, 8, 1e-3, matching)
        after = [torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets]
        assert len(said) == 1 + matching and all(map(math.isfinite, said))
        assert [not torch.equal(a, b) for a, b in zip(before, after)] == [True, matching, False]
