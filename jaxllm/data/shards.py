"""Token shards, the one form that training reads: how they are opened, and how text becomes them."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config.schema import SourceConfig
from jaxllm.data.index_files import INDEX, open_array
from jaxllm.data.shard_files import FORMAT, VERSION, ShardIndex, ShardWriter, check_documents, read_index, write_index
from jaxllm.data.sources import BadRows, find_files, read_file
from jaxllm.errors import InputError
from jaxllm.files import OutputExistsError, new_folder
from jaxllm.tokenizers.base import Tokenizer

Progress = Callable[[int, int], None]
"""Called after each document with the documents and tokens written so far."""


class ShardSet:
    """Read-only view of a shard set; documents are numbered from 0 through all shards."""

    def __init__(self, folder: Path, index: ShardIndex, tokens: list[np.ndarray], documents: list[np.ndarray]):
        self.folder = folder
        self.index = index
        self._tokens = tokens
        self._documents = documents
        self._ends = list(itertools.accumulate(map(len, documents)))

    @classmethod
    def open(cls, folder: str | os.PathLike) -> ShardSet:
        """Map the shards of a folder into memory and check that they are what the index says.

        Raises:
          InputError: a file is missing, truncated, damaged or not of this format.
        """
        folder = Path(folder).expanduser()
        index = read_index(folder / INDEX)
        tokens = [open_array(folder / s.tokens, index.dtype, (s.num_tokens,)) for s in index.shards]
        documents = [open_array(folder / s.documents, "int64", (s.num_documents, 3)) for s in index.shards]
        for shard, rows in zip(index.shards, documents, strict=True):
            check_documents(folder / shard.documents, rows, shard.num_tokens, len(index.sources))
        if not index.num_documents:
            raise InputError(f"{folder}: the shards hold no documents")
        return cls(folder, index, tokens, documents)

    def __len__(self) -> int:
        return self.index.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, without special ones."""
        return self.index.num_tokens

    def summary(self) -> str:
        """Say how much there is and what was left out."""
        skipped = f", {self.index.bad_rows} bad rows skipped" if self.index.bad_rows else ""
        return f"{len(self):,} documents, {self.num_tokens:,} tokens{skipped}"

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return self.index.num_bytes

    def size(self) -> dict[str, int]:
        """Return what tells these shards from others of another text."""
        return {"documents": len(self), "tokens": self.num_tokens, "bytes": self.num_bytes}

    def tokens(self, document: int) -> np.ndarray:
        """Return the ids of one document, uint16 or uint32 [n], without special tokens and without a copy."""
        shard, row = self._locate(document)
        ends = self._documents[shard]
        return self._tokens[shard][ends[row - 1, 0] if row else 0 : ends[row, 0]]

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each document, int64 [documents]."""
        return np.concatenate([np.diff(rows[:, 0], prepend=0) for rows in self._documents])

    def origin(self, document: int) -> str:
        """Say where a document came from: "file:line"."""
        shard, row = self._locate(document)
        _, source, line = self._documents[shard][row]
        return f"{self.index.sources[source]}:{line}"

    def _locate(self, document: int) -> tuple[int, int]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        shard = bisect.bisect_right(self._ends, document)
        return shard, document - (self._ends[shard - 1] if shard else 0)


def tokenize_files(
    paths: Sequence[str | os.PathLike],
    tokenizer: Tokenizer,
    output: str | os.PathLike,
    *,
    format: str = "auto",
    text_key: str = "text",
    max_bad_rows: int = 0,
    shard_tokens: int = 2**27,
    progress: Progress | None = None,
) -> ShardIndex:
    """Write the documents of files, globs and folders as a shard set, all of it or nothing.

    Args:
      output: the new folder; it may exist if it is empty.
      format: see `sources.find_files`. text_key: the field or column that holds the text.
      max_bad_rows: rows that may be skipped before the data is refused.
      shard_tokens: tokens after which a new shard begins; a document is never split.

    Raises:
      InputError: the output exists, the input is bad, or the output cannot be written.
    """
    output = Path(output).expanduser().absolute()
    files = [file for path in paths for file in find_files(path, format)]
    bad_rows = BadRows(max_bad_rows)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    with new_folder(output) as folder, ShardWriter(folder, dtype, shard_tokens) as writer:
        num_bytes = 0
        for source, (file, file_format) in enumerate(files):
            for document in read_file(file, file_format, text_key=text_key, bad_rows=bad_rows):
                ids = tokenizer.encode_to_numpy(document.text)
                _check_ids(ids, tokenizer.vocab_size, document.file, document.line)
                writer.add(ids, source, document.line)
                num_bytes += len(document.text.encode())
                if progress:
                    progress(writer.num_documents, writer.num_tokens)
        if not writer.num_documents:
            raise InputError(f"{', '.join(map(str, paths))}: no documents; {bad_rows.summary()}")
        index = ShardIndex(
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint,
            num_documents=writer.num_documents,
            num_tokens=writer.num_tokens,
            num_bytes=num_bytes,
            sources=[str(file) for file, _ in files],
            bad_rows=bad_rows.count,
            bad_row_examples=bad_rows.examples,
            shards=writer.finish(),
        )
        write_index(folder / INDEX, index)
    return index


def prepare_source(
    source: SourceConfig,
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike,
    *,
    max_bad_rows: int = 0,
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> ShardSet:
    """Open a source of any format as token shards, tokenising text the first time.

    Text is kept below `cache_dir` under a key of the files' names, sizes and times, how they are read, and the
    tokenizer, so that a change of any of these makes a new copy. Processes that share a cache may do this at once.

    Args:
      scratch: where a copy that `cache_dir` does not have yet is made in its place.

    Raises:
      InputError: the source is bad, or its shards were made with another tokenizer.
    """
    path = Path(source.path).expanduser()
    if source.format == "shards" or (source.format == "auto" and (path / INDEX).is_file()):
        shards = ShardSet.open(path)
        if shards.index.tokenizer != tokenizer.fingerprint:
            raise InputError(
                f"{path}: the shards were made with another tokenizer: found fingerprint "
                f"{shards.index.tokenizer[:12]}..., expected this tokenizer's {tokenizer.fingerprint[:12]}..."
            )
        return shards
    cached = find_cached(cache_dir, cache_key(source, tokenizer, FORMAT, VERSION), scratch)
    with contextlib.suppress(OutputExistsError):
        tokenize_files(
            [source.path],
            tokenizer,
            cached,
            format=source.format,
            text_key=source.text_key,
            max_bad_rows=max_bad_rows,
            progress=progress,
        )
    shards = ShardSet.open(cached)
    # The copy may stem from a run that allowed more.
    bad_rows = BadRows(max_bad_rows, shards.index.bad_rows, shards.index.bad_row_examples)
    bad_rows.check()
    return shards


def remove_partial(cache_dir: Path) -> None:
    """Remove what killed processes left half-written; none may be writing there now."""
    for path in cache_dir.glob(".*"):
        shutil.rmtree(path)


def cache_key(source: SourceConfig, tokenizer: Tokenizer, *how: Any) -> str:
    """Return a name for what a source becomes: it changes with its files, the tokenizer and how it is read."""
    files = find_files(source.path, source.format)
    stats = [(str(file.absolute()), kind, file.stat().st_size, file.stat().st_mtime_ns) for file, kind in files]
    key = json.dumps([*how, stats, source.text_key, tokenizer.fingerprint])
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def find_cached(cache_dir: str | os.PathLike, key: str, scratch: Path | None) -> Path:
    """Return where a prepared source lies or is to be made: below `scratch`, if given, unless the cache has it."""
    cached = Path(cache_dir) / key
    return cached if scratch is None or cached.exists() else scratch / key


def _check_ids(ids: np.ndarray, vocab_size: int, file: str, line: int) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise InputError(f"{file}:{line}: the tokenizer made the id {wrong}, outside its vocabulary of {vocab_size}")
