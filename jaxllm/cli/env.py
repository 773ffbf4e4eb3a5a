"""`jaxllm env`."""

from __future__ import annotations

import argparse

from jaxllm.errors import EXIT_OK


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser("env", help="show versions, devices, and what holds an accelerator")
    parser.add_argument(
        "--models", action="store_true", help="list model families and sizes with their parameter counts"
    )
    parser.set_defaults(run=_env)


def _env(arguments: argparse.Namespace) -> int:
    if arguments.models:
        import jaxllm
        from jaxllm.nn.model import count_active_params

        for family, sizes in jaxllm.families().items():
            print(family)
            for size in sizes:
                spec = jaxllm.spec(size)
                active = f", {count_active_params(spec):,} for each token" if spec.moe else ""
                print(f"  {size:<24}{jaxllm.count_params(spec):>20,} parameters{active}")
        return EXIT_OK
    from jaxllm.environment import describe_environment

    for line in describe_environment():
        print(line)
    return EXIT_OK
