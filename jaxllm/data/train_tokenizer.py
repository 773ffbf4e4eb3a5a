"""Train a tokenizer on text files: what `jaxllm tokenizer train` and `extend` do."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from jaxllm.data.piece_counts import count_pieces_of_files
from jaxllm.files import require_new_folder
from jaxllm.tokenizers.merges import unreachable
from jaxllm.tokenizers.train import Base, Progress, check_vocab_size, encoder_of_pieces, train_on_pieces


@dataclasses.dataclass(frozen=True)
class TokenizerSummary:
    """What a tokenizer was trained on and how it does there.

    Attributes:
      num_documents, num_bytes: size of the text (UTF-8).
      bytes_per_token: bytes of the text over its tokens.
      num_unreachable: tokens that no merge makes, because the base lacks their parts; only a piece that equals such
        a token is encoded as it.
      seconds: wall time.
    """

    num_documents: int
    num_bytes: int
    bytes_per_token: float
    num_unreachable: int
    seconds: float


def train_from_files(
    paths: Sequence[str | PathLike[str]],
    *,
    vocab_size: int,
    output: str | PathLike[str],
    base: Base | None = None,
    text_key: str = "text",
    num_workers: int = 1,
    reading: Progress | None = None,
    progress: Progress | None = None,
) -> TokenizerSummary:
    """Train a byte-level BPE tokenizer on files (once read, never held in memory) and save it as a folder.

    Args:
      paths: files, globs or folders that `jaxllm.data.sources` can read.
      vocab_size: number of ids, special tokens included.
      output: the folder to write; it must not exist, or be empty.
      base: what to start from; default: the bytes, see `jaxllm.tokenizers.train.Base`.
      text_key: name of the text field in jsonl and parquet rows.
      num_workers: processes that cut the text into pieces; more than 1 needs `if __name__ == "__main__":` in scripts.
      reading: called as `reading(documents read, bytes read)`.
      progress: called as `progress(merges done, merges wanted)`.

    Raises:
      InputError: a bad file or row, an output folder that holds something, or a vocab_size the text cannot give.
    """
    started = time.perf_counter()
    output, base = Path(output), base or Base()
    require_new_folder(output)
    check_vocab_size(vocab_size, base)
    counted = count_pieces_of_files(
        paths,
        pattern=base.pattern,
        normalization=base.normalization,
        text_key=text_key,
        num_workers=num_workers,
        progress=reading,
    )
    tokenizer = train_on_pieces(counted.pieces, vocab_size=vocab_size, base=base, progress=progress)
    tokenizer.save(output)
    return TokenizerSummary(
        num_documents=counted.num_documents,
        num_bytes=counted.num_bytes,
        bytes_per_token=counted.num_bytes / _count_tokens(counted.pieces, tokenizer.tokens),
        num_unreachable=len(unreachable(tokenizer.tokens)),
        seconds=time.perf_counter() - started,
    )


def _count_tokens(pieces: Mapping[str, int], tokens: Sequence[bytes]) -> int:
    encode = encoder_of_pieces(tokens)
    return sum(count * len(encode(piece)) for piece, count in pieces.items())
