"""The plan as tables of at most 100 columns."""

from rich.console import Console
from rich.table import Table

from cairn.config.schema import PretrainConfig
from cairn.plan.choose import Option, Place, overrides, stages
from cairn.plan.memory import GIB, PARTS, Facts
from cairn.plan.speed import whole_run

HEADINGS = ("weights", "masters", "grads", "optim", "activ.", "head", "buffers")


def show_model(console: Console, config: PretrainConfig, facts: Facts, rows: int, place: Place) -> None:
    """What is planned, and where."""
    model, gpu = config.model, place.gpu
    where = (
        f"{place.nodes} x {place.per_node} {gpu.name}" if gpu.device != "cpu" else f"{place.world_size} CPU process(es)"
    )
    tokens = config.train.global_batch_size * config.seq_len
    console.print(
        f"{model.name}: {facts.parameters:,} parameters ({model.n_layer} layers, {model.d_model} wide, {rows:,} rows "
        f"of vocabulary), {facts.flops / 1e9:,.2f} GFLOP a token\n"
        f"{where}, {gpu.memory / GIB:.1f} GiB, {gpu.peak / 1e12:,.3g} TFLOP/s in {config.engine.precision}; "
        f"{config.train.global_batch_size:,} samples of {config.seq_len:,} ({tokens:,} tokens) a step\n",
        highlight=False,
        soft_wrap=False,
    )


def show_parts(console: Console, config: PretrainConfig, found: list[Option]) -> None:
    """By part, at the config's micro-batch size, or the largest tried below it."""
    known = sorted({option.setting.micro_batch_size for option in found})
    size = max((s for s in known if s <= config.train.micro_batch_size), default=known[0])
    table = Table(
        title=f"GiB a rank at its peak, micro-batches of {size}", title_justify="left", box=None, pad_edge=False
    )
    for name in ("ZeRO", "recompute"):
        table.add_column(name)
    for name in (*HEADINGS, "other", "all"):
        table.add_column(name, justify="right")
    table.add_column("when")
    for option in found:
        if option.setting.micro_batch_size == size:
            used = option.memory
            cells = [f"{used.parts[part] / GIB:.2f}" for part in PARTS]
            cells += [f"{(used.process + used.slack) / GIB:.2f}", f"{used.total / GIB:.2f}"]
            style = "" if option.fits else "red"
            table.add_row(_stage(config, option), _yes(option.setting.recompute), *cells, used.when, style=style)
    console.print(table)
    offloaded = max(option.memory.host for option in found)
    if offloaded and config.engine.offload != "none":
        console.print(f"and up to {offloaded / GIB:.1f} GiB a rank in host memory, checkpoints under way included")
    console.print()


def show_sizes(console: Console, config: PretrainConfig, found: list[Option], place: Place) -> None:
    """Total by micro-batch size, stage and recomputation; what does not fit is marked."""
    title = f"GiB a rank by micro-batch size (of {place.room / GIB:.1f}; x: does not fit)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("size", justify="right")
    table.add_column("accumulate", justify="right")
    columns = [(recompute, stage) for recompute in (False, True) for stage in stages(config)]
    for recompute, stage in columns:
        table.add_column(f"ZeRO {stage}" + (" rec." if recompute else ""), justify="right")
    at = {(o.setting.recompute, o.setting.stage, o.setting.micro_batch_size): o for o in found}
    for size in sorted({option.setting.micro_batch_size for option in found}):
        cells = []
        for recompute, stage in columns:
            option = at.get((recompute, stage, size))
            cells.append("" if option is None else f"{option.memory.total / GIB:.1f}{' ' if option.fits else 'x'}")
        table.add_row(str(size), str(config.train.global_batch_size // (size * place.world_size)), *cells)
    console.print(table)
    console.print()


def show_speed(console: Console, config: PretrainConfig, found: list[Option], best: Option) -> None:
    """The fastest settings of every stage that fit, and the config's own."""
    table = Table(title="Expected speed of what fits, by stage", title_justify="left", box=None, pad_edge=False)
    for name in ("ZeRO", "recompute", "micro-batch", "GiB", "s/step", "compute", "comm.", "update", "tokens/s", "MFU"):
        table.add_column(name, justify="left" if name in ("ZeRO", "recompute") else "right")
    shown: list[Option] = []
    for stage in stages(config):
        for recompute in (False, True):
            fitting = [o for o in found if o.fits and (o.setting.stage, o.setting.recompute) == (stage, recompute)]
            shown += [min(fitting, key=lambda o: o.speed.seconds)] if fitting else []
    own = own_option(config, found)
    shown += [option for option in (own, best) if option is not None and option not in shown]
    for option in sorted(shown, key=lambda o: o.speed.seconds):
        pace, setting = option.speed, option.setting
        seconds = [f"{value:.3g}" for value in (pace.seconds, pace.compute, pace.communication, pace.update)]
        table.add_row(
            _stage(config, option),
            _yes(setting.recompute),
            str(setting.micro_batch_size),
            f"{option.memory.total / GIB:.1f}",
            *seconds,
            f"{pace.tokens_per_s:,.0f}",
            f"{pace.mfu:.1%}",
            style="bold" if option is best else "",
        )
    console.print(table)
    console.print()


def show_end(
    console: Console,
    config: PretrainConfig,
    facts: Facts,
    place: Place,
    option: Option,
    valid_samples: int,
    price: float | None,
    tokens_per_s: float | None,
) -> None:
    """Time and cost to the end of the run with one setting. `tokens_per_s`: measured, instead of what is expected."""
    steps, evaluations, saves = whole_run(config, facts, option.setting, option.speed, place.world_size, valid_samples)
    if tokens_per_s is not None:
        evaluations *= option.speed.tokens_per_s / tokens_per_s
        steps = config.train.steps * option.speed.tokens / tokens_per_s
    tokens = config.train.steps * option.speed.tokens
    hours = (steps + evaluations + saves) / 3600
    cost = "" if price is None else f", {hours * place.world_size * price:,.0f} dollars"
    console.print(
        f"to the end: {config.train.steps:,} steps, {tokens / 1e9:,.3g} billion tokens, {span(hours)} "
        f"({span(steps / 3600)} of steps, {span(evaluations / 3600)} of evaluations, {span(saves / 3600)} of saves), "
        f"{hours * place.world_size:,.1f} {'GPU' if place.gpu.device != 'cpu' else 'process'}-hours{cost}",
        highlight=False,
    )
    if config.train.eval_samples is None and not valid_samples:
        console.print(
            "evaluations are left out: how much is held out is known once the corpus is prepared", highlight=False
        )


def span(hours: float) -> str:
    """Days, hours, minutes or seconds."""
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def own_option(config: PretrainConfig, found: list[Option]) -> Option | None:
    """The config's own setting, where it was tried."""
    stage = max(config.engine.zero_stage, stages(config)[0])
    wanted = (stage, config.train.micro_batch_size, config.engine.activation_checkpointing)
    for option in found:
        setting = option.setting
        if (setting.stage, setting.micro_batch_size, setting.recompute) == wanted:
            return option
    return None


def paste(console: Console, option: Option) -> None:
    """The line to paste."""
    console.print(f"the fastest that fits:\n  {overrides(option.setting)}", highlight=False, soft_wrap=True)


def _stage(config: PretrainConfig, option: Option) -> str:
    zero_is_one = option.setting.stage == 1 and 0 not in stages(config) and config.engine.offload == "none"
    return "0, 1" if zero_is_one else str(option.setting.stage)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
