"""`jaxllm generate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxllm.arguments import NATURAL, utf8
from jaxllm.cli.shared import add_sampling
from jaxllm.errors import EXIT_OK, InputError


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser("generate", help="continue text with a trained model")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run folder or a checkpoint folder")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", type=utf8, action="append", metavar="TEXT", help="may be repeated")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file that is one prompt; default: standard input")
    add_sampling(parser, max_new_tokens=64, temperature=0.0, repetition_penalty=1.0)
    parser.add_argument("--no-stream", dest="stream", action="store_false", help="print when all is done")
    parser.add_argument(
        "--from-step", type=NATURAL, metavar="N", help="step of a run's checkpoint; default: the newest"
    )
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    prompts = arguments.prompt or [_read_prompt(arguments.prompt_file)]
    from jaxllm.environment import enable_compilation_cache, require_devices

    require_devices()
    enable_compilation_cache()
    from jaxllm.pretrained import load

    model = load(arguments.checkpoint, step=arguments.from_step)
    for prompt in prompts:
        if len(prompts) > 1:
            print(f">>> {prompt}")
        pieces = model.stream(
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
        )
        for piece in pieces if arguments.stream else ["".join(pieces)]:
            print(piece, end="", flush=True)
        print()
    return EXIT_OK


def _read_prompt(file: str | None) -> str:
    """Read a prompt from a file or, without one, from standard input; the last line break is not part of it."""
    try:
        data = Path(file).read_bytes() if file else sys.stdin.buffer.read()
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file or 'standard input'}: not UTF-8 text: byte {error.start} is wrong") from error
    except OSError as error:
        raise InputError(f"{file}: cannot read the prompt: {error.strerror}") from error
