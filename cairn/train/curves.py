"""Pictures of metrics: what a run's rows hold, as matplotlib figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn.train.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2563eb", "#ea580c", "#059669", "#c026d3", "#ca8a04", "#0891b2", "#dc2626", "#475569")
TITLES = {
    "loss": "Loss",
    "bits_per_byte": "Held-out bits per byte",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens per second",
    "mfu": "Model FLOP/s utilisation",
    "data_wait": "Share of time waiting for data",
    "memory_gb": "Memory, GiB",
}
SETTINGS = ("lr", "grad_norm", "tokens_per_s", "mfu", "data_wait", "memory_gb")  # panels after all losses, in order
FROM_ZERO = ("tokens_per_s", "mfu", "data_wait", "memory_gb")  # whose size matters more than its changes
HIDDEN = {"step", "skipped", "tokens", "samples", "time", "step_seconds", "flops_per_s"}
MAX_POINTS = 1000  # a longer curve is drawn by the mean, lowest and highest value of this many bins


@dataclass(frozen=True)
class Series:
    """One metric of one run."""

    x: list[float]
    y: list[float]

    @property
    def last(self) -> float:
        """Newest value."""
        return self.y[-1]


@dataclass(frozen=True)
class Run:
    """A run folder as a report sees it."""

    folder: RunFolder
    rows: list[dict[str, Any]]
    label: str

    def series(self, key: str, x: str = "step") -> Series | None:
        """A metric over steps or tokens; rows without it, and values that are not finite, are left out."""
        tokens_at = {row["step"]: row["tokens"] for row in self.rows if "tokens" in row}
        points = [
            (row["step"] if x == "step" else tokens_at.get(row["step"], 0), row[key])
            for row in self.rows
            if isinstance(row.get(key), int | float) and math.isfinite(row[key])
        ]
        return Series(*map(list, zip(*points, strict=True))) if points else None


def panels(runs: Sequence[Run]) -> list[str]:
    """Metrics worth a picture, held-out ones under the name of their training twin: losses first, then settings."""
    keys = dict.fromkeys(
        key.removeprefix("valid/")
        for run in runs
        for row in run.rows
        for key, value in row.items()
        if isinstance(value, int | float) and key.removeprefix("valid/") not in HIDDEN
    )
    tail = [key for key in keys if key.split("/")[0] in SETTINGS]
    tail.sort(key=lambda key: SETTINGS.index(key.split("/")[0]))
    head = [key for key in keys if key not in tail]
    head.sort(key=lambda key: key != "loss")
    return head + tail


def x_axis(runs: Sequence[Run]) -> str:
    """Steps, or tokens where runs to compare take a different number of tokens a step."""
    rates = {
        round(row["tokens"] / row["step"]) if row["step"] else 0
        for run in runs
        for row in run.rows[-1:] + run.rows[:1]
        if "tokens" in row
    }
    return "tokens" if len(rates) > 1 else "step"


def title(key: str) -> str:
    """A metric's name for people."""
    return TITLES.get(key) or key.replace("_", " ").replace("/", ": ").capitalize()


def figure(runs: Sequence[Run], key: str, size: tuple[float, float] = (6.4, 3.6)) -> "Figure":
    """One metric of all runs: training faint and smoothed, held-out as dots."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    x = x_axis(runs)
    fig = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = fig.add_subplot()
    for run, color in zip(runs, _cycle(len(runs)), strict=True):
        train, valid = run.series(key, x), run.series(f"valid/{key}", x)
        both = train is not None and valid is not None
        name = f"{run.label}, " if both and len(runs) > 1 else "" if both else run.label
        if train is not None:
            _draw_training(axes, train, color, f"{name}{'training' if both else ''}", smooth=not key.startswith("lr"))
        if valid is not None:
            style = "o-" if len(valid.x) < 40 else "-"
            dark = color if len(runs) > 1 else "#ea580c"
            axes.plot(
                valid.x,
                valid.y,
                style,
                color=dark,
                markersize=5,
                linewidth=1.4,
                label=f"{name}{'held out' if both else ''}",
            )
            end = (valid.x[-1], valid.last)
            offset = {"xytext": (-6, 8), "textcoords": "offset points", "ha": "right"}
            axes.annotate(f"{valid.last:.4g}", end, color=dark, fontsize=9, **offset)  # type: ignore[arg-type]
    axes.set_title(title(key), loc="left", fontsize=12, fontweight="bold", color="#0f172a")
    axes.set_xlabel(x if x == "tokens" else "optimizer step", color="#64748b")
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#64748b", labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    axes.margins(x=0.02)
    if key.startswith(FROM_ZERO):
        axes.set_ylim(bottom=0)
    if key in ("mfu", "data_wait"):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter())
    lines = axes.get_legend_handles_labels()[0]
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor="#334155")
    return fig


def svg(fig: "Figure") -> bytes:
    """A figure as a standalone SVG picture."""
    buffer = BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def loss_curve_png(run: Path, out: Path) -> None:
    """Write the loss curve of a run folder as a picture. Raises UserError when it has no rows."""
    folder = RunFolder(run)
    figure([Run(folder, folder.rows(), folder.path.name)], "loss", (8, 4.5)).savefig(out, dpi=150)


def _cycle(n: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]


def _draw_training(axes: "Axes", series: Series, color: str, label: str, smooth: bool) -> None:
    """The values faintly and a running mean over them; or the values alone."""
    n = len(series.y)
    if n <= MAX_POINTS:
        xs, means = series.x, series.y
        axes.plot(xs, means, color=color, alpha=0.25 if n > 60 else 0.5, linewidth=0.8)
    else:
        edges = [i * n // MAX_POINTS for i in range(MAX_POINTS + 1)]
        bins = [(series.x[b - 1], series.y[a:b]) for a, b in pairwise(edges)]
        xs, means = [x for x, _ in bins], [sum(y) / len(y) for _, y in bins]
        axes.fill_between(
            xs, [min(y) for _, y in bins], [max(y) for _, y in bins], color=color, alpha=0.15, linewidth=0
        )
    curve = _running_mean(means, len(means) // 40) if smooth else means
    axes.plot(xs, curve, color=color, linewidth=1.8, label=label)


def _running_mean(values: list[float], half: int) -> list[float]:
    """Mean of the values within `half` places on each side.

    Near the start as many on both sides, for there a curve is steep; near the end what is left, for there it is flat.
    """
    sums = [0.0, *accumulate(values)]
    spans = ((i - min(half, i), min(len(values), i + min(half, i) + 1)) for i in range(len(values)))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]
