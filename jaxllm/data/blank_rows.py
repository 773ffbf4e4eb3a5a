"""Rows for blank infilling: which texts lose which parts, and how they fill rows of a fixed length.

A text is cut to the length at which it and its blanks fill their slots, so that rows need next to no padding.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from jaxllm.config import BlankInfillingConfig
from jaxllm.data.blank_infilling import (
    BlankIds,
    Sample,
    build_blanks,
    build_rest,
    choose_sentences,
    documents_in,
    draw_span_lengths,
    sentences_in,
    spans_in_documents,
    whole_sentences,
)
from jaxllm.data.packing import Piece, Pieces, Row, empty_row
from jaxllm.errors import InputError
from jaxllm.tokenizers.base import Tokenizer

Kind = Literal["single_span", "spans", "sentences", "rest"]
Cut = Callable[[int], np.ndarray]
"""Takes the most tokens of a text that may be used, and returns those that are."""

# Its mask token, and its <sop> or <eop>.
_SLOTS_PER_SPAN = 2
_SHORTEST_TEXT = 32
_MOST_DROPPED = 100
_SENTENCE_END = re.compile("[.?!;:\n。．？！；：…]")
_NAMES = {
    "mask": ("[MASK]",),
    "smask": ("[sMASK]",),
    "gmask": ("[gMASK]",),
    "sop": ("<sop>", "<|startofpiece|>"),
    "eop": ("<eop>", "<|endofpiece|>"),
    "cls": ("[CLS]", "<ENC>"),
    "dblock": ("[dBLOCK]", "<dBLOCK>"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class BlankInfilling:
    """The task as a run has it.

    Attributes:
      ends_sentence: bool [ids], the tokens that end a sentence.
      two_positions: the model has block positions; where it has none, positions go on after a [gMASK] (GLM-130B).
    """

    options: BlankInfillingConfig
    ids: BlankIds
    ends_sentence: np.ndarray
    two_positions: bool

    @classmethod
    def create(
        cls, options: BlankInfillingConfig, tokenizer: Tokenizer, *, eos_id: int, two_positions: bool
    ) -> BlankInfilling:
        """Find the special tokens that the options need, and the tokens that end a sentence.

        Raises:
          InputError: neither the tokenizer nor the options have one of them.
        """
        ids = blank_ids(options, tokenizer, eos_id)
        return cls(options, ids, sentence_ends(tokenizer, ids), two_positions)

    def describe(self) -> dict[str, Any]:
        """Return what decides how a text becomes a sample, as JSON types."""
        parts = {"options": self.options, "ids": self.ids}
        return {name: dataclasses.asdict(part) for name, part in parts.items()} | {"two_positions": self.two_positions}

    def empty_row(self, seq_len: int) -> Row:
        """Return a row of padding."""
        row = empty_row(seq_len) | {"prefix_mask": np.zeros(seq_len, bool)}
        return row | {"block_positions": np.zeros(seq_len, np.int32)} if self.two_positions else row

    def draw_kind(self, rng: np.random.Generator) -> Kind:
        """Draw what is missing in a row."""
        options = self.options
        if rng.random() < options.single_span_prob:
            return "single_span"
        draw = rng.random()
        if draw < options.span_prob:
            return "spans"
        return "sentences" if draw < options.span_prob + options.sentence_prob else "rest"

    def draw_slots(self, rng: np.random.Generator, kind: Kind, seq_len: int) -> tuple[int, bool]:
        """Draw (slots of each text of a row, whether they are cut short and end where a sentence ends)."""
        slots = seq_len if kind == "rest" else seq_len // self.options.samples_per_row
        if rng.random() >= self.options.short_prob:
            return slots, False
        return int(rng.integers(_SHORTEST_TEXT, slots - 1)), True

    def sample(
        self, rng: np.random.Generator, kind: Kind, text: np.ndarray, *, to_sentence_end: bool = False
    ) -> tuple[Sample, int] | None:
        """Make a sample of at most n slots from the beginning of a text int [n].

        Args:
          to_sentence_end: use no more of the text than to the end of a sentence, if that is half of it.

        Returns:
          (the sample, tokens used of the text); None where its documents have no room for the blanks.
        """

        def cut(length: int) -> np.ndarray:
            part = text[:length]
            return part[: whole_sentences(part, self.ends_sentence, self.ids)] if to_sentence_end else part

        match kind:
            case "single_span" | "spans":
                return self._with_spans(rng, len(text), cut, single=kind == "single_span")
            case "sentences":
                return self._with_sentences(rng, len(text), cut)
            case "rest":
                return self._with_rest(rng, cut(len(text) - _SLOTS_PER_SPAN))

    def _with_spans(
        self, rng: np.random.Generator, num_slots: int, cut: Cut, *, single: bool
    ) -> tuple[Sample, int] | None:
        options, ids = self.options, self.ids
        lengths = draw_span_lengths(
            rng, num_slots, ratio=options.span_ratio, mean=options.mean_span_length, slots_per_span=_SLOTS_PER_SPAN
        )
        lengths = lengths[:1] if single else lengths
        text = cut(num_slots - _SLOTS_PER_SPAN * len(lengths))
        # A text that was cut shorter needs only the first of them.
        lengths = lengths[: 1 + np.searchsorted(np.cumsum(lengths), int(options.span_ratio * len(text)))]
        spans = spans_in_documents(rng, text, lengths, ratio=options.span_ratio, ids=ids)
        if not spans:
            return None
        inputs = text
        if ids.dblock is not None:
            inputs = np.where(rng.random(len(text)) < options.hide_prob, ids.dblock, text)
        return build_blanks(text, spans, mask_id=ids.mask, ids=ids, inputs=inputs), len(text)

    def _with_sentences(self, rng: np.random.Generator, num_slots: int, cut: Cut) -> tuple[Sample, int] | None:
        order = rng.random(num_slots)
        # Each missing sentence takes slots of its own, which shortens the text that they are chosen from.
        for most in range(1, num_slots // _SLOTS_PER_SPAN):
            text = cut(num_slots - _SLOTS_PER_SPAN * most)
            sentences = sentences_in(text, self.ends_sentence, self.ids)
            least = int(self.options.sentence_ratio * len(text))
            chosen = choose_sentences(sentences, order[: len(sentences)], least)
            if 0 < len(chosen) <= most:
                return build_blanks(text, chosen, mask_id=self.ids.smask, ids=self.ids), len(text)
        return None

    def _with_rest(self, rng: np.random.Generator, text: np.ndarray) -> tuple[Sample, int] | None:
        least, most = max(int(self.options.rest_min_ratio * len(text)), 1), len(text) - 2
        if most < least:
            return None
        length = int(rng.integers(least, most, endpoint=True))
        if len(documents_in(text, self.ids)) > 1 or rng.random() < self.options.rest_prob:
            sample = build_rest(text, len(text) - length, ids=self.ids, positions_count_on=not self.two_positions)
            return (sample, len(text)) if sample.loss_weights.any() else None
        spans = spans_in_documents(rng, text, np.array([length]), ratio=1.0, ids=self.ids)
        return (build_blanks(text, spans, mask_id=self.ids.gmask, ids=self.ids), len(text)) if spans else None


def blank_ids(options: BlankInfillingConfig, tokenizer: Tokenizer, eos_id: int) -> BlankIds:
    """Return the ids of the special tokens that the options need, as they say or else by the tokenizer's names.

    Raises:
      InputError: one of them has no id.
    """

    def find(name: str) -> int:
        given = getattr(options.tokens, name)
        named = [tokenizer.special_tokens[text] for text in _NAMES[name] if text in tokenizer.special_tokens]
        if given is None and not named:
            raise InputError(
                f"data.blank_infilling.tokens.{name}: missing, and the tokenizer has no special token "
                f"{' or '.join(_NAMES[name])}"
            )
        return named[0] if given is None else given

    mask = find("mask")
    has_rest = options.span_prob + options.sentence_prob < 1
    return BlankIds(
        mask=mask,
        smask=find("smask") if options.task_masks and options.sentence_prob else mask,
        gmask=find("gmask") if options.task_masks and has_rest else mask,
        sop=find("sop"),
        eop=find("eop"),
        eos=eos_id,
        cls=find("cls") if options.open_with_cls else None,
        dblock=find("dblock") if options.hide_prob else None,
    )


def sentence_ends(tokenizer: Tokenizer, ids: BlankIds) -> np.ndarray:
    """Return bool [ids]: the ordinary tokens with . ? ! ; : (ASCII or full width), an ellipsis or a line break."""
    largest = max(id for id in dataclasses.asdict(ids).values() if id is not None)
    special = set(tokenizer.special_tokens.values())
    ends = np.zeros(max(tokenizer.vocab_size, largest + 1), bool)
    for token_id in set(range(tokenizer.vocab_size)) - special:
        try:
            text = tokenizer.token_bytes(token_id).decode("utf-8", errors="ignore")
        except ValueError:
            continue
        ends[token_id] = _SENTENCE_END.search(text) is not None
    return ends


class _Text(NamedTuple):
    """Tokens to come: arrays [n], with the document of each and the position (piece, offset) after it."""

    tokens: np.ndarray
    documents: np.ndarray
    pieces: np.ndarray
    offsets: np.ndarray


class BlankRowIterator(grain.DatasetIterator):
    """Fill rows of T slots with texts that have blanks.

    Rows are dicts as those of `packing.RowIterator`, with prefix_mask bool [T] and, for models with two positions,
    block_positions int32 [T]. Each text is a segment. The texts of all rows follow each other in the pieces; one whose
    documents have no room for its blanks is left out, as in the published code.

    What is drawn for a row depends on `seed` and the number of the row alone, so that the state is that number, the
    number of the current piece and the tokens of it already used.
    """

    def __init__(
        self,
        pieces: grain.MapDataset[Piece] | Pieces,
        seq_len: int,
        task: BlankInfilling,
        *,
        seed: Sequence[int],
        equal_rows: bool,
    ):
        """Begin with the first piece.

        Args:
          equal_rows: the loss weights of a row sum to 1; otherwise each trained slot weighs 1.
        """
        super().__init__()
        self._pieces = pieces
        self._num_pieces = len(pieces)
        self._seq_len = seq_len
        self._task = task
        self._seed = tuple(seed)
        self._equal_rows = equal_rows
        self._opening = [] if task.ids.cls is None else [task.ids.cls]
        self._read: dict[int, Piece] = {}
        self._index = self._offset = self._rows = 0

    def __next__(self) -> Row:
        rng = np.random.default_rng([*self._seed, self._rows])
        row = self._task.empty_row(self._seq_len)
        kind = self._task.draw_kind(rng)
        slots, is_short = self._task.draw_slots(rng, kind, self._seq_len)
        for number in range(self._seq_len // slots):
            found = self._next_sample(rng, kind, slots, is_short)
            if found is not None:
                _fill(row, number * slots, number + 1, *found)
        if not row["segment_ids"].any():
            raise StopIteration
        if self._equal_rows:
            row["loss_weights"] /= row["loss_weights"].sum()
        self._rows += 1
        return row

    def get_state(self) -> dict[str, Any]:
        return {"piece": self._index, "offset": self._offset, "rows": self._rows}

    def set_state(self, state: dict[str, Any]) -> None:
        self._index, self._offset, self._rows = state["piece"], state["offset"], state["rows"]
        self._read = {}

    def _next_sample(
        self, rng: np.random.Generator, kind: Kind, most: int, is_short: bool
    ) -> tuple[Sample, np.ndarray] | None:
        """Return (sample, document of each token of its text), or None at the end of the data.

        Raises:
          InputError: text after text has no room for blanks.
        """
        for _ in range(_MOST_DROPPED):
            text = self._ahead(most)
            if not len(text.tokens):
                return None
            found = self._task.sample(rng, kind, text.tokens, to_sentence_end=is_short)
            last = -1 if found is None else found[1] - 1
            self._move_on(int(text.pieces[last]), int(text.offsets[last]))
            if found is not None:
                return found[0], text.documents
        raise InputError(
            f"data.blank_infilling: {_MOST_DROPPED} texts of up to {most} tokens in a row have no room for blanks; "
            f"their documents are too short"
        )

    def _ahead(self, most: int) -> _Text:
        """Return the next `most` tokens, fewer at the end of the data, without moving on."""
        parts: list[_Text] = []
        index, offset, room = self._index, self._offset, most - len(self._opening)
        while room > 0 and index < self._num_pieces:
            document, tokens = self._piece(index)
            # The first token of a piece is what opens or precedes it by the rules of next-token prediction.
            body = tokens[1 + offset : 1 + offset + room]
            filler = len(self._opening)
            part = _Text(
                tokens=np.concatenate([self._opening, body]).astype(np.int32),
                documents=np.full(filler + len(body), document),
                pieces=np.full(filler + len(body), index),
                offsets=offset + np.maximum(np.arange(1 - filler, len(body) + 1), 0),
            )
            if offset + len(body) == len(tokens) - 1:
                part.pieces[-1], part.offsets[-1] = index + 1, 0
            parts.append(part)
            index, offset, room = index + 1, 0, room - len(body) - filler
        return _Text(*map(np.concatenate, zip(*parts, strict=True))) if parts else _Text(*[np.zeros(0, int)] * 4)

    def _piece(self, index: int) -> Piece:
        if index not in self._read:
            self._read[index] = self._pieces[index]
        return self._read[index]

    def _move_on(self, index: int, offset: int) -> None:
        for passed in range(self._index, index):
            self._read.pop(passed, None)
        self._index, self._offset = index, offset


def _fill(row: Row, begin: int, segment: int, sample: Sample, documents: np.ndarray) -> None:
    slots = slice(begin, begin + len(sample.tokens))
    for name in ("tokens", "targets", "loss_weights", "positions", "block_positions"):
        if name in row:
            row[name][slots] = getattr(sample, name)
    row["segment_ids"][slots] = segment
    row["document_ids"][slots] = documents[sample.source]
    row["prefix_mask"][begin : begin + sample.context_length] = True
