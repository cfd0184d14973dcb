"""Our U-Net beside its peers, and beside the most this machine can do.

`python benchmarks/speed.py` prints the table and stores it with machine and versions. Everything is timed in one process, in
turns: round after round each network makes one training step and one sampling step, and the bare convolution runs between
them, so that whatever else the machine does hits all alike. fp32 throughout, 28x28 grey images, batch 64.
"""
import argparse, statistics, sys, time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion_book.unet import UNet
from machine import machine, write_json

ROOT = Path(__file__).resolve().parents[1]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# ------------------------------------------------------------------ who is timed
class Told(nn.Module):
    "A peer's network behind our call: net(xt, clock) gives xt's shape."
    def __init__(self, net: nn.Module, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, xt, clock): return self.call(self.net, xt, clock)

@contextmanager
def stand_in(*names: str):
    "Where a package is missing that a peer imports for its pictures only, put an empty one in its place for a while."
    missing = {n: MagicMock() for n in names if n not in sys.modules and find_spec(n) is None}
    sys.modules.update(missing)
    try: yield
    finally:
        for name in missing: del sys.modules[name]

def diffusers_unet() -> nn.Module:
    "UNet2DModel as the first unit of the Hugging Face course has it for 28x28 images."
    from diffusers import UNet2DModel
    net = UNet2DModel(sample_size=28, in_channels=1, out_channels=1, layers_per_block=2, block_out_channels=(32, 64, 64),
                      down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
                      up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    return Told(net, lambda net, x, t: net(x, t).sample)

def lucidrains_unet() -> nn.Module:
    "denoising-diffusion-pytorch's Unet in its smallest published shape."
    with stand_in("torchvision", "pytorch_fid"): from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet
    return Unet(32, dim_mults=(1, 2, 4), channels=1)

def smalldiffusion_unet() -> nn.Module:
    "smalldiffusion's Unet as its Fashion-MNIST example has it."
    with stand_in("torchvision"): from smalldiffusion.model_unet import Unet
    return Told(Unet(28, 1, 1, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(14,)), lambda net, x, t: net(x, t))

OURS, RIVAL = "diffusion_book UNet(64, 128)", "diffusers UNet2DModel(32, 64, 64)"
PEERS = {RIVAL: diffusers_unet, "denoising-diffusion-pytorch Unet(32)": lucidrains_unet, "smalldiffusion Unet(64)": smalldiffusion_unet}

def contenders(width: tuple, peers: dict) -> tuple[dict, dict]:
    "Networks to time, by (name, memory format), and the peers that are not installed, with why."
    ready, missing = {(OURS, "channels_last"): UNet(width=width)}, {}
    for name, build in peers.items():
        try: ready |= {(name, f): build() for f in FORMATS}
        except ImportError as e: missing[name] = str(e)
    return {k: net.to(memory_format=FORMATS[k[1]]) for k, net in ready.items()}, missing

# ------------------------------------------------------------------ what is timed
def training_step(net: nn.Module, batch: int, memory: str):
    "A function that makes one step: noise in, squared error, gradients, AdamW."
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    x, target = (torch.randn(batch, 1, 28, 28).to(memory_format=FORMATS[memory]) for _ in range(2))
    clock = torch.rand(batch)*999 + 1
    def step():
        (net(x, clock) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return step

def sampling_step(net: nn.Module, batch: int, memory: str):
    "A function that evaluates the network once, as a sampler does at every step."
    x, clock = torch.randn(batch, 1, 28, 28).to(memory_format=FORMATS[memory]), torch.rand(batch)*999 + 1
    def step():
        net.eval()
        with torch.inference_mode(): net(x, clock)
        net.train()
    return step

def bare_convolution(side: int, batch: int):
    "The most a network could hope for: a 3x3 convolution over 64 channels, channels_last, forward. Returns it and its GFLOP."
    conv = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 64, side, side).to(memory_format=torch.channels_last)
    def step():
        with torch.inference_mode(): conv(x)
    return step, 2*batch*side**2*64*64*9/1e9

def flops(net: nn.Module) -> tuple[float, float]:
    "Operations (two a multiply-add) for one image: forward, and forward with backward."
    x, clock, counts = torch.randn(1, 1, 28, 28), torch.full((1,), 500.), []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):   # it can't count the fused attention
            y = net(x, clock)
            if backward: y.square().mean().backward()
        counts.append(float(counter.get_total_flops()))
    net.zero_grad()
    return counts[0], counts[1]

# ------------------------------------------------------------------ how it is timed
def seconds(step, at_least: float) -> float:
    "Seconds a call, over as many calls as fill the time; at least one."
    n, start = 0, time.perf_counter()
    while n == 0 or time.perf_counter() - start < at_least: step(); n += 1
    return (time.perf_counter() - start)/n

def in_turns(steps: dict, rounds: int, at_least: float) -> dict:
    "Time every step once a round, after a round that warms up; return the seconds of each round."
    for step in steps.values(): seconds(step, 0)
    taken = {k: [] for k in steps}
    for r in range(rounds):
        for k, step in steps.items(): taken[k].append(seconds(step, at_least))
        print(f"\rround {r + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return taken

def measure(rounds: int = 7, batch: int = 64, at_least: float = .3, width: tuple = (64, 128), peers: dict = PEERS) -> dict:
    "Time everything in turns and put the table together."
    torch.manual_seed(0)
    nets, missing = contenders(width, peers)
    steps, gflop = {}, {}
    for side in (28, 14): steps["conv", side], gflop["conv", side] = bare_convolution(side, batch)
    for (name, memory), net in nets.items():
        steps[name, memory, "train"], steps[name, memory, "sample"] = training_step(net, batch, memory), sampling_step(net, batch, memory)
    taken = in_turns(steps, rounds, at_least)
    half = {k: statistics.median(v) for k, v in taken.items()}
    peak = max(gflop[k]/half[k] for k in gflop)
    rows = []
    for (name, memory), net in nets.items():
        forward, both = flops(net)
        rate = {kind: batch/half[name, memory, kind] for kind in ("train", "sample")}
        rows.append(dict(name=name, memory=memory, parameters=sum(p.numel() for p in net.parameters()), mflop_forward=round(forward/1e6, 1),
                         mflop_training=round(both/1e6, 1), train_img_s=round(rate["train"], 1), sample_img_s=round(rate["sample"], 1),
                         train_share=round(both*rate["train"]/1e9/peak, 3), sample_share=round(forward*rate["sample"]/1e9/peak, 3),
                         seconds={kind: [round(s, 5) for s in taken[name, memory, kind]] for kind in rate}))
    return dict(batch=batch, rounds=rounds, peak_gflop_s=round(peak, 1), conv_gflop_s={str(k[1]): round(gflop[k]/half[k], 1) for k in gflop},
                rows=rows, missing=missing, machine=machine(), **compare(rows))

def compare(rows: list) -> dict:
    "Ours against the rival in its better memory format, round by round."
    ours = next(r for r in rows if r["name"] == OURS)
    rival = [r for r in rows if r["name"] == RIVAL]
    if not rival: return {}
    result = {}
    for kind in ("train", "sample"):
        best = max(rival, key=lambda r: r[f"{kind}_img_s"])
        ratios = sorted(b/a for a, b in zip(ours["seconds"][kind], best["seconds"][kind]))
        result[f"{kind}_ratio"] = dict(median=round(statistics.median(ratios), 2), low=round(ratios[0], 2), high=round(ratios[-1], 2),
                                       rival_memory=best["memory"])
    return dict(result, parameter_ratio=round(ours["parameters"]/rival[0]["parameters"], 4))

# ------------------------------------------------------------------ what is said
def table(result: dict) -> str:
    "The result as a Markdown page."
    m = result["machine"]
    lines = ["| network | memory | parameters | MFLOP forward | training img/s | % of peak | sampling img/s | % of peak |",
             "|---|---|--:|--:|--:|--:|--:|--:|"]
    lines += [f"| {r['name']} | {r['memory']} | {r['parameters']/1e6:.2f} M | {r['mflop_forward']:.0f} | {r['train_img_s']:.0f} | "
              f"{100*r['train_share']:.0f} | {r['sample_img_s']:.0f} | {100*r['sample_share']:.0f} |" for r in result["rows"]]
    lines += ["", f"Batch {result['batch']}, 28x28, fp32, medians of {result['rounds']} rounds in turns. An image in sampling is one "
              "evaluation of the network. Peak: a 3x3 convolution, 64 channels, forward, channels_last, in the same rounds: "
              + ", ".join(f"{v:.0f} GFLOP/s at {k}x{k}" for k, v in result["conv_gflop_s"].items()) + "."]
    for kind, word in (("train", "Training"), ("sample", "Sampling")):
        if c := result.get(f"{kind}_ratio"):
            lines += ["", f"{word}, ours over diffusers' better format ({c['rival_memory']}): **{c['median']:.2f} times** as fast "
                      f"({c['low']:.2f} to {c['high']:.2f} over the rounds), with {result['parameter_ratio']:.3f} times its parameters."]
    lines += ["", *(f"Not installed here: {k} ({v})." for k, v in result["missing"].items())]
    lines += [f"{m['cpu']}, {m['threads']} threads on {m['cores']} cores, load {m['load']} when the timing ended, OMP_WAIT_POLICY {m['wait_policy']}, "
              f"Python {m['python']}, " + ", ".join(f"{k} {v}" for k, v in m["versions"].items()) + "."]
    return "\n".join(lines) + "\n"

def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=7, help="times each step is timed")
    ap.add_argument("--batch", type=int, default=64, help="images a step")
    ap.add_argument("--threads", type=int, default=None, help="threads; left out, torch's own choice")
    ap.add_argument("--peers", type=Path, default=ROOT/"out"/"peers", help="folder that extra peers are installed in")
    ap.add_argument("--out", type=Path, default=ROOT/"benchmarks"/"results", help="folder for speed.json and speed.md")
    args = ap.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    sys.path.append(str(args.peers))
    result = measure(args.rounds, args.batch)
    write_json(args.out/"speed.json", result)
    (args.out/"speed.md").write_text("# Speed\n\n" + table(result))
    print("\n" + table(result))

if __name__ == "__main__": main()
