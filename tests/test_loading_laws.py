"""Laws of loaded checkpoints, on one golden of each kind of block: any mesh, and bfloat16, give the same model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.errors import InputError
from jaxllm.nn.model import abstract_params
from jaxllm.sharding.mesh import make_mesh
from tests.conftest import GOLDENS

KINDS = {
    "GQA": "models/llama2-gqa",
    "MLA and MoE": "models/dsv2-236b-style",
    "ALiBi and NormHead": "models/baichuan2-13b",
    "learned positions": "models_glm/glm-10b-mask",
    "two rotary positions": "models_glm/chatglm-6b-mask",
    "sandwich norms": "models_glm/glm4-0414-hf",
}


def load(name, **options):
    """Return (model, the golden's arrays) with the special ids that its meta.json names."""
    meta = json.loads((GOLDENS / name / "meta.json").read_text())
    ids = {key.lower(): value for key, value in meta.get("special_ids", {}).items()}
    names = {key: ids[key] for key in ("mask", "gmask", "smask", "sop", "eop") if key in ids}
    lm = jaxllm.load_pretrained(GOLDENS / name, special_ids=names or None, **options)
    return lm, np.load(GOLDENS / name / "golden.npz")


def eight_rows(arrays):
    """Return a golden's inputs, and its logits where they count, in as many rows as there are devices."""
    valid = arrays["valid"] if "valid" in arrays else np.ones_like(arrays["input_ids"])
    rows = np.arange(8) % len(valid)
    places = {"positions": "position_ids", "block_positions": "block_position_ids", "mask": "allowed"}
    inputs = {name: arrays[key][rows] for name, key in places.items() if key in arrays}
    inputs |= {"input_ids": arrays["input_ids"][rows], "attention_mask": valid[rows]}
    return inputs, valid[rows] == 1, arrays["logits"][rows]


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_a_mesh_of_eight_devices_gives_the_logits_of_one(name):
    mesh = make_mesh(replica=2, fsdp=2, tensor=2)
    lm, arrays = load(name, mesh=mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(lm.spec, mesh)):
        found = lm.params
        for key in path:
            found = found[key.key]
        assert found.sharding == leaf.sharding, jax.tree_util.keystr(path)
    embedding = lm.params["embedding"]
    assert embedding.sharding.shard_shape(embedding.shape) == tuple(size // 2 for size in embedding.shape)
    inputs, valid, expected = eight_rows(arrays)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        logits = lm.logits(**inputs)
    assert not logits.sharding.is_fully_replicated
    np.testing.assert_allclose(np.asarray(logits)[valid], expected[valid], atol=2e-4, rtol=0)


@pytest.mark.parametrize(("name", "heads"), [("models/deepseek-llm-67b-style", 1), ("models/internlm2-linear-bias", 3)])
def test_key_value_heads_that_a_mesh_cannot_split_are_refused(name, heads):
    with pytest.raises(InputError, match=f"mesh: kv_heads of size {heads} cannot be split 2 ways over tensor"):
        load(name, mesh=make_mesh(fsdp=4, tensor=2))


@pytest.mark.parametrize("kind", ["MLA and MoE", "ALiBi and NormHead"])
def test_bfloat16_keeps_its_dtype_and_generates_near_the_exact_logits(kind):
    lm, arrays = load(KINDS[kind], dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype(jnp.bfloat16)}
    ids, logits = lm.generate(arrays["prompt_ids"], max_new_tokens=4, eos_ids=(), return_logits=True)
    assert ids.shape == (1, 4)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    exact = arrays["greedy_step_logits"][0]
    assert 0 < np.abs(logits[0, 0] - exact).mean() < 0.1 * np.abs(exact).mean()
