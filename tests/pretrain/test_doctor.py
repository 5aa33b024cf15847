"""`cairn doctor`: what is well is said, what would go wrong is found, and one broken check hides no other."""

import re
import socket
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from cairn.cluster import job_ends
from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.config.train import EngineSection
from cairn.data.prepare import prepare, prepared_path
from cairn.errors import UserError
from cairn.hub import compare
from cairn.ops import precision
from cairn.train import lock
from cairn.train.folder import RunFolder
from cairn.train.lock import RunLock
from pretrain.doctor import estimate, machine, run
from pretrain.doctor.finding import Finding, error, examine, ok
from tests.pretrain import runs
from tests.pretrain.conftest import Place

ROOT = Path(__file__).parents[2]


def doctor(place: Place, *argv: str | Path, code: int = 0) -> str:
    return runs.run(*argv, module="pretrain.doctor", folder=place.here, code=code).text


def config_of(place: Place, *overrides: str, name: str = "gpt") -> PretrainConfig:
    return load(PretrainConfig, place.here / f"{name}.yaml", list(overrides))


def look(check: Callable[..., Finding], *args: object) -> Finding:
    """As the command does, where a UserError is a finding."""
    ((_, finding),) = examine([("x", lambda: check(*args))])
    return finding


def expect(finding: Finding, level: str, text: str) -> None:
    assert finding.level == level, finding
    assert re.search(text, str(finding)), finding
    assert "\n" not in str(finding)


def test_a_machine_that_is_well(place: Place) -> None:
    said = doctor(place).splitlines()
    names = [name for name, _ in machine.checks(PretrainConfig())]
    lines = [line for line in said if line.startswith(("ok  ", "warning ", "error "))]
    assert [line[8:23].strip() for line in lines] == names
    assert not [line for line in lines if line.startswith("error")]
    assert re.fullmatch(r"\d+ ok, \d+ warning, 0 error", said[-1])
    if not torch.cuda.is_available():
        assert sum("no GPU: not checked" in line for line in lines) == 2


def test_a_config_that_is_well(place: Place) -> None:
    said = doctor(place, place.bert, "run.name=new", "--world", "2", "train.micro_batch_size=4")
    for line in (
        r"ok +batch .*grad_accum 1$",
        r"ok +corpus .*training tokens",
        r"ok +checksums +1 units",
        r"ok +vocabulary +263 ids in 384 rows",
        r"ok +disk ",
        r"ok +run folder .*will be made",
        r"ok +memory +about ",
        r"ok +time +about .* on 1 x 2 ",
        r"ok +export +BertForPreTraining: logits of random weights differ by \d\.\de-0[678]",
    ):
        assert re.search(line, said, re.M), f"{line}\n{said}"
    assert not place.folder("new").path.exists()


def test_an_error_is_the_exit_status(place: Place) -> None:
    said = doctor(place, place.gpt, "run.name=new", "model.vocab_size=100", "--quick", code=1)
    assert re.search(r"^error +vocabulary +model.vocab_size 100 is smaller than the tokenizer's 263", said, re.M)
    assert len(re.findall("^error", said, re.M)) == 1, said
    assert re.search(r"^ok +export ", said, re.M), "and the others are still made"
    assert "checksums" not in said
    assert "--world 0: expected at least 1" in doctor(place, "--world", "0", code=2)
    assert "unknown key" in doctor(place, place.gpt, "model.layers=3", code=2)


def test_a_check_that_fails_hides_no_other() -> None:
    def broken() -> Finding:
        raise ZeroDivisionError("a\nb")

    findings = dict(examine([("one", broken), ("two", lambda: ok("fine"))]))
    assert findings == {"one": Finding("error", "ZeroDivisionError: a (the check itself failed)"), "two": ok("fine")}
    assert str(error("a", "b")) == "a; b"


CONFIG_CASES: dict[str, tuple[Callable[..., Finding], list[str], str, str]] = {
    "divide": (run.batch, ["train.micro_batch_size=3"], "error", "does not divide; train.micro_batch_size=2 divides"),
    "ranks": (run.batch, ["train.global_batch_size=7"], "error", "does not divide; give a multiple of the ranks"),
    "source": (run.corpus, ["data.source={here}/nowhere"], "error", "no such file or folder"),
    "new": (run.corpus, ["data.held_out=0.3"], "warning", "is not prepared; cairn prepare"),
    "mask": (
        run.vocabulary,
        ["tokenizer.name=file", "tokenizer.path={here}/pieces.txt", "model.name=bert", "objective.name=masked"],
        "error",
        r"objective.name masked needs \[MASK\]",
    ),
    "tokenizer": (
        run.vocabulary,
        ["tokenizer.name=file", "tokenizer.path={here}/none.model"],
        "error",
        "tokenizer.path",
    ),
    "trained": (
        run.vocabulary,
        ["tokenizer.name=sentencepiece", "model.vocab_size=8000"],
        "error",
        "the tokenizer's 8192",
    ),
    "rows": (run.vocabulary, ["model.vocab_size=50304"], "warning", "model.vocab_size=384 would do"),
    "huge": (run.disk, ["model.d_model=65536", "model.n_layer=300"], "error", "TiB|GiB free in .*; set run.dir"),
    "export": (
        lambda config: run.export(config.model),
        ["model.qk_norm=true"],
        "warning",
        "model.qk_norm True: it cannot be exported",
    ),
}


@pytest.mark.parametrize("name", CONFIG_CASES)
def test_what_is_wrong_with_a_config(place: Place, name: str) -> None:
    (place.here / "pieces.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]))
    check, overrides, level, text = CONFIG_CASES[name]
    config = config_of(place, *(override.format(here=place.here) for override in overrides))
    expect(look(check, config, *([2] if check is run.batch else [])), level, text)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_shard(place: Place, tmp_path: Path, damage: str) -> None:
    config = config_of(place, f"data.dir={tmp_path}")
    folder = prepare(config.data, config.tokenizer)
    assert look(run.checksums, config).level == "ok"
    path = folder / "0-00000.train.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(content if damage == "altered" else content[:-1])
    expect(look(run.checksums, config), "error", rf"0-00000\.train\.bin: .*{damage}.*prepare the corpus again")
    found = look(run.corpus, config)
    if damage == "altered":  # which only reading it all tells
        assert found.level == "ok"
        path.unlink()  # the remedy
    else:
        expect(found, "warning", "is damaged; cairn prepare")
    assert prepare(config.data, config.tokenizer) == folder
    assert look(run.checksums, config).level == "ok"


def test_a_run_folder(place: Place, straight: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "GRACE_S", 0.1)
    same = ["run.name=straight", "engine.precision=bf16"]
    expect(look(run.run_folder, config_of(place, *same)), "ok", "goes on from step 14")
    other = config_of(place, *same, "model.n_layer=3")
    expect(look(run.run_folder, other), "error", "another config .*model.n_layer was 2, now 3.*choose another run.name")
    with RunLock(straight.path):
        expect(look(run.run_folder, config_of(place, *same)), "error", r"in use by pid \d+ on host")
    expect(look(run.disk, config_of(place, *same)), "ok", "free in")


def test_a_key_for_wandb(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    config = config_of(place, "track.wandb=online")
    expect(look(run.wandb_key, config), "error", "no API key; wandb login")
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    expect(look(run.wandb_key, config), "ok", "there is one")
    assert "secret" not in str(look(machine.wandb))


def test_a_run_that_takes_too_long(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_of(*overrides: str) -> Finding:
        return look(estimate.planned, estimate.hours, config_of(place, *overrides), 1)

    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    long = [f"train.steps={10**7}", "train.max_hours=0.01"]
    expect(time_of(*long), "warning", r"train.max_hours=0\.01 ends it before train.steps")
    expect(time_of(long[0]), "ok", r"about [\d.]+ (days|h|min) on 1 x 1")
    expect(time_of("train.micro_batch_size=3"), "ok", "the batch does not divide")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000000")
    expect(time_of(long[0]), "warning", "the job ends in .*--requeue")


def test_a_run_that_takes_too_much_memory(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory_of(*overrides: str) -> Finding:
        return look(estimate.planned, estimate.room, config_of(place, *overrides), 1)

    expect(memory_of(), "ok", r"about [\d.]+ MiB a rank at its peak")
    expect(memory_of("model.d_model=16384", "model.n_layer=200"), "error", "GiB may be used .*; cairn plan CONFIG")

    def unknown() -> str:
        raise UserError("a card of tomorrow is not in the table")

    monkeypatch.setattr(estimate, "here", unknown)
    expect(memory_of(), "warning", "not estimated: a card of tomorrow")


def test_an_export_that_computes_something_else(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "compare", lambda *_: 0.5)
    expect(look(run.export, config_of(place).model), "error", r"GPT2LMHeadModel: logits differ by 5\.0e-01")


def test_a_port_that_is_taken(free_port: int) -> None:
    expect(look(machine.ports, free_port), "ok", f"{free_port} is free")
    with socket.socket() as s:
        s.bind(("127.0.0.1", free_port))
        s.listen()
        expect(look(machine.ports, free_port), "warning", f"{free_port}, .* is taken .*MASTER_PORT")


def test_a_name_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    expect(look(machine.host_name, "node7"), "warning", "node7 does not resolve .*/etc/hosts")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", ("192.0.2.1", 0))])
    expect(look(machine.host_name, "node7"), "warning", "node7 is 192.0.2.1, which does not answer here")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", ("127.0.0.1", 0))])
    expect(look(machine.host_name, "node7"), "ok", "loopback: for several nodes")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(look(machine.file_system, tmp_path / "a" / "b"), "ok", "can be written")
    assert list(tmp_path.iterdir()) == []
    expect(look(machine.file_system, Path("/proc/none")), "error", "set run.dir")
    (tmp_path / "file").touch()
    expect(look(machine.file_system, tmp_path / "file" / "runs"), "error", "Not a directory; set run.dir")

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(machine.fcntl, "flock", no_locks)
    expect(look(machine.file_system, tmp_path), "warning", "no file locks")


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 1024))
    expect(look(machine.open_files), "warning", "at most 1024; .*ulimit")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 10**6))
    expect(look(machine.open_files), "ok", "1,000,000")
    expect(look(machine.shared_memory, tmp_path / "none"), "warning", "missing; ")
    monkeypatch.setattr(machine, "SMALLEST_SHM", 2**60)
    expect(look(machine.shared_memory, tmp_path), "warning", "--shm-size")
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(machine, "CPU_QUOTA", quota)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 8)
    quota.write_text("250000 100000\n")
    expect(look(machine.cores), "warning", r"8 of 8 .* time for 2\.5; set OMP_NUM_THREADS=2")
    quota.write_text("max 100000\n")
    expect(look(machine.cores), "ok", "8 of 8")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {3})
    expect(look(machine.cores), "warning", "1 of 8 .*--cpus-per-task")


def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    expect(look(machine.compiler, False), "warning", "no C.. compiler .*install g..")
    expect(look(machine.compiler, True), "error", "engine.compile needs one")
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    expect(look(machine.compiler, True), "ok", f"{tmp_path}/g.., no nvcc")


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    expect(look(machine.packages, "no-such-package-of-ours"), "warning", "is not installed")
    asked = ["no-such-package-of-ours>=1", "numpy>=99", "torch>=2", 'absent; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda _: asked)
    found = look(machine.packages, "cairn")
    expect(found, "error", r"^no-such-package-of-ours is missing; numpy is [\d.]+, >=99 is needed; pip install")
    expect(look(machine.imports, ["json", "no_such_module"]), "error", "no_such_module: No module named")


def test_a_driver_without_its_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: 570\nGCC\n")
    monkeypatch.setattr(torch.version, "cuda", None)
    expect(look(machine.torch_build), "warning", "NVIDIA driver; install a CUDA build")
    expect(look(machine.gpus), "ok", "not checked")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    expect(look(machine.torch_build), "ok", "CUDA 12.8")
    expect(look(machine.gpus), "error", r"torch sees none, with a driver \(NVRM version: 570\)")


def test_deepspeed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(*overrides: str) -> Finding:
        config = config_of(place, *overrides)
        return look(machine.deepspeed, config.engine, config.optim)

    expect(trial("engine.zero_stage=3"), "ok", r"stage 3 in fp32 took a step \(loss [34]\.\d\d\), no op to build")
    expect(trial("engine.deepspeed.zero_optimization.stage=2"), "error", "set engine.zero_stage instead")
    expect(trial("engine.offload=optimizer", "engine.zero_stage=0"), "error", "needs engine.zero_stage of at least 1")
    monkeypatch.setattr(machine, "TESTED_DEEPSPEED", "0.1")
    expect(trial(), "warning", "was tested with 0.1")


def test_the_version_it_names_is_the_one_that_is_pinned() -> None:
    assert f"deepspeed=={machine.TESTED_DEEPSPEED}\n" in (ROOT / "constraints.txt").read_text()


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, auto = EngineSection(precision="bf16"), EngineSection()
    monkeypatch.setattr(machine, "fast_bf16", lambda _: False)
    monkeypatch.setattr(precision, "fast_bf16", lambda _: False)
    expect(
        look(machine.precision, bf16), "warning", r"emulated .*; a new run with engine\.precision=auto or fp32 is not"
    )
    expect(look(machine.precision, auto), "ok", "^fp(32 on cpu|16 on cuda); engine.precision pins one")


def test_attention(place: Place) -> None:
    expect(look(machine.attention, config_of(place)), "ok", " on (cpu|cuda) ")
    expect(look(machine.attention, config_of(place, "model.attention_backend=flex")), "ok", "attention_backend is flex")


def test_the_end_of_a_job_that_says_nothing_of_it() -> None:
    assert job_ends({}) is None
    assert job_ends({"SLURM_JOB_END_TIME": "soon"}) is None
    assert job_ends({"SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9


def test_paths_of_what_is_prepared(place: Place) -> None:
    config = config_of(place)
    assert prepared_path(config.data, config.tokenizer) == prepare(config.data, config.tokenizer)
    with pytest.raises(UserError, match="nowhere"):
        prepared_path(config_of(place, "data.source=nowhere").data, config.tokenizer)
