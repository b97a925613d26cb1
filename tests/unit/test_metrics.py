"""What was measured, for machines."""

import errno
import json
import math
from pathlib import Path

import pytest

from dalle import metrics
from dalle.console import Stopwatch
from dalle.errors import CheckpointError
from dalle.metrics import MetricsLog, Window, read_metrics


def written(folder: Path, steps) -> Path:
    log = MetricsLog(folder, 0)
    for step in steps:
        log.write(step, {"loss": 1 / step})
    return folder / "metrics.jsonl"


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def test_a_line_is_one_object_with_its_step(tmp_path):
    path = written(tmp_path, [3])
    assert path.read_text() == '{"step": 3, "loss": 0.333333}\n'


def test_there_may_be_no_file_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_lines_later_than_the_resumed_step_are_dropped(tmp_path):
    written(tmp_path, [2, 4, 6, 6, 8])
    log = MetricsLog(tmp_path, 6)
    assert steps(tmp_path) == [2, 4, 6, 6]
    log.write(7, {"loss": 0.0})
    assert steps(tmp_path) == [2, 4, 6, 6, 7]
    assert read_metrics(tmp_path)[1] == {"step": 4, "loss": 0.25}
    MetricsLog(tmp_path, 0)
    assert steps(tmp_path) == []


@pytest.mark.parametrize("tail", [b'{"step": 8, "lo', b"\0" * 50, b"\xff\xfe\xff", b"{"])
def test_a_last_line_cut_short_is_left_out_and_the_next_stands_on_its_own(tmp_path, tail):
    with written(tmp_path, [2, 4]).open("ab") as file:
        file.write(tail)
    assert steps(tmp_path) == [2, 4]
    MetricsLog(tmp_path, 4).write(5, {"loss": 1.0})
    assert steps(tmp_path) == [2, 4, 5]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_becomes_null_as_json_has_no_nan(tmp_path, value):
    MetricsLog(tmp_path, 0).write(1, {"loss": value, "lr": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "lr": 0.5}


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0)

    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        log.write(1, {"loss": 0.0})


class Clock(Stopwatch):
    seconds = 100.0


def test_a_window_gives_means_and_rates():
    clock = Clock()
    window = Window(49, clock, flops_per_picture=400, ceiling=8400.0)
    for loss in (1.0, 2.0, 6.0):
        window.add({"loss": loss, "lr": 0.5}, pictures=7)
    window.waited += 0.5
    clock.seconds += 2.0
    assert window.close() == {
        "loss": 3.0,
        "lr": 0.5,
        "seconds": 2.0,
        "pictures_per_second": 10.5,
        "tokens_per_second": 10.5 * 49,
        "flops_per_second": 4200.0,
        "of_gemm_rate": 0.5,
        "data_wait": 0.25,
    }


def test_the_next_window_starts_empty():
    clock = Clock()
    window = Window(49, clock, flops_per_picture=400, ceiling=8400.0)
    window.add({"loss": 100.0, "rare": 1.0}, pictures=700)
    window.waited += 3
    clock.seconds += 5
    window.close()
    window.add({"loss": 4.0}, pictures=3)
    clock.seconds += 1
    line = window.close()
    assert line == {
        "loss": 4.0, "seconds": 1.0, "pictures_per_second": 3.0, "tokens_per_second": 147.0,
        "flops_per_second": 1200.0, "of_gemm_rate": 1 / 7, "data_wait": 0.0,
    }  # fmt: skip


def test_a_mean_is_over_the_updates_that_had_the_metric():
    window = Window(1, Clock(), flops_per_picture=1, ceiling=1.0)
    for update in range(10):
        sampled = {"between_cosine": 0.8} if update == 3 else {}
        norm = math.inf if update == 7 else 2.0  # of a dropped one
        window.add({"grad_norm": norm, "never": math.nan, **sampled}, pictures=1)
    line = window.close()
    assert line["between_cosine"] == 0.8
    assert line["grad_norm"] == 2.0
    assert math.isnan(line["never"])


def test_a_window_survives_a_clock_that_stands_still():
    window = Window(1, Clock(), flops_per_picture=1, ceiling=1.0)
    window.add({"loss": 1.0}, pictures=1)
    assert window.close()["loss"] == 1.0


def test_a_list_has_a_number_for_every_part_in_both_logs(tmp_path, monkeypatch):
    class Board:
        def __init__(self):
            self.seen = []

        def add_scalar(self, name, value, step):
            self.seen.append((name, value, step))

    board = Board()
    monkeypatch.setattr(metrics, "_summary_writer", lambda folder, resumed_step: board)
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write(3, {"loss": 1.5, "log2_scales": [13.0, 1 / 3, math.nan]})
    assert read_metrics(tmp_path) == [{"step": 3, "loss": 1.5, "log2_scales": [13.0, 0.333333, None]}]
    assert board.seen[:3] == [("loss", 1.5, 3), ("log2_scales/0", 13.0, 3), ("log2_scales/1", 1 / 3, 3)]
