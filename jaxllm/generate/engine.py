"""Autoregressive generation on device, with or without a key/value cache.

Shapes are rounded up to buckets and true lengths travel as data, so neither a new prompt length nor another number of
tokens compiles anything within a bucket.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.prefix_layout import PrefixIds
from jaxllm.data.token_rows import RowLayout, check_positions, layout_of
from jaxllm.generate.sampling import Sampling, SamplingKind, SamplingValues, next_token, split_sampling
from jaxllm.nn.decoder import output_logits
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.nn.model import apply, empty_cache
from jaxllm.spec import ModelSpec
from jaxllm.types import Batch, KVCache, Params

SMALLEST_BUCKET = 32


class GenerationState(flax.struct.PyTreeNode):
    """What a generation in progress carries from token to token.

    Attributes:
      cache: past keys and values; None where every step runs the whole row again.
      tokens, segment_ids: int32 [B, S], prompt and generated tokens; segment 1 is valid.
      positions: int32 [B, S], of all slots, filled or not.
      block_positions: int32 [B, S], or None. prefix_mask: bool [B, S], or None.
      length: int32 [], slots filled.
      start: int32 [], slots filled by the prompt.
      valid: int32 [B], valid tokens of each prompt.
      logits: float32 [B, V] of the next token.
      seen: bool [B, V], or None without a repetition penalty.
      finished: bool [B], rows that met a stop id.
      key: random key.
      step_logits: float32 [B, bucket(new tokens), V], the logits each new token was chosen from, or None.
    """

    cache: KVCache | None
    tokens: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    block_positions: jax.Array | None
    prefix_mask: jax.Array | None
    length: jax.Array
    start: jax.Array
    valid: jax.Array
    logits: jax.Array
    seen: jax.Array | None
    finished: jax.Array
    key: jax.Array
    step_logits: jax.Array | None


def bucket(size: int) -> int:
    """Return the smallest bucket (a power of two, at least 32) that holds `size` slots."""
    return max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())


class Generator:
    """One generation: prefill once, then decode as many tokens at a time as the caller wants.

    Attributes:
      state: the current GenerationState.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        prompt: np.ndarray,
        prompt_mask: np.ndarray,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        eos_ids: tuple[int, ...] = (),
        pad_id: int = 0,
        num_ids: int | None = None,
        prefix_ids: PrefixIds | None = None,
        attention_impl: AttentionImpl | None = None,
        use_cache: bool = True,
        return_logits: bool = False,
    ):
        """Run the prompt.

        Args:
          prompt: int [B, P], padded on the left. prompt_mask: bool or int [B, P], 0 = padding.
          num_ids: ids from here on are never generated; None: all of the vocabulary may be.
          prefix_ids: special ids of a model whose prefix all tokens see.
          attention_impl: as in `nn.model.apply`.
          use_cache: False runs the whole row again for each token, for comparison.

        Raises:
          InputError: positions that cannot be derived, or beyond the tables of a model with learned ones.
        """
        batch_size, length = prompt.shape
        kind, self._values = split_sampling(sampling, num_ids or spec.vocab_size)
        prompt_slots = bucket(length)
        num_slots = bucket(max(prompt_slots, length + max_new_tokens))
        tokens = np.zeros((batch_size, num_slots), np.int32)
        segments = np.zeros((batch_size, num_slots), np.int32)
        tokens[:, :length], segments[:, :length] = prompt, prompt_mask
        layout = layout_of(spec, prompt, prompt_mask, prefix_ids, num_slots)
        written = RowLayout(*(None if part is None else part[:, : length + max_new_tokens] for part in layout))
        check_positions(spec, written)
        self._params = params
        self._eos = jnp.array(eos_ids or (-1,), jnp.int32)
        self._pad = jnp.int32(pad_id)
        self._static = dict(spec=spec, kind=kind, attention_impl=attention_impl)
        self._prompt_length = self._length = length
        self._limit = length + max_new_tokens
        self._all_finished = False
        self.state = _prefill(
            params,
            tokens,
            segments,
            layout,
            jnp.int32(length),
            jax.random.key(seed),
            prompt_slots=prompt_slots,
            use_cache=use_cache,
            logit_slots=bucket(max_new_tokens) if return_logits else None,
            **self._static,
        )

    def decode(self, num_tokens: int) -> np.ndarray:
        """Generate up to `num_tokens` more tokens and return them, int32 [B, n].

        n is smaller when `max_new_tokens` is reached or every row has met a stop id; rows that stopped earlier are
        filled with the pad id.
        """
        before, limit = self._length, min(self._length + num_tokens, self._limit)
        self.state = _decode(
            self._params, self.state, self._values, jnp.int32(limit), self._eos, self._pad, **self._static
        )
        tokens, length, finished = jax.device_get((self.state.tokens, self.state.length, self.state.finished))
        self._length, self._all_finished = int(length), bool(finished.all())
        return tokens[:, before : self._length]

    @property
    def done(self) -> bool:
        """Whether nothing more will be generated."""
        return self._length >= self._limit or self._all_finished

    def step_logits(self) -> np.ndarray:
        """Return the logits that each generated token was chosen from, float32 [B, n, V]."""
        return np.asarray(self.state.step_logits)[:, : self._length - self._prompt_length]


@functools.partial(
    jax.jit, static_argnames=("spec", "kind", "attention_impl", "prompt_slots", "use_cache", "logit_slots")
)
def _prefill(
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array,
    layout: RowLayout,
    length: jax.Array,
    key: jax.Array,
    *,
    spec: ModelSpec,
    kind: SamplingKind,
    attention_impl: AttentionImpl | None,
    prompt_slots: int,
    use_cache: bool,
    logit_slots: int | None,
) -> GenerationState:
    batch_size, num_slots = tokens.shape
    valid = jnp.sum(segment_ids, axis=1)
    cache = None
    prompt = _rows(spec, tokens, segment_ids, layout, length, valid, slots=prompt_slots)
    if use_cache:
        cache = empty_cache(spec, batch_size, num_slots, params["embedding"].dtype)
    output = apply(spec, params, prompt, cache=cache, return_logits=False, attention_impl=attention_impl)
    if use_cache:
        cache = output.cache.replace(index=length)
    seen = None
    if kind.penalised:
        rows = jnp.arange(batch_size)[:, None]
        seen = jnp.zeros((batch_size, spec.vocab_size), bool).at[rows, tokens].max(segment_ids == 1)
    logits = _last_logits(spec, params, output.hidden, length)
    return GenerationState(
        cache=cache,
        tokens=tokens,
        segment_ids=segment_ids,
        **layout._asdict(),
        length=length,
        start=length,
        valid=valid,
        logits=logits,
        seen=seen,
        finished=jnp.zeros((batch_size,), bool),
        key=key,
        step_logits=None
        if logit_slots is None
        else jnp.zeros((batch_size, logit_slots, spec.vocab_size), logits.dtype),
    )


@functools.partial(jax.jit, static_argnames=("spec", "kind", "attention_impl"), donate_argnums=1)
def _decode(
    params: Params,
    state: GenerationState,
    values: SamplingValues,
    limit: jax.Array,
    eos: jax.Array,
    pad: jax.Array,
    *,
    spec: ModelSpec,
    kind: SamplingKind,
    attention_impl: AttentionImpl | None,
) -> GenerationState:
    def unfinished(state: GenerationState) -> jax.Array:
        return (state.length < limit) & ~jnp.all(state.finished)

    def one_token(state: GenerationState) -> GenerationState:
        key, sample_key = jax.random.split(state.key)
        token = next_token(state.logits, state.seen, sample_key, kind, values)
        token = jnp.where(state.finished, pad, token)
        rows = jnp.arange(token.shape[0])
        step_logits = state.step_logits
        if step_logits is not None:
            step_logits = step_logits.at[:, state.length - state.start].set(state.logits)
        state = state.replace(
            tokens=state.tokens.at[:, state.length].set(token),
            segment_ids=state.segment_ids.at[:, state.length].set(1),
            length=state.length + 1,
            seen=None if state.seen is None else state.seen.at[rows, token].set(True),
            finished=state.finished | jnp.any(token[:, None] == eos[None], axis=1),
            key=key,
            step_logits=step_logits,
        )
        return _advance(spec, params, state, token, attention_impl)

    return jax.lax.while_loop(unfinished, one_token, state)


def _advance(
    spec: ModelSpec, params: Params, state: GenerationState, token: jax.Array, impl: AttentionImpl | None
) -> GenerationState:
    """Compute the logits that follow the token just written."""
    if state.cache is None:
        layout = RowLayout(state.positions, state.block_positions, state.prefix_mask)
        valid = state.valid + state.length - state.start
        rows = _rows(spec, state.tokens, state.segment_ids, layout, state.length, valid)
        hidden = apply(spec, params, rows, return_logits=False, attention_impl=impl).hidden
        return state.replace(logits=_last_logits(spec, params, hidden, state.length))

    def newest(places: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(places, state.length - 1, 1, axis=1)

    step = Batch(
        tokens=token[:, None],
        positions=newest(state.positions),
        block_positions=None if state.block_positions is None else newest(state.block_positions),
        segment_ids=jnp.ones((token.shape[0], 1), jnp.int32),
        # Qwen keeps the base of the prefill while decoding; other rules follow the running length.
        rope_length=_rope_length(spec, state.length, state.valid),
    )
    output = apply(spec, params, step, cache=state.cache, return_logits=False, attention_impl=impl)
    return state.replace(cache=output.cache, logits=_last_logits(spec, params, output.hidden, jnp.int32(1)))


def _rows(
    spec: ModelSpec,
    tokens: jax.Array,
    segment_ids: jax.Array,
    layout: RowLayout,
    length: jax.Array,
    valid: jax.Array,
    *,
    slots: int | None = None,
) -> Batch:
    """Return whole rows as a batch, cut to their first `slots`."""
    positions, block_positions, prefix_mask = (None if part is None else part[:, :slots] for part in layout)
    return Batch(
        tokens=tokens[:, :slots],
        positions=positions,
        segment_ids=segment_ids[:, :slots],
        rope_length=_rope_length(spec, length, valid),
        block_positions=block_positions,
        prefix_mask=prefix_mask,
    )


def _rope_length(spec: ModelSpec, length: jax.Array, valid: jax.Array) -> jax.Array:
    if spec.rope_length_by_row:
        return valid
    return jnp.broadcast_to(length, valid.shape)


def _last_logits(spec: ModelSpec, params: Params, hidden: jax.Array, length: jax.Array) -> jax.Array:
    last = jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1)
    return output_logits(spec, params, last)[:, 0]
