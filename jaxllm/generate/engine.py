"""Generation for a user: rows continued by as many tokens at a time as wanted.

Shapes are rounded up to buckets, so neither a new prompt length nor another number of tokens compiles anything within
a bucket.
"""

from __future__ import annotations

import jax
import numpy as np

from jaxllm.data.prefix_layout import PrefixIds
from jaxllm.data.token_rows import RowLayout, check_positions, layout_of
from jaxllm.generate.decoding import Program, Prompts, Weights, decode, make_rules, prefill
from jaxllm.generate.sampling import Sampling, split_sampling
from jaxllm.nn.adapter import Adapter
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.spec import ModelSpec
from jaxllm.types import Params

SMALLEST_BUCKET = 32


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
        adapter: Adapter | None = None,
        attention_impl: AttentionImpl | None = None,
        use_cache: bool = True,
        return_logits: bool = False,
    ):
        """Run the prompt.

        Args:
          prompt: int [B, P], padded on the left. prompt_mask: bool or int [B, P], 0 = padding.
          max_new_tokens: at least 1.
          num_ids: ids from here on are never generated; None: all of the vocabulary may be.
          prefix_ids: special ids of a model whose prefix all tokens see.
          adapter, attention_impl: as in `nn.model.apply`.
          use_cache: False runs the whole row again for each token, for comparison.

        Raises:
          InputError: positions that cannot be derived, or beyond the tables of a model with learned ones.
        """
        batch_size, length = prompt.shape
        kind, values = split_sampling(sampling, num_ids or spec.vocab_size)
        prompt_slots = bucket(length)
        num_slots = bucket(max(prompt_slots, length + max_new_tokens))
        layout = layout_of(spec, prompt, prompt_mask, prefix_ids, num_slots)
        written = RowLayout(*(None if part is None else part[:, : length + max_new_tokens] for part in layout))
        check_positions(spec, written)
        self._weights = Weights(params, adapter)
        self._rules = make_rules(values, eos_ids, pad_id)
        self._program = Program(spec=spec, kind=kind, attention_impl=attention_impl)
        self._prompt_length = self._length = length
        self._limit = length + max_new_tokens
        self._all_finished = False
        prompts = Prompts(
            tokens=_widened(prompt, num_slots),
            segment_ids=_widened(prompt_mask, num_slots),
            layout=layout,
            length=np.int32(length),
            keys=jax.random.key_data(jax.random.split(jax.random.key(seed), batch_size)),
            finished=np.zeros(batch_size, bool),
        )
        self.state = prefill(
            self._weights,
            prompts,
            self._rules,
            program=self._program,
            prompt_slots=prompt_slots,
            use_cache=use_cache,
            logit_slots=bucket(max_new_tokens) if return_logits else None,
        )

    def decode(self, num_tokens: int) -> np.ndarray:
        """Generate up to `num_tokens` more tokens and return them, int32 [B, n].

        n is smaller when `max_new_tokens` is reached or every row has met a stop id; rows that stopped earlier are
        filled with the pad id.
        """
        before, limit = self._length, min(self._length + num_tokens, self._limit)
        self.state = decode(self._weights, self.state, self._rules, np.int32(limit), program=self._program)
        tokens, length, finished = jax.device_get((self.state.tokens, self.state.length, self.state.finished))
        self._length = min(int(length), limit)
        self._all_finished = self._length == int(length) and bool(finished.all())
        return tokens[:, before : self._length]

    @property
    def done(self) -> bool:
        """Whether nothing more will be generated."""
        return self._length >= self._limit or self._all_finished

    def step_logits(self) -> np.ndarray:
        """Return the logits that each generated token was chosen from, float32 [B, n, V]."""
        return np.asarray(self.state.step_logits)[:, : self._length - self._prompt_length]


def _widened(rows: np.ndarray, num_slots: int) -> np.ndarray:
    """Return rows [B, P] as int32 [B, S], with zeros in the slots to come."""
    return np.pad(rows, [(0, 0), (0, num_slots - rows.shape[1])]).astype(np.int32)
