"""What several verbs share."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from jaxllm.arguments import NATURAL, PENALTY, POSITIVE, SHARE, TEMPERATURE


def add_input(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which text to read and where to write."""
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, globs or folders of text")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="text field of jsonl and parquet rows")


def add_sampling(parser: argparse.ArgumentParser, **defaults: float) -> None:
    """Add the arguments that say how tokens are chosen; without a default they are None, the model's own."""
    parser.add_argument("--max-new-tokens", type=POSITIVE, metavar="N")
    parser.add_argument("--temperature", type=TEMPERATURE, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=POSITIVE, metavar="K", help="sample among the K likeliest tokens")
    parser.add_argument("--top-p", type=SHARE, metavar="P", help="sample among the likeliest tokens of this share")
    parser.add_argument("--repetition-penalty", type=PENALTY, metavar="R")
    parser.add_argument("--seed", type=NATURAL, default=0, metavar="S")
    parser.set_defaults(**defaults)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the arguments by which the processes of one command find each other."""
    several = parser.add_argument_group("several processes", "each process is started with its own --process-id")
    _add_process(several, "--coordinator", "HOST:PORT", str, "address of process 0")
    _add_process(several, "--num-processes", "N", POSITIVE, "how many there are")
    _add_process(several, "--process-id", "I", NATURAL, "which one this is, from 0")
    several.add_argument("--distributed", action="store_true", help="find the processes: on a TPU pod or under Slurm")


def _add_process(group: argparse._ArgumentGroup, flag: str, metavar: str, kind: Callable, help: str) -> None:
    variable = "JAXLLM_" + flag.removeprefix("--").replace("-", "_").upper()
    group.add_argument(flag, metavar=metavar, type=kind, default=os.environ.get(variable), help=f"{help} [{variable}]")


def begin_computing(arguments: argparse.Namespace) -> None:
    """Join the processes that the arguments name and start jax; raises InputError where that cannot be."""
    from jaxllm.environment import enable_compilation_cache, require_devices, start_processes

    start_processes(arguments.coordinator, arguments.num_processes, arguments.process_id, detect=arguments.distributed)
    require_devices()
    enable_compilation_cache()


@contextlib.contextmanager
def show_progress(line: str) -> Iterator[Callable[..., None] | None]:
    """Give a callback that rewrites one line of the terminal, a few times a second; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    next_time = 0.0

    def show(*counts: int) -> None:
        nonlocal next_time
        if time.monotonic() >= next_time:
            next_time = time.monotonic() + 0.2
            print(f"\r\033[K{line.format(*counts)}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
