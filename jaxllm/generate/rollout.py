"""Answers sampled with a training run's own parameters, as they lie on its mesh.

Every process brings the prompts whose answers its devices will hold, and gets those answers back. A row's random
numbers depend on its key and the number of the token alone, so an answer depends neither on the mesh nor on the rows
beside it. Rules that hold in training hold here, so that the log-probabilities of a sampled answer are those that the
training forward pass gives it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm.data.prefix_layout import PrefixIds
from jaxllm.data.token_rows import RowLayout, check_positions, layout_of
from jaxllm.errors import InputError
from jaxllm.generate.decoding import GenerationState, Program, Prompts, Weights, decode, make_rules, prefill
from jaxllm.generate.gathered import gather_weights
from jaxllm.generate.rounds import Round, plan_round
from jaxllm.generate.samples import Samples, compact, joined
from jaxllm.generate.sampling import Sampling, split_sampling
from jaxllm.nn.adapter import Adapter
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.sharding.processes import gather
from jaxllm.sharding.rules import batch_ways, row_sharding
from jaxllm.spec import ChunkedNTK, ModelSpec, Rope
from jaxllm.types import Params

_TOKENS_BETWEEN_POLLS = 16


class Sampler:
    """Samples answers in rounds; rounds of like shape run the same compiled programs."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        mesh: Mesh,
        eos_ids: Sequence[int],
        seq_len: int,
        max_new_tokens: int,
        pad_id: int = 0,
        num_ids: int | None = None,
        prefix_ids: PrefixIds | None = None,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        compute_dtype: jnp.dtype | None = None,
        attention_impl: AttentionImpl | None = None,
        batch_size: int | None = None,
        gathers: bool = True,
    ):
        """Check the options.

        Args:
          eos_ids: ids that end an answer; of a prefix model those that end what fills the mask.
          seq_len: slots of a row; prompts may have what max_new_tokens leaves of it.
          num_ids: ids from here on are never generated; None: all of the vocabulary may be.
          prefix_ids: special ids of a model whose prefix all tokens see.
          temperature, top_p, top_k: as in `sampling.Sampling`.
          compute_dtype: dtype of activations and cache; None: the parameters' own.
          batch_size: most answers of all processes sampled at once; None: all of a round.
          gathers: weights are put together once a round, see `generate.gathered`; False: anew for every token.

        Raises:
          InputError: rows longer than the model's positions, no room for prompts, or a batch_size that the mesh does
            not divide.
        """
        if not 0 < max_new_tokens < seq_len:
            raise InputError(
                f"rollout.max_new_tokens: found {max_new_tokens}; expected 1 to {seq_len - 1}: a row of data.seq_len "
                f"{seq_len} tokens holds prompt and answer"
            )
        check_positions(spec, RowLayout(np.arange(seq_len)[None], None, None))
        self._mesh, self._gathers = mesh, gathers
        self._ways = batch_ways(mesh)
        if batch_size is not None and batch_size % self._ways:
            raise InputError(
                f"rollout.batch_size: {batch_size} answers cannot be split over {self._ways} ways of data parallelism"
            )
        self._rows = row_sharding(mesh)
        self._local_ways = len(_starts(self._rows.addressable_devices_indices_map((self._ways,)).values()))
        self._spec = training_spec(spec)
        self._prefix_ids = prefix_ids
        self._seq_len, self._max_new_tokens, self._batch_size = seq_len, max_new_tokens, batch_size
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
        kind, values = split_sampling(sampling, num_ids or spec.vocab_size)
        self._rules = make_rules(values, tuple(eos_ids), pad_id)
        self._program = Program(spec=self._spec, kind=kind, attention_impl=attention_impl, compute_dtype=compute_dtype)

    def sample(
        self,
        params: Params,
        adapter: Adapter | None,
        prompts: Sequence[Sequence[int]],
        keys: np.ndarray,
        *,
        greedy: bool = False,
        stop: Callable[[], bool] | None = None,
    ) -> Samples | None:
        """Answer prompts; with several processes all of them call this, and each gets the answers to its own.

        Args:
          params, adapter: of the whole model, as `train.tuning.Tuning` joins them; arrays on the mesh.
          prompts: ids of this process's prompts, of which it may have fewer than another.
          keys: uint32 [n, 2], one for each answer, n a multiple of the prompts: successive ones are answers to the
            same prompt, which is then read once.
          greedy: take the most likely token; keys are not used.
          stop: asked now and then, at the same points in all processes, which it must answer alike.

        Returns:
          the answers, or None if `stop` said so.

        Raises:
          InputError: a prompt that is empty, or longer than what max_new_tokens leaves of a row.
        """
        self._check(prompts, keys)
        plan = self._plan(prompts, len(keys))
        program = self._program
        if greedy:
            program = dataclasses.replace(program, kind=dataclasses.replace(program.kind, greedy=True))
        read = [prompt for prompt in prompts for _ in range(plan.repeats)]
        parts, weights = [], self._weights(params, adapter)
        for number in range(plan.num_passes):
            these = slice(number * plan.prompts, (number + 1) * plan.prompts)
            rows = slice(these.start * plan.samples, these.stop * plan.samples)
            with jax.set_mesh(self._mesh):
                part = self._pass(weights, read[these], keys[rows], plan, program, stop)
            if part is None:
                return None
            parts.append(part)
        return joined(parts)

    def _weights(self, params: Params, adapter: Adapter | None) -> Weights:
        weights = Weights(params, adapter)
        if not self._gathers:
            return weights
        with jax.set_mesh(self._mesh):
            return gather_weights(self._spec, weights, self._program.compute_dtype)

    def _check(self, prompts: Sequence[Sequence[int]], keys: np.ndarray) -> None:
        most = self._seq_len - self._max_new_tokens
        for number, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= most:
                raise InputError(
                    f"prompt {number} has {len(prompt)} tokens; expected 1 to {most}, as an answer of "
                    f"{self._max_new_tokens} must fit with it into data.seq_len {self._seq_len}"
                )
        if not prompts or not len(keys) or len(keys) % len(prompts):
            raise InputError(f"found {len(keys)} keys for {len(prompts)} prompts; expected the same number for each")

    def _plan(self, prompts: Sequence[Sequence[int]], num_answers: int) -> Round:
        """Choose the shapes of a round, alike in all processes."""
        samples = num_answers // len(prompts)
        told = gather([len(prompts), max(map(len, prompts)), samples])
        if any(theirs[2] != samples for theirs in told):
            raise InputError(f"processes sample different numbers of answers to a prompt: {[t[2] for t in told]}")
        num_prompts, longest = max(theirs[0] for theirs in told), max(theirs[1] for theirs in told)
        return self._round(num_prompts, samples, longest, self._local_ways)

    def _round(self, num_prompts: int, samples: int, longest: int, ways: int) -> Round:
        most = None if self._batch_size is None else self._batch_size // self._ways
        room = self._seq_len - self._max_new_tokens
        return plan_round(num_prompts, samples, longest, ways=ways, most=most, room=room)

    def _pass(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[int]],
        keys: np.ndarray,
        plan: Round,
        program: Program,
        stop: Callable[[], bool] | None,
    ) -> Samples | None:
        """Sample some answers at once; None if it was stopped."""
        given = self._prompts(prompts, keys, plan)
        end = length = plan.slots
        state = prefill(weights, given, self._rules, program=program, **self._shapes(plan))
        # All rows have stopped where fewer tokens come than were asked for.
        while length == end < plan.slots + self._max_new_tokens:
            if stop is not None and stop():
                return None
            end = min(end + _TOKENS_BETWEEN_POLLS, plan.slots + self._max_new_tokens)
            state = decode(weights, state, self._rules, np.int32(end), program=program)
            length = int(state.length)
        return self._collect(state, prompts, plan)

    def _shapes(self, plan: Round) -> dict[str, int]:
        return dict(prompt_slots=plan.slots, samples=plan.samples, logp_slots=self._max_new_tokens)

    def trace_prefill(self, weights: Weights, num_prompts: int, samples: int) -> tuple[Round, jax.stages.Traced]:
        """Trace the reading of the longest prompts of a round, for devices that need not be there; see `sample`.

        Args:
          weights: shapes, dtypes and shardings of what is sampled with.
          num_prompts: of all processes. samples: answers to each.
        """
        room = self._seq_len - self._max_new_tokens
        plan = self._round(num_prompts, samples, room, self._ways)
        rows = plan.prompts * plan.samples

        def array(dtype: jnp.dtype, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._rows)

        slots = (plan.prompts, plan.slots + self._max_new_tokens)
        ids, flags = array(jnp.int32, slots), array(jnp.bool_, slots)
        blocks, prefix = self._spec.uses_block_positions, self._spec.mask == "prefix"
        prompts = Prompts(
            tokens=ids,
            segment_ids=ids,
            layout=RowLayout(ids, ids if blocks else None, flags if prefix else None),
            length=np.int32(plan.slots),
            keys=array(jnp.uint32, (rows, 2)),
            finished=array(jnp.bool_, (rows,)),
            rope_length=np.int32(self._seq_len),
        )
        return plan, prefill.trace(weights, prompts, self._rules, program=self._program, **self._shapes(plan))

    def trace_decode(self, weights: Weights, state: GenerationState) -> jax.stages.Traced:
        """Trace the generation from a state of shapes, as `trace_prefill` gives it."""
        return decode.trace(weights, state, self._rules, np.int32(self._seq_len), program=self._program)

    def _prompts(self, prompts: Sequence[Sequence[int]], keys: np.ndarray, plan: Round) -> Prompts:
        """Put this process's prompts, padded on the left, with those of the others on the mesh."""
        valid = np.zeros((len(prompts), plan.slots), np.int32)
        tokens = np.zeros((len(prompts), plan.slots), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, -len(prompt) :], valid[row, -len(prompt) :] = prompt, 1
        num_slots = plan.slots + self._max_new_tokens
        layout = self._layout(tokens, valid, num_slots)

        def place(rows: np.ndarray, count: int = plan.prompts) -> jax.Array:
            # What is missing in the last pass is rows of padding.
            full = np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))
            shape = (count * self._ways // self._local_ways, *rows.shape[1:])
            return jax.make_array_from_process_local_data(self._rows, full, shape)

        new = ((0, 0), (0, self._max_new_tokens))
        num_rows = plan.prompts * plan.samples
        return Prompts(
            tokens=place(np.pad(tokens, new)),
            segment_ids=place(np.pad(valid, new)),
            layout=RowLayout(*(None if part is None else place(part) for part in layout)),
            length=np.int32(plan.slots),
            keys=place(np.asarray(keys, np.uint32), num_rows),
            finished=place(np.arange(num_rows) >= len(keys), num_rows),
            rope_length=np.int32(self._seq_len),
        )

    def _layout(self, tokens: np.ndarray, valid: np.ndarray, num_slots: int) -> RowLayout:
        """Return where the slots stand: as in rows of training, which begin without padding."""
        if self._spec.mask == "prefix":
            return layout_of(self._spec, tokens, valid, self._prefix_ids, num_slots)
        padding = tokens.shape[1] - valid.sum(axis=1)
        return RowLayout(np.maximum(np.arange(num_slots) - padding[:, None], 0).astype(np.int32), None, None)

    def _collect(self, state: GenerationState, prompts: Sequence[Sequence[int]], plan: Round) -> Samples:
        """Return this process's answers."""
        lengths = np.repeat(np.array([len(prompt) for prompt in prompts], np.int32), plan.samples)
        tokens, logps = (_local_rows(array)[: len(lengths)] for array in (state.tokens, state.logps))
        generated = slice(plan.slots, int(state.length))
        return compact(tokens, logps, generated, lengths, eos_ids=self._rules.eos, seq_len=self._seq_len)


def training_spec(spec: ModelSpec) -> ModelSpec:
    """Return the spec that computes in evaluation what this one computes in training, with the same parameters.

    Qwen's scaling and LogN are off. No expert drops a token: which ones it would drop depends on the batch.
    """
    changes = {"logn": None}
    if isinstance(spec.position, Rope) and isinstance(spec.position.scaling, ChunkedNTK):
        changes["position"] = dataclasses.replace(spec.position, scaling=None)
    if spec.moe is not None:
        changes["moe"] = dataclasses.replace(spec.moe, capacity_factor=None)
    return dataclasses.replace(spec, **changes)


def _starts(blocks: Sequence[tuple[slice, ...]]) -> set[int]:
    """Return the first rows of blocks of rows; devices of which several hold the same block count once."""
    return {block[0].start or 0 for block in blocks}


def _local_rows(array: jax.Array) -> np.ndarray:
    """Return the rows of a global array that lie on this process's devices, in order."""
    blocks = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(blocks[start]) for start in sorted(blocks)])
