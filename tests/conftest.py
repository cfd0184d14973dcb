"What all tests share: one thread policy, no display, the slow ones only when asked for, and a Chromium for the site."
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("book", deadline=None, derandomize=True, max_examples=60)   # a busy machine is no failure
settings.load_profile("book")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tools"))   # the tools are tested as the modules they are

NO_CHROMIUM = "no Chromium for the browser tests: `python tools/get_chromium.py` brings one"

def pytest_collection_modifyitems(config, items):
    if os.environ.get("DIFFUSION_BOOK_SLOW"): return
    skip = pytest.mark.skip(reason="slow: DIFFUSION_BOOK_SLOW=1 runs it")
    for item in items:
        if "slow" in item.keywords: item.add_marker(skip)

def browser_required(env: dict) -> bool:
    "Must the browser tests run? On CI machines, and where DIFFUSION_BOOK_BROWSER says so."
    return env.get("DIFFUSION_BOOK_BROWSER") == "required" or env.get("CI", "").lower() not in ("", "0", "false")

def missing_chromium(env: dict):
    "Skip where there is no Chromium; fail where the browser tests are required."
    if browser_required(env): pytest.fail(f"{NO_CHROMIUM}; they are required here", pytrace=False)
    pytest.skip(NO_CHROMIUM)

@pytest.fixture(scope="session")
def chromium() -> str:
    "The path of a Chromium: the system's, else Playwright's own."
    from get_chromium import on_path, playwrights
    return on_path() or playwrights() or missing_chromium(os.environ)
