"""What the processes of a run settle among themselves, so that one that fails never leaves the others waiting."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.errors import EXIT_BAD_INPUT, EXIT_FAILURE, InputError

T = TypeVar("T")


class AgreedError(InputError):
    """A refusal that all processes raise at the same point; only process 0 tells the user."""


class OtherProcessError(InputError):
    """Something failed because another process failed, which knows the reason."""


def is_main() -> bool:
    """Tell whether this process keeps the records and speaks for all."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Return the JSON values of all processes, by process; all of them must call this at the same point."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
    # Each length is a program of its own to compile: powers of two keep them few.
    padded = np.full(1 << longest.bit_length(), ord(" "), np.uint8)
    padded[: len(text)] = text
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def together(action: Callable[[], T]) -> T:
    """Run an action in every process and return this process's result.

    Raises:
      InputError: the action was refused (or its files could not be read or written) in a process: all raise.
    """
    if jax.process_count() == 1:
        return action()
    result, problem = None, None
    try:
        result = action()
    except OtherProcessError:
        problem = ""
    except InputError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or 'output'}: {error.strerror or error}"
    answers = gather(problem)
    if any(text is not None for text in answers):
        process, reason = next(((p, text) for p, text in enumerate(answers) if text), (0, "a process failed"))
        raise AgreedError(reason if process == 0 else f"process {process}: {reason}")
    return result


def on_main(action: Callable[[], Any]) -> None:
    """Run an action in process 0 while the others wait for it.

    Raises:
      InputError: process 0 refused: all raise.
    """
    together(action if is_main() else lambda: None)


def require_same_start(what: list[Any]) -> None:
    """Raise AgreedError unless all processes were started with the same JSON values."""
    started = gather(what)
    different = [str(process) for process, other in enumerate(started) if other != started[0]]
    if different:
        raise AgreedError(f"process {', '.join(different)}: not started with the same config and options as process 0")


@contextlib.contextmanager
def leaving_together(*agreed: type[Exception]) -> Iterator[None]:
    """Leave at once when something breaks that the other processes do not know of.

    The ordinary end of a process waits minutes for the others, which wait for this one. When its connections break,
    they end too.

    Args:
      agreed: errors that all processes raise at the same point, beside AgreedError.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, (AgreedError, *agreed)):
            raise
        if isinstance(error, InputError):
            print(f"jaxllm: error: process {jax.process_index()}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILURE)
