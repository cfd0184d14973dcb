"""The Markdown of the pages: numbers, cross-references, citations, file names.

`_proc/` holds what Quarto reads. smalldocs reads most of the same; what it leaves out is written into a copy here:
labels of equations, figures and tables are numbered, `@fig-x` and `[@key, p. 2]` become links, `output-file` becomes the name.
"""
import json
import os
import re
from pathlib import Path

import yaml

from .bibliography import as_markdown

KINDS = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section"}
LABEL = rf"(?:{'|'.join(KINDS)})-[\w-]+"
FENCED = re.compile(r"^ {0,3}(?P<fence>```+|~~~+).*?^ {0,3}(?P=fence)[`~]*[ \t]*$", re.S | re.M)
CODE = re.compile(FENCED.pattern + r"|``.+?``|`[^`\n]+`|\$\$.*?\$\$|(?<![\\$])\$[^\s$](?:[^$\n]|\n(?!\s*\n))*\$", re.S | re.M)
EQUATION = re.compile(r"\$\$((?:(?!\$\$).)+?)\$\$[ \t]*\{#(eq-[\w-]+)\}", re.S)
IMAGE_CAPTION = re.compile(r"^(!\[)(.*?\]\([^)]*\))\{#(fig-[\w-]+)", re.M)
TABLE_CAPTION = re.compile(r"^(: +)(.*?)\{#(tbl-[\w-]+)", re.M)
SECTION = re.compile(r"^#+ +(.*?)\s*\{[^}]*#(sec-[\w-]+)[^}]*\}", re.M)
KEY = r"[\w][\w:.#$%&+?<>~/-]*"
BRACKETED = re.compile(r"\[([^\[\]]*@[^\[\]]*)\](?![({])")
CITED = re.compile(rf"(?P<before>[^@]*?)(?P<year_only>-?)@(?P<key>{KEY})(?P<after>.*)", re.S)
INLINE = re.compile(rf"(?<![\w@/.\[(#-])-?@{KEY}|(?<=[\s(])-?@{KEY}")
PICTURES = ("image/png", "image/gif", "image/jpeg", "image/svg+xml")

def outside(
    pattern: re.Pattern,  # what to leave alone, such as CODE
    change,               # function of a string
    text: str,            # Markdown
) -> str:                 # the text with `change` applied between the matches
    "Change the parts of a text that a pattern does not match."
    out, end = [], 0
    for m in pattern.finditer(text):
        out += [change(text[end:m.start()]), m[0]]
        end = m.end()
    return "".join(out) + change(text[end:])

def is_label(key: str) -> bool:
    "Is it the label of a figure, table, equation or section, and not the key of a citation?"
    return re.fullmatch(LABEL, key) is not None

class Page:
    "One notebook of the copy: read, numbered, linked, and written under its page's name."
    def __init__(
        self,
        path: Path,      # the notebook in the copy
        bib: dict,       # what `read_bib` gives
        problems: list,  # where to say what is wrong
    ):
        self.path, self.bib, self.problems = path, bib, problems
        self.counts, self.labels, self.cited = {}, {}, []
        self.nb = json.loads(path.read_text(encoding="utf-8"))
        for c in self.nb["cells"]: c["source"] = "".join(c["source"])
        self.front = self.front_matter()

    def problem(self, text: str) -> None: self.problems.append(f"{self.path.name}: {text}")

    def front_matter(self) -> dict:
        first = self.nb["cells"][0] if self.nb["cells"] else {"source": "", "cell_type": "raw"}
        if not first["source"].startswith("---"): return {}
        if first["cell_type"] != "raw": self.problem("YAML front matter must be in a raw cell")
        return yaml.safe_load(first["source"].strip().strip("-")) or {}

    # ---- first pass: number every label, and write the numbers where they belong

    def number(self, label: str, text: str | None = None) -> int:
        "Give a label the next number of its kind; a section is called by its title."
        if label in self.labels: self.problem(f"label {label} is used twice")
        kind = label.split("-")[0]
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.labels[label] = text or f"{KINDS[kind]} {self.counts[kind]}"
        return self.counts[kind]

    def collect(self) -> None:
        for c in self.nb["cells"]:
            if c["cell_type"] == "markdown": c["source"] = outside(FENCED, self.collect_text, c["source"])
            elif c["cell_type"] == "code": self.collect_code(c)

    def collect_text(self, text: str) -> str:
        def equation(m): return f'<span id="{m[2]}"></span>\n\n$$\n{m[1].strip()} \\tag{{{self.number(m[2])}}}\n$$\n'
        def caption(m): return f"{m[1]}{KINDS[m[3][:3]]} {self.number(m[3])}: {m[2]}{{#{m[3]}"
        text = TABLE_CAPTION.sub(caption, IMAGE_CAPTION.sub(caption, EQUATION.sub(equation, text)))
        for m in SECTION.finditer(text): self.number(m[2], m[1])
        return text

    def collect_code(self, c: dict) -> None:
        lines = c["source"].split("\n")
        n = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
        try: opts = yaml.safe_load("\n".join(o[2:].strip() for o in lines[:n])) or {}
        except yaml.YAMLError as e: return self.problem(f"options do not parse: {lines[:n]} ({e})")
        opts = opts if isinstance(opts, dict) else {}
        self.check_outputs(c, opts)
        label = str(opts.get("label", ""))
        if label.split("-")[0] not in ("fig", "tbl"): return
        key = f"{label[:3]}-cap"
        said = opts.get(key)
        if not isinstance(said, str) or not said.strip(): self.problem(f"{label} has no {key}")
        if re.search(r"[\x00-\x08\x0b-\x1f]", f"{said}{opts.get('fig-alt')}"): self.problem(f"{label}: put the caption and the alt text in single quotes")
        opts[key] = f"{KINDS[label[:3]]} {self.number(label)}: {said or ''}"
        if label.startswith("tbl"): self.caption_table(c, opts)
        c["options"], c["source"] = opts, "\n".join(lines[n:])

    def with_options(self, c: dict) -> None:
        "Write a cell's options back, with the references of its caption resolved."
        opts = {k: outside(CODE, self.resolve, v) if k in ("fig-cap", "tbl-cap") else v for k, v in c.pop("options").items()}
        c["source"] = "\n".join([*(f"#| {k}: {json.dumps(v)}" for k, v in opts.items()), c["source"]])

    def caption_table(self, c: dict, opts: dict) -> None:
        "A table that a cell made as Markdown is captioned in that Markdown."
        for o in c["outputs"]:
            if "text/markdown" in o.get("data", {}):
                o["data"]["text/markdown"] = "".join(o["data"]["text/markdown"]).rstrip() + f"\n\n: {opts.pop('tbl-cap')} {{#{opts.pop('label')}}}\n"
                return
        if not any("text/html" in o.get("data", {}) for o in c["outputs"]): self.problem(f"{opts['label']} shows no table")

    def check_outputs(self, c: dict, opts: dict) -> None:
        "A picture has a description, a labelled figure has a picture, and no cell shows an error it does not announce."
        shown = opts.get("output", True) is not False and opts.get("include", True) is not False
        pictures = sum(any(k in o.get("data", {}) for k in PICTURES) for o in c["outputs"]) if shown else 0
        name = opts.get("label") or f"the cell {c['source'].splitlines()[-1][:60]!r}"
        alt = opts.get("fig-alt")
        if pictures and not (isinstance(alt, str) and alt.strip()): self.problem(f"{name} shows a picture without fig-alt")
        if pictures > 1: self.problem(f"{name} shows {pictures} pictures; give each a cell, a caption and a description of its own")
        if str(opts.get("label", "")).startswith("fig-") and not pictures: self.problem(f"{name} shows no picture")
        for o in c["outputs"]:
            if o["output_type"] == "error": self.problem(f"{name} shows the error {o.get('ename')}: {o.get('evalue')}")

    # ---- second pass: turn references and citations into links

    def cross_reference(self, label: str) -> str:
        if label not in self.labels:
            self.problem(f"@{label} is not on this page")
            return f"@{label}"
        return f"[{self.labels[label]}](#{label})"

    def cite(self, key: str, after: str = "", year_only: bool = False, in_text: bool = False) -> str:
        entry = self.bib.get(key)
        if entry is None:
            self.problem(f"no entry for @{key}")
            return f"@{key}"
        if key not in self.cited: self.cited.append(key)
        year = entry.get("year", "n.d.")
        if in_text: return f"[{entry['short']} ({year})](#ref-{key})"
        return (f"[{year}](#ref-{key})" if year_only else f"[{entry['short']} {year}](#ref-{key})") + after

    def one(self, m: re.Match) -> str:
        "A reference outside brackets: `@fig-x`, `@ho2020denoising`."
        key = m[0].lstrip("-@")
        name = key.rstrip(".:,?")
        return (self.cross_reference(name) if is_label(name) else self.cite(name, in_text=True)) + key[len(name):]

    def group(self, m: re.Match) -> str:
        "A reference in brackets: `[@a; see @b, sec. 2]`, `[-@a]`, `[@fig-x; @eq-y]`."
        items = [CITED.fullmatch(o.strip()) for o in m[1].split(";")]
        if not all(items) or any("@" in o["after"] for o in items): return m[0]
        labels = [o["key"] for o in items if is_label(o["key"])]
        if labels: return ", ".join(map(self.cross_reference, labels)) if len(labels) == len(items) else m[0]
        return "(" + "; ".join(o["before"] + self.cite(o["key"], o["after"], bool(o["year_only"])) for o in items) + ")"

    def resolve(self, text: str) -> str:
        return INLINE.sub(self.one, BRACKETED.sub(self.group, text))

    # ---- the page as it is handed to smalldocs

    def finish(
        self,
        root: Path,     # the folder of the copy
        renamed: dict,  # notebook -> the name of its page, both relative to the folder
    ) -> None:
        "Number, link, add the references, and write the notebook under the name of its page."
        here = self.path.relative_to(root)
        def link(m):    # a page keeps its folder, so only the last part of a link changes
            to = os.path.normpath((here.parent/m[2]).as_posix())
            return m[1] + m[2][:len(m[2]) - len(Path(m[2]).name)] + Path(renamed.get(to, to)).name
        self.collect()
        def linked(text): return outside(CODE, lambda t: re.sub(r"(\]\()([\w./-]+\.ipynb)", link, self.resolve(t)), text)
        for c in self.nb["cells"]:
            if c["cell_type"] == "markdown": c["source"] = linked(c["source"])
            if "options" in c: self.with_options(c)
            for o in c.get("outputs", []):
                if "text/markdown" in o.get("data", {}): o["data"]["text/markdown"] = linked("".join(o["data"]["text/markdown"]))
        if self.cited:
            entries = sorted(self.cited, key=lambda k: (self.bib[k]["short"], self.bib[k].get("year", "")))
            source = "## References {#references .unnumbered}\n\n" + "\n".join(as_markdown(k, self.bib[k]) for k in entries)
            self.nb["cells"].append({"cell_type": "markdown", "id": "references", "metadata": {}, "source": source})
        self.path.write_text(json.dumps(self.nb), encoding="utf-8")
        if here.as_posix() in renamed: self.path.rename(root/renamed[here.as_posix()])

def page_names(
    pages: list,  # of Page
    root: Path,   # the folder of the copy
) -> dict:        # notebook -> page, for those whose front matter says `output-file`
    "What each notebook's page is called: `12_forward.ipynb` gives `forward.html`."
    named = {}
    for p in pages:
        here = p.path.relative_to(root)
        if p.front.get("output-file"): named[here.as_posix()] = here.with_name(Path(p.front["output-file"]).stem + ".ipynb").as_posix()
    return named

def listed(contents: object) -> list:
    "Every notebook named in a sidebar, in order."
    if isinstance(contents, str): return [contents]
    if isinstance(contents, dict): return listed(contents.get("contents") or contents.get("href") or [])
    return [o for c in contents for o in listed(c)]

def without(contents: list, missing: set) -> list:
    "The sidebar without some notebooks, and without the sections that this leaves empty."
    kept = []
    for c in contents:
        if isinstance(c, str) and c in missing: continue
        if isinstance(c, dict) and "contents" in c:
            c = {**c, "contents": without(c["contents"], missing)}
            if not c["contents"]: continue
        kept.append(c)
    return kept

def fit_sidebar(
    path: Path,     # sidebar.yml in the copy
    pages: set,     # the notebooks there are, by path
    renamed: dict,  # notebook -> page
) -> tuple:         # notebooks that the sidebar lists and are missing; notebooks that it does not list
    "Leave missing notebooks out of the copy's sidebar, and call the others by their pages' names."
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    sidebar = config["website"]["sidebar"]
    names = listed(sidebar["contents"])
    missing = [o for o in names if o not in pages]
    sidebar["contents"] = without(sidebar["contents"], set(missing))
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    path.write_text(re.sub(r"[\w./-]+\.ipynb", lambda m: renamed.get(m[0], m[0]), text), encoding="utf-8")
    return missing, sorted(pages - set(names))
