"""Runs that fill blanks, on a GLM of no size: they learn, resume bit by bit, and shrink the embedding's gradient."""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.config import EmbeddingShrinkConfig, load_config
from jaxllm.errors import InputError
from jaxllm.spec import spec_to_json, tiny
from jaxllm.train.records.metrics_file import read_metrics
from jaxllm.train.schedule import embedding_gradient_scale
from jaxllm.train.setup import make_loader, make_setup, open_sources
from tests.tiny_models import make_batch, random_params
from tests.train.runs import assert_same_records, losses
from tests.train.training_steps import language_modeling

TOKENS = {name: 300 + number for number, name in enumerate(("mask", "smask", "gmask", "sop", "eop", "cls", "dblock"))}
SPEC = tiny(jaxllm.spec("glm-10b"), vocab_size=320)
OPTIONS = {
    "data__seq_len": 64,
    "data__packing": "blank_infilling",
    "data__blank_infilling": {"tokens": TOKENS, "short_prob": 0.2},
    "train__steps": 16,
    "train__batch_size": 8,
    "train__embedding_gradient_shrink": {"until_step": 4, "over": 4},
    "checkpoint": {"every": 8, "keep_last": 9},
}


@pytest.fixture
def config(world, tmp_path):
    """Write a config: (run folder, **overrides) -> its path."""
    (tmp_path / "glm.json").write_text(spec_to_json(SPEC))
    return lambda run, **overrides: world.write_config(
        run, **{"model__name": str(tmp_path / "glm.json"), **OPTIONS, **overrides}
    )


@pytest.mark.slow
def test_a_run_learns_and_goes_on_from_a_checkpoint_bit_by_bit(config, start, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    command = start(f"{whole}.out", "train", "--config", config(whole))
    assert command.wait() == 0, command.text
    trained = [loss for _, loss in losses(whole)]
    assert np.mean(trained[-4:]) < np.mean(trained[:4]) - 0.3
    evaluation = next(row for row in read_metrics(whole / "metrics.jsonl") if row["kind"] == "eval")
    assert 0 < evaluation["loss"] < 8 and evaluation["tokens"] > 50 and "bits_per_byte" not in evaluation

    command = start(f"{whole}.dry", "train", "--config", config(tmp_path / "dry"), "--dry-run")
    assert command.wait() == 0 and "first row begins: " in command.text, command.text

    shutil.copytree(whole, again)
    command = start(f"{again}.out", "train", "--config", config(again), "--from-step", 8)
    assert command.wait() == 0 and "resuming at step 8" in command.text, command.text
    assert_same_records(again, whole)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"data__blank_infilling": None}, "data.blank_infilling: missing; data.packing 'blank_infilling' needs it"),
        ({"data__packing": "packed"}, "data.packing: expected 'blank_infilling' with the section data.blank_infilling"),
        (
            {"data__blank_infilling": {"span_prob": 0.8}},
            "data.blank_infilling.span_prob: expected at most 1 - data.blank_infilling.sentence_prob (0.3), found 0.8",
        ),
        (
            {"data__blank_infilling": {"samples_per_row": 2}},
            "data.blank_infilling.samples_per_row: expected equal parts of data.seq_len (64) of at least 64 slots",
        ),
        ({"data__blank_infilling": {}}, "data.blank_infilling.tokens.mask: missing, and the tokenizer has no special"),
        (
            {"data__blank_infilling": {"tokens": TOKENS | {"sop": 320}}},
            "data.blank_infilling.tokens: found the id 320, but model",
        ),
        ({"data__seq_len": 192}, "data.seq_len: found 192, but model"),
    ],
)
def test_contradictions_are_refused(config, tmp_path, overrides, problem):
    with pytest.raises(InputError, match=re.escape(problem)):
        make_setup(load_config([config(tmp_path / "run", **overrides)]))


def test_a_causal_model_is_refused(world, config, tmp_path):
    path = config(tmp_path / "run", model__name=str(world.folder / "spec.json"))
    with pytest.raises(InputError, match="needs a model that reads a context in both directions"):
        make_setup(load_config([path]))


def test_all_fields_of_a_row_reach_the_devices(config, tmp_path):
    setup = make_setup(load_config([config(tmp_path / "run")]))
    training = open_sources(setup, tmp_path / "cache", note=print).training
    rows = make_loader(setup, training).next_batch(8)
    batch = setup.feed.to_devices(rows, 8)
    for name in ("tokens", "targets", "loss_weights", "positions", "block_positions", "segment_ids", "prefix_mask"):
        np.testing.assert_array_equal(getattr(batch, name), rows[name], err_msg=name)
    kinds = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), one)
        for one in (batch, setup.abstract_batch(8))
    ]
    assert kinds[0] == kinds[1]
    padding = setup.feed.to_devices(setup.feed.padding(8, setup.empty_row), 8)
    assert jax.tree.structure(padding) == jax.tree.structure(batch) and not padding.segment_ids.any()


def test_the_factor_of_the_embedding_gradient_rises():
    steps = jnp.array([0, 5999, 6000, 6250, 6500, 60_000])
    factors = embedding_gradient_scale(steps, start=0.1, until_step=6000, over=500)
    np.testing.assert_allclose(factors, [0.1, 0.1, 0.1, 0.55, 1, 1], rtol=1e-6)


def test_only_the_embedding_gradient_shrinks_and_that_of_both_its_uses():
    # Without learned positions, which are added to the embedding and share its fate.
    spec = tiny(jaxllm.spec("glm-130b"), vocab_size=320)
    assert spec.head.tie_word_embeddings
    params = random_params(spec, scale=0.1)
    tokens = np.random.default_rng(0).integers(0, 320, (2, 8), np.int32)
    batch = make_batch(tokens, targets=tokens, loss_weights=np.ones((2, 8), np.float32))
    shrinking = language_modeling(spec, chunk=8, embedding_shrink=EmbeddingShrinkConfig())

    @functools.partial(jax.jit, static_argnums=0)
    def loss_and_gradients(objective, step):
        def loss(params):
            return objective.loss_sums(params, None, batch, objective.totals(batch), train=True, step=step)[0]

        return jax.value_and_grad(loss)(params)

    loss, plain = loss_and_gradients(language_modeling(spec, chunk=8), jnp.int32(6250))
    same_loss, shrunk = loss_and_gradients(shrinking, jnp.int32(6250))
    np.testing.assert_allclose(loss, same_loss, rtol=1e-6)
    np.testing.assert_allclose(shrunk.pop("embedding"), 0.55 * plain.pop("embedding"), rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), shrunk, plain)
