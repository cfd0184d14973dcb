"""Build the site into `_docs/`, with no network: `python tools/build_site.py`.

nbs/  --nbdev-->  _proc/  --copy, numbers, references-->  _build/  --smalldocs-->  HTML  --finish, check-->  _docs/

`_proc/` is what Quarto reads: where Quarto is installed, `quarto render _proc` builds the same book from the same
`_quarto.yml`. The build ends with status 1 and a list when anything is wrong with a page.
"""
import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from sitebuild import checks, finish, pages
from sitebuild.bibliography import read_bib

TOOLS = Path(__file__).resolve().parent
STAMP = ".built-from"    # in `_docs/`: what the site was built from; absent after a build with problems

def fingerprint(
    root: Path,  # the project
) -> str:        # a digest of everything the site depends on
    "Digest the notebooks, the configuration, the package's index and the tool itself."
    inputs = [root/"settings.ini", root/"_quarto.yml", TOOLS/"build_site.py", *TOOLS.glob("sitebuild/*.py"), *TOOLS.glob("vendor/katex/*")]
    inputs += [p for p in (root/"nbs").rglob("*") if not any(o.startswith((".", "_")) for o in p.relative_to(root/"nbs").parts)]
    inputs += (root/"diffusion_book").glob("*.py")
    digest = hashlib.sha256()
    for p in sorted(p for p in inputs if p.is_file()): digest.update(p.name.encode() + b"\0" + p.read_bytes())
    return digest.hexdigest()

def up_to_date(root: Path) -> bool:
    "Was the site in `_docs/` built, without problems, from what is there now?"
    stamp = root/"_docs"/STAMP
    return stamp.exists() and stamp.read_text() == fingerprint(root)

def number_and_link(build: Path, strict: bool, problems: list) -> dict:
    "Write numbers, references and names into the copy; return page -> notebook."
    bib = read_bib(build/"references.bib")
    found = [pages.Page(p, bib, problems) for p in sorted(build.rglob("*.ipynb"))]
    notebooks = {p.path.relative_to(build).as_posix() for p in found}
    renamed = pages.page_names(found, build)
    for p in found: p.finish(build, renamed)
    missing, unlisted = pages.fit_sidebar(build/"sidebar.yml", notebooks, renamed)
    problems += [f"{o}: the sidebar does not list it" for o in unlisted]
    if missing and strict: problems += [f"sidebar.yml: {o} does not exist" for o in missing]
    elif missing: print("not written yet, left out of the sidebar:", ", ".join(missing))
    return {Path(renamed.get(o, o)).with_suffix(".html").as_posix(): o for o in notebooks}

def copy_notebooks(root: Path, docs: Path) -> None:
    "Put the notebooks beside the pages, for readers to download, without the cell that exports the package."
    target = docs/"notebooks"
    for path in sorted((root/"nbs").glob("*.ipynb")):
        nb = json.loads(path.read_text(encoding="utf-8"))
        nb["cells"] = [c for c in nb["cells"] if "nbdev_export" + "(" not in "".join(c["source"])]
        target.mkdir(exist_ok=True)
        (target/path.name).write_text(json.dumps(nb, ensure_ascii=False, indent=1), encoding="utf-8")
    if (root/"nbs"/"images").is_dir(): shutil.copytree(root/"nbs"/"images", target/"images")

def finish_site(root: Path, docs: Path, site_url: str, sources: dict) -> None:
    "Edit what smalldocs wrote: local fonts and formulas, pictures as files, links within the site."
    shutil.copytree(TOOLS/"vendor"/"katex", docs/"site_libs"/"katex")
    for css in docs.rglob("*.css"): css.write_text(finish.drop_web_fonts(css.read_text(encoding="utf-8")), encoding="utf-8")
    copy_notebooks(root, docs)
    texts = {p.relative_to(docs).as_posix(): p.read_text(encoding="utf-8") for p in docs.rglob("*.html")}
    anchors = {name: set(checks.Facts(text).ids) for name, text in texts.items()}
    for name, text in texts.items():
        (docs/name).write_text(finish.finish_page(text, name, docs, site_url, anchors, sources.get(name)), encoding="utf-8")

def render(build: Path) -> Path:
    "Run smalldocs on the copy; it writes into `_docs/` there."
    r = subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", str(build)], capture_output=True, text=True)
    if r.returncode: sys.exit(r.stdout + r.stderr)
    return build/"_docs"

def build(
    root: Path,            # the project
    strict: bool = False,  # a chapter that the sidebar lists and that is missing is a problem
) -> list:                 # problems, one a line
    "Build the site of a project."
    os.chdir(root)                    # nbdev looks for settings.ini from here
    os.environ.setdefault("MPLBACKEND", "agg")
    from nbdev.config import get_config
    from sitebuild.chapters import process
    cfg, problems, made_from = get_config(), [], fingerprint(root)
    proc, copy, docs = root/"_proc", root/"_build", root/"_docs"
    process(root)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(proc, copy)
    sources = number_and_link(copy, strict, problems)
    made = render(copy)
    finish_site(root, made, cfg.doc_host.rstrip("/") + cfg.doc_baseurl.rstrip("/"), sources)
    problems += checks.check_site(made, [str(root), str(Path.home())])
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(made, docs)
    if not problems: (docs/STAMP).write_text(made_from)
    return sorted(set(problems))

def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--root", type=Path, default=TOOLS.parent, help="the project (default: the one this tool belongs to)")
    ap.add_argument("--strict", action="store_true", help="fail when the sidebar lists a chapter that is not there")
    ap.add_argument("--if-needed", action="store_true", help="do nothing when the site was built from what is there now")
    args = ap.parse_args()
    root = args.root.resolve()
    if args.if_needed and up_to_date(root): return print("the site in _docs/ is up to date")
    problems = build(root, args.strict)
    if problems: sys.exit("\n".join(["problems of the site:", *problems]))
    print(f"the site is in _docs/: {len(list((root/'_docs').glob('*.html')))} pages")

if __name__ == "__main__": main()
