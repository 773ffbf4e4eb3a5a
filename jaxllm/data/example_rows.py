"""Examples to rows of a fixed length. An example of n ids takes n slots of one row and is never cut.

Slot t of an example predicts its id t + 1; its last slot predicts nothing. Packed examples are segments of their row
that do not see each other, with positions of their own, so that packing changes no loss.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import grain
import numpy as np

from jaxllm.data.example_set import ExampleSet
from jaxllm.data.examples import Places, Tokens
from jaxllm.data.packing import Row, empty_row
from jaxllm.data.rows import MARGIN_LABELS, Purpose
from jaxllm.errors import InputError
from jaxllm.tokenizers.chat import IGNORED

Margins = Literal["none", "small", "large", "data"]

LABEL_MARGINS = {"small": (1.0, 2 / 3, 1 / 3, 0.0), "large": (3.0, 2.0, 1.0, 0.0)}
"""Margins of `rows.MARGIN_LABELS` (Llama 2, arXiv:2307.09288 table 27)."""


LEVELS = (*MARGIN_LABELS, "quarter1", "quarter2", "quarter3", "quarter4")
"""How much better an answer is said to be: by a label, or by the quarter of its source's numbers, smallest first."""


class Item(NamedTuple):
    """What goes into a row as a whole: a conversation, a prompt, or the two answers of a pair.

    Attributes:
      margin: see `PreferenceRows`. level: place in `LEVELS`; -1: nothing is said.
    """

    document: int
    examples: list[Tokens]
    margin: float = 0.0
    level: int = -1

    @property
    def num_slots(self) -> int:
        """Slots that it takes."""
        return sum(len(tokens.ids) for tokens in self.examples)


class Items:
    """The items of an example set, by number and in order; documents are numbered from `first_document` on."""

    def __init__(self, examples: ExampleSet, margins: np.ndarray, levels: np.ndarray, first_document: int = 0):
        self._examples = examples
        self._margins = margins
        self._levels = levels
        self._first_document = first_document

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def num_pairs(self) -> int:
        """What the set's share of a mixture is measured by: tokens, or prompts."""
        return len(self) if self._examples.purpose == "prompt" else self._examples.index.num_tokens

    def __getitem__(self, index: int) -> Item:
        number, tokens = self._first_document + index, self._examples.tokens(index)
        if not len(self._margins):
            return Item(number, tokens)
        return Item(number, tokens, float(self._margins[index]), int(self._levels[index]))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ExampleRows:
    """How conversations become rows.

    Attributes:
      places: how the model counts the places of an example.
      packed: as many examples to a row as have room, in their order; else one.
    """

    purpose: ClassVar[Purpose] = "sft"

    places: Places
    packed: bool = True

    @property
    def most_items(self) -> int | None:
        """Items that a row may have; None: as many as have room."""
        return None if self.packed else 1

    def describe(self) -> dict[str, Any]:
        """Return what decides how examples become rows, as JSON types."""
        return {"purpose": self.purpose, "packed": self.packed}

    def empty_row(self, seq_len: int) -> Row:
        """Return a row of padding that has the fields of the others."""
        row = empty_row(seq_len)
        if self.places.spec.uses_block_positions:
            row["block_positions"] = np.zeros(seq_len, np.int32)
        if self.places.spec.mask == "prefix":
            row["prefix_mask"] = np.zeros(seq_len, bool)
        return row

    def items(self, examples: ExampleSet, seq_len: int, first_document: int = 0) -> Items:
        """Index a set's items; raises InputError where the set is for something else or has too long examples."""
        if examples.purpose != self.purpose:
            raise InputError(f"{examples.folder}: found {examples.purpose} examples, expected {self.purpose} examples")
        longest = int(examples.lengths().reshape(-1, examples.examples_each).sum(axis=1).max())
        if longest > seq_len:
            raise InputError(f"{examples.folder}: found an example of {longest} tokens, expected at most {seq_len}")
        return Items(examples, self.margins_of(examples), levels_of(examples), first_document)

    def margins_of(self, examples: ExampleSet) -> np.ndarray:
        """Return the margin of each pair, float32 [pairs]; nothing for other examples."""
        return np.zeros(0, np.float32)

    def place(self, row: Row, item: Item, begin: int, number: int) -> None:
        """Write an item into the slots of a row from `begin` on; `number` counts the row's items from 0."""
        for k, tokens in enumerate(item.examples):
            self._place_tokens(row, tokens, begin, number * len(item.examples) + k + 1, item.document)
            begin += len(tokens.ids)

    def _place_tokens(self, row: Row, tokens: Tokens, begin: int, segment: int, document: int) -> None:
        span = slice(begin, begin + len(tokens.ids))
        learned = slice(begin, span.stop - 1)
        is_trained = tokens.labels[1:] != IGNORED
        row["tokens"][span] = tokens.ids
        row["targets"][learned] = np.where(is_trained, tokens.labels[1:], tokens.ids[1:])
        row["loss_weights"][learned] = is_trained
        row["segment_ids"][span] = segment
        row["document_ids"][span] = document
        for name, places in self.places.of(tokens.ids).items():
            row[name][span] = places


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PreferenceRows(ExampleRows):
    """How pairs become rows: pair k of a row is its segments 2k + 1 (chosen) and 2k + 2 (rejected).

    Beside the fields of other rows: ends int32 [K, 2] (slot of each answer's last token, 0 where there is no pair),
    margins float32 [K], levels int32 [K] (place in `LEVELS`, or -1), pair_weights float32 [K] (0 where there is no
    pair) and, if known, ref_logps float32 [K, 2].

    Attributes:
      pairs_per_row: K when packed; else it is 1.
      margins: what a pair's margin is: 0, by its label, or the number in its row.
      ref_logps: float32 [pairs of all sources, 2], log-probabilities of the answers under a reference.
    """

    purpose: ClassVar[Purpose] = "preference"

    pairs_per_row: int = 8
    margins: Margins = "none"
    ref_logps: np.ndarray | None = None

    @property
    def most_items(self) -> int:
        return self.pairs_per_row if self.packed else 1

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"pairs_per_row": self.most_items, "margins": self.margins}

    def empty_row(self, seq_len: int) -> Row:
        most = self.most_items
        row = super().empty_row(seq_len) | {"ends": np.zeros((most, 2), np.int32)}
        row |= {name: np.zeros(most, np.float32) for name in ("margins", "pair_weights")}
        row["levels"] = np.full(most, -1, np.int32)
        return row if self.ref_logps is None else row | {"ref_logps": np.zeros((most, 2), np.float32)}

    def margins_of(self, examples: ExampleSet) -> np.ndarray:
        """Return the margin of each pair, float32 [pairs]; raises InputError where one has none of the wanted kind."""
        numbers, labels = examples.margins.T
        if self.margins == "none":
            return np.zeros_like(numbers)
        margins = numbers
        if self.margins != "data":
            table = np.array([*LABEL_MARGINS[self.margins], np.nan], np.float32)
            margins = table[np.where(np.isnan(labels), -1, labels).astype(int)]
        if (missing := np.isnan(margins)).any():
            where, found = examples.origin(int(missing.argmax())), "a number" if self.margins != "data" else "a label"
            expected = "a number" if self.margins == "data" else f"one of {', '.join(MARGIN_LABELS)}"
            raise InputError(
                f"{where}: margin: found {found} or nothing, expected {expected} for margins {self.margins!r}"
            )
        return margins

    def place(self, row: Row, item: Item, begin: int, number: int) -> None:
        super().place(row, item, begin, number)
        row["ends"][number] = begin - 1 + np.cumsum([len(tokens.ids) for tokens in item.examples])
        row["margins"][number], row["levels"][number] = item.margin, item.level
        row["pair_weights"][number] = 1
        if self.ref_logps is not None:
            row["ref_logps"][number] = self.ref_logps[item.document]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PromptRows(ExampleRows):
    """How prompts become rows, one to a row: tokens int32 [T] from slot 0 on, int32 length, int64 document_ids."""

    purpose: ClassVar[Purpose] = "prompt"

    packed: bool = False

    def empty_row(self, seq_len: int) -> Row:
        return {"tokens": np.zeros(seq_len, np.int32), "length": np.int32(0), "document_ids": np.int64(-1)}

    def place(self, row: Row, item: Item, begin: int, number: int) -> None:
        (tokens,) = item.examples
        row["tokens"][: len(tokens.ids)] = tokens.ids
        row["length"], row["document_ids"] = np.int32(len(tokens.ids)), np.int64(item.document)


def levels_of(examples: ExampleSet) -> np.ndarray:
    """Return the place in `LEVELS` of each pair of a set, int32 [pairs]; -1 where its row says nothing."""
    numbers, labels = examples.margins.T
    levels = np.where(np.isnan(labels), -1, labels).astype(np.int32)
    given = ~np.isnan(numbers)
    if given.any():
        bounds = np.quantile(numbers[given], (0.25, 0.5, 0.75))
        levels[given] = len(MARGIN_LABELS) + np.searchsorted(bounds, numbers[given])
    return levels


class ExampleRowIterator(grain.DatasetIterator):
    """Fill rows with items in their order; an item without room begins the next row.

    The state is the number of the next row's first item.
    """

    def __init__(self, items: grain.MapDataset[Item] | Items, seq_len: int, rule: ExampleRows):
        super().__init__()
        self._items = items
        self._num_items = len(items)
        self._seq_len = seq_len
        self._rule = rule
        self._index = 0
        self._ahead: Item | None = None

    def __next__(self) -> Row:
        row = self._rule.empty_row(self._seq_len)
        filled = number = 0
        while number != self._rule.most_items and (item := self._peek()) is not None:
            if filled + item.num_slots > self._seq_len:
                break
            self._rule.place(row, item, filled, number)
            filled, number = filled + item.num_slots, number + 1
            self._index, self._ahead = self._index + 1, None
        if not number:
            raise StopIteration
        return row

    def get_state(self) -> dict[str, Any]:
        return {"item": self._index}

    def set_state(self, state: dict[str, Any]) -> None:
        self._index, self._ahead = state["item"], None

    def _peek(self) -> Item | None:
        """Return the next item without moving on, None at the end of the data."""
        if self._ahead is None and self._index < self._num_items:
            self._ahead = self._items[self._index]
        return self._ahead
