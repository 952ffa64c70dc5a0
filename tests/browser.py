"""Pages in a real browser: Chromium, driven by Playwright. What it is asked for and what it complains of is noted."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
APPLICATIONS = ("Google Chrome", "Chromium")  # on macOS
ARGUMENTS = (
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
# Written down in each document before anything of it is read.
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", event => window.violations.push(
  `${event.effectiveDirective}: ${event.blockedURI} ${event.sample}`));
"""


def found() -> Path | None:
    """The program of a browser."""
    for name in PROGRAMS:
        if program := shutil.which(name):
            return Path(program)
    for name in APPLICATIONS if sys.platform == "darwin" else ():
        program = Path(f"/Applications/{name}.app/Contents/MacOS/{name}")
        if program.is_file():
            return program
    return None


def is_expected() -> bool:
    """Whether a machine without a browser is at fault: in CI, and where `make setup` can install one."""
    return bool(os.environ.get("CI")) or (os.geteuid() == 0 and shutil.which("apt-get") is not None)


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Any]:
    """A running browser. folder: for its home, and for its profile, which is a new one. Skips the test, or fails it in
    CI, where there is none.
    """
    program = found()
    if program is None:
        if is_expected():
            pytest.fail("no browser here: run `make setup`, or install chromium-headless-shell")
        pytest.skip("no browser here (Chromium or Chrome)")
    from playwright.sync_api import sync_playwright

    # Not in the home and the temporary folder of the commands under test, where everything is watched.
    own = {"HOME": str(folder), "TMPDIR": str(folder), "XDG_CACHE_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        driver = sync_playwright().start()
    try:
        arguments = [*ARGUMENTS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        running = driver.chromium.launch(executable_path=program, args=arguments, env={**os.environ, **own})
        try:
            yield running
        finally:
            running.close()
    finally:
        driver.stop()


@dataclass
class Seen:
    """A page as a browser shows it."""

    page: Any  # Playwright's
    requests: list[str] = field(default_factory=list)  # addresses that were asked for, the page's own among them
    said: list[str] = field(default_factory=list)  # warnings, errors and dialogs

    def violations(self) -> list[str]:
        """What the page's policy refused."""
        return list(self.page.evaluate("window.violations"))

    def quiet(self, *expected: str) -> None:
        """Assert that nothing was asked for but these, refused or complained of."""
        assert (self.said, self.violations()) == ([], [])
        assert set(self.requests) <= {*expected, self.page.url.partition("#")[0]}, self.requests

    def until(self, expression: str, argument: Any = None, seconds: float = 15.0) -> float:
        """Seconds until an expression holds. (Playwright's own way to wait is forbidden by the pages' policy.)"""
        began = time.monotonic()
        while not self.page.evaluate(expression, argument):
            assert time.monotonic() - began < seconds, (expression, argument)
            self.page.wait_for_timeout(50)
        return time.monotonic() - began

    def too_wide(self) -> list[str]:
        """Elements that stick out of the window, which make the page scroll to the side."""
        if not self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            return []
        sticking = """[...document.querySelectorAll("body *")].filter(one =>
            one.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !one.closest(
            ".scrolled, .plot")).map(one => one.outerHTML.slice(0, 200))"""
        return self.page.evaluate(sticking) or ["the page scrolls to the side"]

    def axe(self) -> list[str]:
        """Serious and critical faults of accessibility, as axe finds them."""
        if not self.page.evaluate("typeof axe === 'object'"):
            self.page.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text())
        result = self.page.evaluate("axe.run({resultTypes: ['violations']})")
        return [
            f"{one['id']}: {one['help']}: {node['html'][:200]} {node.get('failureSummary', '')[:300]}"
            for one in result["violations"]
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]


@contextlib.contextmanager
def shown(
    browser: Any,
    address: str,
    width: int = 1100,
    scheme: str = "light",
    scripts: bool = True,
    offline: bool = True,
) -> Iterator[Seen]:
    """The page at an address. width: of the window, pixels; scheme: light or dark; offline: the network is cut."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=scripts, offline=offline
    )
    context.set_default_timeout(15_000)
    context.add_init_script(WATCH)
    page = context.new_page()
    seen = Seen(page)
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("console", lambda message: seen.said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (seen.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    try:
        page.goto(address)
        yield seen
    finally:
        context.close()
