"""`jaxllm train`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from jaxllm.arguments import NATURAL, POSITIVE
from jaxllm.errors import EXIT_OK


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser(
        "train",
        help="train a model, or resume its training",
        description="Train a model. The same command again resumes from the newest checkpoint of the run folder. "
        "Any option of the config can be set as `a.b=value` or `--a.b value`; see --help-config.",
    )
    parser.add_argument(
        "--config", nargs="+", action="extend", default=[], metavar="FILE", help="YAML; later files win"
    )
    parser.add_argument("--help-config", action="store_true", help="list every option of the config and exit")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--dry-run", action="store_true", help="show shapes, memory and the first batch; train nothing")
    parser.add_argument("--init-from", metavar="CHECKPOINT", help="start from these weights instead of random ones")
    parser.add_argument("--from-step", type=NATURAL, metavar="N", help="resume from this step, not the newest")
    parser.add_argument("--strict", action="store_true", help="save and stop at the first warning about its health")
    several = parser.add_argument_group("several processes", "each process is started with its own --process-id")
    _add_process(several, "--coordinator", "HOST:PORT", str, "address of process 0")
    _add_process(several, "--num-processes", "N", POSITIVE, "how many there are")
    _add_process(several, "--process-id", "I", NATURAL, "which one this is, from 0")
    several.add_argument("--distributed", action="store_true", help="find the processes: on a TPU pod or under Slurm")
    parser.set_defaults(run=_train)


def _add_process(group: argparse._ArgumentGroup, flag: str, metavar: str, kind: Callable, help: str) -> None:
    variable = "JAXLLM_" + flag.removeprefix("--").replace("-", "_").upper()
    group.add_argument(flag, metavar=metavar, type=kind, default=os.environ.get(variable), help=f"{help} [{variable}]")


def _train(arguments: argparse.Namespace) -> int:
    from jaxllm.config import config_help, dump_config, load_config

    if arguments.help_config:
        print(config_help())
        return EXIT_OK
    strict = ["health.strict=true"] if arguments.strict else []
    config = load_config(arguments.config, [*arguments.overrides, *strict])
    if arguments.print_config:
        print(dump_config(config), end="")
        return EXIT_OK
    from jaxllm.environment import enable_compilation_cache, require_devices, start_processes

    start_processes(arguments.coordinator, arguments.num_processes, arguments.process_id, detect=arguments.distributed)
    require_devices()
    enable_compilation_cache()
    from jaxllm.train.loop import train

    return train(config, dry_run=arguments.dry_run, init_from=arguments.init_from, from_step=arguments.from_step)
