"""The site's builder: each thing it adds is seen to work, and each problem it reports is provoked once.

The pages here are made up on the spot; the real ones are looked at in `test_browser.py`.
"""
import base64
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib

import pytest
import yaml
from conftest import ROOT, missing_chromium
from sitebuild import checks, finish, pages
from sitebuild.bibliography import as_markdown, people, plain, read_bib

BIB = r"""
@inproceedings{ho2020denoising, title={Denoising Diffusion Probabilistic Models}, author={Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},
  booktitle={NeurIPS}, volume={33}, year={2020}, eprint={2006.11239}}
@article{sohl2015deep, author = "Jascha Sohl-Dickstein and Eric A. Weiss", title = {Deep {U}nsupervised}, year = 2015, url={https://arxiv.org/abs/1503.03585}}
@book{gauss1809, author={Carl Friedrich Gau{\ss}}, title={Theoria}, pages={1--2}, year={1809}, publisher={Perthes}, doi={10.1/2}}
"""

def png(width: int = 3, height: int = 2) -> bytes:
    "A white picture, the smallest way."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = zlib.compress(b"".join(b"\0" + b"\xff" * width for _ in range(height)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

PICTURE = {"output_type": "display_data", "metadata": {}, "data": {"image/png": base64.b64encode(png()).decode(), "text/plain": "<Figure>"}}
TABLE = {"output_type": "display_data", "metadata": {}, "data": {"text/markdown": ["| a |\n", "|---|\n", "| 1 |\n"]}}
ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": ["no"]}

def md(text: str) -> dict: return {"cell_type": "markdown", "metadata": {}, "source": text}
def raw(text: str) -> dict: return {"cell_type": "raw", "metadata": {}, "source": text}
def code(text: str, *outputs) -> dict: return {"cell_type": "code", "metadata": {}, "execution_count": None, "source": text, "outputs": list(outputs)}
def write(path, *cells):
    "Save a notebook."
    path.parent.mkdir(parents=True, exist_ok=True)
    for i, c in enumerate(cells): c["id"] = f"c{i}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": cells}), encoding="utf-8")

@pytest.fixture
def bib(tmp_path):
    (tmp_path/"references.bib").write_text(BIB, encoding="utf-8")
    return read_bib(tmp_path/"references.bib")

@pytest.fixture
def finished(tmp_path, bib):
    "A function that finishes a page made of cells: returns its text, its problems, and its cells."
    def run(*cells, renamed=None, name="page.ipynb"):
        problems = []
        write(tmp_path/name, *cells)
        page = pages.Page(tmp_path/name, bib, problems)
        page.finish(tmp_path, renamed or {})
        return "\n\n".join(c["source"] for c in page.nb["cells"]), problems, page.nb["cells"]
    return run

def figure(options: str = "#| label: fig-a\n#| fig-cap: 'A line.'\n#| fig-alt: 'It rises.'\n", *outputs) -> dict:
    return code(options + "draw()", *(outputs or (PICTURE,)))

# ---- the bibliography

def test_bibliography_is_read(bib):
    assert set(bib) == {"ho2020denoising", "sohl2015deep", "gauss1809"}
    assert [e["short"] for e in bib.values()] == ["Ho et al.", "Sohl-Dickstein and Weiss", "Gauß"]
    assert bib["sohl2015deep"]["title"] == "Deep Unsupervised" and bib["sohl2015deep"]["year"] == "2015"
    assert people(bib["ho2020denoising"])[0] == ("Jonathan", "Ho") and people(bib["gauss1809"]) == [("Carl Friedrich", "Gauß")]

def test_missing_bibliography_is_empty(tmp_path): assert read_bib(tmp_path/"none.bib") == {}

@pytest.mark.parametrize("latex, text", [(r'M{\"u}ller', "Müller"), (r"Erd\H os", r"Erd\H os"), (r"Fran\c{c}ois", "François"), (r"caf{\'e}", "café"),
                                         (r"\'{E}mile", "Émile"), ("1--2", "1–2"), (r"S{\o}ren \& Co", "Søren & Co"), ("{DDPM}", "DDPM")])
def test_latex_becomes_text(latex, text): assert plain(latex) == text

def test_entries_say_who_when_where(bib):
    entry = as_markdown("ho2020denoising", bib["ho2020denoising"])
    assert "Jonathan Ho, Ajay Jain and Pieter Abbeel (2020). Denoising Diffusion Probabilistic Models. *NeurIPS* 33. <https://arxiv.org/abs/2006.11239>" in entry
    assert "{#ref-ho2020denoising" in entry and "https://doi.org/10.1/2" in as_markdown("gauss1809", bib["gauss1809"])

# ---- numbers and references

def test_equations_are_numbered_and_linked(finished):
    text, problems, _ = finished(md("$$\na = b\n$$ {#eq-one}\n\n$$ c $$ {#eq-two}\n\n@eq-two and [@eq-one; @eq-two], (@eq-one)."))
    assert not problems
    assert '<span id="eq-one"></span>\n\n$$\na = b \\tag{1}\n$$' in text and "c \\tag{2}" in text
    assert "[Equation 2](#eq-two) and [Equation 1](#eq-one), [Equation 2](#eq-two), ([Equation 1](#eq-one))." in text

def test_figures_tables_and_sections_are_numbered(finished):
    text, problems, cells = finished(
        md("## The step {#sec-step}\n\nSee @fig-a, @tbl-t, @tbl-u, @fig-b in @sec-step."), figure(),
        code("#| label: tbl-t\n#| tbl-cap: 'Times'\nshow()", TABLE), md("| a |\n|---|\n| 1 |\n\n: Counts {#tbl-u}\n\n![A cat](cat.png){#fig-b fig-alt='x'}"))
    assert not problems
    assert "[Figure 1](#fig-a), [Table 1](#tbl-t), [Table 2](#tbl-u), [Figure 2](#fig-b) in [The step](#sec-step)" in text
    assert '#| fig-cap: "Figure 1: A line."' in text and ": Table 2: Counts {#tbl-u}" in text and "![Figure 2: A cat](cat.png){#fig-b" in text
    assert ": Table 1: Times {#tbl-t}" in cells[2]["outputs"][0]["data"]["text/markdown"]

def test_citations_are_linked_and_listed(finished):
    text, problems, cells = finished(md("As @ho2020denoising say [see @ho2020denoising, sec. 2; @sohl2015deep], and [-@gauss1809]: claim [(claim 1) [@sohl2015deep]]{#claim-1}."))
    assert not problems
    assert "As [Ho et al. (2020)](#ref-ho2020denoising) say (see [Ho et al. 2020](#ref-ho2020denoising), sec. 2; [Sohl-Dickstein and Weiss 2015](#ref-sohl2015deep)), and ([1809](#ref-gauss1809)): claim" in text
    assert "[(claim 1) ([Sohl-Dickstein and Weiss 2015](#ref-sohl2015deep))]{#claim-1}" in text
    assert "## References" in cells[-1]["source"] and cells[-1]["source"].count("csl-entry") == 3

@pytest.mark.parametrize("kept", ["`@fig-x` and ``@ho2020denoising``", "```\n@fig-x $$ a $$ {#eq-q}\n```", "$x_@fig-x$", "me@example.org", "[a](b@c.html)",
                                  "[text](https://x.org/@user)", "[@tag](there.html)"])
def test_code_maths_and_addresses_are_left_alone(finished, kept):
    text, problems, _ = finished(md(f"Before {kept}\n") if not kept.startswith("```") else md(kept))
    assert kept in text and not problems

def test_references_in_captions_are_linked(finished):
    text, problems, _ = finished(figure("#| label: fig-a\n#| fig-cap: 'As in @eq-x and [@gauss1809], `@code`.'\n#| fig-alt: 'x'\n"), md("$$ a $$ {#eq-x}"))
    assert not problems and "Figure 1: As in [Equation 1](#eq-x) and ([Gau\\u00df 1809](#ref-gauss1809)), `@code`." in text and "## References" in text

def test_citations_in_docstrings_are_linked(finished):
    entry = {"output_type": "display_data", "metadata": {}, "data": {"text/markdown": ["::: {.api-entry}\n", "As @gauss1809, `@code`.\n", ":::"]}}
    cells = finished(code("show_doc(f)", entry))[2]
    assert "As [Gauß (1809)](#ref-gauss1809), `@code`." in cells[0]["outputs"][0]["data"]["text/markdown"] and "## References" in cells[1]["source"]

def test_pages_are_called_by_their_output_file(tmp_path, bib):
    for name, title in (("12_forward", "forward"), ("13_jump", "jump")):
        write(tmp_path/f"{name}.ipynb", raw(f"---\noutput-file: {title}.html\ntitle: T\n---"), md("[next](13_jump.ipynb#sec-x), `13_jump.ipynb`"))
    found = [pages.Page(p, bib, []) for p in sorted(tmp_path.glob("*.ipynb"))]
    renamed = pages.page_names(found, tmp_path)
    assert renamed == {"12_forward.ipynb": "forward.ipynb", "13_jump.ipynb": "jump.ipynb"}
    for p in found: p.finish(tmp_path, renamed)
    assert "[next](jump.ipynb#sec-x), `13_jump.ipynb`" in json.loads((tmp_path/"forward.ipynb").read_text())["cells"][1]["source"]

def test_sidebar_leaves_out_what_is_missing(tmp_path):
    side = {"website": {"sidebar": {"contents": ["index.ipynb", {"section": "I", "contents": ["1_a.ipynb", "2_b.ipynb"]}, {"section": "II", "contents": ["3_c.ipynb"]}]}}}
    (tmp_path/"sidebar.yml").write_text(yaml.safe_dump(side))
    missing, unlisted = pages.fit_sidebar(tmp_path/"sidebar.yml", {"index.ipynb", "1_a.ipynb", "9_z.ipynb"}, {"1_a.ipynb": "a.ipynb"})
    assert missing == ["2_b.ipynb", "3_c.ipynb"] and unlisted == ["9_z.ipynb"]
    assert yaml.safe_load((tmp_path/"sidebar.yml").read_text())["website"]["sidebar"]["contents"] == ["index.ipynb", {"section": "I", "contents": ["a.ipynb"]}]

# ---- problems of a notebook, each provoked once

PROBLEMS = {
    "front matter not raw": ([md("---\ntitle: T\n---")], "YAML front matter must be in a raw cell"),
    "label twice": ([md("$$ a $$ {#eq-a}\n\n$$ b $$ {#eq-a}")], "label eq-a is used twice"),
    "options do not parse": ([code("#| label: fig-a\n#| fig-cap: 'it's'\nx", PICTURE)], "options do not parse"),
    "control character": ([figure('#| label: fig-a\n#| fig-cap: "the \\beta of it"\n#| fig-alt: \'x\'\n')], "put the caption and the alt text in single quotes"),
    "no caption": ([figure("#| label: fig-a\n#| fig-alt: 'x'\n")], "fig-a has no fig-cap"),
    "no alt": ([figure("#| label: fig-a\n#| fig-cap: 'x'\n")], "fig-a shows a picture without fig-alt"),
    "no alt, no label": ([code("plt.plot()", PICTURE)], "'plt.plot()' shows a picture without fig-alt"),
    "no picture": ([code("#| label: fig-a\n#| fig-cap: 'x'\n#| fig-alt: 'x'\ndraw()")], "fig-a shows no picture"),
    "two pictures": ([code("#| label: fig-a\n#| fig-cap: 'x'\n#| fig-alt: 'x'\ndraw()", PICTURE, PICTURE)], "fig-a shows 2 pictures"),
    "no table": ([code("#| label: tbl-a\n#| tbl-cap: 'x'\nprint()")], "tbl-a shows no table"),
    "error": ([code("f()", ERROR)], "shows the error ValueError: no"),
    "no such reference": ([md("See @fig-nowhere.")], "@fig-nowhere is not on this page"),
    "no such citation": ([md("See [@nobody1900].")], "no entry for @nobody1900"),
}
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_of_notebooks(finished, name):
    cells, wanted = PROBLEMS[name]
    found = finished(*cells)[1]
    assert any(wanted in o for o in found), found
    assert all(o.startswith("page.ipynb: ") for o in found)

def test_a_good_notebook_has_no_problems(finished):
    assert finished(raw("---\ntitle: T\n---"), md("@fig-a, @ho2020denoising"), figure())[1] == []

# ---- problems of a page, each provoked once

def page_problems(tmp_path, html: str, **files) -> list:
    (tmp_path/"page.html").write_text(html, encoding="utf-8")
    for name, text in files.items(): (tmp_path/name.replace("_", ".")).write_text(text, encoding="utf-8")
    return checks.check_site(tmp_path, ["/home/someone/book"])

BAD_PAGES = {
    "foreign script": ('<script src="https://cdn.example.org/x.js"></script>', "loads https://cdn.example.org/x.js"),
    "foreign style": ('<link rel="stylesheet" href="//cdn.example.org/x.css">', "loads //cdn.example.org/x.css"),
    "foreign picture": ('<img alt="a" src="http://example.org/x.png">', "loads http://example.org/x.png"),
    "mermaid": ('<script type="module">import mermaid from "x"</script>', "mermaid comes from another host"),
    "broken link": ('<a href="nowhere.html">x</a>', "broken link nowhere.html"),
    "broken picture": ('<img alt="a" src="figures/none.png">', "broken link figures/none.png"),
    "no anchor": ('<a href="#nowhere">x</a>', "no anchor #nowhere"),
    "no anchor elsewhere": ('<a href="other.html#nowhere">x</a>', "no anchor other.html#nowhere"),
    "no alt": ('<img src="other.html">', "has no alt text"),
    "id twice": ('<p id="a"></p><p id="a"></p>', "the id a is used twice"),
    "label left": ("<p>$ {#eq-x}</p>", "left as text: {#eq-x}"),
    "citation left": ("<p>as said [@ho2020denoising, p. 2]</p>", "left as text: [@ho2020denoising"),
    "reference left": ("<p>see @fig-x</p>", "left as text: @fig-x"),
    "formula left": ("<p>$$ a $$</p>", "left as text: $$"),
    "div left": ("<p>::: {.callout-note}</p>", "left as text: :::"),
    "machine's folder": ("<pre>File /home/someone/book/x.py</pre>", "shows the folder /home/someone/book of this machine"),
}
@pytest.mark.parametrize("name", BAD_PAGES)
def test_problems_of_pages(tmp_path, name):
    html, wanted = BAD_PAGES[name]
    found = page_problems(tmp_path, f"<html><body>{html}</body></html>", other_html="<p id='here'>x</p>")
    assert len(found) == 1 and found[0].startswith("page.html: ") and wanted in found[0], found

@pytest.mark.parametrize("css", ["@import url(https://fonts.example.org/x);", '@import "//fonts.example.org/x";', "a { background: url('http://x.org/a.png') }"])
def test_problems_of_style_sheets(tmp_path, css):
    found = page_problems(tmp_path, "", style_css=css)
    assert len(found) == 1 and found[0].startswith("style.css: loads "), found

def test_a_good_page_has_no_problems(tmp_path):
    html = ('<a href="https://example.org/">out</a><a href="#a">in</a><a href="other.html#here">there</a><a href="mailto:a@b.c">write</a><p id="a">x</p>'
            '<img alt="a" src="data:image/png;base64,AA"><pre>$$ {#eq-x} @fig-x\n::: {.x}</pre><code>@eq-x</code><script>let a = "$$"</script>')
    assert page_problems(tmp_path, html, other_html="<p id='here'>x</p>", style_css="a { background: url(x.svg) } /* https://example.org */") == []

# ---- what is done to the HTML

def test_pictures_become_files_with_a_size(tmp_path):
    text = finish.pictures_to_files(f'<img alt="a > b" src="data:image/png;base64,{base64.b64encode(png(5, 4)).decode()}" class="c">', tmp_path/"figures", "../figures/")
    found = re.fullmatch(r'<img alt="a > b" src="\.\./figures/(\w+\.png)" width="5" height="4" loading="lazy" class="c">', text)
    assert found and (tmp_path/"figures"/found[1]).read_bytes() == png(5, 4)

def test_captions_keep_their_maths_and_code():
    text = finish.CAPTION.sub(finish.caption, "<figcaption>Figure 2: $x_t$ &amp; `a`</figcaption>")
    assert '<strong class="caption-number">Figure 2.</strong>' in text and '<span class="math inline">' in text and "<code>a</code>" in text

def test_a_reference_leads_to_the_picture():
    text = finish.label_to_figure('<div id="fig-a" class="cell"><pre>x</pre><figure class="figure"></figure></div>')
    assert text == '<div class="cell"><pre>x</pre><figure class="figure" id="fig-a"></figure></div>'

def test_doc_links_stay_in_the_site():
    anchors = {"a.html": {"f", "source-g"}}
    def at(url, up=""): return finish.local_links(f'<a href="https://h.org/b/{url}">', "https://h.org/b", up, anchors, "c.html")
    assert at("a.html#f") == '<a href="a.html#f">' and at("a.html#f", "../") == '<a href="../a.html#f">'
    assert at("a.html#g") == '<a href="a.html#source-g">', "a name without an entry leads to its code"
    assert at("a.html#h") == '<a href="a.html">', "a name without either leads to its chapter"

def test_web_fonts_are_dropped():
    for css in ("@import url(https://f.org/css2?family=A:wght@400;700);a{}", '@import url("https://f.org/x") screen;a{}'):
        assert finish.drop_web_fonts(css) == "a{}"

def test_katex_comes_from_the_site(tmp_path):
    page = f'<head><title>T</title><link href="https://cdn.jsdelivr.net/npm/katex@1/k.css"><script src="https://cdn.jsdelivr.net/npm/katex@1/k.js" defer></script>{finish.SCRIPTS} content="./"></head><span class="math inline">'
    text = finish.finish_page(page, "a/b.html", tmp_path, "https://h.org", {}, None)
    assert "jsdelivr" not in text and 'href="../site_libs/katex/katex.min.css"' in text and text.count("<script") == 2

def test_run_box_names_the_notebook():
    box = finish.run_box("12_forward.ipynb", "../")
    assert 'href="../notebooks/12_forward.ipynb" download' in box and "jupyter lab nbs/12_forward.ipynb" in box

# ---- a whole site from a small project

FORWARD = '''def forward_step(
    x_prev: list,          # image at time $t-1$, any shape
    beta: float,           # variance added | between 0 and 1
    *, eps: list | None = None,  # noise
) -> list:                 # image at time t
    "One step of the forward process, $x_t$ (Ho et al. 2020, eq. 2)."
    return x_prev'''

@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project of two chapters, with everything a chapter may hold, and an installation of its package for nbdev to find."
    root = tmp_path_factory.mktemp("book")
    shutil.copy(ROOT/"settings.ini", root)
    shutil.copy(ROOT/"_quarto.yml", root)
    shutil.copytree(ROOT/"tools", root/"tools", ignore=shutil.ignore_patterns("__pycache__"))
    nbs = root/"nbs"
    shutil.copytree(ROOT/"nbs"/"fonts", nbs/"fonts")
    for name in ("styles.css", "favicon.svg", "head.html", "sidebar.yml"): shutil.copy(ROOT/"nbs"/name, nbs)
    (nbs/"_quarto.yml").symlink_to("../_quarto.yml")
    (nbs/"references.bib").write_text(BIB, encoding="utf-8")
    write(nbs/"index.ipynb", md("# The book\n\n> A tour"), md("Welcome to [the step](12_forward.ipynb#sec-step), `forward_step`, `Walker.walk` and `check_step`."))
    write(nbs/"12_forward.ipynb", md("# The step\n\n> One step"), code("#| default_exp forward"), code("#| export\nimport json"),
          md("## Where {#sec-step}\n\n[A claim (claim 14)]{#claim-14}, @eq-step, @fig-a, @tbl-t and @ho2020denoising: the reparameterisation trick.\n\n$$\nx = \\frac{a}{b}\n$$ {#eq-step}"),
          code(f"#| export\n{FORWARD}"), code("#| export\nclass Walker:\n    'Walks.'\n    def __init__(self, n: int): # how many\n        self.n = n\n    def walk(self, **how: str) -> int: # where to\n        'Goes.'\n        return self.n"),
          code("#| export\nfrom typing import NamedTuple\nclass Step(NamedTuple):\n    'A move.'\n    t: int      # the time it came to\n    x: float = 0. # the place"),
          code("from nbdev.showdoc import show_doc"), code("show_doc(Walker.walk)"),
          figure("#| label: fig-a\n#| fig-cap: 'Where $\\beta$ grows'\n#| fig-alt: 'A line rises.'\n"), code("#| label: tbl-t\n#| tbl-cap: 'Times'\nshow()", TABLE),
          md("[]{#mistake-4}\n\n::: {.callout-warning}\n## Mistake 4\nSee @eq-step.\n:::\n\n::: {.callout-note collapse=\"true\"}\n## Long\nFolded $x$.\n:::"),
          code("#| code-fold: true\n#| exporti\ndef check_step(f): assert f"), code("#| echo: false\nprint('unseen')"), code("#| hide\nsecret = 1"), code("#| hide\nimport nbdev; nbdev.nbdev_export()"))
    sidebar = {"website": {"sidebar": {"contents": ["index.ipynb", {"section": "I Destroying", "contents": ["12_forward.ipynb", "13_unwritten.ipynb"]}]}}}
    (nbs/"sidebar.yml").write_text(yaml.safe_dump(sidebar))
    run(root, "-c", "from nbdev.export import nb_export; from nbdev.doclinks import _build_modidx; from pathlib import Path; import os\n"
                    "Path('diffusion_book').mkdir(exist_ok=True); Path('diffusion_book/__init__.py').touch(); nb_export('nbs/12_forward.ipynb'); _build_modidx()")
    info = root/"diffusion_book-0.dist-info"
    info.mkdir()
    (info/"METADATA").write_text("Metadata-Version: 2.1\nName: diffusion_book\nVersion: 0\n")
    (info/"entry_points.txt").write_text("[nbdev]\ndiffusion_book=diffusion_book._modidx:d\n")
    return root

def run(root, *args):
    "Run Python in a project, with its package before any installed one."
    return subprocess.run([sys.executable, *args], cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})

@pytest.fixture(scope="module")
def built(project):
    "The project's pages, by name, once built."
    done = run(project, "tools/build_site.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "13_unwritten.ipynb" in done.stdout, "a chapter that is not written yet is named"
    return {p.name: p.read_text(encoding="utf-8") for p in (project/"_docs").glob("*.html")}

def test_whole_site_is_built(built):
    assert set(built) == {"index.html", "forward.html"}
    assert '<h1 class="title">The step</h1>' in built["forward.html"] and "One step" in built["forward.html"]

def test_exported_code_stays_in_the_story(built):
    page = built["forward.html"]
    story, api = page.split('id="api"')[0], page.split('id="api"', 1)[1]
    assert 'class="exported"' in story and "forward_step" in story and 'id="source-forward_step"' in story and 'id="source-check_step"' in story
    assert "secret" not in page and "unseen')" not in story and "nbdev_export" not in page and "default_exp" not in page
    assert 'id="forward_step"' in api and 'id="walker"' in api and 'id="walker.walk"' in api and 'id="check_step"' not in api

def test_patched_methods_are_named_with_their_class():
    from types import SimpleNamespace
    from sitebuild.chapters import defined
    cell = SimpleNamespace(source="@patch\ndef __call__(self: Ideal, x): pass\n\ndef free(x: int): pass\n\nLIMIT = 3")
    assert defined(cell) == ["Ideal.__call__", "free", "LIMIT"]

def test_entries_have_tables_of_parameters(built):
    entry = built["forward.html"].split('id="forward_step"', 1)[1].split('id="walker"')[0]
    text = re.sub(r"<[^>]+>", " ", entry)
    for wanted in ("parameter", "type", "default", "meaning", "variance added | between 0 and 1", "list | None", "returns", "image at time t"): assert wanted in text, wanted
    assert "forward_step(x_prev, beta, *, eps" in re.sub(r"<[^>]+>", "", entry)
    assert entry.count('class="math inline"') == 2, "maths in the docstring and in a parameter's comment"
    assert 'href="#source-forward_step"' in entry
    whole = re.sub(r"<[^>]+>", " ", built["forward.html"].split('id="api"', 1)[1])
    assert "**how" in whole and "the time it came to" in whole, "keywords keep their stars, and named tuples have tables"

def test_doc_links_of_the_whole_site(built):
    page = built["index.html"]
    for to in ("forward.html#forward_step", "forward.html#walker.walk", "forward.html#source-check_step", "forward.html#sec-step"): assert f'href="{to}"' in page, to

def test_figure_of_the_whole_site(built):
    page = built["forward.html"]
    assert re.search(r'<img alt="A line rises\." src="figures/\w+\.png" width="3" height="2" loading="lazy" class="img-fluid">', page)
    assert '<figure class="figure" id="fig-a">' in page and 'Figure 1.</strong> Where <span class="math inline">' in page
    assert "Table 1.</strong> Times" in page

def test_sidebar_search_and_notebooks_of_the_whole_site(project, built):
    assert "I Destroying" in built["forward.html"] and "13_unwritten" not in built["forward.html"] and 'class="page-navigation"' in built["forward.html"]
    assert any("reparameterisation" in o["text"] for o in json.loads((project/"_docs"/"search.json").read_text()))
    copy = json.loads((project/"_docs"/"notebooks"/"12_forward.ipynb").read_text())
    assert "nbdev_export" not in json.dumps(copy) and "secret" in json.dumps(copy)
    assert 'href="notebooks/12_forward.ipynb" download' in built["forward.html"]

def test_nothing_is_done_twice(project, built):
    assert "up to date" in run(project, "tools/build_site.py", "--if-needed").stdout

def test_strict_wants_every_chapter(project, built):
    done = run(project, "tools/build_site.py", "--strict")
    assert done.returncode == 1 and "sidebar.yml: 13_unwritten.ipynb does not exist" in done.stderr

def test_a_bad_chapter_fails_the_build_and_is_named(project, built):
    path = project/"nbs"/"14_bad.ipynb"
    write(path, md("# Bad\n\n> Worse"), md("See @fig-x and [nothing](15_none.ipynb)."))
    try: done = run(project, "tools/build_site.py")
    finally: path.unlink()
    assert done.returncode == 1
    for wanted in ("14_bad.ipynb: @fig-x is not on this page", "14_bad.ipynb: the sidebar does not list it", "bad.html: broken link"): assert wanted in done.stderr, done.stderr
    assert "up to date" not in run(project, "tools/build_site.py", "--if-needed").stdout, "a site with problems is not up to date"

# ---- where there is no Chromium

def test_browser_tests_are_skipped_at_home_and_fail_where_required():
    with pytest.raises(pytest.skip.Exception, match="get_chromium.py"): missing_chromium({})
    with pytest.raises(pytest.skip.Exception): missing_chromium({"CI": "false"})
    for env in ({"CI": "true"}, {"DIFFUSION_BOOK_BROWSER": "required"}):
        with pytest.raises(pytest.fail.Exception, match="required here"): missing_chromium(env)
