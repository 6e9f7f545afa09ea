"""The question bank: YAML, one file a topic, validated against `schema.json`, rendered as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from lora_edu.practice import numbers

Question = dict[str, Any]
SHORT_WORDS = 75


class BankError(ValueError):
    """A question that does not follow the schema; the message names the file, the question and the field."""


@cache
def load() -> dict[str, Question]:
    """All questions by id, topics in alphabetical order, each in the order of its file. Raises BankError."""
    found: dict[str, Question] = {}
    for file in sorted(_folder().glob("*.yaml")):
        for question in read(file):
            if question["id"] in found:
                raise BankError(f"{file.name}: the id {question['id']!r} is used twice in the bank.")
            found[question["id"]] = question
    return found


def read(file: Path) -> list[Question]:
    """The questions of one topic file, validated."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BankError(f"{file.name} is not YAML: {' '.join(str(error).split())}.") from None
    validate(document, file.name)
    return list(document["questions"])


def validate(document: Any, name: str) -> None:
    """Raise BankError, with the first fault in one sentence, when `document` is not a valid topic."""
    fault = best_match(Draft202012Validator(_schema()).iter_errors(document))
    if fault is not None:
        at = list(fault.absolute_path)
        question = document["questions"][at[1]].get("id", at[1]) if len(at) > 1 and at[0] == "questions" else "the file"
        raise BankError(f"{name}: {question}: {'.'.join(map(str, at[2:])) or 'it'}: {fault.message}")
    if document["topic"] != Path(name).stem:
        raise BankError(f"{name}: the topic is {document['topic']!r}; it should be the file's name.")
    for question in document["questions"]:
        words = len(question["answers"]["short"].split())
        if words > SHORT_WORDS:
            raise BankError(
                f"{name}: {question['id']}: answers.short has {words} words; at most {SHORT_WORDS} fit 30 seconds."
            )
        if "numbers" in question and not hasattr(numbers, question["numbers"]):
            raise BankError(f"{name}: {question['id']}: numbers names no function {question['numbers']!r}.")


def of_chapter(chapter: str) -> list[Question]:
    """The questions of one chapter, in the bank's order."""
    return [question for question in load().values() if question["chapter"] == chapter]


def drawn(question: Question, seed: int | None = None) -> tuple[Question, dict[str, Any]]:
    """The question with its {fields} filled, and the fields: the printed numbers, or new ones drawn from `seed`."""
    if "numbers" not in question:
        return question, {}
    fields = getattr(numbers, question["numbers"])(None if seed is None else np.random.default_rng(seed))
    return {key: value if key == "check" else _fill(value, fields) for key, value in question.items()}, fields


def prove(question: Question, seed: int | None = None) -> None:
    """Run the question's check: AssertionError when its answer is wrong. Questions without a check pass."""
    question, fields = drawn(question, seed)
    exec(compile(question.get("check", ""), f"<check of {question['id']}>", "exec"), {"np": np, **fields})


def render(question: Question, number: int) -> str:
    """One question as Markdown: quotation, verdict and correction open, the answers folded."""
    question, _ = drawn(question)
    lines = [f"### Q{number}. {question['question']}", f"*{question['level']}, {question['kind']}*"]
    if misconception := question.get("misconception"):
        translation = f" (*{misconception['translation']}*)" if "translation" in misconception else ""
        lines += [
            f"> {misconception['quote']}{translation}  \n> {misconception['where']}",
            f"**Verdict: {misconception['verdict']}** {misconception['correct']}",
        ]
    if heading := question.get("measured"):
        lines.append(f"Measured in [{heading}](#{heading.replace(' ', '-')}).")
    lines.append(_folded("Answer in 30 seconds", question["answers"]["short"]))
    if "long" in question["answers"]:
        lines.append(_folded("Answer in 2 minutes", question["answers"]["long"]))
    if "whiteboard" in question["answers"]:
        lines.append(_folded("At the whiteboard", question["answers"]["whiteboard"]))
    rubric = ["A good answer has:", *(f"- {point}" for point in question["must"])]
    rubric += ["", "It does not have:", *(f"- {flag}" for flag in question["red_flags"])]
    rubric += [f'- "{wrong["claim"]}" {wrong["refutation"]}' for wrong in question["wrong_claims"]]
    lines.append(_folded("How to grade yourself", "\n".join(rubric)))
    lines += [_folded(f"Follow-up: {f['question']}", f["answer"]) for f in question["follow_ups"]]
    lines.append(f"Source: {'; '.join(question['sources'])}.")
    return "\n\n".join(line.strip() for line in lines) + "\n"


def _folded(summary: str, text: str) -> str:
    # The blank lines let Markdown inside the folded part be read as Markdown.
    return f"<details><summary>{summary}</summary>\n\n{text.strip()}\n\n</details>"


def _fill(value: Any, fields: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return value.format_map(fields)
    if isinstance(value, list):
        return [_fill(item, fields) for item in value]
    if isinstance(value, dict):
        return {key: _fill(item, fields) for key, item in value.items()}
    return value


@cache
def _schema() -> Any:
    return json.loads((_folder() / "schema.json").read_text(encoding="utf-8"))


def _folder() -> Path:
    return Path(str(files("lora_edu.practice") / "bank"))
