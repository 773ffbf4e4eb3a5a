"""The command line: one verb for each thing a user does. Nothing heavy is imported before the verb runs."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.arguments import NATURAL, PENALTY, POSITIVE, SHARE, TEMPERATURE, Parser, split_overrides, utf8
from jaxllm.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, InputError, TrainingDivergedError

_EXIT_INTERRUPTED = 130
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        argv, overrides = split_overrides(argv) if argv[:1] == ["train"] else (argv, [])
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
        return _EXIT_INTERRUPTED


def _fail(message: str, code: int) -> int:
    separator = "\n" if "\n" in message else " "
    print(f"jaxllm: error:{separator}{message}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line; each verb's namespace holds the function that runs it as `run`."""
    parser = Parser(prog="jaxllm", description="Train language models in JAX.")
    verbs = parser.add_verbs()
    _add_train(verbs)
    _add_generate(verbs)
    tokenizer = verbs.add_parser("tokenizer", help="train and inspect tokenizers").add_verbs()
    _add_tokenizer_train(tokenizer)
    _add_tokenizer_show(tokenizer)
    data = verbs.add_parser("data", help="tokenize text and inspect token shards").add_verbs()
    _add_data_tokenize(data)
    _add_data_show(data)
    env = verbs.add_parser("env", help="show versions, devices, and what holds an accelerator")
    env.add_argument("--models", action="store_true", help="list model families and sizes with their parameter counts")
    env.set_defaults(run=_env)
    return parser


def _add_train(verbs: argparse._SubParsersAction) -> None:
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
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(dump_config(config), end="")
        return EXIT_OK
    from jaxllm.environment import enable_compilation_cache, require_devices, start_processes

    start_processes(arguments.coordinator, arguments.num_processes, arguments.process_id, detect=arguments.distributed)
    require_devices()
    enable_compilation_cache()
    from jaxllm.train.loop import train

    return train(config, dry_run=arguments.dry_run, init_from=arguments.init_from, from_step=arguments.from_step)


def _add_generate(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("generate", help="continue text with a trained model")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run folder or a checkpoint folder")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", type=utf8, action="append", metavar="TEXT", help="may be repeated")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file that is one prompt; default: standard input")
    parser.add_argument("--max-new-tokens", type=POSITIVE, default=64, metavar="N")
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.0, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=POSITIVE, metavar="K", help="sample among the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=SHARE, metavar="P", help="sample among the likeliest tokens of this total share"
    )
    parser.add_argument("--repetition-penalty", type=PENALTY, default=1.0, metavar="R")
    parser.add_argument("--seed", type=NATURAL, default=0, metavar="S")
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
    from jaxllm.language_model import load

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


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, globs or folders of text")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="text field of jsonl and parquet rows")


def _add_tokenizer_train(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("train", help="train a byte-level BPE tokenizer")
    _add_input(parser)
    parser.add_argument("--vocab-size", type=POSITIVE, required=True, metavar="V", help="special tokens included")
    parser.set_defaults(run=_tokenizer_train)


def _tokenizer_train(arguments: argparse.Namespace) -> int:
    from jaxllm.data.train_tokenizer import train_from_files

    with _progress("{:,} of {:,} merges") as progress:
        summary = train_from_files(
            arguments.input,
            vocab_size=arguments.vocab_size,
            output=arguments.output,
            text_key=arguments.text_key,
            progress=progress,
        )
    print(
        f"{arguments.output}: {arguments.vocab_size:,} tokens from {summary.num_documents:,} documents, "
        f"{summary.num_bytes:,} bytes; {summary.bytes_per_token:.3f} bytes per token; {summary.seconds:.1f} s"
    )
    return EXIT_OK


def _add_tokenizer_show(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("show", help="show a tokenizer and how it cuts a text")
    parser.add_argument("tokenizer", metavar="DIR")
    parser.add_argument("text", nargs="?", type=utf8, metavar="TEXT")
    parser.set_defaults(run=_tokenizer_show)


def _tokenizer_show(arguments: argparse.Namespace) -> int:
    from jaxllm.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    print(f"vocabulary: {tokenizer.vocab_size:,} tokens")
    for text, token_id in tokenizer.special_tokens.items():
        print(f"special: {token_id:>8}  {text}")
    if arguments.text is not None:
        ids = tokenizer.encode(arguments.text)
        for token_id in ids:
            print(f"{token_id:>8}  {_show_bytes(tokenizer.token_bytes(token_id))}")
        print(f"{len(ids)} tokens, {len(arguments.text.encode())} bytes")
    return EXIT_OK


def _show_bytes(token: bytes) -> str:
    """Spell a token as text, or as bytes where it is not whole characters."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def _add_data_tokenize(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("tokenize", help="write text as token shards")
    _add_input(parser)
    parser.add_argument("--tokenizer", required=True, metavar="DIR")
    parser.add_argument("--format", choices=("auto", "txt", "jsonl", "parquet"), default="auto")
    parser.add_argument("--max-bad-rows", type=NATURAL, default=0, metavar="N", help="rows that may be skipped")
    parser.set_defaults(run=_data_tokenize)


def _data_tokenize(arguments: argparse.Namespace) -> int:
    from jaxllm.data.shards import tokenize_files
    from jaxllm.tokenizers import load_tokenizer

    with _progress("{:,} documents, {:,} tokens") as progress:
        index = tokenize_files(
            arguments.input,
            load_tokenizer(arguments.tokenizer),
            arguments.output,
            format=arguments.format,
            text_key=arguments.text_key,
            max_bad_rows=arguments.max_bad_rows,
            progress=progress,
        )
    _print_index(arguments.output, index)
    return EXIT_OK


def _add_data_show(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("show", help="show what a folder of token shards holds")
    parser.add_argument("shards", metavar="DIR")
    parser.set_defaults(run=_data_show)


def _data_show(arguments: argparse.Namespace) -> int:
    from jaxllm.data.shards import ShardSet

    _print_index(arguments.shards, ShardSet.open(arguments.shards).index)
    return EXIT_OK


def _print_index(folder: str, index: Any) -> None:
    print(
        f"{folder}: {index.num_documents:,} documents, {index.num_tokens:,} tokens, {index.num_bytes:,} bytes of text "
        f"in {len(index.shards):,} shards of {index.dtype}"
    )
    print(f"tokenizer: {index.vocab_size:,} tokens, fingerprint {index.tokenizer}")
    print(f"sources: {len(index.sources):,}, first {index.sources[0]}")
    print(f"bad rows skipped: {index.bad_rows:,}")
    for example in index.bad_row_examples:
        print(f"  {example}")


@contextlib.contextmanager
def _progress(line: str) -> Iterator[Callable[..., None] | None]:
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


def _env(arguments: argparse.Namespace) -> int:
    if arguments.models:
        import jaxllm

        for family, sizes in jaxllm.families().items():
            print(family)
            for size in sizes:
                print(f"  {size:<24}{jaxllm.count_params(jaxllm.spec(size)):>20,} parameters")
        return EXIT_OK
    from jaxllm.environment import describe_environment

    for line in describe_environment():
        print(line)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
