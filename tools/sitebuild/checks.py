"""What must hold for every page of the site; each finding is one line that names the page and says what is wrong."""
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

LOADS = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
NOT_PROSE = {"pre", "code", "script", "style", "head"}
VOID = {"img", "br", "hr", "meta", "link", "input", "source", "wbr", "col", "area", "base", "embed", "track"}
LEFT_AS_TEXT = re.compile(r"\{#[\w-]+[^}]*\}|\[?@(?:fig|tbl|eq|sec)-[\w-]+|\[-?@\w[\w:-]*|\$\$|^:::+.*$", re.M)

class Facts(HTMLParser):
    "What a page holds: ids, links, what it loads, its pictures, and its running text."
    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.images, self.prose, self.classes = [], [], [], [], [], set()
        self.open, self.inline_scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get("id"): self.ids.append(a["id"])
        self.classes |= set((a.get("class") or "").split())
        if tag == "a" and a.get("href") is not None: self.links.append(a["href"])
        if tag in LOADS and a.get(LOADS[tag]): self.loads.append(a[LOADS[tag]])
        if tag == "img": self.images.append((a.get("src", ""), a.get("alt")))
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag: pass

    def handle_data(self, data):
        if self.open and self.open[-1] == "script": self.inline_scripts.append(data)
        self.prose.append("\n" if NOT_PROSE & set(self.open) else data)

def scheme(url: str) -> str:
    "The scheme of an address: `https`, `data`, `//` for a host without one, or nothing for a file of the site."
    if url.startswith("//"): return "//"
    m = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*):", url)
    return m[1].lower() if m else ""

def target(page: str, url: str) -> tuple:
    "The file and the anchor that a page's link leads to."
    path, _, anchor = url.partition("#")
    path = path.partition("?")[0]
    file = os.path.normpath(os.path.join(os.path.dirname(page), unquote(path))) if path else page
    return ("index.html" if file == "." else file), unquote(anchor)

def check_page(
    name: str,    # the page's path in the site
    facts: Facts,
    files: set,   # every file of the site, by path
    ids: dict,    # page -> its ids
) -> list:        # problems
    "Check one page."
    found = [f"{name}: loads {u}" for u in facts.loads if scheme(u) in ("http", "https", "//")]
    found += [f"{name}: mermaid comes from another host; draw it with matplotlib" for s in facts.inline_scripts if "import mermaid" in s]
    for u in [*facts.links, *(o for o in facts.loads)]:
        if scheme(u): continue
        file, anchor = target(name, u)
        if file not in files: found.append(f"{name}: broken link {u}")
        elif anchor and file in ids and anchor not in ids[file]: found.append(f"{name}: no anchor {u}")
    found += [f"{name}: the picture {src[:60]} has no alt text" for src, alt in facts.images if not (alt or "").strip()]
    found += [f"{name}: the id {i} is used twice" for i in sorted({o for o in facts.ids if facts.ids.count(o) > 1})]
    found += [f"{name}: left as text: {w.strip()}" for w in LEFT_AS_TEXT.findall("".join(facts.prose))]
    return found

def check_css(name: str, text: str) -> list:
    "A style sheet loads nothing from other hosts."
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return [f"{name}: loads {u}" for u in re.findall(r"""(?:url\(|@import\s)\s*["']?((?:https?:)?//[^"')\s]+)""", text)]

def check_outputs(name: str, text: str, here: list) -> list:
    "No page shows a folder of the machine it was built on."
    return [f"{name}: shows the folder {o} of this machine" for o in here if o in text]

def check_site(
    docs: Path,       # the site
    here: list = (),  # folders of this machine, which no page may show
) -> list:            # problems
    "Check every page and style sheet of the site."
    texts = {p.relative_to(docs).as_posix(): p.read_text(encoding="utf-8") for p in docs.rglob("*.html")}
    facts = {name: Facts(text) for name, text in texts.items()}
    files = {p.relative_to(docs).as_posix() for p in docs.rglob("*") if p.is_file()}
    ids = {name: set(f.ids) for name, f in facts.items()}
    found = [o for name, f in facts.items() for o in check_page(name, f, files, ids)]
    found += [o for name, text in texts.items() for o in check_outputs(name, text, list(here))]
    found += [o for p in docs.rglob("*.css") for o in check_css(p.relative_to(docs).as_posix(), p.read_text(encoding="utf-8"))]
    return sorted(set(found))
