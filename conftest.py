"""Set-up for all tests, the unit tests and the notebooks: one thread, no network, an empty progress folder."""

from __future__ import annotations

import os
import re
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

# The kernels inherit these. An empty folder for progress: CI sees the text that a new learner sees.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONHASHSEED", "0")
os.environ["HF_HUB_OFFLINE"] = "1"
_home = tempfile.TemporaryDirectory()
os.environ["LORA_EDU_HOME"] = _home.name


APPENDICES = {"A": "real", "B": "source"}  # each in a lane of its own


@cache
def _missing_text() -> str:
    """What this Python lacks of the laboratory's text, in one sentence; empty when nothing."""
    from lora_edu.lab import corpus

    return next((text.report() for text in map(corpus.load, ("manual", "code")) if not text.complete), "")


@cache
def _uses_the_laboratory(notebook: Path) -> bool:
    return re.search(r"\blab\.\w", notebook.read_text(encoding="utf-8")) is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # On other text the models train to other numbers; the cells must run all the same, and their asserts hold.
        if item.path.suffix == ".ipynb" and _uses_the_laboratory(item.path) and _missing_text():
            item.options["check"] = False  # type: ignore[attr-defined]
        path = Path(item.nodeid.split("::")[0])
        if path.suffix == ".ipynb":
            marker = APPENDICES[path.name[0]] if path.parent.name == "appendix" else "notebooks"
        else:
            marker = "browser" if "browser" in path.parts else "unit"
        item.add_marker(marker)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The seconds that each chapter took, without the start of its kernel, and why outputs were not compared."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            name = getattr(report, "nodeid", "").split("::")[0]
            if name.endswith(".ipynb") and hasattr(report, "duration"):  # a deselected cell has none
                seconds[name] += report.duration
    root = terminalreporter.config.rootpath
    if any(_uses_the_laboratory(root / name) for name in seconds) and (gaps := _missing_text()):
        terminalreporter.section("chapters of the laboratory ran without comparison")
        terminalreporter.write_line(gaps)
    if seconds:
        terminalreporter.section("seconds per chapter")
        for name, spent in sorted(seconds.items()):
            terminalreporter.write_line(f"{spent:6.1f}  {Path(name).name}")
