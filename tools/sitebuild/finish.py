"""The HTML of the pages: nothing from other hosts, figures as files, captions with maths, and a box to run the chapter.

These are edits of what smalldocs 0.5.4 writes; `checks.py` sees to it that they met what they were made for.
"""
import base64
import hashlib
import html
import re
import struct
from pathlib import Path

from smalldocs.markdown import render

CAPTION = re.compile(r"<(figcaption|caption)([^>]*)>(.*?)</\1>", re.S)
KATEX_CDN = re.compile(r'<(?:link|script)[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(?:</script>)?')
EMBEDDED = re.compile(r'<img((?:(?!>|src=)[^"]|"[^"]*")*?)src="data:image/(png|gif|jpeg|svg\+xml);base64,([^"]+)"([^>]*)>')
SCRIPTS = '<meta name="smalldocs:offset"'

def size_of(
    data: bytes,  # a PNG or GIF file
) -> tuple:       # width and height in pixels, or None
    "Read a picture's size, so that the page need not jump when it arrives."
    if data[:8] == b"\x89PNG\r\n\x1a\n": return struct.unpack(">II", data[16:24])
    if data[:4] == b"GIF8": return struct.unpack("<HH", data[6:10])
    return None

def pictures_to_files(
    text: str,     # a page
    folder: Path,  # where pictures go
    prefix: str,   # the same folder as the page calls it
) -> str:
    "Save the pictures that a page carries in itself, and load each when the reader comes near it."
    def save(m):
        data, kind = base64.b64decode(m[3]), {"svg+xml": "svg", "jpeg": "jpg"}.get(m[2], m[2])
        name = f"{hashlib.sha256(data).hexdigest()[:16]}.{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(data)
        size = size_of(data)
        size = f' width="{size[0]}" height="{size[1]}"' if size else ""
        return f'<img{m[1]}src="{prefix}{name}"{size} loading="lazy"{m[4]}>'
    return EMBEDDED.sub(save, text)

def caption(m: re.Match) -> str:
    "A cell's caption arrives as escaped text; write it as Markdown, number in bold."
    inner = m[3]
    if "<" not in inner: inner = re.sub(r"^<p>|</p>$", "", render(html.unescape(inner), {}).strip())
    inner = re.sub(r"^\s*((?:Figure|Table) \d+):", r'<strong class="caption-number">\1.</strong>', inner, count=1)
    return f"<{m[1]}{m[2]}>{inner}</{m[1]}>"

def label_to_figure(text: str) -> str:
    "Move the label of a cell to its figure, so that a reference leads to the picture and not to the code above it."
    parts = re.split(r'(<div id="fig-[\w-]+" class="cell">)', text)
    for i in range(1, len(parts), 2):
        label = re.search(r'id="(.*?)"', parts[i])[1]
        moved, n = re.subn(r'<figure class="figure">', f'<figure class="figure" id="{label}">', parts[i + 1], count=1)
        if n: parts[i], parts[i + 1] = '<div class="cell">', moved
    return "".join(parts)

def local_links(
    text: str,       # a page
    site_url: str,   # where the site will live: nbdev's doc-links are absolute
    up: str,         # from the page to the root of the site
    anchors: dict,   # page -> its ids
    own: str,        # the page's name
) -> str:
    "Make doc-links relative; a name with no entry leads to its code, or else to the top of its chapter."
    def link(m):
        page, _, name = m[1].partition("#")
        ids = anchors.get(page, set())
        target = next((o for o in (name, f"source-{name.replace('.', '-')}") if o in ids), "")
        if name and not target and page == own: return f'href="{up}{page}"'
        return f'href="{up}{page}{"#" + target if target else ""}"'
    return re.sub(rf'href="{re.escape(site_url)}/([^"]*)"', link, text)

def accessible(text: str) -> str:
    "Mend what a screen reader would stumble over: folding sections are buttons, icons are decoration, copy buttons have names."
    text = re.sub(r'(<a [^>]*data-bs-toggle="collapse"[^>]*) role="navigation"', r'\1 role="button" tabindex="0"', text)
    text = re.sub(r'(<a [^>]*role="button" tabindex="0"[^>]*aria-label=")Toggle section"', r'\1Fold or unfold this part"', text)
    text = re.sub(r'(<div class="callout-header[^"]*") (data-bs-toggle="collapse")', r'\1 role="button" tabindex="0" \2', text)
    text = text.replace("<summary>Code</summary>", "<summary>Show the code</summary>")
    text = re.sub(r'(<i class="bi[^"]*") role="img"', r'\1 aria-hidden="true"', text)
    text = text.replace('<button title="Copy to Clipboard" class="code-copy-button">', '<button type="button" title="Copy to clipboard" aria-label="Copy this code" class="code-copy-button">')
    text = text.replace('<a class="quarto-color-scheme-toggle nav-link" href="" title="Toggle dark mode"', '<a class="quarto-color-scheme-toggle nav-link" href="#" role="button" title="Light or dark" aria-label="Switch between light and dark"')
    return text.replace('<body', '<body data-book="chapter"', 1).replace('<header id="quarto-header"', '<a class="skip-link" href="#quarto-document-content">Skip to the text</a><header id="quarto-header"', 1)

def run_box(
    notebook: str,  # the chapter's file, such as `12_forward.ipynb`
    up: str,        # from the page to the root of the site
) -> str:
    "The lines under the title that say how to run the chapter: a file to download, and what to type in a clone."
    e = html.escape(notebook)
    commands = f"make book                       # once: installs everything\n.venv/bin/pip install jupyterlab\n.venv/bin/jupyter lab nbs/{e}"
    return (f'<aside class="run-it" aria-label="Run this chapter"><p><span class="run-it-title">Run it yourself</span> '
            f'<a class="run-it-download" href="{up}notebooks/{e}" download>{e}</a></p>'
            f'<details><summary>how to open it</summary>'
            f'<p>In a clone of the repository:</p><pre><code>{commands}</code></pre>'
            f'<p>Or open the downloaded file where the package is installed: '
            f'<code>pip install "diffusion_book[dev]" jupyterlab</code>. Every cell runs on a laptop, in order, with no network.</p>'
            f'</details></aside>')

def drop_web_fonts(css: str) -> str:
    "Remove the imports of web fonts that themes begin with."
    return re.sub(r"""@import\s+url\(["']?https?:[^)]*\)[^;]*;?""", "", css)

def with_katex(
    text: str,    # a page with maths
    katex: str,   # where KaTeX lies, as the page calls it
) -> str:
    "Load KaTeX from the site: its style before ours, which may change it, its scripts before the one that calls them."
    text = text.replace("</title>", f'</title><link rel="stylesheet" href="{katex}/katex.min.css">', 1)
    scripts = "".join(f'<script src="{katex}/{o}" defer></script>' for o in ("katex.min.js", "contrib/auto-render.min.js"))
    return text.replace(SCRIPTS, scripts + SCRIPTS, 1)

def finish_page(
    text: str,            # the page as smalldocs wrote it
    own: str,             # its path in the site
    docs: Path,           # the site
    site_url: str,        # where it will live
    anchors: dict,        # page -> ids
    notebook: str | None,  # the notebook it was made from
) -> str:
    "All of the above, for one page."
    up = "../" * own.count("/")
    text = pictures_to_files(text, docs/"figures", f"{up}figures/")
    text = label_to_figure(CAPTION.sub(caption, text))
    text = KATEX_CDN.sub("", text)
    if 'class="math' in text: text = with_katex(text, f"{up}site_libs/katex")
    text = local_links(text, site_url, up, anchors, own)
    if notebook: text = after_title(text, run_box(notebook, up))
    return accessible(text)

def after_title(text: str, box: str) -> str:
    "Put the box under the title."
    start = text.find('<header id="title-block-header"')
    end = text.find("</header>", start)
    return text if min(start, end) < 0 else text[:end] + box + text[end:]
