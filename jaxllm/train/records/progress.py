"""How fast a run is going, and what a person sees of it while it runs."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import jax


class Speed:
    """Tokens per second, MFU and the time left, from the second step of the process on.

    The first step waits for the compiler, so the clock starts when it is done.
    """

    def __init__(self, *, total_tokens: int, flops_per_token: float, num_devices: int, peak_flops: float | None):
        """Describe the run.

        Args:
          total_tokens: token slots of the whole run (a batch ramp makes steps unequal, so steps would mislead).
          flops_per_token: of training, see `flops.train_flops_per_token`.
          num_devices: devices of all processes.
          peak_flops: FLOP/s of one device, or None where unknown: there is no MFU then.
        """
        self._total_tokens = total_tokens
        self._flops_per_token = flops_per_token
        self._num_devices = num_devices
        self._peak_flops = peak_flops
        self._first: _Mark | None = None
        self._last: _Mark | None = None

    @property
    def running(self) -> bool:
        """Whether the clock has started."""
        return self._first is not None

    def start(self, tokens: int) -> None:
        """Start the clock after `tokens` tokens of the run."""
        self._first = self._last = _Mark(tokens, time.monotonic())

    def lap(self, tokens: int) -> dict[str, float]:
        """Return tokens_per_second, tokens_per_second_per_device, mfu (if known) since the last lap, and seconds_left
        at the mean speed since the start."""
        now = _Mark(tokens, time.monotonic())
        rate = self._last.tokens_per_second(now)
        seconds_left = (self._total_tokens - tokens) / self._first.tokens_per_second(now)
        self._last = now
        rates = {"tokens_per_second": rate, "tokens_per_second_per_device": rate / self._num_devices}
        if self._peak_flops is not None:
            rates["mfu"] = rate * self._flops_per_token / (self._num_devices * self._peak_flops)
        return rates | {"seconds_left": seconds_left}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside, such as an evaluation."""
        begin = time.monotonic()
        yield
        if self.running:
            spent = time.monotonic() - begin
            self._first, self._last = self._first.later(spent), self._last.later(spent)


class _Mark(NamedTuple):
    tokens: int
    seconds: float

    def tokens_per_second(self, end: _Mark) -> float:
        return (end.tokens - self.tokens) / max(end.seconds - self.seconds, 1e-9)

    def later(self, seconds: float) -> _Mark:
        return _Mark(self.tokens, self.seconds + seconds)


def memory_bytes() -> int:
    """Return the peak memory of the first local device, or of this process where the device keeps no count (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_OF_STAGES = ("reward", "accuracy", "margin", "kl", "answer_tokens")
"""What some stages record and everybody wants to see."""


def train_line(record: Mapping[str, float], total_steps: int) -> str:
    """Format a log step's record; what is not known (yet) is shown as n/a."""
    return "  ".join(
        [
            f"step {record['step']}/{total_steps}",
            f"loss {record['loss']:.3f}",
            *(f"{name} {record[name]:.3g}" for name in _OF_STAGES if name in record),
            f"lr {record['learning_rate']:.1e}",
            f"grad {record['grad_norm']:.2f}",
            f"{_known(record, 'tokens_per_second', ',.0f')} tok/s",
            f"({_known(record, 'tokens_per_second_per_device', ',.0f')}/device)",
            f"mfu {_known(record, 'mfu', '.1%')}",
            f"eta {duration(record['seconds_left']) if 'seconds_left' in record else 'n/a'}",
            f"mem {record['memory_bytes'] / 1e9:.1f} GB",
        ]
    )


def _known(record: Mapping[str, float], key: str, format_spec: str) -> str:
    return format(record[key], format_spec) if key in record else "n/a"


def duration(seconds: float) -> str:
    """Format as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Lines:
    """One plain line per log step, for files and pipes."""

    def step(self, step: int) -> None:
        """Show nothing: only log steps are shown."""

    def log_step(self, line: str) -> None:
        """Print the line of a log step."""
        self.note(line)

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def close(self) -> None:
        """Do nothing: lines need no cleaning up."""


class Bar:
    """A rich progress bar with the last log line beneath it, for a terminal."""

    def __init__(self, total_steps: int):
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress
        from rich.text import Text

        self._progress = Progress(BarColumn(bar_width=None), MofNCompleteColumn(), expand=True)
        self._task = self._progress.add_task("steps", total=total_steps)
        self._line = Text("compiling the first step")
        self._live = Live(Group(self._progress, self._line), refresh_per_second=2)
        self._live.start()

    def step(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def log_step(self, line: str) -> None:
        """Replace the line beneath the bar."""
        self._line.plain = line

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Draw the bar a last time and give the terminal back."""
        self._live.stop()


def display(total_steps: int) -> Lines | Bar:
    """Return a bar on a terminal, else plain lines."""
    return Bar(total_steps) if sys.stdout.isatty() else Lines()
