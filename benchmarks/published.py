"""Training speeds that others published, and the runs behind them: what `python -m benchmarks.scale` is held against.

All are in bf16, or 8 bits, and data-parallel alone: weights, gradients and moments split over all GPUs, gathered block
by block. Of llm-foundry every such row with sequences of 2,048 is here; other tables are taken where they split nothing
else.
"""

from dataclasses import dataclass, replace

from cairn.plan.collectives import Network
from cairn.plan.hardware import GPUS, Hardware
from cairn.plan.speed import LOGITS, TRAFFIC, Work, sharded

GB = 1e9


@dataclass(frozen=True)
class Model:
    """Its shape; `kv`: width of keys; `ff`: of the MLP, which has `mats` matrices; `tied`: head and embedding."""

    layers: int
    width: int
    ff: int
    vocab: int
    kv: int
    mats: int = 2
    tied: bool = True

    @property
    def matrices(self) -> float:
        """Elements that products are made with in the blocks."""
        return self.layers * (2.0 * self.width**2 + 2.0 * self.width * self.kv + self.mats * self.width * self.ff)

    @property
    def parameters(self) -> float:
        """All, norms and biases left out."""
        return self.matrices + (1 if self.tied else 2) * self.vocab * self.width


def mpt(layers: int, width: int) -> Model:
    """llm-foundry/scripts/train/yamls/pretrain."""
    return Model(layers, width, 4 * width, 50368, width)


MODELS = {
    "MPT 125m": mpt(12, 768),
    "MPT 350m": mpt(24, 1024),
    "MPT 760m": mpt(24, 1536),
    "MPT 1b": mpt(24, 2048),
    "MPT 3b": mpt(32, 2560),
    "MPT 7b": mpt(32, 4096),
    "MPT 13b": mpt(40, 5120),
    "MPT 30b": mpt(48, 7168),
    "MPT 70b": mpt(80, 8192),
    "Llama 3.1 8B": Model(32, 4096, 14336, 128256, 1024, 3, tied=False),
    "Llama 2 13b": Model(40, 5120, 13824, 32000, 5120, 3, tied=False),
    "Llama 2 34b": Model(48, 8192, 22016, 32000, 1024, 3, tied=False),
    "Llama 2 70b": Model(80, 8192, 28672, 32000, 1024, 3, tied=False),
    "GPT-2 124M": Model(12, 768, 3072, 50304, 768),
    "GPT-2 350M": Model(24, 1024, 4096, 50304, 1024),
    "GPT-2 774M": Model(36, 1280, 5120, 50304, 1280),
    "GPT-2 1558M": Model(48, 1600, 6400, 50304, 1600),
    "GPT 1.7B": Model(24, 2048, 8192, 131072, 2048),
}


@dataclass(frozen=True)
class Source:
    """A table, and what its rows share."""

    name: str
    where: str
    seq_len: int
    compiled: bool = False
    gradients: float = 4.0
    """Bytes of a gradient on the network."""
    fused_loss: bool = True
    """Or fp32 copies of all logits."""
    fp8: bool = False
    """Products of the blocks in 8 bits."""


FOUNDRY = "github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md, sequences of 2,048"
H100S = Source("llm-foundry, H100", FOUNDRY, 2048)
A100S = Source("llm-foundry, A100-80", FOUNDRY, 2048)
A100S_40 = Source("llm-foundry, A100-40", FOUNDRY, 2048, gradients=2.0)
TITAN_AT = "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3"
TITAN = Source("torchtitan", TITAN_AT, 8192, fused_loss=False)
TITAN_COMPILED = Source("torchtitan, compiled", TITAN_AT, 8192, compiled=True)
TITAN_FP8 = Source("torchtitan, compiled, 8 bits", TITAN_AT, 8192, compiled=True, fp8=True)
FMS = Source("fms-fsdp, compiled", "github.com/foundation-model-stack/fms-fsdp, README.md", 4096, True, 2.0, False)
MEGATRON = Source(
    "Megatron-LM", "github.com/NVIDIA/Megatron-LM, README.md, images/model_table.png", 4096, True, fused_loss=False
)

LLMC = Source("llm.c", "github.com/karpathy/llm.c, scripts/run_gpt2_*.sh: seconds of a step", 1024, True, 2.0)
LLMC_LOG = replace(
    LLMC, where="github.com/KellerJordan/modded-nanogpt, records/track_1_short/2024-10-13_llmc/README.md"
)

H100, A100, A100_40 = GPUS["h100"], GPUS["a100-80"], GPUS["a100-40"]
TITAN_H100 = replace(H100, name="h100, 500 W", bandwidth=2400 * GB)
"""Of torchtitan's tables: 96 GB of HBM2e, and a power limit of 500 W, about which the model knows nothing."""
SLOW_A100 = replace(A100, name="a100-80, 50 GB/s", inter=400 / 8 / 8 * GB)
SLOW_H100 = replace(H100, name="h100, 100 GB/s", inter=800 / 8 / 8 * GB)
"""fms-fsdp's nodes of eight have 400 and 800 Gb/s together."""


@dataclass(frozen=True)
class Row:
    """A published speed. `regather`: FULL_SHARD, which drops weights after the forward pass."""

    source: Source
    model: str
    gpu: Hardware
    gpus: int
    micro_batch: int
    accumulate: int
    tokens_per_s: float
    """A GPU."""
    recompute: float = 0.0
    regather: bool = True
    fitted: bool = False

    @property
    def network(self) -> Network:
        """Nodes of eight."""
        return Network(self.gpu, max(1, self.gpus // 8), min(8, self.gpus))

    def predicted(self) -> float:
        """Tokens/s a GPU, by the model of cairn/plan/speed.py."""
        model, source = MODELS[self.model], self.source
        tokens = self.micro_batch * source.seq_len
        attention = 6.0 * model.layers * model.width * source.seq_len  # causal: half of the keys
        flops = 6 * (model.matrices + model.vocab * model.width) + attention
        compiled = source.compiled
        loss = model.vocab * LOGITS[source.fused_loss]
        eight = 6 * model.matrices if source.fp8 else 0.0
        work = Work(tokens, model.layers, model.width, flops, attention, loss, compiled, eight, self.recompute)
        passes, n = work.seconds(self.gpu), model.parameters
        lost = sharded(self.network, 2 * n, source.gradients * n, model.layers, passes, self.regather)
        update = 46.0 * n / self.gpus / (TRAFFIC * self.gpu.bandwidth)
        step = self.accumulate * (sum(passes) + lost) + update
        return self.accumulate * tokens / step

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was published."""
        return self.predicted() / self.tokens_per_s - 1


def megatron(teraflops: float) -> float:
    """Tokens/s of its 1.7B: its FLOP a token (arXiv 2104.04473, section 5.1, without recomputation)."""
    model, seq_len = MODELS["GPT 1.7B"], MEGATRON.seq_len
    layers, width = model.layers, model.width
    return (
        teraflops * 1e12 / (72 * layers * width**2 * (1 + seq_len / (6 * width) + model.vocab / (12 * width * layers)))
    )


def _foundry() -> list[Row]:
    def rows(source: Source, gpu: Hardware, table: str, fitted: set[tuple[str, int]]) -> list[Row]:
        found = []
        for line in table.split(";"):
            model, gpus, size, accumulate, speed, *flags = line.split()
            found.append(
                Row(
                    source,
                    f"MPT {model}",
                    gpu,
                    int(gpus),
                    int(size),
                    int(accumulate),
                    float(speed),
                    recompute=1.0 if "rec" in flags else 0.0,
                    regather="grad" not in flags,
                    fitted=(model, int(gpus)) in fitted,
                )
            )
        return found

    return [
        *rows(H100S, H100, H100_TABLE, {("1b", 8), ("7b", 8), ("13b", 8), ("30b", 16), ("7b", 128), ("1b", 512)}),
        *rows(
            A100S, A100, A100_TABLE, {(size, 8) for size in ("125m", "350m", "760m", "1b", "3b", "7b", "13b", "30b")}
        ),
        *rows(replace(A100S, gradients=2.0), A100, A100_PURE_TABLE, set()),
        *rows(A100S_40, A100_40, A100_40_TABLE, set()),
    ]


# model, GPUs, micro-batch, accumulation, tokens/s a GPU; rec: recomputing; grad: SHARD_GRAD_OP, else FULL_SHARD
H100_TABLE = """760m 8 24 2 63147; 760m 16 24 1 68551; 760m 32 24 1 67971; 1b 8 14 1 45455; 1b 16 20 1 46037;
1b 32 20 1 45130; 1b 64 20 1 44402; 1b 128 12 1 44123 grad; 1b 256 12 1 42555 grad; 1b 512 12 1 39837 grad;
3b 16 10 3 24142; 3b 32 6 3 23021; 3b 64 6 3 22525; 3b 128 8 1 23422 grad; 3b 256 8 1 22772 grad;
3b 512 8 1 21664 grad; 7b 8 6 1 10643; 7b 128 6 1 10475; 7b 256 6 1 10119; 7b 512 6 1 9670; 13b 8 2 1 4792;
13b 16 2 1 4767; 13b 32 2 1 4811; 13b 64 2 1 4800; 13b 128 16 1 5080 rec; 13b 256 16 1 4989 rec;
13b 512 16 1 4952 rec; 30b 8 3 21 2002 rec; 30b 16 10 3 2263 rec; 30b 32 14 3 2308 rec; 30b 128 8 1 2199 rec;
30b 256 8 1 2148 rec; 30b 512 8 1 2115 rec; 70b 32 2 16 882 rec; 70b 64 8 4 1039 rec; 70b 128 8 1 1058 rec;
70b 256 8 1 1035 rec; 70b 512 8 1 1007 rec"""
A100_TABLE = """125m 8 32 2 141737; 125m 8 40 2 142830; 350m 8 32 2 58782; 760m 8 24 2 32434; 1b 8 14 4 20513;
3b 8 10 2 10811; 7b 8 6 2 4641; 13b 8 2 3 2262; 30b 8 3 21 916 rec"""
A100_PURE_TABLE = "70b 32 2 16 373 rec; 70b 64 8 4 410 rec"
A100_40_TABLE = """125m 8 26 3 136334; 125m 16 26 1 130535; 125m 32 26 1 127122; 125m 64 26 1 125234;
125m 128 26 1 123936; 350m 8 16 4 55995; 350m 16 18 1 55413; 350m 32 18 1 53811; 350m 64 18 1 52689;
350m 128 18 1 51934; 760m 8 12 4 30173; 760m 16 12 1 29607; 760m 32 12 1 29648; 760m 64 12 1 29344;
760m 128 12 1 28940; 1b 8 8 8 19271; 1b 16 8 1 19085; 1b 32 10 1 15555; 1b 64 10 1 19001; 1b 128 10 1 18647;
3b 8 5 8 10065; 3b 16 5 1 9750; 3b 32 6 1 9914; 3b 64 6 1 9736; 3b 128 6 1 9538; 7b 8 12 4 3679 rec;
7b 16 16 1 3645 rec; 7b 32 18 1 3725 rec; 7b 64 18 1 3665 rec; 7b 128 18 1 3623 rec; 13b 8 4 16 1668 rec;
13b 16 10 1 1993 rec; 13b 32 14 1 1998 rec; 13b 64 16 1 1976 rec; 13b 128 16 1 1972 rec; 30b 32 4 1 857 rec;
30b 128 6 1 865 rec; 70b 64 2 1 276 rec; 70b 128 4 1 376 rec"""

# Recomputed: fms-fsdp publishes HFU / MFU; torchtitan's "selective" recomputes every other product.
ROWS = [
    *_foundry(),
    *(
        Row(source, "Llama 3.1 8B", TITAN_H100, gpus, 2, 1, speed, recompute=0.5)
        for source, gpus, speed in (
            (TITAN, 8, 5762),
            (TITAN, 128, 5605),
            (TITAN_COMPILED, 8, 6667),
            (TITAN_COMPILED, 128, 6514),
            (TITAN_FP8, 8, 8532),
            (TITAN_FP8, 128, 8380),
        )
    ),
    *(
        Row(FMS, f"Llama 2 {model}", SLOW_A100, 128, 2, 1, speed, 3 * (again - 1), fitted=model == "13b")
        for model, speed, again in (("13b", 2150, 0.69 / 0.61), ("34b", 820, 0.74 / 0.55), ("70b", 410, 0.74 / 0.55))
    ),
    *(
        Row(FMS, f"Llama 2 {model}", SLOW_H100, 96, 2, 1, speed, 3 * (again - 1))
        for model, speed, again in (("13b", 4850, 0.46 / 0.43), ("34b", 1830, 0.49 / 0.38), ("70b", 890, 0.47 / 0.38))
    ),
    *(
        Row(
            source,
            f"GPT-2 {model}",
            gpu,
            8,
            size,
            tokens // (8 * size * 1024),
            tokens / 8 / step,
            regather=False,
            fitted=(model, gpu) in (("124M", A100), ("1558M", H100)),
        )
        for source, model, gpu, size, tokens, step in (
            (LLMC, "124M", A100, 64, 2**19, 0.3),
            (LLMC, "350M", A100, 64, 2**19, 0.82),
            (LLMC, "774M", A100, 32, 2**19, 1.7),
            (LLMC_LOG, "124M", H100, 64, 2**19, 0.14),
            (LLMC, "1558M", H100, 16, 2**20, 2.8),
        )
    ),
    Row(MEGATRON, "GPT 1.7B", H100, 48, 4, 1, megatron(408.8), regather=False),
]
