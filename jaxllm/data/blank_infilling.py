"""Texts with blanks: GLM's pretraining task (arXiv:2103.10360), by the rules of blocklm_utils.py in THUDM/GLM.

Part of a text is cut out and a mask token left in its place. The model reads what is left in both directions, then
writes each missing span after a <sop>, which it ends with <eop>. Targets are aligned with the slots that predict them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Span = tuple[int, int]
"""(start, end) in a text, end excluded."""

_LONGEST_SPAN = 39


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlankIds:
    """Ids of the special tokens.

    Attributes:
      mask, smask, gmask: stand for a missing span, missing sentences, and a missing document or rest of one.
      sop, eop: open and close what was missing.
      eos: ends a document.
      cls: opens a document or a part of one; None: nothing does.
      dblock: stands for hidden inputs within spans; None: none are hidden.
    """

    mask: int
    smask: int
    gmask: int
    sop: int
    eop: int
    eos: int
    cls: int | None
    dblock: int | None

    @property
    def breaks(self) -> list[int]:
        """The ids that stand between documents."""
        return [self.eos] if self.cls is None else [self.eos, self.cls]


class Sample(NamedTuple):
    """A text with blanks and what was missing, as the model reads it: arrays [n].

    Attributes:
      targets: what each slot predicts; only those with a loss weight of 1 count.
      positions: place in the corrupted text; what was missing is at its mask token.
      block_positions: 0 in the context, 1, 2, ... in each missing span.
      source: index into the text that each slot stems from.
      context_length: slots of the corrupted text, which come first.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray
    block_positions: np.ndarray
    source: np.ndarray
    context_length: int


def build_blanks(
    text: np.ndarray, spans: Sequence[Span], *, mask_id: int, ids: BlankIds, inputs: np.ndarray | None = None
) -> Sample:
    """Lay out a text whose `spans` are missing, in the order in which they are to be written.

    Args:
      text: int [n].
      inputs: the text as the model reads it within the spans, int [n]; default: `text`.
    """
    inputs = text if inputs is None else inputs
    kept = np.ones(len(text), bool)
    corrupted = text.copy()
    for start, end in spans:
        kept[start + 1 : end] = False
        corrupted[start] = mask_id
    context = np.flatnonzero(kept)
    tokens, targets, source = [corrupted[context]], [corrupted[context]], [context]
    blocks = [np.zeros(len(context), np.int64)]
    for start, end in spans:
        tokens += [[ids.sop], inputs[start:end]]
        targets += [text[start:end], [ids.eop]]
        source += [[start], np.arange(start, end)]
        blocks.append(np.arange(1, end - start + 2))
    sources = np.concatenate(source)
    return Sample(
        tokens=np.concatenate(tokens),
        targets=np.concatenate(targets),
        loss_weights=(np.arange(len(sources)) >= len(context)).astype(np.float32),
        positions=(np.cumsum(kept) - 1)[sources],
        block_positions=np.concatenate(blocks),
        source=sources,
        context_length=len(context),
    )


def build_rest(text: np.ndarray, division: int, *, ids: BlankIds, positions_count_on: bool) -> Sample:
    """Lay out a text of which all from `division` on is missing; it is written without an <eop>.

    Args:
      positions_count_on: positions go on after the [gMASK] in place of staying there (GLM-130B).
    """
    rest = text[division:]
    before = np.append(text[:division], ids.gmask)
    slots = np.arange(len(text) + 1)
    # The <sop> and the [gMASK] stand where the rest begins.
    source = np.where(slots <= division, slots, np.maximum(slots - 2, division))
    is_trained = (slots > division) & (text[np.maximum(slots - 1, 0)] != ids.cls)
    return Sample(
        tokens=np.concatenate([before, [ids.sop], rest[:-1]]),
        targets=np.concatenate([before, rest]),
        loss_weights=is_trained.astype(np.float32),
        positions=slots if positions_count_on else np.minimum(slots, division),
        block_positions=np.maximum(slots - division, 0),
        source=source,
        context_length=division + 1,
    )


def draw_span_lengths(
    rng: np.random.Generator, num_tokens: int, *, ratio: float, mean: float, slots_per_span: int = 0
) -> np.ndarray:
    """Draw lengths until they hide int(`ratio` * T) of T tokens; the last one may exceed that.

    Lengths follow a Poisson distribution of this mean, cut to 1..39.

    Args:
      num_tokens: T + slots_per_span * the number of spans.
      slots_per_span: that each span adds to the text, where the sum of both is given.

    Returns:
      int [spans], at least as many as there are spans to reach the ratio.
    """
    most = int(ratio * num_tokens)
    shares = np.cumsum(np.cumprod(mean / np.arange(1, _LONGEST_SPAN + 1)))
    lengths = 1 + np.searchsorted(shares / shares[-1], rng.random(most), side="right")
    text_lengths = num_tokens - slots_per_span * np.arange(1, most + 1)
    reached = np.cumsum(lengths) >= (ratio * text_lengths).astype(int)
    return lengths[: reached.argmax() + 1] if most else lengths


def place_spans(rng: np.random.Generator, lengths: np.ndarray, begin: int, num_tokens: int) -> list[Span]:
    """Place spans in this order at random among `num_tokens` tokens from `begin` on, with a token between any two."""
    free = num_tokens - int(lengths.sum()) - (len(lengths) - 1)
    starts = begin + np.sort(rng.integers(0, free, len(lengths), endpoint=True))
    starts += np.cumsum(lengths + 1) - (lengths + 1)
    return list(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))


def documents_in(text: np.ndarray, ids: BlankIds) -> list[Span]:
    """Return where the documents of a text lie, without what opens and ends them."""
    inside = ~np.isin(text, ids.breaks)
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def spans_in_documents(
    rng: np.random.Generator, text: np.ndarray, lengths: np.ndarray, *, ratio: float, ids: BlankIds
) -> list[Span] | None:
    """Place spans so that none crosses the end of a document.

    Shorter documents come first and take spans up to `ratio` of their length, the longest takes the others. The last
    token of a text is never hidden where it is not the end of a document.

    Returns:
      The spans in random order, or None where they do not all fit.
    """
    rest = rng.permutation(lengths)
    documents = [(begin, min(end, len(text) - 1) - begin) for begin, end in documents_in(text, ids)]
    documents.sort(key=lambda document: document[1])
    spans: list[Span] = []
    for number, (begin, length) in enumerate(documents, start=1):
        taken, most = np.cumsum(rest), int(ratio * length)
        if number == len(documents):
            taken, most = taken + np.arange(len(rest)), length
        count = int(np.searchsorted(taken, most, side="right"))
        if count:
            spans += place_spans(rng, rest[:count], begin, length)
            rest = rest[count:]
    return None if len(rest) else shuffled(rng, spans)


def sentences_in(text: np.ndarray, ends_sentence: np.ndarray, ids: BlankIds) -> list[Span]:
    """Return the sentences of a text; what stands before the end of a document unfinished is none.

    Args:
      ends_sentence: bool [vocab_size], the tokens that end a sentence.
    """
    ends = ends_sentence[text]
    stops = np.flatnonzero(ends | np.isin(text, ids.breaks))
    starts = [0, *(stops + 1).tolist()]
    spans = [(start, stop + 1) for start, stop in zip(starts[:-1], stops.tolist(), strict=True) if ends[stop]]
    return [*spans, (starts[-1], len(text))] if starts[-1] < len(text) else spans


def choose_sentences(sentences: Sequence[Span], order: np.ndarray, num_tokens: int) -> list[Span]:
    """Take sentences by rising `order` [sentences] until they hold `num_tokens` tokens; at least one."""
    chosen: list[Span] = []
    for number in np.argsort(order):
        chosen.append(sentences[number])
        if sum(end - start for start, end in chosen) >= num_tokens:
            break
    return chosen


def whole_sentences(text: np.ndarray, ends_sentence: np.ndarray, ids: BlankIds) -> int:
    """Return how many tokens of a text reach to its last sentence end, or all where that is less than half of them."""
    stops = np.flatnonzero(ends_sentence[text] | (text == ids.eos))
    length = int(stops[-1]) + 1 if len(stops) else 0
    return length if length >= max(len(text) // 2, 1) else len(text)


def shuffled(rng: np.random.Generator, spans: Sequence[Span]) -> list[Span]:
    """Return spans in random order."""
    return [spans[number] for number in rng.permutation(len(spans))]
