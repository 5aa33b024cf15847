"""DeepSpeed's JSON, generated from the typed config; the user's own is merged over it."""

from typing import Any

from cairn.config.train import EngineSection
from cairn.errors import UserError

REPLACED_BY = {
    "optimizer": "optim",
    "scheduler": "schedule",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optim.grad_clip",
    "bf16.enabled": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16.enabled": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload",
    "zero_optimization.offload_param.device": "engine.offload",
    "activation_checkpointing": "engine.activation_checkpointing",
    "compile": "engine.compile",
    "checkpoint": "checkpoint",
    "wandb": "track.wandb",
    "tensorboard": "track.tensorboard",
}
"""DeepSpeed keys that would contradict ours, and the key of ours to set instead."""

FIXED = (
    "data_types",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "prescale_gradients",
    "managed_gradient_accumulation",
    "fp16.fp16_master_weights_and_grads",
    "bf16.bf16_master_weights_and_grads",
    "bf16.bf16_optimizer_states",
    "bf16.immediate_grad_update",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.compute_grad_norm",
    "zero_optimization.zenflow",
    "tensor_parallel",
    "expert_parallel",
    "sequence_parallel_size",
)
"""DeepSpeed keys that would change what is computed or where it lies, and that have no counterpart here."""


def effective_stage(section: EngineSection) -> int:
    """The ZeRO stage DeepSpeed is given: zero_stage, save that 0 in bf16 or fp16 runs as 1.

    DeepSpeed's own stage 0 accumulates gradients in low precision there, does not scale the fp16 loss, and steps the
    optimizer once while it is built. Stage 1 computes what stage 0 should, in less memory.
    """
    return max(section.zero_stage, 0 if section.precision == "fp32" else 1)


def deepspeed_config(section: EngineSection, micro_batch_size: int, grad_clip: float) -> dict[str, Any]:
    """DeepSpeed's JSON for an `engine` section. Raises UserError naming the key that cannot be honoured."""
    if section.offload != "none" and section.zero_stage == 0:
        raise UserError(f"engine.offload={section.offload} needs engine.zero_stage of at least 1")
    stage = effective_stage(section)
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        # DeepSpeed's 5e8 elements are 2 GB that every backward pass allocates anew.
        zero["reduce_bucket_size"] = 50_000_000
    if section.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if section.offload == "all" and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # the caller says which backward pass is the last
        "gradient_clipping": grad_clip if stage else 0.0,  # always there: DeepSpeed's default is 1.0
        "gradient_allreduce_op": "sum" if stage < 3 else "mean",  # stage 3 knows no sum
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},  # on by default, it waits for the GPU twice a step
        "zero_optimization": zero,
    }
    if section.precision != "fp32":
        ours[section.precision] = {"enabled": True}
    for key, replacement in REPLACED_BY.items():
        if _has(section.deepspeed, key):
            raise UserError(f"engine.deepspeed.{key} contradicts the rest of the config: set {replacement} instead")
    for key in FIXED:
        if _has(section.deepspeed, key):
            raise UserError(f"engine.deepspeed.{key} cannot be set: cairn relies on its own value; remove it")
    return merge(ours, section.deepspeed)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`: dictionaries key by key, everything else replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _has(config: dict[str, Any], dotted: str) -> bool:
    node: Any = config
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True
