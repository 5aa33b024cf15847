"""`cairn plan CONFIG [section.key=value ...] [--gpu h100 --nodes N]`: what a run would take, before it is started."""

import math
import sys
from collections.abc import Sequence

from cairn.config.main import Parser, read_options, run_main
from cairn.config.schema import PretrainConfig
from cairn.errors import UserError


def main() -> None:
    """Print the plan. Nothing is prepared, allocated or written."""
    run_main(lambda: plan(sys.argv[1:]))


def plan(argv: Sequence[str]) -> int:
    """One command line. Raises UserError, also where nothing fits: it says what would."""
    parser = Parser(prog="cairn plan", description="Memory, speed, time and cost of a run, before it is started.")
    parser.add_argument(
        "--gpu", help="h100, h200, a100-80, ...; cpu: this machine. Default: this machine's GPU, or cpu"
    )
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="default 8; of a CPU, processes: 1")
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of a GPU for an hour")
    parser.add_argument(
        "--tokens-per-s", type=float, metavar="X", help="measured, over all GPUs: used for time and cost"
    )
    config, args = read_options(PretrainConfig, argv, parser)

    from rich.console import Console

    from cairn.models.build import padded_vocab
    from cairn.plan import hardware, show
    from cairn.plan.choose import Place, fastest, options, smallest
    from cairn.plan.corpus import held_out, vocabulary
    from cairn.plan.memory import GIB, count

    name = args.gpu or hardware.here()
    config = hardware.settled_for(name, config)
    gpu = hardware.hardware(name, config.engine.precision, config.engine.fp8)
    per_node = (1 if gpu.device == "cpu" else 8) if args.gpus_per_node is None else args.gpus_per_node
    for option, value in (("--gpus-per-node", per_node), ("--nodes", args.nodes)):
        if value < 1:
            raise UserError(f"{option} {value}: expected at least 1")
    for option, number in (("--price", args.price), ("--tokens-per-s", args.tokens_per_s)):
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"{option} {number:g}: expected a positive number")
    place = Place(gpu, args.nodes, per_node)
    vocab_size = vocabulary(config)
    facts = count(config, vocab_size)
    console = Console(width=100 if not sys.stdout.isatty() else None, soft_wrap=False)
    show.show_model(console, config, facts, padded_vocab(config.model, vocab_size), place)
    found = options(config, vocab_size, facts, place)
    show.show_parts(console, config, found)
    show.show_sizes(console, config, found, place)
    best = fastest(config, found)
    if best is None:
        least = min(found, key=lambda option: option.memory.total)
        raise UserError(
            f"nothing fits: the least is {least.memory.total / GIB:.1f} GiB a rank, and {place.room / GIB:.1f} may be "
            f"used; what would: {smallest(config, vocab_size, facts, place)}"
        )
    show.show_speed(console, config, found, best)
    show.paste(console, best)
    samples = held_out(config) if config.train.eval_samples is None else 0
    show.show_end(console, config, facts, place, best, samples, args.price, args.tokens_per_s)
    if gpu.device != "cpu":
        console.print("no figure above was measured on a GPU: docs/plan.md says what each rests on", highlight=False)
    return 0


if __name__ == "__main__":
    main()
