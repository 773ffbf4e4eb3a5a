"""What `jaxllm data check` finds in example files before a run reads them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.config.schema import SourceConfig
from jaxllm.data.examples import Encoder, Tokens, TooLong, fit, read_examples
from jaxllm.data.rows import Dialogue, Example, Pair, Prompt, Purpose
from jaxllm.data.sources import BadRows, find_files
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.chat import IGNORED

UNCUT = 2**30
"""Tokens of a row where none is too long."""


class Sample(NamedTuple):
    """One row as the model would see it; `tokens` has two entries for a pair."""

    origin: str
    tokens: list[Tokens]


@dataclasses.dataclass
class Report:
    """What was found.

    Attributes:
      kinds: number of good rows by kind.
      lengths: tokens of each row (of a pair: of both answers with their prompts; of a text: of its pieces); empty
        without a tokenizer.
      num_trained: predictions that are trained.
      without_stop: trained examples that do not teach where the assistant stops.
      repeats: rows that hold the same as an earlier one.
      first_repeats: the first few, with the rows that they repeat.
      too_long: rows with more tokens than a row of the run.
      sample: the first good row.
    """

    bad_rows: BadRows
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    lengths: list[int] = dataclasses.field(default_factory=list)
    num_trained: int = 0
    without_stop: int = 0
    repeats: int = 0
    first_repeats: list[str] = dataclasses.field(default_factory=list)
    too_long: int = 0
    sample: Sample | None = None

    @property
    def num_rows(self) -> int:
        """Good rows."""
        return self.kinds.total()


def check_examples(
    sources: Sequence[SourceConfig],
    purpose: Purpose | None,
    encoder: Encoder | None,
    *,
    seq_len: int | None = None,
    too_long: TooLong = "skip",
    max_bad_rows: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read all rows of some sources, bad ones too, and encode them if there is an encoder.

    Args:
      purpose: what the rows are for; None: whatever they are.
      too_long: "refuse" makes rows of more than `seq_len` tokens bad ones.
      max_bad_rows: what the report's budget is; rows beyond it are counted, not refused.
      progress: called as `progress(good rows, bad rows)`.

    Raises:
      InputError: a file is missing or damaged, or its first row is of no known or useful kind.
    """
    report = Report(BadRows(sys.maxsize))
    seen: dict[bytes, str] = {}
    for source in sources:
        for file, format in find_files(source.path, source.format):
            for row in read_examples(file, format, source, purpose, report.bad_rows):
                origin = f"{file}:{row.line}"
                with report.bad_rows.from_errors(origin):
                    if encoder is not None:
                        _count_tokens(report, row.example, encoder, seq_len or UNCUT, too_long, origin)
                    report.kinds[row.kind] += 1
                    _count_repeat(report, seen, row.example, origin)
                if progress:
                    progress(report.num_rows, report.bad_rows.count)
    report.bad_rows.budget = max_bad_rows
    return report


def rows_of_epoch(lengths: Sequence[int], seq_len: int, most_items: int | None) -> int:
    """Return how many rows the items of one epoch fill in their order, without those that are too long."""
    rows, filled, items = 0, seq_len, 0
    for length in lengths:
        if length > seq_len:
            continue
        if filled + length > seq_len or items == most_items:
            rows, filled, items = rows + 1, 0, 0
        filled, items = filled + length, items + 1
    return rows


def marked_runs(tokenizer: Tokenizer, tokens: Tokens) -> Iterator[tuple[str, bool]]:
    """Yield the text of an example in runs, each with whether it is trained; "a→b" learns b in the place of a."""
    is_trained = (tokens.labels != IGNORED) & (np.arange(len(tokens.ids)) > 0)
    differs = is_trained & (tokens.labels != tokens.ids)
    begin = 0
    for end in range(1, len(tokens.ids) + 1):
        alone = differs[begin] or (end < len(tokens.ids) and differs[end])
        if end < len(tokens.ids) and is_trained[end] == is_trained[begin] and not alone:
            continue
        text = tokenizer.decode(tokens.ids[begin:end].tolist())
        learned = f"→{tokenizer.decode([int(tokens.labels[begin])])}" if differs[begin] else ""
        yield text + learned, bool(is_trained[begin])
        begin = end


def _count_tokens(
    report: Report, example: Example, encoder: Encoder, seq_len: int, too_long: TooLong, origin: str
) -> None:
    encoded = encoder.encode(example, seq_len)
    if too_long == "refuse":
        fit(encoded, example, seq_len, too_long)
    sizes = [len(tokens.ids) for tokens in encoded]
    sizes = [sum(sizes)] if isinstance(example, Pair) else sizes
    report.lengths += sizes
    report.too_long += sum(size > seq_len for size in sizes)
    report.num_trained += sum(tokens.num_trained for tokens in encoded)
    if isinstance(example, Dialogue | Pair):
        stops = encoder.stop_ids()
        report.without_stop += not all(np.isin(tokens.labels, stops).any() for tokens in encoded)
    if report.sample is None:
        report.sample = Sample(origin, encoded)


def _count_repeat(report: Report, seen: dict[bytes, str], example: Example, origin: str) -> None:
    held = example._replace(row=None) if isinstance(example, Prompt) else example
    key = hashlib.sha256(json.dumps(held, default=str).encode()).digest()[:16]
    first = seen.setdefault(key, origin)
    if first != origin:
        report.repeats += 1
        if report.repeats <= BadRows.KEPT_EXAMPLES:
            report.first_repeats.append(f"{origin} repeats {first}")
