"""A run that was killed, stopped or damaged ends like one that was not."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from cairn.train.checkpoint import folder_of, steps_in
from cairn.train.folder import RunFolder
from pretrain.compare import Result, first_differences
from tests.pretrain.conftest import STEPS, Place
from tests.pretrain.runs import Mishap, copied, rows, start, steps

BF16 = "engine.precision=bf16"
SPLIT = "train.micro_batch_size=4"


def same(a: RunFolder, b: RunFolder) -> None:
    """Every metric of every step and every tensor, to the bit."""
    assert first_differences(Result.of(a), Result.of(b)) == []
    assert steps(a) == steps(b) == list(range(1, STEPS + 1))


def test_rows(straight: RunFolder) -> None:
    found = rows(straight)
    assert steps(straight) == list(range(1, STEPS + 1))
    assert all({"lr", "loss", "grad_norm", "tokens"} <= row.keys() for row in found)
    assert [row["tokens"] for row in found] == [step * 8 * 32 for step in range(1, STEPS + 1)]
    # written every 5 steps, and before an evaluation (7, 14) and a checkpoint (4, 8, 12)
    measured = [row["step"] for row in found if "tokens_per_s" in row]
    assert measured == [4, 5, 7, 8, 10, 12, 14]
    wanted = {"tokens_per_s", "step_seconds", "flops_per_s", "mfu", "data_wait", "memory_gb"}
    assert all(wanted <= row.keys() and row["tokens_per_s"] > 0 for row in found if "tokens_per_s" in row)
    evaluations = [row for row in straight.rows() if "loss" not in row]
    assert [row["step"] for row in evaluations] == [7, 14]
    assert all(row.keys() == {"step", "valid/loss", "valid/bits_per_byte"} for row in evaluations)
    assert steps_in(straight.checkpoints) == [4, 8, 12, STEPS]


def test_kill_and_the_same_command_again(place: Place, straight: RunFolder) -> None:
    folder = place.folder("killed")
    for at, saved in ((7, 4), (3, None), (9, 12)):  # the second and third kill befall resumed runs
        checkpoint = saved and folder_of(folder.checkpoints, saved)
        hit = Mishap(signal.SIGKILL, at, checkpoint=checkpoint)
        place.run(place.gpt, "killed", BF16, before=hit, code=-signal.SIGKILL)
        assert saved is None or saved in steps_in(folder.checkpoints)
    assert 0 < len(rows(folder)) < STEPS
    said = place.run(place.gpt, "killed", BF16).text
    assert "going on from the checkpoint of step 12" in said
    same(straight, folder)


def test_an_encoder_decoder_that_was_killed_goes_on_to_the_bit(place: Place) -> None:
    place.run(place.seq2seq, "spans")
    hit = Mishap(signal.SIGKILL, 7, checkpoint=folder_of(place.folder("cut").checkpoints, 4))
    place.run(place.seq2seq, "cut", before=hit, code=-signal.SIGKILL)
    assert "going on from the checkpoint of step 4" in place.run(place.seq2seq, "cut").text
    same(place.folder("spans"), place.folder("cut"))
    assert place.folder("cut").last_evaluation().keys() == {"valid/loss"}


def test_kill_while_a_checkpoint_is_written(place: Place, straight: RunFolder) -> None:
    folder = place.folder("half")
    for stale in (".tmp-step-00000004", ".tmp-step-00000008"):
        (folder.checkpoints / stale).mkdir(parents=True)
        (folder.checkpoints / stale / "rank-00000-000.safetensors").write_bytes(b"half")
    place.run(place.gpt, "half", BF16, before=Mishap(signal.SIGKILL, 5), code=-signal.SIGKILL)
    place.run(place.gpt, "half", BF16)
    same(straight, folder)
    assert not list(folder.checkpoints.glob(".tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves_and_the_same_command_goes_on(
    place: Place, straight: RunFolder, number: signal.Signals
) -> None:
    folder = place.folder(number.name)
    said = place.run(place.gpt, number.name, BF16, before=Mishap(number, 6)).text
    assert f"stopped by {number.name} after step 6, checkpoint saved: the same command goes on" in said
    assert steps_in(folder.checkpoints) == [4, 6]
    assert steps(folder) == [1, 2, 3, 4, 5, 6]
    said = place.run(place.gpt, number.name, BF16).text
    assert "going on from the checkpoint of step 6" in said
    assert f"finished {STEPS} steps" in said
    same(straight, folder)


class Unheard(Mishap):
    """Into a pipe that nobody reads any more, as when a Ctrl-C has ended `2>&1 | tee` too."""

    def __call__(self, rank: int) -> None:
        super().__call__(rank)
        read, write = os.pipe()
        os.close(read)
        for stream in (1, 2):
            os.dup2(write, stream)


def test_a_stop_signal_saves_though_nobody_reads_what_is_printed(place: Place) -> None:
    folder = place.folder("unheard")
    place.run(place.gpt, "unheard", BF16, before=Unheard(signal.SIGINT, 6))
    assert steps_in(folder.checkpoints) == [4, 6]


@pytest.mark.parametrize("step", [7, STEPS])
def test_a_stop_signal_cuts_an_evaluation_short_and_the_same_command_does_it_first(
    place: Place, straight: RunFolder, step: int
) -> None:
    folder = place.folder(f"evaluating-{step}")
    hit = Mishap(signal.SIGUSR1, step // 7, "evaluate")
    said = place.run(place.gpt, folder.path.name, BF16, before=hit).text
    assert said.index("SIGUSR1: stopping after this step or batch") < said.index(f"step {step}: evaluation cut short")
    assert f"stopped by SIGUSR1 after step {step}, checkpoint saved" in said
    assert "loss" in folder.rows()[-1]
    assert max(steps_in(folder.checkpoints)) == step
    said = place.run(place.gpt, folder.path.name, BF16).text
    assert f"going on from the checkpoint of step {step}" in said
    assert [row["step"] for row in folder.rows() if "loss" not in row] == [7, STEPS]
    same(straight, folder)
    assert f"was finished already, after {STEPS} steps" in place.run(place.gpt, folder.path.name, BF16).text


@pytest.mark.slow
def test_a_signal_on_one_rank_cuts_an_evaluation_short_on_all(place: Place) -> None:
    whole, folder = place.folder("two-straight"), place.folder("two-evaluating")
    place.run(place.gpt, "two-straight", SPLIT, BF16, ranks=2)
    hit = Mishap(signal.SIGTERM, 1, "evaluate", rank=1)
    said = place.run(place.gpt, "two-evaluating", SPLIT, BF16, before=hit, ranks=2).text
    assert "step 7: evaluation cut short" in said
    assert "stopped by a signal on another rank after step 7, checkpoint saved" in said
    assert steps(folder) == list(range(1, 8))
    place.run(place.gpt, "two-evaluating", SPLIT, BF16, ranks=2)
    same(whole, folder)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_by_the_other_and_the_run_goes_on(place: Place) -> None:
    folder = place.folder("lost")
    hit = Mishap(signal.SIGKILL, 6, rank=1, checkpoint=folder_of(folder.checkpoints, 4))
    argv = (place.gpt, "run.name=lost", SPLIT, BF16, "guard.lost_seconds=10")
    done = start(*argv, folder=place.here, ranks=2, before=hit).wait()
    assert done.codes == [75, -signal.SIGKILL], done.text
    assert "error: rank 1 (" in done.output[0]
    assert "Traceback" not in done.output[0]
    said = place.run(place.gpt, "lost", SPLIT, BF16, ranks=2).text
    assert "going on from the checkpoint of step 4" in said
    assert steps(folder) == list(range(1, STEPS + 1))


def test_a_second_ctrl_c_ends_at_once_and_loses_only_steps(place: Place, straight: RunFolder) -> None:
    folder = place.folder("twice")
    hit = Mishap(signal.SIGINT, 1, "evaluate", times=2, checkpoint=folder_of(folder.checkpoints, 4))
    done = place.run(place.gpt, "twice", BF16, before=hit, code=130)
    assert "stopped by" not in done.text
    assert steps_in(folder.checkpoints) == [4]
    place.run(place.gpt, "twice", BF16)
    same(straight, folder)


def test_ctrl_c_while_the_corpus_is_prepared(place: Place, straight: RunFolder, tmp_path: Path) -> None:
    argv = (place.gpt, "preparing", BF16, f"data.dir={tmp_path}")
    hit = Mishap(signal.SIGINT, 1, "write", "cairn.data.manifest:Manifest")
    assert place.run(*argv, before=hit, code=130).text == ""
    assert not list(tmp_path.glob("*/manifest.json"))
    assert not place.folder("preparing").path.exists()
    place.run(*argv)
    same(straight, place.folder("preparing"))


def test_a_stop_signal_in_the_first_step(place: Place) -> None:
    folder = place.folder("early")
    said = place.run(place.gpt, "early", BF16, before=Mishap(signal.SIGTERM, 1)).text
    assert "stopped by SIGTERM after step 1, checkpoint saved" in said
    assert steps_in(folder.checkpoints) == [1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(place: Place, straight: RunFolder) -> None:
    folder = copied(straight, "damaged")
    for step in (12, STEPS):
        file = folder_of(folder.checkpoints, step) / "rank-00000-000.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    said = place.door(place.gpt, "run.name=damaged", BF16).text
    assert "damaged checkpoint" in said
    assert str(folder_of(folder.checkpoints, STEPS)) in said
    assert "going on from the checkpoint of step 8" in said
    same(straight, folder)


def test_a_finished_run_is_told_from_its_checkpoint(place: Place, straight: RunFolder) -> None:
    before = straight.metrics.read_bytes()
    # no engine is built: this would end it
    said = place.run(place.gpt, "straight", BF16, before=Mishap(signal.SIGKILL, 1, "models")).text
    assert f"was finished already, after {STEPS} steps" in said
    assert f"valid/loss: {straight.last_evaluation()['valid/loss']:.4f}" in said
    assert straight.metrics.read_bytes() == before


def test_a_finished_run_is_not_made_longer(place: Place, straight: RunFolder) -> None:
    said = place.run(place.gpt, "straight", BF16, "train.steps=20", code=2).text
    assert f"train.steps was {STEPS}, now 20" in said
    assert "run.name" in said


def test_not_to_resume_where_there_are_checkpoints_is_an_error(place: Place, straight: RunFolder) -> None:
    before = straight.config.read_bytes(), straight.metrics.read_bytes(), steps_in(straight.checkpoints)
    said = place.run(place.gpt, "straight", BF16, "checkpoint.resume=false", code=2).text
    assert said.startswith("error: checkpoint.resume is false")
    assert said.count("\n") == 1
    assert before == (straight.config.read_bytes(), straight.metrics.read_bytes(), steps_in(straight.checkpoints))


def cut(folder: RunFolder, name: str) -> RunFolder:
    """A copy of a run as a kill after step 8 would leave it."""
    copy = copied(folder, name)
    for step in (12, STEPS):
        shutil.rmtree(folder_of(copy.checkpoints, step))
    return copy
