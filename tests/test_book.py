"""The craft of the book, over all notebooks: how a page opens and closes, its pictures, anchors, links, exercises and outputs.

Nothing is run here (`test_notebooks.py` does that); the stored notebooks are read. At the end each check is seen to fail on a page made for it.
"""
import ast
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

NBS, LIB = ROOT/"nbs", ROOT/"diffusion_book"
APPENDICES = ("90_notation", "92_mistakes", "93_solutions")
CLAIMS = [n for n in range(1, 36) if n != 27]     # parts 0 to V; 27 is for a later part
MISTAKES = list(range(1, 23))
LONGEST_CELL, ONE_PAGE_LINES = 25, 100

def source(cell: dict) -> str: return "".join(cell["source"])
def load(path: Path) -> list: return json.loads(path.read_text(encoding="utf-8"))["cells"]
def code(cells: list) -> list: return [c for c in cells if c["cell_type"] == "code"]
def prose(cells: list) -> str: return "\n\n".join(source(c) for c in cells if c["cell_type"] == "markdown")

PAGES = {p.stem: load(p) for p in sorted(NBS.glob("*.ipynb"))}
CHAPTERS = [name for name in PAGES if name != "index" and name not in APPENDICES]
each_page = pytest.mark.parametrize("name", PAGES)

# ------------------------------------------------------------------ what is looked for
def lines(cell: dict) -> list:
    "Lines of code: no directives, no comments, nothing empty."
    return [l for l in source(cell).splitlines() if l.strip() and not l.strip().startswith("#")]

def to_read(cell: dict) -> list:
    "Lines of code a reader must hold in mind: none of a folded cell, and no parameter or result that stands on a line with its comment."
    if option(cell, "code-fold"): return []
    return [l for l in lines(cell) if not re.match(r"    +\*{0,2}\w+(:|=).*,\s+#|    *\*,|\) -> .*:\s+#", l)]

def option(cell: dict, key: str) -> str:
    "The value of a cell option such as fig-alt, or nothing."
    found = re.search(rf"^#\|\s*{key}:\s*(.+)$", source(cell), re.M)
    return found[1].strip().strip("'\"") if found else ""

def has_picture(cell: dict) -> bool:
    return any(k.startswith("image/") for o in cell["outputs"] for k in o.get("data", {}))

def unfenced(text: str) -> str:
    "Markdown without its code, in blocks and in backticks."
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S))

def slug(heading: str) -> str:
    "The id that a heading gets by itself."
    text = re.sub(r"[^\w\s.-]", "", re.sub(r"\{[^}]*\}|[`*]", "", heading).strip().lower())
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text))

def anchors(cells: list) -> list:
    "Every id on a page: written in braces, labels of figures, and of headings that have none."
    text = unfenced(prose(cells))
    written = re.findall(r"\{#([\w-]+)[^}]*\}", text)
    labels = [option(c, "label") for c in code(cells) if option(c, "label")]
    headings = [h for h in re.findall(r"^#{2,6} (.+)$", text, re.M) if "{#" not in h]
    return written + labels + [slug(h) for h in headings]

def links(cells: list) -> list:
    "Targets of the Markdown links and images in a page's prose."
    return re.findall(r"\]\(([^)\s]+)\)", unfenced(prose(cells)))

def broken_links(name: str, pages: dict, folder: Path) -> list:
    "Links to a notebook, id or file that is not there."
    bad = []
    for link in links(pages[name]):
        if re.match(r"[a-z]+:", link): continue
        file, _, anchor = link.partition("#")
        target = Path(file).stem if file else name
        if file and not file.endswith(".ipynb"):
            if not (folder/file).exists(): bad.append(f"{link}: no such file")
        elif target not in pages or "/" in file: bad.append(f"{link}: no such notebook")
        elif anchor and anchor not in anchors(pages[target]): bad.append(f"{link}: no such id there")
    return bad

def bare_pictures(cells: list) -> list:
    "Code cells that show a picture and lack its description or its caption."
    return [source(c)[:80] for c in code(cells) if has_picture(c) and not (option(c, "fig-alt") and option(c, "fig-cap"))]

def texts(cell: dict) -> str:
    "All text among a cell's outputs."
    parts = [o.get("text", "") for o in cell["outputs"]] + [v for o in cell["outputs"] for k, v in o.get("data", {}).items() if k.startswith("text/")]
    return "\n".join("".join(p) for p in parts)

def machine_paths(cells: list) -> list:
    "Outputs that show where somebody's files lie."
    names = "|".join(["home", "Users", "root", "work", "tmp", "var/folders", "usr/lib", "opt"])
    return [found[0] for c in code(cells) if (found := re.search(rf"(?<![\w./])/(?:{names})/[\w./-]*|[\w./-]*site-packages[\w./-]*|[A-Z]:\\\S+", texts(c)))]

def repeated(items: list) -> list: return sorted({i for i in items if items.count(i) > 1})

# ------------------------------------------------------------------ every page
@each_page
def test_opens_and_closes(name):
    cells = PAGES[name]
    assert re.fullmatch(r"# .+\n\n> .+", source(cells[0]).strip()), "the first cell is a title and a one-line description, and nothing else"
    assert cells[0]["cell_type"] == cells[1]["cell_type"] == "markdown", "a page begins with words"
    assert cells[-1]["cell_type"] == "code" and re.fullmatch(r"#\|\s*hide\nimport nbdev; nbdev\.nbdev_export\(\)", source(cells[-1]).strip()), \
        "the last cell is hidden and exports"

@each_page
def test_opening_says_what_it_needs_and_how_long_it_takes(name):
    text = prose(PAGES[name][:4]).lower()
    for word in ("you will be able to", "you need"): assert word in text, f"the opening does not say: {word}"
    assert "minute" in text or "second" in text, "the opening does not say how long the page runs"

@each_page
def test_pictures_are_described(name):
    assert not bare_pictures(PAGES[name])
    labels = [option(c, "label") for c in code(PAGES[name]) if option(c, "label")]
    assert not repeated(labels), "labels used twice"

@each_page
def test_cells_are_short(name):
    long = {source(c)[:60]: len(to_read(c)) for c in code(PAGES[name]) if len(to_read(c)) > LONGEST_CELL}
    assert not long, f"cells of more than {LONGEST_CELL} lines: {long}"

@each_page
def test_anchors_are_unique(name):
    assert not repeated(re.findall(r"\{#([\w-]+)[^}]*\}", unfenced(prose(PAGES[name]))))

@each_page
def test_links_lead_somewhere(name): assert not broken_links(name, PAGES, NBS)

@each_page
def test_outputs_are_clean(name):
    errors = [o["ename"] for c in code(PAGES[name]) for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors and not machine_paths(PAGES[name]), errors + machine_paths(PAGES[name])

@each_page
def test_pages_are_checked(name):
    checks = sum(len(re.findall(r"^\s*(?:assert\b|test_\w+\(|check\w*\(|rejected\(|with ExceptionExpected)", source(c), re.M)) for c in code(PAGES[name]))
    assert checks >= (5 if name == "00_one_page" else 10), f"{checks} checks on the page"

# ------------------------------------------------------------------ chapters
@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_has_exercises_recap_and_reading(name):
    headings = re.findall(r"^#{2,3} (.+)$", prose(PAGES[name]), re.M)
    assert sum(h.startswith("Exercise") for h in headings) >= 3, headings
    for wanted in ("recap|summary|what to remember|what (we|you) have", "where to read more"):
        assert any(re.match(wanted, h.lower()) for h in headings), f"no {wanted}: {headings}"
    assert sum(has_picture(c) for c in code(PAGES[name])) >= 3, "fewer than three pictures"

def test_one_page_is_short():
    shown = [l for c in code(PAGES["00_one_page"]) if not re.match(r"#\|\s*hide", source(c)) for l in lines(c)]
    assert len(shown) <= ONE_PAGE_LINES, f"{len(shown)} lines of code"

def test_sidebar_and_tour_name_every_page():
    import yaml
    contents = yaml.safe_load((NBS/"sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = [f for part in contents for f in (part["contents"] if isinstance(part, dict) else [part])]
    assert sorted(listed) == sorted(f"{n}.ipynb" for n in PAGES), "nbs/sidebar.yml and nbs/ differ"
    toured = {l.partition("#")[0] for l in links(PAGES["index"])}
    assert not {f"{n}.ipynb" for n in PAGES} - toured - {"index.ipynb"}, "the map on the tour leaves pages out"

def found_anchors(kind: str) -> dict:
    "Number -> pages that carry its anchor."
    found = {}
    for name, cells in PAGES.items():
        for n in re.findall(rf"\{{#{kind}-(\d+)\}}", unfenced(prose(cells))): found.setdefault(int(n), []).append(name)
    return found

def test_every_claim_is_met():
    found = found_anchors("claim")
    assert not set(CLAIMS) - set(found), f"claims without an anchor: {sorted(set(CLAIMS) - set(found))}"

def test_every_mistake_is_shown_and_linked():
    found, gallery = found_anchors("mistake"), links(PAGES["92_mistakes"])
    for n in MISTAKES: assert "92_mistakes" in found.get(n, []), f"mistake {n} is not in the gallery"
    for n, names in found.items():
        homes = [p for p in names if p != "92_mistakes"]
        assert not homes or any(f"{p}.ipynb#mistake-{n}" in gallery for p in homes), f"the gallery does not link to mistake {n} in {homes}"

# ------------------------------------------------------------------ exercises
def checkers() -> list:
    "Exercise checkers that the modules export, as (module, name)."
    found = []
    for path in sorted(LIB.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
        found += [(path.stem, n.name) for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("check_") and n.name not in public]
    return found

def test_checkers_are_found(): assert len(checkers()) >= 3*len({m for m, _ in checkers()}) > 0

@pytest.mark.parametrize("name", CHAPTERS)
def test_exercises_have_solutions(name):
    "Under the chapter's name in the solutions stand its exercises, with the same titles."
    def exercises(text): return [h.partition(" {#")[0] for h in re.findall(r"^#{2,3} (Exercise .+)$", text, re.M)]
    title = re.match(r"# (.+)", source(PAGES[name][0]))[1].strip()
    section = re.search(rf"^## {re.escape(title)}[^\n]*\n(.*?)(?=^## |\Z)", prose(PAGES["93_solutions"]), re.M | re.S)
    assert section, f"the solutions have no section {title!r}"
    assert exercises(section[1]) == exercises(prose(PAGES[name]))

@pytest.mark.parametrize("module, checker", checkers(), ids=lambda o: o)
def test_checker_is_used_in_the_solutions(module, checker):
    text = "\n".join(source(c) for c in code(PAGES["93_solutions"]) if "eval: false" not in source(c))
    assert re.search(rf"(?<![\w]){checker}\(", text), f"no right answer is run through {checker}"
    assert re.search(rf"rejected\({checker},", text), f"no wrong answer is run through {checker}"
    chapter = next(n for n in CHAPTERS if n.partition("_")[2] == module)
    page = "\n".join(source(c) for c in code(PAGES[chapter]))
    assert re.search(rf"^{checker}\(", page, re.M), f"{chapter} does not ask the reader to run {checker}"

# ------------------------------------------------------------------ the checks themselves can fail
def md(text): return dict(cell_type="markdown", source=text)
def py(text, **output): return dict(cell_type="code", source=text, outputs=[dict(output_type="display_data", **output)] if output else [])

def test_broken_links_are_seen():
    pages = {"1_a": [md("## Title {#sec-x}\n\n## A plain one\n\n[](#sec-x) [](#sec-y) [](2_b.ipynb#claim-1) [](2_b.ipynb#claim-2) [](3_c.ipynb) [](no.png) [](#a-plain-one) `[](9.ipynb)` [](https://a.b)")],
             "2_b": [md("[A claim.]{#claim-1}")]}
    assert [b.partition(":")[0] for b in broken_links("1_a", pages, NBS)] == ["#sec-y", "2_b.ipynb#claim-2", "3_c.ipynb", "no.png"]

def test_bare_pictures_are_seen():
    image = dict(data={"image/png": "x"})
    good = py("#| label: fig-a\n#| fig-cap: 'c'\n#| fig-alt: 'a'\n1", **image)
    assert bare_pictures([good, py("1", **image), py("#| fig-alt: 'a'\n1", **image), py("1")]) == ["1", "#| fig-alt: 'a'\n1"]

def test_machine_paths_are_seen():
    path = "/".join(["", "home", "someone", "x.png"])
    assert machine_paths([py("1", data={"text/plain": [f"saved {path}"]}), py("1", data={"text/plain": ["out/x.png a/opt/b 1/2"]})]) == [path]

def test_repeated_anchors_and_long_cells_are_seen():
    assert repeated(["a", "b", "a"]) == ["a"]
    assert len(lines(py("#| x\n\na\n# b\nc"))) == 2
    assert to_read(py("#| code-fold: true\na")) == [] and to_read(py("def f(\n    a: int,  # one\n    *,\n    b: int = 2,  # two\n) -> int:  # three\n    ...")) == ["def f(", "    ..."]
    assert anchors([md("```\n{#no}\n```\n## One, two: three!\n[x]{#yes}")]) == ["yes", "one-two-three"]
