"""Settings for the whole test run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Some tests fork and kill the child; one forked from a process whose OpenMP threads are up waits for them for ever.
torch.set_num_threads(1)

# Shapes in annotations are promises; while tests run, they are checked at every call.
install_import_hook(
    [
        "tamis.maths",
        "tamis.solve",
        "tamis.model.head",
        "tamis.gradients.layers",
        "tamis.gradients.ghost",
        "tamis.gradients.jvp",
        "tamis.projection",
    ],
    "beartype.beartype",
)

# An example's time says more about what else the machine is doing than about the code.
# In CI the same examples every time, so that a commit is judged by its own change; elsewhere new ones, to learn more.
settings.register_profile("tamis", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tamis")

_BROWSER_ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
_PATIENCE_MS = 120_000  # a page takes a second; a busy machine is no fault of the page


class Browser:
    """A browser whose pages wait longer than Playwright would."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def new_page(self, **how: Any) -> Any:
        page = self._opened.new_page(**how)
        page.set_default_timeout(_PATIENCE_MS)
        return page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all pages of a file, closed behind it: while it runs, no other event loop can."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright, one of the dev dependencies, is not installed"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((found for name in names if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no browser on PATH (looked for {', '.join(names)})")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=executable, args=_BROWSER_ARGUMENTS, timeout=_PATIENCE_MS)
        yield Browser(opened)
        opened.close()
