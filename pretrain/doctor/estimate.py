"""What `cairn plan` expects of a config, held against this machine: memory of a rank, and time."""

import time
from collections.abc import Callable
from functools import partial

import torch

from cairn.cluster import job_ends
from cairn.config.schema import PretrainConfig
from cairn.errors import UserError
from cairn.plan.choose import Place
from cairn.plan.corpus import held_out
from cairn.plan.hardware import hardware, here
from cairn.plan.memory import Setting, count, memory
from cairn.plan.show import span
from cairn.plan.speed import speed, whole_run
from cairn.plan.trace import trace_activations
from pretrain.doctor.finding import Check, Finding, error, gib, ok, warning
from pretrain.doctor.run import model_rows


def checks(config: PretrainConfig, world_size: int) -> list[Check]:
    """Both."""
    return [(name, partial(planned, check, config, world_size)) for name, check in (("memory", room), ("time", hours))]


def planned(check: Callable[[PretrainConfig, Place], Finding], config: PretrainConfig, world_size: int) -> Finding:
    """The finding of a check, where the batch divides and this machine's GPU is one that plans are made for."""
    if config.train.fitting_micro_batch_size(world_size) != config.train.micro_batch_size:
        return ok("not estimated: the batch does not divide")
    try:
        place = place_of(config, world_size)
    except UserError as failure:
        return warning(f"not estimated: {failure}", "cairn plan CONFIG --gpu takes the nearest")
    return check(config, place)


def place_of(config: PretrainConfig, world_size: int) -> Place:
    """Nodes like this one for so many ranks, one a GPU; on a CPU all of them are here."""
    gpu = hardware(here(), config.engine.precision)
    per_node = world_size if gpu.device == "cpu" else min(world_size, torch.cuda.device_count())
    return Place(gpu, -(-world_size // per_node), per_node)


def setting_of(config: PretrainConfig) -> Setting:
    """The config's own."""
    section = config.engine
    return Setting(section.zero_stage, config.train.micro_batch_size, section.activation_checkpointing)


def room(config: PretrainConfig, place: Place) -> Finding:
    """A rank's memory at its peak against what it may take."""
    setting, device, rows = setting_of(config), place.gpu.device, model_rows(config)
    activations = trace_activations(config, rows, setting.micro_batch_size, setting.recompute, device)
    needed = memory(config, count(config, rows), activations, setting, place.world_size, device).total
    found = f"about {gib(needed)} a rank at its peak, {gib(place.room)} may be used on {place.gpu.name}"
    if needed > place.room:
        return error(found, "cairn plan CONFIG says which micro-batch, ZeRO stage and so on fit")
    return ok(found)


def hours(config: PretrainConfig, place: Place) -> Finding:
    """The whole run against train.max_hours and the end of the scheduler's job."""
    facts = count(config, model_rows(config))
    step = speed(config, facts, setting_of(config), place.gpu, place.nodes, place.per_node)
    samples = held_out(config) if config.train.eval_samples is None else 0
    needed = sum(whole_run(config, facts, setting_of(config), step, place.world_size, samples)) / 3600
    found = f"about {span(needed)} on {place.nodes} x {place.per_node} {place.gpu.name}"
    if config.train.max_hours is not None and needed > config.train.max_hours:
        remedy = f"train.max_hours={config.train.max_hours} ends it before train.steps, with its decay done"
        return warning(found, f"{remedy}; lower train.steps to choose the length")
    ends = job_ends()
    left = None if ends is None else max(0.0, ends - time.time()) / 3600
    if left is not None and needed > left:
        remedy = "ask for --requeue and a warning signal (it goes on from its last checkpoint), or set train.max_hours"
        return warning(f"{found}, and the job ends in {span(left)}", remedy)
    return ok(found)
