"""Kernels serve every family: the goldens once more, with attention by interpreted Pallas kernels."""

import json

import jax
import numpy as np
import pytest

import jaxllm
from tests import test_glm_families
from tests.conftest import GOLDENS

TOLERANCE = 2e-4
QUICK = {
    "qwen1-long-ntk-logn",  # LogN and dynamic NTK
    "baichuan-13b",  # ALiBi
    "dsv2-236b-style",  # latent attention
}
QUICK_GLM = {"chatglm-6b-gmask"}  # a prefix that all tokens see


def models(folder, quick):
    names = sorted(path.name for path in (GOLDENS / folder).iterdir())
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", models("models", QUICK))
def test_a_family_computes_with_kernels_what_its_reference_computes(name):
    folder = GOLDENS / "models" / name
    arrays, meta = np.load(folder / "golden.npz"), json.loads((folder / "meta.json").read_text())
    with jax.default_matmul_precision("highest"):
        lm = jaxllm.load_pretrained(folder)
        lm.attention_impl = "pallas"
        np.testing.assert_allclose(lm.logits(arrays["input_ids"]), arrays["logits"], atol=TOLERANCE, rtol=0)
        padded, valid = lm.logits(arrays["padded_input_ids"], arrays["attention_mask"]), arrays["attention_mask"] == 1
        np.testing.assert_allclose(np.asarray(padded)[valid], arrays["padded_logits"][valid], atol=TOLERANCE, rtol=0)
        ids, logits = lm.generate(arrays["prompt_ids"], max_new_tokens=16, eos_ids=(), return_logits=True)
        np.testing.assert_array_equal(ids[0], arrays["greedy_ids"])
        np.testing.assert_allclose(logits[0], arrays["greedy_step_logits"], atol=TOLERANCE, rtol=0)
        loss, gradients = lm.loss_and_grads(arrays["input_ids"])
    assert abs(loss - meta["train_mode_total_loss"]) < TOLERANCE
    for tensor, gradient in gradients.items():
        assert abs(np.linalg.norm(gradient) - meta["train_grad_l2"][tensor]) < TOLERANCE, tensor


@pytest.mark.parametrize("name", models("models_glm", QUICK_GLM))
def test_a_glm_computes_with_kernels_what_its_reference_computes(name):
    arrays = dict(np.load(GOLDENS / "models_glm" / name / "golden.npz"))
    with jax.default_matmul_precision("highest"):
        lm, plain = test_glm_families.load(name), test_glm_families.load(name)
        lm.attention_impl, plain.attention_impl = "pallas", "reference"
        if test_glm_families.has_several_masks(lm, arrays["input_ids"]):
            pytest.skip("positions must be given, and with them a mask, which no kernel takes")
        logits = lm.logits(arrays["input_ids"], arrays["valid"])
        test_glm_families.assert_close_where_valid(logits, arrays)
        found, expected = (each.loss_and_grads(arrays["input_ids"], arrays["valid"]) for each in (lm, plain))
    assert abs(found[0] - expected[0]) < 1e-5
    for tensor, gradient in expected[1].items():
        np.testing.assert_allclose(found[1][tensor], gradient, atol=2e-5 * np.abs(gradient).max(), err_msg=tensor)
