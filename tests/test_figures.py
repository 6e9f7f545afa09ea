"""Figures carry their words; the slider computes what it shows."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from lora_edu import figures, lowrank, widgets

ALT = "A rising line from zero to one over two points."


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(figures, "display", lambda data, **kwargs: calls.append((data, kwargs)))
    return calls


def line() -> tuple[Any, Any]:
    figures.style()
    fig, ax = plt.subplots()
    ax.plot([0, 1])
    ax.set(title="A line", xlabel="x", ylabel="y")
    return fig, ax


def test_show_stores_the_words_in_metadata_plain_text_and_below(
    shown: list[tuple[Any, dict[str, Any]]],
) -> None:
    fig, _ = line()
    figures.show(fig, alt=ALT)
    (data, options), (words, _) = shown
    assert options["metadata"] == {"image/png": {"alt": ALT}} and data["text/plain"] == f"Figure: {ALT}"
    assert Image.open(io.BytesIO(data["image/png"])).size[0] > 300
    assert ALT in words.data and "<details>" in words.data
    assert not plt.get_fignums(), "a figure left open would be shown a second time"


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert figures.png(line()[0]) == figures.png(line()[0])
    plt.close("all")


def test_a_figure_that_cannot_be_read_is_refused(shown: list[tuple[Any, dict[str, Any]]]) -> None:
    fig, ax = line()
    with pytest.raises(ValueError, match="8 words or more"):
        figures.show(fig, alt="A line.")
    ax.set_xlabel("")
    with pytest.raises(ValueError, match="both axis labels on axes 1"):
        figures.show(fig, alt=ALT)
    ax.set(xlabel="x", title="")
    with pytest.raises(ValueError, match="a title on axes 1"):
        figures.show(fig, alt=ALT)
    assert not shown
    plt.close("all")


def test_style_never_tells_lines_apart_by_colour_alone() -> None:
    figures.style()
    cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()
    assert len(set(cycle["color"])) == len(cycle["color"]) and len(set(cycle["linestyle"][:4])) == 4


def test_the_slider_shows_error_and_storage_of_its_rank() -> None:
    M = np.clip(np.random.default_rng(0).random((30, 40)), 0, 1)
    box = widgets.rank_slider(M, start=3)
    slider, label, picture = box.children
    first = picture.value
    slider.value = 25
    s = np.linalg.svd(M, compute_uv=False)
    assert f"error {lowrank.tail_norm(s, 25) / np.linalg.norm(M):.1%}" in label.value
    assert "stores 1,750 numbers of 1,200: larger than the picture itself" in label.value
    assert picture.value != first and 'alt="The image at rank 25"' in picture.value
    data, metadata = box._repr_mimebundle_()
    assert data["text/plain"].startswith("Widget: ") and metadata["image/png"]["alt"] in data["text/plain"]


def test_the_slider_refuses_what_is_no_image() -> None:
    with pytest.raises(ValueError, match="NaN"):
        widgets.rank_slider(np.full((3, 3), np.nan))


def test_the_explorer_shows_the_run_that_was_best_on_validation() -> None:
    pytest.importorskip("torch")
    rows = [
        {
            "r": r,
            "alpha": alpha,
            "on": on,
            "rate": rate,
            "seed": seed,
            "validation": rate,
            "code": r + rate,
            "manual": alpha,
        }
        for r in (2, 8)
        for alpha in (4, 16)
        for on in ("q, v", "mlp", "all")
        for rate in (1.0, 3.0)
        for seed in (0, 1)
    ]
    box = widgets.knob_explorer(rows)
    rank, alpha, targets, label, picture = box.children
    first = picture.value
    assert "rank 8, alpha 16, targets all: trains 73,728 numbers, best at rate 1 of 1 and 3, 9.000 bits" in label.value
    targets.value, rank.value, alpha.value = "q, v", 2, 4
    assert "targets q, v: trains 4,096 numbers, best at rate 1 of 1 and 3, 3.000 bits on code" in label.value
    assert "4.000 on the manual" in label.value and picture.value != first and label.value in picture.value
    assert "rank 8, alpha 16, targets all" in repr(box), "the static view stands at the start"
