import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cairn.errors import UserError
from cairn.train import checkpoint as checkpoint_module
from cairn.train import parts, tensorfile
from cairn.train.checkpoint import CheckpointStore, steps_in


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "weight/a": torch.randn(5, 3, generator=g),
        "weight/half": torch.randn(7, generator=g).to(torch.bfloat16),
        "weight/float16": torch.randn(3, generator=g).half(),
        "buffer/flag": torch.tensor([True, False, True]),
        "buffer/count": torch.tensor(7, dtype=torch.int64),
        "buffer/empty": torch.empty(0, 4),
        "weight/transposed": torch.randn(4, 6, generator=g).t(),
        "exp_avg/a": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    a, b = x.contiguous().reshape(-1).view(torch.uint8), y.contiguous().reshape(-1).view(torch.uint8)
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(a, b)


def save(store: CheckpointStore, step: int, seed: int = 0) -> None:
    store.save(step, some_tensors(seed).items(), {"step": step, "note": [1, 2.5, None]})
    store.wait()


@pytest.mark.parametrize("background", [False, True])
def test_reads_back_every_bit(tmp_path: Path, background: bool) -> None:
    save(CheckpointStore(tmp_path, background=background), 12)
    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    assert found.step == 12
    assert found.state == {"step": 12, "note": [1, 2.5, None]}
    expected = some_tensors()
    assert sorted(found.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert same_bits(found.read(name), tensor), name
    assert found.read("weight/unknown") is None
    assert sorted(os.listdir(tmp_path)) == ["step-00000012"]


def test_safetensors_reads_the_files(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1)
    (path,) = (tmp_path / "step-00000001").glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        assert same_bits(file.get_tensor("weight/half"), some_tensors()["weight/half"])


def test_splits_large_checkpoints_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "PIECE_BYTES", 64)
    store = CheckpointStore(tmp_path)
    save(store, 1)
    assert len(list((tmp_path / "step-00000001").glob("*.safetensors"))) > 2
    assert all(same_bits(store.latest().read(name), tensor) for name, tensor in some_tensors().items())


def test_background_save_keeps_the_state_of_its_moment(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, background=True)
    state = {"samples": 0}
    store.save(1, [("w", torch.zeros(200_000))], state)
    state["samples"] = 1
    store.wait()
    assert store.latest().state == {"samples": 0}


def test_keeps_the_last_k_and_every_n(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_every=20)
    for step in range(5, 50, 5):
        save(store, step)
    assert steps_in(tmp_path) == [20, 40, 45]


def test_pruning_does_not_hurt_a_reader(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)
    reader = store.latest()
    save(store, 2, seed=1)
    assert steps_in(tmp_path) == [2]
    assert same_bits(reader.read("weight/a"), some_tensors()["weight/a"])


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 1, seed=5)
    assert same_bits(store.latest().read("weight/a"), some_tensors(5)["weight/a"])
    assert os.listdir(tmp_path) == ["step-00000001"]


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("file", "harm", "says"),
    [
        ("rank-00000-000.safetensors", flip_byte, "sha256"),
        ("rank-00000-000.safetensors", truncate, "bytes instead of"),
        ("rank-00000-000.safetensors", Path.unlink, "No such file"),
        ("state.json", truncate, "state.json"),
        ("state.json", Path.unlink, "No such file"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, harm, says: str
) -> None:
    save(CheckpointStore(tmp_path), 1)
    save(CheckpointStore(tmp_path), 2)
    harm(tmp_path / "step-00000002" / file)
    store = CheckpointStore(tmp_path)
    assert store.latest().step == 1
    printed = capsys.readouterr().out
    assert printed.startswith("warning:")
    assert file in printed
    assert says in printed
    assert sorted(os.listdir(tmp_path)) == ["damaged-step-00000002", "step-00000001"]  # kept for a look


def test_an_altered_state_is_noticed(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1)
    path = tmp_path / "step-00000001" / "state.json"
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        CheckpointStore(tmp_path).latest()
    assert steps_in(tmp_path) == [1]  # so that the next start does not begin anew in silence


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "new").latest() is None


def test_ranks_meet_through_files(tmp_path: Path) -> None:
    stores = [CheckpointStore(tmp_path, rank, 3, background=True) for rank in range(3)]
    owned = [{"weight/x": torch.ones(3)}, {}, {"weight/y": torch.full((2,), 2.0)}]  # rank 1 owns nothing
    stores[0].save(4, owned[0].items(), {"who": 0})
    time.sleep(0.05)
    assert steps_in(tmp_path) == []
    stores[1].save(4, owned[1].items(), {"who": 1})
    stores[2].save(4, owned[2].items(), {"who": 2})
    for store in stores:
        store.wait()
    found = CheckpointStore(tmp_path).open(4)
    assert found.world_size == 3
    assert found.state == {"who": 0}
    assert found.read("weight/x").tolist() == [1, 1, 1]
    assert found.read("weight/y").tolist() == [2, 2]


def test_the_folder_may_be_renamed_as_soon_as_the_last_part_is_there(tmp_path: Path) -> None:
    for number in range(50):
        folder = tmp_path / f".tmp-{number}"
        folder.mkdir()

        def rank_0(folder: Path = folder) -> None:
            while not (folder / "rank-00001.json").exists():
                pass
            folder.rename(folder.with_name(folder.name.removeprefix(".tmp-")))

        thread = threading.Thread(target=rank_0)
        thread.start()
        parts.write(folder, 1, [("weight/x", torch.ones(3))])
        thread.join()


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 0, 3, background=True, patience_s=0.05)
    CheckpointStore(tmp_path, 2, 3).save(1, some_tensors().items(), {})
    store.save(1, {"weight/z": torch.zeros(1)}.items(), {})
    with pytest.raises(UserError, match=r"ranks \[1\] did not write"):
        store.wait()
    assert steps_in(tmp_path) == []


def test_two_owners_of_a_tensor_are_a_bug(tmp_path: Path) -> None:
    main, other = CheckpointStore(tmp_path, 0, 2), CheckpointStore(tmp_path, 1, 2)
    other.save(1, [("weight/a", torch.zeros(1))], {})
    with pytest.raises(ValueError, match="weight/a"):
        main.save(1, [("weight/a", torch.zeros(1))], {})


def test_leaving_after_an_error_does_not_wait_for_other_ranks(tmp_path: Path) -> None:
    def fail() -> None:
        with CheckpointStore(tmp_path, 0, 2, background=True) as store:
            store.save(1, [("w", torch.zeros(1))], {})
            raise RuntimeError

    before = set(threading.enumerate())
    with pytest.raises(RuntimeError):
        fail()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_names_path_and_bytes(tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, background=background)
    save(store, 1)
    monkeypatch.setattr(tensorfile.shutil, "disk_usage", lambda _: _Usage(100))
    with pytest.raises(UserError, match=rf"{tmp_path}.* needs \d+ bytes, 100 are free.*checkpoint.keep_last"):
        save(store, 2)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["step-00000001"]
    assert store.latest().step == 1


class _Usage:
    total = 1000

    def __init__(self, free: int) -> None:
        self.free = free


def test_a_disk_that_fills_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = CheckpointStore(tmp_path)
    monkeypatch.setattr(tensorfile.os, "fsync", fsync)
    with pytest.raises(UserError, match="No space left"):
        save(store, 2)
    assert os.listdir(tmp_path) == []


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "FORMAT", 99)
    save(CheckpointStore(tmp_path), 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 99"):
        CheckpointStore(tmp_path).latest()


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 3)
    (tmp_path / "step-00000003").rename(tmp_path / ".replaced-step-00000003")
    assert CheckpointStore(tmp_path).latest().step == 3


def test_kill_9_while_writing_leaves_the_previous_one(tmp_path: Path) -> None:
    """A process is killed at many moments of its endless saving; what is there afterwards is always whole."""
    program = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from cairn.train.checkpoint import CheckpointStore
        store = CheckpointStore(Path(sys.argv[1]), keep_last=2, background=True)
        last = store.latest()
        step = last.step if last else 0
        print("ready", flush=True)
        while True:
            step += 1
            store.save(step, [("w", torch.full((300_000,), float(step)))], {"step": step})
    """)
    newest = 0
    for pause in (0.03, 0.05):
        with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 20
            while (steps_in(tmp_path) or [0])[-1] <= newest and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        found = CheckpointStore(tmp_path).latest()
        assert found.step > newest
        newest = found.step
        assert found.state == {"step": newest}
        assert found.read("w").eq(newest).all()
        assert not list(tmp_path.glob(".tmp-*"))
        assert not list(tmp_path.glob("damaged-*"))


def test_state_lists_what_is_where(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1)
    document = json.loads((tmp_path / "step-00000001" / "state.json").read_text())
    (entry,) = document["files"].values()
    assert sorted(entry["tensors"]) == sorted(some_tensors())
