"""`python -m pretrain.batch RUN STEP`: the documents that a step was trained on, by source file and line.

Nothing of it is stored: the samples of a step, and the tokens of a sample, are pure functions of the config's seed.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from cairn.config.load import load
from cairn.config.main import Parser, run_main
from cairn.config.schema import PretrainConfig
from cairn.errors import UserError
from cairn.train.folder import RunFolder, parse_rows

TEXT_TOKENS, TEXT_WIDTH = 64, 72


def positive(text: str) -> int:
    """A positive integer. Raises ArgumentTypeError for another."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="cairn batch", description="Every document that an optimizer step is trained on, on any number of ranks."
    )
    p.add_argument("run", metavar="RUN", type=Path, help="run folder, such as runs/gpt-tiny")
    p.add_argument("step", metavar="STEP", type=positive, help="as in metrics.jsonl, from 1 on")
    p.add_argument("overrides", metavar="section.key=value", nargs="*", help="such as data.dir=FOLDER if it has moved")
    p.add_argument("--text", action="store_true", help="show how each document's tokens in the sample begin")
    p.add_argument("--samples", type=positive, metavar="K", help="only the first K samples of the step")
    return p


def main() -> None:
    """Print the samples of a step."""
    args = parser().parse_intermixed_args()
    folder = RunFolder(args.run)
    if not folder.config.exists():
        raise UserError(f"{args.run} has no config.yaml: give a run folder such as runs/gpt-tiny")
    config = load(PretrainConfig, folder.config, args.overrides)
    index, remark = data_step(folder, args.step, config.train.steps)
    if remark:
        print(f"note: {remark}", file=sys.stderr)
    for line in describe(folder, config, args.step, index, args.samples, args.text):
        print(line)


def data_step(folder: RunFolder, step: int, steps: int) -> tuple[int, str]:
    """What the loader was asked for at a step, and a remark where that is only what will be.

    Step s asks for s - 1, until a roll-back has passed over samples: the rows from there on say `data_step`.
    """
    rows = [row for row in parse_rows(folder.metrics) if "loss" in row]
    done = [row for row in rows if row["step"] <= step]
    last = done[-1] if done else {"step": 0, "data_step": -1}
    index = int(last.get("data_step", last["step"] - 1)) + step - last["step"]
    reached = rows[-1]["step"] if rows else 0
    if step > steps:
        return index, f"step {step} is past the end of this run (train.steps {steps}): what it would go on with"
    if step > reached:
        return index, f"step {step} is not done yet (metrics.jsonl ends at step {reached}): what it will be"
    return index, ""


def describe(
    folder: RunFolder, config: PretrainConfig, step: int, index: int, most: int | None = None, text: bool = False
) -> Iterator[str]:
    """Lines on the samples of a step; `index`: what the loader was asked for. Raises UserError without the corpus."""
    from cairn.data.prepare import open_prepared
    from cairn.train.language_model import LanguageModel

    prepared = open_prepared(corpus_of(folder, config))
    task = LanguageModel(config, prepared)
    size = config.train.global_batch_size
    first = index * size
    yield f"step {step}: samples {first} to {first + size - 1} of {prepared.folder}"
    for k in range(first, first + min(size, most or size)):
        stream = task.training_samples.spans(k)[0].stream
        yield f"sample {k}: {prepared.manifest.sources[stream].source}"
        for where, piece, tokens in task.documents(k):
            last = piece.first + len(tokens) - 1
            part = "whole" if len(tokens) == piece.length else f"its {piece.first}-{last} of {piece.length}"
            yield f"  tokens {piece.start:>5}-{piece.stop - 1:<5}  {where}  ({part})"
            if text:
                yield f"    {shortened(prepared.tokenizer.decode(tokens[:TEXT_TOKENS].tolist()))}"
    if most and most < size:
        yield f"... and {size - most} samples more"


def shortened(text: str) -> str:
    """A text as one line that a terminal can show, cut where it is long."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"


def corpus_of(folder: RunFolder, config: PretrainConfig) -> Path:
    """The prepared folder a run is trained on: that of its newest checkpoint's fingerprint, else of its config.

    The fingerprint finds it after its sources have gone, too. Raises UserError when it is not there any more.
    """
    from cairn.data.manifest import FILE, read_manifest
    from cairn.data.prepare import find_prepared

    wanted = fingerprint(folder)
    if wanted is None:
        found = find_prepared(config.data, config.tokenizer)
        if found is not None:
            return found
    for path in sorted(Path(config.data.dir).glob(f"*/{FILE}")) if wanted else []:
        with contextlib.suppress(UserError):  # of another version: not what is looked for
            manifest = read_manifest(path.parent)
            if manifest is not None and manifest.fingerprint == wanted:
                return path.parent
    raise UserError(
        f"{folder.path}: the corpus it is trained on is not in data.dir {config.data.dir} (any more): cairn prepare "
        f"{folder.config} makes it from the same files; give data.dir=FOLDER if it lies elsewhere"
    )


def fingerprint(folder: RunFolder) -> str | None:
    """What the newest readable checkpoint says of its corpus, None where there is no checkpoint."""
    from cairn.train.checkpoint import Checkpoint, folder_of, steps_in
    from cairn.train.tensorfile import Damaged

    for step in reversed(steps_in(folder.checkpoints)):
        with contextlib.suppress(Damaged):
            found: str = Checkpoint(folder_of(folder.checkpoints, step)).state["identity"]["corpus"]
            return found
    return None


if __name__ == "__main__":
    run_main(main)
