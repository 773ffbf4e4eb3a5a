"""`jaxllm plan`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from jaxllm.arguments import POSITIVE
from jaxllm.errors import EXIT_DOES_NOT_FIT, EXIT_INTERRUPTED, EXIT_OK, InputError

if TYPE_CHECKING:
    from jaxllm.config import RunConfig
    from jaxllm.plan.topology import Topology

_SECONDS_BETWEEN_LINES = 30


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser(
        "plan",
        help="compile a training step for chips you do not have: memory, time, collectives",
        description="Compile the training step of a config for a TPU slice or GPUs that need not be there, and report "
        "whether it fits, what it costs and what limits it. No data and no tokenizer are read. Any option of the "
        f"config can be set as `a.b=value` or `--a.b value`. Exit code {EXIT_DOES_NOT_FIT}: it does not fit.",
    )
    parser.add_argument(
        "--config", nargs="+", action="extend", required=True, metavar="FILE", help="YAML; later files win"
    )
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="a slice or host, as v5p:8x8x8, v5e:16x16 or h100:8"
    )
    parser.add_argument("--slices", type=POSITIVE, default=1, metavar="N", help="so many slices of that shape")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument(
        "--search", action="store_true", help="find the best mesh, number of microbatches and remat policy"
    )
    parser.add_argument("--top", type=POSITIVE, metavar="N", help="--search: plans to compile and rank; default: 3")
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    if arguments.top is not None and not arguments.search:
        raise InputError("--top needs --search")
    # The chips are elsewhere: what is here must neither be waited for nor taken.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxllm.config import load_config
    from jaxllm.plan.topology import parse_topology

    config = load_config(arguments.config, arguments.overrides)
    topology = parse_topology(arguments.topology, arguments.slices)
    _check_writable(arguments.json)
    terminal = os.fdopen(os.dup(2), "w", buffering=1)  # what compilers write to stderr is kept off it
    try:
        if arguments.search:
            return _search(config, topology, arguments, terminal)
        return _single(config, topology, arguments, terminal)
    except KeyboardInterrupt:
        # A compiler cannot be stopped, and to leave in the usual way would wait for it.
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)


def _check_writable(path: str | None) -> None:
    """Refuse before minutes of compilation what could not be written after them."""
    if path is not None and not os.access(Path(path).absolute().parent, os.W_OK):
        raise InputError(f"--json: {path}: its folder does not exist or cannot be written to")


def _single(config: RunConfig, topology: Topology, arguments: argparse.Namespace, terminal: TextIO) -> int:
    from jaxllm.plan.advice import refusal
    from jaxllm.plan.plan import make_plan
    from jaxllm.plan.report import plan_as_dict, plan_as_text, write_json

    plan = make_plan(config, topology, _ticker(terminal, str(topology)))
    terminal.write(_clear(terminal))
    print(plan_as_text(plan), end="")
    if arguments.json:
        write_json(plan_as_dict(plan), Path(arguments.json))
    if plan.fits:
        return EXIT_OK
    print(f"jaxllm: {refusal(plan)}", file=sys.stderr)
    return EXIT_DOES_NOT_FIT


def _search(config: RunConfig, topology: Topology, arguments: argparse.Namespace, terminal: TextIO) -> int:
    from jaxllm.plan.report import plan_as_dict, plan_as_text, write_json
    from jaxllm.plan.search import config_lines, describe, search

    def note(line: str) -> None:
        terminal.write(f"{_clear(terminal)}{line}\n")

    plans = search(config, topology, top=arguments.top or 3, note=note, tick=_ticker(terminal, str(topology)))
    if arguments.json:
        write_json([plan_as_dict(plan) for plan in plans], Path(arguments.json))
    if not plans:
        print(
            f"jaxllm: no mesh of {topology} was found that fits {config.model.label}; a smaller train.batch_size or "
            "data.seq_len, or a larger topology, would help",
            file=sys.stderr,
        )
        return EXIT_DOES_NOT_FIT
    print(plan_as_text(plans[0]))
    for rank, plan in enumerate(plans, 1):
        estimate = plan.analysis.estimate
        print(f"# {rank}. {describe(plan.step.config)}: {estimate.step_s:.4g} s a step, MFU {estimate.mfu:.1%}")
        print(config_lines(plan.step.config))
    return EXIT_OK


def _ticker(terminal: TextIO, name: str) -> Callable[[str, float], None]:
    """Return what shows that something goes on: one line that changes, in a log a line now and then."""
    last = None

    def tick(doing: str, seconds: float) -> None:
        nonlocal last
        line = f"{doing} for {name}: {seconds:,.0f} s"
        if terminal.isatty():
            terminal.write(f"{_clear(terminal)}{line}")
            terminal.flush()
        elif last != (doing, seconds // _SECONDS_BETWEEN_LINES):
            last = doing, seconds // _SECONDS_BETWEEN_LINES
            terminal.write(f"{line}\n")

    return tick


def _clear(terminal: TextIO) -> str:
    return "\r\033[K" if terminal.isatty() else ""
