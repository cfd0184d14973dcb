"Images as tensors, bytes, sheets and films: properties over many inputs, and errors that say what came and what was wanted."
import io

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from diffusion_book import pictures
from diffusion_book.pictures import (CLASS_NAMES, PALETTE, at_scale, book_style, check_centroids, check_nearest,
                                     check_unit_to_uint8, film, from_uint8, image_grid, load_fashion, load_results, show_images,
                                     to_uint8)


floats = st.floats(allow_nan=False, allow_infinity=True, width=32)

@given(st.binary(min_size=1, max_size=300))
def test_every_byte_survives_the_round_trip(data):
    x = torch.tensor(list(data), dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(x)), x)

@given(st.lists(floats, min_size=1, max_size=50))
def test_bytes_are_nearest_and_clipped(values):
    x = torch.tensor(values)
    back, want = from_uint8(to_uint8(x)), x.clamp(-1, 1)
    assert ((back - want).abs() <= .5/127.5 + 1e-6).all()                       # nearest byte
    assert (to_uint8(x.sort()[0]).diff(dim=0).int() >= 0).all() if len(x) > 1 else True   # no wrap-around: order is kept

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_becomes_bytes(dtype):
    assert to_uint8(torch.tensor([-1, 0, 1, 3], dtype=dtype)).tolist() == [0, 128, 255, 255]

def test_nan_and_infinities_are_drawn():
    assert to_uint8(torch.tensor([float("nan"), -float("inf"), float("inf")])).tolist() == [0, 0, 255]

@given(n=st.integers(1, 12), c=st.sampled_from([1, 3]), h=st.integers(1, 5), w=st.integers(1, 5),
       ncols=st.one_of(st.none(), st.integers(1, 15)), pad=st.integers(0, 3))
def test_sheet_holds_every_image_once(n, c, h, w, ncols, pad):
    x = torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(n))*1.8 - .95
    sheet, (rows, cols) = image_grid(x, ncols, pad), pictures._layout(x, ncols)
    assert sheet.shape == (c, rows*(h + pad) - pad, cols*(w + pad) - pad) and rows*cols >= n > (rows - 1)*cols
    for i in range(n):
        r, k = divmod(i, cols)
        assert torch.equal(sheet[:, r*(h + pad):r*(h + pad) + h, k*(w + pad):k*(w + pad) + w], x[i])
    assert (sheet == 1).sum() == sheet.numel() - x.numel()                      # the rest is white

@settings(max_examples=10)
@given(n=st.integers(1, 6), scale=st.integers(1, 3), c=st.sampled_from([1, 3]))
def test_film_has_every_frame(n, scale, c):
    frames = [torch.full((c, 4, 5), -1 + 2*i/6) for i in range(n)]
    gif = Image.open(io.BytesIO(film(frames, scale=scale)))
    assert gif.format == "GIF" and getattr(gif, "n_frames", 1) == n and gif.size == (5*scale, 4*scale)

def test_a_film_of_batches_is_laid_out():
    gif = Image.open(io.BytesIO(film([torch.zeros(6, 1, 4, 4), torch.ones(6, 1, 4, 4)], scale=1, ncols=6)))
    assert gif.size == (6*4 + 5*2, 4)

def test_shared_scale_whatever_the_content():
    import matplotlib.pyplot as plt
    fig = show_images(torch.full((2, 1, 3, 3), .1))
    image = fig.axes[0].images[0]
    assert image.get_clim() == (0, 255) and image.get_array()[0, 0] == to_uint8(torch.tensor(.1)).item()
    plt.close(fig)

def test_data_is_balanced_and_in_range():
    for split, n in ("train", 10_000), ("test", 2_000):
        x, y = load_fashion(split)
        assert x.shape == (n, 1, 28, 28) and x.dtype == torch.float32 and y.dtype == torch.int64
        assert (x.min(), x.max()) == (-1, 1) and y.bincount().tolist() == [n//10]*10 and len(CLASS_NAMES) == 10

def test_scale_follows_the_variable(monkeypatch):
    monkeypatch.delenv("DIFFUSION_BOOK_SCALE", raising=False); assert at_scale(1, 2) == 1
    monkeypatch.setenv("DIFFUSION_BOOK_SCALE", "laptop"); assert at_scale(1, 2) == 1
    monkeypatch.setenv("DIFFUSION_BOOK_SCALE", "full"); assert at_scale(1, 2) == 2
    for bad in "FULL", "", "large":
        monkeypatch.setenv("DIFFUSION_BOOK_SCALE", bad)
        with pytest.raises(ValueError, match=f"DIFFUSION_BOOK_SCALE: got {bad!r}, wanted"): at_scale(1, 2)

def test_stored_results_are_found_from_the_chapters_and_from_the_top(monkeypatch, tmp_path):
    (tmp_path/"nbs"/"results").mkdir(parents=True)
    (tmp_path/"nbs"/"results"/"found.json").write_text('{"command": "run me"}')
    for folder in tmp_path, tmp_path/"nbs":
        monkeypatch.chdir(folder)
        assert load_results("found.json") == {"command": "run me"}
        with pytest.raises(FileNotFoundError, match="name: got 'lost.json', wanted a file in the book's nbs/results"): load_results("lost.json")

def test_style_gives_each_curve_its_own_dashes():
    import matplotlib.pyplot as plt
    with plt.rc_context():
        book_style()
        styles = [(s["color"], str(s["linestyle"])) for s in plt.rcParams["axes.prop_cycle"]]
    assert len({c for c, _ in styles}) == len({d for _, d in styles}) == len(styles)
    assert {c for c, _ in styles} <= set(PALETTE.values()) and len(set(PALETTE.values())) == len(PALETTE)

@pytest.mark.parametrize("call, error, words", [
    (lambda: from_uint8(torch.zeros(2)), TypeError, "x: got dtype torch.float32, wanted torch.uint8"),
    (lambda: to_uint8(torch.zeros(2, dtype=torch.uint8)), TypeError, "x: got dtype torch.uint8, wanted floating point"),
    (lambda: image_grid(torch.zeros(28, 28)), ValueError, r"x: got shape \(28, 28\), wanted"),
    (lambda: image_grid(torch.zeros(2, 2, 4, 4)), ValueError, r"x: got shape \(2, 2, 4, 4\), wanted"),
    (lambda: image_grid(torch.zeros(0, 1, 4, 4)), ValueError, "n at least 1"),
    (lambda: image_grid(torch.zeros(2, 1, 4, 4), 0), ValueError, "ncols: got 0, wanted"),
    (lambda: show_images(torch.zeros(2, 1, 4, 4), titles=["a"]), ValueError, "titles: got 1 for 2 images"),
    (lambda: film([]), ValueError, "frames: got none, wanted"),
    (lambda: load_fashion("valid"), ValueError, "split: got 'valid', wanted"),
])
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words): call()

def centroids_of(x, y): return torch.stack([x[y == k].mean(0) for k in range(int(y.max()) + 1)])
def nearest(x, c): return torch.cdist(x.flatten(1), c.flatten(1)).argmin(1)

def test_checkers_pass_the_right_answers():
    check_unit_to_uint8(lambda x: (x.clamp(0, 1)*255).round().to(torch.uint8))
    check_centroids(centroids_of)
    check_nearest(nearest)

@pytest.mark.parametrize("check, wrong, words", [
    (check_unit_to_uint8, lambda x: (x.clamp(0, 1)*255).to(torch.uint8), "round"),
    (check_unit_to_uint8, lambda x: (x*255).round().long().to(torch.uint8), "clip"),
    (check_unit_to_uint8, lambda x: (x.clamp(0, 1)*256).long().to(torch.uint8), "clip|256"),
    (check_centroids, lambda x, y: torch.stack([x[y == k].sum(0)/2 for k in range(3)]), "same number"),
    (check_centroids, lambda x, y: x.mean(0, keepdim=True), "shape"),
    (check_nearest, lambda x, c: (x[:, None] - c).sum((2, 3, 4)).abs().argmin(1), "cancel"),
    (check_nearest, lambda x, c: torch.cdist(x.flatten(1), c.flatten(1)).argmax(1), "farthest"),
])
def test_checkers_reject_the_wrong_ones(check, wrong, words):
    with pytest.raises(AssertionError, match=words): check(wrong)
