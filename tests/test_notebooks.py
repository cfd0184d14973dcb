"One test per notebook: every cell runs, in order. A failure names the notebook and the cell."
import os
from pathlib import Path
import pytest
ROOT = Path(__file__).resolve().parents[1]
NBS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb")
             if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT/"nbs").parts))
@pytest.mark.parametrize("path", NBS, ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
def test_notebook(path, monkeypatch, capfd):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(ROOT)                          # nbdev looks for settings.ini from here
    from nbdev.config import get_config
    from nbdev.test import test_nb as run_nb
    force = os.environ.get("NB_FLAGS", "").split()   # NB_FLAGS=slow runs the cells marked `#| slow`
    ok, _ = run_nb(path, skip_flags=get_config().tst_flags.split(), force_flags=force, basepath=ROOT)
    if not ok: pytest.fail(f"{path.relative_to(ROOT)}\n{capfd.readouterr().err}", pytrace=False)
