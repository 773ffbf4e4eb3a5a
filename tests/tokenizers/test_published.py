"""Which tokenizer a folder or file holds, and the vocabularies in tiktoken's format as they were published."""

import base64
import re

import pytest

from jaxllm.errors import InputError
from jaxllm.tokenizers import find_tokenizer, load_tokenizer
from jaxllm.tokenizers.patterns import CL100K, QWEN
from jaxllm.tokenizers.published import PUBLISHED, read_published
from jaxllm.tokenizers.rank_file import to_lines
from jaxllm.tokenizers.tiktoken_bpe import QWEN_FILE, TiktokenBPE
from tests.tokenizers.vocabulary_files import read_asset

BYTES = [bytes([byte]) for byte in range(256)]
TOKENS = [*BYTES, b"he", b"ll", b"hell", b"hello"]
RANKS = to_lines((token, rank) for rank, token in enumerate(TOKENS))


def make_tokenizer(normalization) -> TiktokenBPE:
    specials = {"<|end|>": len(TOKENS)}
    return TiktokenBPE(TOKENS, pattern=QWEN, special_tokens=specials, normalization=normalization, eos_token="<|end|>")


def test_a_path_that_holds_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "other.tiktoken").write_bytes(RANKS)
    for path in ("missing", "other.tiktoken", ""):
        with pytest.raises(InputError, match=str(tmp_path / path)):
            load_tokenizer(tmp_path / path)


@pytest.mark.parametrize("name", [QWEN_FILE, "cl100k_base.tiktoken"])
def test_a_known_file_with_other_content_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(RANKS)
    with pytest.raises(InputError, match=rf"{name}: found sha256 \w{{64}}, expected the published"):
        load_tokenizer(tmp_path)


def test_find_tokenizer_asks_the_model_folder_then_the_path_then_the_assets(tmp_path, monkeypatch):
    in_model, in_path = make_tokenizer("NFC"), make_tokenizer(None)
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
    (tmp_path / "weights_only" / "glm4.tiktoken").write_bytes(RANKS)
    assert find_tokenizer(published="glm4.tiktoken").special_tokens["[gMASK]"] == len(TOKENS) + 2
    monkeypatch.setenv("JAXLLM_ASSETS", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="JAXLLM_ASSETS"):
        find_tokenizer(published=QWEN_FILE)


def test_the_family_decides_between_files_of_one_name(tmp_path):
    """A file of another kind than the family's is read as what it is."""
    pytest.importorskip("sentencepiece", reason="needs the package sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    for published in (None, "glm4.tiktoken", "chatglm3.model"):
        assert find_tokenizer(tmp_path, published=published).prefix_tokens == ("[gMASK]", "<sop>")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05hello")
    with pytest.raises(InputError, match=r"tokenizer.model: not a sentencepiece model: "):
        find_tokenizer(tmp_path, published="glm4.tiktoken")


def test_every_name_of_a_published_tokenizer_tells_its_kind():
    suffixes = {"tiktoken": ".tiktoken", "json": ".json", "sentencepiece": ".model"}
    assert all(name.endswith(suffixes[entry.kind]) for name, entry in PUBLISHED.items())


def test_glm4_files_of_any_size_have_their_specials_after_the_ranks(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(RANKS)
    glm = load_tokenizer(file)
    first = len(TOKENS)
    assert glm.special_tokens["<|endoftext|>"] == glm.eos_id == glm.pad_id == first
    # As published the ranks are 151,329: [gMASK] 151331, <sop> 151333, <|user|> 151336, <|end_of_video|> 151342.
    names = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|end_of_video|>")
    published = [151331, 151333, 151335, 151336, 151337, 151338, 151342]
    assert [glm.special_tokens[name] - first for name in names] == [found - 151329 for found in published]
    assert glm.vocab_size - first == 151343 - 151329
    assert glm.encode_prompt("hello") == [first + 2, first + 4, TOKENS.index(b"hello")]
    assert (glm.bos_id, glm.normalization, glm.pattern) == (None, None, CL100K)


def test_glm4_files_with_a_fault_give_one_error_that_names_the_file(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(RANKS.replace(b"/w== 255\n", b""))
    with pytest.raises(InputError, match=re.escape(f"{file}:256: found rank '256', expected 255")):
        load_tokenizer(file)
    llama3 = b"".join(base64.b64encode(b"%06d" % rank) + b" %d\n" % rank for rank in range(128_000))
    file.write_bytes(llama3)
    with pytest.raises(InputError, match="found the 128,000 ranks of Llama 3"):
        load_tokenizer(file)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    file = tmp_path_factory.mktemp("qwen") / QWEN_FILE
    file.write_bytes(read_asset(QWEN_FILE))
    return load_tokenizer(file.parent)


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


def test_cl100k_has_the_published_ids(tmp_path):
    file = tmp_path / "cl100k_base.tiktoken"
    file.write_bytes(read_asset(file.name))
    cl100k = read_published(file, None)
    assert cl100k.encode("hello world 12345") == [15339, 1917, 220, 4513, 1774]
    assert cl100k.encode("<|endoftext|><|endofprompt|>", allow_special=True) == [100257, 100276]
    assert cl100k.vocab_size == 100_277
    assert max(cl100k.encode("<|endofprompt|>")) < 100_256
    with pytest.raises(ValueError, match="token id 100261"):
        cl100k.token_bytes(100_261)


def test_glm4_has_the_published_ids(tmp_path):
    file = tmp_path / "glm4.tiktoken"
    file.write_bytes(read_asset(file.name))
    glm = load_tokenizer(file)
    assert glm.encode_prompt("\n你好") == [151331, 151333, 198, 109377]
    assert [glm.special_tokens[text] for text in ("<|endoftext|>", "<|user|>", "<|end_of_video|>")] == [
        151329,
        151336,
        151342,
    ]
