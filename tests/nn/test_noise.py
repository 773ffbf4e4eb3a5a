"""Dropout and NEFTune noise: their laws, and that a row's draws depend on nothing but its key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.nn.model import apply
from jaxllm.nn.noise import Dropout, neftune
from tests.tiny_models import LLAMA, make_batch, random_params

KEYS = jax.random.key_data(jax.random.split(jax.random.key(7), 4))
TOKENS = np.random.default_rng(1).integers(0, LLAMA.vocab_size, (4, 10))
PARAMS = random_params(LLAMA)

hidden_of = jax.jit(
    lambda batch, keys, train, **options: (
        apply(LLAMA, PARAMS, batch, train=train, row_keys=keys, return_logits=False, **options).hidden
    ),
    static_argnames=("train", "dropout", "neftune_alpha", "remat"),
)


def test_a_share_is_dropped_and_the_mean_stays():
    dropped = Dropout(KEYS, 0.25)(jnp.ones((4, 100, 50)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(dropped.mean(axis=(1, 2)), 1, atol=0.03)
    assert not np.array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped, Dropout(KEYS, 0.25).folded(3)(jnp.ones((4, 100, 50))))


def test_noise_is_as_wide_as_the_length_of_each_example_says():
    segments = jnp.asarray([[1] * 4 + [2] * 12 + [0] * 4] * 4)
    noise = jax.jit(neftune, static_argnums=3)(jnp.zeros((4, 20, 300)), segments, KEYS, 5.0)
    for tokens, length in ((slice(0, 4), 4), (slice(4, 16), 12)):
        largest = float(jnp.abs(noise[:, tokens]).max())
        bound = 5.0 / np.sqrt(length * 300)
        assert 0.98 * bound < largest <= bound
    assert (noise[:, 16:] == 0).all()


def test_a_row_draws_the_same_in_every_batch_and_under_every_remat():
    options = dict(train=True, dropout=0.3, neftune_alpha=5.0)
    hidden = hidden_of(make_batch(TOKENS), KEYS, **options)
    order = np.array([2, 0])
    np.testing.assert_allclose(hidden_of(make_batch(TOKENS[order]), KEYS[order], **options), hidden[order], atol=1e-5)
    again = hidden_of(make_batch(TOKENS), KEYS, remat="full", **options)
    np.testing.assert_allclose(again, hidden, atol=1e-5)
    assert np.abs(hidden - hidden_of(make_batch(TOKENS), KEYS[::-1], **options)).max() > 0.1


def test_nothing_is_drawn_outside_of_training_or_without_keys():
    batch = make_batch(TOKENS)
    run = functools.partial(apply, LLAMA, dropout=0.3, neftune_alpha=5.0)
    for options in (dict(train=False, row_keys=KEYS), dict(train=True)):
        assert "random_bits" not in str(jax.make_jaxpr(functools.partial(run, **options))(PARAMS, batch))
    drawn = jax.make_jaxpr(functools.partial(run, train=True, row_keys=KEYS))(PARAMS, batch)
    assert "random_bits" in str(drawn)
