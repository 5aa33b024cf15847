"""A cluster's profile is checked whole before anything is submitted."""

from pathlib import Path

import pytest

from cairn.config.cluster import ClusterProfile, is_secret, time_limit
from cairn.config.load import dump, load
from cairn.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "configs/cluster").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_shipped_ones_load(path):
    profile = load(ClusterProfile, path)
    assert profile.cpus_per_task is not None  # SLURM's default is one core


def test_a_profile_extends_another(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"extends: {SHIPPED[0]}\nenv: {{A: 1}}\ntime: '30'\n")
    profile = load(ClusterProfile, tmp_path / "mine.yaml")
    assert profile.cpus_per_task == load(ClusterProfile, SHIPPED[0]).cpus_per_task
    assert (profile.env, profile.time) == ({"A": "1"}, "30")


def test_it_survives_writing_and_reading(tmp_path):
    profile = load(ClusterProfile, next(path for path in SHIPPED if path.stem == "pyxis"))
    (tmp_path / "again.yaml").write_text(dump(profile))
    assert load(ClusterProfile, tmp_path / "again.yaml") == profile
    assert ClusterProfile.model_validate(profile.model_dump()) == profile


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("partiton: gpu", "bad.yaml:1: partiton: unknown key; did you mean partition?"),
        ("partition: a b", "bad.yaml:1: partition: expected text"),
        ("time: 90m", "bad.yaml:1: time: expected MINUTES"),
        ("time: 60", "put it in quotes"),
        ("time: '1:2:3:4'", "time: expected MINUTES"),
        ("time: '0'", "time: expected a time above 0"),
        ("time: '2'\nsignal_seconds: 180", "bad.yaml:1, bad.yaml:2: time 2 is not more than signal_seconds 180"),
        ("nodes: 0", "nodes: expected an integer >= 1, got 0"),
        ("mem: 64GB", "mem: expected text"),
        ("gpu_request: gress", "did you mean gres?"),
        ("gpu_type: a100", "no GPUs are asked for"),
        ("modules: ['cuda; rm x']", "modules: expected names"),
        ("modules: ['-x']", "modules: expected names"),
        ("python: -c", "python: expected text"),
        ("env: {1A: x}", "'1A' is no name of a variable"),
        ("env:\n  A: x\n  WANDB_API_KEY: hush", "bad.yaml:3: env: WANDB_API_KEY looks like a secret: put it into your"),
        ("env: {A: true}", "A: expected text or an integer; put the value in quotes"),
        ('env: {A: "x\\ny"}', "has a line break or another control character"),
        ('constraint: "x\\u0085y"', "constraint"),
        ("sbatch: {signal: x}", "signal: set signal_seconds of the profile"),
        ("sbatch: {partition: x}", "partition: set partition of the profile"),
        ("sbatch: {output: x}", "output: cairn launch sets it"),
        ("sbatch: {'mail type': x}", "'mail type' is no long option"),
        ("sbatch: {hold: false}", "hold: expected text, an integer or true"),
        ("container: {image: a}", "container: image is given, but runtime is none"),
        ("container: {runtime: pyxis}", "container: runtime pyxis needs an image"),
        ("container: {runtime: pyxis, image: a, mounts: ['/a']}", "container.mounts: expected /FROM:/TO, got '/a'"),
        ("container: {runtime: pyxis, image: a, mounts: ['/a:/b,/:/']}", "container.mounts: expected /FROM:/TO"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path, monkeypatch, written, says):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(written)
    with pytest.raises(UserError) as error:
        load(ClusterProfile, Path("bad.yaml"))
    assert says in str(error.value)
    assert "hush" not in str(error.value)


def test_all_at_once(tmp_path):
    (tmp_path / "bad.yaml").write_text("partiton: x\ntime: soon\nnodes: 0\nenv: {HF_TOKEN: x, A-B: y}\nqos: ''\n")
    with pytest.raises(UserError) as error:
        load(ClusterProfile, tmp_path / "bad.yaml")
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    assert all(f"bad.yaml:{n}: " in str(error.value) for n in range(1, 6))
    assert "HF_TOKEN" in str(error.value)
    assert "'A-B'" in str(error.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("2:30:15", 9015),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("1-2:30:15", 95415),
        ("unlimited", None),
    ],
)
def test_time_limits(text, seconds):
    assert time_limit(text) == seconds


@pytest.mark.parametrize("text", ["", "1:2:3:4", "-1", "1-", "-", "1.5", "1h", "1:-2", "\uff11"])
def test_no_time_limits(text):
    with pytest.raises(ValueError, match=r"MINUTES|above 0"):
        time_limit(text)


def test_what_looks_like_a_secret():
    secret = ["WANDB_API_KEY", "HF_TOKEN", "DB_PASSWORD", "aws_secret_access_key", "SECRET", "OPENAI_APIKEY", "MY_PASS"]
    assert [name for name in secret if not is_secret(name)] == []
    plain = ["NCCL_IB_PKEY", "TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "PYTHONPATH", "KEYBOARD", "BYPASS_X"]
    assert [name for name in plain if is_secret(name)] == []
