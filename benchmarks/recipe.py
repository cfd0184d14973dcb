"""What makes training fast, one change at a time: the recipe, and the recipe with one of its parts changed.

`python benchmarks/recipe.py --data_dir FOLDER` trains every row on all of Fashion-MNIST, at equal cost: first an update of the row and one of the
recipe are timed in turns, and the row gets as many updates as --updates of the recipe cost. Then it draws --n images with 20 evaluations of
DPM-Solver++ (2M) and notes the Frechet classifier distance to the 10,000 test images (smaller is better). One thread, so that rows can be made side by side.
One row: `python benchmarks/recipe.py --data_dir FOLDER --only "AdamW instead of Muon" --seeds 0`. Writes nbs/results/recipe.json; what is there is not made again.
"""
import argparse, json, statistics, time
from functools import cache, partial
from pathlib import Path

import torch

from diffusion_book.dpm_solver import dpm_solver, logsnr_times
from diffusion_book.edm import lognormal_times
from diffusion_book.images import load_full_fashion, make_accelerator
from diffusion_book.judge import draw_all
from diffusion_book.metrics import Moments, frechet_distance, shipped_moments, views
from diffusion_book.objective import Denoiser, min_snr_weight, simple_loss
from diffusion_book.schedules import Schedule, schedule_from_config
from diffusion_book.training import Run, find_optimizer, learning_rate, train, update
from diffusion_book.unet import UNet
from machine import machine, write_json

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT/"nbs"/"results"/"recipe.json"
NET = "width", "blocks", "attention", "patch"       # settings of the network
RECIPE = dict(width=(32, 64), blocks=1, attention=0, patch=2, schedule="cosine", predicts="v", times="even", optimizer="muon",
              loss="plain", rate="falling", lr=2e-3, batch_size=128, decay=.9995, mirrored=False)
RATES = dict(falling=partial(learning_rate, hold=0.), held=learning_rate, sudden=partial(learning_rate, hold=0., warmup=1))

@cache
def mean_min_snr(schedule: Schedule, predicts: str) -> torch.Tensor:
    "The weight that whole times have on average."
    return min_snr_weight(schedule.times(1000)[:-1], schedule, predicts).mean()

def min_snr_loss(denoise: Denoiser, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    "The plain loss, weighed as Hang et al. (2023) do, to the same mean weight."
    weight = min_snr_weight(t, denoise.schedule, denoise.predicts)/mean_min_snr(denoise.schedule, denoise.predicts)
    return weight.to(x0)*simple_loss(denoise, x0, t, eps)

LOSSES = dict(plain=simple_loss, min_snr=min_snr_loss)

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
    "batch of 64, rate held for 40 %": dict(batch_size=64, rate="held"),
    "batch of 64, rate held, width 48, 96": dict(batch_size=64, rate="held", width=(48, 96)),
    "batch of 64, rate held and doubled, width 48, 96": dict(batch_size=64, rate="held", lr=4e-3, width=(48, 96)),
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
    "weighed by min-SNR": dict(loss="min_snr"),
    "averaged a tenth as long": dict(decay=.995),
    "no warm-up": dict(rate="sudden"),
    "pictures mirrored": dict(mirrored=True),
}

def fresh(changes: dict, seed: int) -> tuple[Denoiser, dict]:
    "An untrained denoiser, and how to train it."
    said = RECIPE | changes
    torch.manual_seed(seed)
    denoise = Denoiser(UNet(**{k: said[k] for k in NET}), schedule_from_config({"name": said["schedule"]}), said["predicts"], (-1, 1))
    draw_times = lognormal_times(denoise.schedule, -.75, 1.25) if said["times"] == "lognormal" else None
    return denoise, dict(batch_size=said["batch_size"], lr=said["lr"], decay=said["decay"], draw_times=draw_times, loss=LOSSES[said["loss"]],
                         optimizer=find_optimizer(said["optimizer"]))

def cost(name: str, images: torch.Tensor, rounds: int = 9) -> float:
    "Processor time of an update over that of the recipe: the median of rounds in which each makes one."
    if not ROWS[name]: return 1.
    runs = [Run(denoise, make_accelerator("cpu", "auto"), **how) for denoise, how in (fresh(ROWS[name], 0), fresh({}, 0))]
    def seconds(run):
        start = time.process_time()
        update(run, images, 1e-4)
        return time.process_time() - start
    for run in runs: seconds(run)
    return statistics.median(seconds(runs[0])/seconds(runs[1]) for _ in range(rounds))

def trained(images: torch.Tensor, name: str, seed: int, updates: int) -> Denoiser:
    "A denoiser with averaged weights."
    denoise, how = fresh(ROWS[name], seed)
    if (RECIPE | ROWS[name])["mirrored"]: images = torch.cat([images, images.flip(-1)])
    run = train(denoise, images, steps=updates, seed=seed, device="cpu", progress=False, rate=RATES[(RECIPE | ROWS[name])["rate"]], **how)
    denoise = Denoiser(run.ema.net.eval(), denoise.schedule, denoise.predicts, denoise.clip)
    denoise.card = dict(size=images.shape[1:])
    return denoise

def row(name: str, seed: int, images: torch.Tensor, updates: int, n: int, price: float) -> dict:
    "Train, draw, score."
    start, steps = time.process_time(), round(updates/price)
    denoise = trained(images, name, seed, steps)
    times = logsnr_times(denoise.schedule, 20)
    seen = views(draw_all(denoise, n, None, dpm_solver, seed + 1, times=times, progress=False))
    return dict(name=name, seed=seed, changes=ROWS[name], cost=round(price, 3), updates=steps,
                images_seen=steps*(RECIPE | ROWS[name])["batch_size"], parameters=sum(p.numel() for p in denoise.net.parameters()),
                **{k: round(frechet_distance(Moments(seen[view]), shipped_moments("test", view)), 4)
                   for k, view in dict(frechet="features", patches="patches").items()},
                processor_seconds=round(time.process_time() - start, 1))

def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data_dir", required=True, help="folder of the original Fashion-MNIST files")
    ap.add_argument("--updates", type=int, default=1200, help="of the recipe; the others get what costs as much")
    ap.add_argument("--n", type=int, default=2000, help="images drawn of each")
    ap.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), help="rows to make")
    ap.add_argument("--seeds", type=int, nargs="*", default=[0], help="of weights, batches and noise")
    ap.add_argument("--out", type=Path, default=OUT, help="where to write")
    args = ap.parse_args()
    torch.set_num_threads(1)
    images, said = load_full_fashion("train", args.data_dir)[0], dict(updates=args.updates, n=args.n)
    for seed, name in ((seed, name) for seed in args.seeds for name in args.only):
        old = json.loads(args.out.read_text()) if args.out.exists() else {}
        rows = old["rows"] if all(old.get(k) == v for k, v in said.items()) else []
        if any((r["name"], r["seed"]) == (name, seed) for r in rows): continue
        price = next((r["cost"] for r in rows if r["name"] == name), None) or cost(name, images)
        rows.append(row(name, seed, images, args.updates, args.n, price))
        print(rows[-1], flush=True)
        command = f"python benchmarks/recipe.py --data_dir FOLDER --updates {args.updates}"
        write_json(args.out, dict(command=command, **said, recipe=RECIPE, rows=rows, machine=machine()))

if __name__ == "__main__": main()
