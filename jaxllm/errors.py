"""The one error that reaches a user as a plain message instead of a traceback."""

import contextlib
from collections.abc import Iterator

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_DOES_NOT_FIT = 3
EXIT_SAVED_AFTER_SIGNAL = 75
EXIT_INTERRUPTED = 130


class InputError(ValueError):
    """Bad config, data, checkpoint or tokenizer input.

    The message names the file, line or field, what was found and what was expected. The command line prints
    it without a traceback and exits with `EXIT_BAD_INPUT`.
    """


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is not finite any more; the message names the step and the documents of its batch."""


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Put a place before what an InputError of the block says."""
    try:
        yield
    except InputError as problem:
        raise InputError(f"{where}: {problem}") from problem


def missing_extra(package: str, extra: str, purpose: str) -> InputError:
    """Build the error for an optional package that is not installed."""
    return InputError(f"{purpose} needs the package {package!r}; install it with: pip install 'jaxllm[{extra}]'")
