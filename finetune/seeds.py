"""One run, or the same with several seeds."""

import statistics

from cairn.cluster import Cluster
from cairn.config.schema import FinetuneConfig
from cairn.errors import UserError
from cairn.train.outcome import Outcome
from cairn.train.trainer import Trainer
from finetune.build import make_task
from finetune.text import open_text


def read_seeds(text: str | None, default: int) -> list[int]:
    """The seeds of `--seeds 1,2,3`. Raises UserError for what is none, or one that is there twice."""
    if text is None:
        return [default]
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise UserError(f"--seeds {text}: expected different whole numbers with commas between them, such as 1,2,3")
    return [int(part) for part in parts]


def train_seed(config: FinetuneConfig, seed: int, cluster: Cluster, several: bool) -> Outcome:
    """COLLECTIVE: train with a seed; one of several has a run folder of its own."""
    name = f"{config.run.name}-s{seed}" if several else config.run.name
    config = config.model_copy(update={"seed": seed, "run": config.run.model_copy(update={"name": name})})
    task = open_text(config, cluster) if config.task.name == "text" else make_task(config, cluster)
    if cluster.is_main:
        count = f"{task.sizes['train']:,} {task.unit} to train on, {task.sizes['valid']:,} held out"
        print(f"{task.start.origin}: {count}", flush=True)
        for note in task.notes:
            print(note, flush=True)
    trainer = Trainer(task, task.config, cluster)
    cluster.on_main(lambda: trainer.folder.keep_tokenizer(task.tokenizer.save))
    return trainer.run()


def summary(outcomes: dict[int, Outcome]) -> None:
    """Print each seed's metrics at its best evaluation, with mean and standard deviation."""
    from rich.console import Console
    from rich.table import Table

    rows = {seed: best_metrics(outcome) for seed, outcome in outcomes.items()}
    names = list(next(iter(rows.values())))
    table = Table(title="at the best evaluation of each seed")
    for column in ("seed", *names):
        table.add_column(column, justify="right")
    for seed, row in rows.items():
        table.add_row(str(seed), *(f"{row[name]:.4f}" for name in names))
    columns = {name: [row[name] for row in rows.values()] for name in names}
    table.add_section()
    table.add_row("mean", *(f"{statistics.mean(values):.4f}" for values in columns.values()))
    table.add_row("deviation", *(f"{statistics.stdev(values):.4f}" for values in columns.values()))
    Console().print(table)


def best_metrics(outcome: Outcome) -> dict[str, float]:
    """Metrics of the evaluation whose checkpoint is kept as the best; of the last where none is selected."""
    if outcome.best is None:
        return outcome.metrics
    row = next(row for row in reversed(outcome.folder.evaluations()) if row["step"] == outcome.best.step)
    return {key.removeprefix("valid/"): float(value) for key, value in row.items() if key.startswith("valid/")}
