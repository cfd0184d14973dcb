"""The site in a real Chromium: every page opens cleanly, its formulas are set, it is accessible, it fits a phone.

The site is built first unless it is up to date. Each page is opened once, in light; dark and the phone's width follow in
the same page, so the whole takes seconds a chapter.
"""
import functools
import http.server
import json
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

AXE = ROOT/"tests"/"vendor"/"axe-core"/"axe.min.js"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
COLOUR_RULES = ["color-contrast", "link-in-text-block"]   # what may differ between light and dark

FORMULAS = r"""() => {
  const maths = [...document.querySelectorAll('.math')];
  const prose = document.querySelector('main').cloneNode(true);
  prose.querySelectorAll('pre, code, script, .katex').forEach((e) => e.remove());
  const text = prose.textContent;
  return {
    count: maths.length,
    unset: maths.filter((e) => !e.querySelector('.katex')).map((e) => e.textContent.slice(0, 80)),
    errors: [...document.querySelectorAll('.katex-error')].map((e) => e.title || e.textContent.slice(0, 80)),
    raw: text.match(/\\[(\[)\]]|\$\$|\\(?:frac|sqrt|alpha|beta|bar|mathcal|epsilon|begin)\b/g) || [],
    references: text.match(/\[?@(?:fig|tbl|eq|sec)-[\w-]+|\{#[\w-]+\}/g) || [],
  };
}"""
WIDER = r"""() => {
  const limit = document.documentElement.clientWidth + 1;
  const clipped = (e) => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) { if (/auto|scroll|hidden|clip/.test(getComputedStyle(p).overflowX)) return true; } return false; };
  const wide = [...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > limit && !clipped(e));
  return { page: document.documentElement.scrollWidth, limit, wide: wide.slice(0, 3).map((e) => e.outerHTML.slice(0, 90)) };
}"""
REPEATED = r"""() => {
  const seen = new Set();
  document.querySelectorAll('main div.sourceCode').forEach((block) => {
    const kinds = [...new Set([...block.querySelectorAll('span')].map((e) => `${e.className} ${block.closest('.callout, .api-entry, .cell')?.className}`))];
    if (seen.size && kinds.every((k) => seen.has(k))) block.classList.add('repeated');
    kinds.forEach((k) => seen.add(k));
  });
}"""
CUT_OFF = r"""() => [...document.querySelectorAll('main pre, main table, main .math.display, main img')].filter((e) => {
  if (!e.getClientRects().length || e.closest('.code-copy-outer-scaffold[hidden]')) return false;
  for (let p = e; p && p.id !== 'quarto-content'; p = p.parentElement) if (p.scrollWidth > p.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(p).overflowX)) return false;
  return e.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
}).map((e) => e.outerHTML.slice(0, 90))"""

LINKS = r"""() => {
  const path = (a) => a && (new URL(a.href).pathname.slice(1) || 'index.html');
  return {
    sidebar: [...document.querySelectorAll('#quarto-sidebar .sidebar-section a.sidebar-link')].map(path),
    here: path(document.querySelector('#quarto-sidebar a.sidebar-link.active')),
    next: path(document.querySelector('.nav-page-next a')), previous: path(document.querySelector('.nav-page-previous a')),
    entries: [...document.querySelectorAll('.api-entry')].map((e) => [e.querySelector('h3')?.id, [...e.querySelectorAll('th')].map((h) => h.textContent).join(' ')]),
  };
}"""

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope="module")
def site():
    "The address of the site, built if need be and served from this machine."
    built = subprocess.run([sys.executable, "tools/build_site.py", "--if-needed"], cwd=ROOT, capture_output=True, text=True)
    if built.returncode: pytest.fail(f"the site does not build:\n{built.stdout[-2000:]}\n{built.stderr[-6000:]}", pytrace=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=ROOT/"_docs"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()

@pytest.fixture(scope="module")
def browser(chromium):
    "One Chromium for all tests."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        running = p.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()

def names() -> list:
    "The pages of the built site."
    return sorted(p.relative_to(ROOT/"_docs").as_posix() for p in (ROOT/"_docs").rglob("*.html"))

def open_page(context, site: str, name: str) -> tuple:
    "Open a page; return it with what went wrong: console errors, failed requests, requests to other hosts."
    page, wrong = context.new_page(), []
    page.set_default_timeout(90_000)      # a busy machine is no fault of the site
    page.on("console", lambda m: wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(f"script: {e}"))
    page.on("requestfailed", lambda r: wrong.append(f"failed: {r.url} {r.failure}"))
    page.on("request", lambda r: wrong.append(f"foreign: {r.url}") if not r.url.startswith((site, "data:", "blob:")) else None)
    page.on("response", lambda r: wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.goto(site + name, wait_until="load")
    page.evaluate("async () => { document.querySelectorAll('img[loading=lazy]').forEach((i) => { i.loading = 'eager'; });"
                  " await Promise.all([...document.images].map((i) => i.complete || new Promise((done) => { i.onload = i.onerror = done; })));"
                  " await document.fonts.ready; }")
    page.wait_for_timeout(120)            # the theme's script looks at the colours a moment after the load
    return page, wrong

def violations(page, rules: list | None = None) -> list:
    "axe-core's serious and critical findings, one line each; code blocks that show nothing new are looked at once."
    run = {"resultTypes": ["violations"], **({"runOnly": {"type": "rule", "values": rules}} if rules else {})}
    found = page.evaluate("(options) => axe.run({ exclude: ['.katex', '.repeated'] }, options).then((r) => r.violations)", run)
    return [f"{v['impact']} {v['id']}: {v['help']} ({len(v['nodes'])} times, as in {v['nodes'][0]['html'][:140]})"
            for v in found if v["impact"] in ("serious", "critical")]

def switch(page, theme: str) -> None:
    "Press the button in the header until the page has this theme."
    if page.evaluate("document.documentElement.classList.contains('quarto-dark')") != (theme == "dark"):
        page.click(".quarto-color-scheme-toggle")
        page.wait_for_function(f"document.documentElement.classList.contains('quarto-dark') === {json.dumps(theme == 'dark')}")

def look(context, site: str, name: str) -> dict:
    "Everything the tests want to know about one page."
    page, wrong = open_page(context, site, name)
    seen = {"formulas": page.evaluate(FORMULAS), "links": page.evaluate(LINKS), "broken": page.evaluate("[...document.images].filter((i) => !i.naturalWidth).map((i) => i.src)")}
    page.add_script_tag(path=AXE)
    page.evaluate(REPEATED)
    seen["light"] = violations(page)
    switch(page, "dark")
    seen["dark"] = violations(page, COLOUR_RULES)
    switch(page, "light")
    page.set_viewport_size(PHONE)
    seen |= {"phone": page.evaluate(WIDER), "cut": page.evaluate(CUT_OFF), "wrong": wrong}
    page.set_viewport_size(DESKTOP)
    page.close()
    return seen

@pytest.fixture(scope="module")
def pages(site, browser) -> dict:
    "What was seen on each page, by name."
    context = browser.new_context(viewport=DESKTOP, color_scheme="light", reduced_motion="reduce")
    seen = {name: look(context, site, name) for name in names()}
    context.close()
    return seen

def report(pages: dict, pick) -> str:
    "One line for each finding, with its page; empty when there is none."
    return "\n".join(f"{name}: {o}" for name, seen in pages.items() for o in pick(seen))

def test_every_chapter_has_a_page(pages):
    notebooks = [p.stem for p in (ROOT/"nbs").glob("*.ipynb")]
    assert len(pages) >= len(notebooks) > 0, f"{len(notebooks)} notebooks, {len(pages)} pages"

def test_pages_open_without_errors_or_foreign_requests(pages):
    assert not (found := report(pages, lambda s: s["wrong"])), found

def test_pictures_load(pages):
    assert not (found := report(pages, lambda s: s["broken"])), found

def test_formulas_are_set(pages):
    found = report(pages, lambda s: [*s["formulas"]["unset"], *s["formulas"]["errors"], *s["formulas"]["raw"]])
    assert not found, found
    assert sum(s["formulas"]["count"] for s in pages.values()) > 0, "no page has a formula: the test looks for the wrong thing"

def test_references_are_resolved(pages):
    assert not (found := report(pages, lambda s: s["formulas"]["references"])), found

@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible(pages, theme):
    assert not (found := report(pages, lambda s: s[theme])), found

def test_no_horizontal_scroll_on_a_phone(pages):
    found = report(pages, lambda s: [f"is {s['phone']['page']} px wide: {s['phone']['wide']}"] if s["phone"]["page"] > PHONE["width"] or s["phone"]["wide"] else [])
    assert not found, found

def test_nothing_is_cut_off_on_a_phone(pages):
    assert not (found := report(pages, lambda s: s["cut"])), found

@pytest.fixture
def desktop(browser, site):
    "A fresh reader at a desk, who has chosen nothing yet; gives a function that opens a page."
    context = browser.new_context(viewport=DESKTOP, color_scheme="light", reduced_motion="reduce", permissions=["clipboard-read", "clipboard-write"])
    yield lambda name="index.html": open_page(context, site, name)[0]
    context.close()

def longest() -> str:
    "The chapter with the most to look at."
    return max((n for n in names() if n != "index.html"), key=lambda n: (ROOT/"_docs"/n).stat().st_size)

def test_search_finds_a_word(desktop):
    page = desktop()
    page.fill(".smalldocs-search input", "reparameterisation")
    page.wait_for_selector(".search-result")
    first = page.locator(".search-result").first
    assert "reparameterisation" in first.inner_text().lower(), first.inner_text()
    first.click()
    page.wait_for_load_state()
    assert "reparameterisation" in page.inner_text("main").lower()

def test_search_says_when_it_finds_nothing(desktop):
    page = desktop()
    page.fill(".smalldocs-search input", "xqzvwkjhgq")
    assert page.inner_text(".search-none") == "No results"

def test_theme_is_chosen_and_kept(desktop, browser, site):
    page = desktop()
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    switch(page, "dark")
    page.wait_for_function(f"getComputedStyle(document.body).backgroundColor !== {json.dumps(light)}")
    page.reload()
    assert page.evaluate("document.documentElement.classList.contains('quarto-dark')"), "the choice is forgotten on the next page"

def test_theme_follows_the_reader(browser, site):
    context = browser.new_context(viewport=DESKTOP, color_scheme="dark")
    page, _ = open_page(context, site, "index.html")
    dark = page.evaluate("[document.documentElement.classList.contains('quarto-dark'), getComputedStyle(document.body).backgroundColor]")
    context.close()
    assert dark[0] and sum(map(int, dark[1].strip("rgba()").split(",")[:3])) < 200, dark

def test_figures_stand_on_a_light_card_in_the_dark(desktop):
    page = desktop(longest())
    switch(page, "dark")
    cards = page.evaluate("[...document.querySelectorAll('main figure img')].map((i) => getComputedStyle(i).backgroundColor)")
    assert cards and all(min(map(int, c.strip("rgba()").split(",")[:3])) > 220 for c in cards), cards

def test_copy_button_copies(desktop):
    page = desktop(longest())
    code = page.locator(".code-copy-outer-scaffold").first
    code.locator("button").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == code.locator("pre").inner_text().strip() != ""

def test_sidebar_and_next_lead_through_the_book(pages):
    listed = pages["index.html"]["links"]["sidebar"]
    assert sorted(listed) == sorted(pages), "the sidebar lists every page once"
    assert all(seen["links"]["sidebar"] == listed and seen["links"]["here"] == name for name, seen in pages.items())
    for before, after in zip([None, *listed], [*listed, None]):
        if before: assert pages[before]["links"]["next"] == after, before
        if after: assert pages[after]["links"]["previous"] == before, after

def test_sidebar_opens_on_a_phone(browser, site):
    context = browser.new_context(viewport=PHONE, has_touch=True)
    page, _ = open_page(context, site, "index.html")
    link = page.locator("#quarto-sidebar .sidebar-link").last
    assert page.evaluate("document.querySelector('#quarto-sidebar').getBoundingClientRect().right <= 0")
    page.click(".quarto-btn-toggle")
    page.wait_for_function("document.querySelector('#quarto-sidebar').getBoundingClientRect().left >= -1")
    link.scroll_into_view_if_needed()
    assert link.is_visible()
    context.close()

def test_chapter_can_be_downloaded(desktop):
    page = desktop(longest())
    with page.expect_download() as got: page.click(".run-it-download")
    nb = json.loads(got.value.path().read_text(encoding="utf-8"))
    assert nb["cells"] and not any("nbdev_export(" in "".join(c["source"]) for c in nb["cells"])

def test_names_in_backticks_lead_to_their_chapter(desktop):
    page = desktop(longest())
    href = page.evaluate("(document.querySelector('main p a > code') || {parentElement: {href: ''}}).parentElement.href")
    assert href.startswith(page.url.rsplit("/", 1)[0]), f"not a link of this site: {href!r}"
    page.goto(href)
    assert page.query_selector(f"[id='{href.partition('#')[2]}']") is not None

def test_entries_have_parameter_tables(pages):
    entries = [o for seen in pages.values() for o in seen["links"]["entries"]]
    assert entries and all(name for name, _ in entries)
    without = [name for name, head in entries if head != "parameter type default meaning"]
    assert len(without) < len(entries)/4, f"entries without a table of parameters: {without}"
