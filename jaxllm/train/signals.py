"""Wishes to stop: the flag that SIGTERM and SIGINT set, and how all processes hear of it at the same step."""

from __future__ import annotations

import signal
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.sharding.mesh import MESH_AXES
from jaxllm.sharding.processes import together

_STOP, _FAIL = 1, 2


class StopRequested(Exception):
    """A signal came while something long was under way that can be begun again."""


class StopSignal:
    """Context manager: inside, the first SIGTERM or SIGINT only sets `received`; a second SIGINT interrupts at once.

    Attributes:
      received: name of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise StopRequested if a signal came."""
        if self.received is not None:
            raise StopRequested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class Votes:
    """One flag per device that rides along with each step, so that all processes stop, or fail, at the same one.

    A process alone needs no votes: it stops when its signal comes, and fails where the failure is.
    """

    def __init__(self, mesh: Mesh, signals: StopSignal):
        self._shape = (mesh.size,)
        self._sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        self._signals = signals
        self._alone = jax.process_count() == 1
        self._agreed = False
        self._failure: Exception | None = None

    @property
    def stopping(self) -> bool:
        """Whether the run is to end."""
        return self._signals.received is not None if self._alone else self._agreed

    def ask(self) -> bool:
        """Tell whether the run is to end, within a step; all processes must call this at the same point."""
        cast = self.cast()
        self.count(None if cast is None else jnp.max(cast))
        return self.stopping

    def fail(self, error: Exception) -> None:
        """End the run because of an error in this process, once all processes know: until then it must go on."""
        if self._alone:
            raise error
        self._failure = self._failure or error

    def cast(self) -> jax.Array | None:
        """Return this process's flags as part of a global int32 [devices]; None for a process alone."""
        if self._alone:
            return None
        flag = _FAIL if self._failure else int(self._signals.received is not None)
        return jax.make_array_from_callback(self._shape, self._sharding, lambda _: np.full(1, flag, np.int32))

    def count(self, largest: jax.Array | None) -> None:
        """Take note of the largest flag of a step.

        Raises:
          InputError: a process has failed; all raise.
        """
        verdict = 0 if largest is None else int(largest)
        self._agreed = self._agreed or verdict >= _STOP
        if verdict == _FAIL:
            together(self.raise_failure)

    def raise_failure(self) -> None:
        """Raise what `fail` was told, if anything."""
        if self._failure is not None:
            raise self._failure
