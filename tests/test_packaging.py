"""What is shipped is what is here: the wheel and the sdist, the exported modules, the versions, the README."""
import ast, builtins, configparser, dis, importlib, inspect, json, os, re, shutil, subprocess, sys, tarfile, types, zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT/"diffusion_book"
CHAPTERS = {p.stem.split("_", 1)[1]: p for p in sorted((ROOT/"nbs").glob("[0-9]*.ipynb"))}   # "forward" -> nbs/12_forward.ipynb
MODULES = sorted(p.stem for p in LIB.glob("*.py") if not p.stem.startswith("_"))

def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]

def run(*command, cwd=ROOT, timeout=600, **env):
    "Run a command, nothing on its stdin; on failure say what it said."
    done = subprocess.run([str(o) for o in command], cwd=cwd, env={**os.environ, **env}, text=True, stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=timeout)
    assert done.returncode == 0, f"{command[:4]} exited {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout

def tracked():
    "The files git would commit: tracked, or new and not ignored."
    names = run("git", "ls-files", "-co", "--exclude-standard", "-z").split("\0")
    return sorted({ROOT/n for n in names if n and (ROOT/n).exists()})

def copy_tree(to: Path) -> Path:
    "A copy of the working tree as a commit of it would be."
    for p in tracked():
        new = to/p.relative_to(ROOT)
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(p, new, follow_symlinks=False)
    return to

def names_of(requirements: str) -> set:
    "`numpy>=1.26 scikit_learn==1.4` -> {numpy, scikit-learn}"
    return {re.split(r"[<>=!~\[;]", r)[0].lower().replace("_", "-") for r in requirements.split()}

# ------------------------------------------------------------------ wheel and sdist
@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    tree = copy_tree(tmp_path_factory.mktemp("tree"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree/"dist", tree, cwd=tree)
    wheel, = (tree/"dist").glob("*.whl"); sdist, = (tree/"dist").glob("*.tar.gz")
    return types.SimpleNamespace(wheel=wheel, sdist=sdist)

def package_files():
    return {p.relative_to(ROOT).as_posix() for p in tracked() if LIB in p.parents}

def test_wheel_holds_the_package_and_is_small(dist):
    assert dist.wheel.stat().st_size <= 15_000_000, f"the wheel is {dist.wheel.stat().st_size:,} bytes"
    names = set(zipfile.ZipFile(dist.wheel).namelist())
    assert package_files() <= names, f"not in the wheel: {package_files() - names}"
    assert {n for n in names if ".dist-info/" not in n} == package_files()   # and nothing else
    assert any(n.endswith("LICENSE") and ".dist-info/" in n for n in names)
    for part in ["data/fashion_mnist.npz", "data/LICENSE-fashion-mnist.txt", "weights/fashion/model.safetensors", "weights/fashion/card.json"]:
        assert f"diffusion_book/{part}" in names

def test_sdist_holds_what_it_is_built_from(dist):
    names = {n.split("/", 1)[1] for n in tarfile.open(dist.sdist).getnames() if "/" in n}
    assert package_files() | {"settings.ini", "setup.py", "README.md", "LICENSE", "constraints.txt", "CHANGELOG.md"} <= names

def test_wheel_metadata_says_what_settings_say(dist):
    z, cfg = zipfile.ZipFile(dist.wheel), settings()
    meta = z.read(next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    entry = z.read(next(n for n in z.namelist() if n.endswith("entry_points.txt"))).decode()
    assert f"\nVersion: {cfg['version']}\n" in meta and f"\nRequires-Python: >={cfg['min_python']}\n" in meta
    needed = {m.lower() for m in re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", meta, re.M)}
    assert needed == names_of(cfg["requirements"])
    for script in ["diffusion_book_train = diffusion_book.training:diffusion_book_train",
                   "diffusion_book_sample = diffusion_book.sampling:diffusion_book_sample"]: assert script in entry

USE = """
import sys
sys.path.insert(0, sys.argv[1]) if sys.argv[1] else None
import diffusion_book, pathlib
home = pathlib.Path(diffusion_book.__file__).resolve()
assert home.is_relative_to(pathlib.Path(sys.argv[2]).resolve()), home
import torch
from diffusion_book.pictures import load_fashion
from diffusion_book.training import load_pretrained
from diffusion_book.sampling import sample
images, labels = load_fashion("train")
assert images.shape == (10000, 1, 28, 28) and images.min() == -1 and images.max() == 1 and labels.bincount().tolist() == [1000]*10
denoise = load_pretrained("fashion")
x = sample(denoise, (2, 1, 28, 28), denoise.schedule, steps=4, generator=torch.Generator().manual_seed(0))
assert x.shape == (2, 1, 28, 28) and x.isfinite().all()
print("works from", home.parent)
"""

def test_wheel_works_elsewhere(dist, tmp_path):
    "The wheel alone in an empty folder, its dependencies from this environment, run from outside the repository."
    there, away = tmp_path/"there", tmp_path/"away"
    away.mkdir()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-qq", "--target", there, dist.wheel)
    assert "works from" in run(sys.executable, "-I", "-c", USE, there, there, cwd=away)
    run(sys.executable, there/"bin"/"diffusion_book_sample", "--model", "fashion", "--n", "4", "--steps", "3", "--out", "x.png",
        cwd=away, PYTHONPATH=str(there))
    from PIL import Image
    assert Image.open(away/"x.png").size[0] >= 2*28

@pytest.mark.slow
def test_wheel_installs_into_an_empty_environment(dist, tmp_path):
    "A new venv with nothing but the wheel and what it asks for: every module imports, data and weights are inside, pip agrees."
    run(sys.executable, "-m", "venv", tmp_path/"venv")
    python = tmp_path/"venv"/"bin"/"python"
    run(python, "-m", "pip", "install", "-qq", "--no-input", dist.wheel, "-c", ROOT/"constraints.txt", cwd=tmp_path, timeout=1500)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    run(python, "-I", "-c", f"import importlib; [importlib.import_module('diffusion_book.'+m) for m in {MODULES}]", cwd=tmp_path)
    assert "works from" in run(python, "-I", "-c", USE, "", tmp_path/"venv", cwd=tmp_path)
    run(python, "-c", "import sys; assert not any(m in sys.modules for m in ['nbdev', 'pytest', 'diffusers'])", cwd=tmp_path)
    for command in ["diffusion_book_train", "diffusion_book_sample"]:
        assert "--out" in run(tmp_path/"venv"/"bin"/command, "--help", cwd=tmp_path)

# ------------------------------------------------------------------ export
def test_export_and_clean_change_nothing(tmp_path):
    "`make export` on a copy leaves every file as it is."
    tree = copy_tree(tmp_path/"tree")
    before = {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file()}
    run(sys.executable, "-c", "import nbdev; nbdev.nbdev_export()", cwd=tree)
    run(sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=tree)
    after = {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert sorted(map(str, before.keys() ^ after.keys())) == []
    assert [str(p) for p in before if before[p] != after[p]] == [], "run `make export` and commit what it changes"

def test_every_module_has_its_chapter():
    assert MODULES and set(MODULES) <= set(CHAPTERS)
    for m in MODULES: assert f"../nbs/{CHAPTERS[m].name}" in (LIB/f"{m}.py").read_text(encoding="utf-8")

@pytest.mark.parametrize("module", MODULES)
def test_module_imports_alone(module, tmp_path):
    "In a fresh process, from outside the repository; and every global name its functions use is there."
    run(sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import diffusion_book.{module}", cwd=tmp_path)
    m = importlib.import_module(f"diffusion_book.{module}")
    missing = set()
    def walk(code):
        for i in dis.get_instructions(code):
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME") and not hasattr(builtins, i.argval) and i.argval not in vars(m): missing.add((code.co_name, i.argval))
        for c in code.co_consts:
            if isinstance(c, types.CodeType): walk(c)
    top = compile((LIB/f"{module}.py").read_text(encoding="utf-8"), module, "exec")
    for c in top.co_consts:
        if isinstance(c, types.CodeType): walk(c)
    assert not {(f, n) for f, n in missing if n not in ("__name__", "__module__", "__qualname__", "__firstlineno__", "__annotations__", "__class__", "__static_attributes__")}

def imported_modules(source: str) -> set:
    "Names of our modules that this source imports."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level == 1 and node.module: found.add(node.module.split(".")[0])
            elif node.module == "diffusion_book" or (node.level == 1 and not node.module): found |= {a.name for a in node.names}
            elif (node.module or "").startswith("diffusion_book."): found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import): found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("diffusion_book.")}
    return found & set(MODULES)

@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_earlier_chapters(module):
    later = {m for m in imported_modules((LIB/f"{module}.py").read_text(encoding="utf-8")) if CHAPTERS[m].name >= CHAPTERS[module].name}
    assert not later, f"{CHAPTERS[module].name} imports from a later chapter: {sorted(later)}"

def code_of(path: Path) -> str:
    "The notebook's Python, without magics and cells that do not run."
    cells = [("".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    keep = [c for c in cells if not re.search(r"^#\|\s*eval:\s*false", c, re.M) and not c.lstrip().startswith(("%", "!"))]
    return "\n".join(re.sub(r"^(\s*)[%!].*$", r"\1pass", c, flags=re.M) for c in keep)

@pytest.mark.parametrize("chapter", [c for c, p in CHAPTERS.items() if "10" <= p.name[:2] < "90"])
def test_chapters_import_only_earlier_chapters(chapter):
    own = {chapter} & set(MODULES)
    later = {m for m in imported_modules(code_of(CHAPTERS[chapter])) if CHAPTERS[m].name >= CHAPTERS[chapter].name} - own
    assert not later, f"{CHAPTERS[chapter].name} imports from a later chapter: {sorted(later)}"

def test_importing_the_package_is_light():
    heavy = "import sys, diffusion_book; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'matplotlib', 'PIL', 'accelerate', 'scipy', 'sklearn'}))"
    assert run(sys.executable, "-c", heavy).strip() == "[]"

# ------------------------------------------------------------------ what is declared
def test_versions_agree():
    import diffusion_book
    from importlib.metadata import version
    cfg = settings()
    assert diffusion_book.__version__ == cfg["version"] == version("diffusion_book")
    changelog = (ROOT/"CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {cfg['version']}" in changelog, "CHANGELOG.md has no heading for this version"
    assert sys.version_info >= tuple(map(int, cfg["min_python"].split(".")))

def test_requirements_are_what_the_modules_import():
    from importlib.metadata import packages_distributions
    tops = set()
    for m in MODULES:
        for node in ast.walk(ast.parse((LIB/f"{m}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import): tops |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level: tops.add(node.module.split(".")[0])
    tops -= set(sys.stdlib_module_names) | {"diffusion_book"}
    where = packages_distributions()
    needed = {where[t][0].lower().replace("_", "-") for t in tops}
    assert needed == names_of(settings()["requirements"]), "settings.ini's requirements are not what the modules import"

def test_constraints_pin_what_is_asked_for():
    lines = [l.strip() for l in (ROOT/"constraints.txt").read_text().splitlines() if l.strip() and not l.startswith("#")]
    for l in lines: assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", l), f"{l!r}: not `name==version`"
    pinned = {l.split("==")[0].lower().replace("_", "-") for l in lines}
    assert "torch==2.13.0" in lines
    cfg = settings()
    assert not names_of(cfg["requirements"] + " " + cfg["dev_requirements"]) - pinned
    run(sys.executable, "-m", "pip", "check")

# ------------------------------------------------------------------ what an export must have
def exports():
    for module in MODULES:
        m = importlib.import_module(f"diffusion_book.{module}")
        for name in m.__all__:
            o = getattr(m, name)
            if inspect.isclass(o) or callable(o): yield f"{module}.{name}", o

def callables(name, o):
    "The function itself; for a class its constructor and the public methods it defines."
    if not inspect.isclass(o): return [(name, o, [], True)]
    if issubclass(o, tuple) and hasattr(o, "_fields"): return []   # its fields: see `uncommented_fields`
    out = [(name, o, [], False)] if ("__init__" in vars(o) or hasattr(o, "__dataclass_fields__")) else []
    for k, v in vars(o).items():
        f = v.__func__ if isinstance(v, (classmethod, staticmethod)) else v
        if inspect.isfunction(f) and (not k.startswith("_") or k == "__call__"):
            over = [vars(b)[k] for b in o.__mro__[1:] if b.__module__.startswith("diffusion_book") and inspect.isfunction(vars(b).get(k))]
            out.append((f"{name}.{k}", f, over, True))
    return out

def lacks(name, f, inherited, returns):
    "What this function's signature leaves unsaid, and no method that it overrides says either."
    from fastcore.docments import docments
    f = inspect.unwrap(f)
    try: sig = inspect.signature(f)
    except ValueError: return
    docs = docments(f, full=True)
    for base in inherited: docs = {k: v if (v or {}).get("docment") else docments(base, full=True).get(k) or v for k, v in docs.items()}
    for p in sig.parameters.values():
        if p.name in ("self", "cls") or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD): continue
        if p.annotation is inspect.Parameter.empty: yield f"{name}({p.name}): no type hint"
        if not (docs.get(p.name) or {}).get("docment"): yield f"{name}({p.name}): no comment"
    if returns and sig.return_annotation is inspect.Signature.empty: yield f"{name}: no hint of what it returns"

def uncommented_fields(name, o):
    "Fields of a NamedTuple without a comment on their line."
    if not (inspect.isclass(o) and issubclass(o, tuple) and hasattr(o, "_fields")): return
    lines = inspect.getsource(o).splitlines()
    for f in o._fields:
        if not any(re.match(rf"\s*{f}\s*:.*#\s*\S", l) for l in lines): yield f"{name}.{f}: no comment"

def test_every_export_is_documented():
    found = [f"{name}: no docstring" for name, o in exports() if not inspect.getdoc(o)]
    for name, o in exports():
        found += uncommented_fields(name, o)
        for one in callables(name, o): found += lacks(*one)
    assert not found, "\n".join(found)

def index_of(text: str) -> ast.Assign:
    "The list of a module's names, which nbdev writes and wraps."
    return next(n for n in ast.parse(text).body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__")

LONGEST = dict(schedules=310, training=330)   # a little above what all others keep to

@pytest.mark.parametrize("module", MODULES)
def test_modules_are_readable(module):
    text = (LIB/f"{module}.py").read_text(encoding="utf-8")
    lines, names = text.splitlines(), index_of(text)
    index = range(names.lineno, names.end_lineno + 1)
    ours = [l for l in lines if l.strip() and not l.startswith(("# %%", "#|"))]   # without nbdev's marks
    assert len(ours) <= LONGEST.get(module, 300), f"{module}.py has {len(ours)} lines"
    long = [f"{module}.py:{i}: {len(l)} columns" for i, l in enumerate(lines[1:], 2)   # the first line is the chapter's description
            if len(l) > 100 and not l.startswith("# %%") and i not in index]
    assert not long, "\n".join(long)

# ------------------------------------------------------------------ what a page must not say
def test_no_machine_is_named():
    "No path of one machine and no registry's host in any file. (The words are put together here so that this file passes.)"
    words = ["/".join(["", w, ""]) for w in ["work", "root"]] + [f"{ROOT}/", f"{Path.home()}/"] + [".".join(o) for o in [
        ["pypi", "org"], ["files", "pythonhosted", "org"], ["registry", "npmjs", "org"], ["download", "pytorch", "org"], ["deb", "debian", "org"]]]
    found = []
    for p in tracked():
        if p.is_symlink() or "vendor" in p.parts: continue
        try: text = p.read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
        if p.suffix == ".ipynb":   # pictures are stored as long lines of letters and slashes
            text = re.sub(r'"image/(png|gif|jpeg)": "[^"]*"', "", text)
        found += [f"{p.relative_to(ROOT)}: {w}" for w in words if w in text]
    assert not found, found

# ------------------------------------------------------------------ README and commands
def readme(): return (ROOT/"README.md").read_text(encoding="utf-8")

def test_readme_code_runs(tmp_path, monkeypatch):
    block, = re.findall(r"```python\n(.*?)```", readme(), re.S)
    assert 5 <= len([l for l in block.splitlines() if l.strip()]) <= 10, "the README promises ten lines"
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert list(tmp_path.glob("*.png")), "the README's lines save a picture"

def test_readme_maps_the_book():
    text = readme()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    assert not [l for l in links if not (ROOT/l).exists()], "README links to files that are not there"
    assert not [p.name for p in sorted((ROOT/"nbs").glob("*.ipynb")) if f"nbs/{p.name}" not in links], "chapters that the README's map leaves out"
    assert text.index("strip.png") < text.index("\n## "), "the picture comes first"
    assert len(text.splitlines()) <= 110, "the README is to be short"

@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_help_lists_the_commands():
    told = run("make", "help")
    for target in ["book", "test", "serve", "export", "notebooks", "site", "clean"]: assert f"make {target} " in told
    for target in re.findall(r"`make (\w+)", readme()): assert f"make {target} " in told
