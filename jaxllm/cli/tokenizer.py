"""`jaxllm tokenizer`."""

from __future__ import annotations

import argparse

from jaxllm.arguments import POSITIVE, Parser, utf8
from jaxllm.cli.shared import add_input, show_progress
from jaxllm.errors import EXIT_OK


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to the parser."""
    tokenizer: Parser = verbs.add_parser("tokenizer", help="train and inspect tokenizers")
    actions = tokenizer.add_verbs()
    _add_train(actions)
    _add_show(actions)


def _add_train(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("train", help="train a byte-level BPE tokenizer")
    add_input(parser)
    parser.add_argument("--vocab-size", type=POSITIVE, required=True, metavar="V", help="special tokens included")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from jaxllm.data.train_tokenizer import train_from_files

    with show_progress("{:,} of {:,} merges") as progress:
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


def _add_show(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("show", help="show a tokenizer and how it cuts a text")
    parser.add_argument("tokenizer", metavar="DIR")
    parser.add_argument("text", nargs="?", type=utf8, metavar="TEXT")
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> int:
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
