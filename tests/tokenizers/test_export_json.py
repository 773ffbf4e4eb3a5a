"""tokenizer.json as exported: the tokenizers package gives the ids that we give."""

import functools
import gzip
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import InputError
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.export import export_tokenizer, oniguruma, spell, tokenizer_json
from jaxllm.tokenizers.rank_file import parse_tokens
from jaxllm.tokenizers.tiktoken_bpe import QWEN_PATTERN, TiktokenBPE, number_from
from jaxllm.tokenizers.train import BYTES, train_bpe
from tests.tokenizers.vocabulary_files import read_asset

tokenizers = pytest.importorskip("tokenizers")

CORPUS = Path(__file__).parents[2] / "scripts" / "quickstart_corpus"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)

# The engines follow different versions of Unicode, so characters that are not yet assigned may count as letters or not.
assigned = st.characters(exclude_categories=("Cs", "Cn"))
anything = st.text(assigned | st.sampled_from(" \n\r\t'stlve0123456789aé世界\u0301\u00a0\u3000"))


def read_texts():
    files = [CORPUS / f"heldout.{lang}.jsonl.gz" for lang in ("en", "zh")]
    return [json.loads(line)["text"] for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


def exported(tokenizer):
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))


@pytest.fixture(scope="module")
def ours():
    return train_bpe(read_texts(), vocab_size=1000)


@pytest.fixture(scope="module")
def theirs(ours):
    return exported(ours)


@given(anything)
def test_arbitrary_text_has_the_same_ids_and_comes_back(ours, theirs, text):
    ids = ours.encode(text)
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids) == unicodedata.normalize("NFC", text)


def test_real_text_has_the_same_ids(ours, theirs):
    for text in read_texts():
        assert theirs.encode(text).ids == ours.encode(text)


def test_special_tokens_keep_their_ids(ours, theirs):
    assert theirs.get_vocab_size() == ours.vocab_size
    text = "<|im_start|>user\nhi<|im_end|><|extra_4|>\n<|endoftext|>"
    ids = ours.encode(text, allow_special=True)
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.decode(ids) == "user\nhi\n"


@functools.cache
def without_merges():
    tokens = [*BYTES, b"abc", b"ca", b" abcab", b"cab"]
    tokenizer = TiktokenBPE(tokens, pattern=QWEN_PATTERN, special_tokens={}, normalization=None)
    return tokenizer, exported(tokenizer)


@given(st.text("abc ", max_size=12))
def test_tokens_that_no_merge_makes_are_used_where_they_are_a_whole_piece(text):
    tokenizer, theirs = without_merges()
    assert tokenizer.encode("abc") == [256] and tokenizer.encode("abcx") == [97, 98, 99, 120]
    assert theirs.encode(text).ids == tokenizer.encode(text)


@functools.cache
def with_digits():
    tokens = [*BYTES, b"12", b"123", b"1234", b" \n", b"  ", b"\n\n"]
    tokenizer = TiktokenBPE(tokens, pattern=CL100K_PATTERN, special_tokens={}, normalization=None)
    return tokenizer, exported(tokenizer)


@given(anything)
def test_a_pattern_that_the_format_reads_differently_is_translated(text):
    tokenizer, theirs = with_digits()
    assert theirs.encode(text + "12345 \n ").ids == tokenizer.encode(text + "12345 \n ")


@functools.cache
def with_holes():
    tokenizer = TiktokenBPE(
        [*BYTES, b"ab", b"abab"],
        ids=[*range(20, 276), 9, 7],
        decode_only={b"xyz": 8},
        pattern=QWEN_PATTERN,
        first_patterns=["b"],
        special_tokens={"<f>": 0, "<e>": 300},
        added_tokens={"<c>": 290},
        normalization=None,
        bos_token="<f>",
        suffix_tokens=["<e>"],
    )
    return tokenizer, exported(tokenizer)


@given(st.text("abc<>f é", max_size=12))
def test_ids_with_holes_added_tokens_and_a_prompt_are_kept(text):
    tokenizer, theirs = with_holes()
    assert theirs.encode(text).ids == tokenizer.encode_prompt(text, allow_special=True)
    assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, allow_special=True)
    assert (theirs.token_to_id("<e>"), theirs.token_to_id("xyz"), theirs.token_to_id("<c>")) == (300, 8, 290)


def test_what_one_vocabulary_of_that_format_cannot_say_is_refused():
    options = {"pattern": QWEN_PATTERN, "special_tokens": {}, "normalization": None}
    with pytest.raises(InputError, match="some tokens are for whole pieces, others for no piece"):
        tokenizer_json(TiktokenBPE([*BYTES, b"abc"], decode_only={b"xyz": 300}, **options))
    with pytest.raises(InputError, match="'<f>' is there twice, with the ids 258, 300"):
        tokens = [*BYTES, b"<f", b"f>", b"<f>"]
        tokenizer_json(TiktokenBPE(tokens, **(options | {"special_tokens": {"<f>": 300}})))


def test_translations_and_what_has_none():
    assert oniguruma(QWEN_PATTERN) == QWEN_PATTERN
    assert oniguruma(r"\p{N}{1,3}+|[a-z]{2,}+|\s+$") == r"(?>\p{N}{1,3})|(?>[a-z]{2,})|\s+\z"
    assert oniguruma(r"[$^]\$") == r"[$^]\$"
    for pattern, found in (
        (r"(?:ab){1,2}+", r"\{1,2\}\+"),
        ("^a", r"\^"),
        ("a$b", r"\$"),
        ("(?m:a$)", r"\(\?"),
        (r"[\p{L}--[a-z]]", "--"),
    ):
        with pytest.raises(InputError, match=f"pattern: '{found}' in"):
            oniguruma(pattern)


def test_bytes_are_spelled_with_256_printable_characters():
    assert spell(" Aé\n".encode()) == "ĠAÃ©Ċ"
    alphabet = {spell(bytes([byte])) for byte in range(256)}
    assert len(alphabet) == 256 and all(char.isprintable() and not char.isspace() for char in alphabet)


def test_a_folder_gets_a_config_too_and_a_file_stands_alone(tmp_path, ours):
    folder, file = tmp_path / "new" / "hf", tmp_path / "out.json"
    assert export_tokenizer(ours, folder) == [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    assert export_tokenizer(ours, file) == [file]
    assert file.read_bytes() == (folder / "tokenizer.json").read_bytes()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"], config["bos_token"]) == ("<|endoftext|>", "<|endoftext|>", None)
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == sorted(
        ["out.json", "tokenizer.json", "tokenizer_config.json"]
    )
    assert tokenizers.Tokenizer.from_file(str(file)).encode("hello").ids == ours.encode("hello")
    assert load_tokenizer(folder).fingerprint == ours.fingerprint


def test_what_is_there_is_not_overwritten(tmp_path, ours):
    ours.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"tokenizer_config\.json: is there already"):
        export_tokenizer(ours, tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        export_tokenizer(ours, tmp_path / "tokenizer.tiktoken" / "out.json")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    class Characters(Tokenizer):
        vocab_size, special_tokens = sys.maxunicode, {}

        def encode(self, text, *, allow_special=False):
            return [ord(char) for char in text]

        def encode_to_numpy(self, text):
            raise AssertionError

        def token_bytes(self, token_id):
            return chr(token_id).encode()

        def save(self, folder):
            raise AssertionError

    with pytest.raises(InputError, match="byte-level BPE only"):
        export_tokenizer(Characters(), tmp_path / "out.json")


@pytest.mark.parametrize(
    ("name", "pattern", "normalization"),
    [
        ("qwen.tiktoken", QWEN_PATTERN, "NFC"),
        pytest.param("cl100k_base.tiktoken", CL100K_PATTERN, None, marks=pytest.mark.slow),
    ],
)
def test_a_published_vocabulary_has_the_same_ids(name, pattern, normalization):
    tokens = parse_tokens(read_asset(name), name)
    specials = number_from(len(tokens), ["<|endoftext|>"])
    ours = TiktokenBPE(tokens, pattern=pattern, special_tokens=specials, normalization=normalization)
    theirs = exported(ours)
    assert not theirs.to_str().count('"ignore_merges":true')
    for text in read_texts():
        assert theirs.encode(text).ids == ours.encode(text)
