"""Tensor-parallel shards: cut as Megatron cuts them, and merged back bitwise."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm.checkpoint.convert import import_shards
from jaxllm.checkpoint.megatron_shards import CONFIGS, MegatronShards
from jaxllm.errors import InputError
from tests.checkpoint.torch_writer import write_torch
from tests.conftest import GOLDENS

GLM130B, GLM = GOLDENS / "models_glm/glm-130b-gmask", GOLDENS / "models_glm/glm-10b-gmask"
PARALLEL = 5


def cut(name, array, rank, num_shards, family):
    """Return one shard of a tensor; written from how each layer is parallelised, not from how shards are merged."""
    if "query_key_value" in name:
        if family == "glm130b":  # whole heads: query, key and value of head 0, of head 1, ...
            return np.split(array, num_shards)[rank]
        return np.concatenate([np.split(each, num_shards)[rank] for each in np.split(array, 3)])
    if "dense_h_to_4h" in name:
        if family == "glm130b":  # the up projection, then the gate
            return np.concatenate([np.split(each, num_shards)[rank] for each in np.split(array, 2)])
        return np.split(array, num_shards)[rank]
    if "word_embeddings" in name:
        return np.split(array, num_shards)[rank]
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return np.split(array, num_shards, axis=1)[rank]
    return array


def write_shards(folder, tensors, num_shards, family, change=None):
    folder.mkdir()
    for rank in range(num_shards):
        shard = {name: cut(name, array, rank, num_shards, family) for name, array in tensors.items()}
        if change is not None:
            change(rank, shard)
        value = {"module": {name: np.ascontiguousarray(array) for name, array in shard.items()}, "iteration": 1}
        write_torch(folder / f"mp_rank_{rank:02d}_model_states.pt", value)
    return folder


@pytest.fixture(scope="module")
def tensors():
    """Those of the golden, padded so that five shards fit."""
    found = load_file(GLM130B / "model.safetensors")
    for name, array in found.items():
        if "h_to_4h" in name:
            found[name] = np.concatenate([half[:60] for half in np.split(array, 2)])
        elif name.endswith("4h_to_h.weight"):
            found[name] = np.ascontiguousarray(array[:, :60])
    return found


@pytest.mark.parametrize("num_shards", [1, PARALLEL])
def test_shards_of_glm_130b_merge_bitwise(tmp_path, tensors, num_shards):
    folder = write_shards(tmp_path / "shards", tensors, num_shards, "glm130b")
    shards = MegatronShards(folder, "glm130b")
    assert set(shards.files) == set(tensors)
    for name, array in tensors.items():
        assert (shards.shape(name), shards.dtype(name)) == (array.shape, array.dtype), name
        assert shards.read(name).tobytes() == array.tobytes(), name


@pytest.mark.parametrize("num_shards", [1, PARALLEL])
def test_shards_of_glm_merge_bitwise(tmp_path, num_shards):
    found = load_file(GLM / "model.safetensors")
    found["word_embeddings.weight"] = found["word_embeddings.weight"][:135]
    shards = MegatronShards(write_shards(tmp_path / "shards", found, num_shards, "glm"), "glm")
    for name, array in found.items():
        assert shards.read(name).tobytes() == array.tobytes(), name


def test_a_config_is_written_with_the_keys_of_the_golden(tmp_path, tensors):
    folder = write_shards(tmp_path / "shards", tensors, PARALLEL, "glm130b")
    count = import_shards(folder, tmp_path / "out", family="glm130b", num_attention_heads=5)
    assert count == len(tensors)
    config = json.loads((tmp_path / "out/config.json").read_text())
    golden = json.loads((GLM130B / "config.json").read_text())
    assert config == golden | {"inner_hidden_size": 60, "max_sequence_length": 2048}
    written = load_file(tmp_path / "out/model.safetensors")
    assert {name: array.tobytes() for name, array in written.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }


def test_a_single_shard_of_glm_gets_a_config(tmp_path):
    found = load_file(GLM / "model.safetensors")
    folder = write_shards(tmp_path / "shards", found, 1, "glm")
    config = CONFIGS["glm"](MegatronShards(folder, "glm"), 5)
    golden = json.loads((GLM / "config.json").read_text())
    assert {key: golden[key] for key in config} == config
    with pytest.raises(InputError, match="--num-attention-heads"):
        CONFIGS["glm"](MegatronShards(folder, "glm"))


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (None, "hidden size 40 is not a published one"),
        (3, "3 attention heads do not divide the hidden size 40"),
        (4, "do not fall evenly to 5 shards"),
    ],
)
def test_the_number_of_heads_must_be_known_and_fit(tmp_path, tensors, heads, expected):
    folder = write_shards(tmp_path / "shards", tensors, PARALLEL, "glm130b")
    with pytest.raises(InputError, match=expected):
        import_shards(folder, tmp_path / "out", family="glm130b", num_attention_heads=heads)
    assert not (tmp_path / "out").exists()


NORM = "transformer.layers.0.input_layernorm.weight"


def drop(rank, shard):
    if rank == 3:
        del shard[NORM]


def disagree(rank, shard):
    if rank == 3:
        shard[NORM] = shard[NORM] + 1


def reshape(rank, shard):
    if rank == 3:
        shard[NORM] = shard[NORM][:-1]


def test_shards_that_disagree_are_named(tmp_path, tensors):
    for change in (drop, reshape):
        folder = write_shards(tmp_path / change.__name__, tensors, PARALLEL, "glm130b", change)
        with pytest.raises(InputError, match=rf"mp_rank_03_model_states\.pt: \['{NORM}'\] are not as in mp_rank_00"):
            MegatronShards(folder, "glm130b")
    folder = write_shards(tmp_path / "copies", tensors, PARALLEL, "glm130b", disagree)
    with pytest.raises(InputError, match=rf"mp_rank_03_model_states\.pt: {NORM} differs from that of mp_rank_00"):
        import_shards(folder, tmp_path / "out", family="glm130b", num_attention_heads=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copies", "drop", "reshape"]


def test_a_tensor_that_no_shard_has_is_named(tmp_path, tensors):
    folder = write_shards(tmp_path / "shards", {k: a for k, a in tensors.items() if k != NORM}, 1, "glm130b")
    with pytest.raises(InputError, match=rf"1 tensors are missing, first \['{NORM}'\]"):
        import_shards(folder, tmp_path / "out", family="glm130b", num_attention_heads=5)


def test_missing_shards_are_named(tmp_path, tensors):
    folder = write_shards(tmp_path / "shards", tensors, PARALLEL, "glm130b")
    (folder / "mp_rank_02_model_states.pt").unlink()
    with pytest.raises(InputError, match=r"shards \[2\] are missing, found 4 up to 4"):
        MegatronShards(folder, "glm130b")
    with pytest.raises(InputError, match="no such folder"):
        MegatronShards(tmp_path / "none", "glm130b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no shards; expected mp_rank_00_model_states\.pt"):
        MegatronShards(tmp_path / "empty", "glm130b")


def test_shards_of_another_model_are_refused(tmp_path):
    write_torch(tmp_path / "mp_rank_00_model_states.pt", {"module": {"x.dense.weight": np.zeros(3, np.float32)}})
    with pytest.raises(InputError, match=r"no matrix transformer\.word_embeddings\.weight"):
        import_shards(tmp_path, tmp_path / "out", family="glm130b")
    with pytest.raises(InputError, match="--family llama: shards are merged for glm130b and glm only"):
        import_shards(tmp_path, tmp_path / "out", family="llama")
    name = "transformer.layers.0.attention.dense.weight"
    write_torch(tmp_path / "mp_rank_00_model_states.pt", {"module": {name: np.zeros(3, np.float32)}})
    with pytest.raises(InputError, match=rf"{name} has shape \(3,\), which is no shard"):
        MegatronShards(tmp_path, "glm130b")
