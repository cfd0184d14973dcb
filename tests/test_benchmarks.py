"The benchmarks run: tiny, once; and what they stored says what it was measured on."
import json
import time
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"benchmarks"))
import peers, recipe, samplers, speed
from diffusion_book.pictures import load_fashion

def run(script, *args):
    done = subprocess.run([sys.executable, str(ROOT/"benchmarks"/script), *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=600, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout

def test_speed_measures_and_compares():
    result = speed.measure(rounds=1, batch=2, at_least=0, width=(8, 16), peers={speed.RIVAL: speed.PEERS[speed.RIVAL]})
    assert [r["name"] for r in result["rows"]] == [speed.OURS, speed.RIVAL, speed.RIVAL]
    for row in result["rows"]:
        for number in ("parameters", "mflop_forward", "train_img_s", "sample_img_s", "train_share", "sample_share"): assert row[number] > 0
        assert 2.5 < row["mflop_training"]/row["mflop_forward"] < 3.1     # backward is about two forwards
    assert result["peak_gflop_s"] > 0 and result["train_ratio"]["median"] > 0 and result["sample_ratio"]["rival_memory"] in speed.FORMATS
    page = speed.table(result)
    assert page.count(speed.RIVAL) == 2 and "times** as fast" in page and "threads" in page

def test_speed_counts_the_operations():
    forward, _ = speed.flops(speed.UNet())
    assert speed.flops(speed.UNet().to(memory_format=speed.torch.channels_last))[0] == forward
    assert forward == 2*100_821_504, f"{forward/2:.0f} multiply-adds: the network's work has changed"

def test_speed_says_who_is_missing():
    def absent(): import a_package_that_does_not_exist
    ready, missing = speed.contenders((4,), {"somebody": absent})
    assert len(ready) == 1 and "a_package_that_does_not_exist" in missing["somebody"]

def test_stand_ins_do_not_stay():
    with speed.stand_in("a_package_that_does_not_exist"): import a_package_that_does_not_exist
    with pytest.raises(ImportError): import a_package_that_does_not_exist

def test_ablations_run(tmp_path):
    run("ablations.py", "--steps", 2, "--seeds", 1, "--batch", 2, "--width", 4, 4, "--draw", 1, "--moves", 2, "--out", tmp_path)
    result = json.loads((tmp_path/"ablations.json").read_text())
    assert result["steps"] == 2 and all(len(r[0]["loss"]) == len(result["times"]) for r in result["runs"].values())
    assert (tmp_path/"ablations.png").read_bytes()[:4] == b"\x89PNG"

def test_quality_runs(tmp_path):
    run("quality.py", "--minutes", .001, "--steps", 2, "--n", 2, "--held-out", 4, "--out", tmp_path)
    result = json.loads((tmp_path/"quality.json").read_text())
    assert [r["name"] for r in result["rows"]] == [speed.OURS, speed.RIVAL] and all(r["steps"] >= 1 for r in result["rows"])
    assert all(set(r["x0_error"]) == {f"{o:g}" for o in result["log_snr_levels"]} for r in result["rows"])
    assert (tmp_path/"quality.png").read_bytes()[:4] == b"\x89PNG"

@pytest.mark.parametrize("name", ["diffusion_book", "diffusers"])
def test_contestants_train_and_draw(name):
    draw, steps, seen = peers.MAKERS[name](load_fashion()[0][:100], peers.Budget(.001, time.process_time), 0)
    x = peers.in_parts(draw, 2)(3, 2)
    assert x.shape == (3, 1, 28, 28) and x.isfinite().all() and steps >= 1 and seen >= 64*steps

def test_table_of_peers_shows_intervals_and_floor():
    score = dict(value=1.5, interval=(1.25, 1.75), floor=.125)
    row = dict(name="somebody", steps=1000, images_seen=64_000, scores={k: score for k in peers.COLUMNS})
    page = peers.table(dict(minutes=10., clock="wall", evaluations=50, n=2000, rows=[row]))
    assert "| somebody | 1,000 | 64,000 | 1.5 (1.25 to 1.75) |" in page and "| as many training images |  |  | 0.125 |" in page

@pytest.mark.parametrize("name", samplers.WALKS)
def test_every_sampler_of_the_figure_keeps_to_its_budget(name):
    for budget in (1, 4):
        x, calls, _ = samplers.draw(name, budget, n=2, seed=0, batch=2)
        assert x.shape == (2, 1, 28, 28) and x.isfinite().all()
        assert budget - 1 <= calls <= budget, f"{calls} evaluations for a budget of {budget}"

def test_weighing_by_min_snr_moves_no_loss_on_average():
    "Over all whole times the weights have mean 1, and they are min-SNR's (gamma 5) up to that factor."
    denoise, _ = recipe.fresh({}, 0)
    x0, eps = torch.randn(2, 1000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.arange(1, 1001)
    with torch.no_grad(): plain, weighed = (loss(denoise, x0, t, eps) for loss in (recipe.LOSSES["plain"], recipe.LOSSES["min_snr"]))
    weight, snr = weighed/plain, (denoise.schedule.signal(t)/denoise.schedule.noise(t))**2
    assert abs(weight.mean() - 1) < 1e-4
    expected = snr.clamp(max=5)/(snr + 1)
    torch.testing.assert_close(weight, (expected/expected.mean()).float(), rtol=1e-3, atol=1e-6)


def test_recipe_gives_every_row_its_price_and_score(tmp_path, monkeypatch):
    monkeypatch.setitem(recipe.RECIPE, "width", (8, 16))
    images = load_fashion()[0][:200]
    made = recipe.row("batch of 64", 0, images, 4, 150, recipe.cost("batch of 64", images, rounds=1))
    assert made["images_seen"] == 64*made["updates"] and made["updates"] == round(4/made["cost"]) and made["frechet"] > 1
    assert recipe.cost("the recipe", images) == 1
    for name, changes in recipe.ROWS.items():
        assert all(k in recipe.RECIPE and recipe.RECIPE[k] != v for k, v in changes.items()), f"{name} changes nothing"

def stored(name):
    path = ROOT/"benchmarks"/"results"/name
    if not path.exists(): pytest.skip(f"{name} has not been made: see benchmarks/README.md")
    return json.loads(path.read_text())

def test_stored_speed():
    result = stored("speed.json")
    assert result["machine"]["cpu"] and result["machine"]["threads"] and result["machine"]["versions"]["diffusers"]
    assert abs(result["parameter_ratio"] - 1) <= .05, "the comparison is to be at equal parameters, 5 % up or down"
    assert result["train_ratio"]["median"] >= 3
    mine = next(r for r in result["rows"] if r["name"] == speed.OURS)
    assert mine["train_share"] >= .45 and mine["sample_share"] >= .50
    assert (ROOT/"benchmarks"/"results"/"speed.md").read_text() == "# Speed\n\n" + speed.table(result)

def test_stored_quality():
    ours, theirs = stored("quality.json")["rows"]
    assert ours["images_seen"] > theirs["images_seen"]
    better = [ours["x0_error"][k] < theirs["x0_error"][k] for k in ours["x0_error"]]
    assert sum(better) > len(better)/2, "after the same minutes our estimates should be closer at most noise levels"
