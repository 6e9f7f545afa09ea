"""Predictions: guessed before the result is seen, compared after it, scored at the end of the course."""

from __future__ import annotations

import math
from typing import Any

from lora_edu.practice import progress

Guess = float | str


def predict(key: str, guess: Any = ...) -> None:
    """Store a guess, a number or a word, under `key`; with `...` nothing happens.

    Once `reveal` has shown the result, the guess made before it stands.
    """
    if guess is ...:
        return
    if isinstance(guess, bool) or not isinstance(guess, (int, float, str)):
        print(f"A prediction is a number or a word; {guess!r} was not stored.")
        return
    if isinstance(guess, float) and not math.isfinite(guess):
        print(f"A prediction is a finite number; {guess!r} was not stored.")
        return

    def store(state: progress.State) -> None:
        made = state["predictions"].get(key, {})
        if "value" not in made:
            state["predictions"][key] = {"guess": guess}
        elif made["guess"] != guess:
            print(f"You have seen the result: your guess of {made['guess']} stands.")

    progress.update(store)


def reveal(key: str, value: Guess, within: float = 0.1) -> None:
    """Compare the guess under `key` with the measured `value`; without a guess nothing happens.

    A number counts as right within the relative tolerance `within`; a word when it is the same word.
    """
    try:
        made = progress.read()["predictions"].get(key)
    except OSError as error:
        print(f"Your prediction could not be read: {error}.")
        return
    if made is None:
        return
    guess = made["guess"]
    right = _right(guess, value, within)

    def store(state: progress.State) -> None:
        state["predictions"][key] = {"guess": guess, "value": value, "right": right}

    progress.update(store)
    print(f"You predicted {guess}; measured: {_short(value)}. {'Well predicted.' if right else 'A surprise.'}")


def _right(guess: Any, value: Guess, within: float) -> bool:
    if isinstance(value, str) or isinstance(guess, str):
        return str(guess).strip().casefold() == str(value).strip().casefold()
    return abs(guess - value) <= within * abs(value)


def _short(value: Guess) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
