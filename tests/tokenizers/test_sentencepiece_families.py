"""Which special tokens, prompts and ids the families make of their sentencepiece models."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxllm.errors import InputError
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.sentencepiece_families import ICETK_SPECIALS, ICETK_TEXTS, SPECIALS, sentencepiece_tokenizer
from jaxllm.tokenizers.sentencepiece_model import SentencePieceTokenizer
from jaxllm.tokenizers.sentencepiece_proto import ModelProto
from tests.tokenizers.sentencepiece_models import ICETK, LLAMA, sentencepiece
from tests.tokenizers.vocabulary_files import read_asset


def read(tmp_path, content: bytes, family: str) -> SentencePieceTokenizer:
    file = tmp_path / "model.model"
    file.write_bytes(content)
    return sentencepiece_tokenizer(file, family)


# Pieces of the model as published, and ids that the documents give.
PUBLISHED_IDS = {
    "internlm2": (92544, {"<|plugin|>": 92538, "<|action_end|>": 92540, "<|im_end|>": 92542, "<|im_start|>": 92543}),
    "chatglm2": (64789, {"[MASK]": 64789, "[gMASK]": 64790, "[sMASK]": 64791, "sop": 64792, "eop": 64793}),
    "chatglm3": (64789, {"sop": 64792, "<|system|>": 64794, "<|assistant|>": 64796, "<|observation|>": 64797}),
    "glm_10b_chinese": (50000, {"<|endoftext|>": 50000, "<|endofpiece|>": 50007, "[gMASK]": 50007, "[sMASK]": 50008}),
    "glm_large_chinese": (50000, {"[CLS]": 50002, "<|startofpiece|>": 50006, "[sMASK]": 50008, "[gMASK]": 50009}),
}


@pytest.mark.parametrize("family", PUBLISHED_IDS)
def test_special_tokens_follow_the_pieces_as_published(tmp_path, family):
    tokenizer = read(tmp_path, LLAMA, family)
    num_pieces, published = PUBLISHED_IDS[family]
    here = len(ModelProto(LLAMA).pieces)
    assert {name: tokenizer.special_tokens[name] - here for name in published} == {
        name: token_id - num_pieces for name, token_id in published.items()
    }


@pytest.mark.parametrize(
    ("family", "names", "prefix", "suffix"),
    [
        ("llama", ("<s>", "</s>", None), ["<s>"], []),
        ("baichuan", ("<s>", "</s>", "<unk>"), [], []),
        ("baichuan2", ("<s>", "</s>", "<unk>"), [], []),
        ("internlm", ("<s>", "</s>", None), ["<s>"], []),
        ("internlm2", ("<s>", "</s>", "</s>"), ["<s>"], []),
        ("chatglm2", ("<s>", "</s>", "<unk>"), ["[gMASK]", "sop"], []),
        ("chatglm3", ("<s>", "</s>", "<unk>"), ["[gMASK]", "sop"], []),
        ("glm_10b_chinese", (None, "<|endoftext|>", "<|endoftext|>"), ["[CLS]"], ["[gMASK]", "<|startofpiece|>"]),
    ],
)
def test_each_family_has_its_ends_and_its_prompt(tmp_path, family, names, prefix, suffix):
    tokenizer = read(tmp_path, LLAMA, family)
    ids = {None: None, "<unk>": 0} | tokenizer.special_tokens
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == tuple(ids[name] for name in names)
    expected = [*(ids[name] for name in prefix), *tokenizer.encode("hello"), *(ids[name] for name in suffix)]
    assert tokenizer.encode_prompt("hello") == expected
    for text in (*SPECIALS[family].in_model, *SPECIALS[family].after_model):
        assert tokenizer.special_tokens[text] not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(f"a{text}b")) == f"a{text}b"


def test_what_two_special_tokens_share_decodes_to_the_first(tmp_path):
    tokenizer = read(tmp_path, LLAMA, "glm_10b_chinese")
    shared = tokenizer.special_tokens["[gMASK]"]
    assert shared == tokenizer.special_tokens["<|endofpiece|>"]
    assert tokenizer.decode([shared]) == "<|endofpiece|>"
    assert tokenizer.encode("[gMASK]", allow_special=True) == [shared]


@pytest.mark.parametrize(("family", "first_id"), [("chatglm", 0), ("glm130b", 20_000)])
def test_icetk_gets_its_special_blank_and_byte_pieces(tmp_path, family, first_id):
    """As published the model has 130,000 pieces: tab 130008, n blanks 130007 + n, bytes from 130088."""
    tokenizer = read(tmp_path, ICETK, family)
    after = first_id + len(ModelProto(ICETK).pieces)
    assert [tokenizer.special_tokens[text] - after for text in ICETK_SPECIALS] == list(range(8))
    space, line_break = (first_id + sentencepiece.SentencePieceProcessor(model_proto=ICETK)[t] for t in ("▁", "<n>"))
    assert tokenizer.encode("\t") == [space, after + 8]
    assert tokenizer.encode(" " * 83) == [space, after + 7 + 80, after + 7 + 3]
    assert tokenizer.encode("\n\n") == [space, line_break, line_break]
    assert tokenizer.encode("👋") == [space, *(after + 88 + byte for byte in "👋".encode())]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (after + 4, after + 5)
    assert tokenizer.encode_prompt("\t")[-2:] == [after + 1, after + 4]
    assert tokenizer.vocab_size == after + 344
    text = "def f():\n\treturn  1  # 你好 [gMASK]<sop>" + " " * 200
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode(text) == tokenizer.encode(text)


@pytest.fixture(scope="module")
def icetk(tmp_path_factory):
    return read(tmp_path_factory.mktemp("icetk"), ICETK, "chatglm")


@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁")))
def test_icetk_keeps_any_text_but_its_own_pieces(icetk, text):
    assume(not any(piece in text for piece in ICETK_TEXTS))
    assert icetk.decode(icetk.encode(text)) == text


def test_icetk_reads_its_own_pieces_as_what_they_stand_for(icetk):
    """As the reference does: "<n>" cannot be told from a line break."""
    assert icetk.decode(icetk.encode("a<n>b<|tab|><|blank_3|>c")) == "a\nb\t   c"


def test_a_model_without_the_pieces_of_the_family_is_refused(tmp_path):
    proto = ModelProto(LLAMA)
    proto.pieces = [piece for piece in proto.pieces if piece.text != "<eoh>"]
    with pytest.raises(InputError, match="found no piece '<eoh>', expected one in the model of internlm"):
        read(tmp_path, proto.serialize(), "internlm")


# The documents' examples, of files that are in no public package: read where JAXLLM_ASSETS holds them.
CODE = "def main():\n    print('hello world')\t# greeting"
CODE_IDS = [1616, 594, 125936, 4, 130011, 2274, 89, 7283, 398, 125686, 130008, 61, 25672, 130001, 130004]


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("chatglm.model", "你好", [5, 74874, 130001, 130004]),
        ("chatglm.model", CODE, CODE_IDS),
        ("chatglm2.model", "你好", [64790, 64792, 36474, 54591]),
        ("chatglm3.model", "\n", [64790, 64792, 30910, 13]),
    ],
)
def test_the_published_files_give_the_published_ids(tmp_path, name, text, ids):
    file = tmp_path / name
    file.write_bytes(read_asset(name))
    assert load_tokenizer(file).encode_prompt(text) == ids


def test_internlm_as_published(tmp_path):
    file = tmp_path / "internlm.model"
    file.write_bytes(read_asset(file.name))
    internlm = load_tokenizer(file)
    assert [internlm.token_bytes(token_id) for token_id in internlm.encode("12345")] == [b"123", b"45"]
    assert (internlm.special_tokens["<eoh>"], internlm.special_tokens["<eoa>"]) == (103027, 103028)
    assert internlm.vocab_size == 103168
