"""LanguageModel: a model with its tokenizer, as evaluation users hold it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.hf import Source, published_names, save_checkpoint
from jaxllm.data.token_rows import (
    RowLayout,
    check_positions,
    checked_attention_mask,
    checked_ids,
    find_prefix_ids,
    layout_of,
    pad_left,
    require_shape,
)
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.generate.engine import Generator, bucket
from jaxllm.generate.sampling import Sampling
from jaxllm.losses.lm import chunked_cross_entropy, cross_entropy, max_z_loss
from jaxllm.nn.decoder import head_kernel
from jaxllm.nn.model import apply
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers import StreamDecoder, Tokenizer
from jaxllm.train.balance import balance_losses
from jaxllm.types import Batch, ModelOutput, Params

IGNORED_LABEL = -100
_SCORE_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probability of a text.

    Attributes:
      sum_logprob: nats, over all its tokens. num_tokens: how many.
    """

    sum_logprob: float
    num_tokens: int


class LanguageModel:
    """A model's spec, parameters, tokenizer and raw checkpoint config, with the functions that need all of them.

    Attributes:
      spec, params: the architecture and its parameters; parameter dtype = compute dtype.
      tokenizer: or None if none was found.
      config: the raw config.json it was loaded with, or None.
      generation_config: the raw generation_config.json, {} if there was none.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        *,
        tokenizer: Tokenizer | None = None,
        config: dict[str, Any] | None = None,
        generation_config: dict[str, Any] | None = None,
        special_ids: Mapping[str, int] | None = None,
        source: Source | None = None,
    ):
        self.spec = spec
        self.params = params
        self.tokenizer = tokenizer
        self.config = config
        self.generation_config = generation_config or {}
        self._source = source
        self._prefix_ids = None
        if spec.mask == "prefix":
            self._prefix_ids = find_prefix_ids(special_ids, config or {}, tokenizer)

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        positions: np.ndarray | None = None,
        block_positions: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        train: bool = False,
        return_hidden: bool = False,
        return_router: bool = False,
    ) -> ModelOutput:
        """Run the model on token ids.

        Args:
          input_ids: int [B, T]. attention_mask: 0 = padding, on either side.
          positions: int [B, T]; default: as the reference derives them from the ids. For causal models these are
            0 .. T-1, padding counted (rotary positions are relative); for GLM, GLM-130B and ChatGLM-6B they follow
            from the mask token and <sop>, see `data.prefix_layout.derive_layout`.
          block_positions: int [B, T], the second positions of GLM and ChatGLM-6B; default as `positions`.
          mask: bool [B, T, T], True = may attend, in place of the derived rule; padding stays out of sight.
          train: rules that are off in training are off.
          return_hidden: `hidden` becomes [L+2, B, T, D]: embedding, each block's output, final norm.
          return_router: for mixtures of experts, `aux` holds `expert_ids` int32 [Lm, B, T, k], ascending, and their
            `weights` float32 of the Lm mixture layers.

        Returns:
          ModelOutput with float32 logits [B, T, V]; logits at padding mean nothing.

        Raises:
          InputError: token ids outside the vocabulary, shapes that disagree, positions that cannot be derived or that
            are beyond a learned table.
        """
        batch = self._batch(input_ids, attention_mask, positions, block_positions, mask)
        output = _forward(self.spec, self.params, batch, train, return_hidden)
        return output if return_router else output.replace(aux=None)

    def logits(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        positions: np.ndarray | None = None,
        block_positions: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Return float32 logits [B, T, V]; arguments as in `forward`."""
        places = dict(positions=positions, block_positions=block_positions, mask=mask)
        return self.forward(input_ids, attention_mask, **places, train=train).logits

    def loss_and_grads(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        *,
        positions: np.ndarray | None = None,
        block_positions: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Return the training loss as the reference reports it, and its gradients by published tensor name.

        The loss is the mean cross-entropy in training mode, with Baichuan2's max-z loss. The balance losses of
        mixtures of experts are in the gradients alone, as in the published code.

        Args:
          labels: int [B, T], -100 where nothing is trained. As in the references, they are the input's own tokens and
            each is predicted one place before; for GLM and GLM-130B they are what the logits of their own place
            predict. Default: every valid token but a row's first, which nothing predicts. Padding is never trained.
          positions, block_positions, mask: as in `forward`.

        Raises:
          InputError: as in `forward`; labels outside the vocabulary; nothing to train on.
        """
        batch = self._batch(input_ids, attention_mask, positions, block_positions, mask)
        valid = np.asarray(batch.segment_ids) != 0
        aligned = labels is not None and self.config is not None and family_of_config(self.config).aligned_labels
        labels = np.asarray(batch.tokens) if labels is None else self._checked_labels(labels, valid.shape)
        if aligned:
            labels = np.where(valid, labels, IGNORED_LABEL)
        else:
            labels = np.where(valid[:, 1:] & valid[:, :-1], labels[:, 1:], IGNORED_LABEL)
        if not (labels != IGNORED_LABEL).any():
            raise InputError("labels and attention_mask leave no token to predict")
        loss, gradients = _loss_and_grads(self.spec, self.params, batch, labels)
        names = None if self._source is None else self._source.files
        return float(loss), published_names(self.spec, gradients, self.config, names)

    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        eos_ids: Sequence[int] | None = None,
        use_cache: bool = True,
        return_logits: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Continue token rows.

        Args:
          input_ids: int [B, T]; attention_mask: 0 = padding. Rows padded on the right are moved to the right first.
          temperature: 0 takes the most likely token.
          eos_ids: stop ids; None = those of the checkpoint's generation_config, () never stops.
          use_cache: False recomputes the whole row for each token.
          return_logits: also return the float32 logits [B, new, V] that each token was chosen from.

        Returns:
          int32 [B, new], new = max_new_tokens unless all rows stopped earlier; rows that stop early are filled with
          the pad id.
        """
        generator = self._generator(
            input_ids,
            attention_mask,
            max_new_tokens,
            Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty),
            seed=seed,
            eos_ids=eos_ids,
            use_cache=use_cache,
            return_logits=return_logits,
        )
        new_tokens = generator.decode(max_new_tokens)
        return (new_tokens, generator.step_logits()) if return_logits else new_tokens

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        eos_ids: Sequence[int] | None = None,
    ) -> Iterator[str]:
        """Continue a text, yielding pieces as they come; an empty prompt starts a document.

        Raises:
          InputError: prompt and new tokens together are more than the model's positions.
        """
        tokenizer = self._need_tokenizer()
        ids = tokenizer.encode(prompt)
        if tokenizer.bos_id is not None or not ids:
            ids = [self._start_id(), *ids]
        most = self.spec.max_position_embeddings
        if len(ids) + max_new_tokens > most:
            raise InputError(
                f"the prompt has {len(ids)} tokens and {max_new_tokens} more are asked for, but the model has "
                f"{most} positions"
            )
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
        generator = self._generator(
            np.array([ids]), None, max_new_tokens, sampling, seed=seed, eos_ids=eos_ids, num_ids=tokenizer.vocab_size
        )
        stops = set(self._stop_ids(eos_ids))
        decoder = StreamDecoder(tokenizer)
        while not generator.done:
            token = int(generator.decode(1)[0, 0])
            if token not in stops:
                yield decoder.push(token)
        yield decoder.finish()

    def score(self, texts: Sequence[str], *, batch_size: int = 8) -> list[Score]:
        """Return the log-probability of each text, all of its tokens predicted from a document's start."""
        if isinstance(texts, str):
            raise InputError("score takes a sequence of texts, found one text; pass [text]")
        tokenizer = self._need_tokenizer()
        rows = [[self._start_id(), *tokenizer.encode(text)] for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores: dict[int, Score] = {}
        for first in range(0, len(rows), batch_size):
            members = order[first : first + batch_size]
            width = bucket(max(len(rows[i]) for i in members))
            ids = np.zeros((batch_size, width), np.int32)
            valid = np.zeros((batch_size, width), np.int32)
            for place, i in enumerate(members):
                ids[place, : len(rows[i])] = rows[i]
                valid[place, : len(rows[i])] = 1
            # The rows' own lengths, not the bucket's, are what length-dependent positions must see.
            batch = self._batch(ids, valid).replace(rope_length=jnp.asarray(valid.sum(axis=1), jnp.int32))
            sums = _score_rows(self.spec, self.params, batch)
            for place, i in enumerate(members):
                scores[i] = Score(sum_logprob=float(sums[place]), num_tokens=len(rows[i]) - 1)
        return [scores[i] for i in range(len(rows))]

    def save_pretrained(self, path: str | Path, dtype: str | None = None) -> None:
        """Write a published-style folder, all or nothing.

        Loaded checkpoints get every tensor back bitwise with its name, shape, dtype and file, and config.json equal
        as JSON, unless `dtype` asks for another one.

        Raises:
          InputError: the folder is not empty, cannot be written, or no published layout can express the spec.
        """
        save_checkpoint(
            Path(path),
            self.spec,
            self.params,
            config=self.config,
            source=self._source,
            dtype=None if dtype is None else parse_dtype(dtype),
            tokenizer=self.tokenizer if self._source is None else None,
        )

    def _batch(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None,
        positions: np.ndarray | None = None,
        block_positions: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> Batch:
        ids = checked_ids(self.spec, input_ids)
        valid = checked_attention_mask(attention_mask, ids.shape)
        layout = RowLayout(positions, block_positions, None)
        needs_blocks = self.spec.uses_block_positions and block_positions is None
        if positions is None or needs_blocks or (mask is None and self.spec.mask == "prefix"):
            derived = layout_of(self.spec, ids, valid, self._prefix_ids)
            layout = RowLayout(
                *(theirs if ours is None else ours for ours, theirs in zip(layout, derived, strict=True))
            )
        for name, places in zip(layout._fields, layout, strict=True):
            if places is not None:
                require_shape(name, places, ids.shape)
        if mask is not None:
            require_shape("mask", mask, (*ids.shape, ids.shape[1]))
        layout = RowLayout(*(None if part is None else np.asarray(part) for part in layout))
        check_positions(self.spec, layout)
        lengths = valid.sum(axis=1) if self.spec.rope_length_by_row else np.full(len(ids), ids.shape[1])
        return Batch(
            tokens=jnp.asarray(ids),
            positions=jnp.asarray(layout.positions, jnp.int32),
            segment_ids=jnp.asarray(valid),
            mask=None if mask is None else jnp.asarray(mask, bool),
            rope_length=jnp.asarray(lengths, jnp.int32),
            block_positions=None if layout.block_positions is None else jnp.asarray(layout.block_positions, jnp.int32),
            prefix_mask=None if layout.prefix_mask is None else jnp.asarray(layout.prefix_mask, bool),
        )

    def _checked_labels(self, labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        labels = np.asarray(labels)
        require_shape("labels", labels, shape)
        wrong = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= self.spec.vocab_size))]
        if wrong.size:
            raise InputError(f"labels hold {wrong[0]}; expected {IGNORED_LABEL} or 0 to {self.spec.vocab_size - 1}")
        return labels

    def _generator(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None,
        max_new_tokens: int,
        sampling: Sampling,
        *,
        seed: int = 0,
        eos_ids: Sequence[int] | None = None,
        num_ids: int | None = None,
        use_cache: bool = True,
        return_logits: bool = False,
    ) -> Generator:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        ids = checked_ids(self.spec, input_ids)
        valid = checked_attention_mask(attention_mask, ids.shape)
        if not valid.any(axis=1).all():
            raise InputError(f"attention_mask: row {int(np.argmin(valid.any(axis=1)))} has no token to continue")
        stops = tuple(self._stop_ids(eos_ids))
        return Generator(
            self.spec,
            self.params,
            *pad_left(ids, valid),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            eos_ids=stops,
            pad_id=self._pad_id(stops),
            num_ids=num_ids,
            prefix_ids=self._prefix_ids,
            use_cache=use_cache,
            return_logits=return_logits,
        )

    def _stop_ids(self, eos_ids: Sequence[int] | None) -> list[int]:
        if eos_ids is not None:
            return [int(token) for token in eos_ids]
        published = self.generation_config.get("eos_token_id", (self.config or {}).get("eos_token_id"))
        if published is None:
            own = None if self.tokenizer is None else self.tokenizer.eos_id
            return [] if own is None else [own]
        return list(published) if isinstance(published, list) else [published]

    def _pad_id(self, stops: Sequence[int]) -> int:
        published = self.generation_config.get("pad_token_id", (self.config or {}).get("pad_token_id"))
        own = None if self.tokenizer is None else self.tokenizer.pad_id
        for candidate in (published, own, *stops):
            if candidate is not None and candidate >= 0:  # the first LLaMA conversions say -1
                return candidate
        return 0

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("this model was loaded without a tokenizer; put its files into the model folder")
        return self.tokenizer

    def _start_id(self) -> int:
        tokenizer = self._need_tokenizer()
        start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if start is None:
            raise InputError("the tokenizer has neither a beginning- nor an end-of-text token to start a document with")
        return start


def parse_dtype(name: str) -> jnp.dtype:
    """Return the dtype of a name.

    Raises:
      InputError: not one of float32, bfloat16, float16.
    """
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype {name!r}: expected float32, bfloat16 or float16")
    return jnp.dtype(name)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _forward(spec: ModelSpec, params: Params, batch: Batch, train: bool, return_hidden: bool) -> ModelOutput:
    return apply(spec, params, batch, train=train, return_hidden=return_hidden)


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_grads(spec: ModelSpec, params: Params, batch: Batch, labels: jax.Array) -> tuple[jax.Array, Params]:
    def mean_loss(params: Params) -> tuple[jax.Array, jax.Array]:
        output = apply(spec, params, batch, train=True)
        logits = output.logits[:, : labels.shape[1]]
        weights = (labels != IGNORED_LABEL).astype(logits.dtype)
        loss = jnp.sum(cross_entropy(logits, labels, weights)) / jnp.sum(weights)
        if spec.head.max_z_loss:
            # As published, over all places, trained or not.
            loss += spec.head.max_z_loss * jnp.mean(max_z_loss(logits))
        balance = 0.0 if spec.moe is None else balance_losses(spec.moe, output.aux.statistics)
        return loss + balance, loss

    gradients, loss = jax.grad(mean_loss, has_aux=True)(params)
    return loss, gradients


@functools.partial(jax.jit, static_argnums=0)
def _score_rows(spec: ModelSpec, params: Params, batch: Batch) -> jax.Array:
    hidden = apply(spec, params, batch, return_logits=False).hidden[:, :-1]
    weights = (batch.segment_ids[:, 1:] != 0).astype(jnp.float32)
    kernel = head_kernel(spec, params)
    return -jnp.sum(chunked_cross_entropy(hidden, kernel, batch.tokens[:, 1:], weights, chunk=_SCORE_CHUNK), axis=1)
