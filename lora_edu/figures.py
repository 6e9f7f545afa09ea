"""One visual style for all chapters, and the function that shows a figure with its alternative text."""

from __future__ import annotations

from html import escape
from io import BytesIO
from itertools import cycle, islice
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

# Okabe and Ito's palette, which readers with any colour vision can tell apart; yellow is left out (too pale for lines).
COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "black": "#000000",
}
_LINES = ["-", "--", "-.", ":"]


def style() -> None:
    """Set matplotlib's defaults for the course: the palette always together with line styles, one size, one font."""
    colors = list(COLORS.values())
    mpl.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=colors, linestyle=list(islice(cycle(_LINES), len(colors)))),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "figure.figsize": (7.0, 3.4),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "image.cmap": "gray",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
        }
    )


def picture(ax: Axes, image: ArrayLike, title: str) -> None:
    """Draw a grey image with values in [0, 1] (others are clipped) and its title, without axes."""
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    ax.set_title(title)
    ax.set_axis_off()


def show(fig: Figure, alt: str) -> None:
    """Display `fig` as a PNG with `alt`, one or two sentences that say what it shows, and close it.

    The text is stored three times in the output, because each reader looks in another place: as the image's
    `alt` metadata (nbconvert, MyST), as the output's plain text (terminals, the tests' comparison), and folded
    under the picture (JupyterLab, which ignores the metadata).

    Raises ValueError when `alt` says too little or when an axis that is drawn has no title or label.
    """
    if len(alt.split()) < 8:
        raise ValueError(f"alt must say in a sentence what the figure shows (8 words or more); got {alt!r}.")
    if missing := _unlabelled(fig):
        raise ValueError(f"the figure cannot be read without {missing}.")
    data, metadata = {"image/png": png(fig), "text/plain": f"Figure: {alt}"}, {"image/png": {"alt": alt}}
    plt.close(fig)
    display(data, metadata=metadata, raw=True)  # type: ignore[no-untyped-call]
    display(HTML(f"<details><summary>The figure in words</summary>{escape(alt)}</details>"))  # type: ignore[no-untyped-call]


def png(fig: Figure) -> bytes:
    """`fig` as PNG bytes that depend on nothing but the figure (no version, no date)."""
    buffer = BytesIO()
    fig.savefig(buffer, format="png", dpi=fig.dpi, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _unlabelled(fig: Figure) -> str:
    """What keeps a figure from being read: the first missing title or label, or nothing."""
    suptitle: Any = fig.get_suptitle()
    for number, ax in enumerate(fig.axes, 1):
        if not (ax.get_title() or suptitle):
            return f"a title on axes {number}"
        if ax.axison and not (ax.get_xlabel() and ax.get_ylabel()) and ax.get_label() != "<colorbar>":
            return f"both axis labels on axes {number} ({ax.get_title()!r})"
    return ""
