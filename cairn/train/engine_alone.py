"""One process in bf16, which has nobody to reduce gradients with: what DeepSpeed would do all the same is left out."""

from typing import Any

from torch import Tensor, nn

from cairn.ops import native
from cairn.optim.adamw import AdamW
from cairn.optim.fused import Fused, norms
from cairn.optim.muon import MuonAdamW


class Alone:
    """Changes an engine of stage 1 with BF16_Optimizer at world size 1; what is computed stays the same.

    DeepSpeed would copy all gradients together and apart again for an all-reduce, make an fp32 copy of each and add it
    to zeros, pass over them again to clip them, and gather the weights from itself.
    """

    def __init__(self, engine: Any) -> None:
        engine.enable_backward_allreduce = False
        self._zero = engine.optimizer
        self._zero._update_hp_grad = self._keep
        self._zero.clear_hp_grads = self._forget
        self._zero.update_lp_params = self._round
        self._fused = False
        self._single: dict[tuple[int, int], Tensor] = {}
        """By group and index: gradients of one micro-batch alone, which need no fp32 to be added up in."""

    def fuse(self, optimizer: AdamW | MuonAdamW, grad_clip: float) -> None:
        """Where our kernel runs, let the optimizer clip and set the weights that are computed with, in its one pass."""
        if not native.runs(*self._zero.bf16_groups_flat):
            return
        masters = self._zero.fp32_groups_flat_partition
        copies = {id(m): copy for m, copy in zip(masters, self._zero.bf16_groups_flat, strict=True)}
        groups = {id(master): group for group, master in enumerate(masters)}

        def factor() -> float:  # as DeepSpeed has it
            return min(1.0, grad_clip / (float(self._zero._global_grad_norm) + 1e-6)) if grad_clip else 1.0

        optimizer.fused = Fused(copies, lambda key: self._pieces(groups[key]), factor)
        self._fused = True
        self._zero.get_grads_for_norm = self._norms
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
        gradient = parameter.grad.reshape(kept.shape)
        if not known[index]:
            if self._fused:
                self._single[group, index] = gradient
            else:
                kept.copy_(gradient)
        elif (group, index) in self._single:
            kept.copy_(self._single.pop((group, index))).add_(gradient)
        else:
            kept.add_(gradient)
        known[index], parameter.grad = True, None

    def _pieces(self, group: int) -> list[Tensor]:
        summed = self._zero.fp32_groups_gradients[group]
        return [self._single.get((group, index), gradient) for index, gradient in enumerate(summed)]

    def _norms(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What DeepSpeed takes the norm of: norms of parameters serve as well as their gradients."""
        groups = range(len(self._zero.fp32_groups_gradients))
        return [norms([gradient for group in groups for gradient in self._pieces(group)])], {}

    def _round(self) -> None:
        """The weights that are computed with, from those that were stepped."""
        for copy, master in zip(self._zero.bf16_groups_flat, self._zero.fp32_groups_flat_partition, strict=True):
            copy.data.copy_(master.data)

    def _forget(self) -> None:
        self._single.clear()
        for known in self._zero.fp32_groups_has_gradients:
            known[:] = [False] * len(known)
