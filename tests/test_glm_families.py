"""The GLM line through the public API against its reference implementations.

The goldens have conventions of their own, see each meta.json: `hidden` lacks the final norm, the reference attention
masks are inverted, and the targets of GLM and GLM-130B are aligned with the logits.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.checkpoint.hf import published_names
from jaxllm.checkpoint.tensors import TensorFolder
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.spec import Rope2D, spec_from_json, spec_to_json
from tests.conftest import GOLDENS

ROOT = GOLDENS / "models_glm"
MODELS = sorted(path.name for path in ROOT.iterdir())
TOLERANCE = 2e-4


def load(name, **options):
    meta = json.loads((ROOT / name / "meta.json").read_text())
    ids = {key.lower(): value for key, value in meta.get("special_ids", {}).items()}
    names = {key: ids[key] for key in ("mask", "gmask", "smask", "sop", "eop") if key in ids}
    return jaxllm.load_pretrained(ROOT / name, special_ids=names or None, **options)


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    with jax.default_matmul_precision("highest"):
        yield request.param, load(request.param), dict(np.load(ROOT / request.param / "golden.npz"))


def places(arrays):
    """Return the reference's own positions and mask as arguments."""
    return {
        "positions": arrays["position_ids"],
        "block_positions": arrays.get("block_position_ids"),
        "mask": arrays.get("allowed"),
    }


def has_several_masks(lm, ids):
    masks = (lm._prefix_ids.mask, lm._prefix_ids.gmask, lm._prefix_ids.smask) if lm.spec.mask == "prefix" else ()
    return lm.spec.mask == "prefix" and (np.isin(ids, masks).sum(axis=1) > 1).any()


def assert_close_where_valid(found, arrays, key="logits"):
    valid = arrays["valid"]
    np.testing.assert_allclose(np.asarray(found)[valid], arrays[key][valid], atol=TOLERANCE, rtol=0)


def test_logits_with_derived_and_with_given_positions(golden):
    _, lm, arrays = golden
    assert_close_where_valid(lm.logits(arrays["input_ids"], arrays["valid"], **places(arrays)), arrays)
    if has_several_masks(lm, arrays["input_ids"]) and not isinstance(lm.spec.position, Rope2D):
        with pytest.raises(InputError, match=r"several mask tokens .* positions, block_positions and mask"):
            lm.logits(arrays["input_ids"], arrays["valid"])
    else:
        assert_close_where_valid(lm.logits(arrays["input_ids"], arrays["valid"]), arrays)


def test_unrounded_frequencies(golden):
    name, _, arrays = golden
    if "logits_fp32_inv_freq" not in arrays:
        pytest.skip("published with float32 frequencies")
    lm = load(name, inv_freq_dtype="float32")
    assert_close_where_valid(lm.logits(arrays["input_ids"], arrays["valid"]), arrays, "logits_fp32_inv_freq")


def test_hidden_states(golden):
    _, lm, arrays = golden
    row = int(arrays["hidden_seq"])
    valid = arrays["valid"][row]
    given = {key: None if value is None else value[row : row + 1] for key, value in places(arrays).items()}
    output = lm.forward(arrays["input_ids"][row : row + 1], valid[None], **given, return_hidden=True)
    hidden = np.asarray(output.hidden)[:, 0, valid]
    scale = max(1.0, np.abs(arrays["hidden"]).max() / 10)  # an unnormalised stream of 28 layers grows to hundreds
    np.testing.assert_allclose(hidden[:-1], arrays["hidden"], atol=TOLERANCE * scale, rtol=0)
    np.testing.assert_allclose(hidden[-1], arrays["final_norm"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "nocache"])
def test_greedy_continuation(golden, use_cache):
    _, lm, arrays = golden
    prompt = arrays["gen_prompt"][None]
    options = dict(max_new_tokens=16, eos_ids=(), use_cache=use_cache)
    if has_several_masks(lm, prompt):
        with pytest.raises(InputError, match="several mask tokens"):
            lm.generate(prompt, **options)
        assert_likeliest_given_the_mask_to_fill(lm, arrays)
    else:
        np.testing.assert_array_equal(lm.generate(prompt, **options)[0], arrays["gen_new"])


def assert_likeliest_given_the_mask_to_fill(lm, arrays):
    ids = np.concatenate([arrays["gen_prompt"], arrays["gen_new"]])[None]
    context = len(arrays["gen_prompt"]) - 1  # all but the final <sop>
    slots = np.arange(ids.shape[1])[None]
    logits = lm.logits(
        ids,
        positions=np.where(slots < context, slots, int(arrays["gen_mask_position"])),
        block_positions=np.maximum(slots - context + 1, 0),
        mask=(slots[..., None] >= slots[:, None]) | (slots < context)[:, None],
    )
    np.testing.assert_array_equal(np.argmax(logits[0, context:-1], axis=-1), arrays["gen_new"])


def test_greedy_continuation_of_padded_rows(golden):
    _, lm, arrays = golden
    if "gen_new_batch" not in arrays:
        return
    ids = lm.generate(arrays["input_ids"], arrays["valid"], max_new_tokens=16, eos_ids=())
    np.testing.assert_array_equal(ids, arrays["gen_new_batch"])


def labels_of(arrays):
    if "loss_mask" in arrays:
        return np.where(arrays["loss_mask"] == 1, arrays["targets"], -100)
    return arrays["targets"] if "targets" in arrays else arrays["labels"]


def reference_loss(lm, arrays, labels):
    """Return the golden's loss, less what it predicts from padding.

    The causal models' references also train a row's first token, predicted from the padding before it, where nothing
    is visible and the logits mean nothing.
    """
    losses = -jax.nn.log_softmax(arrays["logits"])
    if not family_of_config(lm.config).aligned_labels:
        losses, labels = losses[:, :-1], labels[:, 1:]
    picked = np.take_along_axis(np.asarray(losses), np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    assert abs(picked[labels != -100].mean() - arrays["loss"]) < 1e-5
    return picked[(labels != -100) & arrays["valid"][:, : labels.shape[1]]].mean()


def test_training_loss_and_a_finite_difference_of_its_gradient(golden):
    _, lm, arrays = golden
    labels = labels_of(arrays)
    loss, gradients = lm.loss_and_grads(arrays["input_ids"], arrays["valid"], labels, **places(arrays))
    assert abs(loss - reference_loss(lm, arrays, labels)) < TOLERANCE
    rng = np.random.default_rng(0)

    def along(value):
        return (rng.normal(size=value.shape) * float(jnp.std(value))).astype(np.float32)

    params = lm.params
    direction = jax.tree.map(along, params)

    def loss_at(step):
        lm.params = jax.tree.map(lambda value, along: value + step * along, params, direction)
        return lm.loss_and_grads(arrays["input_ids"], arrays["valid"], labels, **places(arrays))[0]

    published = published_names(lm.spec, direction, lm.config)
    assert set(published) == set(gradients)
    expected = sum(float(np.sum(gradients[name] * published[name])) for name in published)
    step = 1e-3
    try:
        found = (loss_at(step) - loss_at(-step)) / (2 * step)
    finally:
        lm.params = params
    assert found == pytest.approx(expected, rel=0.01, abs=0.01)


def test_saving_gives_back_every_tensor_and_the_config(golden, tmp_path):
    name, lm, _ = golden
    lm.save_pretrained(tmp_path / "saved")
    before, after = TensorFolder(ROOT / name), TensorFolder(tmp_path / "saved")
    assert before.files == after.files
    for tensor in before.files:
        assert before.dtype(tensor) == after.dtype(tensor)
        np.testing.assert_array_equal(before.read(tensor), after.read(tensor), strict=True)
    config = json.loads((ROOT / name / "config.json").read_text())
    assert json.loads((tmp_path / "saved/config.json").read_text()) == config


def test_config_survives_the_way_through_the_spec(golden):
    _, lm, _ = golden
    family = family_of_config(lm.config)
    assert family.spec_from_hf(family.to_hf(lm.spec)) == lm.spec
    assert spec_from_json(spec_to_json(lm.spec)) == lm.spec


def test_prefix_models_without_special_ids_ask_for_them():
    arrays = np.load(ROOT / "glm-10b-gmask" / "golden.npz")
    lm = jaxllm.load_pretrained(ROOT / "glm-10b-gmask")
    with pytest.raises(InputError, match="special_ids"):
        lm.logits(arrays["input_ids"])
    with pytest.raises(InputError, match="unknown name 'eos'"):
        jaxllm.load_pretrained(ROOT / "glm-10b-gmask", special_ids={"eos": 1})


def test_positions_beyond_a_learned_table_are_refused():
    arrays = np.load(ROOT / "glm-10b-gmask" / "golden.npz")
    lm = load("glm-10b-gmask")
    with pytest.raises(InputError, match=r"reach from .* the model has 0 to 40"):
        lm.generate(arrays["gen_prompt"][None], max_new_tokens=50)


def test_frequencies_cannot_be_rounded_where_there_are_none():
    with pytest.raises(InputError, match="no rotary positions"):
        jaxllm.load_pretrained(ROOT / "glm-10b-gmask", inv_freq_dtype="float16")


def test_the_prefix_of_the_class_around_the_model_is_kept(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = {f"glm.{name}": value for name, value in load_file(ROOT / "glm-10b-gmask/model.safetensors").items()}
    (tmp_path / "prefixed").mkdir()
    save_file(tensors, tmp_path / "prefixed/model.safetensors")
    config = (ROOT / "glm-10b-gmask/config.json").read_text()
    (tmp_path / "prefixed/config.json").write_text(config)
    lm = jaxllm.load_pretrained(tmp_path / "prefixed")
    assert jnp.array_equal(lm.params["embedding"], load("glm-10b-gmask").params["embedding"])
    lm.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert set(again) == set(tensors)
    assert isinstance(load("chatglm-6b-mask").spec.position, Rope2D)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"mask": "[MASK]", "sop": 133}, "special_ids must be ids from 0 to 135, found"),
        ({"mask": 10**6, "sop": 133}, "special_ids must be ids from 0 to 135, found"),
        ({"mask": 133, "sop": 133}, "special_ids must differ from each other"),
    ],
)
def test_special_ids_that_are_none_are_refused(ids, message):
    with pytest.raises(InputError, match=message):
        jaxllm.load_pretrained(ROOT / "glm-10b-gmask", special_ids=ids)


def test_special_ids_of_a_causal_model_are_refused():
    with pytest.raises(InputError, match="do not depend on any token"):
        jaxllm.load_pretrained(ROOT / "chatglm2-6b-mqa2", special_ids={"mask": 1})


def test_positions_beyond_the_rotations_of_the_published_code_are_refused():
    lm = jaxllm.load_pretrained(ROOT / "chatglm2-6b-mqa2")
    with pytest.raises(InputError, match="positions reach from 0 to 66; the model has 0 to 63"):
        lm.logits(np.ones((1, 67), int))
    with pytest.raises(InputError, match="the model has 0 to 63"):
        lm.generate(np.ones((1, 60), int), max_new_tokens=10)
