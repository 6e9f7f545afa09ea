"""JupyterLab as the learner meets it: `python -m lora_edu lab`, opened in a headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_edu.course import ROOT

REQUIRED = os.environ.get("REQUIRE_BROWSER") == "1"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage --disable-background-networking --disable-component-update --disable-sync".split()
TOKEN = "course"

if not REQUIRED:
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -e .[dev,browser]")
    if not CHROMIUM:
        pytest.skip("no Chromium or Chrome on this machine", allow_module_level=True)

from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The course's own launcher on loopback, with a learner's folder and Jupyter folders of its own."""
    home = tmp_path_factory.mktemp("learner")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {f"JUPYTER_{kind}_DIR": str(home / kind) for kind in ("CONFIG", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{kind}_DIR": str(home / kind) for kind in ("SETTINGS", "WORKSPACES")}
    environment = {
        **os.environ,
        **folders,
        "IPYTHONDIR": str(home / "ipython"),
        "LORA_EDU_HOME": str(home / "work"),
    }
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
    ]
    options += [f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True"]
    log = home / "lab.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "lora_edu", "lab", *options],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=out,
        )
        try:
            url, patience = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"{url}/api/status?token={TOKEN}", timeout=2)
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < patience, log.read_text()
                    time.sleep(0.2)
            yield url, home / "work"
        finally:
            # JupyterLab is a child of the launcher; ask it to end through its own interface.
            request = urllib.request.Request(
                f"{url}/api/shutdown?token={TOKEN}",
                method="POST",
                headers={"Authorization": f"token {TOKEN}"},
            )
            urllib.request.urlopen(request, timeout=10)
            server.wait(20)


@pytest.fixture(scope="module")
def page(lab: tuple[str, Path]) -> Iterator[Page]:
    """A page that fails its tests when it asks anything outside this machine or logs an error."""
    url, _ = lab
    outside: list[str] = []
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 1600})
        allowed = (url, url.replace("http", "ws"), "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(allowed) else outside.append(r.url))
        page.on("websocket", lambda w: None if w.url.startswith(allowed) else outside.append(w.url))
        # The language server, which is not installed, is looked for once.
        page.on(
            "console",
            lambda m: (
                errors.append(f"{m.text} {m.location}") if m.type == "error" and "lsp" not in str(m.location) else None
            ),
        )
        yield page
        browser.close()
    assert outside == [] and errors == []


def open_and_run(page: Page, url: str, name: str) -> Any:
    """Open one chapter, run all its cells as the menu does, and wait until the kernel has answered every one."""
    page.goto(f"{url}/doc/tree/{name}?token={TOKEN}&reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.context?.isReady")
    page.evaluate(
        """async () => {
            const widget = window.jupyterapp.shell.currentWidget;
            await widget.sessionContext.ready;
            await window.jupyterapp.commands.execute('notebook:run-all-cells');
        }"""
    )
    page.wait_for_function(
        """() => {
            const cells = window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells;
            return cells.filter(c => c.cell_type === 'code').every(c => c.execution_count !== null);
        }""",
        timeout=120_000,
    )
    outputs = page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells
            .filter(c => c.cell_type === 'code').flatMap(c => c.toJSON().outputs)"""
    )
    assert [o for o in outputs if o["output_type"] == "error"] == []
    return outputs


def test_the_slider_moves_picture_and_number(lab: tuple[str, Path], page: Page) -> None:
    url, work = lab
    assert '"execution_count": 1' not in (work / "01_low_rank_approximation.ipynb").read_text(), (
        "the copy shows results"
    )
    open_and_run(page, url, "01_low_rank_approximation.ipynb")
    cell = page.locator(".jp-Cell", has=page.locator(".noUi-handle"))
    cell.scroll_into_view_if_needed()
    picture, handle = cell.locator("img[alt^='The image at rank']"), cell.locator(".noUi-handle").first
    expect(cell.get_by_text("rank 20: error 13.6%")).to_be_visible(timeout=30_000)
    before = picture.get_attribute("src")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 90, y, steps=8)
    page.mouse.up()
    expect(cell.get_by_text("rank 20: error")).to_have_count(0, timeout=10_000)
    rank = round(float(handle.get_attribute("aria-valuenow") or 0))  # where the handle ended
    assert rank > 20
    expect(cell.get_by_text(re.compile(rf"rank {rank}: error .* stores {rank * 1067:,} numbers"))).to_be_visible(
        timeout=10_000
    )
    expect(picture).to_have_attribute("alt", f"The image at rank {rank}")
    assert picture.get_attribute("src") != before
    handle.focus()
    page.keyboard.press("ArrowRight")
    expect(cell.get_by_text(f"rank {rank + 1}: error")).to_be_visible(timeout=10_000)


def test_answers_unfold_and_figures_have_words(lab: tuple[str, Path], page: Page) -> None:
    url, _ = lab
    outputs = open_and_run(page, url, "01_low_rank_approximation.ipynb")
    pictures = [o for o in outputs if "image/png" in o.get("data", {}) and o["output_type"] == "display_data"]
    assert pictures and all(o["metadata"]["image/png"]["alt"] for o in pictures)
    words = page.get_by_text("The figure in words").first
    words.scroll_into_view_if_needed()
    words.click()
    expect(page.get_by_text("Rank 1 holds 91.5% of the energy and shows only stripes").last).to_be_visible()


@pytest.mark.parametrize("name", ["03_the_lora_layer.ipynb", "07_with_hugging_face_peft.ipynb"])
def test_the_other_chapters_run(name: str, lab: tuple[str, Path], page: Page) -> None:
    open_and_run(page, lab[0], name)
