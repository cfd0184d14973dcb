"The tools that make data and run notebooks do what they say, and say what is wrong."
import gzip, hashlib, importlib.util, json, struct, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

def tool(name):
    "Import tools/name.py."
    spec = importlib.util.spec_from_file_location(name, ROOT/"tools"/f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def sha256(b): return hashlib.sha256(b).hexdigest()

# ------------------------------------------------------------------ make_data
def test_embedded_data_are_what_the_rule_gives():
    made, about = tool("make_data"), (ROOT/"diffusion_book"/"data"/"README.md").read_text()
    with np.load(made.OUT, allow_pickle=False) as arrays:
        assert {k: sha256(arrays[k].tobytes()) for k in arrays} == made.KEPT
        assert arrays["train_images"].shape == (10000, 28, 28) and arrays["test_images"].shape == (2000, 28, 28)
        assert np.bincount(arrays["train_labels"]).tolist() == [1000]*10 and np.bincount(arrays["test_labels"]).tolist() == [200]*10
    assert all(h in about for h in made.KEPT.values()), "the data's README lists the hashes"

def test_first_of_each_class_in_file_order():
    labels = np.array([3, 0, 3, 1, 3, 2, 4, 5, 6, 7, 8, 9, 0, 0])
    assert tool("make_data").first_of_each(labels, 2).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]

def test_npz_is_the_same_each_time_and_plain(tmp_path):
    arrays = dict(a=np.arange(12, dtype=np.uint8).reshape(3, 4), b=np.ones(5, np.uint8))
    for name in ["x.npz", "y.npz"]: tool("make_data").save_npz(tmp_path/name, arrays)
    assert (tmp_path/"x.npz").read_bytes() == (tmp_path/"y.npz").read_bytes()
    with np.load(tmp_path/"x.npz", allow_pickle=False) as got:
        for k, v in arrays.items(): np.testing.assert_array_equal(got[k], v)

def test_idx_files_are_checked(tmp_path, monkeypatch):
    made, name = tool("make_data"), "t10k-labels-idx1-ubyte"
    with pytest.raises(SystemExit, match="is missing"): made.read_idx(tmp_path, name)
    data = struct.pack(">HBBI", 0, 8, 1, 3) + bytes([4, 5, 6])
    (tmp_path/f"{name}.gz").write_bytes(gzip.compress(data))
    with pytest.raises(SystemExit, match="decodes to"): made.read_idx(tmp_path, name)
    monkeypatch.setitem(made.DECODED, name, sha256(data))
    assert made.read_idx(tmp_path, name).tolist() == [4, 5, 6]

# ------------------------------------------------------------------ execute_nb
def notebook(path, *cells):
    code = [dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, source=s, outputs=o) for i, (s, o) in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=code, metadata={}, nbformat=4, nbformat_minor=5)))

def outputs(path): return [["".join(o.get("text", "")) for o in c["outputs"]] for c in json.loads(path.read_text())["cells"]]

def execute(*args): return subprocess.run([sys.executable, ROOT/"tools"/"execute_nb.py", *map(str, args)], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)

STALE = [dict(output_type="stream", name="stdout", text=["old\n"])]

def test_execute_nb_refreshes_outputs_and_times(tmp_path):
    (tmp_path/"nbs").mkdir()
    nb, times, readme = tmp_path/"nbs"/"12_x.ipynb", tmp_path/"nbs"/"times.json", tmp_path/"README.md"
    readme.write_text("before <!-- times -->old<!-- /times --> after")
    times.write_text(json.dumps(dict(chapters={"12_x": dict(seconds=1e9, cpu_seconds=1e9), "99_gone": dict(seconds=1, cpu_seconds=1)})))
    notebook(nb, ("print('new')", STALE), ("x = 1", STALE), ("#| eval: false\nprint('never')", STALE), ("#| slow\nprint('slow')", STALE),
             ("print('  0%\\r 50%\\r100%')", []))
    done = execute(nb, "--times", times)
    assert done.returncode == 0, done.stderr
    assert outputs(nb) == [["new\n"], [], ["old\n"], ["old\n"], ["100%\n"]]
    table = json.loads(times.read_text())
    assert list(table["chapters"]) == ["12_x"] and 0 < table["chapters"]["12_x"]["seconds"] < 600 and table["machine"]["cores"] >= 1
    assert readme.read_text() == f"before <!-- times -->{tool('execute_nb').sentence(table)}<!-- /times --> after"
    assert execute(nb, "--flags", "slow").returncode == 0 and outputs(nb)[3] == ["slow\n"]

def test_execute_nb_says_which_cell_failed_and_keeps_the_notebook(tmp_path):
    nb = tmp_path/"12_x.ipynb"
    notebook(nb, ("print('new')", STALE), ("1/0", []))
    before = nb.read_bytes()
    done = execute(nb)
    assert done.returncode and "Cell #2" in done.stderr and "ZeroDivisionError" in done.stderr and "12_x.ipynb" in done.stderr
    assert nb.read_bytes() == before

# ------------------------------------------------------------------ book_pictures and try_bounds
def test_sheets_and_film_frames_have_room_for_every_image():
    torch, pictures = pytest.importorskip("torch"), tool("book_pictures")
    x = torch.zeros(64, 1, 28, 28)
    one, three = pictures.titled_sheets({"a": x}), pictures.titled_sheets({"a": x, "b": x, "c": x})
    assert one.height == three.height and three.width - one.width == 2*(3*(8*30 - 2) + 36)
    assert pictures.side_by_side(x, x).shape == (1, 4*30 - 2, 2*(4*30 - 2) + 12)

def test_closing_says_what_was_made(tmp_path):
    (tmp_path/"card.json").write_text(json.dumps(dict(parameters=1234567, steps=890, seconds=180.2, device="cpu")))
    said = tool("book_pictures").closing(tmp_path)
    for part in ["1,234,567", "890 updates in 180 s", "out/samples.png", "out/film.gif", "make serve"]: assert part in said

def test_oldest_versions_are_the_lower_bounds():
    lowest = tool("try_bounds").lowest
    assert [lowest(r) for r in ["numpy>=1.26", "fastcore>=1.8,<2", "x==3"]] == ["numpy==1.26.*", "fastcore==1.8.*", "x==3"]
