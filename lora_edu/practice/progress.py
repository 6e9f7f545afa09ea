"""The learner's file of predictions and progress: one JSON file, written atomically, never lost.

It lives in the folder named by the environment variable LORA_EDU_HOME (`make lab` sets it to `work/`),
otherwise in the folder in which the notebook runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

State = dict[str, dict[str, Any]]
_PARTS = ("predictions", "exercises")


def path() -> Path:
    """Where the file is, or will be."""
    return Path(os.environ.get("LORA_EDU_HOME") or ".").resolve() / "progress.json"


def read() -> State:
    """What is stored; empty when there is no file yet. A damaged file is set aside under a new name, which is printed."""
    file = path()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return _empty()
    except (OSError, UnicodeDecodeError):
        return _set_aside(file)
    try:
        stored = json.loads(text)
        if all(isinstance(entry, dict) for part in _PARTS for entry in stored[part].values()):
            return stored
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    return _set_aside(file)


def update(change: Callable[[State], None]) -> None:
    """Read, let `change` alter the state, and write it whole or not at all. Two notebooks may do so at once.

    A file that cannot be written is said in one printed sentence: no exercise fails for it.
    """
    file = path()
    try:
        with FileLock(f"{file}.lock", timeout=5):
            state = read()
            change(state)
            part = file.with_suffix(".json.part")
            part.write_text(json.dumps(state, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(part, file)
    except (OSError, Timeout) as error:
        print(
            f"Your progress could not be stored in {file.name}: {error.__class__.__name__}. Nothing else is affected."
        )


def _empty() -> State:
    return {part: {} for part in _PARTS}


def _set_aside(file: Path) -> State:
    number = 1
    while (aside := file.with_name(f"progress.damaged-{number}.json")).exists():
        number += 1
    try:
        os.replace(file, aside)
    except OSError as error:
        raise OSError(f"{file.name} is damaged and could not be set aside ({error.__class__.__name__})") from error
    print(f"{file.name} could not be read. It is kept as {aside.name}, and a new one is begun.")
    return _empty()
