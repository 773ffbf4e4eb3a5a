"""Tiny specs, and random parameters drawn by numpy, so that no test compiles an initialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.nn.model import declarations
from jaxllm.nn.param import is_declared
from jaxllm.spec import GQA, MLP, ChunkedNTK, Head, LogN, ModelSpec, Norm, Rope
from jaxllm.types import Batch

LLAMA = ModelSpec(
    vocab_size=61,
    hidden_size=24,
    num_layers=3,
    max_position_embeddings=16,
    attention=GQA(num_heads=4, num_kv_heads=2, head_dim=8),
    position=Rope(),
    mlp=MLP(intermediate_size=40),
    norm=Norm(eps=1e-5),
)
TIED_LLAMA = dataclasses.replace(LLAMA, head=Head(tie_word_embeddings=True))
QWEN = dataclasses.replace(
    LLAMA,
    attention=GQA(num_heads=4, num_kv_heads=4, head_dim=8, qkv_bias=True),
    position=Rope(theta=1e4, scaling=ChunkedNTK(train_length=6)),
    norm=Norm(eps=1e-6),
    logn=LogN(train_length=6),
)
WINDOWED_QWEN = dataclasses.replace(QWEN, window=(2, None, 5))


def random_params(spec, seed=0, scale=0.3):
    """Return float32 parameters with every bias and norm scale different from its start value."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.normal(size=leaf.value.shape) * scale
        return jnp.asarray(values + (leaf.kind == "ones"), jnp.float32)

    return jax.tree.map(draw, declarations(spec), is_leaf=is_declared)


def make_batch(tokens, segment_ids=None, positions=None, **fields):
    """Return a Batch of token rows; by default one document fills each row."""
    tokens = np.asarray(tokens, np.int32)
    segment_ids = np.ones_like(tokens) if segment_ids is None else np.asarray(segment_ids, np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    return Batch(
        tokens=jnp.asarray(tokens),
        segment_ids=jnp.asarray(segment_ids),
        positions=jnp.asarray(positions, jnp.int32),
        **fields,
    )
