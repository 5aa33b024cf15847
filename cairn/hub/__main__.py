"""`python -m cairn.hub export RUN DIR` and `import DIR RUN`: to and from Hugging Face `transformers`."""

import argparse
from pathlib import Path

from cairn.config.main import run_main


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="cairn", description="To and from transformers: GPT-2, Llama, BERT, T5.")
    verbs = p.add_subparsers(dest="verb", required=True)
    out = verbs.add_parser("export", help="write a run as a folder that transformers loads")
    out.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/gpt2-124m")
    out.add_argument("folder", type=Path, metavar="DIR", help="folder to make")
    out.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights; more than that is split (5GB)"
    )
    back = verbs.add_parser("import", help="make a run of step 0 from a folder of transformers")
    back.add_argument("folder", type=Path, metavar="DIR", help="folder with config, safetensors and tokenizer")
    back.add_argument("run", type=Path, metavar="RUN", help="run folder to make, such as runs/from-hub")
    back.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys of its config: data, optim, ...")
    return p


def main() -> None:
    """Convert, check, say what was made."""
    args = parser().parse_args()

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it warns of is checked here, and told in a line
    if args.verb == "export":
        from cairn.hub.export_run import export_run

        lines = export_run(args.run, args.folder, args.max_shard_size)
    else:
        from cairn.hub.import_run import import_run

        lines = import_run(args.folder, args.run, args.overrides)
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
