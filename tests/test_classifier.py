"The classifier: shapes, seeds, augmentation pixel by pixel, what ships, and bad input."
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_book.classifier import (
    SHIPPED, Classifier, accuracy, augment, draw_augment, in_batches, load_classifier, train_classifier)
from diffusion_book.images import load_digits_images, write_json, write_tensors
from diffusion_book.pictures import load_fashion

QUICK = dict(width=(8, 16, 32), precision="fp32", progress=False, augment=lambda x, g: x, batch_size=32)


def pictures(n=6, side=12, channels=1):
    return torch.rand(n, channels, side, side + 3, generator=torch.Generator().manual_seed(0))*2 - 1


@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 12), st.integers(5, 40), st.integers(5, 40))
@settings(deadline=None, max_examples=15)
def test_shapes(n, channels, classes, height, width):
    net, x = Classifier(channels, classes, (4, 5, 6)).eval(), torch.zeros(n, channels, height, width)
    assert net.features(x).shape == (n, 6) and net(x).shape == (n, classes) and net.features(x).min() >= 0


def test_a_picture_does_not_depend_on_its_batch():
    net, x = load_classifier(), load_fashion("test")[0][:20]
    torch.testing.assert_close(net(x)[3:4], net(x[3:4]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_batches(net, x, 7), net(x), rtol=1e-4, atol=1e-4)
    assert not net.training and not any(p.requires_grad for p in net.parameters())


# ------------------------------------------------------------------ augmentation
@given(st.integers(0, 10_000), st.integers(0, 3), st.integers(0, 6))
@settings(deadline=None, max_examples=20)
def test_augment_pixel_by_pixel(seed, shift, hole):
    "Each pixel is the one that the draw names, black where it lies outside, grey in the hole."
    x, g = pictures(), torch.Generator()
    rows, cols, holes = draw_augment(x, g.manual_seed(seed), shift, hole)
    got = augment(x, g.manual_seed(seed), shift, hole)
    assert got.shape == x.shape and got.dtype == x.dtype
    for i in range(len(x)):
        for r in range(0, 12, 3):
            for c in range(0, 15, 4):
                y, z = rows[i, r].item(), cols[i, c].item()
                want = x[i, 0, y, z].item() if 0 <= y < 12 and 0 <= z < 15 else -1.
                assert got[i, 0, r, c].item() == (0. if holes[i, 0, r, c] else want)


def test_augment_without_anything_is_a_flip():
    x = pictures(200)
    got = augment(x, torch.Generator().manual_seed(0), 0, 0)
    same, mirrored = ((got == o).flatten(1).all(1) for o in (x, x.flip(3)))
    assert (same ^ mirrored).all() and .35 < same.double().mean() < .65     # 4 standard errors of 200 draws: .14


def test_holes_are_whole_and_in_half_of_the_pictures():
    holes = draw_augment(torch.zeros(400, 1, 28, 28), torch.Generator().manual_seed(0))[2]
    size = holes.flatten(1).sum(1)
    assert size.max() == 64 and abs((size > 0).double().mean() - .5) < .1 + .02   # 4 standard errors; a hole's centre is always inside


# ------------------------------------------------------------------ training
def test_it_learns_and_a_seed_repeats_it():
    x, y = load_digits_images()
    before, losses = torch.get_rng_state(), []
    net = train_classifier(x[:1200], y[:1200], 3, **QUICK, watch=lambda net, step, loss: losses.append(loss.item()))
    assert torch.equal(before, torch.get_rng_state()), "the global random state was touched"
    assert len(losses) == 3*(1200//32) and losses[-1] < .6*losses[0]
    assert accuracy(net, x[1200:], y[1200:]) > .7
    nets = [train_classifier(x[:96], y[:96], 1, **QUICK, seed=s) for s in (0, 0, 1)]
    a, b, c = (torch.cat([p.flatten() for p in n.parameters()]) for n in nets)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_few_pictures_and_many_classes():
    x, y = pictures(5), torch.tensor([0, 1, 11, 3, 2])
    net = train_classifier(x, y, 1, **QUICK)
    assert net(x).shape == (5, 12) and net.config["classes"] == 12


# ------------------------------------------------------------------ what ships
def test_shipped():
    net, (x, y) = load_classifier(), load_fashion("test")
    card = json.loads((SHIPPED/"card.json").read_text())
    assert card["test_accuracy"] >= .935 and card["images"] == 60_000 and "--data_dir" in card["command"]
    assert card["parameters"] == sum(p.numel() for p in net.parameters())
    assert abs(accuracy(net, x, y) - card["test_accuracy"]) < 4*(.06*.94/2000)**.5
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 1_500_000


def test_own_folder(tmp_path):
    net = Classifier(3, 4, (4, 5, 6)).eval()
    write_json(tmp_path/"card.json", dict(net=net.config))
    write_tensors(tmp_path/"model.safetensors", net.state_dict())
    x = torch.zeros(2, 3, 9, 9)
    assert torch.equal(load_classifier(tmp_path)(x), net(x))
    write_json(tmp_path/"card.json", dict(net=Classifier(3, 5, (4, 5, 6)).config))
    load_classifier.cache_clear()
    with pytest.raises(ValueError, match="don't fit this network, such as head"): load_classifier(tmp_path)


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize("labels, message", [
    (torch.zeros(6), "labels: got torch.float32"), (torch.zeros(5).long(), r"got torch.int64 of shape \(5,\), wanted int64 of shape \(6,\)"),
    (torch.tensor([0, 1, 2, 3, 4, -1]), "each 0 or more"), ([0]*6, "got list")])
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message): train_classifier(pictures(), labels)
    with pytest.raises(ValueError, match=message): accuracy(load_classifier(), pictures(), labels)


def test_bad_images_and_numbers():
    x, y = pictures(), torch.zeros(6).long()
    with pytest.raises(ValueError, match="images: got values"): train_classifier(5*x, y)
    with pytest.raises(ValueError, match="NaN"): train_classifier(x*float("nan"), y)
    with pytest.raises(ValueError, match="epochs, batch_size: got 0, 128"): train_classifier(x, y, 0)
    with pytest.raises(ValueError, match="epochs, batch_size: got 1, 1"): train_classifier(x, y, 1, 1)
