"""LanguageModel: a model with its tokenizer, as evaluation users hold it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.checkpoint.export import require_no_adapter
from jaxllm.checkpoint.formats import parse_dtype
from jaxllm.checkpoint.hf import Source, has_vocabulary, published_names, save_checkpoint
from jaxllm.data.token_rows import batch_of, checked_attention_mask, checked_ids, find_prefix_ids, pad_left
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.generate.boundaries import given_stop_ids, pad_id, published_stop_ids, start_ids
from jaxllm.generate.chat import default_format, prompt_ids, sampling_of
from jaxllm.generate.decoding import Weights
from jaxllm.generate.engine import Generator
from jaxllm.generate.sampling import Sampling
from jaxllm.generate.scoring import Score, score_rows
from jaxllm.generate.text import stream_text
from jaxllm.nn.adapter import Adapter
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.nn.model import apply
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers import Tokenizer
from jaxllm.tokenizers.chat import CHAT_FORMATS, ChatFormat
from jaxllm.train.reference_loss import loss_and_gradients, placed_labels
from jaxllm.types import Batch, ModelOutput, Params


class LanguageModel:
    """A model's spec, parameters, tokenizer and raw checkpoint config, with the functions that need all of them.

    Attributes:
      spec, params: the architecture and its parameters; parameter dtype = compute dtype.
      tokenizer: or None if none was found.
      config: the raw config.json it was loaded with, or None.
      generation_config: the raw generation_config.json, {} if there was none.
      adapter: keys and values before each layer's own (P-tuning), which no weights can take in; or None.
      attention_impl: what computes attention, see `nn.model.apply`; it may be set.
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
        chat: str | None = None,
        adapter: Adapter | None = None,
        attention_impl: AttentionImpl | None = None,
    ):
        self.spec = spec
        self.params = params
        self.tokenizer = tokenizer
        self.config = config
        self.generation_config = generation_config or {}
        self.adapter = adapter
        self.attention_impl = attention_impl
        self._source = source
        self._chat = chat
        self._prefix_ids = find_prefix_ids(spec, special_ids, config or {}, tokenizer)

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
        places = dict(positions=positions, block_positions=block_positions, mask=mask)
        batch = batch_of(self.spec, input_ids, attention_mask, **places, prefix_ids=self._prefix_ids)
        output = _forward(
            self.spec, Weights(self.params, self.adapter), batch, train, return_hidden, self.attention_impl
        )
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
        places = dict(positions=positions, block_positions=block_positions, mask=mask)
        batch = batch_of(self.spec, input_ids, attention_mask, **places, prefix_ids=self._prefix_ids)
        aligned = self.config is not None and family_of_config(self.config).aligned_labels
        labels = placed_labels(labels, batch, self.spec.vocab_size, aligned=aligned)
        loss, gradients = loss_and_gradients(self.spec, self.params, batch, labels, self.attention_impl, self.adapter)
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
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
        tokenizer = self._need_tokenizer()
        ids = tokenizer.encode_prompt(prompt) or list(start_ids(tokenizer))
        return self._stream(ids, max_new_tokens, sampling, seed=seed, stop_ids=self._stop_ids(eos_ids))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_format: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Return the assistant's next message, {"role", "content"} and "tool_calls" where it calls a tool.

        Args:
          messages: as in OpenAI's API: roles system, user, assistant and tool.
          tools: definitions of tools that the model may call.
          chat_format: a name in `tokenizers.chat.CHAT_FORMATS`; default: that of the checkpoint's family.
          options: max_new_tokens, temperature (0 takes the most likely token), top_k, top_p, repetition_penalty, seed;
            default: the family's own.

        Raises:
          InputError: a conversation that the format cannot express, or one too long for the model.
        """
        fmt = self.chat_format(chat_format)
        pieces = self.stream_chat(messages, tools, chat_format=fmt.name, **options)
        return fmt.parse("".join(pieces), tools)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_format: str | None = None,
        seed: int = 0,
        max_new_tokens: int | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield the text of the assistant's next message as it comes; arguments as in `chat`.

        Where the family drops the oldest rounds of a long conversation, so does this, with a warning.
        """
        fmt, tokenizer = self.chat_format(chat_format), self._need_tokenizer()
        ids = prompt_ids(fmt, tokenizer, messages, tools)
        if max_new_tokens is None:
            # At least one, so that a conversation without room left is refused and not answered with nothing.
            room = self.spec.max_position_embeddings - len(ids)
            max_new_tokens = max(1, min(fmt.sampling.reply_limit(len(ids)), room))
        stop_ids = {*fmt.stop_ids(tokenizer), *self._stop_ids(None)}
        chosen = sampling_of(fmt, **sampling)
        return self._stream(ids, max_new_tokens, chosen, seed=seed, stop_ids=stop_ids, stop_strings=fmt.stop_strings)

    def chat_format(self, name: str | None = None) -> ChatFormat:
        """Return a chat format by name.

        By default that of the run it was trained in, of the checkpoint's family, or ChatML if the vocabulary has it.

        Raises:
          InputError: no such format, or no default.
        """
        name = name or self._chat or default_format(self.config, self._need_tokenizer())
        if name is None:
            raise InputError(f"this model has no chat format of its own; choose one of {', '.join(CHAT_FORMATS)}")
        if name not in CHAT_FORMATS:
            raise InputError(f"chat format {name!r}: expected one of {', '.join(CHAT_FORMATS)}")
        return CHAT_FORMATS[name]

    def _stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        seed: int,
        stop_ids: Collection[int],
        stop_strings: Sequence[str] = (),
    ) -> Iterator[str]:
        tokenizer = self._need_tokenizer()
        most = self.spec.max_position_embeddings
        if len(ids) + max_new_tokens > most:
            raise InputError(
                f"the prompt has {len(ids)} tokens and {max_new_tokens} more are asked for, but the model has "
                f"{most} positions"
            )
        generator = self._generator(
            np.array([ids]),
            None,
            max_new_tokens,
            sampling,
            seed=seed,
            eos_ids=sorted(stop_ids),
            num_ids=min(tokenizer.vocab_size, self.spec.vocab_size),
        )
        return stream_text(generator, tokenizer, prompt=ids, stop_ids=stop_ids, stop_strings=stop_strings)

    def score(self, texts: Sequence[str], *, batch_size: int = 8) -> list[Score]:
        """Return the log-probability of each text, all of its tokens predicted from a document's start."""
        if isinstance(texts, str):
            raise InputError("score takes a sequence of texts, found one text; pass [text]")
        tokenizer = self._need_tokenizer()
        start = start_ids(tokenizer)
        rows = [[*start, *tokenizer.encode(text)] for text in texts]
        return score_rows(
            self.spec,
            self.params,
            rows,
            num_start=len(start),
            batch_size=batch_size,
            prefix_ids=self._prefix_ids,
            adapter=self.adapter,
            attention_impl=self.attention_impl,
        )

    def save_pretrained(self, path: str | Path, dtype: str | None = None) -> None:
        """Write a published-style folder, all or nothing.

        Loaded checkpoints get every tensor back bitwise with its name, shape, dtype and file, and config.json equal
        as JSON, unless `dtype` asks for another one.

        Raises:
          InputError: the folder is not empty, cannot be written, or no published layout can express the model.
        """
        require_no_adapter(self.adapter)
        save_checkpoint(
            Path(path),
            self.spec,
            self.params,
            config=self.config,
            source=self._source,
            dtype=None if dtype is None else parse_dtype(dtype),
            tokenizer=None if self._source is not None and has_vocabulary(self._source.side_files) else self.tokenizer,
        )

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
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be an integer of at least 1, found {max_new_tokens!r}")
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise InputError(f"seed must be an integer from 0 to 2^63 - 1, found {seed!r}")
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
            pad_id=pad_id(self._published, self.tokenizer, stops),
            num_ids=num_ids,
            prefix_ids=self._prefix_ids,
            adapter=self.adapter,
            attention_impl=self.attention_impl,
            use_cache=use_cache,
            return_logits=return_logits,
        )

    @property
    def _published(self) -> dict[str, Any]:
        """What generation_config.json says, and config.json where it says nothing."""
        return (self.config or {}) | self.generation_config

    def _stop_ids(self, eos_ids: Sequence[int] | None) -> list[int]:
        return published_stop_ids(self._published, self.tokenizer) if eos_ids is None else given_stop_ids(eos_ids)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("this model was loaded without a tokenizer; put its files into the model folder")
        return self.tokenizer


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _forward(
    spec: ModelSpec, weights: Weights, batch: Batch, train: bool, return_hidden: bool, impl: AttentionImpl | None
) -> ModelOutput:
    params, adapter = weights
    options = dict(train=train, return_hidden=return_hidden, attention_impl=impl)
    return apply(spec, params, batch, adapter=adapter, **options)
