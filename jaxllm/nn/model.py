"""Functions on a whole model: its declarations, counts, fresh parameters and forward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.nn.adapter import Adapter, with_dropout
from jaxllm.nn.decoder import Decoder, Remat
from jaxllm.nn.dot_product import AttentionImpl, default_impl
from jaxllm.nn.param import (
    Declared,
    Initializer,
    abstract_values,
    decayed,
    initial_values,
    is_declared,
    partition_specs,
)
from jaxllm.spec import MLA, ModelSpec
from jaxllm.types import Batch, KVCache, ModelOutput, Params


@functools.lru_cache(maxsize=64)
def declarations(spec: ModelSpec) -> Any:
    """Return the tree of parameter declarations (abstract values with axes and kinds); nothing is allocated."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    batch = Batch(tokens=ids, positions=ids, segment_ids=ids)
    # The key is made inside: nothing here touches a device.
    return jax.eval_shape(lambda batch: Decoder(spec).init(jax.random.key(0), batch), batch)["params"]


def abstract_params(spec: ModelSpec, mesh: Mesh | None = None, dtype: jnp.dtype = jnp.float32) -> Params:
    """Return the parameters as jax.ShapeDtypeStruct, with their shardings if a mesh is given.

    Raises:
      InputError: a dimension does not divide over its mesh axes.
    """
    return abstract_values(declarations(spec), mesh, dtype)


def param_specs(spec: ModelSpec) -> Any:
    """Return the tree of the parameters' PartitionSpecs."""
    return partition_specs(declarations(spec))


def count_params(spec: ModelSpec) -> int:
    """Count the parameters of a model without allocating them."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(spec)))


def count_active_params(spec: ModelSpec) -> int:
    """Count the parameters that one token uses: of a mixture's routed experts only those that it selects."""
    return sum(size for _, size in _active_sizes(spec))


def count_matmul_params(spec: ModelSpec) -> int:
    """Count the parameters that multiply one token: active matrices and the output head, no embedding lookup."""
    matrices = sum(size for leaf, size in _active_sizes(spec) if leaf.kind in ("matrix", "output"))
    tied_head = spec.vocab_size * spec.hidden_size if spec.head.tie_word_embeddings else 0
    return matrices + tied_head


def _active_sizes(spec: ModelSpec) -> Iterator[tuple[Declared, int]]:
    """Yield each declaration with the number of its values that one token uses."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(declarations(spec), is_leaf=is_declared):
        size = math.prod(leaf.value.shape)
        if any(key.key == "experts" for key in path):
            size = size // spec.moe.num_experts * spec.moe.num_experts_per_tok
        yield leaf, size


def decay_mask(spec: ModelSpec) -> Params:
    """Return True for each parameter that weight decay shrinks: matrices and embeddings, no norms and biases."""
    return decayed(declarations(spec))


def init(spec: ModelSpec, key: jax.Array) -> Params:
    """Draw fresh float32 parameters, every matrix normal with 0.02; pure, so it may be jitted with out_shardings."""
    return initial_values(declarations(spec), key, Initializer())


def apply(
    spec: ModelSpec,
    params: Params,
    batch: Batch,
    *,
    train: bool = False,
    compute_dtype: jnp.dtype | None = None,
    remat: Remat = "none",
    attention_impl: AttentionImpl | None = None,
    cache: KVCache | None = None,
    return_hidden: bool = False,
    return_logits: bool = True,
    embedding_gradient_scale: jax.Array | None = None,
    never_dropped: jax.Array | None = None,
    adapter: Adapter | None = None,
    row_keys: jax.Array | None = None,
    dropout: float = 0.0,
    neftune_alpha: float | None = None,
) -> ModelOutput:
    """Run the model on a batch; a pure function to jit, differentiate or shard as you like.

    Args:
      params: nested dict of arrays as `init` gives.
      train: position rules that are off in training are off, and mixtures with a capacity drop what exceeds it.
      compute_dtype: dtype of activations; None: the parameters' own.
      remat: what the backward pass recomputes.
      attention_impl: "pallas" (kernels, on a CPU interpreted), "reference" (plain operations), or None: kernels on TPU
        and GPU for float32 and bfloat16. Batches with a mask of their own are always computed by plain operations.
      cache: past keys and values for incremental decoding.
      return_hidden: also return every layer's output.
      return_logits: False leaves out the head, for losses chunked over tokens.
      embedding_gradient_scale: float [], shrinks what flows back into the embedding lookup (arXiv:2210.02414
        section 2.4); the forward pass stays the same.
      never_dropped: bool [B], rows whose tokens keep all their experts in training; None: none of them.
      adapter: what is added to frozen parameters, as a `train.tuning.Tuning` joins it.
      row_keys: uint32 [B, 2], a random key for each row: what is dropped depends on it alone. Without it, and where
        `train` is False, nothing is dropped and no noise is added.
      dropout: share of values dropped of the embeddings and of what attention and feed-forward layers add to them.
      neftune_alpha: noise on the embeddings (arXiv:2310.05914); None: none.

    Returns:
      ModelOutput; logits are float32 [B, T, V].
    """
    impl = attention_impl or default_impl(params["embedding"].dtype if compute_dtype is None else compute_dtype)
    draws = train and row_keys is not None
    if adapter is not None and draws:
        adapter = with_dropout(adapter, row_keys)
    return Decoder(spec, remat, impl).apply(
        {"params": params} if adapter is None else {"params": params, "adapter": adapter},
        batch,
        cache=cache,
        train=train,
        compute_dtype=compute_dtype,
        return_hidden=return_hidden,
        return_logits=return_logits,
        embedding_gradient_scale=embedding_gradient_scale,
        never_dropped=never_dropped,
        row_keys=row_keys if draws else None,
        dropout=dropout if draws else 0.0,
        neftune_alpha=neftune_alpha if draws else None,
    )


def empty_cache(spec: ModelSpec, batch_size: int, num_slots: int, dtype: jnp.dtype) -> KVCache:
    """Return a cache with `num_slots` empty slots for each row."""
    attention, lead = spec.attention, (spec.num_layers, batch_size, num_slots)
    if isinstance(attention, MLA):
        widths = (1, attention.kv_lora_rank), (1, attention.qk_rope_head_dim)
    else:
        widths = ((attention.num_kv_heads, attention.head_dim),) * 2
    slots = jnp.zeros((batch_size, num_slots), jnp.int32)
    k, v = (jnp.zeros(lead + width, dtype) for width in widths)
    return KVCache(k=k, v=v, segment_ids=slots, positions=slots, index=jnp.int32(0))
