"The data: what is accepted, what is refused, and that a download is checked, whole or not there."
import gzip, hashlib, http.server, re, struct, threading

import numpy as np
import pytest
import torch

from diffusion_book import images as I

def idx(array: np.ndarray) -> bytes:
    "An IDX file of bytes."
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()

def says(error, *words):
    "Every word is in the message."
    for w in words: assert w in str(error.value), f"{w!r} is not in {error.value}"

# ------------------------------------------------------------------ what counts as images
def good(*shape): return torch.rand(shape, generator=torch.Generator().manual_seed(0))*2 - 1

@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 3, 5, 7), (4, 1, 28, 28)])
def test_images_are_accepted_and_returned(shape):
    x = good(*shape)
    assert I.check_images(x) is x

REFUSED = {
    "array": (np.zeros((2, 1, 8, 8)), TypeError, ["ndarray", "float32"]),
    "three axes": (good(2, 8, 8), ValueError, ["(2, 8, 8)", "(batch, channels, height, width)"]),
    "none at all": (good(0, 1, 8, 8), ValueError, ["(0, 1, 8, 8)"]),
    "bytes": (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), TypeError, ["torch.uint8", "float32", "127.5"]),
    "float64": (good(2, 1, 8, 8).double(), TypeError, ["torch.float64", "float32"]),
    "NaN": (good(2, 1, 8, 8)/0*0, ValueError, ["NaN"]),
    "0 to 255": (good(2, 1, 8, 8)*127.5 + 127.5, ValueError, ["values", "[-1, 1]"]),
    "0 to 1": (good(2, 1, 8, 8)/2 + .5, ValueError, ["[-1, 1]", "2*x - 1"]),
}
@pytest.mark.parametrize("what", REFUSED)
def test_other_things_are_refused(what):
    x, error, words = REFUSED[what]
    with pytest.raises(error) as e: I.check_images(x, "photos")
    says(e, "photos: got", "wanted", *words)

# ------------------------------------------------------------------ IDX files
def test_read_idx_round_trip(tmp_path):
    a = np.arange(2*3*4, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path/"a").write_bytes(idx(a))
    (tmp_path/"a.gz").write_bytes(gzip.compress(idx(a)))
    for name in ["a", "a.gz"]: assert np.array_equal(I.read_idx(tmp_path/name, hashlib.sha256(idx(a)).hexdigest()), a)

@pytest.mark.parametrize("raw, words", [
    (b"PNG, say", ["first bytes", "IDX"]), (b"", ["first bytes"]), (bytes([0, 0, 8, 3, 0]), ["IDX"]),
    (idx(np.zeros((4, 5), np.uint8))[:-3], ["17 values", "[4, 5]"]),
    (gzip.compress(idx(np.zeros((40, 50), np.uint8)))[:-12], ["cut short"]), (b"\x1f\x8bnonsense", ["cut short"])])
def test_read_idx_refuses(raw, words, tmp_path):
    (tmp_path/"a").write_bytes(raw)
    with pytest.raises(ValueError) as e: I.read_idx(tmp_path/"a")
    says(e, str(tmp_path/"a"), *words)

def test_read_idx_checks_the_sum(tmp_path):
    (tmp_path/"a").write_bytes(idx(np.zeros((4, 5), np.uint8)))
    with pytest.raises(ValueError) as e: I.read_idx(tmp_path/"a", "0"*64)
    says(e, "got sha256", "wanted " + "0"*64)

# ------------------------------------------------------------------ the full set: a folder, or a download
@pytest.fixture
def upstream(tmp_path, monkeypatch):
    "A local server with four small files in the place of the published ones, and a count of requests."
    g, folder, files = np.random.default_rng(0), tmp_path/"upstream", {}
    folder.mkdir()
    for name in I.FASHION_FILES:
        n = 6 if name.startswith("train") else 4
        raw = idx(g.integers(0, 256, (n, 28, 28) if "images" in name else n, dtype=np.uint8))
        packed = gzip.compress(raw, mtime=0)
        (folder/f"{name}.gz").write_bytes(packed)
        files[name] = tuple(hashlib.sha256(o).hexdigest() for o in (packed, raw))
    asked = []
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a): super().__init__(*a, directory=folder)
        def log_message(self, *a): asked.append(self.path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(I, "FASHION_FILES", files)
    monkeypatch.setattr(I, "FASHION_URL", f"http://127.0.0.1:{server.server_port}/")
    yield folder, asked, server
    server.shutdown()
    server.server_close()

def files_in(folder): return sorted(p.name for p in folder.rglob("*") if p.is_file()) if folder.exists() else []

def test_download_is_checked_kept_and_not_repeated(upstream, tmp_path, capfd):
    folder, asked, _ = upstream
    assert I.fetch_fashion(tmp_path/"cache") == tmp_path/"cache"
    assert files_in(tmp_path/"cache") == files_in(folder) and len(asked) == 4
    assert "100%" in capfd.readouterr().err, "no progress bar was shown"
    I.fetch_fashion(tmp_path/"cache")
    assert len(asked) == 4, "files that are there were asked for again"
    for split, n in dict(train=6, test=4).items():
        x, y = I.load_full_fashion(split, tmp_path/"cache")
        assert x.shape == (n, 1, 28, 28) and x.dtype == torch.float32 and y.shape == (n,) and y.dtype == torch.int64
        I.check_images(x)

def test_download_with_a_wrong_sum_is_refused(upstream, tmp_path):
    folder, _, _ = upstream
    name = "train-labels-idx1-ubyte.gz"
    (folder/name).write_bytes((folder/name).read_bytes() + b"!")
    with pytest.raises(ConnectionError) as e: I.fetch_fashion(tmp_path/"cache")
    says(e, name, "hash", "folder")
    assert files_in(tmp_path/"cache") == ["train-images-idx3-ubyte.gz"], "the bad file was kept"

def test_offline_is_a_clear_error_and_leaves_nothing(upstream, tmp_path):
    folder, _, server = upstream
    server.shutdown(); server.server_close()
    with pytest.raises(ConnectionError) as e: I.fetch_fashion(tmp_path/"cache")
    says(e, "could not fetch http://127.0.0.1", "folder instead of downloading")
    assert files_in(tmp_path/"cache") == []

def test_folder_needs_no_network(upstream, tmp_path):
    folder, asked, _ = upstream
    for p in folder.glob("*.gz"): (tmp_path/p.stem).write_bytes(gzip.decompress(p.read_bytes()))
    packed, plain = I.load_full_fashion("train", folder), I.load_full_fashion("train", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(packed, plain)) and not asked
    assert torch.equal(I.load_images("fashion-full", folder), packed[0])

def test_folder_without_the_files(tmp_path):
    with pytest.raises(FileNotFoundError) as e: I.load_full_fashion("train", tmp_path)
    says(e, str(tmp_path), "train-images-idx3-ubyte.gz")
    with pytest.raises(ValueError) as e: I.load_full_fashion("all", tmp_path)
    says(e, "'all'", '"train" or "test"')

def test_another_file_by_that_name_is_refused(tmp_path):
    "The real checksums stand in the module."
    for name in I.FASHION_FILES: (tmp_path/name).write_bytes(idx(np.zeros((2, 28, 28), np.uint8)))
    with pytest.raises(ValueError, match="not the published file"): I.load_full_fashion("test", tmp_path)
    assert all(re.fullmatch("[0-9a-f]{64}", h) for pair in I.FASHION_FILES.values() for h in pair)

# ------------------------------------------------------------------ by name
def test_load_images_by_name(tmp_path):
    assert I.load_images("fashion").shape == (10_000, 1, 28, 28)
    assert I.load_images("digits").shape == (1797, 1, 8, 8)
    g = np.random.default_rng(0)
    for shape, want in {(3, 9, 7): (3, 1, 9, 7), (3, 9, 7, 3): (3, 3, 9, 7)}.items():
        a = g.integers(0, 256, shape, dtype=np.uint8)
        np.save(tmp_path/"mine.npy", a)
        x = I.check_images(I.load_images(str(tmp_path/"mine.npy")))
        assert x.shape == want and torch.equal(((x + 1)*127.5).round()[0, 0], torch.from_numpy(a.reshape(*shape[:3], -1)[0, ..., 0]).float())

@pytest.mark.parametrize("array, words", [
    (np.zeros((2, 8, 8)), ["float64", "uint8"]), (np.zeros((2, 64), np.uint8), ["(2, 64)", "uint8 (n, h, w)"]),
    (np.zeros((2, 3, 32, 32), np.uint8), ["(2, 3, 32, 32)", "channels"])])
def test_own_images_of_another_kind_are_refused(array, words, tmp_path):
    np.save(tmp_path/"mine.npy", array)
    with pytest.raises(ValueError) as e: I.load_images(str(tmp_path/"mine.npy"))
    says(e, "data: got", *words)

def test_names_and_files_that_are_not(tmp_path):
    for bad in ["mnist", str(tmp_path/"none.npy"), ""]:
        with pytest.raises(ValueError) as e: I.load_images(bad)
        says(e, repr(bad), '"fashion-full"', ".npy")
    (tmp_path/"text.npy").write_text("no array")
    with pytest.raises(ValueError, match="no .npy file"): I.load_images(str(tmp_path/"text.npy"))
    np.save(tmp_path/"objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="no .npy file"): I.load_images(str(tmp_path/"objects.npy"))

# ------------------------------------------------------------------ batches
def test_batches_come_from_the_generator_alone():
    x = torch.arange(10.).view(10, 1, 1, 1)
    def draw(seed): return I.draw_images(x, 64, torch.Generator().manual_seed(seed)).flatten()
    torch.manual_seed(1); a = draw(3)
    torch.manual_seed(2); b = draw(3)
    assert torch.equal(a, b) and not torch.equal(a, draw(4)) and a.shape == (64,)
    with pytest.raises(ValueError, match="batch_size: got 0"): I.draw_images(x, 0)

def test_every_image_is_drawn_equally_often():
    n = 20_000
    counts = I.draw_images(torch.arange(10.), n, torch.Generator().manual_seed(0)).long().bincount(minlength=10)
    assert ((counts - n/10).abs() < 5*(n*.1*.9)**.5).all()   # five standard deviations of a binomial count

def test_digits_are_images():
    x, y = I.load_digits_images()
    assert x.min() == -1 and x.max() == 1 and y.unique().tolist() == list(range(10))

def test_digits_are_nearly_balanced():
    assert I.load_digits_images()[1].bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

# ------------------------------------------------------------------ where, and how precisely
def test_precision_is_what_was_asked_for():
    assert [I.pick_precision(p) for p in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert I.pick_precision("auto") == {True: "bf16", False: "fp32"}[I.native_bf16(torch.device("cpu"))]
    with pytest.raises(ValueError, match="precision: got 'fp8', wanted"): I.pick_precision("fp8")

def test_what_is_noted_beside_a_result():
    noted = I.where_computed(I.make_accelerator("cpu", "fp32"))
    assert noted["device"] == "cpu" and noted["precision"] == "fp32" and noted["threads"] == torch.get_num_threads()

# ------------------------------------------------------------------ files
def test_a_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path/"box"/"note.json"
    I.write_json(path, dict(a=1))
    with pytest.raises(OSError, match="could not write .*No space.*untouched"), I.whole_or_nothing(path) as beside:
        beside.write_text("{")
        raise OSError("No space left on device")
    assert path.read_text() == '{\n "a": 1\n}\n' and [p.name for p in path.parent.iterdir()] == ["note.json"]

def test_tensors_go_out_and_come_back(tmp_path):
    path, a = tmp_path/"a.safetensors", good(2, 1, 8, 8)
    I.write_tensors(path, dict(a=a.mT, n=torch.arange(3)), dict(step=7))     # one that isn't contiguous
    tensors, notes = I.read_tensors(path)
    assert torch.equal(tensors["a"], a.mT) and tensors["n"].tolist() == [0, 1, 2] and notes == {"step": 7}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut short"): I.read_tensors(path)
    with pytest.raises(FileNotFoundError, match="no such file"): I.read_tensors(tmp_path/"b.safetensors")

def test_tensors_of_another_network_are_refused(tmp_path):
    layer, fits = torch.nn.Linear(2, 3), dict(weight=torch.ones(3, 2), bias=torch.zeros(3))
    assert I.fill(layer, fits, tmp_path).weight.tolist() == [[1., 1.]]*3
    for wrong, words in {"missing": "bias: got None", "left over": "more: got \\(1,\\), wanted None", "shape": "bias: got \\(2,\\), wanted \\(3,\\)"}.items():
        tensors = dict(fits, **{"left over": dict(more=torch.ones(1)), "shape": dict(bias=torch.ones(2))}.get(wrong, {}))
        if wrong == "missing": del tensors["bias"]
        with pytest.raises(ValueError, match=f"1 tensors don't fit this network, such as {words}"): I.fill(layer, tensors, tmp_path)
