"""Set-up for all tests, the unit tests and the notebooks: one thread, no network, an empty progress folder."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

# The kernels inherit these. An empty folder for progress: CI sees the text that a new learner sees.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONHASHSEED", "0")
os.environ["HF_HUB_OFFLINE"] = "1"
_home = tempfile.TemporaryDirectory()
os.environ["LORA_EDU_HOME"] = _home.name


APPENDICES = {"A": "real", "B": "source"}  # each in a lane of its own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = Path(item.nodeid.split("::")[0])
        if path.suffix == ".ipynb":
            marker = APPENDICES[path.name[0]] if path.parent.name == "appendix" else "notebooks"
        else:
            marker = "browser" if "browser" in path.parts else "unit"
        item.add_marker(marker)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The seconds that each chapter took, without the start of its kernel."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            name = getattr(report, "nodeid", "").split("::")[0]
            if name.endswith(".ipynb") and hasattr(report, "duration"):  # a deselected cell has none
                seconds[Path(name).name] += report.duration
    if seconds:
        terminalreporter.section("seconds per chapter")
        for name, spent in sorted(seconds.items()):
            terminalreporter.write_line(f"{spent:6.1f}  {name}")
