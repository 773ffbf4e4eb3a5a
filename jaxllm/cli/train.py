"""`jaxllm train`."""

from __future__ import annotations

import argparse
import json

from jaxllm.arguments import NATURAL
from jaxllm.cli.shared import add_processes, begin_computing
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
    parser.add_argument("--init-from", metavar="PATH", help="start from these weights: short for model.weights=PATH")
    parser.add_argument("--from-step", type=NATURAL, metavar="N", help="resume from this step, not the newest")
    parser.add_argument("--strict", action="store_true", help="save and stop at the first warning about its health")
    add_processes(parser)
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from jaxllm.config import config_help, dump_config, load_config

    if arguments.help_config:
        print(config_help())
        return EXIT_OK
    short = ["health.strict=true"] if arguments.strict else []
    if arguments.init_from is not None:
        short.append(f"model.weights={json.dumps(arguments.init_from, ensure_ascii=False)}")
    config = load_config(arguments.config, [*arguments.overrides, *short])
    if arguments.print_config:
        print(dump_config(config), end="")
        return EXIT_OK
    begin_computing(arguments)
    from jaxllm.train.loop import train

    return train(config, dry_run=arguments.dry_run, from_step=arguments.from_step)
