"""Train a byte-level BPE vocabulary (arXiv:1508.07909 algorithm 1, over bytes, inside the pieces of a pattern)."""

from __future__ import annotations

import heapq
import itertools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import regex

from jaxllm.errors import InputError
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.tiktoken_bpe import QWEN_PATTERN, TiktokenBPE, check_unicode, number_from

CHAT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{k}|>" for k in range(5)))
"""Qwen's special tokens with five spare ones, so that a model trained on them can learn to chat later."""

BYTES = [bytes([byte]) for byte in range(256)]

MIN_COUNT = 2
"""A pair that occurs once says nothing about the language, so it is never merged."""

Progress = Callable[[int, int], None]
"""Called after each merge with the merges done and the merges wanted."""


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = CHAT_SPECIALS,
    eos_token: str = "<|endoftext|>",
    pattern: str = QWEN_PATTERN,
    normalization: Literal["NFC"] | None = "NFC",
    progress: Progress | None = None,
) -> Tokenizer:
    """Learn the merges that shorten the texts most, one after the other.

    Ids are: the 256 bytes, the merges in the order learned, the special tokens. Each step merges the pair of
    neighbours with the highest count; of equal counts the pair with the smaller left id, then the smaller right id.
    The result depends on the texts as a multiset of pieces only, not on their order.

    Args:
      texts: documents; the text of a special token in them is ordinary text.
      vocab_size: number of ids, special tokens included.
      special_tokens: texts of the special tokens, in the order of their ids.
      eos_token: the special token that ends documents and pads.
      pattern: regular expression that cuts a text into pieces; no token crosses a piece.
      normalization: Unicode normal form that texts are brought to first, or None.
      progress: called as `progress(merges done, merges wanted)`.

    Raises:
      InputError: vocab_size too small for bytes and special tokens, or too large for the texts.
    """
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise InputError(f"vocab_size: found {vocab_size}, expected at least {smallest} (256 bytes + special tokens)")
    pieces = count_pieces(texts, pattern=pattern, normalization=normalization)
    learned = learn_merges(pieces, num_merges=vocab_size - smallest, progress=progress)
    if smallest + len(learned) < vocab_size:
        raise InputError(
            f"vocab_size: found {vocab_size}, expected at most {smallest + len(learned)} or more text: "
            f"no other pair of tokens occurs {MIN_COUNT} times"
        )
    tokens = BYTES + learned
    return TiktokenBPE(
        tokens,
        pattern=pattern,
        special_tokens=number_from(len(tokens), special_tokens),
        normalization=normalization,
        eos_token=eos_token,
        pad_token=eos_token,
    )


def count_pieces(texts: Iterable[str], *, pattern: str, normalization: Literal["NFC"] | None) -> Counter[str]:
    """Count the pieces that the pattern cuts the texts into."""
    compiled = regex.compile(pattern)
    pieces: Counter[str] = Counter()
    for text in texts:
        check_unicode(text)
        if normalization:
            text = unicodedata.normalize(normalization, text)
        pieces.update(match.group() for match in compiled.finditer(text))
    return pieces


def learn_merges(pieces: Mapping[str, int], *, num_merges: int, progress: Progress | None = None) -> list[bytes]:
    """Return the bytes of up to `num_merges` new tokens, in the order learned; fewer where no pair is left to merge."""
    table = _PairTable(pieces)
    spelling = list(BYTES)
    known = {token: chr(token_id) for token_id, token in enumerate(spelling)}
    while len(spelling) < 256 + num_merges and (pair := table.pop_most_frequent()):
        token = spelling[ord(pair[0])] + spelling[ord(pair[1])]
        # Two pairs may spell the same bytes (aa+a, a+aa); tiktoken merges both under one rank.
        if token not in known:
            known[token] = chr(len(spelling))
            spelling.append(token)
        table.merge(pair, known[token])
        if progress:
            progress(len(spelling) - 256, num_merges)
    return spelling[256:]


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

    def __init__(self, pieces: Mapping[str, int]):
        self.words = [piece.encode().decode("latin-1") for piece in pieces]
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
