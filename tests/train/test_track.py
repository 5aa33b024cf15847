import errno
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cairn.config.train import TrackSection
from cairn.errors import UserError
from cairn.train import display, track
from cairn.train.display import describe
from cairn.train.folder import RunFolder
from cairn.train.track import Tracker
from tests.train.disks import fill, make_read_only, small_disk


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def tracker(path: Path, main: bool = True, **section: Any) -> Tracker:
    return Tracker(RunFolder(path), TrackSection(**section), {"train": {"steps": 10}}, main, 10)


def row(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / step, "grad_norm": 0.1}


def test_rows_come_back_to_the_bit(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        t.rows([row(1), row(3)])
        t.rows([{"step": 3, "valid/loss": 0.1 + 0.2}])
        assert RunFolder(tmp_path).rows()[1]["loss"] == 1 / 3  # visible at once
    assert RunFolder(tmp_path).rows() == [row(1), row(3), {"step": 3, "valid/loss": 0.1 + 0.2}]


def test_truncate_drops_later_rows_and_a_half_line(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        t.rows([row(step) for step in range(1, 6)])
        t.rows([{"step": 3, "valid/loss": 1.0}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    with tracker(tmp_path) as t:
        t.truncate(3)
        t.rows([row(4)])
    kept = [r["step"] for r in RunFolder(tmp_path).rows()]
    assert kept == [1, 2, 3, 3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_zeros_where_rows_were_are_dropped(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        t.rows([row(1)])
    for tail in (b"\0" * 64 + b"\n", b"\0" * 64 + b"\xff\n", b"\0" * 64):
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(tail)
        with tracker(tmp_path) as t:
            t.truncate(1)
        assert RunFolder(tmp_path).rows() == [row(1)]
        assert b"\0" not in (tmp_path / "metrics.jsonl").read_bytes()


def test_what_cairn_logs_is_shown_while_the_run_lasts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("cairn")
    log.info("before")
    with tracker(tmp_path, main=False):
        log.info("another rank")
    with tracker(tmp_path):
        log.info("attention: %s", "sdpa")
        log.debug("detail")
    log.info("after")
    assert capsys.readouterr().out == "attention: sdpa\n"
    assert log.handlers == []


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path, main=False, wandb="offline") as t:
        t.truncate(0)
        t.rows([row(1)])
        t.progress(1, row(1))
        t.message("hello")
        t.sync()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_file_gets_a_line_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    with tracker(tmp_path) as t:
        for step in range(1, 11):
            t.rows([row(step) | {"tokens_per_s": 12345.6, "mfu": 0.41}])
            t.progress(step, {})
            clock[0] += 4.0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[1] == "step 4/10  loss 0.2500  12.3k tok/s  MFU 41.0 %  0:00:24 left"


def test_describe_shows_what_there_is() -> None:
    assert describe({}, None) == ""
    assert describe({"loss": 2.0, "tokens_per_s": 900.0}, 3725.2) == "loss 2.0000  900 tok/s  1:02:05 left"


def offline_history(folder: Path) -> list[dict[str, Any]]:
    """Rows of every offline wandb file of a run folder, through wandb's own reader; all must be of one run."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len({file.stem for file in files}) == 1
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    texts = [subprocess.run([*inspect, file], check=True, capture_output=True, text=True).stdout for file in files]
    records = [json.loads(line) for text in texts for line in text.splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_wandb_offline_mirrors_rows_and_a_resume_is_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in ([1, 2], [2, 3]):
        with tracker(tmp_path, wandb="auto") as t:
            t.truncate(steps[0] - 1)
            t.rows([row(step) for step in steps])
    assert "offline in" in capsys.readouterr().out
    assert [r["step"] for r in RunFolder(tmp_path).rows()] == [1, 2, 3]
    assert [(r["step"], r["loss"]) for r in offline_history(tmp_path)] == [(1, 1.0), (2, 0.5), (2, 0.5), (3, 1 / 3)]


def test_wandb_online_without_a_key_says_so_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path, wandb="online") as t:
        t.rows([row(1)])
    assert "warning: track.wandb=online but no key was found" in capsys.readouterr().out


def test_wandb_that_does_not_start_does_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def init(**_: Any) -> None:
        raise wandb.errors.CommError("no way out")

    monkeypatch.setattr(wandb, "init", init)
    with tracker(tmp_path, wandb="offline") as t:
        t.rows([row(1)])
    assert capsys.readouterr().out == "warning: wandb did not start, going on without it: no way out\n"
    assert RunFolder(tmp_path).rows() == [row(1)]


@pytest.mark.parametrize(("content", "found"), [("machine api.wandb.ai login user password x", True), ("", False)])
def test_a_netrc_entry_is_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, found: bool) -> None:
    path = tmp_path / "netrc"
    path.write_text(content + "\n")
    monkeypatch.setenv("NETRC", str(path))
    assert track.has_wandb_key() is found


def test_tensorboard_missing_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=r"track\.tensorboard.*cairn\[tensorboard\]"):
        tracker(tmp_path, tensorboard=True)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ([1, 2, 3], [2, 3]):
        with tracker(tmp_path, tensorboard=True) as t:
            t.truncate(steps[0] - 1)
            t.rows([row(step) for step in steps])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_the_module_does_not_load_wandb() -> None:
    program = "import sys; import cairn.train.track; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_full_disk_is_told_with_the_file_and_no_method_raises(tmp_path: Path) -> None:
    def record(disk: Path) -> None:
        with tracker(disk) as t:
            t.rows([row(1)])
            t.sync()
            assert t.trouble() is None
            fill(disk, 0)
            for step in range(2, 200):  # the file's last page has room for some
                t.rows([row(step)])
                t.sync()
            assert "metrics.jsonl" in str(t.trouble())

    with small_disk(tmp_path / "disk", 1) as disk:
        with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device: free space"):
            record(disk)
        kept = [r["step"] for r in RunFolder(disk).rows()]
        assert kept == list(range(1, len(kept) + 1))
        assert 1 <= len(kept) < 199


@pytest.mark.parametrize("act", [lambda t: t.rows([row(3)]), lambda t: t.truncate(1)], ids=["rows", "truncate"])
def test_a_read_only_disk_is_told(tmp_path: Path, act: Callable[[Tracker], None]) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        with tracker(disk) as t:
            t.rows([row(1), row(2)])
        make_read_only(disk)
        said = r"metrics\.jsonl: Read-only file system: make it writable"
        with pytest.raises(UserError, match=said), tracker(disk) as t:
            act(t)
        assert len(RunFolder(disk).rows()) == 2


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_disk(tmp_path: Path) -> None:
    def fail() -> None:
        with tracker(tmp_path / "nowhere") as t:
            t.rows([row(1)])
            raise RuntimeError("of the run")

    with pytest.raises(RuntimeError, match="of the run"):
        fail()


def test_a_file_that_was_removed_is_noticed_at_the_next_checkpoint(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        t.rows([row(1)])
        (tmp_path / "metrics.jsonl").unlink()
        t.sync()
        assert "metrics.jsonl: it vanished" in str(t.trouble())
        t._trouble = None


class Full:
    """A mirror on a full disk."""

    def __init__(self) -> None:
        self.calls = 0

    def rows(self, rows: Any) -> None:
        self.calls += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self, failed: bool) -> None:
        raise AssertionError("has been dropped")


def test_a_mirror_that_fails_is_dropped_with_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirror = Full()
    with tracker(tmp_path) as t:
        t._mirrors.append(mirror)
        for step in (1, 2, 3):
            t.rows([row(step)])
    said = "warning: Full failed, going on without it: [Errno 28] No space left on device\n"
    assert capsys.readouterr().out == said
    assert mirror.calls == 1
    assert len(RunFolder(tmp_path).rows()) == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its own thread's
def test_tensorboard_on_a_full_disk_is_dropped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    with small_disk(tmp_path / "disk", 1) as disk:
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir()
        (folder.path / "tensorboard").symlink_to(disk)
        with Tracker(folder, TrackSection(tensorboard=True), {}, True, 10) as t:
            fill(disk, 0)
            for step in range(1, 3000):
                t.rows([row(step)])
        assert len(folder.rows()) == 2999
    assert capfd.readouterr().out.count("warning: TensorBoard failed, going on without it") == 1


def test_wandb_on_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir()
        (folder.path / "wandb").symlink_to(disk)
        with Tracker(folder, TrackSection(wandb="offline"), {}, True, 10) as t:
            fill(disk, 0)
            for step in range(1, 500):
                t.rows([row(step)])
        assert len(folder.rows()) == 499
