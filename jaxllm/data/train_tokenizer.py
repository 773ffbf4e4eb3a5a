"""Train a tokenizer on text files: what `jaxllm tokenizer train` does."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

from jaxllm.data.sources import BadRows, read_documents
from jaxllm.errors import InputError
from jaxllm.tokenizers.train import Progress, train_bpe


@dataclasses.dataclass(frozen=True)
class TokenizerSummary:
    """What a tokenizer was trained on and how it does there.

    Attributes:
      num_documents, num_bytes: size of the text (UTF-8).
      bytes_per_token: bytes of the text over its tokens.
      seconds: wall time.
    """

    num_documents: int
    num_bytes: int
    bytes_per_token: float
    seconds: float


def train_from_files(
    paths: Sequence[str | PathLike[str]],
    *,
    vocab_size: int,
    output: str | PathLike[str],
    text_key: str = "text",
    progress: Progress | None = None,
) -> TokenizerSummary:
    """Train a byte-level BPE tokenizer on files (twice read, never held in memory) and save it as a folder.

    Args:
      paths: files, globs or folders that `jaxllm.data.sources` can read.
      vocab_size: number of ids, special tokens included.
      output: the folder to write; it must not exist, or be empty.
      text_key: name of the text field in jsonl and parquet rows.
      progress: called as `progress(merges done, merges wanted)`.

    Raises:
      InputError: a bad file or row, an output folder that holds something, or a vocab_size the text cannot give.
    """
    started = time.perf_counter()
    output = Path(output)
    _refuse_used(output)
    tokenizer = train_bpe(_texts(paths, text_key), vocab_size=vocab_size, progress=progress)
    num_documents = num_bytes = num_tokens = 0
    for text in _texts(paths, text_key):
        num_documents += 1
        num_bytes += len(text.encode())
        num_tokens += len(tokenizer.encode_to_numpy(text))
    tokenizer.save(output)
    seconds = time.perf_counter() - started
    return TokenizerSummary(num_documents, num_bytes, bytes_per_token=num_bytes / num_tokens, seconds=seconds)


def _refuse_used(output: Path) -> None:
    if output.is_dir():
        if any(output.iterdir()):
            raise InputError(f"{output}: the output folder is not empty; expected a new or empty folder")
    elif output.exists():
        raise InputError(f"{output}: found a file, expected a new or empty folder for the tokenizer")


def _texts(paths: Sequence[str | PathLike[str]], text_key: str) -> Iterator[str]:
    for path in paths:
        for document in read_documents(path, text_key=text_key, bad_rows=BadRows()):
            yield document.text
