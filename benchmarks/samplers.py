"""Quality against evaluations of the network, for every sampler of the book on the shipped model.

`python benchmarks/samplers.py` draws the same number of samples with each sampler at 1, 2, 4, 8, 16 and 50 evaluations, and the reference
with 1000 moves of ancestral sampling; scores them (diffusion_book.judge) against the whole test set; counts the evaluations that were made;
times them (processor time, summed over threads); and writes nbs/results/samplers.json. It goes on where it was stopped: a row that is there is not made again (--fresh begins anew).
"""
import argparse, json, time
from dataclasses import asdict
from pathlib import Path

import torch

from diffusion_book.ddim import CountCalls
from diffusion_book.dpm_solver import logsnr_times
from diffusion_book.edm import karras_times
from diffusion_book.images import load_full_fashion
from diffusion_book.judge import Reference, draw_all, judge
from diffusion_book.sampling import find_sampler
from diffusion_book.training import load_pretrained
from machine import machine, write_json

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT/"nbs"/"results"/"samplers.json"
BUDGETS = 1, 2, 4, 8, 16, 50
# times(denoise, n)
SPACINGS = dict(even=lambda d, n: d.schedule.times(n), karras=lambda d, n: karras_times(d.schedule, n), logsnr=lambda d, n: logsnr_times(d.schedule, n),
                card=lambda d, n: torch.tensor([*d.card["sampling_times"][str(n)], 0.]))
# name: sampler, its options, spacing of its times, model
WALKS = {
    "ancestral": ("ddpm", {}, "even", "fashion"),
    "DDIM": ("ddim", {}, "even", "fashion"),
    "reverse SDE": ("euler_maruyama", {}, "even", "fashion"),
    "Euler": ("euler", {}, "karras", "fashion"),
    "ancestral Euler": ("euler_ancestral", {}, "karras", "fashion"),
    "Heun": ("heun", {}, "karras", "fashion"),
    "DPM-Solver++ 2": ("dpm_solver", dict(order=2), "even", "fashion"),
    "DPM-Solver++ 2, log-SNR": ("dpm_solver", dict(order=2), "logsnr", "fashion"),
    "DPM-Solver++ 3, log-SNR": ("dpm_solver", dict(order=3), "logsnr", "fashion"),
    "UniPC 2, log-SNR": ("unipc", dict(order=2), "logsnr", "fashion"),
    "UniPC 3, log-SNR": ("unipc", dict(order=3), "logsnr", "fashion"),
    "SDE-DPM-Solver++ 2, log-SNR": ("sde_dpm_solver", dict(order=2), "logsnr", "fashion"),
    "consistency": ("consistency", {}, "card", "fashion_one_step"),    # which names times for 1, 2 and 4 evaluations
}
REFERENCE = "ancestral"     # with every step of the schedule

def moves_for(sampler: str, budget: int) -> int:
    "How many moves a number of evaluations pays for: Heun looks twice a move, once in the last."
    return (budget + 1)//2 if sampler == "heun" else budget

def draw(name: str, budget: int, n: int, seed: int, batch: int) -> tuple[torch.Tensor, int, float]:
    "Samples, evaluations made for each, seconds of processor time."
    sampler, options, spacing, model = WALKS[name]
    counted = CountCalls(load_pretrained(model))
    times, start = SPACINGS[spacing](counted, moves_for(sampler, budget)), time.process_time()
    x = draw_all(counted, n, None, find_sampler(sampler), seed, batch, times=times, progress=False, **options)
    return x, counted.calls//-(-n//batch), time.process_time() - start

def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data_dir", required=True, help="folder of the original Fashion-MNIST files")
    ap.add_argument("--n", type=int, default=2000, help="samples of each")
    ap.add_argument("--seed", type=int, default=0, help="of the noise")
    ap.add_argument("--batch", type=int, default=250, help="samples at a time")
    ap.add_argument("--budgets", type=int, nargs="*", default=BUDGETS, help="evaluations")
    ap.add_argument("--no-reference", action="store_true", help="leave out the 1000 moves")
    ap.add_argument("--fresh", action="store_true", help="begin anew")
    ap.add_argument("--out", type=Path, default=OUT, help="where to write")
    args = ap.parse_args()
    reference = Reference(load_full_fashion("test", args.data_dir)[0], load_full_fashion("train", args.data_dir)[0])
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() and not args.fresh else []
    jobs = [(name, b) for b in args.budgets for name in WALKS if name != "consistency" or b <= 4] + ([] if args.no_reference else [(REFERENCE, 1000)])
    command = f"python benchmarks/samplers.py --data_dir FOLDER --n {args.n} --seed {args.seed} --batch {args.batch}"
    for name, budget in jobs:
        if any((r["name"], r["budget"]) == (name, budget) for r in rows): continue
        x, calls, seconds = draw(name, budget, args.n, args.seed, args.batch)
        scores = {k: asdict(s) for k, s in judge(x, reference, args.seed).items()}
        rows.append(dict(name=name, budget=budget, evaluations=calls, seconds=round(seconds, 2), scores=scores))
        print(f"{name:28} {calls:5} evaluations {seconds:7.1f} s  Frechet {scores['frechet']['value']:.3f}", flush=True)
        write_json(args.out, dict(command=command, n=args.n, seed=args.seed, rows=rows, machine=machine()))

if __name__ == "__main__": main()
