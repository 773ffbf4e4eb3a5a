"""The command line: one verb for each thing a user does. Nothing heavy is imported before the verb runs."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from jaxllm.arguments import Parser, split_overrides
from jaxllm.cli import chat, data, env, generate, import_export, plan, sample, tokenizer, train
from jaxllm.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED, InputError, TrainingDivergedError
from jaxllm.plan.absent_tpu import hush_libtpu

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_VERBS = (train, plan, sample, generate, import_export, chat, tokenizer, data, env)
"""Modules with a function `add` that adds their verb to the parser."""
VERBS_WITH_CONFIG = ("train", "plan", "sample")
"""Verbs whose command line may set options of the config."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    hush_libtpu()
    try:
        argv, overrides = split_overrides(argv) if argv and argv[0] in VERBS_WITH_CONFIG else (argv, [])
        arguments = build_parser().parse_args(argv)
        arguments.overrides = overrides
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except TrainingDivergedError as error:
        return _fail(str(error), EXIT_FAILURE)
    except BrokenPipeError:
        # Else the interpreter flushes into the closed pipe when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail("the reader of the output has gone", EXIT_FAILURE)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        return _fail(f"{error.filename or 'output'}: {error.strerror}", EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _fail(message: str, code: int) -> int:
    separator = "\n" if "\n" in message else " "
    print(f"jaxllm: error:{separator}{message}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line; each verb's namespace holds the function that runs it as `run`."""
    parser = Parser(prog="jaxllm", description="Train language models in JAX.")
    verbs = parser.add_verbs()
    for verb in _VERBS:
        verb.add(verbs)
    return parser
