"""Laws that every family obeys, on one tiny model of each structure in the registry.

All rows that a law compares are rows of one batch, so each structure compiles once for all of these laws.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.data.prefix_layout import PrefixIds
from jaxllm.data.token_rows import layout_of
from jaxllm.nn.model import apply, empty_cache
from jaxllm.types import Batch
from tests.tiny_models import random_params, structures

STRUCTURES = structures()
SLOTS = 16
PROMPT = 10
"""Slots of the first call with a cache; every row's visible prefix lies within."""
TOLERANCE = 5e-5

MASK, GMASK, SOP = 60, 61, 62
IDS = PrefixIds(mask=MASK, gmask=GMASK, smask=None, sop=SOP, eop=63)
SHORT = np.array([5, 17, MASK, 23, SOP, 42, 8])
LONG = np.array([31, GMASK, SOP, 9, 50, 3, 44, 27, 12])
FULL = np.array([7, 33, 21, 58, MASK, 2, 39, 14, SOP, 51, 26, 4, 47, 19, 36, 11])
"""Documents of 7, 9 and 16 tokens; to causal models the special ids are ordinary ones."""


class Row(NamedTuple):
    """One row of the batch: (first slot, tokens) of each of its documents, and the id that fills its padding."""

    documents: tuple[tuple[int, np.ndarray], ...]
    padding: int = 0


def changed(tokens, slot):
    return np.where(np.arange(len(tokens)) == slot, 55, tokens)


ROWS = {
    "packed": Row(((0, SHORT), (7, LONG))),
    "short, padded right": Row(((0, SHORT),)),
    "short, padded with other ids": Row(((0, SHORT),), padding=29),
    "short, padded on both sides": Row(((4, SHORT),), padding=13),
    "long, padded right": Row(((0, LONG),)),
    "long, padded left": Row(((7, LONG),)),
    "full": Row(((0, FULL),)),
    "full, slot 3 changed": Row(((0, changed(FULL, 3)),)),
    "full, slot 12 changed": Row(((0, changed(FULL, 12)),)),
}


def batch_of(spec):
    """Return the rows as a Batch, each document with the places that it has by itself."""
    shape = len(ROWS), SLOTS
    tokens, segments, positions, blocks = (np.zeros(shape, np.int32) for _ in range(4))
    prefix = np.zeros(shape, bool)
    for number, row in enumerate(ROWS.values()):
        tokens[number] = row.padding
        for segment, (start, ids) in enumerate(row.documents, 1):
            inside = number, slice(start, start + len(ids))
            layout = layout_of(spec, ids[None], np.ones((1, len(ids))), IDS)
            tokens[inside], segments[inside], positions[inside] = ids, segment, layout.positions[0]
            if layout.block_positions is not None:
                blocks[inside] = layout.block_positions[0]
            if layout.prefix_mask is not None:
                prefix[inside] = layout.prefix_mask[0]
    return Batch(
        tokens=jnp.asarray(tokens),
        segment_ids=jnp.asarray(segments),
        positions=jnp.asarray(positions),
        block_positions=jnp.asarray(blocks) if spec.uses_block_positions else None,
        prefix_mask=jnp.asarray(prefix) if spec.mask == "prefix" else None,
    )


@functools.partial(jax.jit, static_argnums=0)
def whole_and_step_by_step(spec, params, batch):
    """Return the logits [B, T, V] of one call, and of a prompt and single tokens with a cache."""

    def slots(first, count):
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count, axis=1), batch)

    def step(cache, slot):
        output = apply(spec, params, slots(slot, 1), cache=cache)
        return output.cache, output.logits[:, 0]

    prompt = apply(spec, params, slots(0, PROMPT), cache=empty_cache(spec, len(ROWS), SLOTS, jnp.float32))
    _, rest = jax.lax.scan(step, prompt.cache, jnp.arange(PROMPT, SLOTS))
    stepwise = jnp.concatenate([prompt.logits, rest.swapaxes(0, 1)], axis=1)
    return apply(spec, params, batch).logits, stepwise


class Logits:
    """Logits of all rows of one structure."""

    def __init__(self, name):
        self.spec = STRUCTURES[name]
        batch = batch_of(self.spec)
        with jax.default_matmul_precision("highest"):
            results = whole_and_step_by_step(self.spec, random_params(self.spec, scale=0.15), batch)
        self.whole, self.stepwise = map(np.asarray, results)
        self.valid = np.asarray(batch.segment_ids) != 0

    def row(self, name, start=0, count=SLOTS):
        """Return the logits [count, V] of a row from slot `start` on."""
        return self.whole[list(ROWS).index(name), start : start + count]


@pytest.fixture(scope="module", params=STRUCTURES)
def logits(request):
    return Logits(request.param)


def assert_equal(one, other):
    np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=0)


def test_the_registry_has_all_the_structures_that_the_laws_are_about():
    specs = STRUCTURES.values()
    assert {type(spec.attention).__name__ for spec in specs} == {"GQA", "MLA"}
    assert {type(spec.position).__name__ for spec in specs} == {"Rope", "Rope2D", "Alibi", "LearnedBlock"}
    assert {type(spec.residual).__name__ for spec in specs} == {"PreNorm", "DeepNorm", "SandwichNorm"}
    assert {spec.mask for spec in specs} == {"causal", "prefix"}
    assert any(spec.moe for spec in specs)
    assert any(spec.head.normalized for spec in specs)


def test_decoding_with_a_cache_gives_the_logits_of_the_whole_row(logits):
    assert_equal(logits.stepwise[logits.valid], logits.whole[logits.valid])
    assert np.abs(logits.whole[logits.valid]).mean() > 0.1


def test_packed_documents_give_the_logits_of_documents_apart(logits):
    short, long = len(SHORT), len(LONG)
    assert_equal(logits.row("packed", 0, short), logits.row("short, padded right", 0, short))
    assert_equal(logits.row("packed", short, long), logits.row("long, padded right", 0, long))


def test_padding_changes_nothing_on_either_side(logits):
    short, long = len(SHORT), len(LONG)
    plain = logits.row("short, padded right", 0, short)
    assert_equal(logits.row("short, padded with other ids", 0, short), plain)
    assert_equal(logits.row("short, padded on both sides", 4, short), plain)
    assert_equal(logits.row("long, padded left", 7, long), logits.row("long, padded right", 0, long))


def test_later_tokens_are_seen_within_the_prefix_alone(logits):
    plain = logits.row("full")
    early, late = (np.abs(logits.row(f"full, slot {slot} changed") - plain).max(axis=-1) for slot in (3, 12))
    assert late[:12].max() <= TOLERANCE < 1e-3 < late[12:].min()
    assert early[3:].min() > 1e-3
    if logits.spec.mask == "prefix":
        assert early[:3].min() > 1e-3
    else:
        assert early[:3].max() <= TOLERANCE


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(spec, params, batch):
    def loss(params):
        logits = apply(spec, params, batch, train=True).logits
        return jnp.sum(jnp.where(batch.segment_ids[..., None] != 0, jnp.sin(logits), 0))

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("name", ["baichuan-13b", "deepseek-v2", "glm-base", "glm-4-9b-0414"])
def test_gradients_are_the_slopes_of_the_loss(name):
    spec = STRUCTURES[name]
    with jax.enable_x64(True):
        params, direction = (
            jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), random_params(spec, seed, 0.15)) for seed in (0, 1)
        )
        batch = batch_of(spec)
        _, gradients = loss_and_gradients(spec, params, batch)
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
            assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)

        def loss_at(step):
            moved = jax.tree.map(lambda leaf, along: leaf + step * along, params, direction)
            return float(loss_and_gradients(spec, moved, batch)[0])

        slope = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    expected = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradients, direction)))
    assert slope == pytest.approx(expected, rel=1e-5)
