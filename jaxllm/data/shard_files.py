"""The files of a token shard set, as they lie on disk: written in constant memory, checked when opened.

A shard set is a folder: index.json (see `ShardIndex`), and for each shard two plain .npy files. tokens-NNNNN.npy
holds the ids of all documents one after the other, without special tokens; documents-NNNNN.npy is int64 [documents, 3]:
where the document ends in the tokens, the number of its source file in the index, its line there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from jaxllm.data.index_files import NpyWriter, from_json, read_json, write_json
from jaxllm.errors import InputError

FORMAT = "jaxllm-tokens"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """One pair of .npy files."""

    tokens: str
    documents: str
    num_tokens: int
    num_documents: int


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """What index.json says.

    Attributes:
      dtype: "uint16" or "uint32", that of the tokens.
      vocab_size: of the tokenizer; every id is below it.
      tokenizer: fingerprint of the tokenizer.
      num_bytes: UTF-8 bytes of the documents' text.
      sources: names of the files the documents came from.
      bad_rows, bad_row_examples: how many rows were skipped, and the first of them.
    """

    dtype: str
    vocab_size: int
    tokenizer: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    sources: list[str]
    bad_rows: int
    bad_row_examples: list[str]
    shards: list[Shard]


def read_index(path: Path) -> ShardIndex:
    """Read and check index.json; raises InputError when it is missing, damaged or of another format."""
    index = read_json(path, FORMAT, VERSION, "a folder of token shards")
    shards = index.get("shards")
    if not isinstance(shards, list):
        raise InputError(f"{path}: 'shards' is missing or not a list")
    index["shards"] = [from_json(Shard, shard, f"{path}: shards[{n}]") for n, shard in enumerate(shards)]
    return _checked_index(path, from_json(ShardIndex, index, str(path)))


def _checked_index(path: Path, index: ShardIndex) -> ShardIndex:
    if index.dtype not in ("uint16", "uint32"):
        raise InputError(f"{path}: dtype is {index.dtype!r}, expected 'uint16' or 'uint32'")
    for total in ("num_tokens", "num_documents"):
        parts = sum(getattr(shard, total) for shard in index.shards)
        if parts != getattr(index, total):
            raise InputError(f"{path}: {total} is {getattr(index, total)}, but the shards' sum is {parts}")
    for name in (name for shard in index.shards for name in (shard.tokens, shard.documents)):
        if Path(name).name != name:
            raise InputError(f"{path}: {name!r} is no plain file name")
    return index


def check_documents(path: Path, rows: np.ndarray, num_tokens: int, num_sources: int) -> None:
    """Raise InputError unless int64 [documents, 3] fits the shard's tokens and the index's sources."""
    ends = rows[:, 0]
    if len(rows) and (ends[0] < 0 or ends[-1] != num_tokens or (np.diff(ends) < 0).any()):
        raise InputError(f"{path}: damaged: document ends must rise to {num_tokens}, the number of tokens")
    if len(rows) and not 0 <= rows[:, 1].min() <= rows[:, 1].max() < num_sources:
        raise InputError(f"{path}: damaged: names source files beyond the {num_sources} of the index")


def write_index(path: Path, index: ShardIndex) -> None:
    """Write index.json."""
    write_json(path, FORMAT, VERSION, index)


class ShardWriter:
    """Deal documents to shards of about `shard_tokens`; a context manager, so that the files get closed on errors."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int):
        self._folder = folder
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._open: tuple[NpyWriter, NpyWriter] | None = None
        self.num_documents = 0
        self.num_tokens = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._open or ():
            writer.file.close()

    def add(self, ids: np.ndarray, source: int, line: int) -> None:
        """Append the ids of one document, and where it came from."""
        if self._open and self._open[0].length + len(ids) > self._shard_tokens:
            self._finish_shard()
        tokens, documents = self._open = self._open or self._new_shard()
        tokens.append(ids)
        documents.append([[tokens.length, source, line]])
        self.num_documents += 1
        self.num_tokens += len(ids)

    def finish(self) -> list[Shard]:
        """Close the last shard and return all of them."""
        if self._open:
            self._finish_shard()
        return self._shards

    def _new_shard(self) -> tuple[NpyWriter, NpyWriter]:
        number = f"{len(self._shards):05}.npy"
        return (
            NpyWriter(self._folder / f"tokens-{number}", self._dtype, ()),
            NpyWriter(self._folder / f"documents-{number}", "int64", (3,)),
        )

    def _finish_shard(self) -> None:
        tokens, documents = self._open
        tokens.finish()
        documents.finish()
        self._shards.append(Shard(tokens.path.name, documents.path.name, tokens.length, documents.length))
        self._open = None
