"""Widgets that work live in JupyterLab and stand as a picture everywhere else."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from lora_edu import cost, figures, lowrank


class Explorer(ipw.VBox):  # type: ignore[misc]
    """A box of controls over a picture. Before it runs, and on static pages, its first picture stands for it."""

    def __init__(self, children: list[ipw.Widget], first: bytes, alt: str) -> None:
        super().__init__(children)
        self._first, self._alt = b64encode(first).decode(), alt

    def __repr__(self) -> str:
        return f"Widget: {self._alt}"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data = super()._repr_mimebundle_(**kwargs)
        return {**data, "image/png": self._first, "text/plain": repr(self)}, {"image/png": {"alt": self._alt}}


def rank_slider(image: ArrayLike, start: int = 20) -> Explorer:
    """A slider for the rank of a grey image's truncation, with the picture, its error and its storage.

    `image` is (m, n) with values in [0, 1]. Raises ValueError for anything that is not a matrix of finite numbers.
    """
    M = np.asarray(image, dtype=float)
    U, s, Vt = lowrank.truncated_svd(M, min(M.shape))
    m, n = M.shape
    limit = lowrank.break_even_rank(m, n)

    def words() -> str:
        k = slider.value
        error = lowrank.tail_norm(s, k) / lowrank.tail_norm(s, 0)
        verdict = "smaller than the picture" if k <= limit else "larger than the picture itself"
        return f"rank {k}: error {error:.1%}, stores {k * (m + n):,} numbers of {m * n:,}: {verdict}"

    def draw() -> Figure:
        k = slider.value
        fig, ax = plt.subplots(figsize=(5.6, 4.0))
        figures.picture(ax, (U[:, :k] * s[:k]) @ Vt[:k], f"rank {k}")
        return fig

    slider = ipw.IntSlider(value=start, min=1, max=min(m, n), description="rank", continuous_update=False)
    return _explorer([slider], words, draw, lambda: f"The image at rank {slider.value}", "A rank slider over the image")


def cost_calculator() -> Explorer:
    """What a LoRA trains, stores and needs in memory, for a choice of model, rank, targets and recipe.

    Beside it stands full fine-tuning in mixed precision. Activations are left out: they depend on the batch.
    """
    model = ipw.Dropdown(options=list(cost.SHAPES), value="Llama-2-7B", description="model")
    rank = ipw.SelectionSlider(options=[2**k for k in range(9)], value=16, description="rank", continuous_update=False)
    targets = ipw.Dropdown(options=list(cost.GROUPS), value="all-linear", description="targets")
    recipes = [name for name, recipe in cost.RECIPES.items() if recipe.frozen is not None]
    recipe = ipw.Dropdown(options=recipes, value="LoRA, bf16 base", description="recipe")

    def numbers() -> tuple[int, int, dict[str, cost.Memory]]:
        """Parameters of the base and of the adapter, and the memory of the two recipes."""
        shape, four_bit = cost.SHAPES[model.value], cost.RECIPES[recipe.value].linear is not None
        base, adapter = cost.parameters(shape), cost.lora_parameters(shape, rank.value, targets.value)
        lora = cost.training_memory(recipe.value, base, adapter, cost.linear_weights(shape) if four_bit else 0)
        return base, adapter, {recipe.value: lora, "full, mixed": cost.training_memory("full, mixed", base)}

    def words() -> str:
        base, adapter, memory = numbers()
        lora, full = (each.total / 1e9 for each in memory.values())
        megabytes = cost.adapter_bytes(adapter, int(cost.RECIPES[recipe.value].weight)) / 1e6
        return (
            f"{model.value}, rank {rank.value} on {targets.value}, {recipe.value}: trains {adapter:,} of "
            f"{base + adapter:,} parameters ({100 * adapter / (base + adapter):.4f} %), stores {megabytes:,.1f} MB, "
            f"takes {lora:,.1f} GB of memory where full fine-tuning takes {full:,.1f} GB, before activations"
        )

    def draw() -> Figure:
        fig, ax = plt.subplots(figsize=(7.0, 2.2))
        _, _, memory = numbers()
        left = np.zeros(len(memory))
        for part, color, hatch in (("weights", "sky", ""), ("gradients", "orange", "//"), ("optimizer", "green", "..")):
            sizes = np.array([getattr(each, part) / 1e9 for each in memory.values()])
            ax.barh(list(memory), sizes, left=left, label=part, color=figures.COLORS[color], hatch=hatch)
            left += sizes
        for y, total in enumerate(left):
            ax.text(total, y, f" {total:,.1f}", va="center")
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.set(title=f"Training {model.value}, before activations", xlabel="GB", ylabel="recipe")
        ax.legend()
        return fig

    return _explorer(
        [model, rank, targets, recipe],
        words,
        draw,
        lambda: f"Bars of training memory: {words()}",
        "A calculator of what LoRA costs",
    )


def knob_explorer(rows: Sequence[Mapping[str, Any]]) -> Explorer:
    """Rank, alpha and targets of stored LoRA runs: bits against numbers trained, each point at its best rate.

    `rows` are those of the experiment chapter05.explorer, with r, alpha, on, rate, validation, code and manual.
    """
    from lora_edu.lab import chapter05
    from lora_edu.lab.model import shape
    from lora_edu.lab.runs import tuned

    points = tuned(rows, "on", "r", "alpha")
    places, ranks, alphas = ([*dict.fromkeys(values)] for values in zip(*points, strict=True))
    trained = {(on, r): cost.lora_parameters(shape(), r, chapter05.ON[on]) for on in places for r in ranks}
    rank = ipw.SelectionSlider(options=ranks, value=8, description="rank", continuous_update=False)
    alpha = ipw.SelectionSlider(options=alphas, value=16, description="alpha", continuous_update=False)
    targets = ipw.Dropdown(options=places, value="all", description="targets")

    def words() -> str:
        found = points[targets.value, rank.value, alpha.value]
        tried = " and ".join(f"{rate:g}" for rate in found.sweep)
        return (
            f"rank {rank.value}, alpha {alpha.value}, targets {targets.value}: trains "
            f"{trained[targets.value, rank.value]:,} numbers, best at rate {found.rate:g} of {tried}, "
            f"{found.mean('code'):.3f} bits on code (spread {found.spread('code'):.3f}), "
            f"{found.mean('manual'):.3f} on the manual"
        )

    def draw() -> Figure:
        fig, ax = plt.subplots(figsize=(7.0, 3.2))
        lines = zip(places, ("o:", "s--", "^-"), ("vermilion", "green", "blue"), strict=True)
        for on, line, color in lines:
            bits = [points[on, r, alpha.value].mean("code") for r in ranks]
            ax.plot([trained[on, r] for r in ranks], bits, line, color=figures.COLORS[color], label=on)
        here = trained[targets.value, rank.value], points[targets.value, rank.value, alpha.value].mean("code")
        ax.plot(*here, "o", markersize=14, markerfacecolor="none", color="black")
        every = [point.mean("code") for point in points.values()]
        ax.set(title=f"Short LoRA runs at alpha {alpha.value}", xlabel="numbers trained", xscale="log")
        ax.set(ylabel="bits per character, test", ylim=(min(every) - 0.05, max(every) + 0.05))
        ax.legend(title="targets")
        return fig

    return _explorer(
        [rank, alpha, targets],
        words,
        draw,
        lambda: f"Bits against numbers trained: {words()}",
        "An explorer of rank, alpha and targets",
    )


def _explorer(
    controls: list[ipw.Widget],
    words: Callable[[], str],
    draw: Callable[[], Figure],
    alt: Callable[[], str],
    title: str,
) -> Explorer:
    """The controls, a line of `words` and a picture by `draw`, both made anew when a control moves."""
    label, image = ipw.HTML(), ipw.HTML()

    def update(change: Any = None) -> bytes:
        fig = draw()
        data = figures.png(fig)
        plt.close(fig)
        label.value, image.value = words(), _img(data, alt())
        return data

    for control in controls:
        control.observe(update, names="value")
    return Explorer([*controls, label, image], update(), f"{title}, standing at {words()}.")


def _img(png: bytes, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{b64encode(png).decode()}">'
