"""Where the processes of a run wait for each other during a save, so that a failure in one reaches the others."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from orbax.checkpoint import multihost

from jaxllm.sharding.processes import OtherProcessError


class SaveBarrier:
    """Orbax's barrier function, with a meaning for processes that fail.

    By itself orbax waits for them until its timeout. Here a process that fails marks the save, and then comes to the
    barrier that the others are at, or will be at; they find the mark and fail too.
    """

    def __init__(self, timeout_seconds: int):
        """Take the longest that a process which failed waits for the others."""
        self._timeout_ms = 1000 * timeout_seconds
        # A barrier has one use, and the processes must name it alike: by its number in the save.
        self._saves = itertools.count()
        self._name = ""
        self._barriers = itertools.count()
        self._mark = Path()

    def begin(self, mark: Path) -> None:
        """Start counting the barriers of a new save; the path `mark` exists if it has failed."""
        self._name = f"jaxllm save {next(self._saves)}"
        self._barriers = itertools.count()
        self._mark = mark

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait for all processes (orbax calls this).

        Raises:
          OtherProcessError: one of them has failed.
        """
        del key  # a process that fails does not learn it, and must come here all the same
        self._wait(timeout_ms)
        if self._mark.exists():
            raise OtherProcessError("another process could not save its part")

    @contextlib.contextmanager
    def attended(self, set_mark: Callable[[], None]) -> Iterator[None]:
        """Let the other processes know when the block, which is orbax's work, fails."""
        try:
            yield
        except OtherProcessError:
            raise
        except (OSError, ValueError, RuntimeError):
            if jax.process_count() > 1:
                set_mark()
                self._wait(self._timeout_ms)
            raise

    def _wait(self, timeout_ms: int) -> None:
        multihost.get_barrier_sync_fn()(key=f"{self._name}.{next(self._barriers)}", timeout_ms=timeout_ms)
