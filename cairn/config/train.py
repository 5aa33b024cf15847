"""The sections of how a run trains: `optim`, `schedule`, `engine`, `train`, `checkpoint`, `track`, `run`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from cairn.config.base import Section

Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Decay, Decay], Field(strict=False)]


class AdamWSection(Section):
    """AdamW (arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(6e-4, gt=0)
    """Peak learning rate."""
    betas: Betas = (0.9, 0.95)
    """Decay of the two moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of matrices and embeddings; norms and biases have none."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0: off."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of a block over that of the block above it; embeddings lie below the first, heads above the last
    (arXiv 1801.06146, section 3.2)."""


class MuonSection(Section):
    """Muon (orthogonalised momentum) for the hidden matrices, AdamW for embeddings, head, norms and biases."""

    name: Literal["muon"] = "muon"
    lr: float = Field(0.02, gt=0)
    """Peak learning rate of the hidden matrices."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of the momentum (Nesterov)."""
    ns_steps: int = Field(5, ge=1)
    """Newton-Schulz iterations."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of hidden matrices and embeddings."""
    adam_lr: float = Field(3e-3, gt=0)
    """Peak learning rate of the parameters that AdamW trains."""
    betas: Betas = (0.9, 0.95)
    """Decay of AdamW's two moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0: off."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of a block over that of the block above it; embeddings lie below the first, heads above the last
    (arXiv 1801.06146, section 3.2)."""


OptimSection = Annotated[AdamWSection | MuonSection, Field(discriminator="name")]


class ScheduleSection(Section):
    """Learning rate over the run, as a share of its peak: linear warmup, then a shape."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warmup; wsd holds the peak, then decays linearly."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warmup."""
    decay_steps: int | None = Field(None, ge=0)
    """wsd: steps of its final decay; empty: a fifth of the run."""
    min_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the peak at the last step."""


class EngineSection(Section):
    """How DeepSpeed runs the model."""

    zero_stage: int = Field(1, ge=0, le=3)  # a Literal would take true for 1
    """What is split over ranks: nothing, optimizer state, + gradients, + weights."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute precision; auto: bf16 where the machine is fast in it, else fp16 on a GPU and fp32 on a CPU. Weights and
    moments of the optimizer are kept in fp32 always."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in host memory: nothing, optimizer state, or optimizer state and (stage 3) weights."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    compile: bool = False
    """Compile the model with torch.compile."""
    fp8: bool = False
    """Train linear layers, the head over the vocabulary left out, with products of 8-bit floats; for GPUs that have
    them, with `compile`."""
    kernels: Literal["auto", "pytorch"] = "auto"
    """auto: our own in bf16 on a CPU with AMX, compiled by g++ where they are first used; pytorch: none of ours."""
    deterministic: bool = False
    """Only kernels that give the same bits each time, on GPUs too; slower."""
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's own JSON, merged over what is generated here."""


class TrainSection(Section):
    """Length and rhythm of the loop."""

    steps: int = Field(1000, ge=1)
    """Optimizer steps."""
    max_hours: float | None = Field(None, gt=0)
    """Hours of training, all calls together, by which the run ends with its decay done, at `steps` or before."""
    global_batch_size: int = Field(32, ge=1)
    """Samples in an optimizer step, over all ranks; the same on every topology."""
    micro_batch_size: int = Field(8, ge=1)
    """Samples a rank takes through the model at once; grad_accum = global / (micro x world size)."""
    log_every: int = Field(10, ge=1)
    """Steps between two writes of metrics (each step has its own row)."""
    eval_every: int = Field(0, ge=0)
    """Steps between two evaluations; 0: at the end only."""
    eval_samples: int | None = Field(None, ge=1)
    """Held-out samples of an evaluation, spread evenly over them; empty: all."""

    def fitting_micro_batch_size(self, world_size: int) -> int | None:
        """The largest, up to micro_batch_size, that the global batch over so many ranks is a multiple of; None: none.

        It is micro_batch_size itself where the batch divides as it is.
        """
        sizes = range(self.micro_batch_size, 0, -1)
        return next((size for size in sizes if self.global_batch_size % (size * world_size) == 0), None)


class GuardSection(Section):
    """What is done when numbers go bad or a rank hangs."""

    max_skipped: int = Field(10, ge=0)
    """Steps in a row without an update, as the loss or gradient was not finite, that stop the run; 0: never."""
    spike_factor: float = Field(0.0, ge=0)
    """A step whose loss lies this many standard deviations above the last spike_window ones is a spike; 0: off."""
    spike_window: int = Field(100, ge=10)
    """Steps that a spike is judged by."""
    max_rollbacks: int = Field(3, ge=0)
    """Spikes after which the run goes back to the last checkpoint and passes over the samples since; then it stops."""
    hang_minutes: float = Field(10.0, ge=0)
    """A rank that stays this long in one step, evaluation batch or save hangs: all stacks are written; 0: off."""
    lost_seconds: float = Field(60.0, ge=5)
    """A rank without a sign of life for this long is lost, and the others stop."""


class CheckpointSection(Section):
    """When checkpoints are written and which are kept."""

    every: int = Field(1000, ge=0)
    """Steps between two checkpoints; 0: at the end only."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints whose step is a multiple of this are kept for good; 0: none."""
    background: bool = True
    """Write while training goes on."""
    resume: bool = True
    """Go on from the newest good checkpoint of the run folder, if there is one."""


class SelectSection(Section):
    """Which checkpoint is the run's best, and when there is no better one to hope for."""

    metric: str | None = None
    """Metric of an evaluation, such as loss or accuracy: the checkpoint that is best by it is kept, and is the one that
    is used. Empty: of a pretraining run the newest, of a fine-tuning one by its task's own metric."""
    patience: int | None = Field(None, ge=1)
    """Evaluations in a row without a better one that end the run early; empty: it goes to its end."""


class TrackSection(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "off"] = "off"
    """Weights & Biases; auto: online with an API key, offline without."""
    project: str = "cairn"
    """Its project."""
    tensorboard: bool = False
    """Write TensorBoard events too (extra `tensorboard`)."""
    progress: bool = True
    """Show a progress bar."""


class RunSection(Section):
    """Where the run lives."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    dir: str = "runs"
    """Folder of run folders."""


class FinetuneOptimSection(AdamWSection):
    """AdamW as BERT is fine-tuned with."""

    lr: float = Field(5e-5, gt=0)
    betas: Betas = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)


FinetuneOptim = Annotated[FinetuneOptimSection | MuonSection, Field(discriminator="name")]


class FinetuneScheduleSection(ScheduleSection):
    """Linear to nothing, as BERT is fine-tuned with."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    warmup_ratio: float | None = Field(0.06, ge=0, lt=1)
    """Share of the run that warms up, where warmup_steps is 0."""
    min_ratio: float = Field(0.0, ge=0, le=1)


class FinetuneTrainSection(TrainSection):
    """Length and rhythm of the loop."""

    epochs: float | None = Field(None, gt=0)
    """Passes over the training examples, which then decide `steps`."""
    evals: int | None = Field(None, ge=1)
    """Evaluations, spread evenly over the run, which then decide `eval_every`."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.micro_batch_size > self.global_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} is more than global_batch_size {self.global_batch_size}"
            )
        return self
