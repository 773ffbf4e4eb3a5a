"""Adding a family takes one file of data: a made-up one loads, computes, generates, trains, and is saved bitwise."""

import importlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.errors import InputError
from jaxllm.language_model import LanguageModel
from tests.made_up_family import PLOVER, PLOVER_MINI
from tests.train.training_steps import Trainer

WIDTH, HEADS, GROUPS, HEAD_DIM, INNER = 32, 4, 2, 8, 40
CONFIG = {
    "architectures": ["PloverForCausalLM"],
    "words": 62,
    "width": WIDTH,
    "depth": 2,
    "span": 64,
    "heads": HEADS,
    "groups": GROUPS,
    "base": 500,
    "inner": INNER,
    "eps": 1e-4,
}
IDS = np.random.default_rng(1).integers(0, 62, (2, 11))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    registry = importlib.import_module("jaxllm.families")
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, PLOVER))


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    shapes = {"nest.words": (62, WIDTH), "nest.after.weight": (WIDTH,), "nest.after.bias": (WIDTH,)}
    for layer in range(2):
        matrices = {
            "look": ((HEADS + 2 * GROUPS) * HEAD_DIM, WIDTH),
            "seen": (WIDTH, HEADS * HEAD_DIM),
            "think": (2 * INNER, WIDTH),
            "thought": (WIDTH, INNER),
        }
        for name, shape in matrices.items():
            shapes |= {f"nest.{layer}.{name}.weight": shape, f"nest.{layer}.{name}.bias": shape[:1]}
        for name in ("before", "between"):
            shapes |= {f"nest.{layer}.{name}.weight": (WIDTH,), f"nest.{layer}.{name}.bias": (WIDTH,)}
    values = {name: rng.normal(size=shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}
    return values | {"nest.say": values["nest.words"], "nest.0.feathers": np.arange(3, dtype=np.int32)}


@pytest.fixture
def folder(tensors, tmp_path):
    (tmp_path / "plover").mkdir()
    save_file(tensors, tmp_path / "plover/model.safetensors")
    (tmp_path / "plover/config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "plover"


def norm(x, tensors, name):
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-4)
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def rotate(x):
    """Turn the first two pairs of neighbours of each head; x [T, N, 8]."""
    pairs = x[..., 0:4:2] + 1j * x[..., 1:4:2]
    pairs = pairs * np.exp(1j * np.arange(len(x))[:, None, None] * 500.0 ** (-np.arange(2) / 2))
    return np.concatenate([np.stack([pairs.real, pairs.imag], axis=-1).reshape(*x.shape[:2], 4), x[..., 4:]], axis=-1)


def expected_logits(tensors, ids):
    """Compute a plover's logits [T, V] from its published tensors in float64."""
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}

    def through(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    x = tensors["nest.words"][ids]
    for layer in range(2):
        groups = through(norm(x, tensors, f"nest.{layer}.before"), f"nest.{layer}.look").reshape(len(x), GROUPS, 4, 8)
        k, v, q = rotate(groups[:, :, 0]), groups[:, :, 1], rotate(groups[:, :, 2:].reshape(len(x), HEADS, 8))
        seen = np.zeros_like(q)
        for t, head in np.ndindex(len(x), HEADS):
            weights = np.exp(k[: t + 1, head // 2] @ q[t, head] / np.sqrt(8))
            seen[t, head] = weights @ v[: t + 1, head // 2] / weights.sum()
        x = x + through(seen.reshape(len(x), -1), f"nest.{layer}.seen")
        up, gate = np.split(through(norm(x, tensors, f"nest.{layer}.between"), f"nest.{layer}.think"), 2, axis=-1)
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + through(gelu * up, f"nest.{layer}.thought")
    return norm(x, tensors, "nest.after") @ tensors["nest.say"].T


def test_it_is_listed_with_its_sizes():
    assert jaxllm.families()["plover"] == ("plover-mini",)
    assert jaxllm.spec("plover-mini") == PLOVER_MINI


def test_it_loads_and_computes_what_its_tensors_mean(folder, tensors):
    lm = jaxllm.load_pretrained(folder)
    assert lm.spec == PLOVER_MINI
    assert jaxllm.count_params(lm.spec) == sum(
        value.size for name, value in tensors.items() if name not in ("nest.say", "nest.0.feathers")
    )
    with jax.default_matmul_precision("highest"):
        logits = lm.logits(IDS)
        continued = lm.generate(IDS, max_new_tokens=3, eos_ids=())
    for row, ids in enumerate(IDS):
        np.testing.assert_allclose(logits[row], expected_logits(tensors, ids), atol=2e-4)
    longer = np.concatenate([IDS[0], continued[0]])
    likeliest = expected_logits(tensors, longer).argmax(axis=-1)
    np.testing.assert_array_equal(likeliest[len(IDS[0]) - 1 : -1], continued[0])


def test_it_is_saved_bitwise(folder, tensors, tmp_path):
    jaxllm.load_pretrained(folder).save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert set(again) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value, strict=True)
    assert json.loads((tmp_path / "again/config.json").read_text()) == CONFIG


def test_its_faults_are_named(folder, tensors):
    save_file(tensors | {"nest.0.look.weight": tensors["nest.0.look.weight"].T.copy()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"nest\.0\.look\.weight: expected shape \(64, 32\), found \(32, 64\)"):
        jaxllm.load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"wings": 2}))
    with pytest.raises(InputError, match=r"config\.json \(plover\): unknown keys \['wings'\]"):
        jaxllm.load_pretrained(folder)


def test_it_trains_and_the_trained_model_is_written_in_its_layout(tmp_path):
    trainer = Trainer(PLOVER_MINI)
    state, losses = trainer.run(4, learning_rate=3e-3)
    assert losses[3] < losses[0] - 0.01
    LanguageModel(PLOVER_MINI, state.params).save_pretrained(tmp_path / "trained")
    assert json.loads((tmp_path / "trained/config.json").read_text())["architectures"] == ["PloverForCausalLM"]
    lm = jaxllm.load_pretrained(tmp_path / "trained")
    assert lm.spec == PLOVER_MINI
    jax.tree.map(np.testing.assert_array_equal, lm.params, state.params)
