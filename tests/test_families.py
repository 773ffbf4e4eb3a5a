"""Every family through the public API against independent reference implementations."""

import json

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.checkpoint.tensors import TensorFolder
from jaxllm.families import FAMILIES, family_of_config
from jaxllm.spec import spec_from_json, spec_to_json, tiny
from tests.conftest import GOLDENS

MODELS = sorted(path.name for path in (GOLDENS / "models").iterdir())
TOLERANCE = 2e-4

PUBLISHED_COUNTS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "smollm2-135m": 134_515_008,
    "qwen-1.8b": 1_836_828_672,
    "qwen-7b": 7_721_324_544,
    "qwen-14b": 14_167_290_880,
    "qwen-72b": 72_287_920_128,
    "baichuan-7b": 7_000_559_616,
    "baichuan-13b": 13_264_901_120,
    "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
    "internlm-7b": 7_321_948_160,
    "internlm-20b": 20_088_714_240,
    "internlm-104b": 104_523_745_280,
    "internlm2-1.8b": 1_889_110_016,
    "internlm2-7b": 7_737_708_544,
    "internlm2-20b": 19_861_149_696,
    "deepseek-7b": 6_910_365_696,
    "deepseek-67b": 67_425_001_472,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "chatglm2-6b": 6_243_584_000,
    "chatglm3-6b": 6_243_584_000,
}
ROUNDED_COUNTS = {
    "glm-base": "109.3M",
    "glm-large": "334.7M",
    "glm-large-chinese": "355.7M",
    "glm-410m": "410.3M",
    "glm-515m": "514.6M",
    "glm-2b": "1.920B",
    "glm-10b": "9.881B",
    "glm-10b-chinese": "9.880B",
    "glm-130b": "128.70B",
    "chatglm-6b": "6.173B",
    "glm-4-9b": "9.400B",
    "glm-4-9b-chat": "9.400B",
    "glm-4-9b-chat-1m": "9.484B",
    "glm-4-9b-0414": "9.400B",
}
"""Sizes whose sources give no exact count."""
OWN_SIZES = {"qwen-mini"}


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    folder = GOLDENS / "models" / request.param
    with jax.default_matmul_precision("highest"):
        yield (
            jaxllm.load_pretrained(folder),
            np.load(folder / "golden.npz"),
            json.loads((folder / "meta.json").read_text()),
        )


def test_logits_and_hidden_states(golden):
    lm, arrays, _ = golden
    output = lm.forward(arrays["input_ids"], return_hidden=True)
    np.testing.assert_allclose(output.logits, arrays["logits"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(output.hidden[:, 0], arrays["hidden"], atol=TOLERANCE, rtol=0)
    padded = lm.forward(arrays["padded_input_ids"], arrays["attention_mask"], return_hidden=True).logits
    valid = arrays["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(padded)[valid], arrays["padded_logits"][valid], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "nocache"])
def test_greedy_continuation(golden, use_cache):
    lm, arrays, _ = golden
    ids, logits = lm.generate(
        arrays["prompt_ids"], max_new_tokens=16, eos_ids=(), use_cache=use_cache, return_logits=True
    )
    np.testing.assert_array_equal(ids[0], arrays["greedy_ids" if use_cache else "greedy_ids_nocache"])
    if use_cache:
        np.testing.assert_allclose(logits[0], arrays["greedy_step_logits"], atol=TOLERANCE, rtol=0)


def test_router_of_mixtures(golden):
    lm, arrays, _ = golden
    if "router_weights" not in arrays:
        assert lm.forward(arrays["input_ids"], return_router=True).aux is None
        return
    router = lm.forward(arrays["input_ids"], return_router=True).aux
    np.testing.assert_array_equal(router.expert_ids[:, 0], arrays["router_expert_ids_sorted"])
    np.testing.assert_allclose(np.sort(router.weights[:, 0]), np.sort(arrays["router_weights"]), atol=TOLERANCE)


def test_training_loss_and_gradients(golden):
    lm, arrays, meta = golden
    loss, gradients = lm.loss_and_grads(arrays["input_ids"])
    assert abs(loss - meta["train_mode_total_loss"]) < TOLERANCE
    assert set(gradients) == set(meta["train_grad_l2"])
    for name, gradient in gradients.items():
        assert abs(np.linalg.norm(gradient) - meta["train_grad_l2"][name]) < TOLERANCE, name
        assert abs(gradient.sum() - meta["train_grad_sum"][name]) < TOLERANCE * max(1, gradient.size**0.5), name
    if "train_mode_logits" in arrays:
        logits = lm.logits(arrays["input_ids"], train=True)
        np.testing.assert_allclose(logits, arrays["train_mode_logits"], atol=TOLERANCE, rtol=0)


def test_saving_gives_back_every_tensor_and_the_config(golden, tmp_path):
    lm, _, meta = golden
    folder = GOLDENS / "models" / meta["name"]
    lm.save_pretrained(tmp_path / "saved")
    before, after = TensorFolder(folder), TensorFolder(tmp_path / "saved")
    assert before.files == after.files
    for name in before.files:
        assert before.dtype(name) == after.dtype(name)
        np.testing.assert_array_equal(before.read(name), after.read(name), strict=True)
    assert json.loads((tmp_path / "saved/config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_config_survives_the_way_through_the_spec(golden):
    lm, _, _ = golden
    family = family_of_config(lm.config)
    assert family.spec_from_hf(family.spec_to_hf(lm.spec)) == lm.spec
    assert spec_from_json(spec_to_json(lm.spec)) == lm.spec


def test_unknown_config_key_is_refused(golden):
    lm, _, _ = golden
    with pytest.raises(jaxllm.InputError, match="sparse_attention"):
        family_of_config(lm.config).spec_from_hf(lm.config | {"sparse_attention": True})


@pytest.mark.parametrize("name", [size for family in FAMILIES for size in family.sizes])
def test_parameter_count(name):
    count = jaxllm.count_params(jaxllm.spec(name))
    if name in OWN_SIZES:
        assert count < 10_000_000
    elif name in ROUNDED_COUNTS:
        number, unit = ROUNDED_COUNTS[name][:-1], {"M": 1e6, "B": 1e9}[ROUNDED_COUNTS[name][-1]]
        assert f"{count / unit:.{len(number.split('.')[1])}f}" == number
    else:
        assert count == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize("name", [size for family in FAMILIES for size in family.sizes])
def test_every_parameter_is_mapped_once(name):
    spec = tiny(jaxllm.spec(name))
    family = next(family for family in FAMILIES if name in family.sizes)
    mapped = [path for key in family.keys(spec) if not key.copy for path in key.paths]
    abstract = jax.eval_shape(lambda key: jaxllm.init(spec, key), jax.random.key(0))
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
    paths = ["/".join(key.key for key in path) for path, _ in leaves]
    assert sorted(mapped) == sorted(paths)
