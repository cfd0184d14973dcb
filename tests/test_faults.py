"""What goes wrong in the middle: a kill, Ctrl-C, a full disk, a broken file, a loss that is not a number.
After each, the last checkpoint is whole, nothing is left lying about, and the message says what to do."""
import errno, os, random, resource, signal, subprocess, sys
from pathlib import Path

import pytest
import torch

from diffusion_book import images, sampling
from diffusion_book import training as T
from diffusion_book.images import load_digits_images
from diffusion_book.objective import Denoiser, simple_loss
from diffusion_book.schedules import cosine_schedule, linear_schedule, noise_to
from diffusion_book.unet import UNet

DIGITS = load_digits_images()[0][:200]
STEPS, QUIET = 40, dict(progress=False, precision="fp32", device="cpu", batch_size=8)
BIN = Path(sys.executable).parent

def fresh(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(UNet(width=(16, 32)), cosine_schedule(), "v", clip=(-1, 1))

def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def one_thread(): return dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()), MKL_NUM_THREADS=str(torch.get_num_threads()))

def names(folder): return sorted(p.name for p in folder.iterdir())

# ------------------------------------------------------------------ SIGKILL
TRAIN = """
import sys, torch
from diffusion_book.images import load_digits_images
from diffusion_book.objective import Denoiser
from diffusion_book.schedules import cosine_schedule
from diffusion_book.training import train
from diffusion_book.unet import UNet
out, resume = sys.argv[1], sys.argv[2] == "resume"
torch.manual_seed(0)
denoise = Denoiser(UNet(width=(16, 32)), cosine_schedule(), "v", clip=(-1, 1))
train(denoise, load_digits_images()[0][:200], out, steps=%d, save_every=0, resume=resume, progress=False, precision="fp32",
      device="cpu", batch_size=8, watch=lambda run, loss: print(run.step, flush=True))
""" % STEPS

def kill_at(step: int, out: Path, mode: str) -> int:
    "Train in a process that saves after every step, and SIGKILL it once it has said `step`; gives the last step it said."
    said = 0
    with subprocess.Popen([sys.executable, "-c", TRAIN, str(out), mode], stdout=subprocess.PIPE, text=True, env=one_thread()) as p:
        for line in p.stdout:
            said = int(line)
            if said >= step: p.send_signal(signal.SIGKILL)   # at whatever it does now: computing, or writing the file
    assert p.returncode == -signal.SIGKILL, f"it ended by itself: {p.returncode}"
    return said

def test_sigkill_at_a_random_step_then_resume_is_exact(tmp_path):
    first, second = sorted(random.SystemRandom().sample(range(3, STEPS - 4), 2))
    told = f"killed at {first} and {second}"
    kill_at(first, tmp_path, "begin")
    torch.manual_seed(0)
    T.read_tensors(tmp_path/"checkpoint.safetensors")   # whole
    kill_at(second, tmp_path, "resume")
    rest = T.train(fresh(seed=9), DIGITS, tmp_path, steps=STEPS, resume=True, **QUIET)
    whole = T.train(fresh(), DIGITS, steps=STEPS, **QUIET)
    assert same(whole.denoise.net, rest.denoise.net), told
    assert same(whole.ema.net, rest.ema.net), told
    assert names(tmp_path) == ["card.json", "checkpoint.safetensors", "model.safetensors"], told

# ------------------------------------------------------------------ Ctrl-C, and the console scripts
def command(name, *args, **kw):
    return subprocess.run([BIN/name, *map(str, args)], capture_output=True, text=True, timeout=400, env=one_thread(), stdin=subprocess.DEVNULL, **kw)

def test_ctrl_c_then_resume_loses_nothing(tmp_path):
    how = ["--data", "digits", "--steps", "30", "--batch_size", "8", "--device", "cpu", "--precision", "fp32"]
    out = tmp_path/"m"
    with subprocess.Popen([BIN/"diffusion_book_train", *how, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=one_thread()) as p:
        bar = b""
        while b"gone" not in bar.replace(b"  0%", b"") or b"  0%" in bar[-60:]: bar += p.stderr.read(20)   # the first step is done
        p.send_signal(signal.SIGINT)
        told, bar = p.stdout.read().decode(), (bar + p.stderr.read()).decode()
    assert p.returncode == 0 and "--resume goes on" in told and "Traceback" not in bar, (told, bar)
    stopped = T.load_model(out).card
    assert not stopped["finished"] and 0 < stopped["steps"] < 30 and f"{stopped['steps']} updates" in told
    again = command("diffusion_book_train", *how, "--out", out, "--resume")
    assert again.returncode == 0 and "30 updates" in again.stdout, again.stderr
    assert "left" in again.stderr and "loss=" in again.stderr, "no progress bar with loss and time left"
    T.diffusion_book_train(data="digits", steps=30, batch_size=8, device="cpu", precision="fp32", out=str(tmp_path/"whole"))
    assert same(T.load_model(out).net, T.load_model(tmp_path/"whole").net)
    drawn = command("diffusion_book_sample", "--model", out, "--n", 4, "--steps", 3, "--out", tmp_path/"x.png")
    assert drawn.returncode == 0 and {"x.png", "x.json"} <= set(names(tmp_path)), drawn.stderr

def test_command_errors_exit_with_one_line(tmp_path):
    done = command("diffusion_book_train", "--data", "digits", "--schedule", "cosin", "--steps", 1, "--out", tmp_path/"m")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "'cosin'" in done.stderr and "cosine" in done.stderr

def test_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)    # a job in the background may ignore it
    with pytest.raises(KeyboardInterrupt), images.stop_politely() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked["stop"]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before

# ------------------------------------------------------------------ a full disk
@pytest.fixture
def checkpoint(tmp_path):
    "A run that has got to step 3, and the bytes of its checkpoint."
    T.train(fresh(), DIGITS, tmp_path, steps=3, **QUIET)
    path = tmp_path/"checkpoint.safetensors"
    return path, path.read_bytes()

def still_whole(path, before, steps: int = 5):
    "The old checkpoint is untouched, nothing lies beside it, and the run goes on from it."
    assert path.read_bytes() == before
    assert names(path.parent) == ["card.json", "checkpoint.safetensors", "model.safetensors"]
    assert T.train(fresh(), DIGITS, path.parent, steps=steps, resume=True, **QUIET).step == steps

def test_no_space_left(checkpoint, monkeypatch):
    path, before = checkpoint
    def full(tensors, to, *a):
        Path(to).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(images, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*No space left.*untouched"):
        T.train(fresh(), DIGITS, path.parent, steps=5, resume=True, **QUIET)
    monkeypatch.undo()
    tensors, notes = T.read_tensors(path)   # of step 3: with save_every=0 nothing later was good enough to be saved
    assert notes["step"] == 3 and all(v.isfinite().all() for v in tensors.values())
    still_whole(path, path.read_bytes())

def test_file_too_large_for_the_system(checkpoint):
    "A real write that fails half-way, whoever runs this: the system's limit on a file's size."
    path, before = checkpoint
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before)//2, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write .*untouched"):
            T.train(fresh(), DIGITS, path.parent, steps=5, resume=True, **QUIET)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    still_whole(path, before)

def test_full_tmpfs(checkpoint, tmp_path):
    "A real full disk, where this system lets one be made."
    path, before = checkpoint
    disk = tmp_path/"disk"
    disk.mkdir()
    size = 2*len(before)   # room for the checkpoint, the model and the card, not for a second checkpoint
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True) if os.name == "posix" else None
    if not mounted or mounted.returncode: pytest.skip("no permission to mount a small disk; the two tests above do without")
    try:
        for name in ["checkpoint.safetensors", "model.safetensors", "card.json"]: (disk/name).write_bytes((path.parent/name).read_bytes())
        with pytest.raises(OSError, match="could not write .*untouched"):
            T.train(fresh(), DIGITS, disk, steps=5, resume=True, **QUIET)
        assert (disk/"checkpoint.safetensors").read_bytes() == before and len(names(disk)) == 3
    finally: subprocess.run(["umount", disk], check=True)

def test_command_says_so_when_it_cannot_write(tmp_path):
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(SystemExit) as e: T.diffusion_book_train(data="digits", steps=1, out=str(tmp_path/"file"/"m"))
    assert "NotADirectoryError" in e.value.code and "\n" not in e.value.code

# ------------------------------------------------------------------ broken and foreign files
@pytest.mark.parametrize("harm, words", [
    (lambda b: b[:len(b)//2], ["cut short"]), (lambda b: b[:5], ["cut short"]), (lambda b: b"", ["cut short"]),
    (lambda b: b"PK\x03\x04 a pickle in a zip, say" + b[29:], ["cut short, or no safetensors file"])],
    ids=["half", "five bytes", "empty", "foreign"])
def test_broken_checkpoint(harm, words, checkpoint):
    path, before = checkpoint
    path.write_bytes(harm(before))
    broken = path.read_bytes()
    with pytest.raises(ValueError) as e: T.train(fresh(), DIGITS, path.parent, steps=5, resume=True, **QUIET)
    for w in [str(path), *words]: assert w in str(e.value)
    assert path.read_bytes() == broken, "what could not be read was overwritten"

def test_checkpoint_of_something_else(checkpoint):
    path, _ = checkpoint
    T.write_tensors(path, {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"tensors don't fit this network, such as .*got None, wanted"):
        T.train(fresh(), DIGITS, path.parent, steps=5, resume=True, **QUIET)

@pytest.mark.parametrize("card", ["", "no json", "[]", "{}", '{"net": {"depth": 3}, "schedule": {}, "predicts": "v", "clip": null}'])
def test_broken_card(card, checkpoint):
    folder = checkpoint[0].parent
    (folder/"card.json").write_text(card)
    with pytest.raises(ValueError, match="card.json: got no card of a model"): T.load_model(folder)

def test_model_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="card.json"): T.load_model(tmp_path)

def test_weights_of_another_network(checkpoint):
    folder = checkpoint[0].parent
    T.save_model(folder/"other", Denoiser(UNet(width=(16, 16)), cosine_schedule()))
    (folder/"model.safetensors").write_bytes((folder/"other"/"model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model.safetensors: \d+ tensors don't fit this network"): T.load_model(folder)

# ------------------------------------------------------------------ a loss that is not a number
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_not_finite_stops_and_keeps_the_last_good_checkpoint(value, checkpoint):
    path, _ = checkpoint
    def poisoned(denoise, x0, t, eps): return simple_loss(denoise, x0, t, eps)*value
    poisoned.__name__ = "simple_loss"       # so that the checkpoint takes it for the same run
    with pytest.raises(FloatingPointError, match=r"loss: got (nan|inf) by step \d+, .*not saved; try a lower lr"):
        T.train(fresh(), DIGITS, path.parent, steps=60, save_every=0, resume=True, loss=poisoned, **QUIET)
    tensors, notes = T.read_tensors(path)   # of step 3: with save_every=0 nothing later was good enough to be saved
    assert notes["step"] == 3 and all(v.isfinite().all() for v in tensors.values())
    still_whole(path, path.read_bytes())

# ------------------------------------------------------------------ names and ranges
@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu:x"])
def test_bad_device(device):
    with pytest.raises(ValueError) as e: images.pick_device(device)
    assert f"device: got {device!r}, wanted" in str(e.value)

@pytest.mark.parametrize("x, error", [(torch.rand(4, 1, 8, 8), ValueError), (DIGITS[:, 0], ValueError), (DIGITS.byte(), TypeError), (DIGITS*2, ValueError)])
def test_training_refuses_what_are_no_images(x, error):
    with pytest.raises(error, match="images: got .* wanted float32 in"): T.train(fresh(), x, steps=1, **QUIET)

def test_training_refuses_other_channels():
    with pytest.raises(ValueError, match=r"xt: got shape .* wanted \(batch, 1"): T.train(fresh(), DIGITS.repeat(1, 3, 1, 1), steps=1, **QUIET)

@pytest.mark.parametrize("t", [-1, 1001, torch.tensor([1, 5000])])
def test_times_out_of_range(t):
    x, schedule = DIGITS[:2], linear_schedule()
    for call in (lambda: noise_to(x, t, schedule), lambda: fresh()(x, t), lambda: simple_loss(fresh(), x, t)):
        with pytest.raises(ValueError, match="t: got .* wanted 0 to 1000"): call()

def test_unknown_model_and_sampler(tmp_path):
    with pytest.raises(ValueError, match="name: got 'fashon', wanted "): T.load_pretrained("fashon")
    for kw, word in [(dict(model="fashon"), "'fashon'"), (dict(sampler="dppm"), "'dppm'")]:
        with pytest.raises(SystemExit) as e: sampling.diffusion_book_sample(out=str(tmp_path/"x.png"), n=1, steps=2, **kw)
        assert word in e.value.code and "wanted" in e.value.code
