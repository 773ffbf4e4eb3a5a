"""`jaxllm tokenizer`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jaxllm.arguments import POSITIVE, Parser, utf8
from jaxllm.cli.shared import add_input, show_progress
from jaxllm.errors import EXIT_OK

if TYPE_CHECKING:
    from jaxllm.data.compression import Compression
    from jaxllm.tokenizers.train import Base


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to the parser."""
    tokenizer: Parser = verbs.add_parser("tokenizer", help="train, extend, export, slim and inspect tokenizers")
    actions = tokenizer.add_verbs()
    _add_train(actions)
    _add_extend(actions)
    _add_export(actions)
    _add_compare(actions)
    _add_slim(actions)
    _add_show(actions)


def _add_train(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("train", help="train a byte-level BPE tokenizer")
    _add_training(parser)
    parser.set_defaults(run=_train)


def _add_extend(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "extend",
        help="train a tokenizer that begins with the tokens of another one",
        description="Train a tokenizer that begins with the tokens of another one, in their order.",
    )
    parser.add_argument("base", metavar="BASE", help="a tokenizer folder, or a file of ranks (cl100k_base.tiktoken)")
    _add_training(parser)
    parser.add_argument("--drop-multi-digit", action="store_true", help="drop tokens with more than one digit first")
    parser.add_argument(
        "--special-token", action="append", default=[], type=utf8, metavar="TEXT", help="one more special token"
    )
    parser.set_defaults(run=_extend)


def _add_training(parser: argparse.ArgumentParser) -> None:
    add_input(parser)
    parser.add_argument("--vocab-size", type=POSITIVE, required=True, metavar="V", help="special tokens included")
    parser.add_argument("--num-workers", type=POSITIVE, metavar="N", help="processes; default: one for each processor")


def _train(arguments: argparse.Namespace) -> int:
    from jaxllm.tokenizers.train import Base

    return _train_on(Base(), arguments)


def _extend(arguments: argparse.Namespace) -> int:
    from jaxllm.tokenizers.extend import read_base, with_special_tokens, without_multi_digit_tokens

    base = read_base(arguments.base)
    if arguments.drop_multi_digit:
        smaller = without_multi_digit_tokens(base)
        num_dropped = len(base.tokens) - len(smaller.tokens)
        print(f"{arguments.base}: {num_dropped:,} of {len(base.tokens):,} tokens have several digits and are dropped")
        base = smaller
    return _train_on(with_special_tokens(base, arguments.special_token), arguments)


def _train_on(base: Base, arguments: argparse.Namespace) -> int:
    from jaxllm.data.piece_counts import usable_cpus
    from jaxllm.data.train_tokenizer import train_from_files

    with (
        show_progress("{:,} documents, {:,} bytes read") as reading,
        show_progress("{:,} of {:,} merges") as progress,
    ):
        summary = train_from_files(
            arguments.input,
            vocab_size=arguments.vocab_size,
            output=arguments.output,
            base=base,
            text_key=arguments.text_key,
            num_workers=arguments.num_workers or usable_cpus(),
            reading=reading,
            progress=progress,
        )
    print(
        f"{arguments.output}: {arguments.vocab_size:,} tokens from {summary.num_documents:,} documents, "
        f"{summary.num_bytes:,} bytes; {summary.bytes_per_token:.3f} bytes per token; {summary.seconds:.1f} s"
    )
    if summary.num_unreachable:
        print(f"{summary.num_unreachable:,} tokens are not made by any merge; only text that equals them uses them")
    return EXIT_OK


def _add_export(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "export",
        help="write a tokenizer as tokenizer.json",
        description="Write a byte-level BPE tokenizer as tokenizer.json, as transformers and most servers read it.",
    )
    parser.add_argument("tokenizer", metavar="TOKENIZER")
    parser.add_argument("target", metavar="TARGET", help="a folder (gets tokenizer_config.json too), or OUT.json")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from jaxllm.checkpoint.opened import open_tokenizer
    from jaxllm.tokenizers.export import export_tokenizer

    for path in export_tokenizer(open_tokenizer(arguments.tokenizer), arguments.target):
        print(path)
    return EXIT_OK


def _add_compare(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("compare", help="show how well tokenizers compress text, by file or by language")
    parser.add_argument("--tokenizer", action="append", required=True, metavar="TOKENIZER", help="may be repeated")
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, globs or folders of text")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="text field of jsonl and parquet rows")
    parser.add_argument("--by", metavar="KEY", help='field to group rows by, "lang" for instance; default: by file')
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from jaxllm.checkpoint.opened import open_tokenizer
    from jaxllm.data.compression import compare_tokenizers, total_of

    tokenizers = [open_tokenizer(path) for path in arguments.tokenizer]
    with show_progress("{:,} documents, {:,} bytes") as progress:
        groups = compare_tokenizers(
            tokenizers, arguments.input, text_key=arguments.text_key, group_key=arguments.by, progress=progress
        )
    for k, (path, tokenizer) in enumerate(zip(arguments.tokenizer, tokenizers, strict=True), 1):
        print(f"[{k}] {path}: {tokenizer.vocab_size:,} tokens")
    numbers = range(1, len(tokenizers) + 1)
    rows = [["", "bytes", *(f"bytes/token [{k}]" for k in numbers), *(f"tokens/character [{k}]" for k in numbers)]]
    rows += [_row(name, group) for name, group in groups.items()]
    if len(groups) > 1:
        rows.append(_row("all", total_of(list(groups.values()))))
    _print_table(rows)
    return EXIT_OK


def _row(name: str, group: Compression) -> list[str]:
    ratios = [*group.bytes_per_token(), *group.tokens_per_character()]
    return [name, f"{group.num_bytes:,}", *(f"{ratio:.3f}" for ratio in ratios)]


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        shown = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *shown]))


def _add_slim(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "slim",
        help="drop token ids from a published checkpoint",
        description="Write a published checkpoint anew without some token ids: rows of its embedding and its head, ids "
        "in its configs, tokens of its tokenizer. The other ids are numbered anew in their order.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json and safetensors")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--drop", type=_id_range, metavar="FIRST:END", help="the ids to drop, END not included")
    what.add_argument("--unused", nargs="+", metavar="FILE", help="drop the ids that this text does not need")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="text field of jsonl and parquet rows")
    parser.set_defaults(run=_slim)


def _id_range(text: str) -> range:
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"expected FIRST:END with FIRST below END, found {text!r}")
    return range(int(first), int(end))


def _slim(arguments: argparse.Namespace) -> int:
    from jaxllm.checkpoint.slim import slim_checkpoint

    keep = None if arguments.unused is None else _needed_ids(arguments)
    summary = slim_checkpoint(arguments.model, arguments.output, drop=arguments.drop, keep=keep)
    print(f"{arguments.output}: {summary.rows_after:,} of {summary.rows_before:,} ids")
    print(summary.tokenizer)
    return EXIT_OK


def _needed_ids(arguments: argparse.Namespace) -> set[int]:
    from jaxllm.checkpoint.opened import open_tokenizer
    from jaxllm.data.used_ids import used_ids
    from jaxllm.errors import InputError
    from jaxllm.tokenizers.shrink import with_parts
    from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE

    tokenizer = open_tokenizer(arguments.model)
    if not isinstance(tokenizer, TiktokenBPE):
        raise InputError(f"{arguments.model}: --unused needs a byte-level BPE tokenizer, which this folder has not")
    with show_progress("{:,} documents, {:,} ids used") as progress:
        used = used_ids(tokenizer, arguments.unused, text_key=arguments.text_key, progress=progress)
    return with_parts(tokenizer, used)


def _add_show(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("show", help="show a tokenizer and how it cuts a text")
    parser.add_argument("tokenizer", metavar="DIR")
    parser.add_argument("text", nargs="?", type=utf8, metavar="TEXT")
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> int:
    from jaxllm.checkpoint.opened import open_tokenizer

    tokenizer = open_tokenizer(arguments.tokenizer)
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
