"What all tests share: one thread policy, no display, and the tests marked slow only when asked for."
import os

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

def pytest_collection_modifyitems(config, items):
    if os.environ.get("DIFFUSION_BOOK_SLOW"): return
    skip = pytest.mark.skip(reason="slow: DIFFUSION_BOOK_SLOW=1 runs it")
    for item in items:
        if "slow" in item.keywords: item.add_marker(skip)
