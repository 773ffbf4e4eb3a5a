"""`jaxllm data reasoning-gym` and `jaxllm data ghost-attention`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.arguments import NATURAL, POSITIVE, SHARE, TEMPERATURE
from jaxllm.cli.shared import show_progress
from jaxllm.errors import EXIT_OK, EXIT_SAVED_AFTER_SIGNAL, InputError


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verbs to the parser."""
    _add_reasoning_gym(verbs)
    _add_ghost_attention(verbs)


def _add_reasoning_gym(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "reasoning-gym",
        help="write tasks of reasoning-gym as prompts",
        description="Write prompts of one of reasoning-gym's datasets, with what the reward reasoning_gym needs to "
        "score answers. Needs the extra [rl].",
    )
    parser.add_argument("name", metavar="NAME", help="of the dataset, such as chain_sum")
    parser.add_argument("output", metavar="OUT", help="a new .jsonl file")
    parser.add_argument("--size", type=POSITIVE, default=1000, metavar="N", help="rows; default: 1000")
    parser.add_argument("--seed", type=NATURAL, default=0, metavar="S")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the dataset, by the package's names"
    )
    parser.set_defaults(run=_reasoning_gym)


def _reasoning_gym(arguments: argparse.Namespace) -> int:
    from jaxllm.files import require_new_file
    from jaxllm.rewards import gym_rows
    from jaxllm.train.rollouts.sampled_rows import write_rows

    output = Path(arguments.output)
    require_new_file(output)
    options = dict(map(_option, arguments.option))
    rows = gym_rows(arguments.name, size=arguments.size, seed=arguments.seed, options=options)
    with show_progress("{:,} rows") as progress:
        count = write_rows(output, _counted(rows, progress))
    print(f"{output}: {count:,} prompts of {arguments.name}")
    return EXIT_OK


def _counted(rows: Iterator[dict[str, Any]], progress: Any) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, 1):
        if progress is not None:
            progress(number)
        yield row


def _option(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"--option: expected KEY=VALUE, found {text!r}")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--option: {text!r}: the value is no YAML") from error


def _add_ghost_attention(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "ghost-attention",
        help="have a model keep to instructions, and write what it says as conversations to train on",
        description="Ghost Attention (Llama 2): the model answers the questions of conversations with an instruction "
        "before each, which the rows have before the first alone. The same command again goes on where it was stopped.",
    )
    parser.add_argument("--model", required=True, metavar="PATH", help="a run, a published folder or a .gguf file")
    parser.add_argument(
        "--dialogues", nargs="+", required=True, metavar="FILE", help="conversations, of which the questions are kept"
    )
    parser.add_argument("--constraints", required=True, metavar="FILE", help="JSON: what instructions are made of")
    parser.add_argument("--output", required=True, metavar="FILE", help="a new .jsonl file")
    parser.add_argument("--chat-format", metavar="NAME", help="default: the model's own")
    parser.add_argument("--max-new-tokens", type=POSITIVE, default=512, metavar="N", help="of a reply; default: 512")
    parser.add_argument("--temperature", type=TEMPERATURE, default=1.0, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=SHARE, metavar="P", help="sample among the likeliest tokens of this share")
    parser.add_argument("--seed", type=NATURAL, default=0, metavar="S")
    parser.add_argument("--batch-size", type=POSITIVE, default=16, metavar="N", help="conversations answered together")
    parser.set_defaults(run=_ghost_attention)


def _ghost_attention(arguments: argparse.Namespace) -> int:
    from jaxllm.environment import enable_compilation_cache, require_devices

    require_devices()
    enable_compilation_cache()
    from jaxllm.train.rollouts.ghost_dialogues import GhostOptions, write_ghost_rows

    options = GhostOptions(
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        chat=arguments.chat_format,
    )
    with show_progress("{:,} of {:,} conversations") as progress:
        written = write_ghost_rows(
            arguments.model,
            arguments.dialogues,
            arguments.constraints,
            Path(arguments.output),
            options,
            batch_size=arguments.batch_size,
            progress=progress,
        )
    if written.stopped:
        print(f"{arguments.output}: stopped by a signal; the same command goes on from here")
        return EXIT_SAVED_AFTER_SIGNAL
    left_out = f"{written.left_out:,} left out for want of an ended reply"
    print(f"{arguments.output}: {written.rows:,} conversations; {left_out}")
    return EXIT_OK
