"""Teach a shipped model to draw in one step, and ship that: `python tools/ship_one_step.py`.

This is distribution matching distillation (Yin et al. 2024), not consistency training: the pupil never leans on its own
answers. First the teacher walks: from pure noise down the probability-flow path, 14 evaluations of DPM-Solver++ (2M), and
six states of every walk are kept. A copy of the teacher, the pupil, learns to say the end of a walk from each of its
states. After a share of the time (--match_from) a second copy learns to denoise the pupil's answers, and where it and the
teacher differ is the way the pupil has to go. Nothing here sees training images. Walks and the pupil's running average
lie in --out: walks that are there are not made again, an unfinished pupil is taken up from its average, a finished one is
only scored and shipped. The scores go on the card.
"""
import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_book.consistency import consistency, matching_loss, pseudo_huber
from diffusion_book.images import fill, read_tensors, write_tensors
from diffusion_book.judge import draw_all
from diffusion_book.metrics import Moments, frechet_distance, shipped_moments, views
from diffusion_book.objective import simple_loss
from diffusion_book.recipe import muon
from diffusion_book.schedules import like, noise_to
from diffusion_book.training import EMA, learning_rate, load_pretrained, save_model

ROOT = Path(__file__).resolve().parents[1]
LICENCE = "Apache-2.0; trained on Fashion-MNIST, MIT, Copyright (c) 2017 Zalando SE"
OPTIMIZER, LR, DISTANCE = muon, 1e-3, .5   # the rate is halved, and the distance to the ends counts less, with matching
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
    xt[:low] = noise_to(end[:low], t[:low], schedule, generator=g)[0]
    return xt, t, end


def draw_new(walks: Tensor, schedule, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    "States that no walk went through, and their times: noise at T; for one in four, an end noised to where walks are kept."
    xt, t = torch.randn(n, *walks.shape[2:], generator=g), torch.full((n,), schedule.T, dtype=torch.float64)
    ends = walks[torch.randint(len(walks), (n//4,), generator=g), -1].float()
    t[:len(ends)] = times(schedule)[list(KEPT[1:-1])][torch.randint(len(KEPT) - 2, ends.shape[:1], generator=g)]
    xt[:len(ends)] = noise_to(ends, t[:len(ends)], schedule, xt[:len(ends)].clone())[0]
    return xt, t


class Match:
    """Matches the pupil's answers, as a set, to the teacher's pictures (Yin et al. 2024).

    `own` is a denoiser of the pupil's answers: a copy of the teacher that learns beside the pupil.
    """
    def __init__(self, teacher, g: torch.Generator):
        self.teacher, self.own, self.g = teacher, copy_of(teacher), g
        self.opt = OPTIMIZER(self.own.net.parameters())

    def update(self, drawn: Tensor, lr: float) -> float:
        "One update of the pupil's own denoiser."
        t = self.own.schedule.random_times(len(drawn), self.g)
        loss = simple_loss(self.own, drawn.detach(), t, generator=self.g).mean()
        descend(self.own.net, self.opt, loss, lr)
        return loss.item()

    def loss(self, drawn: Tensor) -> Tensor:
        "What moves the answers towards the teacher's."
        return matching_loss(drawn, self.own, self.teacher, self.own.schedule, self.g)


def copy_of(denoise):
    "A denoiser with weights of its own, to be trained."
    new = copy.copy(denoise)
    new.net = copy.deepcopy(denoise.net).requires_grad_(True).train()
    return new


def descend(net: nn.Module, opt: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    "One update of the weights."
    for group in opt.param_groups: group["lr"] = lr
    opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
    opt.step()


def update(student, opt, match: Match, walks: Tensor, n: int, lr: float, matching: bool) -> list[float]:
    "One update; gives the distance to the ends and, if sets are matched, the loss of the own denoiser."
    if not matching:
        xt, t, end = draw(walks, student.schedule, n, match.g)
        distance = pseudo_huber(student(xt, t), end).mean()/end.shape[-1]
        descend(student.net, opt, distance, lr)
        return [distance.item()]
    (xt, t, end), (new, s) = draw(walks, student.schedule, n//2, match.g), draw_new(walks, student.schedule, n//2, match.g)
    drawn, new = student(torch.cat([xt, new]), torch.cat([t, s])).chunk(2)
    distance, own = pseudo_huber(drawn, end).mean()/end.shape[-1], match.update(new, lr)
    descend(student.net, opt, DISTANCE*distance + match.loss(new), lr)
    return [distance.item(), own]


def teach(student, teacher, walks: Tensor, minutes: float, match_from: float, out: Path, batch_size: int = 64,
          lr: float = LR, seed: int = 0) -> None:
    "Train the pupil for so much processor time, from its average in `out` if there is one; writes the average."
    path, step, before, means = out/"average.safetensors", 0, 0., [0., 0.]
    if path.exists():
        weights, notes = read_tensors(path)
        fill(student.net, weights, path)
        step, before = notes["step"], notes["seconds"]
    g, start, saved, first = torch.Generator().manual_seed(seed + step), time.process_time(), before, step
    ema, opt, match = EMA(student.net, .999), OPTIMIZER(student.net.parameters()), Match(teacher, g)
    while (seconds := before + time.process_time() - start) < 60*minutes:
        progress = seconds/(60*minutes)
        matching = progress >= match_from
        rate = learning_rate(progress, step - first, lr/2 if matching else lr)
        now = update(student, opt, match, walks, batch_size, rate, matching)
        ema.update(student.net)
        step += 1
        means[:len(now)] = [m + .01*(v - m) for m, v in zip(means, now)]
        if seconds - saved > 60:
            saved = seconds
            write_tensors(path, ema.net.state_dict(), dict(step=step, seconds=seconds, taken_up_at=first))
            print(f"{seconds:.0f} s, {step} updates, distance {means[0]:.4f}, own denoiser {means[1]:.4f}", flush=True)
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
    ap.add_argument("--teacher", default="fashion", help="the shipped model that walks")
    ap.add_argument("--name", default="fashion_one_step", help="the name it ships under")
    ap.add_argument("--out", default="out/one_step", help="folder for walks and checkpoint")
    ap.add_argument("--walks", type=int, default=120_000, help="walks of the teacher, a multiple of 2000")
    ap.add_argument("--minutes", type=float, default=48, help="processor time to train")
    ap.add_argument("--match_from", type=float, default=.3, help="share of that time after which sets are matched")
    ap.add_argument("--as_it_is", action="store_true", help="teach no further: score and ship what lies in --out")
    ap.add_argument("--threads", type=int, default=1, help="of the processor")
    ap.add_argument("--n", type=int, default=10_000, help="samples for the scores")
    return ap.parse_args()


def taught(teacher, walks: Tensor, args: argparse.Namespace) -> tuple:
    "The pupil, from its average in the folder, taught first if it isn't finished; and the notes on its training."
    student, path = copy_of(teacher), Path(args.out)/"average.safetensors"
    student.clip = None     # clipping would stop the gradient
    if not (path.exists() and (args.as_it_is or read_tensors(path)[1].get("finished"))):
        teach(student, teacher, walks, args.minutes, args.match_from, Path(args.out))
    weights, notes = read_tensors(path)
    fill(student.net, weights, path).eval().requires_grad_(False)
    student.clip = teacher.clip
    return student, notes


def make_card(teacher, walks: Tensor, notes: dict, evaluations: dict, scores: dict, args: argparse.Namespace) -> dict:
    "What the shipped files say of themselves."
    command = f"python tools/ship_one_step.py --walks {args.walks} --minutes {args.minutes:g} --match_from {args.match_from:g}"
    return dict(
        teacher=args.teacher, teacher_steps=teacher.card["steps"], walks=len(walks), walk_moves=MOVES,
        times=[round(t, 3) for t in times(teacher.schedule)[list(KEPT)].tolist()[:-1]], size=[1, 28, 28],
        sampling_times={k: [round(t, 3) for t in v] for k, v in evaluations.items()},
        steps=notes["step"], seconds=round(notes["seconds"], 1), finished=notes.get("finished", False),
        taken_up_at=notes.get("taken_up_at", 0), match_from=args.match_from, batch_size=64, lr=LR, decay=.999,
        seed=0, data="the teacher's walks, and what the teacher makes of the pupil's answers", device="cpu",
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
