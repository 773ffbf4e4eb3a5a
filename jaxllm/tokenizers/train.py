"""Train a byte-level BPE vocabulary (arXiv:1508.07909 algorithm 1, over bytes, inside the pieces of a pattern)."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import regex

from jaxllm.errors import InputError
from jaxllm.tokenizers import patterns
from jaxllm.tokenizers.base import check_unicode
from jaxllm.tokenizers.merge_ranks import BYTES
from jaxllm.tokenizers.piece_encoder import PieceEncoder
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE, number_from

CHAT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{k}|>" for k in range(5)))
"""Qwen's special tokens with five spare ones, so that a model trained on them can learn to chat later."""

MIN_COUNT = 2
"""A pair that occurs once says nothing about the language, so it is never merged."""

Progress = Callable[[int, int], None]
"""Called with two counts, for instance after each merge with the merges done and the merges wanted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """What a training starts from; the default is nothing but the bytes.

    Attributes:
      tokens: the first tokens of the vocabulary, among them all 256 bytes; they keep their order.
      pattern: regular expression that cuts a text into pieces; no token crosses a piece.
      normalization: Unicode normal form that texts are brought to first, or None.
      special_tokens: texts of the special tokens, in the order of their ids.
      bos_token, eos_token, pad_token: members of `special_tokens`, or None.
      raw_tokens, prefix_tokens, suffix_tokens: as for TiktokenBPE.
    """

    tokens: Sequence[bytes] = BYTES
    pattern: str = patterns.QWEN
    normalization: Literal["NFC"] | None = "NFC"
    special_tokens: Sequence[str] = CHAT_SPECIALS
    bos_token: str | None = None
    eos_token: str | None = "<|endoftext|>"
    pad_token: str | None = "<|endoftext|>"
    raw_tokens: Sequence[str] = ()
    prefix_tokens: Sequence[str] | None = None
    suffix_tokens: Sequence[str] = ()


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, base: Base | None = None, progress: Progress | None = None
) -> TiktokenBPE:
    """Learn the merges that shorten the texts most, one after the other.

    Ids are: the base's tokens, the merges in the order learned, the special tokens. Each step merges the pair of
    neighbours with the highest count; of equal counts the pair with the smaller left id, then the smaller right id.
    The result depends on the texts as a multiset of pieces only, not on their order.

    Args:
      texts: documents; the text of a special token in them is ordinary text.
      vocab_size: number of ids, special tokens included.
      base: what to start from; default: the 256 bytes, Qwen's pattern and `CHAT_SPECIALS`.
      progress: called as `progress(merges done, merges wanted)`.

    Raises:
      InputError: vocab_size too small for base and special tokens, or too large for the texts.
    """
    base = base or Base()
    pieces = count_pieces(texts, pattern=base.pattern, normalization=base.normalization)
    return train_on_pieces(pieces, vocab_size=vocab_size, base=base, progress=progress)


def train_on_pieces(
    pieces: Mapping[str, int], *, vocab_size: int, base: Base, progress: Progress | None = None
) -> TiktokenBPE:
    """Learn from counted pieces what `train_bpe` learns from the texts that they come from."""
    check_vocab_size(vocab_size, base)
    smallest = len(base.tokens) + len(base.special_tokens)
    learned = learn_merges(pieces, num_merges=vocab_size - smallest, base=base.tokens, progress=progress)
    if smallest + len(learned) < vocab_size:
        raise InputError(
            f"vocab_size: found {vocab_size}, expected at most {smallest + len(learned)} or more text: "
            f"no other pair of tokens occurs {MIN_COUNT} times"
        )
    tokens = [*base.tokens, *learned]
    return TiktokenBPE(
        tokens,
        pattern=base.pattern,
        special_tokens=number_from(len(tokens), base.special_tokens),
        normalization=base.normalization,
        bos_token=base.bos_token,
        eos_token=base.eos_token,
        pad_token=base.pad_token,
        raw_tokens=base.raw_tokens,
        prefix_tokens=base.prefix_tokens,
        suffix_tokens=base.suffix_tokens,
    )


def check_vocab_size(vocab_size: int, base: Base) -> None:
    """Raise InputError for fewer ids than a base and its special tokens need."""
    smallest = len(base.tokens) + len(base.special_tokens)
    if vocab_size < smallest:
        tokens = "bytes" if base.tokens == BYTES else "tokens of the base"
        raise InputError(
            f"vocab_size: found {vocab_size}, expected at least {smallest} "
            f"({len(base.tokens)} {tokens} + {len(base.special_tokens)} special tokens)"
        )


def count_pieces(texts: Iterable[str], *, pattern: str, normalization: Literal["NFC"] | None) -> Counter[str]:
    """Count the pieces that the pattern cuts the texts into; what it does not match is a piece too."""
    compiled = regex.compile(patterns.covering(pattern))
    pieces: Counter[str] = Counter()
    for text in texts:
        check_unicode(text)
        if normalization:
            text = unicodedata.normalize(normalization, text)
        pieces.update(match.group() for match in compiled.finditer(text))
    return pieces


def encoder_of_pieces(tokens: Sequence[bytes]) -> Callable[[str], list[int]]:
    """Return a function from one piece to its ranks, which does not cut the piece again."""
    encoder = PieceEncoder(tokens, [r"[\s\S]+"])
    return lambda piece: encoder.encode(piece).tolist()


def learn_merges(
    pieces: Mapping[str, int], *, num_merges: int, base: Sequence[bytes] = BYTES, progress: Progress | None = None
) -> list[bytes]:
    """Return the bytes of up to `num_merges` new tokens, in the order learned; fewer where no pair is left to merge.

    Args:
      base: the tokens that there are already; pieces are encoded with them before the first merge.
    """
    table = _PairTable(pieces, base)
    spelling = list(base)
    known = {token: chr(token_id) for token_id, token in enumerate(spelling)}
    wanted = len(base) + num_merges
    while len(spelling) < wanted and (pair := table.pop_most_frequent()):
        token = spelling[ord(pair[0])] + spelling[ord(pair[1])]
        # Two pairs may spell the same bytes (aa+a, a+aa); tiktoken merges both under one rank.
        if token not in known:
            known[token] = chr(len(spelling))
            spelling.append(token)
        table.merge(pair, known[token])
        if progress:
            progress(len(spelling) - len(base), num_merges)
    return spelling[len(base) :]


class _PairTable:
    """The pieces as words of tokens, and which pairs of neighbours they hold.

    A word is a string with one character a token (the character's code is the token's id), so that finding and
    replacing a pair runs at the speed of str.split and str.join; a pair is a string of two characters.

    Attributes:
      words, repeats: the distinct pieces and how often each occurs.
      counts: how often each pair occurs.
      places: indices of the words that each pair stood in when it was entered; a word may since have lost the pair.
      queue: heap of (-count, pair); a count may since have fallen, but an entry with the risen count is always there.
    """

    def __init__(self, pieces: Mapping[str, int], base: Sequence[bytes]):
        encode = encoder_of_pieces(base)
        self.words = ["".join(map(chr, encode(piece))) for piece in pieces]
        self.repeats = list(pieces.values())
        self.counts: Counter[str] = Counter()
        self.places: defaultdict[str, list[int]] = defaultdict(list)
        for index, word in enumerate(self.words):
            for left, right in itertools.pairwise(word):
                self.counts[left + right] += self.repeats[index]
                self.places[left + right].append(index)
        self.queue = [(-count, pair) for pair, count in self.counts.items()]
        heapq.heapify(self.queue)

    def pop_most_frequent(self) -> str | None:
        """Return the pair to merge next, or None where every pair is too rare."""
        while self.queue:
            queued, pair = heapq.heappop(self.queue)
            count = self.counts[pair]
            if count < MIN_COUNT:
                continue
            if count == -queued:
                return pair
            heapq.heappush(self.queue, (-count, pair))
        return None

    def merge(self, pair: str, token: str) -> None:
        """Replace the pair by the token in all words, from the left."""
        left, right = pair
        risen: set[str] = set()
        for index in self.places.pop(pair):
            parts = self.words[index].split(pair)
            for k, (before, after) in enumerate(itertools.pairwise(parts)):
                if before:
                    risen.add(self._recount(index, before[-1] + left, before[-1] + token))
                elif k > 0:
                    risen.add(self._recount(index, right + left, token + token))
                if after:
                    risen.add(self._recount(index, right + after[0], token + after[0]))
            self.words[index] = token.join(parts)
        del self.counts[pair]
        for new in risen:
            heapq.heappush(self.queue, (-self.counts[new], new))

    def _recount(self, index: int, old: str, new: str) -> str:
        """Count one pair of a word as another and return the other."""
        self.counts[old] -= self.repeats[index]
        self.counts[new] += self.repeats[index]
        self.places[new].append(index)
        return new
