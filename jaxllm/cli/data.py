"""`jaxllm data`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxllm.arguments import NATURAL, Parser
from jaxllm.cli import data_check, data_make
from jaxllm.cli.shared import add_input, show_progress
from jaxllm.errors import EXIT_OK


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to the parser."""
    data: Parser = verbs.add_parser("data", help="tokenize text, inspect token shards, check and make examples")
    actions = data.add_verbs()
    _add_tokenize(actions)
    _add_show(actions)
    data_check.add(actions)
    data_make.add(actions)


def _add_tokenize(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("tokenize", help="write text as token shards")
    add_input(parser)
    parser.add_argument("--tokenizer", required=True, metavar="DIR")
    parser.add_argument("--format", choices=("auto", "txt", "jsonl", "parquet"), default="auto")
    parser.add_argument("--max-bad-rows", type=NATURAL, default=0, metavar="N", help="rows that may be skipped")
    parser.set_defaults(run=_tokenize)


def _tokenize(arguments: argparse.Namespace) -> int:
    from jaxllm.checkpoint.opened import open_tokenizer
    from jaxllm.data.shards import tokenize_files

    with show_progress("{:,} documents, {:,} tokens") as progress:
        index = tokenize_files(
            arguments.input,
            open_tokenizer(arguments.tokenizer),
            arguments.output,
            format=arguments.format,
            text_key=arguments.text_key,
            max_bad_rows=arguments.max_bad_rows,
            progress=progress,
        )
    _print_index(arguments.output, index)
    return EXIT_OK


def _add_show(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("show", help="show what a folder of token shards holds")
    parser.add_argument("shards", metavar="DIR")
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> int:
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
