"""The records of a run: metrics.jsonl, log.txt, TensorBoard events, training_loss.svg, and what the terminal shows."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jaxllm.errors import InputError
from jaxllm.train.records.event_file import EventFile
from jaxllm.train.records.loss_plot import write_svg
from jaxllm.train.records.metrics_file import MetricsFile, read_metrics
from jaxllm.train.records.progress import Speed, display, memory_bytes, train_line


def _on_main(method: Callable[..., None]) -> Callable[..., None]:
    """Make a method of Records do nothing on all processes but the main one; InputError where a file is refused."""

    @functools.wraps(method)
    def call(self: Records, *args, **kwargs) -> None:
        if not self._is_main:
            return
        try:
            method(self, *args, **kwargs)
        except OSError as error:
            raise InputError(f"{self._run_dir}: the records cannot be written: {error.strerror or error}") from error

    return call


class Records:
    """Writes the records of one run.

    Steps are counted as finished updates: the first record has step 1.
    """

    def __init__(
        self, run_dir: Path, *, total_steps: int, speed: Speed, is_main: bool, tensorboard: bool, log_every: int
    ):
        """Open the records for appending.

        Args:
          run_dir: the run folder; created if it does not exist.
          is_main: whether this process keeps the records; on others all methods do nothing.
          tensorboard: whether to write event files.
          log_every: steps between the lines for people (metrics.jsonl gets every step).
        """
        self._speed = speed
        self._is_main = is_main
        if not is_main:
            return
        self._run_dir = run_dir
        self._total_steps = total_steps
        self._log_every = log_every
        self._tensorboard = tensorboard
        self._first_step = 0
        self._events: EventFile | None = None
        self._evaluated: set[int] = set()
        self._curves = {kind: (array("q"), array("d")) for kind in ("train", "eval")}
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._log = open(run_dir / "log.txt", "a", encoding="utf-8")  # noqa: SIM115
        self._display = display(total_steps)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *exception: object) -> None:
        # What went wrong first is what the user must hear, not that the disk is too full for a picture as well.
        with contextlib.suppress(*(() if error_type is None else (InputError,))):
            self.close()

    @_on_main
    def resume_at(self, step: int) -> None:
        """Forget what was recorded after `step` finished updates, so that each step appears once; note what was
        dropped. Must come before the first record."""
        dropped = self._metrics.resume_at(step)
        self._first_step = step + 1 if step else 0
        for record in read_metrics(self._metrics.path):
            self._add_point(record)
        if dropped.records:
            self.event(f"metrics.jsonl: dropped {dropped.records} records of steps after {step}")
        if dropped.half_lines:
            self.event("metrics.jsonl: dropped a half-written last line")

    @_on_main
    def train_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one update; on a log step also speed, memory and the time left.

        Args:
          step: finished updates, this one included.
          metrics: scalars, among them loss (nats per token), learning_rate, grad_norm (before clipping) and tokens
            (token slots since the start of the run).
        """
        record = {"kind": "train", "step": step} | _plain(metrics)
        if step % self._log_every == 0 or step == self._total_steps or not self._speed.running:
            self._log_step(record)
        self._record(record)
        self._display.step(step)

    @_on_main
    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a held-out evaluation after `step` updates: scalars, among them loss in nats per token."""
        values = _plain(metrics)
        self._record({"kind": "eval", "step": step} | values)
        self._scalars("eval", step, values)
        self.event(f"evaluation at step {step}  " + "  ".join(f"{key} {value:.5g}" for key, value in values.items()))

    @_on_main
    def event(self, text: str) -> None:
        """Note one line on the terminal and in log.txt."""
        self._display.note(text)
        self._write_log(text)

    def events(self, notes: list[str]) -> None:
        """Note all sentences of a list and empty it."""
        while notes:
            self.event(notes.pop(0))

    def evaluated(self, step: int) -> bool:
        """Tell whether an evaluation after `step` updates is recorded (main process; others do not know: False)."""
        return self._is_main and step in self._evaluated

    def untimed(self) -> contextlib.AbstractContextManager[None]:
        """Return a context whose duration the speed leaves out: an evaluation, a checkpoint."""
        return self._speed.paused()

    @_on_main
    def sync(self) -> None:
        """Put all records on the disk and redraw the loss; belongs before a checkpoint is committed."""
        self._metrics.sync()
        if self._events is not None:
            self._events.sync()
        train, heldout = (tuple(np.array(part) for part in self._curves[kind]) for kind in ("train", "eval"))
        if train[0].size:
            write_svg(self._run_dir / "training_loss.svg", train, heldout)

    @_on_main
    def close(self) -> None:
        """Sync, and give files and terminal back."""
        with contextlib.ExitStack() as stack:
            for resource in (self._metrics, self._log, *filter(None, [self._events]), self._display):
                stack.callback(resource.close)
            self.sync()

    def _log_step(self, record: dict[str, float]) -> None:
        """Add speed and memory to the record and show it."""
        if self._speed.running:
            record |= self._speed.lap(record["tokens"])
        else:
            self._speed.start(record["tokens"])
        record["memory_bytes"] = memory_bytes()
        line = train_line(record, self._total_steps)
        self._display.log_step(line)
        self._write_log(line)
        self._scalars("train", record["step"], {key: record[key] for key in record if key not in ("kind", "step")})

    def _record(self, record: Mapping[str, float]) -> None:
        self._metrics.append(record)
        self._add_point(record)

    def _add_point(self, record: Mapping[str, float]) -> None:
        loss = float(record["loss"])
        if record["kind"] == "eval":
            self._evaluated.add(record["step"])
        if math.isfinite(loss):
            steps, losses = self._curves[record["kind"]]
            steps.append(record["step"])
            losses.append(loss)

    def _scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if not self._tensorboard:
            return
        if self._events is None:
            self._events = EventFile(self._run_dir / "tb", first_step=self._first_step)
        self._events.scalars(step, {f"{group}/{key}": value for key, value in values.items()})

    def _write_log(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        self._log.flush()


def _plain(metrics: Mapping[str, float]) -> dict[str, float]:
    """Turn scalars of numpy and jax into Python numbers with the same value."""
    return {key: np.asarray(value).item() for key, value in metrics.items()}
