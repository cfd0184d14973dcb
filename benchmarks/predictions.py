"""What a network is best asked to predict, and how many images it must see: eps, x0 and v trained alike and scored alike.

`python benchmarks/predictions.py` trains the same small network on scikit-learn's digits for each prediction, from the
same first weights on the same batches, over several seeds, and scores it along the way. It writes
nbs/results/predictions.json, which the chapter on training draws. About 10 minutes of computing on one core.
"""
import argparse, time
from pathlib import Path

import torch
from torch import Tensor

from diffusion_book.images import load_digits_images
from diffusion_book.objective import Denoiser
from diffusion_book.sampling import sample
from diffusion_book.schedules import linear_schedule, noise_to
from diffusion_book.training import Run, train
from diffusion_book.unet import UNet
from machine import machine, write_json

ROOT = Path(__file__).resolve().parents[1]
KINDS = "eps", "x0", "v"
TIMES = [1, 5, 20, 50, 100, 200, 350, 500, 700, 850, 1000]
FEATURES = 20   # directions of largest variance that the distance looks at

def split(seed: int = 0) -> tuple[Tensor, Tensor]:
    "1,500 digits to train on and 297 to hold out."
    images = load_digits_images()[0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:1500]], images[order[1500:]]

def frechet(a: Tensor, b: Tensor, axes: Tensor) -> float:
    "Fréchet distance of two sets of images, as Gaussians along some directions (symmetric eigenvalues, float64)."
    (ma, ca), (mb, cb) = (((x.flatten(1).double()@axes).mean(0), (x.flatten(1).double()@axes).T.cov()) for x in (a, b))
    values, vectors = torch.linalg.eigh(ca)
    root = vectors@torch.diag(values.clamp(min=0).sqrt())@vectors.T
    cross = torch.linalg.eigvalsh(root@cb@root).clamp(min=0).sqrt().sum()
    return ((ma - mb).square().sum() + ca.trace() + cb.trace() - 2*cross).item()

def principal(x: Tensor) -> Tensor:
    "The directions of largest variance, as columns."
    return torch.linalg.eigh(x.flatten(1).double().T.cov())[1][:, -FEATURES:]

@torch.no_grad()
def errors_by_time(denoise: Denoiser, images: Tensor) -> list:
    "Mean squared error of x0_hat on held-out images at each of TIMES, with the same noise for every network."
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return [(denoise(noise_to(images, t, denoise.schedule, eps)[0], t) - images).square().mean().item() for t in TIMES]

def score(denoise: Denoiser, real: Tensor, n: int, sets: int, steps: int) -> list:
    "Fréchet distance of each of `sets` sets of `n` samples to the training images."
    g, axes = torch.Generator().manual_seed(2), principal(real)
    x = sample(denoise, (n*sets, 1, 8, 8), denoise.schedule, steps=steps, generator=g, progress=False)
    return [frechet(part, real, axes) for part in x.chunk(sets)]

def one_run(kind: str, seed: int, steps: int, looks: list, real: Tensor, held_out: Tensor) -> dict:
    "Train one network and score its average along the way."
    torch.manual_seed(seed)
    denoise, scores = Denoiser(UNet(width=(16, 32), patch=1), linear_schedule(), kind, clip=(-1, 1)), {}
    def averaged(run: Run): return Denoiser(run.ema.net, denoise.schedule, kind, clip=(-1, 1))
    def watch(run: Run, loss: Tensor):
        if run.step in looks: scores[str(64*run.step)] = score(averaged(run), real, len(held_out), 2, 30)
    run = train(denoise, real, steps=steps, decay=.99, seed=seed, precision="fp32", progress=False, watch=watch)
    return dict(scores=scores, errors=errors_by_time(averaged(run), held_out))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--steps", type=int, default=600)
    ap.add_argument("--seeds", type=int, default=3)
    args = ap.parse_args()
    (real, held_out), begin, cpu = split(), time.perf_counter(), time.process_time()
    looks = sorted({args.steps//k for k in (60, 15, 4, 1)})
    runs = {}
    for seed in range(args.seeds):
        for kind in KINDS:
            runs.setdefault(kind, []).append(one_run(kind, seed, args.steps, looks, real, held_out))
            final = list(runs[kind][-1]["scores"].values())[-1]
            print(f"{kind:4} seed {seed}: distance {sum(final)/len(final):.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
    floor = frechet(held_out, real, principal(real))
    result = dict(command="python benchmarks/predictions.py", steps=args.steps, batch=64, times=TIMES, features=FEATURES,
                  n=len(held_out), floor=floor, runs=runs, seconds=round(time.perf_counter() - begin, 1),
                  cpu_seconds=round(time.process_time() - cpu, 1), machine=machine())
    write_json(ROOT/"nbs"/"results"/"predictions.json", result)

if __name__ == "__main__": main()
