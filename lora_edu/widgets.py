"""Widgets that work live in JupyterLab and stand as a picture everywhere else."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import ArrayLike

from lora_edu import figures, lowrank


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

    def words(k: int) -> str:
        error = lowrank.tail_norm(s, k) / lowrank.tail_norm(s, 0)
        verdict = "smaller than the picture" if k <= limit else "larger than the picture itself"
        return f"rank {k}: error {error:.1%}, stores {k * (m + n):,} numbers of {m * n:,}: {verdict}"

    def draw(k: int) -> bytes:
        fig, ax = plt.subplots(figsize=(5.6, 4.0))
        figures.picture(ax, (U[:, :k] * s[:k]) @ Vt[:k], f"rank {k}")
        data = figures.png(fig)
        plt.close(fig)
        return data

    def tag(k: int) -> str:
        return f'<img alt="The image at rank {k}" src="data:image/png;base64,{b64encode(draw(k)).decode()}">'

    slider = ipw.IntSlider(value=start, min=1, max=min(m, n), description="rank", continuous_update=False)
    label, picture = ipw.HTML(value=words(start)), ipw.HTML(value=tag(start))

    def update(change: Any) -> None:
        label.value = words(change["new"])
        picture.value = tag(change["new"])

    slider.observe(update, names="value")
    return Explorer([slider, label, picture], draw(start), f"A rank slider over the image, standing at {words(start)}.")
