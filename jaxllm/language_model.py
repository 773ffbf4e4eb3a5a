"""LanguageModel: a model with its tokenizer, as evaluation users hold it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm.checkpoint.hf import Source, load_checkpoint, published_names, read_json, save_checkpoint
from jaxllm.checkpoint.reader import open_checkpoint
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.generate.engine import Generator, bucket
from jaxllm.generate.sampling import Sampling
from jaxllm.losses.lm import chunked_cross_entropy, cross_entropy
from jaxllm.nn.decoder import head_kernel
from jaxllm.nn.model import abstract_params, apply
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import ChunkedNTK, ModelSpec, spec_from_json
from jaxllm.tokenizers import StreamDecoder, Tokenizer, find_tokenizer
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
        source: Source | None = None,
    ):
        self.spec = spec
        self.params = params
        self.tokenizer = tokenizer
        self.config = config
        self.generation_config = generation_config or {}
        self._source = source

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        positions: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        train: bool = False,
        return_hidden: bool = False,
    ) -> ModelOutput:
        """Run the model on token ids.

        Args:
          input_ids: int [B, T]. attention_mask: 0 = padding, on either side.
          positions: int [B, T]; default: 0 .. T-1, padding counted, as the reference implementations of these
            families do (rotary positions are relative).
          mask: bool [B, T, T], True = may attend, in place of the causal rule; padding stays out of sight.
          train: position rules that are off in training are off.
          return_hidden: `hidden` becomes [L+2, B, T, D]: embedding, each block's output, final norm.

        Returns:
          ModelOutput with float32 logits [B, T, V]; logits at padding mean nothing.

        Raises:
          InputError: token ids outside the vocabulary, or shapes that disagree.
        """
        batch = self._batch(input_ids, attention_mask, positions, mask)
        return _forward(self.spec, self.params, batch, train, return_hidden)

    def logits(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        positions: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Return float32 logits [B, T, V]; arguments as in `forward`."""
        return self.forward(input_ids, attention_mask, positions=positions, mask=mask, train=train).logits

    def loss_and_grads(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, labels: np.ndarray | None = None
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Return the mean next-token cross-entropy in training mode and its gradients by published tensor name.

        Args:
          labels: int [B, T] as input_ids, -100 where nothing is trained; default: every valid token. Padding is never
            trained, nor is a row's first valid token, which nothing predicts.

        Raises:
          InputError: as in `forward`; labels outside the vocabulary; nothing to train on.
        """
        batch = self._batch(input_ids, attention_mask, None, None)
        valid = np.asarray(batch.segment_ids) != 0
        labels = np.asarray(batch.tokens) if labels is None else self._checked_labels(labels, valid.shape)
        labels = np.where(valid[:, 1:] & valid[:, :-1], labels[:, 1:], IGNORED_LABEL)
        if not (labels != IGNORED_LABEL).any():
            raise InputError("loss_and_grads: no token is left to train on: every label is -100 or padding")
        loss, gradients = _loss_and_grads(self.spec, self.params, batch, labels)
        return float(loss), published_names(self.spec, gradients, self.config)

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
            batch = self._batch(ids, valid, None, None).replace(rope_length=jnp.asarray(valid.sum(axis=1), jnp.int32))
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
        positions: np.ndarray | None,
        mask: np.ndarray | None,
    ) -> Batch:
        ids = self._checked_ids(input_ids)
        batch_size, length = ids.shape
        valid = _checked_attention_mask(attention_mask, ids.shape)
        if positions is None:
            positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
        _require_shape("positions", positions, ids.shape)
        if mask is not None:
            _require_shape("mask", mask, (batch_size, length, length))
        by_row = isinstance(self.spec.position.scaling, ChunkedNTK)
        lengths = valid.sum(axis=1) if by_row else np.full(batch_size, length)
        return Batch(
            tokens=jnp.asarray(ids),
            positions=jnp.asarray(positions, jnp.int32),
            segment_ids=jnp.asarray(valid),
            mask=None if mask is None else jnp.asarray(mask, bool),
            rope_length=jnp.asarray(lengths, jnp.int32),
        )

    def _checked_ids(self, input_ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"input_ids must be integers [B, T], found {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.spec.vocab_size:
            raise InputError(
                f"input_ids reach from {ids.min()} to {ids.max()}; the vocabulary has {self.spec.vocab_size}"
            )
        return ids.astype(np.int32)

    def _checked_labels(self, labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        labels = np.asarray(labels)
        _require_shape("labels", labels, shape)
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
        ids = self._checked_ids(input_ids)
        valid = _checked_attention_mask(attention_mask, ids.shape)
        if not valid.any(axis=1).all():
            raise InputError(f"attention_mask: row {int(np.argmin(valid.any(axis=1)))} has no token to continue")
        stops = tuple(self._stop_ids(eos_ids))
        return Generator(
            self.spec,
            self.params,
            *_pad_left(ids, valid),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            eos_ids=stops,
            pad_id=self._pad_id(stops),
            num_ids=num_ids,
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


def load_pretrained(path: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None) -> LanguageModel:
    """Load a published checkpoint folder (config.json and safetensors).

    Args:
      dtype: "float32", "bfloat16" or "float16"; parameters and activations have it.
      mesh: a mesh from `jaxllm.sharding.mesh.make_mesh` to load straight onto.

    Raises:
      InputError: unknown config keys or tensors, missing or mis-shaped tensors, unreadable files.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    spec, params, config, source = load_checkpoint(folder, dtype=parse_dtype(dtype), mesh=mesh)
    generation = folder / "generation_config.json"
    return LanguageModel(
        spec,
        params,
        tokenizer=find_tokenizer(folder, published=family_of_config(config).tokenizer),
        config=config,
        generation_config=read_json(generation) if generation.is_file() else None,
        source=source,
    )


def load(
    path: str | Path, *, step: int | None = None, dtype: str = "float32", mesh: Mesh | None = None
) -> LanguageModel:
    """Load a run folder, one of its checkpoints, or a published checkpoint folder.

    Args:
      step: of a run, the checkpoint to load; default: the newest.

    Raises:
      InputError: nothing usable lies at `path`, or it is damaged.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        if step is not None:
            raise InputError(f"{folder}: a published checkpoint has no steps to choose from, found step {step}")
        return load_pretrained(folder, dtype=dtype, mesh=mesh)
    reader, only_step = open_checkpoint(folder)
    step = only_step if step is None else step
    spec = spec_from_json(reader.read_meta(step)["spec"], str(reader.folder))
    devices = mesh if mesh is not None else make_mesh(devices=jax.devices()[:1])
    params = reader.restore_params(abstract_params(spec, devices, parse_dtype(dtype)), step)
    return LanguageModel(spec, params, tokenizer=find_tokenizer(reader.folder.parent / "tokenizer"))


def parse_dtype(name: str) -> jnp.dtype:
    """Return the dtype of a name.

    Raises:
      InputError: not one of float32, bfloat16, float16.
    """
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype {name!r}: expected float32, bfloat16 or float16")
    return jnp.dtype(name)


def _require_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if np.shape(array) != shape:
        raise InputError(f"{name} must have shape {shape}, found {np.shape(array)}")


def _checked_attention_mask(attention_mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    if attention_mask is None:
        return np.ones(shape, np.int32)
    valid = np.asarray(attention_mask)
    _require_shape("attention_mask", valid, shape)
    if not np.isin(valid, (0, 1)).all():
        raise InputError(f"attention_mask must hold 1, and 0 for padding, found {valid[~np.isin(valid, (0, 1))][0]}")
    return valid.astype(np.int32)


def _pad_left(ids: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move the padding on the right of each row to its left: new tokens follow the last valid one."""
    shifts = [int(np.argmax(row[::-1] != 0)) for row in valid]
    shifted = [(np.roll(row, shift), np.roll(mask, shift)) for row, mask, shift in zip(ids, valid, shifts, strict=True)]
    return np.stack([row for row, _ in shifted]), np.stack([mask for _, mask in shifted])


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _forward(spec: ModelSpec, params: Params, batch: Batch, train: bool, return_hidden: bool) -> ModelOutput:
    return apply(spec, params, batch, train=train, return_hidden=return_hidden)


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_grads(spec: ModelSpec, params: Params, batch: Batch, labels: jax.Array) -> tuple[jax.Array, Params]:
    def mean_loss(params: Params) -> jax.Array:
        logits = apply(spec, params, batch, train=True).logits[:, :-1]
        weights = (labels != IGNORED_LABEL).astype(logits.dtype)
        return jnp.sum(cross_entropy(logits, labels, weights)) / jnp.sum(weights)

    return jax.value_and_grad(mean_loss)(params)


@functools.partial(jax.jit, static_argnums=0)
def _score_rows(spec: ModelSpec, params: Params, batch: Batch) -> jax.Array:
    hidden = apply(spec, params, batch, return_logits=False).hidden[:, :-1]
    weights = (batch.segment_ids[:, 1:] != 0).astype(jnp.float32)
    kernel = head_kernel(spec, params)
    return -jnp.sum(chunked_cross_entropy(hidden, kernel, batch.tokens[:, 1:], weights, chunk=_SCORE_CHUNK), axis=1)
