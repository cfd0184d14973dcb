"Read references.bib and write its entries as Markdown."
import re
import unicodedata
from pathlib import Path

ACCENTS = {'"': "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303", "c": "\u0327", "v": "\u030c", "=": "\u0304"}
LETTERS = {r"\ss": "ß", r"\o": "ø", r"\O": "Ø", r"\l": "ł", r"\L": "Ł", r"\ae": "æ", r"\aa": "å", r"\i": "i", r"\&": "&", r"\%": "%", r"\_": "_"}

def closing(
    text: str,   # BibTeX
    start: int,  # the place just after an opening brace
) -> int:        # the place just after the brace that closes it
    "Find where a braced value ends."
    depth, i = 1, start
    while depth and i < len(text):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        i += 1
    return i

def plain(
    value: str,  # a BibTeX value
) -> str:        # the same without braces, with accents as characters
    "Turn LaTeX accents, dashes and braces into plain text."
    def accent(m): return unicodedata.normalize("NFC", m[2] + ACCENTS[m[1]])
    value = re.sub(r"\{?\\(?:([\"'`^~=])\s*\{?(\w)\}?|([cv])\{(\w)\})\}?",
                   lambda m: accent([None, m[1] or m[3], m[2] or m[4]]), value)
    value = re.sub(r"\\(?:ss|[oOlLi]|ae|aa)(?![A-Za-z])|\\[&%_]", lambda m: LETTERS[m[0]], value)
    return re.sub(r"\s+", " ", value.replace("{", "").replace("}", "").replace("--", "–")).strip()

def fields(
    body: str,  # what stands between an entry's key and its closing brace
) -> dict:      # field name, in lower case -> plain text
    "Read the fields of one entry: values in braces, in quotes, or bare."
    found, i = {}, 0
    while m := re.compile(r"(\w+)\s*=\s*").search(body, i):
        j = m.end()
        if body[j:j + 1] == "{": i = closing(body, j + 1); value = body[j + 1:i - 1]
        elif body[j:j + 1] == '"': i = body.index('"', j + 1) + 1; value = body[j + 1:i - 1]
        else: bare = re.compile(r"\w*").match(body, j); i, value = bare.end(), bare[0]
        found.setdefault(m[1].lower(), plain(value))
    return found

def people(
    entry: dict,  # an entry's fields
) -> list:        # its authors as (first names, surname)
    "Split the author field, whichever way round the names are written."
    out = []
    for name in filter(None, re.split(r"\s+and\s+", entry.get("author", ""))):
        last, _, first = (o.strip() for o in name.partition(",")) if "," in name else ("", "", "")
        if not last: first, _, last = name.strip().rpartition(" ")
        out.append((first, last))
    return out

def listed(names: list) -> str:
    "Join names as a sentence does."
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]

def read_bib(
    path: Path,  # references.bib; a missing file has no entries
) -> dict:       # key -> fields, with `short` ("Ho et al.") added
    "Read a BibTeX file."
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    entries = {}
    for m in re.finditer(r"@(\w+)\s*\{\s*([^,\s]+)\s*,", text):
        entry = fields(text[m.end():closing(text, m.end()) - 1])
        surnames = [last for _, last in people(entry)] or [m[2]]
        entry["short"] = listed(surnames) if len(surnames) < 3 else f"{surnames[0]} et al."
        entries[m[2]] = entry
    return entries

def as_markdown(
    key: str,     # the entry's key, which becomes its anchor
    entry: dict,  # its fields
) -> str:         # one entry of the list of references
    "Write an entry: who, when, what, where, and a link."
    who = listed([f"{first} {last}".strip() for first, last in people(entry)] or [key])
    where = entry.get("journal") or entry.get("booktitle") or entry.get("publisher") or ""
    where = f" *{where}*{' ' + entry['volume'] if 'volume' in entry else ''}." if where else ""
    link = entry.get("url") or (f"https://doi.org/{entry['doi']}" if "doi" in entry else "")
    if not link and "eprint" in entry: link = f"https://arxiv.org/abs/{entry['eprint']}"
    link = f" <{link}>" if link else ""
    return f"::: {{#ref-{key} .csl-entry}}\n{who} ({entry.get('year', 'n.d.')}). {entry.get('title', '')}.{where}{link}\n:::\n"
