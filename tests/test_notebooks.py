"""One test per notebook: every cell runs, in order, in a process of its own. A failure names the notebook and the cell.
And what the stored notebooks must be: executed, without an error, with a picture wherever a figure is announced."""
import importlib.util, json, os, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb")
             if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT/"nbs").parts))
SECONDS = 900   # a notebook that hangs is stopped; the book's own limit on times is tested on the stored table

def name(path): return path.relative_to(ROOT/"nbs").as_posix()
def source(cell): return "".join(cell["source"])
each_notebook = pytest.mark.parametrize("path", NBS, ids=name)

RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
path, root, force = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split()
ok, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), force_flags=force, basepath=root)
sys.exit(not ok)
"""

@each_notebook
def test_notebook(path):
    force = os.environ.get("NB_FLAGS", "")   # NB_FLAGS=slow runs the cells marked `#| slow`
    done = subprocess.run([sys.executable, "-c", RUN, str(path), str(ROOT), force], cwd=ROOT, text=True, timeout=SECONDS,
                          env=dict(os.environ, MPLBACKEND="agg"), stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode: pytest.fail(f"{path.relative_to(ROOT)}\n{done.stdout[-3000:]}\n{done.stderr[-9000:]}", pytrace=False)

@each_notebook
def test_stored_notebook(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = source(cells[0])
    assert cells[0]["cell_type"] == "markdown" and re.match(r"# .+\n\n> .+", first), f"the first cell is not a title and a description: {first!r}"
    for i, cell in enumerate(c for c in cells if c["cell_type"] == "code"):
        kinds = {k for o in cell["outputs"] for k in o.get("data", {})}
        for o in cell["outputs"]: assert o["output_type"] != "error", f"code cell {i} is stored with an error: {o['ename']}: {o['evalue']}"
        if re.search(r"^#\|\s*label:\s*fig-", source(cell), re.M):
            assert any(k.startswith("image/") for k in kinds), f"code cell {i} announces a figure and stores no picture:\n{source(cell)[:300]}"
            assert re.search(r"^#\|\s*fig-alt:\s*\S", source(cell), re.M), f"code cell {i}: a figure without alt text"
    assert path.stat().st_size < 4_000_000, f"{path.stat().st_size:,} bytes: too heavy for a page"

def test_stored_times():
    "The table that `make notebooks` wrote names every chapter; none is over 90 seconds, all are under 15 minutes."
    times = json.loads((ROOT/"nbs"/"times.json").read_text())
    seconds = {k: v["seconds"] for k, v in times["chapters"].items()}
    assert set(seconds) == {p.stem for p in NBS}
    assert not {k: s for k, s in seconds.items() if s > 90}
    assert sum(seconds.values()) < 15 * 60
    spec = importlib.util.spec_from_file_location("execute_nb", ROOT/"tools"/"execute_nb.py")
    execute_nb = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute_nb)
    assert execute_nb.sentence(times) in (ROOT/"README.md").read_text(encoding="utf-8"), "the README tells other times: make notebooks"
