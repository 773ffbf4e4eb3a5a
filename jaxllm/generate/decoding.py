"""The two programs of a generation, compiled once for each shape: reading prompts, and decoding from them.

True lengths travel as data, so neither a new prompt length nor another number of tokens compiles anything.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.token_rows import RowLayout
from jaxllm.generate.sampling import SamplingKind, SamplingValues, next_token, token_logps
from jaxllm.nn.decoder import output_logits
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.nn.model import apply, empty_cache
from jaxllm.sharding.rules import constrain
from jaxllm.spec import MLA, ModelSpec
from jaxllm.types import Batch, KVCache, ModelOutput, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a generation is compiled for, beside shapes.

    Attributes:
      kind: how tokens are chosen.
      attention_impl: as in `nn.model.apply`.
      compute_dtype: dtype of activations and cache; None: the parameters' own.
    """

    spec: ModelSpec
    kind: SamplingKind
    attention_impl: AttentionImpl | None = None
    compute_dtype: jnp.dtype | None = None


class Weights(NamedTuple):
    """A model's parameters, and its adapter or None."""

    params: Params
    adapter: Any = None


class Rules(NamedTuple):
    """What all rows have in common: how a token is chosen, eos int32 [E] that end a row, pad int32 [] after that."""

    values: SamplingValues
    eos: np.ndarray
    pad: np.ndarray


class Prompts(flax.struct.PyTreeNode):
    """What a generation starts from; R rows are generated, R / B to each prompt.

    Attributes:
      tokens, segment_ids: int32 [B, S], padded on the left, with slots for all new tokens; segment 1 is valid.
      layout: of all S slots.
      length: int32 [], slots filled.
      keys: uint32 [R, 2], a random key for each row.
      finished: bool [R], rows that generate nothing.
      rope_length: int32 [], length that length-dependent position rules see throughout; None: the running one.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    layout: RowLayout
    length: jax.Array
    keys: jax.Array
    finished: jax.Array
    rope_length: jax.Array | None = None


class GenerationState(flax.struct.PyTreeNode):
    """What a generation in progress carries from token to token; the newest token has not been read yet.

    Attributes:
      cache: past keys and values; None where every step runs the whole row again.
      tokens, segment_ids: int32 [R, S], prompt and generated tokens; segment 1 is valid.
      layout: of all S slots, filled or not.
      length: int32 [], slots filled. start: int32 [], slots filled by the prompt.
      valid: int32 [R], valid tokens of each prompt.
      rope_length: as in Prompts.
      seen: bool [R, V], or None without a repetition penalty.
      finished: bool [R], rows that met a stop id.
      keys: uint32 [R, 2]; the random numbers of a token are those of its row's key and its number.
      logps: float32 [R, N], log-probability of each new token, see `sampling.token_logps`; or None.
      step_logits: float32 [R, N, V], the logits each new token was chosen from; or None.
    """

    cache: KVCache | None
    tokens: jax.Array
    segment_ids: jax.Array
    layout: RowLayout
    length: jax.Array
    start: jax.Array
    valid: jax.Array
    rope_length: jax.Array | None
    seen: jax.Array | None
    finished: jax.Array
    keys: jax.Array
    logps: jax.Array | None
    step_logits: jax.Array | None


def make_rules(values: SamplingValues, eos_ids: tuple[int, ...], pad_id: int) -> Rules:
    """Return the Rules of some stop ids; without any, rows end where the caller ends them."""
    return Rules(values, np.array(eos_ids or (-1,), np.int32), np.int32(pad_id))


@functools.partial(
    jax.jit, static_argnames=("program", "prompt_slots", "samples", "use_cache", "logp_slots", "logit_slots")
)
def prefill(
    weights: Weights,
    prompts: Prompts,
    rules: Rules,
    *,
    program: Program,
    prompt_slots: int,
    samples: int = 1,
    use_cache: bool = True,
    logp_slots: int | None = None,
    logit_slots: int | None = None,
) -> GenerationState:
    """Read prompts and choose the first token of each row.

    Args:
      prompt_slots: slots of the prompts that are read, at least their length.
      samples: rows to each prompt, which is read once; R / B.
      use_cache: False runs the whole row again for each token.
      logp_slots, logit_slots: how many tokens to keep log-probabilities and logits of; None: of none.
    """
    spec = program.spec
    num_rows, num_slots = len(prompts.finished), prompts.tokens.shape[1]
    repeat = functools.partial(_repeat, samples=samples)
    valid = jnp.sum(prompts.segment_ids, axis=1)
    cache = None
    if use_cache:
        dtype = program.compute_dtype or weights.params["embedding"].dtype
        cache = _split(spec, empty_cache(spec, prompts.tokens.shape[0], prompt_slots, dtype))
    read = _rows(
        prompts.tokens,
        prompts.segment_ids,
        prompts.layout,
        _rope_length(spec, prompts.rope_length, prompts.length, valid),
        slots=prompt_slots,
    )
    output = _apply(weights, program, read, cache)
    if use_cache:
        cache = _grown(spec, output.cache.replace(index=prompts.length), num_slots, samples)
    seen = None
    if program.kind.penalised:
        rows = jnp.arange(prompts.tokens.shape[0])[:, None]
        seen = jnp.zeros((prompts.tokens.shape[0], spec.vocab_size), bool)
        seen = repeat(seen.at[rows, prompts.tokens].max(prompts.segment_ids == 1))
    logits = repeat(_last_logits(weights, program, output.hidden, prompts.length))
    state = GenerationState(
        cache=cache,
        tokens=repeat(prompts.tokens),
        segment_ids=repeat(prompts.segment_ids),
        layout=jax.tree.map(repeat, prompts.layout),
        length=prompts.length,
        start=prompts.length,
        valid=repeat(valid),
        rope_length=prompts.rope_length,
        seen=seen,
        finished=prompts.finished,
        keys=prompts.keys,
        logps=None if logp_slots is None else jnp.zeros((num_rows, logp_slots), jnp.float32),
        step_logits=None if logit_slots is None else jnp.zeros((num_rows, logit_slots, logits.shape[-1]), logits.dtype),
    )
    return _choose(state, logits, rules, program)


@functools.partial(jax.jit, static_argnames="program", donate_argnums=1)
def decode(
    weights: Weights, state: GenerationState, rules: Rules, limit: jax.Array, *, program: Program
) -> GenerationState:
    """Generate until `limit` int32 [] slots are filled or every row has met a stop id."""

    def unfinished(state: GenerationState) -> jax.Array:
        return (state.length < limit) & ~jnp.all(state.finished)

    def one_token(state: GenerationState) -> GenerationState:
        logits, cache = _next_logits(weights, state, program)
        return _choose(state.replace(cache=cache), logits, rules, program)

    return jax.lax.while_loop(unfinished, one_token, state)


def _choose(state: GenerationState, logits: jax.Array, rules: Rules, program: Program) -> GenerationState:
    """Choose the token that follows and write it down."""
    number = state.length - state.start
    keys = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(state.keys), number)
    token = next_token(logits, state.seen, keys, program.kind, rules.values)
    token = jnp.where(state.finished, rules.pad, token)
    logps, seen, step_logits = state.logps, state.seen, state.step_logits
    if logps is not None:
        found = jnp.where(state.finished, 0, token_logps(logits, token, rules.values))
        logps = constrain(_write(logps, found, number), "batch", None)
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return state.replace(
        tokens=constrain(_write(state.tokens, token, state.length), "batch", None),
        segment_ids=_write(state.segment_ids, jnp.ones_like(token), state.length),
        length=state.length + 1,
        seen=seen,
        finished=state.finished | jnp.any(token[:, None] == rules.eos[None], axis=1),
        logps=logps,
        step_logits=None if step_logits is None else _write(step_logits, logits, number),
    )


def _next_logits(weights: Weights, state: GenerationState, program: Program) -> tuple[jax.Array, KVCache | None]:
    """Return the logits [R, V] that follow the newest token, and the cache with it."""
    spec = program.spec
    if state.cache is None:
        valid = state.valid + state.length - state.start
        rope_length = _rope_length(spec, state.rope_length, state.length, valid)
        rows = _rows(state.tokens, state.segment_ids, state.layout, rope_length)
        return _last_logits(weights, program, _apply(weights, program, rows).hidden, state.length), None

    def newest(slots: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(slots, state.length - 1, 1, axis=1)

    layout = state.layout
    step = Batch(
        tokens=newest(state.tokens),
        positions=newest(layout.positions),
        block_positions=None if layout.block_positions is None else newest(layout.block_positions),
        segment_ids=jnp.ones((state.tokens.shape[0], 1), jnp.int32),
        # Qwen keeps the base of the prefill while decoding; other rules follow the running length.
        rope_length=_rope_length(spec, state.rope_length, state.length, state.valid),
    )
    output = _apply(weights, program, step, state.cache)
    return _last_logits(weights, program, output.hidden, jnp.int32(1)), _split(spec, output.cache)


def _apply(weights: Weights, program: Program, batch: Batch, cache: KVCache | None = None) -> ModelOutput:
    return apply(
        program.spec,
        weights.params,
        batch,
        cache=cache,
        return_logits=False,
        compute_dtype=program.compute_dtype,
        attention_impl=program.attention_impl,
        adapter=weights.adapter,
    )


def _last_logits(weights: Weights, program: Program, hidden: jax.Array, length: jax.Array) -> jax.Array:
    last = jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1)
    return output_logits(program.spec, weights.params, last, weights.adapter)[:, 0]


def _rows(
    tokens: jax.Array,
    segment_ids: jax.Array,
    layout: RowLayout,
    rope_length: jax.Array,
    *,
    slots: int | None = None,
) -> Batch:
    """Return whole rows as a batch, cut to their first `slots`."""
    positions, block_positions, prefix_mask = (None if part is None else part[:, :slots] for part in layout)
    return Batch(
        tokens=tokens[:, :slots],
        positions=positions,
        segment_ids=segment_ids[:, :slots],
        rope_length=rope_length,
        block_positions=block_positions,
        prefix_mask=prefix_mask,
    )


def _rope_length(spec: ModelSpec, fixed: jax.Array | None, length: jax.Array, valid: jax.Array) -> jax.Array:
    if fixed is None and spec.rope_length_by_row:
        return valid
    return jnp.broadcast_to(length if fixed is None else fixed, valid.shape)


def _write(rows: jax.Array, values: jax.Array, slot: jax.Array) -> jax.Array:
    """Return rows [R, S, ...] with values [R, ...] in one slot."""
    return jax.lax.dynamic_update_slice_in_dim(rows, values[:, None], slot, axis=1)


def _repeat(rows: jax.Array, samples: int, axis: int = 0) -> jax.Array:
    return rows if samples == 1 else jnp.repeat(rows, samples, axis=axis)


def _grown(spec: ModelSpec, cache: KVCache, num_slots: int, samples: int) -> KVCache:
    """Return a cache with room for new tokens, and each row `samples` times."""

    def grow(slots: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * slots.ndim
        widths[axis + 1] = (0, num_slots - slots.shape[axis + 1])
        return jnp.pad(_repeat(slots, samples, axis), widths)

    return _split(
        spec,
        cache.replace(
            k=grow(cache.k, 1),
            v=grow(cache.v, 1),
            segment_ids=grow(cache.segment_ids, 0),
            positions=grow(cache.positions, 0),
        ),
    )


def _split(spec: ModelSpec, cache: KVCache) -> KVCache:
    """Pin where a cache lies on the mesh: split by rows and by key/value heads, of which latent attention has none."""
    axes = ("layers", "batch", None, None if isinstance(spec.attention, MLA) else "kv_heads", None)
    return cache.replace(k=constrain(cache.k, *axes), v=constrain(cache.v, *axes))
