"""The seam to DeepSpeed: a model under ZeRO 0-3 that sums gradients, steps, and gives its whole state by name.

Whatever the stage, a module in compute precision has fp32 masters and fp32 gradient accumulation, and its masters start
as the model's fp32 weights (DeepSpeed would start from their rounded copy). So two stages differ only by the order in
which sums are taken.
"""

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from cairn.cluster import Cluster
from cairn.config.train import EngineSection, OptimSection
from cairn.errors import UserError
from cairn.ops import native
from cairn.ops.deterministic import use_deterministic_kernels
from cairn.ops.precision import DTYPES, settled
from cairn.optim.build import build_optimizer
from cairn.train.engine_alone import Alone
from cairn.train.engine_config import deepspeed_config, effective_stage
from cairn.train.engine_layout import flat_slots, replicated_slots, sharded_slots
from cairn.train.engine_model import prepare_model
from cairn.train.engine_state import NamedState

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of DeepSpeed's dynamic fp16 loss scale."""


class Engine:
    """One model, its optimizer and its part of the cluster. COLLECTIVE to build, step, save and load.

    Args:
        model: on the CPU, in fp32, the same on every rank. Frozen parameters stay as they are.
        engine: the `engine` section.
        optim: the `optim` section.
        micro_batch_size: samples in a forward pass on this rank.
        cluster: this process's place; `cluster.init()` has been called.
        name: names the engine in errors.

    Raises:
        UserError: for a config that contradicts itself, or a DeepSpeed that lays out its state otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: EngineSection,
        optim: OptimSection,
        micro_batch_size: int,
        cluster: Cluster,
        name: str = "model",
    ) -> None:
        engine = settled(engine, cluster.device.type)
        self.name, self.dtype = name, DTYPES[engine.precision]
        self.grad_norm: float | Tensor = 0.0
        """Norm of the summed gradient of the last step, before clipping."""
        self.skipped = False
        """Whether the last step was left out because its gradient was not finite; the same on every rank."""
        self.overflowed = False
        """Whether it was, in fp16, with a loss scale that can still fall, which may mend it."""
        self._copier, self._copies = ThreadPoolExecutor(1, "copies"), list[Future[None]]()
        self._clip, self._stage, self._offload = optim.grad_clip, effective_stage(engine), engine.offload != "none"
        self._world_size = cluster.world_size
        native.allow(engine.kernels == "auto")
        if engine.deterministic:
            use_deterministic_kernels()
        config = deepspeed_config(engine, micro_batch_size, optim.grad_clip)
        deepspeed = _import_deepspeed()
        if engine.precision not in ("fp32", *_precisions(deepspeed)):
            raise UserError(f"engine.precision={engine.precision} is not supported on this machine's {cluster.device}")
        prepare_model(model, engine, cluster.device)
        for p in model.parameters():
            p.data = p.data.contiguous()
        # Kept alive by name: DeepSpeed gives the parameters new storage. At stage 0 it does not, hence the copy.
        initial = {n: p.detach().clone() if self._stage == 0 else p.detach() for n, p in model.named_parameters()}
        self._optimizer = build_optimizer(
            ((n, p) for n, p in model.named_parameters() if p.requires_grad and p.numel()), model, optim
        )
        names = {id(p): n for n, p in model.named_parameters()}
        self._optimizer.param_groups[:] = [group for group in self._optimizer.param_groups if group["params"]]
        groups = [[(names[id(p)], p) for p in group["params"]] for group in self._optimizer.param_groups]
        gc.freeze()  # it collects garbage a dozen times, seconds in all, and prints memory use
        try:
            with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
                self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=config)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(f"engine.deepspeed: {error.title} has {wrong}") from error
        gc.unfreeze()
        self.module: nn.Module = self._engine.module
        self.device: torch.device = torch.device(self._engine.device)
        self._zero: Any = self._engine.optimizer
        alone = cluster.world_size == 1 and self._stage == 1 and not hasattr(self._zero, "reduce_gradients")
        self._alone = Alone(self._engine) if alone else None
        if self._stage == 0:
            slots = replicated_slots(groups)
        elif self._stage < 3:
            slots = flat_slots(groups, self._optimizer, cluster.rank)
        else:
            slots = sharded_slots(groups, self._zero, cluster.rank)
        self._state = NamedState(self.module, groups, slots, self._optimizer, self._stage, self.device)
        self._state.check(initial, self.dtype, deepspeed.__version__)
        self._state.prime()
        if self._alone:
            self._alone.fuse(self._optimizer, optim.grad_clip)
        self._state.write(lambda key: initial[key.removeprefix("weight/")], trained_weights_only=True)
        self._refresh()
        if self._scaler is not None:
            self._scaler.cur_scale /= self._scale_share
            # DeepSpeed would change the scale first, and divide the gradient by one it was not computed with.
            self._update_scale = self._scaler.update_scale
            self._scaler.update_scale = lambda overflow: None
            self._scaler.raise_error_at_min_scale = False  # bad numbers are told by the guard
        if engine.compile:
            self._engine.compile()

    @property
    def base_lr(self) -> float:
        """Peak learning rate of the first optimizer group."""
        return float(self._optimizer.param_groups[0]["base_lr"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward through DeepSpeed."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradient of a scalar loss; gradients are summed over calls and ranks, never averaged.

        A loss that is not finite gives a gradient that is not, so `step` leaves it out.

        Args:
            loss: this rank's part of the loss of the step.
            last: whether `step` comes next. Stages 0 and 1 reduce over ranks only then.
        """
        if self._stage:
            # DeepSpeed counts a micro-batch at the forward pass after it; without one in between (two losses, then
            # two backward passes) stage 3 would overwrite the first gradient with the second.
            self._zero.clear_backward_seen_flag()
        self._engine.set_gradient_accumulation_boundary(last)
        # The gradient of an infinite loss may be finite, as where the target's probability is 0. Times 1, or times nan.
        loss = loss * (1.0 + 0.0 * loss.detach())
        # Stage 3 can only average. Its fp16 loss scale is kept world_size times smaller in turn.
        self._engine.backward(loss * self._world_size if self._stage == 3 else loss, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> None:
        """Clip, update with base_lr * lr_factor in every group, and drop the gradient.

        A gradient that is not finite leaves everything as it was and sets `skipped`.
        """
        self.copied()
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        if self._stage == 0:
            self._replicated_step()
            return
        if self._alone:
            self._alone.clear_unused()
        for flags in getattr(self._zero, "fp32_groups_has_gradients", ()):
            # Ranks on which a parameter was not used must clip its gradient too.
            flags[:] = [True] * len(flags)
        self._engine.step()
        self.grad_norm = self._zero._global_grad_norm
        self.skipped = not self._engine.was_step_applied()
        if self._scaler is not None:
            falls = self._scaler.dynamic and self._scaler.cur_scale > self._scaler.min_scale
            self.overflowed = self.skipped and falls
            self._update_scale(self.skipped)
        self._forget_gradients()

    def finite(self) -> bool:
        """COLLECTIVE: whether every weight and moment is finite, on every rank. Waits for the device."""
        bad = torch.zeros((), device=self.device)
        for tensor in self._state.held():
            low, high = torch.aminmax(tensor)  # takes no memory, as isfinite does, and knows nan
            bad += (~(low.isfinite() & high.isfinite())).to(self.device)
        if self._world_size > 1:
            dist.all_reduce(bad)
        return not bad.item()

    def tensors(self, later: bool = False) -> Iterator[tuple[str, Tensor]]:
        """COLLECTIVE: every named tensor, whole, on the CPU, at the one rank that owns it; see NamedState.tensors.

        With `later` a thread fills them while the next step computes its gradient (CheckFreq, Mohan et al., FAST 2021):
        they hold after `copied`.
        """
        self.copied()
        self._copies = []
        return self._state.tensors(self._copy_later) if later else self._state.tensors()

    def copied(self) -> None:
        """Wait for the copies that `tensors` makes later; a step and a load do, before they change anything."""
        for copy in self._copies:
            copy.result()

    @property
    def partitioned(self) -> bool:
        """Whether the module's weights are whole only while it is called, by all ranks at once (stage 3)."""
        return self._stage == 3

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """COLLECTIVE, every rank to the end: each weight by name, whole until the next is asked for."""
        gathered = _import_deepspeed().zero.GatheredParameters if self.partitioned else contextlib.nullcontext
        for name, parameter in self.module.named_parameters():
            with gathered(parameter):
                yield name, parameter.detach()

    def load(self, read: Callable[[str], Tensor | None]) -> None:
        """COLLECTIVE: set weights, moments and buffers to what `read` gives for each name of `tensors`, to the bit.

        Raises UserError naming a tensor that is missing or of another shape.
        """
        self.copied()
        self._state.write(read)
        self._refresh()

    def scalars(self) -> dict[str, Any]:
        """What `load_scalars` takes, JSON: the optimizer's update count and the fp16 loss scale."""
        scalars: dict[str, Any] = {"optimizer_step": self._state.step()}
        if self._scaler is not None:
            scaler = {key: getattr(self._scaler, key) for key in SCALER if hasattr(self._scaler, key)}
            scaler["cur_scale"] *= self._scale_share
            scalars["loss_scale"] = scaler
        return scalars

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Restore what `scalars` gave, on any topology."""
        self._state.set_step(int(scalars["optimizer_step"]))
        if self._scaler is not None and "loss_scale" in scalars:
            for key, value in scalars["loss_scale"].items():
                setattr(self._scaler, key, value / self._scale_share if key == "cur_scale" else value)

    def sync_buffers(self) -> None:
        """COLLECTIVE: give every rank the buffers of rank 0 (batch-norm statistics are of each rank's own batches)."""
        if self._world_size > 1:
            for buffer in self._state.buffers().values():
                dist.broadcast(buffer, src=0)

    def _copy_later(self, to: Tensor, source: Tensor) -> None:
        self._copies.append(self._copier.submit(_copy, to, source))

    def _replicated_step(self) -> None:
        """Stage 0: DeepSpeed would neither report the norm nor notice that it is not finite."""
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        self.grad_norm = torch.nn.utils.clip_grad_norm_(params, self._clip or float("inf"))
        self.skipped = not bool(self.grad_norm.isfinite())
        if self.skipped:
            self._engine.zero_grad()
        else:
            self._engine.step()

    def _forget_gradients(self) -> None:
        """DeepSpeed would use the last step's gradient again for a parameter that has none in the next."""
        if self._offload:
            for slot in self._state.slots:
                if slot.tensor.grad is not None:
                    slot.tensor.grad.zero_()
        elif self._stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()

    def _refresh(self) -> None:
        """Make the weights that are computed with from the masters, on every rank, as after a step."""
        if self._stage in (1, 2):
            type(self._zero).update_lp_params(self._zero)
        elif self._stage == 3:
            self._zero._partition_all_parameters()
            for index in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    @property
    def _scaler(self) -> Any:
        return self._zero.loss_scaler if self.dtype == torch.float16 else None

    @property
    def _scale_share(self) -> int:
        return self._world_size if self._stage == 3 else 1


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)  # and nothing is returned, which would keep the copy alive


def _import_deepspeed() -> Any:
    """DeepSpeed, kept from talking and from compiling C++ operators with g++ at start-up; none is used here."""
    logging.disable(logging.WARNING)  # it warns of a CPU while it is imported
    import deepspeed

    logging.disable(logging.NOTSET)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__ = {}
    groups = deepspeed.utils.groups
    if groups._WORLD_GROUP is not None and groups._WORLD_GROUP not in dist.distributed_c10d._world.pg_map:
        groups._release_process_group_references()  # of a process group that was left since the last engine
    return deepspeed


def _precisions(deepspeed: Any) -> list[str]:
    accelerator = deepspeed.accelerator.get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    return [name for name, yes in supported.items() if yes]
