"""How well tokenizers compress text, by language or by file: what `jaxllm tokenizer compare` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from os import PathLike

from jaxllm.data.sources import BadRows, find_files, read_file
from jaxllm.tokenizers import Tokenizer
from jaxllm.tokenizers.train import Progress


@dataclasses.dataclass
class Compression:
    """The size of some text.

    Attributes:
      num_bytes, num_characters: UTF-8 bytes and code points, before normalization.
      num_tokens: tokens of each tokenizer.
    """

    num_bytes: int
    num_characters: int
    num_tokens: list[int]

    def bytes_per_token(self) -> list[float]:
        """Return how many bytes a token of each tokenizer stands for."""
        return [self.num_bytes / count for count in self.num_tokens]

    def tokens_per_character(self) -> list[float]:
        """Return how many tokens of each tokenizer a character takes."""
        return [count / self.num_characters for count in self.num_tokens]


def compare_tokenizers(
    tokenizers: Sequence[Tokenizer],
    paths: Sequence[str | PathLike[str]],
    *,
    text_key: str = "text",
    group_key: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Compression]:
    """Measure tokenizers on the documents of files, by group, in the order in which the groups turn up.

    Args:
      paths: files, globs or folders that `jaxllm.data.sources` can read.
      group_key: field of jsonl and parquet rows that names the group, "lang" for instance; None groups by file.
        A txt file has no fields and is a group of its own.
      progress: called as `progress(documents, bytes)`.

    Raises:
      InputError: a bad file or row, among them rows without the group's field.
    """
    groups: dict[str, Compression] = {}
    num_documents = num_bytes = 0
    for path in paths:
        for group, text in _grouped_texts(path, text_key, group_key):
            total = groups.setdefault(group, Compression(0, 0, [0] * len(tokenizers)))
            size = len(text.encode())
            total.num_bytes += size
            total.num_characters += len(text)
            for k, tokenizer in enumerate(tokenizers):
                total.num_tokens[k] += len(tokenizer.encode_to_numpy(text))
            num_documents, num_bytes = num_documents + 1, num_bytes + size
            if progress:
                progress(num_documents, num_bytes)
    return groups


def total_of(groups: Sequence[Compression]) -> Compression:
    """Add up groups, of which there is at least one."""
    return Compression(
        sum(group.num_bytes for group in groups),
        sum(group.num_characters for group in groups),
        [sum(counts) for counts in zip(*(group.num_tokens for group in groups), strict=True)],
    )


def _grouped_texts(path: str | PathLike[str], text_key: str, group_key: str | None) -> Iterator[tuple[str, str]]:
    for file, format in find_files(path):
        documents = read_file(file, format, text_key=text_key, bad_rows=BadRows())
        if group_key is None or format == "txt":
            yield from ((str(file), document.text) for document in documents)
            continue
        groups = read_file(file, format, text_key=group_key, bad_rows=BadRows())
        yield from ((group.text, document.text) for group, document in zip(groups, documents, strict=True))
