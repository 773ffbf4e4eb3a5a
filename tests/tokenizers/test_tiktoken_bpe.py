"""The vocabulary formats: what is read, what is refused, and that text survives the round trip."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import InputError
from jaxllm.tokenizers import StreamDecoder, load_tokenizer
from jaxllm.tokenizers.tiktoken_bpe import CONFIG_FILE, QWEN_PATTERN, RANKS_FILE, TiktokenBPE

BYTES = [bytes([byte]) for byte in range(256)]
TOKENS = [*BYTES, b"he", b"ll", b"hell", b"hello", " 世".encode()[:2], "世".encode()]
SPECIALS = {"<|end|>": len(TOKENS), "<|start|>": len(TOKENS) + 1}


def make_tokenizer(**changes) -> TiktokenBPE:
    arguments = {
        "pattern": QWEN_PATTERN,
        "special_tokens": SPECIALS,
        "normalization": "NFC",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
    }
    return TiktokenBPE(changes.pop("tokens", TOKENS), **(arguments | changes))


TOKENIZER = make_tokenizer()


@given(st.text())
def test_any_text_survives_the_round_trip_in_its_normal_form(text):
    normal = unicodedata.normalize("NFC", text)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == normal
    ids = TOKENIZER.encode_to_numpy(text)
    assert ids.dtype == np.int32
    assert TOKENIZER.decode_bytes(ids) == normal.encode()


@given(st.text())
def test_without_normalization_the_very_same_text_comes_back(text):
    plain = make_tokenizer(normalization=None)
    assert plain.decode(plain.encode(text)) == text


def test_merges_follow_the_ranks_and_specials_are_text_unless_allowed():
    assert TOKENIZER.encode("hello") == [TOKENS.index(b"hello")]
    assert TOKENIZER.encode("help") == [TOKENS.index(b"he"), ord("l"), ord("p")]
    assert TOKENIZER.encode("<|end|>") == list(b"<|end|>")
    assert TOKENIZER.encode("hello<|end|>", allow_special=True) == [TOKENS.index(b"hello"), SPECIALS["<|end|>"]]
    assert TOKENIZER.decode(TOKENIZER.encode("a<|start|>b", allow_special=True)) == "a<|start|>b"


def test_special_ids_and_vocab_size():
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id) == (None, len(TOKENS), len(TOKENS))
    assert TOKENIZER.vocab_size == len(TOKENS) + 2
    for token_id in (-1, TOKENIZER.vocab_size):
        with pytest.raises(ValueError, match=f"token id {token_id}: expected 0 to {TOKENIZER.vocab_size - 1}"):
            TOKENIZER.token_bytes(token_id)


def test_incomplete_characters_decode_to_the_replacement_character():
    assert TOKENIZER.decode([0xE4, 0xB8]) == "\ufffd"


@given(st.text())
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(text):
    normal = unicodedata.normalize("NFC", text)
    stream = StreamDecoder(TOKENIZER)
    pieces = [stream.push(token_id) for token_id in TOKENIZER.encode(text)]
    assert stream.finish() == ""
    assert "".join(pieces) == normal
    for k in range(len(pieces)):
        assert normal.startswith("".join(pieces[:k]))


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_streaming_arbitrary_ids_gives_what_decoding_them_at_once_gives(ids):
    stream = StreamDecoder(TOKENIZER)
    assert "".join(map(stream.push, ids)) + stream.finish() == TOKENIZER.decode(ids)


def test_a_saved_folder_loads_as_the_same_tokenizer(tmp_path):
    TOKENIZER.save(tmp_path / "new" / "folder")
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == [RANKS_FILE, CONFIG_FILE]
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / RANKS_FILE):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == TOKENIZER.fingerprint
        assert loaded.encode("hello 世界<|end|>", allow_special=True) == TOKENIZER.encode(
            "hello 世界<|end|>", allow_special=True
        )
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (None, TOKENIZER.eos_id, TOKENIZER.pad_id)


def test_a_folder_that_cannot_be_written_gives_one_error_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / CONFIG_FILE).mkdir(parents=True)
    for folder in (tmp_path / "file" / "folder", tmp_path / "folder"):
        with pytest.raises(InputError, match=f"{folder}: the tokenizer cannot be written: "):
            TOKENIZER.save(folder)
    assert not [file for file in tmp_path.rglob(".*")]


def test_the_fingerprint_changes_with_everything_that_changes_ids():
    others = [
        make_tokenizer(tokens=[*TOKENS[:-2], TOKENS[-1], TOKENS[-2]]),
        make_tokenizer(pattern=r"\S+|\s+"),
        make_tokenizer(normalization=None),
        make_tokenizer(special_tokens={"<|end|>": len(TOKENS), "<|begin|>": len(TOKENS) + 1}),
        make_tokenizer(eos_token="<|start|>"),
    ]
    fingerprints = {tokenizer.fingerprint for tokenizer in [TOKENIZER, *others]}
    assert len(fingerprints) == 6
    assert make_tokenizer().fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": BYTES[:-1]}, "no token for the single byte 0xff"),
        ({"absent_bytes": [255]}, "a token for the single byte 0xff"),
        ({"special_tokens": {"<|end|>": 5}}, r"special_tokens: '<\|end\|>' has the id 5, expected a whole number no"),
        ({"special_tokens": {"<|end|>": 262, "<|x|>": 262}}, r"'<\|x\|>' has the id 262, expected"),
        ({"special_tokens": {"<|end|>": -1}}, "has the id -1"),
        ({"added_tokens": {"<x>": 262}}, "added_tokens: '<x>' has the id 262"),
        ({"raw_tokens": ["<x>"]}, "raw_tokens: found '<x>', expected one of special_tokens"),
        ({"prefix_tokens": ["<s>"]}, "prefix_tokens: found '<s>'"),
        ({"special_tokens": {"<|end|>": "262"}}, "has the id '262'"),
        ({"special_tokens": {"<|end|>": 262, "": 263}}, "empty text"),
        ({"eos_token": "</s>"}, "eos_token: found '</s>', expected one of special_tokens"),
        ({"normalization": "NFKC"}, "normalization: found 'NFKC', expected \"NFC\" or null"),
        ({"pattern": r"(\p{L}"}, "pattern: .* does not compile"),
    ],
)
def test_what_cannot_be_a_tokenizer_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_tokenizer(**changes)


def test_text_that_is_not_unicode_or_cannot_be_cut_is_refused():
    with pytest.raises(InputError, match=r"lone surrogate U\+D83D at character 2"):
        TOKENIZER.encode("ab\ud83d")
    with pytest.raises(InputError, match="text of 2,000,001 characters cannot be cut into pieces"):
        TOKENIZER.encode_to_numpy(" " * 2_000_000 + "x")


def edit_ranks(change):
    def edit(folder: Path):
        lines = (folder / RANKS_FILE).read_bytes().splitlines()
        (folder / RANKS_FILE).write_bytes(b"\n".join(change(lines)) + b"\n")

    return edit


def edit_config(change):
    def edit(folder: Path):
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(change(config)))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_ranks(lambda lines: [*lines[:9], b"!!! 9", *lines[10:]]), rf"{RANKS_FILE}:10: found '!!! 9', expected"),
        (edit_ranks(lambda lines: [*lines[:9], b"CQ==", *lines[10:]]), rf"{RANKS_FILE}:10: found 'CQ==', expected"),
        (edit_ranks(lambda lines: [lines[0], *lines]), rf"{RANKS_FILE}:2: found rank '0', expected one that"),
        (
            edit_ranks(lambda lines: [*lines[:9], b"CQ== -9", *lines[10:]]),
            rf"{RANKS_FILE}:10: found rank '-9', expected",
        ),
        (edit_ranks(lambda lines: lines[:5] + lines[6:]), rf"{RANKS_FILE}:6: found rank '6', expected 5"),
        (edit_ranks(lambda lines: [*lines[:-1], b"aGU= 261"]), rf"{RANKS_FILE}:262: the token 'aGU=' .* twice"),
        (lambda folder: (folder / RANKS_FILE).write_bytes(b""), "no token for the single byte 0x00"),
        (lambda folder: (folder / RANKS_FILE).unlink(), "found none of tokenizer.tiktoken, "),
        (lambda folder: (folder / CONFIG_FILE).unlink(), f"{CONFIG_FILE}: cannot read the file: No such file"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), f"{CONFIG_FILE}: not a JSON file"),
        (lambda folder: (folder / CONFIG_FILE).write_text("[]"), f"{CONFIG_FILE}: found list, expected a JSON object"),
        (edit_config(lambda c: c | {"patern": "x"}), "unknown key 'patern'; expected format_version, pattern,"),
        (edit_config(lambda c: {k: c[k] for k in c if k != "pad_token"}), "key 'pad_token' is missing"),
        (edit_config(lambda c: c | {"format_version": 2}), "format_version: found 2, expected 1"),
        (edit_config(lambda c: c | {"pattern": 3}), "pattern: found 3"),
        (edit_config(lambda c: c | {"special_tokens": ["<|end|>"]}), "special_tokens: found "),
        (edit_config(lambda c: c | {"first_patterns": "x"}), "first_patterns: found 'x', expected a list of texts"),
        (edit_config(lambda c: c | {"absent_bytes": ["x"]}), "absent_bytes: found .* expected a list of numbers"),
        (edit_config(lambda c: c | {"merging_lines": -1}), "merging_lines: found -1, expected a number of lines"),
        (edit_config(lambda c: c | {"bos_token": "<s>"}), "bos_token: found '<s>'"),
        (edit_config(lambda c: c | {"bos_token": ["<s>"]}), r"bos_token: found \['<s>'\]"),
    ],
)
def test_a_damaged_folder_gives_one_error_that_names_the_file(tmp_path, damage, message):
    TOKENIZER.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


IDS = [1000 + 3 * rank for rank in range(len(TOKENS))]
SCATTERED = {
    "ids": IDS,
    "decode_only": {b"never": 7},
    "special_tokens": {"<|end|>": 2, "<|start|>": 5},
    "added_tokens": {"<think>": 3, "<th": 4, "<|end|>>": 6},
    "raw_tokens": ["<th"],
    "first_patterns": [r"\p{N}", r"[\r\n]"],
    "prefix_tokens": ["<|start|>"],
    "suffix_tokens": ["<|end|>", "<|start|>"],
}


def test_ids_need_not_be_ranks_and_a_saved_folder_keeps_all_of_it(tmp_path):
    scattered = make_tokenizer(**SCATTERED)
    assert scattered.encode("hello") == [IDS[TOKENS.index(b"hello")]]
    assert scattered.decode([7, 2]) == "never<|end|>"
    assert scattered.vocab_size == IDS[-1] + 1
    with pytest.raises(ValueError, match="token id 8: "):
        scattered.token_bytes(8)
    scattered.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == scattered.fingerprint != TOKENIZER.fingerprint
    text = "hello<think>1\uffff2<|end|>\n世"
    assert loaded.encode(text, allow_special=True) == scattered.encode(text, allow_special=True)
    assert loaded.encode_prompt("a") == [5, IDS[ord("a")], 2, 5]
    assert loaded.decode_only == {b"never": 7}


@given(
    st.lists(st.sampled_from(["<|end|>", "<think>", "<th", "1", "\n", "hello", "\uffff", "e\u0301", "世"])).map("".join)
)
def test_added_tokens_come_out_of_every_text_and_special_ones_only_when_asked(text):
    scattered = make_tokenizer(**SCATTERED)
    ids = scattered.encode(text)
    assert not {2, 5} & set(ids)
    assert scattered.decode(ids) == unicodedata.normalize("NFC", text)
    assert ids.count(4) == text.count("<th")
    assert scattered.encode(text, allow_special=True).count(2) == text.count("<|end|>") - text.count("<|end|>>")


def test_tokens_are_cut_out_before_or_after_the_normalization():
    tokens = {"a": 300, "\u00e9": 301}
    after = make_tokenizer(added_tokens=tokens)
    before = make_tokenizer(added_tokens=tokens, raw_tokens=list(tokens))
    assert after.encode("ae\u0301") == [300, 301]
    assert before.encode("ae\u0301") == [300, *"\u00e9".encode()]
    assert after.encode("a\u0301") == list("\u00e1".encode())
    assert before.encode("a\u0301") == [300, *"\u0301".encode()]


def test_text_that_no_pattern_matches_is_kept():
    letters = make_tokenizer(pattern="[a-z]+")
    assert letters.decode(letters.encode("abc -- DEF\0x")) == "abc -- DEF\0x"


def test_several_patterns_cut_one_after_the_other():
    """As the pre-tokenizers of the tokenizers library do: each sees only one piece of the one before."""
    one, two = make_tokenizer(), make_tokenizer(first_patterns=["l"])
    assert one.encode("hello") == [TOKENS.index(b"hello")]
    assert two.encode("hello") == [TOKENS.index(b"he"), ord("l"), ord("l"), ord("o")]
    assert two.encode("hell\uffff") == [TOKENS.index(b"he"), ord("l"), ord("l"), *"\uffff".encode()]
    with pytest.raises(InputError, match="captures groups"):
        make_tokenizer(first_patterns=["(l)"])


def test_text_with_a_byte_that_has_no_token_is_refused():
    lacking = make_tokenizer(
        tokens=BYTES[:4] + BYTES[5:], special_tokens={}, eos_token=None, pad_token=None, absent_bytes=[4]
    )
    assert lacking.decode(lacking.encode("a\x03")) == "a\x03"
    with pytest.raises(InputError, match=r"no token for a byte of the character U\+0004"):
        lacking.encode("a\x04")
