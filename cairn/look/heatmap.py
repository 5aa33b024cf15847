"""Attention maps as pictures: a grid of layers and heads, or one map large."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cairn.look.maps import Maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

POINT = 1 / 72  # inches
GAP, HEAD = 0.1, 0.22  # inches between panels, and above each for its title
LONGEST = 14  # characters of a label
INK, SOFT, LINE = "#0f172a", "#64748b", "#cbd5e1"
FAMILIES = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans Devanagari")


@dataclass(frozen=True)
class Panel:
    """One map."""

    title: str
    values: NDArray[np.float32]
    """(T, S)."""


@dataclass(frozen=True)
class Size:
    """Of a panel with its labels; lengths in inches."""

    cell: float
    font: float
    """Points."""
    every: int
    """Every which token has its label: those of long texts would lie upon each other."""
    annotated: bool
    """Whether the numbers are written into the cells."""


def draw(panels: Sequence[Panel | None], columns: int, maps: Maps, title: str) -> "Figure":
    """The picture: queries downwards, keys to the right, all panels in one scale of colours; None leaves a gap."""
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

    queries, keys = ([_short(label) for label in labels] for labels in (maps.queries, maps.keys))
    rows = math.ceil(len(panels) / columns)
    size = _size(len(panels), max(rows, columns), max(len(queries), len(keys)))
    width, height = size.cell * len(keys), size.cell * len(queries)
    left, bottom = (max(map(len, labels)) * size.font * 0.62 * POINT + 0.38 for labels in (queries, keys))
    body = columns * (width + GAP) - GAP, rows * (height + HEAD + GAP) - GAP
    whole = max(left + body[0] + 0.75, 0.095 * len(title) + 0.4), bottom + body[1] + 0.42
    fig = Figure(figsize=whole, facecolor="white", dpi=_dpi(whole))

    def share(x: float, y: float) -> tuple[float, float]:
        return x / whole[0], y / whole[1]

    corner, other = share(left, bottom), share(left + body[0], bottom + body[1] - HEAD)
    places = {"left": corner[0], "right": other[0], "bottom": corner[1], "top": other[1]}
    grid = GridSpec(rows, columns, fig, **places, wspace=GAP / width, hspace=(GAP + HEAD) / height)
    images = []
    for number, panel in enumerate(panels):
        if panel is None:
            continue
        axes = fig.add_subplot(grid[number // columns, number % columns])
        lowest = number + columns >= len(panels) or panels[number + columns] is None
        images.append(_panel(axes, panel, size, queries if number % columns == 0 else [], keys if lowest else []))
    looks, looked_at = ("written", "source") if maps.cross else ("looks (query)", "looked at (key)")
    fig.text(*share(0.12, whole[1] - 0.12), title, va="top", color=INK, size=11, weight="bold", parse_math=False)
    fig.text(*share(left + body[0] / 2, 0.08), looked_at, ha="center", va="bottom", color=SOFT, size=9)
    fig.text(*share(0.1, bottom + body[1] / 2), looks, rotation=90, va="center", color=SOFT, size=9)
    tall = min(2.5, height)
    scale = fig.add_axes((*share(left + body[0] + 0.2, bottom + body[1] - HEAD - tall), *share(0.12, tall)))
    bar = fig.colorbar(images[0], cax=scale, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.outline.set_visible(False)
    scale.set_yticklabels(["0", ".05", ".2", ".5", "1"])
    scale.tick_params(labelsize=8, length=0, colors=SOFT)
    return fig


def _size(n_panels: int, n_side: int, n_token: int) -> Size:
    if n_panels == 1:
        cell = min(0.42, 11 / n_token)
        return _labelled(cell, 9, annotated=n_token <= 26)
    # At most 48 inches a side, and a panel of a long text no larger than one can take in.
    side = min(max(1.3, 0.092 * n_token), 3.2, 48 / n_side)
    return _labelled(min(side / n_token, 0.2), 6, annotated=False)


def _labelled(cell: float, font: float, annotated: bool) -> Size:
    return Size(cell, font, max(1, math.ceil(font * 1.1 * POINT / cell)), annotated)


def _dpi(whole: tuple[float, float]) -> float:
    """150, or fewer where that were more than 20 million pixels."""
    return min(150.0, math.sqrt(2e7 / (whole[0] * whole[1])))


def _panel(axes: "Axes", panel: Panel, size: Size, queries: Sequence[str], keys: Sequence[str]) -> "AxesImage":
    from matplotlib.colors import PowerNorm

    # The root of a weight: most are small, and would all be white.
    image = axes.imshow(panel.values, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
    axes.set_title(panel.title, fontsize=7.5, color=INK, pad=3, parse_math=False)
    for axis, labels in ((axes.yaxis, queries), (axes.xaxis, keys)):
        places = range(0, len(labels), size.every)
        axis.set_ticks(places, [labels[i] for i in places], parse_math=False, family=_families(), fontsize=size.font)
    axes.tick_params(length=0, pad=2, labelcolor=INK)
    axes.tick_params(axis="x", rotation=90)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    if size.annotated:
        for (t, s), value in np.ndenumerate(panel.values):
            if value >= 0.005:
                text = "1" if value >= 0.995 else f"{value:.2f}"[1:]
                axes.text(s, t, text, ha="center", va="center", size=7.5, color="white" if value > 0.35 else INK)
    return image


def _families() -> list[str]:
    """Fonts that this machine has: one alone lacks too many scripts."""
    from matplotlib.font_manager import fontManager

    return [name for name in FAMILIES if name in fontManager.get_font_names()]


def _short(label: str) -> str:
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"
