"""The question bank: every file valid, every provable answer proved, every fault named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from lora_edu.practice import bank

QUESTIONS = bank.load()


# The printed numbers of every question, and three draws where numbers are drawn.
RUNS = [(i, seed) for i, q in QUESTIONS.items() for seed in (None, 0, 1, 2) if seed is None or "numbers" in q]


@pytest.mark.parametrize(("identity", "seed"), RUNS)
def test_the_check_proves_the_answer(identity: str, seed: int | None) -> None:
    try:
        bank.prove(QUESTIONS[identity], seed)
    except ModuleNotFoundError as missing:
        if missing.name not in ("torch", "peft"):
            raise
        pytest.skip(f"{missing.name} is not installed")


@pytest.mark.parametrize("identity", [i for i, q in QUESTIONS.items() if "numbers" in q])
def test_a_wrong_number_fails_the_check(identity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    question = QUESTIONS[identity]
    right = getattr(bank.numbers, question["numbers"])(None)
    answer = {
        "break_even": "r",
        "truncation_errors": "relative",
        "lora_count": "count",
        "projections": "trained",
        "training_memory": "mixed",
    }[question["numbers"]]
    monkeypatch.setattr(bank.numbers, question["numbers"], lambda rng: {**right, answer: right[answer] + 1})
    with pytest.raises(AssertionError):
        bank.prove(question)


def test_new_numbers_are_drawn_and_printed_ones_stay() -> None:
    question = QUESTIONS["break-even"]
    texts = {bank.drawn(question, seed)[0]["question"] for seed in range(5)}
    assert len(texts) == 5 and "4096 x 11008" in bank.drawn(question)[0]["question"]
    assert "{" not in bank.render(question, 1)


def test_rendering_folds_the_answers_and_shows_the_correction() -> None:
    text = bank.render(QUESTIONS["reduce-mean"], 3)
    assert text.startswith("### Q3. ") and "**Verdict: False.**" in text
    assert text.count("<details>") == text.count("</details>") >= 3
    open_part = text[: text.index("<details>")]
    assert QUESTIONS["reduce-mean"]["answers"]["short"][:30] not in open_part


def topic(question: dict[str, Any]) -> dict[str, Any]:
    return {"topic": "test", "questions": [question]}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda q: q.pop("must"), "'must' is a required property"),
        (lambda q: q.update(level="easy"), "level: 'easy' is not one of"),
        (lambda q: q.update(id="Has Spaces"), "does not match"),
        (lambda q: q.update(surprise=1), "'surprise' was unexpected"),
        (lambda q: q["answers"].pop("long"), "'long' is a required property"),
        (lambda q: q["answers"].update(short="word " * 76), "answers.short has 76 words"),
        (lambda q: q.update(kind="compute"), "is a required property"),
        (lambda q: q.update(numbers="nothing_like_it"), "numbers names no function"),
        (lambda q: q.update(check="print('looks fine')"), "does not match 'assert'"),
        (lambda q: q.update(follow_ups=[]), "follow_ups"),
    ],
)
def test_a_fault_is_named_with_its_question(spoil: Callable[[dict[str, Any]], Any], says: str) -> None:
    question = copy.deepcopy(QUESTIONS["eckart-young"])
    bank.validate(topic(question), "test.yaml")
    spoil(question)
    with pytest.raises(bank.BankError, match=says) as fault:
        bank.validate(topic(question), "test.yaml")
    assert str(fault.value).startswith("test.yaml: ") and "\n" not in str(fault.value)


def test_a_file_that_is_not_yaml_is_named(tmp_path: Any) -> None:
    (tmp_path / "broken.yaml").write_text("topic: [")
    with pytest.raises(bank.BankError, match=r"broken\.yaml is not YAML"):
        bank.read(tmp_path / "broken.yaml")
