"""`python -m cairn.decode RUN --prompt TEXT`: what a trained GPT writes, as it writes it."""

import argparse
import sys
from pathlib import Path

from cairn.config.main import Parser, run_main


def positive(text: str) -> int:
    """A positive integer. Raises ArgumentTypeError for another."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(prog="cairn generate", description="Write on from a prompt with a trained GPT.")
    p.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/gpt-tiny")
    p.add_argument("--prompt", default="", metavar="TEXT", help="text to go on from; - reads standard input")
    p.add_argument(
        "--max-new-tokens", type=positive, default=200, metavar="N", help="stop after N tokens (default 200)"
    )
    p.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default 0.8)")
    p.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    p.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens that hold probability P")
    p.add_argument("--greedy", action="store_true", help="take the most likely token always")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same text (default 0)")
    p.add_argument("--samples", type=positive, default=1, metavar="N", help="write N texts (default 1)")
    return p


def main() -> None:
    """Print the prompt and what follows it; several samples have a rule between them."""
    args = parser().parse_args()

    from cairn.cluster import Cluster
    from cairn.decode.generate import decoder_of, stream_text
    from cairn.decode.sample import Sampling, generators
    from cairn.train.run import load_model

    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
    run = load_model(args.run, Cluster.from_env().device)
    decoder_of(run)  # an error is told before the prompt is written
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    for i, row in enumerate(generators(args.seed, args.samples)):
        if i:
            print("-" * 40)
        sys.stdout.write(prompt)
        for piece in stream_text(run, prompt, args.max_new_tokens, sampling, row):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()


if __name__ == "__main__":
    run_main(main)
