"""tokenizer.json against the tokenizers library that defines it, and the refusal of what is not understood."""

import copy
import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import InputError
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.byte_level import read_vocabulary
from jaxllm.tokenizers.patterns import CL100K, DEEPSEEK_V3, GPT2, at_once
from jaxllm.tokenizers.tokenizer_json import json_tokenizer
from tests.tokenizers.vocabulary_files import read_asset

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "ä ¸", "ä¸ Ń", "Ġ Ġ", "' s", "o '", "Ċ Ċ", "a b"]


def byte_characters() -> list[str]:
    """One character for each byte, as GPT-2's vocabularies write it, in another order than that of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printable), *(chr(256 + k) for k in range(68))]


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(steps)}


DIGITS = {"type": "Digits", "individual_digits": True}
# DeepSeek LLM's and V2's pre-tokenizer has this shape (its class of letters is longer).
DEEPSEEK_V2 = sequence(
    split("[\r\n]"),
    split("\\s?[A-Za-zµÀ-ÖØ-öø-ƺͻ-ͽΆΈ-ΊΎ-ΡΣ-ϵϷ-ҁႠ-Ⴥﬀ-ﬆＡ-Ｚａ-ｚ]+"),
    split("\\s?[!-/:-~！-／：-～‘-‟　-。]+"),
    split("\\s+$"),
    split("[一-龥ࠀ-一가-퟿]+"),
    DIGITS,
    byte_level(False),
)
PRE_TOKENIZERS = {
    "gpt2": byte_level(True),
    "llama3": sequence(split(CL100K), byte_level(False)),
    "smollm2": sequence(DIGITS, byte_level(True)),
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": sequence(*map(split, DEEPSEEK_V3), byte_level(False)),
    "deepseek_v3_one_by_one": sequence(split("(?=x)x"), *map(split, DEEPSEEK_V3), byte_level(False)),
    "whole_text": byte_level(False),
    "literal": sequence(
        {"type": "Split", "pattern": {"String": "l.l"}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": False},
        byte_level(False),
    ),
}
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def make_json(pre_tokenizer: dict, **changes) -> dict:
    added = ["<s>", "</s>", "<|user|>"]
    vocabulary = [*added, *byte_characters(), *(merge.replace(" ", "") for merge in MERGES)]
    ids = {text: token_id for token_id, text in enumerate(vocabulary)}
    tokens = [{"id": token_id, "content": text, **SPECIAL} for token_id, text in enumerate(added)]
    plain = SPECIAL | {"normalized": True, "special": False}
    tokens += [{"id": len(vocabulary) + k, "content": text, **plain} for k, text in enumerate(("<x>", "<xy>", "é€"))]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": None,
        "pre_tokenizer": copy.deepcopy(pre_tokenizer),
        "post_processor": byte_level(True),
        "decoder": byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": ids,
            "merges": list(MERGES),
        },
        **changes,
    }


def write(folder, content: dict):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content))
    return file


def reference(content: dict):
    """The library's tokenizer, which leaves the text of special tokens alone as ours does."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


# What patterns disagree about: kinds of space, digits, marks, scripts, and the texts of the tokens above.
CHARACTERS = [
    *"  \n\t\r\x0b\x85\u00a0\u3000aBſ1٣²'.,!#<>中テ・ー゛\u3040\u3099龥한Р😀\u200d\u0301\x00\uffff",
    "hello",
    "'s",
    "ll",
]
TEXTS = st.lists(
    st.sampled_from([*CHARACTERS, "<x>", "<xy>", "<s>", "e\u0301", "l.l", "e\u0301€"])
    # Each engine has its version of Unicode: characters that Python 3.11's does not know are left out.
    | st.characters(exclude_categories=("Cs", "Cn")),
    max_size=12,
).map("".join)


@functools.cache
def both(name: str, normalizer: str | None, folder):
    content = make_json(PRE_TOKENIZERS[name], normalizer=normalizer and {"type": normalizer})
    return json_tokenizer(write(folder, content)), reference(content)


@pytest.mark.parametrize("normalizer", [None, "NFC"])
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_text_gets_the_ids_that_the_library_gives(name, normalizer, tmp_path_factory):
    ours, theirs = both(name, normalizer, tmp_path_factory.mktemp(name))

    @settings(max_examples=60)
    @given(TEXTS)
    def agree(text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode_to_numpy(text).tolist() == ids
        assert not set(ours.special_tokens.values()) & set(ids)
        if normalizer is None:
            assert ours.decode(ids) == text

    agree()


def test_a_saved_copy_is_the_same_tokenizer(tmp_path):
    ours = json_tokenizer(write(tmp_path, make_json(DEEPSEEK_V2)))
    ours.save(tmp_path / "copy")
    copied = load_tokenizer(tmp_path / "copy")
    assert copied.fingerprint == ours.fingerprint
    text = "hello 123 中 <x><s>"
    assert copied.encode(text, allow_special=True) == ours.encode(text, allow_special=True)


def test_special_tokens_are_found_when_asked_for(tmp_path):
    content = make_json(byte_level(True))
    ours, theirs = json_tokenizer(write(tmp_path, content)), reference(content)
    theirs.encode_special_tokens = False
    text = "<s>hello<|user|><xy></s"
    assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, allow_special=True)[0] == 0
    assert ours.special_tokens == {"<s>": 0, "</s>": 1, "<|user|>": 2}
    assert ours.decode([0, 2, ours.added_tokens["<xy>"]]) == "<s><|user|><xy>"


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"SpecialToken": {"id": "<|user|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ],
    "pair": [],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("post_processor", "files", "names", "prompt"),
    [
        (None, {}, (None, None, None), [[], []]),
        (TEMPLATE, {}, (None, None, None), [[0, 2], [1]]),
        ({"type": "Sequence", "processors": [byte_level(True), TEMPLATE]}, {}, (None, None, None), [[0, 2], [1]]),
        (None, {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}}, (0, 1, None), [[], []]),
        (
            None,
            {"tokenizer_config.json": {"bos_token": {"content": "<s>"}, "pad_token": "</s>", "add_bos_token": True}},
            (0, None, 1),
            [[0], []],
        ),
        (
            TEMPLATE | {"single": TEMPLATE["single"][:1] + TEMPLATE["single"][2:3]},
            {"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": False}},
            (0, None, None),
            [[], []],
        ),
        (None, {"config.json": {"bos_token_id": 0, "eos_token_id": [1, 2]}}, (0, 1, None), [[], []]),
        (
            None,
            {"config.json": {"bos_token_id": 0}, "generation_config.json": {"bos_token_id": 2, "eos_token_id": 1}},
            (2, 1, None),
            [[], []],
        ),
    ],
)
def test_the_ends_of_texts_come_from_the_files_beside_and_the_template(tmp_path, post_processor, files, names, prompt):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    ours = json_tokenizer(write(tmp_path, make_json(byte_level(True), post_processor=post_processor)))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == names
    assert ours.encode_prompt("hello") == [*prompt[0], *ours.encode("hello"), *prompt[1]]


def test_ignore_merges_gives_whole_pieces_their_token(tmp_path):
    content = make_json(byte_level(True))
    content["model"]["vocab"]["ahold"] = 999
    plain = json_tokenizer(write(tmp_path, content))
    assert plain.decode_only == {b"ahold": 999}
    assert plain.encode("ahold") == reference(content).encode("ahold").ids != [999]
    content["model"]["ignore_merges"] = True
    whole, theirs = json_tokenizer(write(tmp_path, content)), reference(content)
    assert whole.encode("ahold") == theirs.encode("ahold").ids == [999]
    for text in ("aholds", " ahold", "aaholdahold", "hello ahold"):
        assert whole.encode(text) == theirs.encode(text).ids
    # "ab" and "a" are what merging leaves of "aba"; nothing says that tiktoken may not join them.
    content["model"]["vocab"]["aba"] = 998
    with pytest.raises(InputError, match=r"model.vocab: no merge makes b'aba', but tiktoken would"):
        json_tokenizer(write(tmp_path, content))


def edit(path: str, value):
    def change(content):
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        place = functools.reduce(lambda found, key: found[key], parents, content)
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("model.type", "Unigram"), "model.type: found 'Unigram', expected 'BPE'"),
        (edit("model.dropout", 0.1), "model.dropout: found 0.1"),
        (edit("model.byte_fallback", True), "model.byte_fallback: found True, expected False"),
        (edit("model.end_of_word_suffix", "</w>"), "model.end_of_word_suffix: found '</w>'"),
        (edit("model.continuing_subword_prefix", "##"), "model.continuing_subword_prefix: found '##'"),
        (edit("model.new_key", 1), "model.new_key: found 1, but the key is not understood"),
        (edit("new_key", 1), "new_key: found 1, but the key is not understood"),
        (edit("model.merges.3", "hell"), r"model.merges\[3\]: found 'hell', expected two tokens"),
        (edit("model.merges.3", "hell x"), r"model.merges\[3\]: b'hellx' is not in .*model.vocab"),
        (edit("model.merges.0", "h €"), "'€' is not byte-level text: '€' stands for no byte"),
        (edit("model.merges", ["he ll", "h e", "l l"]), r"model.merges\[0\]: needs the token b'll'"),
        (edit("model.vocab.h", "x"), "model.vocab: expected an object of token: id"),
        (edit("model", None), "model: found None, expected an object"),
        (edit("normalizer", {"type": "NFKC"}), "normalizer: found the type 'NFKC'"),
        (
            edit("normalizer", {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
            "found the type 'Lowercase'",
        ),
        (edit("pre_tokenizer", {"type": "Metaspace"}), "pre_tokenizer: found the type 'Metaspace', expected ByteLevel"),
        (edit("pre_tokenizer", None), "pre_tokenizer: found None, expected an object"),
        (edit("pre_tokenizer", sequence()), "pre_tokenizer: found no steps"),
        (edit("pre_tokenizer", sequence(byte_level(True), DIGITS)), r"pretokenizers\[0\]: found the type 'ByteLevel'"),
        (edit("pre_tokenizer.add_prefix_space", True), "pre_tokenizer.add_prefix_space: found True, expected False"),
        (
            edit("pre_tokenizer", sequence(split("x") | {"behavior": "Removed"}, byte_level(False))),
            r"pretokenizers\[0\].behavior: found 'Removed', expected 'Isolated'",
        ),
        (edit("pre_tokenizer", sequence(split("x") | {"invert": True}, byte_level(False))), "invert: found True"),
        (edit("pre_tokenizer", sequence(split(r"\w+"), byte_level(False))), r"'\\\\w' at character 0 of .* not und"),
        (edit("pre_tokenizer", sequence(split(r"^x"), byte_level(False))), r"'\^' at character 0"),
        (edit("pre_tokenizer", sequence(split(r"[a-z&&[b]]"), byte_level(False))), "'&&' at character 4"),
        (edit("pre_tokenizer", sequence(split(r"(x"), byte_level(False))), "pattern: .* does not compile"),
        (edit("pre_tokenizer", sequence(split(r"(x"), DIGITS, byte_level(False))), "pattern: .* does not compile"),
        (edit("post_processor", {"type": "BertProcessing"}), "post_processor: found the type 'BertProcessing'"),
        (edit("decoder", {"type": "WordPiece"}), "decoder: found .*WordPiece.*, expected one of type ByteLevel"),
        (edit("added_tokens.0.lstrip", True), r"added_tokens\[0\].lstrip: found True, expected False"),
        (edit("added_tokens.0.id", "0"), r"added_tokens\[0\]: found .*, expected an id and its content"),
        (edit("added_tokens.1.id", 0), r"added_tokens: '</s>' has the id 0, expected 1 as in model.vocab"),
        (edit("added_tokens.3.id", 5), r"added_tokens: '<x>' has the id 5, expected"),
    ],
)
def test_what_is_not_understood_gives_one_error_with_file_and_field(tmp_path, change, message):
    content = make_json(byte_level(True))
    change(content)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(write(tmp_path, content))
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_merges_written_as_pairs_are_the_same(tmp_path):
    content = make_json(byte_level(True))
    as_texts = json_tokenizer(write(tmp_path, content))
    content["model"]["merges"] = [merge.split(" ") for merge in MERGES]
    assert json_tokenizer(write(tmp_path, content)).fingerprint == as_texts.fingerprint


def test_known_sequences_of_patterns_are_run_at_once_and_others_one_by_one():
    assert len(at_once(DEEPSEEK_V3)) == len(at_once((r"\p{N}", GPT2))) == 1
    assert at_once(("a", "b")) == ("a", "b")


def test_bytes_without_a_token_are_reported():
    ids = {character: k for k, character in enumerate(byte_characters()) if character != "A"}
    assert read_vocabulary(ids, [], fields=("vocab", "merges")).absent_bytes == [ord("A")]


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    file = tmp_path_factory.mktemp("deepseek") / "deepseek_v3_tokenizer.json"
    file.write_bytes(read_asset(file.name))
    return load_tokenizer(file), file


def test_deepseek_v3_has_the_published_ids(deepseek):
    """The expected ids were made with the tokenizers library 0.23.3."""
    ours, _ = deepseek
    assert ours.encode("The capital of France is") == [671, 6102, 294, 8760, 344]
    assert ours.encode("你好，世界 12345") == [30594, 303, 3427, 223, 6895, 1883]
    code = [3465, 285, 4042, 3395, 5562, 223, 1527, 666, 20, 223, 1823, 60173, 264]
    assert ours.encode("def f(x):\n\treturn  x**2  # größer") == code
    assert ours.encode("テスト・ケース 100万") == [109288, 4825, 33323, 37046, 223, 1457, 2115]
    assert ours.encode(" \r\n\n  !?'Ll") == [223, 204, 271, 223, 4050, 42532, 85209]
    assert ours.encode("👨‍👩‍👧é") == [25730, 104, 46088, 25730, 105, 46088, 25730, 103, 619]
    assert ours.encode("<think>a</think>") == [128821, 67, 128822]
    plain = [30, 28217, 8277, 5487, 226, 2154, 5487, 226, 85, 51015, 28217, 32]
    assert ours.encode("<｜begin▁of▁sentence｜>") == plain
    chat = "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>"
    assert ours.encode(chat, allow_special=True) == [0, 128803, 6366, 128804]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.prefix_ids, ours.vocab_size) == (0, 1, 1, (0,), 129280)


def test_deepseek_v3_agrees_with_the_library(deepseek):
    ours, file = deepseek
    theirs = reference(json.loads(file.read_bytes()))

    @settings(max_examples=200)
    @given(TEXTS)
    def agree(text):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text

    agree()
