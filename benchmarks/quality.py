"""Samples after the same minutes: our U-Net and recipe beside diffusers' UNet2DModel and its tutorial recipe.

`python benchmarks/quality.py --minutes 3` trains one after the other, each for the same time, on the same 10,000 images with the same
threads, no flips; draws 64 samples from each with 250 steps of ancestral sampling; and writes quality.png (ours left, theirs right)
and quality.json. Besides the pictures it measures, at equal noise levels, how far each one's estimate of the clean image is off.

Theirs: UNet2DModel(32, 64, 64), predicts eps on the linear schedule (DDPMScheduler, T = 1000), AdamW with a warm-up
and a cosine decay to zero as in the training tutorial, batch 64, the better of the two memory formats as benchmarks/speed.py found it.
The tutorial's rate is 1e-4, the course's 1e-3 for this network; the course's is the default because it is better in minutes.
"""
import argparse, time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from diffusion_book.objective import Denoiser
from diffusion_book.pictures import image_grid, load_fashion, to_uint8
from diffusion_book.sampling import sample
from diffusion_book.schedules import cosine_schedule, linear_schedule
from diffusion_book.training import train
from diffusion_book.unet import UNet
from machine import machine, write_json
from speed import FORMATS, OURS, RIVAL, diffusers_unet

ROOT = Path(__file__).resolve().parents[1]
LEVELS = [4., 2., 0., -2., -4., -6.]    # log signal-to-noise ratios to compare at

def ours(images: torch.Tensor, minutes: float, seed: int, precision: str) -> tuple[Denoiser, dict]:
    "The book's own: UNet() on the cosine schedule predicting v, trained by `train`."
    torch.manual_seed(seed)
    denoise = Denoiser(UNet(), cosine_schedule(), "v", clip=(-1, 1))
    run = train(denoise, images, minutes=minutes, seed=seed, device="cpu", precision=precision)
    return Denoiser(run.ema.net.eval(), denoise.schedule, "v", clip=(-1, 1)), dict(steps=run.step, seconds=round(run.seconds, 1))

def theirs(images: torch.Tensor, minutes: float, seed: int, lr: float, memory: str, batch: int = 64) -> tuple[Denoiser, dict]:
    "The tutorial's: eps, linear schedule, AdamW, warm-up and cosine decay by the clock."
    from diffusers import DDPMScheduler
    torch.manual_seed(seed)
    net = diffusers_unet().to(memory_format=FORMATS[memory])
    scheduler, g = DDPMScheduler(num_train_timesteps=1000), torch.Generator().manual_seed(seed)
    optimizer, start, steps, done = torch.optim.AdamW(net.parameters(), lr), time.perf_counter(), 0, 0.
    while done < 1:
        warm, rest = min(1, (steps + 1)/50), .5*(1 + torch.cos(torch.tensor(torch.pi*done)).item())
        for group in optimizer.param_groups: group["lr"] = lr*warm*rest
        x0 = images[torch.randint(len(images), (batch,), generator=g)].to(memory_format=FORMATS[memory])
        t, eps = torch.randint(0, 1000, (batch,), generator=g), torch.randn(x0.shape, generator=g)
        (net(scheduler.add_noise(x0, eps, t), t) - eps).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        steps, done = steps + 1, (time.perf_counter() - start)/(60*minutes)
        print(f"\rdiffusers: {100*min(done, 1):3.0f} %  step {steps}", end="", flush=True)
    print()
    counted = lambda x, clock, cond=None: net(x, clock - 1)     # diffusers counts its steps from 0, the book from 1
    net.eval()
    return Denoiser(counted, linear_schedule(), "eps", clip=(-1, 1)), dict(steps=steps, seconds=round(time.perf_counter() - start, 1))

def time_at(schedule, level: float) -> int:
    "The step whose log signal-to-noise ratio is nearest to `level`."
    t = torch.arange(1, schedule.T + 1)
    return int(t[(schedule.logsnr(t) - level).abs().argmin()])

@torch.no_grad()
def errors(denoise: Denoiser, images: torch.Tensor) -> dict:
    "Mean squared error of the estimate of x0 at each of LEVELS, with the same noise for all."
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    def at(level):
        t, a = time_at(denoise.schedule, level), torch.sigmoid(torch.tensor(level)).item()
        return (denoise(a**.5*images + (1 - a)**.5*eps, t) - images).square().mean().item()
    return {f"{level:g}": round(at(level), 5) for level in LEVELS}

def sheets(pictures: dict) -> Image.Image:
    "Contact sheets side by side, each with its name above."
    pages = [Image.fromarray(to_uint8(image_grid(x, 8))[0].numpy()).resize((8*60, 8*60), Image.NEAREST) for x in pictures.values()]
    page = Image.new("L", (sum(p.width + 20 for p in pages) + 20, pages[0].height + 50), 255)
    for i, (name, sheet) in enumerate(zip(pictures, pages)):
        page.paste(sheet, (20 + i*(sheet.width + 20), 30))
        ImageDraw.Draw(page).text((20 + i*(sheet.width + 20), 8), name, fill=0)
    return page

def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--minutes", type=float, default=3., help="training time of each")
    ap.add_argument("--threads", type=int, default=None, help="threads; left out, torch's own choice")
    ap.add_argument("--steps", type=int, default=250, help="steps of sampling, for both")
    ap.add_argument("--n", type=int, default=64, help="samples of each")
    ap.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of the tutorial recipe")
    ap.add_argument("--memory", choices=FORMATS, default="contiguous", help="memory format of diffusers' network")
    ap.add_argument("--precision", default="fp32", help="of our training: fp32 as theirs, or auto")
    ap.add_argument("--held-out", type=int, default=250, help="images to measure the error on, at most 2000")
    ap.add_argument("--seed", type=int, default=0, help="of weights, batches and samples")
    ap.add_argument("--out", type=Path, default=ROOT/"benchmarks"/"results", help="folder for quality.json and quality.png")
    args = ap.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    images, held_out = load_fashion()[0], load_fashion("test")[0][::2000//args.held_out]
    makers = {OURS: lambda: ours(images, args.minutes, args.seed, args.precision),
              RIVAL: lambda: theirs(images, args.minutes, args.seed, args.lr, args.memory)}
    pictures, rows = {}, []
    for name, make in makers.items():
        print(f"== {name}: {args.minutes:g} minutes", flush=True)
        denoise, facts = make()
        start = time.perf_counter()
        pictures[name] = sample(denoise, (args.n, 1, 28, 28), denoise.schedule, steps=args.steps, generator=torch.Generator().manual_seed(args.seed))
        rows.append(dict(name=name, **facts, images_seen=64*facts["steps"], sampling_seconds=round(time.perf_counter() - start, 1), x0_error=errors(denoise, held_out)))
        print(rows[-1])
    args.out.mkdir(parents=True, exist_ok=True)
    sheets({f"{r['name']}: {r['images_seen']:,} images seen in {args.minutes:g} minutes": pictures[r["name"]] for r in rows}).save(args.out/"quality.png", optimize=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "threads")}
    write_json(args.out/"quality.json", dict(**settings, log_snr_levels=LEVELS, rows=rows, machine=machine()))

if __name__ == "__main__": main()
