"""The files of an example set, as they lie on disk.

An example set is a folder: index.json (see `ExampleIndex`) and plain .npy files. tokens.npy is int32 [tokens, 2], the
ids and labels of all examples one after the other; examples.npy is int64 [examples, 4]: where the example ends there,
the number of its source file in the index, its line, and where its row ends in rows.npy. The two answers of a pair are
two examples, the chosen one first; margins.npy is float32 [pairs, 2]: how much better it is as a number, and as a label
(its place in `rows.MARGIN_LABELS`), NaN where there is none. rows.npy is uint8: prompts' rows as JSON, in UTF-8.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from jaxllm.data.examples import Tokens
from jaxllm.data.index_files import NpyWriter
from jaxllm.data.rows import MARGIN_LABELS, Example, Pair, Prompt
from jaxllm.errors import InputError

FORMAT = "jaxllm-examples"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class ExampleIndex:
    """What index.json says.

    Attributes:
      purpose: "sft", "preference" or "prompt".
      num_examples: of a set of pairs twice their number.
      num_trained: predictions that are trained.
      num_row_bytes: of rows.npy.
      tokenizer: fingerprint of the tokenizer.
      sources: names of the files that the examples came from.
      left_out, cut: how many rows had too many tokens and were left out, or cut.
      bad_rows, bad_row_examples: how many rows were skipped, and the first of them.
    """

    purpose: str
    num_examples: int
    num_tokens: int
    num_trained: int
    num_row_bytes: int
    tokenizer: str
    sources: list[str]
    left_out: int
    cut: int
    bad_rows: int
    bad_row_examples: list[str]


class ExampleWriter:
    """Write the arrays of an example set; a context manager, so that the files get closed on errors."""

    def __init__(self, folder: Path):
        self._tokens = NpyWriter(folder / "tokens.npy", "int32", (2,))
        self._examples = NpyWriter(folder / "examples.npy", "int64", (4,))
        self._margins = NpyWriter(folder / "margins.npy", "float32", (2,))
        self._rows = NpyWriter(folder / "rows.npy", "uint8", ())
        self.num_trained = 0

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._all:
            writer.file.close()

    @property
    def num_examples(self) -> int:
        """Examples so far."""
        return self._examples.length

    @property
    def num_tokens(self) -> int:
        """Their tokens."""
        return self._tokens.length

    @property
    def num_row_bytes(self) -> int:
        """Bytes of the rows that are kept."""
        return self._rows.length

    def add(self, encoded: list[Tokens], example: Example, source: int, line: int, system: str | None) -> None:
        """Append the examples of a row, if any."""
        if encoded and isinstance(example, Prompt):
            self._rows.append(np.frombuffer(_as_json({"row": example.row, "system": system}), np.uint8))
        if encoded and isinstance(example, Pair):
            self._margins.append([_margin(example.margin)])
        for tokens in encoded:
            self._tokens.append(np.stack(tokens, axis=1))
            self._examples.append([[self._tokens.length, source, line, self._rows.length]])
            self.num_trained += tokens.num_trained

    def finish(self) -> None:
        """Put all files on the disk."""
        for writer in self._all:
            writer.finish()

    @property
    def _all(self) -> tuple[NpyWriter, ...]:
        return self._tokens, self._examples, self._margins, self._rows


def _as_json(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise InputError(f"the row cannot be kept as JSON: {error}") from error


def _margin(margin: float | str | None) -> tuple[float, float]:
    if isinstance(margin, str):
        return math.nan, MARGIN_LABELS.index(margin)
    return (math.nan if margin is None else margin), math.nan


def check_examples(path: Path, examples: np.ndarray, index: ExampleIndex) -> None:
    """Raise InputError unless int64 [examples, 4] fits the tokens, rows and sources."""
    for column, total in ((0, index.num_tokens), (3, index.num_row_bytes)):
        ends = examples[:, column]
        if not len(ends) or ends[0] < 0 or ends[-1] != total or (np.diff(ends) < 0).any():
            raise InputError(f"{path}: damaged: column {column} must rise to {total}")
    if not 0 <= examples[:, 1].min() <= examples[:, 1].max() < len(index.sources):
        raise InputError(f"{path}: damaged: names source files beyond the {len(index.sources)} of the index")
