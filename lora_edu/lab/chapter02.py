"""Chapter 02: full fine-tuning, then the weights cut to rank k against the change cut to rank k."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora_edu.lab import corpus
from lora_edu.lab.model import GPT, TARGETS, bits_per_character, load_base
from lora_edu.lab.runs import Config, Numbers, experiment
from lora_edu.lab.training import Recipe, Run, train
from lora_edu.lowrank import effective_rank, energy, tail_norm, truncated_svd

RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
Matrix = NDArray[np.float64]
Matrices = dict[str, Matrix]


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the 24 projections in the blocks, by name."""
    return {name: p for name, p in model.named_parameters() if name.endswith(tuple(f"{t}.weight" for t in TARGETS))}


def fine_tune(config: Config) -> tuple[GPT, Run]:
    """The base model after full fine-tuning of the matrices in its blocks; everything else is frozen.

    Frozen, so that W0 + rank_0(W1 - W0) is exactly the base model.
    """
    model = load_base().requires_grad_(False)
    for weight in matrices(model).values():
        weight.requires_grad_(True)
    text = corpus.load(config["task"])
    recipe = Recipe(steps=config["steps"], rate=config["rate"], seed=config["seed"])
    return model, train(model, text.train, recipe, text.validation)


class Cut:
    """All truncations of one matrix, from one SVD."""

    def __init__(self, M: Matrix) -> None:
        self.M = M
        self.U, self.s, self.Vt = truncated_svd(M, min(M.shape))

    def rank(self, k: int) -> Matrix:
        """The best approximation of rank k; for k = 0 the zero matrix."""
        return (self.U[:, :k] * self.s[:k]) @ self.Vt[:k]


@experiment([{"task": "code", "steps": 200, "rate": 3e-3, "seed": seed} for seed in range(3)])
def truncation(config: Config) -> Numbers:
    """Test bits per character for every rank k: of the weights W1 cut to k, of W0 plus the change cut to k, and controls.

    weights_k        rank_k(W1)
    change_k         W0 + rank_k(dW), where dW = W1 - W0
    subspace_k       W0 + dW projected on k random directions of its input
    noise_k          W0 + rank_k(dW) + Gaussian noise of the norm of what the cut dropped
    base_cut_k       rank_k(W0) + dW

    and, as means over the 24 matrices, where M is W0, W1, dW or a Gaussian matrix of the same shape: `M_entropy_rank`
    (exp of the entropy of s / sum s), `M_stable_rank` (|M|_F^2 / s_0^2), `M_k90` (90 % of the energy), `M_energy_k`,
    for W1 and dW `M_dropped_k`, the norm of what the cut to k drops over |W1|_F; `change_norm`, |dW|_F / |W0|_F; and `overlap_M`, how
    much the top 8 input directions of dW overlap with those of M (Hu et al. 2021, equation 4).
    """
    model, run = fine_tune(config)
    test = corpus.load(config["task"]).test
    W0, W1 = ({name: w.detach().double().numpy() for name, w in matrices(m).items()} for m in (load_base(), model))
    random = np.random.default_rng(config["seed"])
    noise = {name: random.standard_normal(M.shape) for name, M in W0.items()}
    directions = {name: np.linalg.qr(random.standard_normal((M.shape[1], max(RANKS)))).Q for name, M in W0.items()}
    change = {name: W1[name] - W0[name] for name in W0}
    all_four = {"W0": W0, "W1": W1, "dW": change, "Gaussian": noise}
    cuts = {label: {name: Cut(M) for name, M in Ms.items()} for label, Ms in all_four.items()}

    @torch.no_grad()
    def score(weights: Matrices) -> float:
        for name, parameter in matrices(model).items():
            parameter.copy_(torch.from_numpy(weights[name]))
        return bits_per_character(model, test)

    numbers = {"validation": run.validation[-1][1]}
    for k in RANKS:
        kept = {name: W0[name] + cut.rank(k) for name, cut in cuts["dW"].items()}
        dropped = {
            name: tail_norm(cut.s, k) * noise[name] / np.linalg.norm(noise[name]) for name, cut in cuts["dW"].items()
        }
        projected = {name: W0[name] + change[name] @ Q[:, :k] @ Q[:, :k].T for name, Q in directions.items()}
        numbers |= {
            f"weights_{k}": score({name: cut.rank(k) for name, cut in cuts["W1"].items()}),
            f"change_{k}": score(kept),
            f"subspace_{k}": score(projected),
            f"noise_{k}": score({name: kept[name] + dropped[name] for name in kept}),
            f"base_cut_{k}": score({name: cut.rank(k) + change[name] for name, cut in cuts["W0"].items()}),
        }
        for label in ("W1", "dW"):
            shares = [tail_norm(cut.s, k) / np.linalg.norm(W1[name]) for name, cut in cuts[label].items()]
            numbers[f"{label}_dropped_{k}"] = float(np.mean(shares))
    for label, ones in cuts.items():
        numbers |= {f"{label}_{name}": value for name, value in spectrum(list(ones.values())).items()}
    numbers["change_norm"] = float(np.mean([np.linalg.norm(change[name]) / np.linalg.norm(W0[name]) for name in W0]))
    for label in ("W0", "Gaussian"):
        top = [(cuts["dW"][name].Vt[:8], cut.Vt[:8]) for name, cut in cuts[label].items()]
        numbers[f"overlap_{label}"] = float(np.mean([((V1 @ V2.T) ** 2).sum() / 8 for V1, V2 in top]))
    return numbers


def spectrum(cuts: list[Cut]) -> Numbers:
    """Means over matrices: entropy rank exp(H(s / sum s)), stable rank |M|_F^2 / s_0^2, rank for 90 %, energy at k."""
    shares = [cut.s / cut.s.sum() for cut in cuts]
    return {
        "entropy_rank": float(np.mean([np.exp(-(p * np.log(p)).sum()) for p in shares])),
        "stable_rank": float(np.mean([(cut.s**2).sum() / cut.s[0] ** 2 for cut in cuts])),
        "k90": float(np.mean([effective_rank(cut.M, 0.9) for cut in cuts])),
        **{f"energy_{k}": float(np.mean([energy(cut.s)[k - 1] for cut in cuts])) for k in RANKS if k},
    }
