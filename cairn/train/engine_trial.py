"""One step of a small model under DeepSpeed: whether the engine works here, and what had to be compiled for it."""

import math

import torch

from cairn.cluster import Cluster
from cairn.config.model import GPTSection
from cairn.config.train import EngineSection, OptimSection
from cairn.errors import UserError
from cairn.models.build import build_model
from cairn.train.engine import Engine

SMALL = GPTSection(n_layer=1, n_head=2, d_model=32, max_seq_len=32, vocab_size=64)


def trial_step(engine: EngineSection, optim: OptimSection, cluster: Cluster) -> tuple[float, list[str]]:
    """The loss of the step, and the names of DeepSpeed's own operators that were built or loaded.

    COLLECTIVE. Not compiled, and with whatever kernels are fast. Raises UserError as Engine does, or when the loss is
    not finite.
    """
    section = engine.model_copy(update={"compile": False, "deterministic": False})
    with cluster.init(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trained = Engine(build_model(SMALL, 64), section, optim, 2, cluster)
        from deepspeed.ops.op_builder.builder import OpBuilder

        tokens = torch.arange(64, device=trained.device).reshape(2, 32)
        loss = trained(tokens, labels=tokens) / tokens.numel()
        trained.backward(loss)
        trained.step(1.0)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise UserError(f"a small model in {engine.precision} has the loss {value}: try another engine.precision")
    return value, sorted(OpBuilder._loaded_ops)
