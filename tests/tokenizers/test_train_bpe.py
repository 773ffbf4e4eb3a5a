"""The BPE trainer against a trainer that recounts everything, and against what tiktoken makes of its vocabulary."""

import gzip
import json
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import InputError
from jaxllm.tokenizers.tiktoken_bpe import QWEN_PATTERN
from jaxllm.tokenizers.train import CHAT_SPECIALS, MIN_COUNT, count_pieces, learn_merges, train_bpe

CORPUS = Path(__file__).parents[2] / "scripts" / "quickstart_corpus"


def learn_merges_slowly(pieces: dict[str, int], num_merges: int) -> list[bytes]:
    """Count all pairs anew for each merge."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = [(list(piece.encode()), count) for piece, count in pieces.items()]
    while len(tokens) < 256 + num_merges:
        counts = Counter()
        for word, count in words:
            for pair in pairwise(word):
                counts[pair] += count
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[pair] < MIN_COUNT:
            break
        spelled = tokens[pair[0]] + tokens[pair[1]]
        if spelled not in tokens:
            tokens.append(spelled)
        words = [(replace_pair(word, pair, tokens.index(spelled)), count) for word, count in words]
    return tokens[256:]


def replace_pair(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    replaced, k = [], 0
    while k < len(word):
        match = tuple(word[k : k + 2]) == pair
        replaced.append(token if match else word[k])
        k += 2 if match else 1
    return replaced


def test_the_textbook_example():
    pieces = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    assert learn_merges(pieces, num_merges=8) == [b"es", b"est", b"lo", b"low", b"ew", b"new", b"newest", b"dest"]


@given(
    st.dictionaries(st.text("ab", min_size=1, max_size=12), st.integers(1, 5), max_size=8)
    | st.dictionaries(st.text("aé世界", min_size=1, max_size=8), st.integers(1, 5), max_size=8),
    st.integers(0, 40),
)
def test_the_same_merges_as_a_trainer_that_recounts_everything(pieces, num_merges):
    assert learn_merges(pieces, num_merges=num_merges) == learn_merges_slowly(pieces, num_merges)


@pytest.fixture(scope="module")
def texts():
    files = [CORPUS / f"heldout.{lang}.jsonl.gz" for lang in ("en", "zh")]
    return [json.loads(line)["text"] for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


@pytest.fixture(scope="module")
def trained(texts):
    return train_bpe(texts, vocab_size=1000)


def test_real_text_gives_the_merges_of_the_slow_trainer(texts):
    pieces = count_pieces(texts[::8], pattern=QWEN_PATTERN, normalization="NFC")
    assert learn_merges(pieces, num_merges=40) == learn_merges_slowly(pieces, 40)


def test_training_does_not_depend_on_the_order_of_the_texts(texts, trained):
    assert train_bpe(reversed(texts), vocab_size=1000).fingerprint == trained.fingerprint


def test_tiktoken_reaches_every_learned_token_and_compresses(texts, trained):
    assert trained.vocab_size == 1000
    learned = [trained.token_bytes(token_id) for token_id in range(256, 1000 - len(CHAT_SPECIALS))]
    whole = [(token_id, token.decode()) for token_id, token in enumerate(learned, 256) if is_utf8(token)]
    assert len(whole) > 600
    assert all(trained.encode(text) == [token_id] for token_id, text in whole)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert num_bytes / sum(len(trained.encode(text)) for text in texts) > 2.3


def is_utf8(token: bytes) -> bool:
    return token.decode("utf-8", errors="ignore").encode() == token


@given(st.text())
def test_arbitrary_text_survives_a_trained_vocabulary(trained, text):
    assert trained.decode(trained.encode(text)) == unicodedata.normalize("NFC", text)


def test_chat_tokens_come_last_and_end_of_text_ends_and_pads(trained):
    assert trained.special_tokens == {text: 992 + k for k, text in enumerate(CHAT_SPECIALS)}
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (None, 992, 992)
    assert CHAT_SPECIALS[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def test_progress_counts_every_merge(texts):
    calls = []
    train_bpe(texts[:3], vocab_size=300, progress=lambda done, wanted: calls.append((done, wanted)))
    assert calls == [(k, 36) for k in range(1, 37)]


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["abab"], 263, "found 263, expected at least 264"),
        (["abab ab"], 300, "found 300, expected at most 265 or more text: no other pair"),
        ([], 265, "found 265, expected at most 264 or more text"),
    ],
)
def test_a_vocabulary_size_that_cannot_be_had_is_refused(texts, vocab_size, message):
    with pytest.raises(InputError, match=message):
        train_bpe(texts, vocab_size=vocab_size)
