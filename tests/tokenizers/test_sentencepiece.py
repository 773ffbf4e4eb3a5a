"""sentencepiece models: the package's own ids, special tokens, decoding, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import InputError
from jaxllm.tokenizers import StreamDecoder, load_tokenizer, tokenizer_from_gguf
from jaxllm.tokenizers.sentencepiece_model import CONFIG_FILE, MODEL_FILE, SentencePieceTokenizer
from jaxllm.tokenizers.sentencepiece_proto import CONTROL, USER_DEFINED, ModelProto, Piece
from tests.tokenizers.sentencepiece_models import LLAMA, NO_DUMMY_PREFIX, NORMALIZING, sentencepiece, train


def llama(content=LLAMA, **options) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(content, bos_token="<s>", eos_token="</s>", prefix_tokens=("<s>",), **options)


CHATGLM3 = {"[MASK]": 340, "[gMASK]": 341, "sop": 343, "<|user|>": 345}
CASES = {
    "dummy prefix": llama(special_tokens=CHATGLM3 | {"<eoh>": 4}),
    "no dummy prefix": llama(NO_DUMMY_PREFIX, special_tokens=CHATGLM3 | {"<eoh>": 4}),
}
TEXTS = st.lists(
    st.sampled_from(["<s>", "<eoh>", "<eoa>", "[gMASK]", "sop", "<|user|>", " ", "  ", "\n", "hello", "你好", "👋"])
    | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=6)
).map("".join)


@pytest.mark.parametrize("case", CASES)
@given(text=TEXTS)
def test_any_text_survives_the_round_trip_and_holds_no_special_token(case, text):
    tokenizer = CASES[case]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.encode_to_numpy(text).tolist() == ids


@pytest.mark.parametrize("case", CASES)
@given(text=TEXTS)
def test_with_special_tokens_allowed_the_text_survives_as_well(case, text):
    tokenizer = CASES[case]
    ids = tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.special_tokens["<|user|>"]) == text.count("<|user|>")
    assert tokenizer.special_tokens["sop"] not in ids


@pytest.mark.parametrize("case", CASES)
@given(text=TEXTS)
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(case, text):
    tokenizer = CASES[case]
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token_id) for token_id in tokenizer.encode(text, allow_special=True)]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, CASES["dummy prefix"].vocab_size - 1).filter(lambda k: k not in (342, 344))))
def test_streaming_arbitrary_ids_gives_what_decoding_them_at_once_gives(ids):
    stream = StreamDecoder(CASES["dummy prefix"])
    assert "".join(map(stream.push, ids)) + stream.finish() == CASES["dummy prefix"].decode(ids)


def test_a_stream_that_continues_a_prompt_keeps_the_space_before_its_first_word():
    tokenizer = CASES["dummy prefix"]
    prompt, (first, *_) = tokenizer.encode("the quick"), tokenizer.encode("hello")
    assert StreamDecoder(tokenizer, after=prompt).push(first) == " hello"
    assert StreamDecoder(tokenizer, after=tokenizer.prefix_ids).push(first) == "hello"
    assert StreamDecoder(tokenizer).push(first) == "hello"


@pytest.mark.parametrize("content", [LLAMA, NO_DUMMY_PREFIX, NORMALIZING])
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_ids_and_texts_are_those_of_the_package(content, text):
    """Texts without what the package reads as its user-defined symbols; those are text here only where listed."""
    ours, theirs = SentencePieceTokenizer(content), sentencepiece.SentencePieceProcessor(model_proto=content)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_normalizing_models_change_text_as_documented():
    tokenizer = SentencePieceTokenizer(NORMALIZING)
    assert tokenizer.decode(tokenizer.encode("  ｈello  \n there ")) == "hello there"
    assert tokenizer.decode(tokenizer.encode("hello ☃")) == "hello  \u2047 "
    assert llama().decode(llama().encode("a▁b")) == "a b"


def test_token_bytes():
    tokenizer = CASES["dummy prefix"]
    pieces = {piece.text: k for k, piece in enumerate(ModelProto(LLAMA).pieces)}
    assert tokenizer.token_bytes(pieces["<0xE4>"]) == b"\xe4"
    assert tokenizer.token_bytes(pieces["▁the"]) == b" the"
    assert tokenizer.token_bytes(0) == " \u2047 ".encode()
    assert tokenizer.token_bytes(345) == b"<|user|>"
    assert tokenizer.vocab_size == 346
    with pytest.raises(ValueError, match="token id 342: expected 0 to 345"):
        tokenizer.token_bytes(342)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_folder_holds_the_same_tokenizer_and_the_published_model(tmp_path, case):
    tokenizer = CASES[case]
    tokenizer.save(tmp_path)
    assert (tmp_path / MODEL_FILE).read_bytes() == tokenizer.content
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    text = "hello <eoh>[gMASK]你好"
    assert loaded.encode_prompt(text, allow_special=True) == tokenizer.encode_prompt(text, allow_special=True)


def test_the_fingerprint_changes_with_everything_that_changes_ids():
    others = [llama(), llama(NO_DUMMY_PREFIX), llama(special_tokens={"<eoh>": 4}), llama(pad_token="</s>")]
    assert len({tokenizer.fingerprint for tokenizer in others}) == 4


def test_broken_files_and_texts_are_refused(tmp_path):
    file = tmp_path / "tokenizer.model"
    for content in (b"", LLAMA[:-3], b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"hello", LLAMA[:2000]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=str(file)):
            load_tokenizer(file)
    with pytest.raises(InputError, match="spaces at the end of words"):
        llama(train(model_type="bpe", vocab_size=80, treat_whitespace_as_suffix=True))
    with pytest.raises(InputError, match="lone surrogate"):
        llama().encode("\ud800")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.replace("bos_token", "bos"), "unknown key 'bos'"),
        (lambda config: config.replace('"first_id": 0', '"first": 0'), "unknown key 'first'"),
        (lambda config: config.replace(',\n  "first_id": 0', ""), "key 'first_id' is missing"),
        (lambda config: config.replace('"format_version": 1', '"format_version": 2'), "format_version: found 2"),
        (lambda config: config.replace('"bos_token": "<s>"', '"bos_token": "<S>"'), "bos_token: found '<S>'"),
        (lambda config: config.replace('"first_id": 0', '"first_id": "0"'), "first_id: found '0'"),
        (lambda config: config.replace('"sop": 343', '"sop": "y"'), r"special_tokens: found .*'sop': 'y'"),
        (lambda config: config[:20], "not a JSON file"),
    ],
)
def test_a_damaged_folder_gives_one_error_that_names_the_file(tmp_path, change, message):
    CASES["dummy prefix"].save(tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_pieces_change_and_all_else_stays():
    proto = ModelProto(LLAMA)
    assert ModelProto(proto.serialize()).pieces == proto.pieces
    proto.pieces.append(Piece("<new>", -1.5, USER_DEFINED))
    changed = sentencepiece.SentencePieceProcessor(model_proto=proto.serialize())
    assert changed.encode("<new>")[-1] == len(proto.pieces) - 1
    assert changed.encode("hello 你") == sentencepiece.SentencePieceProcessor(model_proto=LLAMA).encode("hello 你")


def gguf_fields(content: bytes) -> dict:
    pieces = ModelProto(content).pieces
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.kind for piece in pieces],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_a_gguf_of_a_sentencepiece_model_gives_the_same_ids(text):
    assert FROM_GGUF.encode(text) == llama().encode(text)


FROM_GGUF = tokenizer_from_gguf(gguf_fields(LLAMA))


def test_a_gguf_tells_prefix_and_special_tokens():
    assert FROM_GGUF.encode_prompt("hello") == [1, *llama().encode("hello")]
    assert FROM_GGUF.special_tokens == {"<s>": 1, "</s>": 2}
    fields = gguf_fields(NO_DUMMY_PREFIX)
    fields |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    fields["tokenizer.ggml.token_type"][4] = CONTROL
    plain = tokenizer_from_gguf(fields)
    assert plain.encode_prompt("hello") == llama(NO_DUMMY_PREFIX).encode("hello")
    assert plain.special_tokens["<eoh>"] == 4
    with pytest.raises(InputError, match=r"tokenizer.ggml.scores: found 0 entries, expected"):
        tokenizer_from_gguf(fields | {"tokenizer.ggml.scores": []})
