"""An exercise as data, and the judge that compares a learner's function with it.

The judge calls the function on every case, smallest first, and takes the first property that fails. When the
function behaves, on all cases, like one of the known mistakes, the mistake's sentence is shown instead of
the property's: it says which idea went wrong. Expected values come from the properties or the reference,
never from the learner's function, and no text contains them.
"""

from __future__ import annotations

import copy
import dis
import inspect
import io
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np

SECONDS = 5.0  # for all calls of one check together


@dataclass(frozen=True)
class Case:
    """Arguments for one call. With `refuses`, a right function raises ValueError; the text says why it should."""

    args: tuple[Any, ...]
    refuses: str = ""


@dataclass(frozen=True)
class Property:
    """What a right result has: `holds(result, *args)`, with the arguments as they were before the call.

    `sentence` is what the learner reads when it does not hold.
    """

    code: str
    sentence: str
    holds: Callable[..., bool]


@dataclass(frozen=True)
class Mistake:
    """A wrong solution that learners are known to write, its code, and the sentence that names its idea."""

    code: str
    sentence: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """One exercise. `parse` turns a raw result into what properties see, or raises; `observe` into comparable arrays.

    `call` is how the function is used on a case, by default once with the case's arguments; `needs` names a module
    without which the cases cannot be made.
    """

    number: str
    chapter: str
    minutes: int
    level: str
    importance: int
    task: str
    returns: str
    reference: Callable[..., Any]
    cases: Callable[[], Sequence[Case]]
    properties: tuple[Property, ...]
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, str, str]
    parse: Callable[[Any], Any]
    observe: Callable[..., tuple[Any, ...]] = lambda result, *args: result
    call: Callable[..., Any] = lambda function, *args: function(*args)
    changes_arguments: bool = False
    after: str = ""
    needs: str = ""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.reference.__name__)

    @property
    def heading(self) -> str:
        """The line that stands above the stub in the chapter."""
        return (
            f"**Exercise {self.number}: `{self.name}`** "
            f"({self.minutes} minutes, level {self.level}, importance {self.importance} of 5)"
        )


@dataclass(frozen=True)
class Report:
    """The verdict on a learner's function: `passed` is None when there is nothing to judge yet."""

    name: str
    passed: bool | None
    code: str
    text: str

    def __repr__(self) -> str:
        return f"{self.name}: {self.text}"


def arrays(count: int) -> Callable[[Any], tuple[np.ndarray, ...]]:
    """A parser for results made of `count` real arrays (or numbers, when count is 1)."""

    def parse(result: Any) -> tuple[np.ndarray, ...]:
        parts = (result,) if count == 1 else tuple(result)
        if len(parts) != count or (count > 1 and isinstance(result, (str, dict, np.ndarray))):
            raise TypeError
        converted = tuple(np.asarray(part) for part in parts)
        if any(part.dtype.kind not in "fiu" for part in converted):
            raise TypeError
        return tuple(part.astype(float) for part in converted)

    return parse


def module(result: Any) -> Any:
    """A parser for results that are a torch module."""
    from torch import nn

    if not isinstance(result, nn.Module):
        raise TypeError
    return result


def traced(result: Any) -> Any:
    """A parser for what a `call` has seen, which it returns in a SimpleNamespace; anything else is the wrong type."""
    if not isinstance(result, SimpleNamespace):
        raise TypeError
    return result


def judge(exercise: Exercise, function: Any, mistakes: Sequence[Mistake] | None = None) -> tuple[Report, str]:
    """The report on `function`, and the smallest input on which it fails (empty when it does not)."""
    name = exercise.name
    if not callable(function):
        kind = type(function).__name__
        return Report(name, False, "NOT_CALLABLE", f"check wants your function itself; it got a {kind}."), ""
    if _is_stub(function):
        return Report(name, None, "NOT_ATTEMPTED", "not attempted yet."), ""
    if exercise.needs and find_spec(exercise.needs) is None:
        return Report(name, None, "MISSING", f"this check needs {exercise.needs}, which is not installed."), ""
    behaviour = []
    failure: tuple[str, str, str] | None = None
    attempt = _Attempt(function, exercise)
    for case in _cases(exercise):
        seen, code, sentence = _examine(exercise, attempt, case)
        if code == "NOT_ATTEMPTED":
            return Report(name, None, code, sentence), ""
        behaviour.append(seen)
        if code and failure is None:
            failure = code, sentence, _describe(exercise, case)
        if code == "TIMEOUT":
            break
    printed = " It also prints; a function should return and keep quiet." if attempt.printed else ""
    if failure is None:
        text = f"passed all {len(behaviour)} cases.{printed}"
        return Report(name, True, "PASSED", f"{text} {exercise.after}".rstrip()), ""
    code, sentence, smallest = failure
    if code != "TIMEOUT":
        for mistake in exercise.mistakes if mistakes is None else mistakes:
            if _same(behaviour, _of_mistake(exercise, mistake)):
                code, sentence = mistake.code, mistake.sentence
                break
    return Report(name, False, code, f"not yet ({code}). {sentence}{printed}"), smallest


def _behaviour(exercise: Exercise, function: Callable[..., Any]) -> list[tuple[Any, ...]]:
    attempt = _Attempt(function, exercise)
    return [_examine(exercise, attempt, case)[0] for case in _cases(exercise)]


@cache
def _of_mistake(exercise: Exercise, mistake: Mistake) -> list[tuple[Any, ...]]:
    return _behaviour(exercise, mistake.function)


def _cases(exercise: Exercise) -> Sequence[Case]:
    with _own_randomness():
        return exercise.cases()


def _examine(exercise: Exercise, attempt: _Attempt, case: Case) -> tuple[tuple[Any, ...], str, str]:
    """What one call does (for comparison with mistakes), and the code and sentence of what is wrong with it."""
    args = copy.deepcopy(case.args)
    error = attempt.run(args)
    if isinstance(error, NotImplementedError):
        return (), "NOT_ATTEMPTED", "not attempted yet."
    if case.refuses:
        if isinstance(error, ValueError):
            return ("refused",), "", ""
        if error is None:
            return ("accepted",), "NO_GUARD", case.refuses
    if isinstance(error, _OutOfTime):
        return (
            ("endless",),
            "TIMEOUT",
            f"It had not returned after {SECONDS:.0f} seconds and was stopped. Is there a loop without an end?",
        )
    if error is not None:
        said = " ".join(str(error).split())[:200]
        return (
            ("raised", type(error), said),
            "RAISED",
            f"It raised {type(error).__name__}{f': {said}' if said else ''}.",
        )
    result = attempt.result
    if attempt.changed:
        return (
            ("changed", *_safely(exercise, result, case.args)),
            "MUTATES",
            ("It changes its input: whoever passed that array still needs it. Work on a copy."),
        )
    if result is None:
        return ("none",), "NONE", "It returned None. Is the return statement missing?"
    try:
        parsed = exercise.parse(result)
    except Exception:
        return (
            ("type", type(result)),
            "TYPE",
            f"It should return {exercise.returns}; it returned {_kind(result)}.",
        )
    try:
        seen = exercise.observe(parsed, *case.args)
        if any(not isinstance(part, str) and not np.isfinite(part).all() for part in seen):
            return seen, "NAN", "The result holds NaN or infinity."
        for check in exercise.properties:
            if not check.holds(parsed, *case.args):
                return seen, check.code, check.sentence
    except Exception:
        return (
            ("type", type(result)),
            "TYPE",
            f"It should return {exercise.returns}; what it returned cannot be used as such.",
        )
    return seen, "", ""


class _OutOfTime(BaseException):
    """Raised inside the learner's function by the alarm; a BaseException, so that `except Exception` lets it pass."""


class _Attempt:
    """Calls the learner's function: printing caught, time limited, its arguments watched."""

    def __init__(self, function: Callable[..., Any], exercise: Exercise) -> None:
        self.function, self.exercise = function, exercise
        self.left = SECONDS
        self.printed = False
        self.changed = False
        self.result: Any = None

    def run(self, args: tuple[Any, ...]) -> BaseException | None:
        before = copy.deepcopy(args)
        said = io.StringIO()
        start = time.monotonic()
        error: BaseException | None = None
        self.result = None
        try:
            with redirect_stdout(said), redirect_stderr(said), _quiet(), _own_randomness(), _alarm(self.left):
                self.result = self.exercise.call(self.function, *args)
        except KeyboardInterrupt:
            raise
        except BaseException as raised:
            error = raised
        self.left = max(0.1, self.left - (time.monotonic() - start))
        self.printed = self.printed or bool(said.getvalue().strip())
        self.changed = not self.exercise.changes_arguments and any(
            isinstance(a, np.ndarray) and not np.array_equal(a, b, equal_nan=True)
            for a, b in zip(args, before, strict=True)
        )
        return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, which would count as printing; NumPy warns of a division by zero, for example."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _own_randomness() -> Iterator[None]:
    """One seed for every call, so that verdicts repeat; the notebook's own random numbers go on undisturbed."""
    torch = sys.modules.get("torch")
    numpys, pythons, torchs = np.random.get_state(), random.getstate(), torch and torch.get_rng_state()
    np.random.seed(0), random.seed(0), torch and torch.manual_seed(0)
    try:
        yield
    finally:
        np.random.set_state(numpys), random.setstate(pythons), torch and torch.set_rng_state(torchs)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Interrupt the block after `seconds`, where the system has a timer signal and this is the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise _OutOfTime

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _is_stub(function: Callable[..., Any]) -> bool:
    """Whether the body, of a class every method's, is still `...` (or empty but for its docstring)."""
    if inspect.isclass(function):
        methods = [m for m in vars(function).values() if inspect.isfunction(m)]
        return bool(methods) and all(map(_is_stub, methods))
    if not inspect.isfunction(function):
        return False
    code = [i for i in dis.get_instructions(function) if i.opname not in ("RESUME", "NOP", "CACHE")]
    return [i.opname for i in code] in (["LOAD_CONST", "RETURN_VALUE"], ["RETURN_CONST"]) and code[0].argval is None


def _safely(exercise: Exercise, result: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        return exercise.observe(exercise.parse(result), *args)
    except Exception:
        return ()


def _same(left: list[tuple[Any, ...]], right: list[tuple[Any, ...]]) -> bool:
    """Whether two functions behaved alike on all cases: same refusals and errors, same numbers."""
    return len(left) == len(right) and all(_alike(a, b) for a, b in zip(left, right, strict=True))


def _alike(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    if len(left) != len(right):
        return False
    for a, b in zip(left, right, strict=True):
        words = isinstance(a, (str, type)), isinstance(b, (str, type))
        if words == (True, True):
            if a != b:
                return False
        elif any(words) or np.shape(a) != np.shape(b) or not np.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True):
            return False
    return True


def _kind(result: Any) -> str:
    if isinstance(result, np.ndarray):
        return f"one array of shape {result.shape}"
    if isinstance(result, (tuple, list)):
        return f"a {type(result).__name__} of {len(result)}"
    return f"a {type(result).__name__}"


def _describe(exercise: Exercise, case: Case) -> str:
    # A `call` that names its arguments says what the case holds; otherwise they are the function's own.
    named = [p.name for p in inspect.signature(exercise.call).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = named[1:] or list(inspect.signature(exercise.reference).parameters)
    return ", ".join(f"{name} = {_value(arg)}" for name, arg in zip(names, case.args, strict=False))


def _value(arg: Any) -> str:
    if isinstance(arg, np.ndarray):
        small = arg.size <= 12
        return " ".join(np.array2string(arg, precision=3, separator=", ").split()) if small else f"an array {arg.shape}"
    if hasattr(arg, "named_modules"):
        kinds = (f"{path}: {type(m).__name__}" for path, m in arg.named_modules() if path and not list(m.children()))
        return f"a {type(arg).__name__} ({', '.join(kinds)})"
    if hasattr(arg, "element_size"):  # a tensor
        return f"a tensor {tuple(arg.shape)} of {arg.dtype}"
    text = " ".join(repr(arg).split())
    return text if len(text) <= 120 else f"a {type(arg).__name__}"
