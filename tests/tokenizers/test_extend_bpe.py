"""Extending a vocabulary: Qwen's begins like cl100k's, and what is learned on top is merges of what was there."""

import gzip
import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import InputError
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.extend import has_several_digits, read_base, with_special_tokens, without_multi_digit_tokens
from jaxllm.tokenizers.merges import merges_of, unreachable
from jaxllm.tokenizers.patterns import CL100K, QWEN
from jaxllm.tokenizers.rank_file import parse_tokens
from jaxllm.tokenizers.train import BYTES, CHAT_SPECIALS, Base, train_bpe
from tests.tokenizers.vocabulary_files import read_asset

CORPUS = Path(__file__).parents[2] / "scripts" / "quickstart_corpus"


def read_texts(lang):
    lines = gzip.decompress((CORPUS / f"heldout.{lang}.jsonl.gz").read_bytes()).splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def english():
    return train_bpe(read_texts("en"), vocab_size=600)


@pytest.fixture(scope="module")
def cl100k():
    return parse_tokens(read_asset("cl100k_base.tiktoken"), "cl100k_base.tiktoken")


@pytest.fixture(scope="module")
def qwen():
    return parse_tokens(read_asset("qwen.tiktoken"), "qwen.tiktoken")


def test_cl100k_without_multi_digit_tokens_is_how_qwen_begins(cl100k, qwen):
    base = without_multi_digit_tokens(Base(tokens=cl100k, pattern=CL100K))
    assert len(base.tokens) == 99_156
    assert list(base.tokens) == qwen[:99_156]
    assert base.pattern == QWEN
    dropped = set(cl100k) - set(base.tokens)
    assert dropped == {b"%0*d" % (width, number) for width in (2, 3) for number in range(10**width)}


def test_no_token_of_the_published_vocabulary_is_out_of_reach(qwen):
    assert unreachable(qwen) == []


def test_cl100k_extended_on_chinese_keeps_its_order_and_compresses_better(cl100k):
    base = without_multi_digit_tokens(Base(tokens=cl100k, pattern=CL100K))
    texts = read_texts("zh")
    before = train_bpe(texts, vocab_size=len(base.tokens) + 8, base=base)
    after = train_bpe(texts, vocab_size=len(base.tokens) + 1008, base=base)
    assert after.tokens[: len(base.tokens)] == tuple(base.tokens)
    new = after.tokens[len(base.tokens) :]
    assert unreachable(after.tokens) == [] and not any(map(has_several_digits, new))
    assert sum(len(after.encode(text)) for text in texts) < 0.8 * sum(len(before.encode(text)) for text in texts)


def test_training_can_be_continued(english):
    base = Base(tokens=english.tokens[:400])
    again = train_bpe(read_texts("en"), vocab_size=600, base=base)
    assert again.fingerprint == english.fingerprint


def test_each_new_token_is_a_merge_of_earlier_ones(english):
    base = Base(tokens=english.tokens)
    extended = train_bpe(read_texts("zh"), vocab_size=900, base=base)
    assert extended.tokens[: len(english.tokens)] == english.tokens
    ranks = {token: rank for rank, token in enumerate(extended.tokens)}
    merges = merges_of(extended.tokens)
    assert len(merges) == len(extended.tokens) - 256
    assert all(ranks[part] < ranks[token] for token, parts in merges.items() for part in parts)


@given(st.lists(st.binary(min_size=2, max_size=4) | st.text("ab1", min_size=2).map(str.encode), unique=True))
def test_tokens_without_a_merge_are_those_that_tiktoken_does_not_build(tokens):
    def merged(token):
        """Merge as tiktoken's rule says, by looking at all pairs each time."""
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 1:
            joined = [(ranks.get(a + b, 10**9), k) for k, (a, b) in enumerate(pairwise(parts))]
            rank, k = min(joined)
            if rank == 10**9:
                break
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        return parts

    tokens = [*BYTES, *tokens]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert unreachable(tokens) == [token for token in tokens if merged(token) != [token]]


@given(st.text())
def test_arbitrary_text_survives_an_extended_vocabulary(text):
    tokenizer = train_bpe(["abab ab"] * 3, vocab_size=267, base=Base(tokens=[*reversed(BYTES), b"ab"]))
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_digits():
    assert has_several_digits(b"12") and has_several_digits(b"a1b2") and has_several_digits(b"1.5")
    assert not any(map(has_several_digits, (b"1", b" 1", b"abc", "１０".encode(), "²³".encode(), b"")))


def test_dropping_numbers_cuts_digits_apart():
    base = Base(tokens=[*BYTES, b"12", b" a", b"123"], pattern=CL100K)
    smaller = without_multi_digit_tokens(base)
    assert list(smaller.tokens) == [*BYTES, b" a"]
    texts = ["in 1234 or 1234 a a a"] * 9
    assert not any(map(has_several_digits, train_bpe(texts, vocab_size=268, base=smaller).tokens))
    assert b"1234" not in train_bpe(texts, vocab_size=270, base=base).tokens
    assert b"12" in train_bpe(texts, vocab_size=268, base=Base(pattern=CL100K)).tokens
    with pytest.raises(InputError, match="keeps digits together"):
        without_multi_digit_tokens(Base(pattern=r"\w+|\W+"))


def test_a_base_is_a_file_of_ranks_or_a_tokenizer(tmp_path, english):
    english.save(tmp_path / "tok")
    base = read_base(tmp_path / "tok")
    assert tuple(base.tokens) == english.tokens
    assert (base.eos_token, tuple(base.special_tokens)) == ("<|endoftext|>", CHAT_SPECIALS)
    (tmp_path / "ranks.tiktoken").write_bytes((tmp_path / "tok" / "tokenizer.tiktoken").read_bytes())
    assert read_base(tmp_path / "ranks.tiktoken") == Base(tokens=list(english.tokens))
    with pytest.raises(InputError, match="nowhere"):
        read_base(tmp_path / "nowhere")
    (tmp_path / "bad.tiktoken").write_text("what\n")
    with pytest.raises(InputError, match=r"bad\.tiktoken:1: found 'what'"):
        read_base(tmp_path / "bad.tiktoken")


def test_special_tokens_are_appended_to_those_of_the_base(tmp_path, english):
    base = with_special_tokens(Base(tokens=english.tokens), ["<|tool|>", "<|/tool|>"])
    train_bpe(read_texts("zh"), vocab_size=700, base=base).save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    expected = [*CHAT_SPECIALS, "<|tool|>", "<|/tool|>"]
    assert tokenizer.special_tokens == {text: 690 + k for k, text in enumerate(expected)}
    for texts in (["<|im_end|>"], ["<|new|>", "<|new|>"]):
        with pytest.raises(InputError, match="found twice"):
            with_special_tokens(base, texts)


def test_a_vocabulary_smaller_than_its_base_is_refused(english):
    with pytest.raises(InputError, match=r"found 500, expected at least 600 \(592 tokens of the base \+ 8 special"):
        train_bpe(["text"], vocab_size=500, base=Base(tokens=english.tokens))
