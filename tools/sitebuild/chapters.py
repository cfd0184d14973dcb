"""From `nbs/` to `_proc/`, nbdev's way, but as a book: exported code stays where it is told, its entry goes to the end.

nbdev's own documentation drops every exported cell and puts a description in its place. Here the code is the text, so
it stays visible in the story, marked as exported, and the descriptions are gathered in one section at the page's end.
"""
import ast
import inspect
import re
from pathlib import Path

import nbdev.serve
import nbdev.showdoc
from execnb.nbio import mk_cell
from fastcore.docments import MarkdownRenderer, docments
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import FilterDefaults

NOT_OURS = {"rm_export", "add_fold", "mv_exports"}  # what nbdev does with exported cells, and we don't

def anchor(name: str) -> str:
    "The anchor of a name's entry, which is the one that nbdev's doc-links point to."
    return name.lower()

def cell_text(value: object) -> str:
    "Escape what would end a table's cell."
    return re.sub(r"\s+", " ", str(value)).replace("|", r"\|")

def annotation(value: object) -> str:
    "Write a type as its author did, without the modules it lives in."
    if value is inspect.Parameter.empty or value is None: return ""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return re.sub(r"\b(?:[a-zA-Z_]\w*\.)+(\w+)", r"\1", text.strip("'"))

def default(value: object) -> str:
    "Write a default value; a function is its name."
    if value is inspect.Parameter.empty: return ""
    return getattr(value, "__name__", None) or repr(value)

FIELD = re.compile(r"^ +(\w+)\s*:\s*([^#=]+?)\s*(?:=\s*([^#]+?)\s*)?(?:#\s*(.*))?$", re.M)

def field_notes(cls: type) -> list:
    "The fields of a named tuple, with the comments beside them, read from the exported module."
    head = rf"^class {cls.__name__}\b.*?:\n(.*?)(?=^\S|\Z)"
    for path in sorted(Path(get_config().lib_path).glob("*.py")):
        if m := re.search(head, path.read_text(encoding="utf-8"), re.S | re.M):
            return [(f"`{name}`", kind, value, note) for name, kind, value, note in FIELD.findall(m[1]) if name in cls._fields]
    return []

class Shown:
    "A default value that prints as its author would write it."
    def __init__(self, value): self.value = value
    def __repr__(self): return default(self.value)

class ApiEntry(MarkdownRenderer):
    "What `show_doc` writes on the site: name, call, docstring, and a table of the parameters."
    def _repr_markdown_(self):
        top = self.nm.split(".")[0]
        parts = [f"{'#' * self.title_level} {self.nm} {{#{anchor(self.nm)}}}", f"```python\n{self.call()}\n```",
                 (self.docs or "").strip(), self.table(), f"[The code of {self.nm}](#source-{anchor(top)}){{.api-source}}"]
        return "::: {.api-entry}\n" + "\n\n".join(p for p in parts if p) + "\n:::\n"

    def call(self):
        "The name with its parameters, without their types: `jump(x0, abar, eps=None)`."
        if self.sig is None: return self.nm
        params = [p.replace(annotation=p.empty) for p in self.sig.parameters.values() if p.name != "self"]
        shown = [p.replace(default=Shown(p.default)) if p.default is not p.empty else p for p in params]
        return self.nm + str(inspect.Signature(shown))

    def rows(self):
        "What is known of each parameter, and of what comes back: name, type, default, meaning."
        if hasattr(self.sym, "_fields"): return field_notes(self.sym)
        try: notes = docments(self.sym, full=True, returns=True)
        except Exception: return []                     # a name without source, such as an alias of a built-in
        stars = {p.name: {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") for p in (self.sig.parameters.values() if self.sig else ())}
        rows = [(f"`{stars.get(k, '')}{k}`", annotation(v.get("anno")), default(v.get("default")), v.get("docment"))
                for k, v in notes.items() if k not in ("self", "return")]
        back = None if inspect.isclass(self.sym) else notes.get("return")
        kind = annotation(back.get("anno")) if back else ""
        return rows + ([("*returns*", kind, "", back.get("docment"))] if back and (kind or back.get("docment")) else [])

    def table(self):
        "The table of the parameters and of what comes back; empty when nothing is said about them."
        rows = self.rows()
        if not any(kind or note for _, kind, _, note in rows): return ""
        code = lambda o: f"`{cell_text(o)}`" if o else ""
        lines = [f"| {name} | {code(kind)} | {code(value)} | {cell_text(note or '')} |" for name, kind, value, note in rows]
        return "\n".join(["| parameter | type | default | meaning |", "|:--|:--|:--|:--|", *lines])

def patched(node) -> str:
    "The name of a function, with its class in front where `@patch` adds it to one: `Denoiser.predict`."
    marks = [getattr(d.func if isinstance(d, ast.Call) else d, "id", "") for d in node.decorator_list]
    owner = isinstance(node, ast.FunctionDef) and "patch" in marks and node.args.args and node.args.args[0].annotation
    return f"{ast.unparse(owner)}.{node.name}" if owner else node.name

def defined(cell) -> list:
    "The names a cell defines at its top level, functions and classes and constants."
    try: body = ast.parse(cell.source).body
    except SyntaxError: return []
    names = [patched(o) for o in body if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    return names + [t.id for o in body if isinstance(o, ast.Assign) for t in o.targets if isinstance(t, ast.Name)]

class BookPage(Processor):
    "Mark exported cells, and gather the entries of the module under a heading at the end."
    def begin(self):
        first = next((c.directives_["default_exp"] for c in self.nb.cells if "default_exp" in c.get("directives_", {})), None)
        self.module = f"diffusion_book.{first[0]}" if first else None

    def cell(self, cell):
        if "default_exp" in (cell.get("directives_") or {}) and not defined(cell): del cell["source"]

    def end(self):
        story, entries = [], []
        for c in self.nb.cells:
            if not (c and c.get("source")): continue
            marks = set(c.get("directives_") or {})
            if c.cell_type == "code" and re.search(r"^show_doc\(", c.source, re.M): entries.append(c)
            elif c.cell_type == "code" and marks & {"export", "exports", "exporti"}:
                anchors = "".join(f"[]{{#source-{anchor(o).replace('.', '-')}}}" for o in defined(c))
                kind = ".exported-internal" if "exporti" in marks else ".exported"
                story += [mk_cell(f"{anchors}\n\n:::: {{{kind}}}", "markdown"), c, mk_cell("::::", "markdown")]
            else: story.append(c)
        if entries:
            head = f"## The module {self.module} {{#api}}\n\nWhat this chapter exports. The code stands in the cells above that an amber bar marks."
            story += [mk_cell(head, "markdown"), *entries]
        self.nb.cells = story

class BookProcessors(FilterDefaults):
    "nbdev's processors, with exported cells kept."
    def base_procs(self):
        return [p for p in super().base_procs() if p.__name__ not in NOT_OURS] + [BookPage]

def process(root) -> None:
    "Make `_proc/` from `nbs/`: imports and exported cells are run, everything else shows its saved output."
    ours, theirs = (BookProcessors, ApiEntry), (nbdev.serve.FilterDefaults, nbdev.showdoc.BasicMarkdownRenderer)
    nbdev.serve.FilterDefaults, nbdev.showdoc.BasicMarkdownRenderer = ours
    try: nbdev.serve.proc_nbs(force=True, n_workers=0)   # one process: torch is imported once
    finally: nbdev.serve.FilterDefaults, nbdev.showdoc.BasicMarkdownRenderer = theirs
