"""Tiny specs, and random parameters drawn by numpy, so that no test compiles an initialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.families import FAMILIES
from jaxllm.nn.model import declarations
from jaxllm.nn.param import is_declared
from jaxllm.spec import GQA, MLP, ChunkedNTK, DeepNorm, Head, LogN, ModelSpec, Norm, Rope, Yarn, tiny
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


def structures():
    """Return one tiny spec of each structure that a published size has, by the first such size.

    Numbers that no code depends on are made alike, parts that some models merely leave out are there in all (biases,
    normalised heads, compressed queries, groups of experts), and rules that depend on the length of a call are not.
    """
    first = {}
    for family in FAMILIES:
        for name, spec in family.sizes.items():
            first.setdefault(_structure(spec), name)
    return {name: spec for spec, name in first.items()}


def _structure(spec):
    spec = tiny(spec, vocab_size=64)
    attention, position, residual, moe = spec.attention, spec.position, spec.residual, spec.moe
    if isinstance(attention, GQA):
        attention = dataclasses.replace(attention, num_kv_heads=2, qkv_bias=True, out_bias=True)
    else:
        attention = dataclasses.replace(attention, q_lora_rank=24, bias=True)
    if moe is not None:
        moe = dataclasses.replace(moe, num_groups=4, topk_groups=3, scaling_factor=2.0)
    if isinstance(position, Rope):
        scaling = position.scaling if isinstance(position.scaling, Yarn) else None
        position = dataclasses.replace(position, theta=1e4, scaling=scaling)
    if isinstance(residual, DeepNorm):
        residual = DeepNorm(alpha=2.0)
    return dataclasses.replace(
        spec,
        max_position_embeddings=64,
        attention=attention,
        position=position,
        mlp=dataclasses.replace(spec.mlp, bias=moe is None),
        norm=dataclasses.replace(spec.norm, eps=1e-5),
        moe=moe,
        residual=residual,
        head=dataclasses.replace(spec.head, normalized=not spec.head.tie_word_embeddings),
        logn=None,
    )


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
