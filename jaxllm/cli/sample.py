"""`jaxllm sample`."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxllm.arguments import POSITIVE
from jaxllm.cli.shared import add_processes, begin_computing, show_progress
from jaxllm.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_SAVED_AFTER_SIGNAL


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser(
        "sample",
        help="answer prompts several times and keep the best answers",
        description="Rejection sampling: answer each prompt of data.train rollout.samples times with model.weights, "
        "and write the answers with the highest reward as rows to fine-tune on. The config is one of stage ppo or "
        "grpo. The same command again goes on where it was stopped.",
    )
    parser.add_argument(
        "--config", nargs="+", action="extend", default=[], metavar="FILE", help="YAML; later files win"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="a new .jsonl file")
    parser.add_argument("--round", type=POSITIVE, default=1, metavar="N", help="which round this is; written to rows")
    parser.add_argument(
        "--earlier", nargs="+", default=[], metavar="FILE", help="outputs of earlier rounds, whose better answers stay"
    )
    add_processes(parser)
    parser.set_defaults(run=_sample)


def _sample(arguments: argparse.Namespace) -> int:
    from jaxllm.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    begin_computing(arguments)
    from jaxllm.sharding.processes import AgreedError, is_main
    from jaxllm.train.rollouts.best_of import sample_best

    say = print if is_main() else _say_nothing
    try:
        with show_progress("{:,} of {:,} prompts") as progress:
            outcome = sample_best(
                config,
                Path(arguments.output),
                round_number=arguments.round,
                earlier=[Path(path) for path in arguments.earlier],
                note=say,
                progress=progress if is_main() else None,
            )
    except AgreedError:
        if is_main():
            raise
        return EXIT_BAD_INPUT
    if outcome.stopped:
        say(f"{arguments.output}: stopped by a signal; the same command goes on from here")
        return EXIT_SAVED_AFTER_SIGNAL
    say(
        f"{arguments.output}: {outcome.written:,} answers; mean score {outcome.mean_score:.4g}, of the best "
        f"{outcome.mean_best:.4g}; {outcome.unanswered:,} prompts without an answer that ended"
    )
    return EXIT_OK


def _say_nothing(_: str) -> None:
    """Leave it to process 0 to tell."""
