"""What makes training fast, one change at a time: the recipe, and the recipe with one of its parts put back.

`python benchmarks/recipe.py --data_dir FOLDER` trains every row on all of Fashion-MNIST with one thread for the same processor time, draws --n
images of each with 20 evaluations of DPM-Solver++ (2M), and notes the Frechet classifier distance to the 10,000 test images (smaller is better).
One row: `python benchmarks/recipe.py --data_dir FOLDER --only "AdamW" --seeds 0`. Writes nbs/results/recipe.json; a row that is there is not made again.
"""
import argparse, json, time
from functools import partial
from pathlib import Path

import torch

from diffusion_book.dpm_solver import dpm_solver, logsnr_times
from diffusion_book.edm import lognormal_times
from diffusion_book.images import load_full_fashion
from diffusion_book.metrics import Moments, frechet_distance, shipped_moments, views
from diffusion_book.objective import Denoiser
from diffusion_book.recipe import muon
from diffusion_book.sampling import sample
from diffusion_book.schedules import schedule_from_config
from diffusion_book.training import adamw, learning_rate, train
from diffusion_book.unet import UNet
from machine import machine, write_json

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT/"nbs"/"results"/"recipe.json"
NET = "width", "blocks", "attention", "patch"       # settings of the network
RECIPE = dict(width=(32, 64), blocks=1, attention=0, patch=2, schedule="cosine", predicts="v", times="even", optimizer="muon",
              rate="falling", lr=2e-3, batch_size=128, decay=.9995)
OPTIMIZERS = dict(adamw=adamw, muon=muon)

RATES = dict(falling=learning_rate, held=partial(learning_rate, hold=.4))

# name: what is changed
ROWS = {
    "the recipe": {},
    "AdamW instead of Muon": dict(optimizer="adamw"),
    "attention at 7 x 7": dict(attention=1),
    "width 64, 128": dict(width=(64, 128)),
    "width 48, 96": dict(width=(48, 96)),
    "batch of 64": dict(batch_size=64),
    "batch of 256": dict(batch_size=256),
    "rate held for 40 %": dict(rate="held"),
    "rate doubled": dict(lr=4e-3),
    "times normal in ln sigma": dict(times="lognormal"),
    "predicting eps": dict(predicts="eps"),
    "linear schedule": dict(schedule="linear"),
    "pixels not folded": dict(patch=1),
    "where we began": dict(optimizer="adamw", rate="held", batch_size=64, attention=1, width=(64, 128)),
    "predicting x0": dict(predicts="x0"),
    "width 24, 48": dict(width=(24, 48)),
    "rate halved": dict(lr=1e-3),
    "two blocks a level": dict(blocks=2),
}

def trained(images: torch.Tensor, changes: dict, seed: int, minutes: float) -> tuple[Denoiser, int]:
    "A denoiser with averaged weights, after so many minutes of processor time; and its updates."
    said = RECIPE | changes
    torch.manual_seed(seed)
    schedule = schedule_from_config({"name": said["schedule"]})
    denoise = Denoiser(UNet(**{k: said[k] for k in NET}), schedule, said["predicts"])
    run = train(denoise, images, minutes=minutes, batch_size=said["batch_size"], lr=said["lr"], decay=said["decay"], seed=seed,
                draw_times=lognormal_times(schedule, -.75, 1.25) if said["times"] == "lognormal" else None, device="cpu", progress=False,
                optimizer=OPTIMIZERS[said["optimizer"]], rate=RATES[said["rate"]], clock=time.process_time)
    return Denoiser(run.ema.net.eval(), schedule, said["predicts"], (-1, 1), denoise.precision), run.step

@torch.no_grad()
def drawn(denoise: Denoiser, n: int, seed: int, batch: int = 250) -> torch.Tensor:
    "Images, some at a time."
    g, times = torch.Generator().manual_seed(seed), logsnr_times(denoise.schedule, 20)
    return torch.cat([sample(denoise, (min(batch, n - i), 1, 28, 28), denoise.schedule, dpm_solver, times=times, generator=g, progress=False)
                      for i in range(0, n, batch)])

def row(name: str, seed: int, images: torch.Tensor, minutes: float, n: int) -> dict:
    "Train, draw, score."
    start = time.process_time()
    denoise, updates = trained(images, ROWS[name], seed, minutes)
    x = drawn(denoise, n, seed + 1)
    seen = views(x)
    said = RECIPE | ROWS[name]
    return dict(name=name, seed=seed, changes=ROWS[name], updates=updates, images_seen=updates*said["batch_size"],
                parameters=sum(p.numel() for p in denoise.net.parameters()),
                frechet=round(frechet_distance(Moments(seen["features"]), shipped_moments("test", "features")), 4),
                patches=round(frechet_distance(Moments(seen["patches"]), shipped_moments("test", "patches")), 4),
                processor_seconds=round(time.process_time() - start, 1))

def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data_dir", required=True, help="folder of the original Fashion-MNIST files")
    ap.add_argument("--minutes", type=float, default=3., help="of processor time, to train each")
    ap.add_argument("--n", type=int, default=2000, help="images drawn of each")
    ap.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), help="rows to make")
    ap.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of weights, batches and noise")
    ap.add_argument("--out", type=Path, default=OUT, help="where to write")
    args = ap.parse_args()
    torch.set_num_threads(1)
    images = load_full_fashion("train", args.data_dir)[0]
    said = dict(minutes=args.minutes, n=args.n)
    for seed in args.seeds:
        for name in args.only:
            old = json.loads(args.out.read_text()) if args.out.exists() else {}
            rows = old["rows"] if all(old.get(k) == v for k, v in said.items()) else []
            if any((r["name"], r["seed"]) == (name, seed) for r in rows): continue
            rows.append(row(name, seed, images, args.minutes, args.n))
            print(rows[-1], flush=True)
            write_json(args.out, dict(command="python benchmarks/recipe.py --data_dir FOLDER", **said, recipe=RECIPE, rows=rows, machine=machine()))

if __name__ == "__main__": main()
