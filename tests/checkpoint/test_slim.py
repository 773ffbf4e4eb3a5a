"""A checkpoint without some of its ids is the same model on the ids that are left, and so is its tokenizer."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.checkpoint.hf import save_checkpoint
from jaxllm.checkpoint.slim import slim_checkpoint
from jaxllm.checkpoint.slim_tokenizer import CHATGLM, slim_tokenizer
from jaxllm.checkpoint.tensors import INDEX_FILE, TensorFolder
from jaxllm.errors import InputError
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.sentencepiece_model import SentencePieceTokenizer
from jaxllm.tokenizers.shrink import keep_ids, with_parts
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE
from jaxllm.tokenizers.train import BYTES, train_bpe
from tests.conftest import GOLDENS
from tests.tiny_models import LLAMA, random_params

TEXTS = ["the cat sat on the mat, the cat sat on the log"] * 5 + ["der Hund saß auf der Matte, der Hund"] * 5
ENGLISH = ["the cat sat on the log", "the mat"]
TOKENIZER = train_bpe(TEXTS, vocab_size=296)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny llama with more rows than its tokenizer has ids, as published."""
    folder = tmp_path_factory.mktemp("model") / "saved"
    spec = dataclasses.replace(LLAMA, vocab_size=304)
    save_checkpoint(folder, spec, random_params(spec), tokenizer=TOKENIZER)
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": TOKENIZER.eos_id, "pad_token_id": -1, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [TOKENIZER.eos_id, 290], "pad_token_id": TOKENIZER.pad_id, "max_new_tokens": 5}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("name", ["llama-tied", "qwen1-short"])
def test_the_logits_of_the_ids_left_are_what_they_were(name, tmp_path):
    golden = GOLDENS / "models" / name
    summary = slim_checkpoint(golden, tmp_path / "slim", drop=range(10, 74))
    assert (summary.rows_before, summary.rows_after) == (128, 64)
    assert summary.tokenizer == "the folder holds no tokenizer"
    before, after = (jaxllm.load_pretrained(path, dtype="float32") for path in (golden, tmp_path / "slim"))
    kept = np.r_[0:10, 74:128]
    new = np.random.default_rng(0).integers(0, 64, (2, 7))
    expected = np.asarray(before.logits(kept[new]))[..., kept]
    np.testing.assert_allclose(after.logits(new), expected, atol=1e-5, rtol=1e-5)
    assert after.config == before.config | {"vocab_size": 64}


def test_chatglm_without_its_lowest_ids_finds_its_masks_again(tmp_path):
    golden = GOLDENS / "models_glm" / "chatglm-6b-mask"
    first = tmp_path / "first"
    shutil.copytree(golden, first, ignore=shutil.ignore_patterns("golden.npz", "meta.json"))
    config = json.loads((golden / "config.json").read_text()) | {"pad_token_id": 103}
    (first / "config.json").write_text(json.dumps(config))
    slim_checkpoint(first, tmp_path / "slim", drop=range(100))
    before, after = (jaxllm.load_pretrained(path, dtype="float32") for path in (first, tmp_path / "slim"))
    ids = {name: after.config[f"{name}_token_id"] for name in ("mask", "gmask", "bos", "eos", "pad")}
    assert ids == {"mask": 34, "gmask": 35, "bos": 36, "eos": 37, "pad": 3}
    prompt = np.array([[10, 11, 12, ids["mask"], 13, ids["bos"], 14, 15]])
    expected = np.asarray(before.logits(prompt + 100))[..., 100:]
    np.testing.assert_allclose(after.logits(prompt), expected, atol=1e-5, rtol=1e-5)


def test_every_other_tensor_stays_bitwise_in_its_file(tmp_path):
    golden = GOLDENS / "models" / "llama2-gqa"
    tensors = load_file(golden / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    files = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, sharded / file)
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": files}))
    (sharded / "config.json").write_bytes((golden / "config.json").read_bytes())
    slim_checkpoint(sharded, tmp_path / "slim", drop=range(100, 128))
    slim = TensorFolder(tmp_path / "slim")
    assert slim.files == files
    for name, array in tensors.items():
        expected = array[:100] if name in ("model.embed_tokens.weight", "lm_head.weight") else array
        found = slim.read(name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_without_unused_ids_text_model_and_configs_agree(folder, tmp_path):
    tokenizer = TOKENIZER
    used = {token_id for text in ENGLISH for token_id in tokenizer.encode(text)} | {290}
    kept = sorted(with_parts(tokenizer, used))
    assert len(kept) < 290
    summary = slim_checkpoint(folder, tmp_path / "slim", keep=kept)
    before, after = (jaxllm.load_pretrained(path, dtype="float32") for path in (folder, tmp_path / "slim"))
    assert summary.rows_after == after.spec.vocab_size == after.tokenizer.vocab_size == len(kept)
    new_id = {old: new for new, old in enumerate(kept)}
    for text in ENGLISH:
        ids = tokenizer.encode(text)
        new_ids = after.tokenizer.encode(text)
        assert new_ids == [new_id[old] for old in ids]
    expected = np.asarray(before.logits(np.array([ids])))[..., kept]
    np.testing.assert_allclose(after.logits(np.array([new_ids])), expected, atol=1e-5, rtol=1e-5)
    assert after.tokenizer.decode(after.tokenizer.encode("der Hund saß")) == "der Hund saß"
    eos = new_id[tokenizer.eos_id]
    assert (after.config["eos_token_id"], after.config["pad_token_id"], after.config["bos_token_id"]) == (eos, -1, None)
    assert after.generation_config == {
        "eos_token_id": [eos, new_id[290]],
        "pad_token_id": eos,
        "max_new_tokens": 5,
    }


def test_rows_that_no_token_has_leave_the_tokenizer_as_it_is(folder, tmp_path):
    summary = slim_checkpoint(folder, tmp_path / "slim", drop=range(296, 304))
    assert "copied as it is" in summary.tokenizer
    assert load_tokenizer(tmp_path / "slim").fingerprint == TOKENIZER.fingerprint
    assert (tmp_path / "slim" / "tokenizer.tiktoken").read_bytes() == (folder / "tokenizer.tiktoken").read_bytes()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"drop": range(290, 305)}, "token id 304: expected 0 to 303"),
        ({"keep": [-1, 5]}, "token id -1: expected 0 to 303"),
        ({"drop": range(304)}, "0 of 304 ids would be kept"),
        ({"keep": range(304)}, "304 of 304 ids would be kept"),
        ({"drop": range(288, 290)}, r"config\.json: eos_token_id: the id 288 is among the ids to drop"),
        ({"drop": range(290, 291)}, r"generation_config\.json: eos_token_id: the id 290 is among"),
        ({"drop": range(97, 98)}, "token b'a' cannot be dropped: b'.*', which stays, is merged from it"),
        ({"drop": range(1)}, "no token for the single byte 0x00"),
    ],
)
def test_what_cannot_be_dropped_is_refused_and_nothing_is_written(folder, tmp_path, ids, message):
    with pytest.raises(InputError, match=message):
        slim_checkpoint(folder, tmp_path / "slim", **ids)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused(folder, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        slim_checkpoint(folder, tmp_path, drop=range(296, 304))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@given(st.lists(st.sampled_from(["the ", "cat", "sat", " on", "mat", "x"]), min_size=1).map("".join))
def test_a_text_of_kept_ids_is_cut_as_before(text):
    tokenizer = TOKENIZER
    ids = tokenizer.encode(text)
    kept = sorted(with_parts(tokenizer, ids))
    slim = keep_ids(tokenizer, kept)
    assert [kept[token_id] for token_id in slim.encode(text)] == ids
    assert {kept[token_id] for token_id in slim.special_tokens.values()} == set(tokenizer.special_tokens.values())


def test_a_tokenizer_whose_ids_are_not_ranks_can_lose_some():
    tokens = [*BYTES, b"ab", b"cd", b"abcd"]
    tokenizer = TiktokenBPE(
        tokens,
        ids=[*range(10, 266), 5, 6, 7],
        decode_only={b"xyz": 8},
        pattern=r"\S+|\s+",
        special_tokens={"<e>": 0, "<f>": 1, "<g>": 300},
        normalization=None,
        eos_token="<e>",
        prefix_tokens=["<f>"],
    )
    kept = [k for k in range(301) if k not in (7, 8)]
    slim = keep_ids(tokenizer, kept)
    assert [kept[token_id] for token_id in slim.encode("abcd ab")] == [5, 6, 42, 5]
    assert slim.special_tokens == {"<e>": 0, "<f>": 1, "<g>": 298} and slim.decode_only == {}
    for gone, message in ((5, "b'ab' cannot be dropped"), (0, "eos_token"), (1, "prefix_tokens"), (10, "byte 0x00")):
        with pytest.raises(InputError, match=message):
            keep_ids(tokenizer, [k for k in range(301) if k != gone])


def test_chatglm_loses_its_image_ids(tmp_path):
    (tmp_path / "ice_text.model").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").write_text('{"name_or_path": "x"}')
    files = {"ice_text.model", "tokenizer_config.json"}
    slim = slim_tokenizer(tmp_path, files, CHATGLM, range(20_000, 150_528), 150_528)
    assert slim.jsons == {"tokenizer_config.json": {"name_or_path": "x", "num_image_tokens": 0}}
    assert (slim.tokenizer, slim.replaced) == (None, frozenset())


def test_a_sentencepiece_model_loses_only_ids_before_its_own(tmp_path):
    tokenizer = train_sentencepiece(first_id=50)
    tokenizer.save(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    slim = slim_tokenizer(tmp_path, files, None, range(20, 500), 500)
    assert slim.replaced == files
    assert slim.tokenizer.encode("the cat") == [token_id - 20 for token_id in tokenizer.encode("the cat")]
    assert slim.tokenizer.eos_id == tokenizer.eos_id - 20
    assert slim_tokenizer(tmp_path, files, None, range(450), 500).tokenizer is None
    for kept in (range(60, 500), [*range(20), *range(21, 500)]):
        with pytest.raises(InputError, match="not byte-level BPE"):
            slim_tokenizer(tmp_path, files, None, kept, 500)


def train_sentencepiece(first_id):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=40, model_type="bpe", minloglevel=9
    )
    return SentencePieceTokenizer(model.getvalue(), eos_token="</s>", first_id=first_id)
