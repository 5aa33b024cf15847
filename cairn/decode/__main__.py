"""`python -m cairn.decode RUN --prompt TEXT`: what a trained model writes, as it writes it, or for many prompts."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cairn.config.main import Parser, run_main
from cairn.errors import UserError

if TYPE_CHECKING:
    from cairn.decode.beam import Beams
    from cairn.decode.sample import Sampling
    from cairn.train.run import LoadedRun

RULE = "-" * 40
DRAWING = ("temperature", "top_k", "top_p", "greedy", "samples", "seed")
SEARCHING = ("length_penalty", "n_best")


def positive(text: str) -> int:
    """A positive integer. Raises ArgumentTypeError for another."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line. What is not given is None."""
    p = Parser(
        prog="cairn generate",
        description="Write on from a prompt with a trained GPT; with an encoder-decoder, the target of a source.",
    )
    p.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/gpt-tiny")
    p.add_argument("--prompt", metavar="TEXT", help="text to go on from, or the source; - reads standard input")
    p.add_argument("--file", type=Path, metavar="FILE", help="many prompts, one a line, in place of --prompt")
    p.add_argument("--chat", action="store_true", help="prompts are what a user says: answer by the chat template")
    p.add_argument(
        "--max-new-tokens", type=positive, default=200, metavar="N", help="stop after N tokens (default 200)"
    )
    p.add_argument("--min-new-tokens", type=positive, metavar="N", help="write at least N tokens")
    p.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
    p.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default 0.8; encoder-decoder: 0)")
    p.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    p.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens that hold probability P")
    p.add_argument("--greedy", action="store_true", default=None, help="take the most likely token always")
    p.add_argument("--seed", type=int, metavar="S", help="same seed, same text (default 0)")
    p.add_argument("--samples", type=positive, metavar="N", help="write N texts for each prompt (default 1)")
    p.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less")
    p.add_argument("--beams", type=positive, metavar="N", help="search with N beams instead of drawing")
    p.add_argument("--length-penalty", type=float, metavar="P", help="beams: above 0 favours long texts (default 1)")
    p.add_argument("--n-best", type=positive, metavar="K", help="beams: the K best texts of each prompt (default 1)")
    p.add_argument("--batch-size", type=positive, metavar="B", help="prompts of FILE at a time (default 16)")
    p.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="what is computed in (default fp32)"
    )
    return p


def check(args: argparse.Namespace) -> None:
    """Raises UserError for options that contradict each other."""

    def given(names: Sequence[str]) -> str:
        return ", ".join("--" + name.replace("_", "-") for name in names if getattr(args, name) is not None)

    if args.beams is not None and (drawing := given(DRAWING)):
        raise UserError(f"--beams searches and draws nothing: leave out {drawing}")
    if args.beams is None and (searching := given(SEARCHING)):
        raise UserError(f"{searching}: only for beam search; add --beams N")
    if args.greedy and (drawing := given(("temperature", "top_k", "top_p"))):
        raise UserError(f"--greedy takes the most likely token always: leave out {drawing}")
    if args.prompt is not None and args.file is not None:
        raise UserError("--prompt and --file: give one of the two")
    if args.batch_size is not None and args.file is None:
        raise UserError("--batch-size is for the prompts of --file FILE")
    if args.min_new_tokens is not None and args.min_new_tokens > args.max_new_tokens:
        raise UserError(f"--min-new-tokens {args.min_new_tokens} is more than --max-new-tokens {args.max_new_tokens}")
    if args.stop is not None and "" in args.stop:
        raise UserError("--stop: an empty text would end generation before it begins; leave it out")


def how_of(args: argparse.Namespace, temperature: float) -> "Sampling | Beams":
    """What the options ask for, `temperature` where none is given. Raises UserError for a value out of range."""
    from cairn.decode.beam import Beams
    from cairn.decode.sample import Sampling

    if args.beams is not None:
        penalty = 1.0 if args.length_penalty is None else args.length_penalty
        return Beams(args.beams, penalty, args.n_best or 1, args.repetition_penalty)
    if args.greedy:
        temperature = 0.0
    elif args.temperature is not None:
        temperature = args.temperature
    return Sampling(temperature, args.top_k, args.top_p, args.repetition_penalty)


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts. Raises UserError for a file that cannot be read or has none."""
    if args.file is None:
        return [sys.stdin.read() if args.prompt == "-" else args.prompt or ""]
    try:
        lines: list[str] = args.file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {args.file}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None
    if not lines:
        raise UserError(f"--file {args.file} has no line: write one prompt a line")
    return lines


def answering(run: "LoadedRun") -> "LoadedRun":
    """The run with a tokenizer that makes a prompt of what a user says, after the system's message of its training."""
    from dataclasses import replace
    from typing import cast

    from cairn.config.finetune import InstructSection
    from cairn.data.chat import Chat, UserTokenizer
    from cairn.data.tokenizer import Tokenizer

    task = getattr(run.config, "task", None)
    system = task.system if isinstance(task, InstructSection) else ""
    return replace(run, tokenizer=cast(Tokenizer, UserTokenizer(Chat(run.tokenizer), system)))


def main() -> None:
    """One prompt that is gone on from is printed as it is written; several texts have a rule between them. Targets of
    an encoder-decoder are printed one a line, without their sources."""
    args = parser().parse_args()
    check(args)

    from cairn.cluster import Cluster
    from cairn.decode.beam import Beams
    from cairn.decode.generate import decoder_of, stream_text
    from cairn.decode.sample import generators
    from cairn.decode.texts import Task, write_texts
    from cairn.models.seq2seq import Seq2Seq
    from cairn.ops.precision import DTYPES
    from cairn.train.run import load_model

    how_of(args, 0.8)  # errors are told before the model is loaded
    run = load_model(args.run, Cluster.from_env().device)
    translates = isinstance(run.model, Seq2Seq)
    how = how_of(args, 0.0 if translates else 0.8)
    if args.chat:
        if translates:
            raise UserError("--chat is for decoders, and this is an encoder-decoder: leave it out")
        run = answering(run)
    if not translates:
        decoder_of(run)  # and before the prompt is written
    run.model.to(DTYPES[args.precision])
    prompts, samples, seed, least = prompts_of(args), args.samples or 1, args.seed or 0, args.min_new_tokens or 0
    stops = args.stop or ()
    if args.file is None and not translates and not isinstance(how, Beams):
        for i, row in enumerate(generators(seed, samples)):
            if i:
                print(RULE)
            sys.stdout.write("" if args.chat else prompts[0])
            for piece in stream_text(run, prompts[0], args.max_new_tokens, how, row, stops, least):
                sys.stdout.write(piece)
                sys.stdout.flush()
            print()
        return
    task = Task(how, args.max_new_tokens, least, samples, seed, stops, args.batch_size or 16)
    groups = write_texts(run, prompts, task)
    if translates:
        print("\n".join(text for group in groups for text in group))
    else:
        before = [""] * len(prompts) if args.chat else prompts
        texts = [prompt + text for prompt, group in zip(before, groups, strict=True) for text in group]
        print(f"\n{RULE}\n".join(texts))


if __name__ == "__main__":
    run_main(main)
