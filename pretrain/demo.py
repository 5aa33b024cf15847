"""`make demo`: from nothing to a small GPT in minutes, judged against gzip and xz on text that none has seen."""

import json
import subprocess
import sys
import time
from pathlib import Path

from cairn.config.load import load
from cairn.config.main import run_main
from cairn.config.schema import PretrainConfig

CONFIG = Path("configs/pretrain/gpt-tiny.yaml")
PROMPT = "def read_lines(path):\n"


def main() -> None:
    """Train `gpt-tiny` in a fresh run folder, then show what it learned."""
    name = _free_name(Path("runs"))
    # All held-out text, since the compressors are judged by all of it.
    overrides = [f"run.name={name}", "train.eval_samples=null"]
    config = load(PretrainConfig, CONFIG, overrides)
    start = time.perf_counter()
    # a process of its own, through the front door, as a user would start it
    command = ["pretrain", str(CONFIG), *overrides]
    print(f"$ cairn {' '.join(command)}", flush=True)
    training = subprocess.Popen([sys.executable, "-m", "launch.cli", *command])
    try:
        code = training.wait()
    except KeyboardInterrupt:  # it got the signal too, and saves a checkpoint
        code = training.wait()
    if code:
        raise SystemExit(code)
    seconds = time.perf_counter() - start
    _show(config, seconds)


def _show(config: PretrainConfig, seconds: float) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from cairn.data.prepare import open_prepared, prepare
    from cairn.decode.generate import generate_text
    from cairn.train.folder import RunFolder, disk_errors
    from cairn.train.report import loss_curve_png, write_report
    from cairn.train.run import load_model

    folder = RunFolder(config.run.dir, config.run.name)
    if "valid/bits_per_byte" not in folder.last_evaluation():
        print(f"stopped before its first evaluation; go on with: cairn pretrain {folder.path}")
        return
    console = Console()
    baselines = open_prepared(prepare(config.data, config.tokenizer)).manifest.baselines
    table = Table(title="bits per byte of the held-out files (less is better)")
    table.add_column("compressor")
    table.add_column("bits per byte", justify="right")
    rows = {"gzip -9": baselines["gzip"], "xz -9": baselines["xz"]}
    rows["this model"] = folder.last_evaluation()["valid/bits_per_byte"]
    for label, value in sorted(rows.items(), key=lambda row: -row[1]):
        table.add_row(label, f"{value:.3f}", style="bold" if label == "this model" else None)
    console.print(table)
    run = load_model(folder.path, torch.device("cpu"))
    sample = generate_text(run, PROMPT, max_new_tokens=120, temperature=0.7, top_p=0.9, seed=1)
    with disk_errors(str(folder.samples)), folder.samples.open("a", encoding="utf-8") as file:  # the report shows it
        file.write(json.dumps({"step": run.step, "prompt": PROMPT, "text": sample}) + "\n")
    console.rule("a sample")
    console.print(PROMPT + sample, markup=False, highlight=False)
    console.rule()
    curve = folder.path / "loss.png"
    loss_curve_png(folder.path, curve)
    report = write_report([folder.path])
    console.print(f"run folder  {folder.path}\nloss curve  {curve}\nreport      {report}\ntime        {seconds:.0f} s")
    console.print(f"next        cairn generate {folder.path} --prompt 'class '", highlight=False)


def _free_name(runs: Path) -> str:
    """`demo`, or `demo-2` and so on: a demo starts anew and overwrites nothing."""
    names = ["demo", *(f"demo-{i}" for i in range(2, 10_000))]
    return next(name for name in names if not (runs / name).exists())


if __name__ == "__main__":
    run_main(main)
