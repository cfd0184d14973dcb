"""Put a trained model into the package: `python tools/ship_model.py out/fashion fashion --data_dir FOLDER`.

Measures it first, against all of Fashion-MNIST (FOLDER holds the original files), and notes the scores on its card.
The weights are stored in half precision, which rounds each by at most one part in two thousand and halves the file.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from diffusion_book.images import load_full_fashion
from diffusion_book.objective import simple_loss
from diffusion_book.sampling import sample
from diffusion_book.training import load_model, save_model

ROOT = Path(__file__).resolve().parents[1]
LICENCE = "Apache-2.0; trained on Fashion-MNIST, MIT, Copyright (c) 2017 Zalando SE"


def heldout_loss(denoise, images, seed: int = 0) -> float:
    "Mean of the training loss over images it has not seen, each at one random time."
    g = torch.Generator().manual_seed(seed)
    t = torch.randint(1, denoise.schedule.T + 1, (len(images),), generator=g)
    eps = torch.randn(images.shape, generator=g)
    parts = zip(images.split(500), t.split(500), eps.split(500))
    return torch.cat([simple_loss(denoise, *p) for p in parts]).mean().item()


def nearest(x, data) -> torch.Tensor:
    "Distance of each image to the nearest of `data`, over the root of the number of pixels."
    best = torch.full((len(x),), float("inf"))
    for part in data.split(5000): best = best.minimum(torch.cdist(x.flatten(1), part.flatten(1)).min(dim=1).values)
    return best/x[0].numel()**.5


def frechet(x, y, basis, mean) -> float:
    "Squared Frechet distance of the Gaussians fitted to two sets of images, in principal components."
    a, b = (((o - mean).flatten(1).double()) @ basis for o in (x, y))
    ca, cb = a.T.cov(), b.T.cov()
    values, q = torch.linalg.eigh(ca)
    root = q*values.clamp(min=0).sqrt() @ q.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2*cross).item()


@torch.no_grad()
def scores(denoise, train, test, n: int, steps: int, seed: int = 0) -> dict:
    "What can be said of a model by numbers alone; each beside what real images score."
    start, g = time.perf_counter(), torch.Generator().manual_seed(seed)
    x = torch.cat([sample(denoise, (250, 1, 28, 28), denoise.schedule, steps=steps, generator=g) for _ in range(n//250)])
    mean = train.mean(0, keepdim=True)
    basis = torch.linalg.svd((train - mean).flatten(1)[:10_000], full_matrices=False).Vh[:24].T.double()
    d, real = nearest(x, train), nearest(test[:n], train)
    return dict(n=n, steps=steps, seed=seed, seconds=round(time.perf_counter() - start, 1), precision=denoise.precision,
                heldout_loss=round(heldout_loss(denoise, test), 5),
                frechet_24_components=round(frechet(x, test, basis, mean), 3),
                frechet_of_as_many_training_images=round(frechet(train[:n], test, basis, mean), 3),
                nearest_of_60000=dict(median=round(d.median().item(), 4), least=round(d.min().item(), 4)),
                nearest_of_60000_for_test_images=dict(median=round(real.median().item(), 4), least=round(real.min().item(), 4)))


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("folder", help="what diffusion_book_train wrote")
    ap.add_argument("name", help="the name it ships under")
    ap.add_argument("--data_dir", required=True, help="folder of the original Fashion-MNIST files")
    ap.add_argument("--n", type=int, default=1000, help="samples to measure, a multiple of 250")
    ap.add_argument("--steps", type=int, default=100, help="moves a sample")
    args = ap.parse_args()
    denoise = load_model(args.folder)
    card = {k: v for k, v in denoise.card.items() if k not in ("net", "schedule", "predicts", "clip", "parameters")}
    (train, _), (test, _) = (load_full_fashion(split, args.data_dir) for split in ("train", "test"))
    card |= dict(licence=LICENCE, weights="float16", scores=scores(denoise, train, test, args.n, args.steps))
    save_model(ROOT/"diffusion_book"/"weights"/args.name, denoise, card, torch.float16)
    print(json.dumps(card, indent=1))


if __name__ == "__main__": main()
