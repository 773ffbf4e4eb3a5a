"""The vocabulary formats: what is read, what is refused, and that text survives the round trip."""

import base64
import gzip
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import InputError
from jaxllm.tokenizers import StreamDecoder, find_tokenizer, load_tokenizer
from jaxllm.tokenizers.tiktoken_bpe import CONFIG_FILE, QWEN_FILE, QWEN_PATTERN, RANKS_FILE, TiktokenBPE, qwen_tokenizer

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
        ({"special_tokens": {"<|end|>": 5}}, r"'<\|end\|>' has the id 5, expected each of 262 to 262 once"),
        ({"special_tokens": {"<|end|>": 262, "<|x|>": 262}}, r"'<\|x\|>' has the id 262, expected each of 262 to 263"),
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
        (edit_ranks(lambda lines: [lines[0], *lines]), rf"{RANKS_FILE}:2: found rank '0', expected 1"),
        (edit_ranks(lambda lines: lines[:5] + lines[6:]), rf"{RANKS_FILE}:6: found rank '6', expected 5"),
        (edit_ranks(lambda lines: [*lines[:-1], b"aGU= 261"]), rf"{RANKS_FILE}:262: the token 'aGU=' .* twice"),
        (edit_ranks(lambda lines: lines[:-1]), "has the id 263, expected each of 261 to 262 once"),
        (lambda folder: (folder / RANKS_FILE).write_bytes(b""), "no token for the single byte 0x00"),
        (lambda folder: (folder / RANKS_FILE).unlink(), "found no tokenizer.tiktoken or qwen.tiktoken"),
        (lambda folder: (folder / CONFIG_FILE).unlink(), f"{CONFIG_FILE}: cannot read the file: No such file"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), f"{CONFIG_FILE}: not a JSON file"),
        (lambda folder: (folder / CONFIG_FILE).write_text("[]"), f"{CONFIG_FILE}: found list, expected a JSON object"),
        (edit_config(lambda c: c | {"patern": "x"}), "unknown key 'patern'; expected format_version, pattern,"),
        (edit_config(lambda c: {k: c[k] for k in c if k != "pad_token"}), "key 'pad_token' is missing"),
        (edit_config(lambda c: c | {"format_version": 2}), "format_version: found 2, expected 1"),
        (edit_config(lambda c: c | {"pattern": 3}), "pattern: found 3"),
        (edit_config(lambda c: c | {"special_tokens": ["<|end|>"]}), "special_tokens: found "),
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


def test_a_path_that_holds_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "cl100k.tiktoken").write_bytes(b"IQ== 0\n")
    for path in ("missing", "cl100k.tiktoken", ""):
        with pytest.raises(InputError, match=str(tmp_path / path)):
            load_tokenizer(tmp_path / path)


def test_a_qwen_file_with_other_content_is_refused(tmp_path):
    (tmp_path / QWEN_FILE).write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % k for k, t in enumerate(TOKENS)))
    with pytest.raises(InputError, match=r"qwen.tiktoken: found sha256 \w{64}, expected the published"):
        load_tokenizer(tmp_path)


def test_find_tokenizer_asks_the_model_folder_then_the_path_then_the_assets(tmp_path, monkeypatch):
    in_model, in_path = make_tokenizer(), make_tokenizer(normalization=None)
    in_model.save(tmp_path / "model")
    in_path.save(tmp_path / "configured")
    (tmp_path / "weights_only").mkdir()
    monkeypatch.delenv("JAXLLM_ASSETS", raising=False)
    assert find_tokenizer(tmp_path / "model", tmp_path / "configured").fingerprint == in_model.fingerprint
    assert find_tokenizer(tmp_path / "weights_only", tmp_path / "configured").fingerprint == in_path.fingerprint
    assert find_tokenizer(tmp_path / "weights_only", published=QWEN_FILE) is None
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        find_tokenizer(None, tmp_path / "nowhere")

    monkeypatch.setenv("JAXLLM_ASSETS", str(tmp_path / "weights_only"))
    assert find_tokenizer(published=QWEN_FILE) is None
    (tmp_path / "weights_only" / QWEN_FILE).write_bytes(b"not it")
    assert find_tokenizer() is None
    with pytest.raises(InputError, match="found sha256"):
        find_tokenizer(published=QWEN_FILE)
    monkeypatch.setenv("JAXLLM_ASSETS", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="JAXLLM_ASSETS"):
        find_tokenizer(published=QWEN_FILE)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The published vocabulary, as it is or gzipped, in the folder that JAXLLM_ASSETS names; not part of the tree."""
    assets = Path(os.environ.get("JAXLLM_ASSETS") or pytest.skip(f"JAXLLM_ASSETS names no folder with {QWEN_FILE}"))
    plain, packed = assets / QWEN_FILE, assets / f"{QWEN_FILE}.gz"
    if plain.exists():
        return qwen_tokenizer(plain)
    if not packed.exists():
        pytest.skip(f"{assets}, the folder that JAXLLM_ASSETS names, holds no {QWEN_FILE}")
    unpacked = tmp_path_factory.mktemp("qwen") / QWEN_FILE
    unpacked.write_bytes(gzip.decompress(packed.read_bytes()))
    return load_tokenizer(unpacked.parent)


def test_qwen_has_the_published_ids(qwen):
    assert qwen.encode("你好，世界 12345") == [108386, 3837, 99489, 220, 16, 17, 18, 19, 20]
    assert qwen.vocab_size == 151_851
    assert (qwen.bos_id, qwen.eos_id, qwen.pad_id) == (None, 151_643, 151_643)
    chat = "<|im_start|>user\n<|im_end|><|extra_0|><|extra_204|>"
    ids = qwen.encode(chat, allow_special=True)
    assert [ids[0], *ids[-3:]] == [151_644, 151_645, 151_646, 151_850]
    assert max(qwen.encode(chat)) < 151_643
    assert qwen.encode("e\u0301") == qwen.encode("\u00e9")


def test_qwen_can_be_saved_in_our_own_format(qwen, tmp_path):
    qwen.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == qwen.fingerprint
    assert loaded.encode("你好，世界 12345") == [108386, 3837, 99489, 220, 16, 17, 18, 19, 20]
