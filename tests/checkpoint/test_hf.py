"""Published checkpoint folders in and out: every dtype and layout that comes, and every way one can be broken."""

import contextlib
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.checkpoint.hf import load_checkpoint, save_checkpoint
from jaxllm.checkpoint.tensors import INDEX_FILE, SINGLE_FILE, TensorFolder, split_into_files
from jaxllm.errors import InputError
from jaxllm.families.llama import LLAMA as LLAMA_FAMILY
from jaxllm.nn.model import abstract_params
from jaxllm.sharding.mesh import make_mesh
from tests.conftest import GOLDENS
from tests.tiny_models import LLAMA, QWEN, WINDOWED_QWEN, random_params

FLOAT32 = jnp.dtype(jnp.float32)
CONFIG = LLAMA_FAMILY.spec_to_hf(LLAMA)
INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """The tensors of a tiny llama, as published, float32."""
    folder = tmp_path_factory.mktemp("llama") / "saved"
    save_checkpoint(folder, LLAMA, random_params(LLAMA))
    return load_file(folder / SINGLE_FILE)


def write(folder, tensors, config=CONFIG, shards=None, index=None):
    """Write a published folder; `shards`: file of each tensor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in sorted(set(shards.values())) if shards else [SINGLE_FILE]:
        members = {name: array for name, array in tensors.items() if shards is None or shards.get(name) == file}
        save_file(members, folder / file, metadata={"format": "pt"})
    if shards:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index or shards}))
    return folder


def in_two_shards(tensors):
    return {name: SHARDS[i % 2] for i, name in enumerate(sorted(tensors))}


def load(folder, **options):
    return load_checkpoint(folder, **({"dtype": FLOAT32} | options))


def resave(folder, target, **options):
    spec, params, config, source = load(folder)
    save_checkpoint(target, spec, params, config=config, source=source, **options)
    return target


def assert_same_tensors(one, other):
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_half_precision_sources_compute_in_float32_and_save_bitwise(tensors, tmp_path, dtype):
    halves = {name: array.astype(np.float32 if "norm" in name else dtype) for name, array in tensors.items()}
    folder = write(tmp_path / "half", halves)
    _, params, _, _ = load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {FLOAT32}
    np.testing.assert_array_equal(params["embedding"], halves["model.embed_tokens.weight"].astype(np.float32))
    assert_same_tensors(load_file(resave(folder, tmp_path / "again") / SINGLE_FILE), halves)


def test_a_torch_linear_is_transposed_and_split_into_heads(tensors, tmp_path):
    _, params, _, _ = load(write(tmp_path / "full", tensors))
    weight = tensors["model.layers.2.self_attn.k_proj.weight"]  # [heads * head_dim, width]
    kernel = params["layers"]["attention"]["k"]["kernel"][2]
    assert kernel[5, 1, 3] == weight[1 * 8 + 3, 5]
    weight = tensors["model.layers.0.self_attn.o_proj.weight"]
    assert params["layers"]["attention"]["o"]["kernel"][0, 2, 7, 11] == weight[11, 2 * 8 + 7]


def test_saving_can_change_the_dtype_and_says_so(tensors, tmp_path):
    folder = write(tmp_path / "full", tensors, CONFIG | {"dtype": "float32"})
    saved = resave(folder, tmp_path / "half", dtype=jnp.dtype(jnp.bfloat16))
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    assert_same_tensors(load_file(saved / SINGLE_FILE), halves)
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_and_their_index_come_back(tensors, tmp_path):
    shards = in_two_shards(tensors)
    saved = resave(write(tmp_path / "two", tensors, shards=shards), tmp_path / "again")
    index = json.loads((saved / INDEX_FILE).read_text())
    assert index["weight_map"] == shards
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert_same_tensors({name: array for file in SHARDS for name, array in load_file(saved / file).items()}, tensors)
    assert not (saved / SINGLE_FILE).exists()
    one, two = (jax.tree.leaves(load(folder)[1]) for folder in (saved, write(tmp_path / "one", tensors)))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_buffers_are_kept_and_the_second_copy_of_a_tied_head_follows_the_embedding(tensors, tmp_path):
    extra = {INV_FREQ.format(layer): np.linspace(1, 0.1, 4, dtype=np.float32) for layer in range(3)}
    tied = tensors | extra | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    folder = write(tmp_path / "tied", tied, CONFIG | {"tie_word_embeddings": True})
    spec, params, config, source = load(folder)
    assert "head" not in params
    assert spec.head.tie_word_embeddings
    assert_same_tensors(load_file(resave(folder, tmp_path / "again") / SINGLE_FILE), tied)
    params["embedding"] = params["embedding"] + 1
    save_checkpoint(tmp_path / "trained", spec, params, config=config, source=source)
    trained = load_file(tmp_path / "trained" / SINGLE_FILE)
    np.testing.assert_array_equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"])


def test_a_tied_head_with_other_values_is_refused(tensors, tmp_path):
    folder = write(tmp_path / "tied", tensors, CONFIG | {"tie_word_embeddings": True})
    with pytest.raises(InputError, match=r"lm_head.weight differs from .*tie_word_embeddings"):
        load(folder)


def test_side_files_and_the_raw_config_come_back_even_when_the_source_is_gone(tensors, tmp_path):
    folder = write(tmp_path / "full", tensors, CONFIG | {"_name_or_path": "where it was trained"})
    side = {
        "generation_config.json": b'{"eos_token_id": [2, 7]}',
        "tokenizer.model": b"\0\1",
        "modeling_x.py": b"x = 1",
    }
    for name, content in side.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("not ours to copy")
    spec, params, config, source = load(folder)
    folder.rename(tmp_path / "gone")
    save_checkpoint(tmp_path / "again", spec, params, config=config, source=source)
    assert {name: (tmp_path / "again" / name).read_bytes() for name in side} == side
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted([*side, "config.json", SINGLE_FILE])
    assert json.loads((tmp_path / "again/config.json").read_text())["_name_or_path"] == "where it was trained"


@pytest.mark.parametrize("spec", [LLAMA, QWEN], ids=["llama", "qwen"])
def test_a_model_made_here_loads_back_equal(spec, tmp_path):
    params = random_params(spec)
    save_checkpoint(tmp_path / "made", spec, params, dtype=jnp.dtype(jnp.bfloat16))
    found, loaded, config, _ = load(tmp_path / "made")
    assert found == spec
    assert config["torch_dtype"] == "bfloat16"
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), loaded, params)


def test_a_model_made_in_bfloat16_is_saved_in_bfloat16(tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(LLAMA))
    save_checkpoint(tmp_path / "made", LLAMA, params)
    assert json.loads((tmp_path / "made/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {array.dtype for array in load_file(tmp_path / "made" / SINGLE_FILE).values()} == {np.dtype("bfloat16")}


def test_loading_onto_a_mesh_gives_the_declared_shardings(tensors, tmp_path):
    config = CONFIG | {"vocab_size": 64}
    padded = {name: np.pad(array, [(0, 3), (0, 0)]) if len(array) == 61 else array for name, array in tensors.items()}
    folder = write(tmp_path / "full", padded, config)
    mesh = make_mesh(fsdp=4, tensor=2)
    spec, sharded, _, _ = load(folder, mesh=mesh)
    _, alone, _, _ = load(folder)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(spec, mesh)):
        found, expected = sharded, alone
        for key in path:
            found, expected = found[key.key], expected[key.key]
        assert found.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), jax.tree_util.keystr(path)
        np.testing.assert_array_equal(found, expected)


def test_loading_holds_one_tensor_at_a_time_on_the_host(tmp_path):
    """The parameters themselves live in device memory, which this does not count."""
    wide = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    spec = LLAMA_FAMILY.spec_from_hf(CONFIG | wide | {"head_dim": 64})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), abstract_params(spec))
    save_checkpoint(tmp_path / "wide", spec, params)
    sizes = sorted(array.nbytes for array in load_file(tmp_path / "wide" / SINGLE_FILE).values())
    del params
    tracemalloc.start()
    load(tmp_path / "wide")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3.5 * sizes[-1]
    assert peak < 0.6 * sum(sizes)


@contextlib.contextmanager
def refused(*parts):
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_tensor_is_named(tensors, tmp_path):
    folder = write(tmp_path / "x", {name: array for name, array in tensors.items() if "layers.1.mlp.up" not in name})
    with refused(str(folder), "1 tensors are missing", "model.layers.1.mlp.up_proj.weight"):
        load(folder)


def test_an_unknown_tensor_is_named(tensors, tmp_path):
    folder = write(tmp_path / "x", tensors | {"model.layers.3.input_layernorm.weight": np.ones(24, np.float32)})
    with refused(str(folder), "1 tensors are unknown to llama", "model.layers.3.input_layernorm.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.q_proj.weight", (32, 23)),
        ("model.layers.1.self_attn.q_proj.weight", (24, 32)),
        ("model.norm.weight", (25,)),
        ("model.embed_tokens.weight", (60, 24)),
        ("lm_head.weight", (61, 24, 1)),
    ],
)
def test_a_mis_shaped_tensor_is_named(tensors, tmp_path, name, shape):
    folder = write(tmp_path / "x", tensors | {name: np.zeros(shape, np.float32)})
    with refused(str(folder / SINGLE_FILE), name, "expected", str(shape)):
        load(folder)


@pytest.mark.parametrize("name", ["transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.bias"])
def test_a_mis_shaped_fused_tensor_is_named(tmp_path, name):
    source = GOLDENS / "models/qwen1-short"
    tensors = load_file(source / SINGLE_FILE)
    tensors[name] = tensors[name][:-1] if name.endswith("bias") else tensors[name].T.copy()
    folder = write(tmp_path / "x", tensors, json.loads((source / "config.json").read_text()))
    with refused(name, "expected shape (144", str(tensors[name].shape)):
        load(folder)


def test_integer_weights_are_refused(tensors, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = write(tmp_path / "x", tensors | {name: tensors[name].astype(np.uint8)})
    with refused(str(folder / SINGLE_FILE), name, "uint8", "expected floats"):
        load(folder)


def test_a_truncated_file_is_named(tensors, tmp_path):
    folder = write(tmp_path / "x", tensors)
    content = (folder / SINGLE_FILE).read_bytes()
    for size in (0, 5, len(content) // 2, len(content) - 1):
        (folder / SINGLE_FILE).write_bytes(content[:size])
        with refused(str(folder / SINGLE_FILE), "truncated or foreign"):
            load(folder)


def test_missing_files_are_named(tensors, tmp_path):
    with refused(str(tmp_path / "none"), "no such folder"):
        load(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with refused(str(tmp_path / "bare"), "no config.json"):
        load(tmp_path / "bare")
    folder = write(tmp_path / "two", tensors, shards=in_two_shards(tensors))
    (folder / SHARDS[1]).unlink()
    with refused(str(folder), SHARDS[1]):
        load(folder)
    (folder / INDEX_FILE).unlink()
    with refused(str(folder), SINGLE_FILE):
        load(folder)


def test_a_tensor_in_two_shards_is_named(tensors, tmp_path):
    folder = write(tmp_path / "x", tensors, shards=in_two_shards(tensors))
    save_file(tensors, folder / SHARDS[0])
    with refused("is in both", SHARDS[0], SHARDS[1]):
        load(folder)


def test_an_index_that_disagrees_with_its_shards_is_refused(tensors, tmp_path):
    shards = in_two_shards(tensors)
    swapped = shards | {"lm_head.weight": SHARDS[shards["lm_head.weight"] == SHARDS[0]]}
    folder = write(tmp_path / "x", tensors, shards=shards, index=swapped)
    with refused(INDEX_FILE, "disagree", "lm_head.weight"):
        load(folder)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", 3, None])
def test_an_index_naming_anything_but_a_file_beside_it_is_refused(tensors, tmp_path, file):
    shards = in_two_shards(tensors)
    folder = write(tmp_path / "x", tensors, shards=shards, index=shards | {"lm_head.weight": file})
    with refused(INDEX_FILE, "lm_head.weight", repr(file)):
        load(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\ud800"])
def test_a_faulty_index_is_refused(tensors, tmp_path, content):
    folder = write(tmp_path / "x", tensors)
    (folder / INDEX_FILE).write_bytes(content.encode("utf-8", "surrogatepass"))
    with refused(str(folder / INDEX_FILE), "weight_map"):
        load(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_faulty_config_is_refused(tensors, tmp_path, content):
    folder = write(tmp_path / "x", tensors)
    (folder / "config.json").write_bytes(content)
    with refused(str(folder / "config.json")):
        load(folder)


def test_saving_never_mixes_with_what_is_there(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target, found in (("used", "exists and is not empty"), ("file", "found a file")):
        with refused(str(tmp_path / target), found):
            save_checkpoint(tmp_path / target, LLAMA, random_params(LLAMA))
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", LLAMA, random_params(LLAMA))
    assert load(tmp_path / "empty")[0] == LLAMA


def test_an_unwritable_target_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with refused(str(tmp_path / "file/model"), "could not be written"):
        save_checkpoint(tmp_path / "file/model", LLAMA, random_params(LLAMA))


def test_a_spec_without_a_published_layout_leaves_nothing_behind(tmp_path):
    with refused("no published layout can express this model"):
        save_checkpoint(tmp_path / "x", WINDOWED_QWEN, random_params(WINDOWED_QWEN))
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from jaxllm.checkpoint.hf import save_checkpoint
from jaxllm.errors import InputError
from tests.tiny_models import LLAMA, random_params
params = random_params(LLAMA)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    save_checkpoint(sys.argv[1], LLAMA, params)
except InputError as error:
    print(error)
"""


def test_a_disk_that_refuses_more_leaves_nothing_behind(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'model'}: could not be written")
    assert list(tmp_path.iterdir()) == []


def test_large_models_are_split_into_files_in_order():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 4}
    assert split_into_files(sizes, max_bytes=6) == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00001-of-00003.safetensors",
        "c": "model-00002-of-00003.safetensors",
        "d": "model-00003-of-00003.safetensors",
        "e": "model-00003-of-00003.safetensors",
    }
    assert set(split_into_files(sizes, max_bytes=100).values()) == {SINGLE_FILE}


def test_reading_is_lazy(tensors, tmp_path):
    folder = TensorFolder(write(tmp_path / "x", tensors))
    assert folder.shape("lm_head.weight") == (61, 24)
    assert folder.dtype("lm_head.weight") == np.float32
    np.testing.assert_array_equal(folder.read("lm_head.weight"), tensors["lm_head.weight"])


def test_what_was_loaded_narrower_is_not_saved_as_if_it_were_whole(tensors, tmp_path):
    folder = write(tmp_path / "full", tensors, CONFIG)
    spec, params, config, source = load_checkpoint(folder, dtype=jnp.dtype(jnp.bfloat16))
    with pytest.raises(InputError, match="stored as float32 and loaded as bfloat16"):
        save_checkpoint(tmp_path / "again", spec, params, config=config, source=source)
    assert not (tmp_path / "again").exists()
    save_checkpoint(tmp_path / "narrow", spec, params, config=config, source=source, dtype=np.dtype("float16"))
    assert {array.dtype for array in load_file(tmp_path / "narrow" / SINGLE_FILE).values()} == {np.dtype("float16")}


def test_more_layers_than_tensors_are_refused_at_once(tensors, tmp_path):
    folder = write(tmp_path / "deep", tensors, CONFIG | {"num_hidden_layers": 10**9})
    with pytest.raises(InputError, match=r"config.json means 1,000,000,000 layers, but the checkpoint has"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": 1, "a": 2}', "the key 'a' stands there twice"), ('{"a": ' + "9" * 5000 + "}", "not valid JSON")],
)
def test_configs_that_say_two_things_or_too_much_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_a_vocabulary_larger_than_the_model_is_refused(tensors, tmp_path):
    from jaxllm.pretrained import load_pretrained
    from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE

    folder = write(tmp_path / "full", tensors, CONFIG)
    tokens = [bytes([value]) for value in range(256)]
    TiktokenBPE(tokens, pattern="(?s).", special_tokens={}, normalization=None).save(folder)
    with pytest.raises(InputError, match=r"has 256 ids, but the model has \d+ embeddings"):
        load_pretrained(folder)
