"""Quality after the same ten minutes: the book's recipe beside three peers', each trained, sampled and scored by one command.

`python benchmarks/peers.py --data_dir FOLDER` trains each for --minutes on all of Fashion-MNIST with the same threads, one after
the other; draws --n samples of each with the same number of evaluations of the network; scores them against the whole test set
(diffusion_book.judge); prints the table; and writes nbs/results/peers.json and one sheet of pictures each. It goes on where it was stopped.

Each peer has its own network, loss, schedule, optimiser, averaging, augmentation and sampler, as its example or trainer has them.
Two things are changed in their favour, because ten minutes on a small machine are not what they were made for: smalldiffusion's batch
is 128 instead of 1024, and of the two rates that diffusers' tutorial and course name, the course's 1e-3 is taken.
"""
import argparse, json, time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffusion_book.dpm_solver import dpm_solver, logsnr_times
from diffusion_book.images import load_full_fashion
from diffusion_book.judge import Reference, judge
from diffusion_book.objective import Denoiser
from diffusion_book.pictures import image_grid, to_uint8
from diffusion_book.recipe import muon
from diffusion_book.sampling import sample
from diffusion_book.schedules import cosine_schedule
from diffusion_book.training import SCALES, train
from diffusion_book.unet import UNet
from machine import machine, write_json
from speed import diffusers_unet, stand_in

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT/"nbs"/"results"
Draw = Callable[[int, int], torch.Tensor]   # draw(n, evaluations) gives n images in [-1, 1]

# ------------------------------------------------------------------ a loop for all peers
class Budget(NamedTuple):
    "How long each may train."
    minutes: float
    clock: Callable     # seconds gone: time.perf_counter or time.process_time

def by_the_clock(budget: Budget, net: nn.Module, loss: Callable, optimizer: torch.optim.Optimizer, rate: Callable,
                 max_norm: float | None, after: Callable = lambda: None) -> int:
    "Updates until the time is up. `rate(step, share of the time)` is the factor on the learning rate."
    peak, start, steps, done = optimizer.param_groups[0]["lr"], budget.clock(), 0, 0.
    net.train()
    while done < 1:
        for group in optimizer.param_groups: group["lr"] = peak*rate(steps, done)
        loss().backward()
        if max_norm: nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        after()
        steps, done = steps + 1, (budget.clock() - start)/(60*budget.minutes)
    net.eval()
    return steps

def batches(images: torch.Tensor, n: int, flip: bool, seed: int) -> Callable[[], torch.Tensor]:
    "A function that draws a batch; where the peer flips, half of it is mirrored."
    g = torch.Generator().manual_seed(seed)
    def one() -> torch.Tensor:
        x = images[torch.randint(len(images), (n,), generator=g)]
        mirrored = torch.rand(n, 1, 1, 1, generator=g) < (.5 if flip else 0.)
        return torch.where(mirrored, x.flip(-1), x)
    return one

def in_parts(draw: Draw, batch: int = 250) -> Draw:
    "Draw a part at a time, so that memory doesn't bound the number."
    return lambda n, evaluations: torch.cat([draw(min(batch, n - i), evaluations) for i in range(0, n, batch)])

CLOCKS = dict(processor=time.process_time, wall=time.perf_counter)

# ------------------------------------------------------------------ who takes part
def ours(images: torch.Tensor, budget: Budget, seed: int) -> tuple[Draw, int, int]:
    "The book's own: what `diffusion_book_train --data fashion-full` does."
    torch.manual_seed(seed)
    denoise = Denoiser(UNet(**SCALES["small"]), cosine_schedule(), "v", clip=(-1, 1))
    run = train(denoise, images, minutes=budget.minutes, clock=budget.clock, optimizer=muon, seed=seed, device="cpu", progress=False)
    denoise = Denoiser(run.ema.net.eval(), denoise.schedule, "v", clip=(-1, 1))
    g = torch.Generator().manual_seed(seed)
    def draw(n, evaluations):
        times = logsnr_times(denoise.schedule, evaluations)
        return sample(denoise, (n, 1, 28, 28), denoise.schedule, dpm_solver, times=times, eta=1., generator=g, progress=False)
    return draw, run.step, run.step*run.settings["batch_size"]

def diffusers(images: torch.Tensor, budget: Budget, seed: int, lr: float = 1e-3, batch: int = 64) -> tuple[Draw, int, int]:
    "The tutorial's recipe: eps, linear schedule, AdamW, 500 updates of warm-up (or 5 % of the time), cosine decay, clipping at 1."
    from diffusers import DDIMScheduler, DDPMScheduler
    torch.manual_seed(seed)
    net, scheduler, one = diffusers_unet(), DDPMScheduler(num_train_timesteps=1000), batches(images, batch, False, seed)
    def loss():
        x0 = one()
        t, eps = torch.randint(0, 1000, (batch,)), torch.randn_like(x0)
        return (net(scheduler.add_noise(x0, eps, t), t) - eps).square().mean()
    def rate(step, done): return min(1., max(step/500, done/.05))*.5*(1 + torch.cos(torch.tensor(torch.pi*done)).item())
    steps = by_the_clock(budget, net, loss, torch.optim.AdamW(net.parameters(), lr), rate, 1.)
    @torch.no_grad()
    def draw(n, evaluations):
        walk, x = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing"), torch.randn(n, 1, 28, 28)
        walk.set_timesteps(evaluations)
        for t in walk.timesteps: x = walk.step(net(x, t), t, x).prev_sample
        return x
    return draw, steps, steps*batch

def lucidrains(images: torch.Tensor, budget: Budget, seed: int, lr: float = 1e-4, batch: int = 16) -> tuple[Draw, int, int]:
    "denoising-diffusion-pytorch's Trainer: v, sigmoid schedule, Adam, batch 16, mirrored images, an average every ten updates."
    with stand_in("torchvision", "pytorch_fid"):
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA
    torch.manual_seed(seed)
    model = GaussianDiffusion(Unet(32, dim_mults=(1, 2, 4), channels=1), image_size=28)
    ema, one = EMA(model, beta=.995, update_every=10), batches((images + 1)/2, batch, True, seed)
    adam = torch.optim.Adam(model.parameters(), lr, betas=(.9, .99))
    steps = by_the_clock(budget, model, lambda: model(one()), adam, lambda step, done: 1., 1., ema.update)
    average = ema.ema_model.eval()
    @torch.no_grad()
    def draw(n, evaluations):
        average.sampling_timesteps = evaluations
        return average.ddim_sample((n, 1, 28, 28))*2 - 1
    return draw, steps, steps*batch

def smalldiffusion(images: torch.Tensor, budget: Budget, seed: int, lr: float = 7e-4, batch: int = 128) -> tuple[Draw, int, int]:
    "Its Fashion-MNIST example: eps, log-linear sigma, AdamW, mirrored images, an average, its accelerated sampler."
    with stand_in("torchvision"):
        from smalldiffusion.diffusion import ScheduleLogLinear, generate_train_sample, samples
        from smalldiffusion.model_unet import Unet
    torch.manual_seed(seed)
    net = Unet(28, 1, 1, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(14,))
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(.99))
    schedule, one = ScheduleLogLinear(sigma_min=.02, sigma_max=20, N=800), batches(images, batch, True, seed)
    def loss():
        x0, sigma, eps, _ = generate_train_sample(one(), schedule)
        return net.get_loss(x0, sigma, eps)
    steps = by_the_clock(budget, net, loss, torch.optim.AdamW(net.parameters(), lr), lambda step, done: 1., None,
                         lambda: average.update_parameters(net))
    net.load_state_dict(average.module.state_dict())
    net.eval()
    def draw(n, evaluations): return [*samples(net, schedule.sample_sigmas(evaluations), gam=1.7, batchsize=n)][-1].cpu()
    return draw, steps, steps*batch

MAKERS = {"diffusion_book": ours, "diffusers": diffusers, "denoising-diffusion-pytorch": lucidrains, "smalldiffusion": smalldiffusion}

# ------------------------------------------------------------------ what is written
COLUMNS = dict(frechet="Fréchet classifier distance", kid="KID", precision="precision", recall="recall", patches="Fréchet patch distance")

def table(result: dict) -> str:
    "The result as a table in Markdown."
    def cell(s): return f"{s['value']:.3g} ({s['interval'][0]:.3g} to {s['interval'][1]:.3g})"
    rows = [["", "updates", "images seen", *COLUMNS.values()]]
    rows += [[r["name"], f"{r['steps']:,}", f"{r['images_seen']:,}", *(cell(r["scores"][k]) for k in COLUMNS)] for r in result["rows"]]
    scores = result["rows"][0]["scores"]
    rows += [["as many training images", "", "", *(f"{scores[k]['floor']:.3g}" for k in COLUMNS)]]
    lines = ["| " + " | ".join(r) + " |" for r in rows]
    head = f"{result['minutes']:g} minutes each ({result['clock']} time), {result['evaluations']} evaluations a sample, {result['n']:,} samples against the 10,000 test images."
    return "\n".join([head, "", lines[0], "|" + "---|"*len(rows[0]), *lines[1:]]) + "\n"

def sheet(x: torch.Tensor) -> Image.Image:
    "The first forty, on one sheet."
    return Image.fromarray(to_uint8(image_grid(x[:40], 8))[0].numpy())

def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data_dir", required=True, help="folder of the original Fashion-MNIST files")
    ap.add_argument("--minutes", type=float, default=20., help="training time of each")
    ap.add_argument("--clock", choices=CLOCKS, default="processor", help="what the minutes are counted by")
    ap.add_argument("--threads", type=int, default=2, help="of the processor")
    ap.add_argument("--n", type=int, default=2000, help="samples of each")
    ap.add_argument("--evaluations", type=int, default=20, help="of the network, for each sample")
    ap.add_argument("--seed", type=int, default=0, help="of weights, batches and samples")
    ap.add_argument("--only", nargs="*", choices=MAKERS, default=list(MAKERS), help="who takes part")
    ap.add_argument("--out", type=Path, default=OUT, help="folder for what it writes")
    args = ap.parse_args()
    real = {split: load_full_fashion(split, args.data_dir)[0] for split in ("train", "test")}
    reference, path = Reference(real["test"], real["train"]), args.out/"peers.json"
    torch.set_num_threads(args.threads)
    budget, said = Budget(args.minutes, CLOCKS[args.clock]), dict(minutes=args.minutes, clock=args.clock, n=args.n, evaluations=args.evaluations, seed=args.seed)
    old = json.loads(path.read_text()) if path.exists() else {}
    rows = old["rows"] if all(old.get(k) == v for k, v in said.items()) else []
    for name in args.only:
        if any(r["name"] == name for r in rows): continue
        print(f"== {name}: {args.minutes:g} minutes of {args.clock} time", flush=True)
        draw, steps, seen = MAKERS[name](real["train"], budget, args.seed)
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        x = in_parts(draw)(args.n, args.evaluations).clamp(-1, 1)
        seconds = time.perf_counter() - start
        scores = {k: asdict(s) for k, s in judge(x, reference, args.seed).items()}
        rows.append(dict(name=name, steps=steps, images_seen=seen, sampling_seconds=round(seconds, 1), scores=scores))
        result = dict(command=f"python benchmarks/peers.py --data_dir FOLDER --threads {args.threads}", **said, rows=rows, machine=machine())
        write_json(path, result)
        sheet(x).save(args.out/f"peers-{name}.png", optimize=True)
    print(table(json.loads(path.read_text())))

if __name__ == "__main__": main()
