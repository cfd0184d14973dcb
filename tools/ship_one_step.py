"""Teach a shipped model to draw in one step, and ship that: `python tools/ship_one_step.py --data_dir FOLDER`.

This is adversarial distillation (in the spirit of Kim et al. 2024 and Sauer et al. 2023), not consistency training:
the pupil never leans on its own answers. First the teacher walks: from pure noise down the probability-flow path, 14
evaluations of DPM-Solver++ (2M), and six states of every walk are kept. A copy of the teacher learns to say the end of
a walk from each of its states. After a share of the time (--critic_from) a critic is added to the loss, a network that
sees training images (FOLDER holds the original Fashion-MNIST files) and learns to tell the pupil's from them. Walks and
the pupil's running average lie in --out: walks that are there are not made again, an unfinished pupil is taken up from
its average, a finished one is only scored and shipped. The scores go on the card.
"""
import argparse
import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_book.consistency import consistency, pseudo_huber
from diffusion_book.images import fill, load_full_fashion, read_tensors, write_tensors
from diffusion_book.judge import draw_all
from diffusion_book.metrics import Moments, frechet_distance, shipped_moments, views
from diffusion_book.schedules import like
from diffusion_book.training import EMA, learning_rate, load_pretrained, save_model

ROOT = Path(__file__).resolve().parents[1]
LICENCE = "Apache-2.0; trained on Fashion-MNIST, MIT, Copyright (c) 2017 Zalando SE"
MOVES, KEPT, PART = 14, (0, 4, 6, 8, 10, 14), 2000   # moves of a walk, states that are kept of it, walks in one file


def times(schedule) -> Tensor:
    "Where a walk stops: closer together near T, where the paths bend most."
    return schedule.T*(1 - torch.linspace(0, 1, MOVES + 1, dtype=torch.float64)**2)


@torch.no_grad()
def walk(denoise, x: Tensor) -> list[Tensor]:
    """The states of a deterministic walk from noise `x` to the end: DPM-Solver++ (2M) of Lu et al. 2022.

    This is the book's `dpm_solver` but for one thing, which that leaves out: the estimate carried ahead from two looks
    is clipped as a single look is, so that black stays black.
    """
    s, ts, states, before = denoise.schedule, times(denoise.schedule), [x], None
    half = s.logsnr(ts.clamp(min=1e-3))/2
    for i, (t, u) in enumerate(zip(ts[:-1], ts[1:])):
        x0, h = denoise(x, t), half[i + 1] - half[i]
        if u == 0: x = x0
        else:
            ahead = x0 if i == 0 else (x0 + (x0 - before)*float(h/(half[i] - half[i - 1])/2)).clamp(*denoise.clip)
            x = like(s.noise(u)/s.noise(t), x)*x - like(s.signal(u)*torch.expm1(-h), x)*ahead
        before = x0
        states.append(x)
    return states


def make_walks(denoise, folder: Path, n: int) -> Tensor:
    "Walks of the teacher, shape (n, kept states, 1, 28, 28), half precision; those in the folder are not made again."
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for k in range(n//PART):
        path = folder/f"{k:03d}.safetensors"
        if not path.exists():
            g, done = torch.Generator().manual_seed(100_000 + k), []
            for _ in range(PART//200):
                states = walk(denoise, torch.randn(200, 1, 28, 28, generator=g))
                done.append(torch.stack([states[i] for i in KEPT], 1).half())
            write_tensors(path, {"walks": torch.cat(done)})
        parts.append(read_tensors(path)[0]["walks"])
        print(f"walks: {len(parts)*PART}", flush=True)
    return torch.cat(parts)


def draw(walks: Tensor, schedule, n: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    "States, their times and the ends of their walks: half of them at T, an eighth at low noise laid on afresh."
    ts, kept = times(schedule)[list(KEPT)], len(KEPT) - 1
    which = torch.randint(len(walks), (n,), generator=g)
    state = torch.where(torch.rand(n, generator=g) < .5, 0, torch.randint(1, kept, (n,), generator=g))
    xt, t, end = walks[which, state].float(), ts[state], walks[which, -1].float()
    low = n//8
    t[:low] = ts[-2]*(1 - torch.rand(low, generator=g, dtype=torch.float64))
    eps = torch.randn(xt[:low].shape, generator=g)
    xt[:low] = like(schedule.signal(t[:low]), eps)*end[:low] + like(schedule.noise(t[:low]), eps)*eps
    return xt, t, end


class Critic(nn.Module):
    "Tells real images from drawn ones; sees how much the images of a group of eight differ (Karras et al. 2018)."
    def __init__(self, width: int = 64):
        super().__init__()
        def conv(a, b, kernel, stride): return nn.Sequential(nn.Conv2d(a, b, kernel, stride, 1), nn.LeakyReLU(.2))
        self.body = nn.Sequential(conv(1, width, 4, 2), conv(width, 2*width, 4, 2), conv(2*width, 2*width, 3, 1))
        self.head = nn.Sequential(conv(2*width + 1, 2*width, 3, 1), nn.Flatten(), nn.Linear(49*2*width, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        spread = h.reshape(-1, 8, *h.shape[1:]).float().var(1, unbiased=False).add(1e-8).sqrt().mean((1, 2, 3))
        spread = spread.repeat_interleave(8)[:, None, None, None].to(h.dtype).expand(-1, 1, *h.shape[2:])
        return self.head(torch.cat([h, spread], 1)).float().squeeze(1)


class Contest:
    "The critic and its training (Goodfellow et al. 2014; the penalty of Mescheder et al. 2018 at every fourth update)."
    def __init__(self, images: Tensor, g: torch.Generator, lr: float = 5e-4, penalty: float = .02, half: bool = True):
        self.images, self.g, self.lr, self.penalty, self.half, self.step = images, g, lr, penalty, half, 0
        self.critic = Critic().to(memory_format=torch.channels_last)
        self.opt = torch.optim.Adam(self.critic.parameters(), lr, betas=(0., .99))

    def says(self, x: Tensor, half: bool = True) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half and self.half): return self.critic(x)

    def update(self, drawn: Tensor, share: float) -> float:
        "One update of the critic, at `share` of its learning rate."
        real, due = self.images[torch.randint(len(self.images), (len(drawn),), generator=self.g)], self.step % 4 == 0
        real.requires_grad_(due)
        on_real = self.says(real, not due)
        loss = F.softplus(-on_real).mean() + F.softplus(self.says(drawn.detach())).mean()
        if due:
            slope, = torch.autograd.grad(on_real.sum(), real, create_graph=True)
            loss = loss + 4*self.penalty*slope.square().sum((1, 2, 3)).mean()
        for group in self.opt.param_groups: group["lr"] = self.lr*share
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        self.step += 1
        return loss.item()

    def loss(self, drawn: Tensor) -> Tensor:
        "What the pupil pays for being found out."
        self.critic.requires_grad_(False)
        loss = F.softplus(-self.says(drawn)).mean()
        self.critic.requires_grad_(True)
        return loss


def update(student, opt, contest: Contest, batch: tuple[Tensor, Tensor, Tensor], share: float, with_critic: bool,
           weight: float) -> list[float]:
    "One update, of the critic first if it is on; gives the distance, what the critic made it pay, the critic's loss."
    xt, t, end = batch
    drawn = student(xt, t)
    parts = [pseudo_huber(drawn, end).mean()/end.shape[-1]]
    own = [contest.update(drawn, share)] if with_critic else []
    if with_critic: parts.append(contest.loss(drawn))
    opt.zero_grad()
    (parts[0] + weight*sum(parts[1:])).backward()
    torch.nn.utils.clip_grad_norm_(student.net.parameters(), 1.)
    opt.step()
    return [p.item() for p in parts] + own


def teach(student, walks: Tensor, images: Tensor, minutes: float, critic_from: float, out: Path, batch_size: int = 64,
          lr: float = 1e-3, weight: float = .3, seed: int = 0) -> None:
    "Train the pupil for so long on the wall clock, from its average in `out` if there is one; writes the average."
    path, step, before, means = out/"average.safetensors", 0, 0., [0., 0., 0.]
    if path.exists():
        weights, notes = read_tensors(path)
        fill(student.net, weights, path)
        step, before = notes["step"], notes["seconds"]
    g, start, saved, first = torch.Generator().manual_seed(seed + step), time.perf_counter(), before, step
    net = student.net.requires_grad_(True).train()
    ema, opt = EMA(net, .999), torch.optim.AdamW(net.parameters(), lr, betas=(.9, .99), weight_decay=.01)
    torch.manual_seed(seed)     # the critic's first weights
    contest = Contest(images, g, half=student.precision == "bf16")
    while (seconds := before + time.perf_counter() - start) < 60*minutes:
        progress = seconds/(60*minutes)
        with_critic, share = progress >= critic_from, learning_rate(progress, step - first, 1.)
        for group in opt.param_groups: group["lr"] = lr*share*(.5 if with_critic else 1)
        now = update(student, opt, contest, draw(walks, student.schedule, batch_size, g), share, with_critic, weight)
        ema.update(net)
        step += 1
        means[:len(now)] = [m + .01*(v - m) for m, v in zip(means, now)]
        if seconds - saved > 60:
            saved = seconds
            write_tensors(path, ema.net.state_dict(), dict(step=step, seconds=seconds, taken_up_at=first))
            print(f"{seconds:.0f} s, {step} updates, distance {means[0]:.4f}, found out {means[1]:.3f}, "
                  f"critic {means[2]:.3f}", flush=True)
    write_tensors(path, ema.net.state_dict(), dict(step=step, seconds=seconds, taken_up_at=first, finished=True))


def draw_images(denoise, n: int, ts: list[float], seed: int = 0) -> Tensor:
    "Images in as many evaluations as there are times: jump to the end, put noise back on, jump again."
    return draw_all(denoise, n, None, consistency, seed, 500, times=[*ts, 0], progress=False)


def score(images: dict[str, Tensor]) -> dict:
    "Frechet classifier distance of each set of images to the 10,000 test images of Fashion-MNIST."
    test = shipped_moments("test", "features")
    return {name: round(frechet_distance(Moments(views(x)["features"]), test), 4) for name, x in images.items()}


def command_line() -> argparse.Namespace:
    "What was asked for."
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data_dir", required=True, help="folder of the original Fashion-MNIST files, for the critic")
    ap.add_argument("--teacher", default="fashion", help="the shipped model that walks")
    ap.add_argument("--name", default="fashion_one_step", help="the name it ships under")
    ap.add_argument("--out", default="out/one_step", help="folder for walks and checkpoint")
    ap.add_argument("--walks", type=int, default=40_000, help="walks of the teacher, a multiple of 2000")
    ap.add_argument("--minutes", type=float, default=51, help="time to train, on the wall clock")
    ap.add_argument("--critic_from", type=float, default=.375, help="share of that time after which the critic speaks")
    ap.add_argument("--as_it_is", action="store_true", help="teach no further: score and ship what lies in --out")
    ap.add_argument("--threads", type=int, default=1, help="of the processor")
    ap.add_argument("--n", type=int, default=10_000, help="samples for the scores")
    return ap.parse_args()


def taught(teacher, walks: Tensor, args: argparse.Namespace) -> tuple:
    "The pupil, from its average in the folder, taught first if it isn't finished; and the notes on its training."
    student, path = copy.copy(teacher), Path(args.out)/"average.safetensors"
    student.net, student.clip = copy.deepcopy(teacher.net), None    # clipping would stop the gradient
    if not (path.exists() and (args.as_it_is or read_tensors(path)[1].get("finished"))):
        images = load_full_fashion("train", args.data_dir)[0]
        teach(student, walks, images, args.minutes, args.critic_from, Path(args.out))
    weights, notes = read_tensors(path)
    fill(student.net, weights, path).eval().requires_grad_(False)
    student.clip = teacher.clip
    return student, notes


def make_card(teacher, walks: Tensor, notes: dict, evaluations: dict, scores: dict, args: argparse.Namespace) -> dict:
    "What the shipped files say of themselves."
    command = (f"python tools/ship_one_step.py --data_dir FOLDER --walks {args.walks} --minutes {args.minutes:g} "
               f"--critic_from {args.critic_from:g}")
    return dict(
        teacher=args.teacher, teacher_steps=teacher.card["steps"], walks=len(walks), walk_moves=MOVES,
        times=[round(t, 3) for t in times(teacher.schedule)[list(KEPT)].tolist()[:-1]], size=[1, 28, 28],
        sampling_times={k: [round(t, 3) for t in v] for k, v in evaluations.items()},
        steps=notes["step"], seconds=round(notes["seconds"], 1), finished=notes.get("finished", False),
        taken_up_at=notes.get("taken_up_at", 0), critic_from=args.critic_from, batch_size=64, lr=1e-3, decay=.999,
        seed=0, data="the teacher's walks; Fashion-MNIST's training images for the critic", device="cpu",
        threads=args.threads, precision=teacher.precision, torch=torch.__version__, command=command, licence=LICENCE,
        weights="float16", scores=dict(what="Frechet classifier distance to the 10,000 test images", n=args.n, seed=0,
                                       **scores))


def main():
    args = command_line()
    torch.set_num_threads(args.threads)
    teacher = load_pretrained(args.teacher)
    walks = make_walks(teacher, Path(args.out)/"walks", args.walks)
    student, notes = taught(teacher, walks, args)
    ts = times(teacher.schedule)[list(KEPT)].tolist()
    evaluations = {1: ts[:1], 2: [ts[0], ts[3]], 4: [ts[0], ts[1], ts[2], ts[4]]}
    images = {f"{k}_evaluations": draw_images(student, args.n, v) for k, v in evaluations.items()}
    images |= {"teacher_walk_of_14": walks[:args.n, -1].float().clamp(-1, 1),
               "teacher_1_evaluation": draw_images(teacher, args.n, ts[:1])}
    card = make_card(teacher, walks, notes, evaluations, score(images), args)
    save_model(ROOT/"diffusion_book"/"weights"/args.name, student, card, torch.float16)
    print(json.dumps(card, indent=1))


if __name__ == "__main__": main()
