"""`python -m cairn.look.attention RUN --text TEXT`: which token looks at which, in each layer and head."""

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from cairn.config.main import Parser, run_main
from cairn.errors import UserError

if TYPE_CHECKING:
    from cairn.look.heatmap import Panel
    from cairn.look.maps import Maps

ENDINGS = (".png", ".svg", ".pdf")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(prog="cairn attention", description="Draw which token of a text looks at which, by layer and head.")
    p.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/bert-tiny")
    p.add_argument("--text", "--source", required=True, metavar="TEXT", help="what the model reads")
    p.add_argument("--text-pair", metavar="TEXT", help="the second text of a pair")
    p.add_argument("--target", metavar="TEXT", help="of an encoder-decoder (default: what it writes itself)")
    p.add_argument("--layer", type=int, metavar="N", help="one layer, from 1 (default: all)")
    p.add_argument("--head", type=int, metavar="N", help="one head, from 1 (default: all)")
    p.add_argument("--out", type=Path, metavar="FILE", help=f"{', '.join(ENDINGS)} (default: RUN/attention.png)")
    p.add_argument("--numbers", action="store_true", help="write the maps beside it as .npz as well")
    return p


def main() -> None:
    """Write the picture, and say where it is."""
    args = parser().parse_args()
    out: Path = args.out or args.run / "attention.png"
    if out.suffix not in ENDINGS:
        raise UserError(f"--out {out}: expected a file that ends with {', '.join(ENDINGS)}")

    from cairn.cluster import Cluster
    from cairn.look.heatmap import draw
    from cairn.look.maps import attention_maps
    from cairn.train.run import load_model

    run = load_model(args.run, Cluster.from_env().device)
    maps = attention_maps(run, args.text, args.text_pair, args.target)
    panels, columns = chosen(maps, args.layer, args.head)
    figure = draw(panels, columns, maps, f"{args.run.resolve().name}, step {run.step:,}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            figure.savefig(out)
        print(f"attention: {out}")
        if any("missing from font" in str(warning.message) for warning in said):
            print("some characters are boxes: no font here has them; install one, such as Noto Sans CJK")
        if args.numbers:
            print(f"numbers: {write_numbers(maps, out.with_suffix('.npz'))}")
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror}; give --out FILE where one can be written"
        ) from error


def chosen(maps: "Maps", layer: int | None, head: int | None) -> tuple[list["Panel | None"], int]:
    """The maps to draw, and in how many columns: all, or of one layer, or of one head; from target to source the mean
    of each layer's heads, then those of the last layer. Raises UserError for a layer or head that there is not."""
    from cairn.look.heatmap import Panel

    n_layer, n_head = maps.values.shape[:2]
    layers, heads = _only("layer", layer, n_layer), _only("head", head, n_head)
    if maps.cross and layer is None and head is None:
        means: list[Panel | None] = [Panel(f"layer {i + 1}, mean", m) for i, m in enumerate(maps.values.mean(1))]
        last, columns = chosen(maps, n_layer, None)
        return means + [None] * (-n_layer % columns) + last, columns
    panels: list[Panel | None] = [
        Panel(f"layer {i + 1}, head {j + 1}", maps.values[i, j]) for i in layers for j in heads
    ]
    return panels, len(heads) if len(layers) > 1 and len(heads) > 1 else min(4, len(panels))


def _only(what: str, number: int | None, count: int) -> range:
    if number is None:
        return range(count)
    if not 1 <= number <= count:
        raise UserError(f"--{what} {number}: the model has {count}, counted from 1")
    return range(number - 1, number)


def write_numbers(maps: "Maps", path: Path) -> Path:
    """All maps as `attention` (layers, heads, T, S) with the labels `queries` and `keys`; returns the path."""
    import numpy as np

    np.savez_compressed(path, attention=maps.values, queries=np.array(maps.queries), keys=np.array(maps.keys))
    return path


if __name__ == "__main__":
    run_main(main)
