"Two processes train as one does: the same losses at the same global batch, and the same weights in both."
import json, os, socket, subprocess, sys

import pytest
import torch

TRAIN = """
import json, os, sys, torch
from diffusion_book.images import load_digits_images
from diffusion_book.objective import Denoiser
from diffusion_book.schedules import cosine_schedule
from diffusion_book.training import train
from diffusion_book.unet import UNet
torch.manual_seed(0)
denoise, losses = Denoiser(UNet(width=(16, 32)), cosine_schedule(), "v", clip=(-1, 1)), []
def watch(run, loss): losses.append(run.accelerator.reduce(loss, "mean").item())
run = train(denoise, load_digits_images()[0][:200], sys.argv[1], steps=8, batch_size=16, accumulate=2, device="cpu", precision="fp32",
            save_every=0, resume="resume" in sys.argv, progress=False, watch=watch)
total = sum(p.double().abs().sum().item() for p in run.ema.net.parameters())
with open(f"{sys.argv[1]}.{run.accelerator.process_index}.json", "w") as f:
    json.dump(dict(losses=losses, total=total, processes=run.accelerator.num_processes), f)
"""

def port() -> int:
    "A port that nobody listens on now."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def train(folder, script, *launcher) -> list:
    "Run the script, alone or by a launcher; what each process wrote."
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    done = subprocess.run([sys.executable, *launcher, str(script), str(folder)], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(p.read_text()) for p in sorted(folder.parent.glob(f"{folder.name}.*.json"))]

@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_accelerate_launch_with_two_cpu_processes(tmp_path):
    script = tmp_path/"train.py"
    script.write_text(TRAIN)
    # `--cpu` starts one process unless there is MPI; `--multi_gpu` starts as many as asked, and `device="cpu"` keeps them off GPUs.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port())]
    one, = train(tmp_path/"one", script)
    first, second = train(tmp_path/"two", script, *launch)
    assert one["processes"] == 1 and first["processes"] == second["processes"] == 2
    assert first["losses"] == second["losses"] and first["total"] == second["total"], "the two processes drifted apart"
    # Only the order of additions differs, 1e-7 in a gradient; AdamW divides by its size, so a gradient near zero may turn its
    # small step round, which moves later losses by less than 1e-3 of themselves. A wrong share or scale moves them by 1e-1.
    for a, b in zip(one["losses"], first["losses"], strict=True): assert abs(a - b) < 1e-3*a, (one["losses"], first["losses"])
    assert one["losses"][0] > 1.02*one["losses"][-1] or one["losses"][0] < .98*one["losses"][-1], "eight steps changed nothing"
    assert (tmp_path/"two"/"model.safetensors").exists() and not list((tmp_path/"two").glob("*.part"))
