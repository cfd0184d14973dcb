"""Is the package true to the versions it claims? `python tools/try_bounds.py oldest` or `newest`, with --python for another Python.

Makes a new environment with the oldest versions that settings.ini allows (or the newest there are), installs the package into it,
imports every module, trains a few steps, resumes, and samples. Downloads gigabytes where torch comes as a GPU build: not part of the tests.
"""
import argparse, configparser, re, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def lowest(requirement: str) -> str:
    "`numpy>=1.26` -> `numpy==1.26.*`; other bounds are kept."
    return re.sub(r">=([\d.]+)(,.*)?$", r"==\1.*", requirement)

def requirements(which: str) -> list:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    asked = parser["DEFAULT"]["requirements"].split()
    return [lowest(r) for r in asked] if which == "oldest" else asked

def run(*command, cwd):
    done = subprocess.run([str(o) for o in command], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip()

def try_in(folder: Path, python: str, which: str) -> str:
    "Everything in a new folder; return what was installed."
    run(python, "-m", "venv", "venv", cwd=folder)
    py, bin = folder/"venv"/"bin"/"python", folder/"venv"/"bin"
    run(py, "-m", "pip", "install", "-qq", "--no-input", *requirements(which), cwd=folder)
    run(py, "-m", "pip", "install", "-qq", "--no-input", ROOT, cwd=folder)
    run(py, "-m", "pip", "check", cwd=folder)
    modules = sorted(p.stem for p in (ROOT/"diffusion_book").glob("*.py") if not p.stem.startswith("_"))
    run(py, "-I", "-c", "import importlib; " + "; ".join(f"importlib.import_module('diffusion_book.{m}')" for m in modules), cwd=folder)
    small = "--batch_size", "8", "--out", "model"
    run(bin/"diffusion_book_train", "--steps", "3", *small, cwd=folder)
    run(bin/"diffusion_book_train", "--steps", "6", *small, "--resume", cwd=folder)
    for name in ["x.png", "x.gif"]: run(bin/"diffusion_book_sample", "--model", "model", "--n", "4", "--steps", "4", "--out", name, cwd=folder)
    names = [re.split("[>=<]", r)[0] for r in requirements(which)]
    return run(py, "-c", f"import sys; from importlib.metadata import version; print(sys.version.split()[0], *(n + ' ' + version(n) for n in {names}), sep=', ')", cwd=folder)

if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("which", choices=["oldest", "newest"])
    ap.add_argument("--python", default=sys.executable, help="the Python to make the environment with")
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder: print("works with Python", try_in(Path(folder), args.python, args.which))
