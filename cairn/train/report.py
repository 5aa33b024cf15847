"""`python -m cairn.train.report RUN... [--out FILE]`: one self-contained HTML file on one run or several."""

import base64
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from cairn.config.main import Parser, run_main
from cairn.train.curves import COLORS, Run, figure, loss_curve_png, panels, svg, title
from cairn.train.folder import RunFolder, flatten, parse_rows

__all__ = ["loss_curve_png", "write_report"]

STYLE = """
:root { color-scheme: light; --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --back: #f8fafc; --mark: #fef3c7 }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; margin: 0 0 4px } h2 { font-size: 17px; margin: 40px 0 12px }
.soft { color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin-top: 20px }
.card, figure, .box { background: #fff; border: 1px solid var(--line); border-radius: 10px }
.card { padding: 12px 16px }
.card b { display: block; font-size: 21px; white-space: nowrap }
.card span { color: var(--soft); font-size: 13px }
.grid { display: grid; grid-template-columns: repeat(2, 1fr); gap: 16px }
figure { margin: 0; padding: 10px } figure.wide { grid-column: 1 / -1 }
figure img { width: 100%; display: block } figcaption { color: var(--soft); font-size: 13px; padding: 4px 6px }
.box { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: 14px }
th, td { text-align: left; padding: 6px 14px; border-top: 1px solid var(--line); vertical-align: top }
tr:first-child > * { border-top: 0 } th { color: var(--soft); font-weight: 500; white-space: nowrap }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
tr.differs td, tr.differs th { background: var(--mark) }
.sections { columns: 3 300px; column-gap: 16px } .sections .box { break-inside: avoid; margin-bottom: 16px }
.sections caption { text-align: left; font-weight: 600; padding: 8px 14px }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px }
pre { margin: 0; padding: 14px 16px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px }
pre b { color: #2563eb; font-weight: 600 } details > summary { cursor: pointer; color: var(--soft); margin: 12px 0 }
@media (max-width: 800px) { .grid { grid-template-columns: 1fr } }
"""


def main() -> None:
    """The command."""
    parser = Parser(prog="cairn report", description="One HTML page of curves, numbers, config and samples.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder; several are compared")
    parser.add_argument("--out", type=Path, help="file to write; default: report.html in the run folder, or beside")
    args = parser.parse_args()
    print(f"report: {write_report(args.runs, args.out)}")


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page and return its path. Raises UserError for a folder without metrics."""
    labels = [path.resolve().name for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    runs = [Run(RunFolder(path), RunFolder(path).rows(), label) for path, label in zip(paths, labels, strict=True)]
    if out is None:
        out = runs[0].folder.report if len(runs) == 1 else paths[0].resolve().parent / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(runs), encoding="utf-8")
    return out


def render(runs: Sequence[Run]) -> str:
    """The page."""
    name = " · ".join(run.label for run in runs)
    body = [f"<h1>{escape(name)}</h1>", f'<div class="soft">{escape(_subtitle(runs))}</div>']
    body.append(_cards(numbers(runs[0])) if len(runs) == 1 else _comparison(runs))
    sizes = [(' class="wide"', (10.5, 4.2)), *[("", (6.4, 3.6))] * 99]  # the first panel, the loss, is wide
    pictures = (
        f"<figure{wide}>{_image(svg(figure(runs, key, size)), key)}</figure>"
        for key, (wide, size) in zip(panels(runs), sizes, strict=False)
    )
    body += ["<h2>Curves</h2>", '<div class="grid">', *pictures, "</div>", *_pictures(runs), *_samples(runs)]
    body += ["<h2>Config</h2>", _config(runs[0]) if len(runs) == 1 else _config_differences(runs)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def numbers(run: Run) -> dict[str, str]:
    """The numbers that a run ends with."""
    found = {"steps": f"{run.rows[-1]['step']:,}"}
    if tokens := run.series("tokens"):
        found["tokens"] = _short(tokens.last)
    if loss := run.series("loss"):
        found["training loss (last 20 steps)"] = f"{statistics.fmean(loss.y[-20:]):.4f}"
    for key in dict.fromkeys(key for row in run.rows for key in row if key.startswith("valid/")):
        if valid := run.series(key):
            found[f"held-out {title(key.removeprefix('valid/')).removeprefix('Held-out ').lower()}"] = (
                f"{valid.last:.4f}"
            )
    if rate := run.series("tokens_per_s"):
        found["tokens per second (median)"] = _short(statistics.median(rate.y))
    if mfu := run.series("mfu"):
        found["MFU (median)"] = f"{100 * statistics.median(mfu.y):.1f} %"
    if memory := run.series("memory_gb"):
        found["peak memory"] = f"{max(memory.y):.1f} GiB"
    if duration := run.series("step_seconds"):
        spans = (after - before for before, after in zip([0.0, *duration.x], duration.x, strict=False))
        found["training time"] = _duration(sum(span * each for span, each in zip(spans, duration.y, strict=True)))
    return found


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    config = _flat_config(runs[0])
    said = [
        f"{config[key]}" for key in ("model.name", "objective.name", "optim.name", "engine.precision") if key in config
    ]
    return " · ".join([str(runs[0].folder.path), *said])


def _cards(values: dict[str, str]) -> str:
    cards = (
        f'<div class="card"><b>{escape(value)}</b><span>{escape(key)}</span></div>' for key, value in values.items()
    )
    return f'<div class="cards">{"".join(cards)}</div>'


def _comparison(runs: Sequence[Run]) -> str:
    columns = [numbers(run) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [_row(key, (column.get(key, "") for column in columns)) for key in keys]
    return f'<div class="box" style="margin-top: 20px"><table>{_head(runs)}{"".join(rows)}</table></div>'


def _head(runs: Sequence[Run]) -> str:
    names = (
        f'<th><span class="dot" style="background: {COLORS[i % len(COLORS)]}"></span>{escape(run.label)}</th>'
        for i, run in enumerate(runs)
    )
    return f"<tr><th></th>{''.join(names)}</tr>"


def _row(key: str, cells: Iterable[Any], differs: bool = False) -> str:
    mark = ' class="differs"' if differs else ""
    return f"<tr{mark}><th>{escape(key)}</th>{''.join(f'<td class=number>{_cell(cell)}</td>' for cell in cells)}</tr>"


def _cell(value: Any) -> str:
    words = {None: "-", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else escape(str(value))


def _config(run: Run) -> str:
    """One run's config, a table a section."""
    sections: dict[str, list[str]] = {}
    for key, value in _flat_config(run).items():
        section, _, rest = key.rpartition(".") if key.count(".") == 1 else key.partition(".")
        sections.setdefault(section, []).append(_row(rest or key, [value]))
    tables = (
        f'<div class="box"><table><caption>{escape(s or "all")}</caption>{"".join(rows)}</table></div>'
        for s, rows in sections.items()
    )
    return f'<div class="sections">{"".join(tables)}</div>'


def _config_differences(runs: Sequence[Run]) -> str:
    """Keys on which runs differ, marked, then the rest folded away."""
    configs = [_flat_config(run) for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    differing = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
    marked = "".join(_row(key, (config.get(key) for config in configs), differs=True) for key in differing)
    same = "".join(_row(key, [configs[0].get(key)]) for key in keys if key not in differing)
    return (
        f'<div class="box"><table>{_head(runs)}{marked}</table></div>'
        f'<details><summary>the keys on which all agree</summary><div class="box"><table>{same}</table></div></details>'
    )


def _samples(runs: Sequence[Run]) -> list[str]:
    """The newest samples of each run: rows {"step", "prompt", "text"} of samples.jsonl."""
    parts: list[str] = []
    for run in runs:
        rows = list(parse_rows(run.folder.samples))
        for row in rows[-3:]:
            caption = f"{run.label}, step {row.get('step', '?')}"
            text = f"<b>{escape(str(row.get('prompt', '')))}</b>{escape(str(row.get('text', '')))}"
            parts.append(f'<div class="soft">{escape(caption)}</div><div class="box"><pre>{text}</pre></div>')
    return ["<h2>Samples</h2>", *parts] if parts else []


def _pictures(runs: Sequence[Run]) -> list[str]:
    """Pictures that a recipe left in its run folder (loss.png shows what the curves show)."""
    parts = [
        f"<figure>{_image(path.read_bytes(), path.name, 'png')}"
        f"<figcaption>{escape(run.label)}: {escape(path.stem)}</figcaption></figure>"
        for run in runs
        for path in sorted(run.folder.path.glob("*.png"))
        if path.name != "loss.png"
    ]
    return ["<h2>Pictures</h2>", '<div class="grid">', *parts, "</div>"] if parts else []


def _image(content: bytes, name: str, kind: str = "svg+xml") -> str:
    return f'<img alt="{escape(title(name))}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _flat_config(run: Run) -> dict[str, Any]:
    path = run.folder.config
    return flatten(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{number:,.0f}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


if __name__ == "__main__":
    run_main(main)
