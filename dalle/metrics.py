"""What was measured, for machines: `metrics.jsonl`, and TensorBoard where it is asked for."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from dalle.checkpoint import replacing, unwritable
from dalle.console import Stopwatch
from dalle.errors import ConfigError


class MetricsLog:
    """Appends one JSON object a line. On resuming, lines later than the resumed step are dropped."""

    def __init__(self, folder: Path, resumed_step: int, tensorboard: bool = False) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= resumed_step]
            with replacing(self.path) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.board: Any = _summary_writer(folder / "tensorboard", resumed_step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float | list[float]]) -> None:
        """Record what was measured after update `step`; lists hold one number for each part of the model."""
        line = {
            "step": step,
            **{k: [_short(x) for x in v] if isinstance(v, list) else _short(v) for k, v in values.items()},
        }
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from error
        if self.board is not None:
            for name, value in values.items():
                parts = enumerate(value) if isinstance(value, list) else [("", value)]
                for part, number in parts:
                    self.board.add_scalar(f"{name}/{part}".rstrip("/"), number, step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of `folder`/metrics.jsonl; a last line cut short by a crash is left out."""
    path = folder / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    # After a crash the end of the file may be anything, not even text.
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            lines.append(found)
    return lines


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON has no NaN


class Window:
    """Means and rates since the last line of the log.

    Args:
        flops_per_picture: of the matrix products that training on a picture takes.
        ceiling: FLOP/s of such products on this machine.
    """

    def __init__(
        self, tokens_per_picture: int, clock: Stopwatch, flops_per_picture: int, ceiling: float
    ) -> None:
        self.tokens_per_picture, self.clock = tokens_per_picture, clock
        self.flops_per_picture, self.ceiling = flops_per_picture, ceiling
        self._restart()

    def _restart(self) -> None:
        self.began, self.waited = self.clock.seconds, 0.0
        self.finite: dict[str, list[float]] = {}
        self.pictures = 0

    def add(self, metrics: Mapping[str, float], pictures: int) -> None:
        """Take in the metrics of one update that saw so many pictures; not every update has every metric."""
        for name, value in metrics.items():
            values = self.finite.setdefault(name, [])
            if math.isfinite(value):  # a dropped update's gradient is not; the others' mean is told
                values.append(value)
        self.pictures += pictures

    def close(self) -> dict[str, float]:
        """Mean metrics, rates, and the share of the time spent waiting for data; starts the next window.

        The mean of a metric is over the updates that had it, finite; NaN if there were none.
        """
        seconds = max(1e-9, self.clock.seconds - self.began)
        line = {name: fmean(values) if values else math.nan for name, values in self.finite.items()}
        line["seconds"] = seconds
        line["pictures_per_second"] = self.pictures / seconds
        line["tokens_per_second"] = self.pictures * self.tokens_per_picture / seconds
        flops = self.pictures * self.flops_per_picture / seconds
        line["flops_per_second"] = flops
        line["of_gemm_rate"] = flops / self.ceiling
        line["data_wait"] = self.waited / seconds
        self._restart()
        return line


def _summary_writer(folder: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("tensorboard=true needs the package: pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=resumed_step + 1)
