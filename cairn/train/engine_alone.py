"""One process in bf16, which has nobody to reduce gradients with: what DeepSpeed would do all the same is left out."""

from typing import Any

from torch import nn

from cairn.ops import native
from cairn.optim.adamw import AdamW


class Alone:
    """Changes an engine of stage 1 with BF16_Optimizer at world size 1; what is computed stays the same.

    DeepSpeed would copy all gradients together and apart again for an all-reduce, make an fp32 copy of each and add it
    to zeros, and pass over them again to clip them.
    """

    def __init__(self, engine: Any) -> None:
        engine.enable_backward_allreduce = False
        self._zero = engine.optimizer
        self._zero._update_hp_grad = self._keep
        self._zero.clear_hp_grads = self._forget

    def fuse(self, optimizer: AdamW, grad_clip: float) -> None:
        """Where our kernel runs, let the optimizer clip and set the weights that are computed with, in its one pass."""
        if not native.runs(*self._zero.bf16_groups_flat):
            return
        copies = zip(self._zero.fp32_groups_flat_partition, self._zero.bf16_groups_flat, strict=True)

        def factor() -> float:  # as DeepSpeed has it
            return min(1.0, grad_clip / (float(self._zero._global_grad_norm) + 1e-6)) if grad_clip else 1.0

        optimizer.fuse({id(master): copy for master, copy in copies}, factor)
        self._zero.clip_grad = 0.0
        self._zero.update_lp_params = lambda: None

    def clear_unused(self) -> None:
        """Before a step: drop the last step's gradient of what had none in this."""
        groups = zip(self._zero.fp32_groups_gradients, self._zero.fp32_groups_has_gradients, strict=True)
        for gradients, known in groups:
            for gradient, fresh in zip(gradients, known, strict=True):
                if not fresh:
                    gradient.zero_()

    def _keep(self, parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        """The first micro-batch's gradient overwrites the last step's, the others are added."""
        if parameter.grad is None:
            return
        kept, known = self._zero.fp32_groups_gradients[group][index], self._zero.fp32_groups_has_gradients[group]
        gradient = parameter.grad.view(kept.shape)
        if known[index]:
            kept.add_(gradient)
        else:
            kept.copy_(gradient)
        known[index], parameter.grad = True, None

    def _forget(self) -> None:
        for known in self._zero.fp32_groups_has_gradients:
            known[:] = [False] * len(known)
