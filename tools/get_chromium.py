"""Bring a Chromium for the browser tests: one that is here, else Debian's package (as root), else Playwright's own.

Prints what it did. Where none can be had it says so and the browser tests are skipped; with
DIFFUSION_BOOK_BROWSER=required that is an error instead.
"""
import os, shutil, subprocess, sys

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]

def on_path() -> str | None: return next(filter(None, map(shutil.which, NAMES)), None)

def playwrights() -> str | None:
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p: path = p.chromium.executable_path
    return path if os.path.exists(path) else None

def run(*command: str) -> bool:
    "Run quietly; say the last line of what went wrong."
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    try: done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as e: print(f"   {command[0]}: {e}"); return False
    if done.returncode: print(f"   {' '.join(command)}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    return done.returncode == 0

def bring() -> str | None:
    if found := on_path() or playwrights(): return found
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        print("== installing Debian's Chromium for the browser tests", flush=True)
        install = "apt-get", "install", "-y", "--no-install-recommends", "chromium"
        if (run(*install) or (run("apt-get", "update") and run(*install))) and (found := on_path()): return found
    print("== installing Playwright's Chromium for the browser tests", flush=True)
    run(sys.executable, "-m", "playwright", "install", "chromium")
    return playwrights()

if __name__ == "__main__":
    if found := bring(): print(f"== Chromium: {found}")
    elif os.environ.get("DIFFUSION_BOOK_BROWSER") == "required": sys.exit("no Chromium could be had, and the browser tests are required")
    else: print("== no Chromium could be had here: the browser tests will be skipped")
