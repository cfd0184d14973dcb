"""What two parts of the U-Net are worth, measured by leaving them out: the skip connections, and the time.

`python benchmarks/ablations.py` trains the same small network whole, without skips and blind to the time, from the same
first weights on the same batches, over several seeds. It writes nbs/results/ablations.json and ablations.png, which the
chapter on the U-Net draws. About 12 minutes of computing on one core.
"""
import argparse, json, time
from pathlib import Path

import torch
from PIL import Image

from diffusion_book.objective import Denoiser, simple_loss
from diffusion_book.pictures import image_grid, load_fashion, to_uint8
from diffusion_book.sampling import sample
from diffusion_book.schedules import linear_schedule
from diffusion_book.unet import UNet
from machine import machine, write_json

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"whole": {}, "without skips": dict(skips=False), "blind to the time": dict(timed=False)}
TIMES = [5, 25, 50, 100, 200, 300, 450, 600, 800, 1000]

def make(kind: str, seed: int, width: tuple) -> Denoiser:
    "The network of one kind; a seed gives every kind the same first weights."
    torch.manual_seed(seed)
    net = UNet(width=width, **KINDS[kind]).to(memory_format=torch.channels_last)
    return Denoiser(net, linear_schedule(), "eps", clip=(-1, 1))

@torch.no_grad()
def loss_by_time(denoise: Denoiser, images: torch.Tensor) -> list:
    "Mean loss on held-out images at each of TIMES, with the same noise for every network."
    denoise.net.eval()
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(images.shape, generator=g)
    losses = [simple_loss(denoise, images, t, eps).mean().item() for t in TIMES]
    denoise.net.train()
    return losses

def fit(denoise: Denoiser, images: torch.Tensor, held_out: torch.Tensor, steps: int, seed: int, batch: int, looks: list) -> dict:
    "Train, with the rate falling along a straight line to zero; look at the held-out loss now and then."
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(denoise.net.parameters(), 3e-3)
    curve = {}
    for step in range(1, steps + 1):
        for group in optimizer.param_groups: group["lr"] = 3e-3*min(1, step/50)*(1 - (step - 1)/steps)
        x0 = images[torch.randint(len(images), (batch,), generator=g)]
        loss = simple_loss(denoise, x0, torch.randint(1, 1001, (batch,), generator=g), generator=g).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoise.net.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        if step in looks: curve[step] = sum(losses := loss_by_time(denoise, held_out))/len(TIMES)
    return dict(curve=curve, loss=losses)

def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--steps", type=int, default=1500, help="updates each network gets")
    ap.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    ap.add_argument("--batch", type=int, default=64, help="images an update")
    ap.add_argument("--width", type=int, nargs="+", default=[16, 32, 32], help="channels at each level")
    ap.add_argument("--draw", type=int, default=12, help="samples drawn of each kind, with the first seed")
    ap.add_argument("--moves", type=int, default=200, help="steps of sampling")
    ap.add_argument("--out", type=Path, default=ROOT/"nbs"/"results", help="folder for ablations.json and ablations.png")
    args = ap.parse_args()
    images, held_out = load_fashion()[0], load_fashion("test")[0][::8]
    looks = sorted({max(1, round(args.steps*share)) for share in (.05, .1, .2, .4, .7, 1)})
    runs, strips, start, cpu = {kind: [] for kind in KINDS}, [], time.perf_counter(), time.process_time()
    for seed in range(args.seeds):
        for kind in KINDS:
            denoise = make(kind, seed, tuple(args.width))
            result = fit(denoise, images, held_out, args.steps, seed, args.batch, looks)
            runs[kind].append(dict(seed=seed, **result))
            print(f"seed {seed}  {kind:<18} held-out loss {list(result['curve'].values())[-1]:.4f}  "
                  f"({time.perf_counter() - start:.0f} s)", flush=True)
            if seed == 0:
                denoise.net.eval()
                g = torch.Generator().manual_seed(1)
                strips.append(sample(denoise, (args.draw, 1, 28, 28), denoise.schedule, steps=args.moves, generator=g, progress=False))
    args.out.mkdir(parents=True, exist_ok=True)
    sheet = image_grid(torch.cat(strips), args.draw)
    Image.fromarray(to_uint8(sheet)[0].numpy()).save(args.out/"ablations.png", optimize=True)
    write_json(args.out/"ablations.json", dict(
        command=f"python benchmarks/ablations.py --steps {args.steps} --seeds {args.seeds}", steps=args.steps, batch=args.batch,
        width=args.width, draw=args.draw, parameters=sum(p.numel() for p in denoise.net.parameters()), held_out=len(held_out),
        times=TIMES, runs=runs, cpu_seconds=round(time.process_time() - cpu, 1), machine=machine()))

if __name__ == "__main__": main()
