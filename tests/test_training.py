"The loop: its parts, exact resume, what a card says, and the commands."
import json, math, shlex

import pytest
import torch

from diffusion_book import training as T
from diffusion_book.images import load_digits_images, make_accelerator
from diffusion_book.objective import Denoiser, simple_loss
from diffusion_book.schedules import cosine_schedule, linear_schedule, zero_terminal_snr
from diffusion_book.unet import UNet

DIGITS = load_digits_images()[0][:200]
QUIET = dict(progress=False, precision="fp32", device="cpu", batch_size=8)

def fresh(seed: int = 0, predicts: str = "v", schedule=None, **net) -> Denoiser:
    "A tiny network with first weights from a seed."
    torch.manual_seed(seed)
    return Denoiser(UNet(**(dict(width=(16, 32)) | net)), schedule or cosine_schedule(), predicts, clip=(-1, 1))

def same(a, b) -> bool:
    "Two networks' weights are equal, bit for bit."
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def says(error, *words):
    for w in words: assert w in str(error.value), f"{w!r} is not in {error.value}"

# ------------------------------------------------------------------ parts
def test_ema_is_the_formula():
    net = torch.nn.Linear(1, 1, bias=False)
    values = [1., 5., -2., 7.]
    with torch.no_grad(): net.weight.fill_(values[0])
    ema, want = T.EMA(net, .6), values[0]
    for i, v in enumerate(values):
        with torch.no_grad(): net.weight.fill_(v)
        ema.update(net)
        keep = min(.6, (1 + i)/(10 + i))
        want = keep*want + (1 - keep)*v
    assert math.isclose(ema.net.weight.item(), want, rel_tol=1e-6) and not ema.net.weight.requires_grad
    assert net.weight.item() == values[-1], "the average changed the network"

@pytest.mark.parametrize("decay", [-.1, 1, 1.5])
def test_ema_refuses(decay):
    with pytest.raises(ValueError, match="decay: got"): T.EMA(torch.nn.Linear(1, 1), decay)

def test_learning_rate_rises_and_falls():
    assert T.learning_rate(0, 0, 1.) == .01 and T.learning_rate(0, 49, 1.) == .5
    assert T.learning_rate(.2, 500, 1., hold=0.) == .8 and T.learning_rate(.4, 500, 1.) == T.learning_rate(.2, 500, 1.) == 1
    assert math.isclose(T.learning_rate(.7, 500, 1.), .5) and T.learning_rate(1, 900, 1.) == 0
    for hold in (-.1, 1, 1.5, math.nan):
        with pytest.raises(ValueError, match="hold: got .*, wanted 0 or more, below 1"): T.learning_rate(.5, 500, 1., hold=hold)

def test_draw_batch_covers_every_time():
    run = T.Run(fresh(schedule=cosine_schedule(10)), make_accelerator("cpu", "fp32"), batch_size=4000)
    x0, t, eps = T.draw_batch(run, DIGITS)
    assert t.min() == 1 and t.max() == 10, "times run from 1 to T, both ends included"
    counts = t.bincount(minlength=11)[1:]
    assert ((counts - 400).abs() < 5*(4000*.1*.9)**.5).all()   # five standard deviations
    assert abs(eps.mean()) < 5/eps.numel()**.5 and abs(eps.std() - 1) < 5/(2*eps.numel())**.5

def test_loss_and_times_can_be_exchanged(tmp_path):
    "Both are called as promised, and a run goes on only with the ones that it began with."
    seen = []
    def late(n, generator): return torch.full((n,), 900, device=generator.device)
    def doubled(denoise, x0, t, eps): return seen.append(t) or 2*simple_loss(denoise, x0, t, eps)
    T.train(fresh(), DIGITS, tmp_path, steps=2, loss=doubled, draw_times=late, **QUIET)
    assert len(seen) == 2 and all(t.tolist() == [900]*8 for t in seen)
    with pytest.raises(ValueError, match="draw_times was late, now random_times"):
        T.train(fresh(), DIGITS, tmp_path, steps=4, loss=doubled, resume=True, **QUIET)

def test_only_a_plain_denoiser_is_stored(tmp_path):
    class Other(Denoiser): pass
    plain = fresh()
    other = Other(plain.net, plain.schedule, "v")
    with pytest.raises(TypeError, match="denoise: got a Other"): T.save_model(tmp_path/"m", other)
    with pytest.raises(TypeError, match="denoise: got a Other"): T.train(other, DIGITS, tmp_path/"m", steps=1, **QUIET)
    assert not (tmp_path/"m").exists()

def test_training_lowers_the_loss():
    denoise, x = fresh(), DIGITS
    def loss(net): return simple_loss(Denoiser(net, denoise.schedule, "v"), x, 500, generator=torch.Generator().manual_seed(9)).mean().item()
    before = loss(denoise.net)
    run = T.train(denoise, x, steps=120, decay=.9, **QUIET)
    assert loss(run.ema.net) < .8*before and run.finished and run.step == 120

def test_last_layer_starts_at_zero_so_the_first_loss_is_known():
    "v has mean square signal^2 + noise^2*E[x0^2]; a network that says 0 pays exactly that."
    losses = []
    T.train(fresh(predicts="eps"), DIGITS, steps=1, **(QUIET | dict(batch_size=200)), watch=lambda run, l: losses.append(l.item()))
    n = 200*64
    assert abs(losses[0] - 1) < 5*(2/n)**.5   # the mean of n squared normals, five standard errors

def test_accumulation_changes_only_rounding():
    whole, parts = (T.train(fresh(), DIGITS, steps=3, accumulate=k, **QUIET) for k in (1, 4))
    for a, b in zip(whole.denoise.net.parameters(), parts.denoise.net.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)   # AdamW's first steps are near lr*sign(gradient)

def test_seed_alone_decides():
    torch.manual_seed(1); a = T.train(fresh(), DIGITS, steps=3, **QUIET)
    denoise = fresh(); torch.manual_seed(77); b = T.train(denoise, DIGITS, steps=3, **QUIET)
    assert same(a.denoise.net, b.denoise.net)
    assert not same(a.denoise.net, T.train(fresh(), DIGITS, steps=3, seed=1, **QUIET).denoise.net)

def test_bf16_trains_too():
    losses = []
    run = T.train(fresh(), DIGITS, steps=3, **(QUIET | dict(precision="bf16")), watch=lambda run, l: losses.append(l.item()))
    assert all(map(math.isfinite, losses)) and all(p.dtype == torch.float32 for p in run.ema.net.parameters())
    seen = []
    run.denoise.net.door.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run.denoise(DIGITS[:1], 5)
    assert seen == [torch.float32], "the network was left wrapped"

def test_minutes_bound_the_time():
    run = T.train(fresh(), DIGITS, minutes=.03, **QUIET)
    assert run.finished and run.step >= 1 and 1.8 <= run.seconds < 60

# ------------------------------------------------------------------ resume
class Stop(Exception): pass

def stop_at(n):
    def watch(run, loss):
        if run.step == n: raise Stop
    return watch

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact(precision, tmp_path):
    how = QUIET | dict(precision=precision)
    whole = T.train(fresh(), DIGITS, steps=12, **how)
    with pytest.raises(Stop): T.train(fresh(), DIGITS, tmp_path, steps=12, save_every=0, watch=stop_at(7), **how)
    rest = T.train(fresh(seed=5), DIGITS, tmp_path, steps=12, resume=True, **how)
    assert rest.step == 12 and same(whole.denoise.net, rest.denoise.net) and same(whole.ema.net, rest.ema.net)
    assert torch.equal(whole.generator.get_state(), rest.generator.get_state())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.json", "checkpoint.safetensors", "model.safetensors"]

@pytest.mark.parametrize("change, words", [
    (dict(batch_size=16), ["batch_size was 8, now 16"]), (dict(lr=1e-4), ["lr was 0.002, now 0.0001"]),
    (dict(seed=3), ["seed was 0, now 3"]), (dict(decay=.9), ["decay was 0.9995, now 0.9"]),
    (dict(denoise=dict(predicts="eps")), ["predicts was v, now eps"]),
    (dict(denoise=dict(schedule=linear_schedule())), ["schedule was", "cosine", "linear"]),
    (dict(denoise=dict(width=(16, 16))), ["net was", "[16, 32]", "[16, 16]"])])
def test_resume_refuses_other_settings(change, words, tmp_path):
    T.train(fresh(), DIGITS, tmp_path, steps=1, **QUIET)
    before = (tmp_path/"checkpoint.safetensors").read_bytes()
    change = dict(change)
    denoise = fresh(**change.pop("denoise", {}))
    with pytest.raises(ValueError) as e: T.train(denoise, DIGITS, tmp_path, steps=2, resume=True, **(QUIET | change))
    says(e, "resume:", "other settings", *words)
    assert (tmp_path/"checkpoint.safetensors").read_bytes() == before

def test_checkpoint_without_settings_still_loads(tmp_path):
    "Checkpoints written before settings were kept in them."
    run = T.train(fresh(), DIGITS, tmp_path, steps=2, **QUIET)
    tensors, notes = T.read_tensors(tmp_path/"checkpoint.safetensors")
    assert set(notes) == {"step", "seconds", "updates", "recipe"}
    del notes["recipe"]
    T.write_tensors(tmp_path/"checkpoint.safetensors", tensors, notes)
    assert T.train(fresh(), DIGITS, tmp_path, steps=4, resume=True, **QUIET).step == 4

def test_early_checkpoints_with_numbered_optimiser_state_resume_exactly(tmp_path):
    "Once the optimiser's state was kept by number; now it is by name, so that a network may list its parts in another order."
    whole = T.train(fresh(), DIGITS, steps=6, **QUIET)
    with pytest.raises(Stop): T.train(fresh(), DIGITS, tmp_path, steps=6, save_every=0, watch=stop_at(4), **QUIET)
    tensors, notes = T.read_tensors(tmp_path/"checkpoint.safetensors")
    for i, (name, _) in enumerate(fresh().net.named_parameters()):
        for k in ("exp_avg", "exp_avg_sq", "step"): tensors[f"optimizer.{i}.{k}"] = tensors.pop(f"optimizer.{name}.{k}")
    T.write_tensors(tmp_path/"checkpoint.safetensors", tensors, notes)
    assert same(whole.denoise.net, T.train(fresh(), DIGITS, tmp_path, steps=6, resume=True, **QUIET).denoise.net)

def test_begin_and_resume_ask_for_the_right_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint.safetensors"): T.train(fresh(), DIGITS, tmp_path/"new", steps=1, resume=True, **QUIET)
    T.train(fresh(), DIGITS, tmp_path, steps=1, **QUIET)
    with pytest.raises(FileExistsError, match="resume, or name another"): T.train(fresh(), DIGITS, tmp_path, steps=1, **QUIET)

# ------------------------------------------------------------------ models on disk
@pytest.mark.parametrize("schedule", [linear_schedule(50), zero_terminal_snr(linear_schedule())], ids=["linear", "zero terminal"])
def test_model_round_trip(schedule, tmp_path):
    denoise = fresh(schedule=schedule)
    for p in denoise.net.parameters(): torch.nn.init.normal_(p, std=.1)
    T.save_model(tmp_path, denoise, dict(data="digits", licence="ours"))
    again = T.load_model(tmp_path, "cpu", "fp32")
    assert same(denoise.net, again.net) and again.predicts == "v" and again.clip == (-1, 1)
    assert torch.equal(again.schedule.abar, schedule.abar) and again.card["licence"] == "ours"
    x = DIGITS[:3]
    torch.testing.assert_close(again(x, 9), denoise(x, 9).detach(), rtol=1e-4, atol=1e-5)   # another memory format

def test_half_weights_are_half_the_size(tmp_path):
    sizes = [(T.save_model(tmp_path/str(d), fresh(), dtype=d)/"model.safetensors").stat().st_size for d in (None, torch.float16)]
    assert .45 < sizes[1]/sizes[0] < .6 and next(T.load_model(tmp_path/"torch.float16").net.parameters()).dtype == torch.float32

def test_card_says_how(tmp_path):
    T.train(fresh(), DIGITS, tmp_path, steps=2, card=dict(data="digits"), **QUIET)
    card = json.loads((tmp_path/"card.json").read_text())
    want = dict(data="digits", images=200, size=[1, 8, 8], batch_size=8, lr=2e-3, seed=0, steps=2, finished=True, device="cpu",
                precision="fp32", processes=1, torch=torch.__version__)
    assert {k: card[k] for k in want} == want and 0 <= card["seconds"] < 60 and card["threads"] >= 1
    assert card["parameters"] == sum(p.numel() for p in fresh().net.parameters())

# ------------------------------------------------------------------ the command, called as a function
def test_command_trains_and_its_card_names_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(T.SCALES, "small", dict(width=(16, 32), blocks=1))
    T.diffusion_book_train(data="digits", out=str(tmp_path/"m"), steps=3, batch_size=8, data_dir=str(tmp_path), device="cpu")
    card = json.loads((tmp_path/"m"/"card.json").read_text())
    assert str(tmp_path) not in json.dumps(card), "a card must name no folder of this machine"
    words = shlex.split(card["command"])
    assert words[:3] == ["diffusion_book_train", "--data", "digits"] and "--out" not in words and "--data_dir" not in words
    said = dict(zip(words[1::2], words[2::2]))
    assert said["--steps"] == "3" and said["--batch_size"] == "8" and said["--seed"] == "0" and said["--schedule"] == "cosine"
    assert "3 updates" in capsys.readouterr().out

@pytest.mark.parametrize("wrong, words", [
    (dict(scale="huge"), ["'huge'", "small or laptop or full"]), (dict(schedule="cosin"), ["'cosin'", "cosine"]),
    (dict(data="mnist"), ["'mnist'", '"digits"']), (dict(predicts="noise"), ["'noise'", "eps"]),
    (dict(device="gpu"), ["'gpu'", '"auto"']), (dict(precision="fp8"), ["'fp8'", "bf16"]),
    (dict(steps=0), ["got 0"]), (dict(minutes=-1.), ["-1.0"]), (dict(steps=2, minutes=1.), ["got 2 and 1.0"]), (dict(batch_size=0), ["batch_size: got 0"]),
    (dict(decay=1.), ["decay: got 1.0"]), (dict(resume=True), ["checkpoint.safetensors", "no such file"])])
def test_command_refuses_in_one_line(wrong, words, tmp_path):
    with pytest.raises(SystemExit) as e: T.diffusion_book_train(**(dict(data="digits", out=str(tmp_path/"m"), steps=1) | wrong))
    says(e, *words)
    assert isinstance(e.value.code, str) and "\n" not in e.value.code   # a string: printed, and exit status 1
