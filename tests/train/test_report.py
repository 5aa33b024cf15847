import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cairn.errors import UserError
from cairn.train.curves import Run, figure, loss_curve_png, panels, x_axis
from cairn.train.folder import RunFolder
from cairn.train.report import numbers, write_report


def make_run(path: Path, steps: int = 30, tokens: int = 64, lr: float = 0.1) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"seed: 1\noptim: {{name: adamw, lr: {lr}}}\nmodel: {{note: '<b>&'}}\n")
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 5.0 / step, "lr": lr, "grad_norm": 1.0, "tokens": step * tokens}
        if step % 10 == 0:
            row |= {"tokens_per_s": 1000.0, "step_seconds": 2.0, "mfu": 0.25, "memory_gb": 1.5, "flops_per_s": 1e9}
        rows.append(row)
    rows.append({"step": steps, "valid/loss": 1.25, "valid/bits_per_byte": 0.75})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loaded(path: Path) -> Run:
    return Run(RunFolder(path), RunFolder(path).rows(), path.name)


def test_one_run_is_one_file_with_nothing_outside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "samples.jsonl").write_text(json.dumps({"step": 30, "prompt": "<p>", "text": "a < b\n"}) + "\n")
    assert write_report([run]) == run / "report.html"
    page = (run / "report.html").read_text()
    assert not re.search(r"(src|href)=\"?(?!\"?data:)", page)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "0.7500" in page
    assert "&lt;b&gt;&amp;" in page  # config values are escaped
    assert "<b>&lt;p&gt;</b>a &lt; b" in page
    assert page.count("<figure") == 7  # loss, bits per byte, lr, gradient norm, tokens/s, MFU, memory


def test_numbers(tmp_path: Path) -> None:
    found = numbers(loaded(make_run(tmp_path / "a")))
    assert found["steps"] == "30"
    assert found["held-out bits per byte"] == "0.7500"
    assert found["held-out loss"] == "1.2500"
    assert found["training time"] == "1 min 0 s"
    assert found["MFU (median)"] == "25.0 %"


def test_two_runs_mark_the_keys_that_differ(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.2)]
    page = write_report(runs, tmp_path / "out" / "both.html").read_text()
    marked = re.findall(r'<tr class="differs"><th>(.*?)</th>', page)
    assert marked == ["optim.lr"]
    assert "seed" in page.split("<details>")[1]


def test_runs_with_other_batches_are_compared_by_tokens(tmp_path: Path) -> None:
    a, b = loaded(make_run(tmp_path / "a")), loaded(make_run(tmp_path / "b", tokens=128))
    assert x_axis([a, a]) == "step"
    assert x_axis([a, b]) == "tokens"
    assert b.series("loss", "tokens").x[-1] == 30 * 128
    assert b.series("valid/loss", "tokens").x == [30 * 128]


def test_held_out_and_training_share_a_panel_and_losses_come_first(tmp_path: Path) -> None:
    assert panels([loaded(make_run(tmp_path / "a"))])[:4] == ["loss", "bits_per_byte", "lr", "grad_norm"]


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 31, "loss": math.nan}) + "\n")
    assert loaded(run).series("loss").x[-1] == 30
    write_report([run])


def test_a_long_run_is_drawn_by_bins(tmp_path: Path) -> None:
    run = loaded(make_run(tmp_path / "a", steps=5000))
    lines = figure([run], "loss").axes[0].lines
    assert max(len(line.get_xdata()) for line in lines) == 1000


def test_loss_curve_png(tmp_path: Path) -> None:
    loss_curve_png(make_run(tmp_path / "a"), tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 675)


def test_a_folder_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows"):
        write_report([tmp_path])


def test_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    command = [sys.executable, "-m", "cairn.train.report", str(run), "--out", str(tmp_path / "x.html")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == f"report: {tmp_path}/x.html\n"
    failed = subprocess.run([*command[:3], str(tmp_path)], check=False, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
