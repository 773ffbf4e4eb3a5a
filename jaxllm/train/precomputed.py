"""Log-probabilities of answers under a reference, computed once before training and kept beside the data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.example_set import ExampleSet
from jaxllm.data.loader import heldout_batches
from jaxllm.errors import InputError
from jaxllm.files import atomic_file
from jaxllm.nn.param import abstract_values
from jaxllm.sharding.processes import gather, is_main
from jaxllm.sharding.rules import replicated
from jaxllm.spec import spec_to_json
from jaxllm.train.objectives.pairs import answer_sums
from jaxllm.train.objectives.reference import Reference
from jaxllm.train.pace import Pace
from jaxllm.train.setup import Opened, ReferenceLogps, Setup
from jaxllm.train.signals import Votes
from jaxllm.train.weights import RunWeights
from jaxllm.types import Params, PreferenceBatch


def needs_reference(setup: Setup) -> bool:
    """Tell whether a run wants its reference computed before training."""
    return setup.config.stage == "dpo" and setup.config.dpo.reference == "precomputed"


def with_logps(setup: Setup, logps: np.ndarray) -> Setup:
    """Return a setup whose rows carry the log-probabilities of their pairs."""
    return dataclasses.replace(setup, packing=dataclasses.replace(setup.packing, ref_logps=logps))


def compute_reference(
    setup: Setup, opened: Opened, weights: RunWeights, cache: Path, votes: Votes, note: Callable[[str], None]
) -> ReferenceLogps | None:
    """Return the reference's log-probabilities of all pairs, those that `cache` has yet to get computed on the mesh.

    All processes of a run call this at the same point. What was computed is kept every half minute, so that a run that
    is stopped or killed goes on from there.

    Returns:
      None where a signal came.

    Raises:
      InputError: there are no weights for a reference, or they are another model's.
    """
    path = setup.config.dpo.reference_weights or weights.start
    if path is None:
        raise InputError("model.weights: found none, but dpo.reference 'precomputed' needs a model to start from")
    identity = [weights.find(path).identity(), spec_to_json(setup.spec), setup.config.model.compute_dtype]
    tables = [_Table.open(cache, identity, sets) for sets in (opened.training, opened.heldout)]
    if not all(table.is_complete for table in tables):
        run = _Forward(setup, weights)
        for table in tables:
            if not _fill(setup, run, table, votes, note):
                return None
    return ReferenceLogps(*(table.logps for table in tables))


@dataclasses.dataclass
class _Table:
    """The log-probabilities of the pairs of some sources, NaN where they are not known yet."""

    file: Path
    sets: Sequence[ExampleSet]
    logps: np.ndarray

    @classmethod
    def open(cls, cache: Path, identity: list[Any], sets: Sequence[ExampleSet]) -> _Table:
        """Read what the cache has of them, as far as all processes see it."""
        data = [(examples.folder.name, examples.size()) for examples in sets]
        key = hashlib.sha256(json.dumps([identity, data]).encode()).hexdigest()[:32]
        file, shape = cache / f"reference-{key}.npy", (sum(map(len, sets)), 2)
        logps = np.full(shape, np.nan, np.float32)
        if file.is_file():
            kept = _read(file)
            if kept.shape != shape or kept.dtype != np.float32:
                raise InputError(f"{file}: found {kept.dtype} {kept.shape}, expected float32 {shape}; delete the file")
            logps = kept
        table = cls(file, sets, logps)
        if len(set(gather(int(np.isfinite(logps).sum())))) > 1:
            logps[:] = np.nan
        return table

    @property
    def is_complete(self) -> bool:
        """Whether all pairs are known."""
        return bool(np.isfinite(self.logps).all())

    @property
    def num_known(self) -> int:
        """How many pairs are known."""
        return int(np.isfinite(self.logps).all(axis=1).sum())

    def save(self) -> None:
        """Write the table in place of the one before, in one step."""
        if not is_main():
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.file, "wb") as file:
            np.save(file, self.logps)


class _Forward:
    """The reference on the mesh."""

    def __init__(self, setup: Setup, weights: RunWeights):
        config, tuning = setup.config, setup.objective.forward.tuning
        reference = Reference.create(setup.objective.forward, config.adapter, config.dpo.reference_weights)
        own = reference.place(weights)
        frozen, trained = None, None
        if own is None:
            frozen = jax.jit(tuning.split)(weights.model())[1]
            trained = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
                abstract_values(tuning.trained(), setup.mesh),
            )

        def logps(trained: Params, frozen: Params, own: Params, batch: PreferenceBatch) -> jax.Array:
            return answer_sums(reference.token_logps(trained, frozen, own, batch.rows), batch)

        self._weights = (trained, frozen, own)
        self._logps = jax.jit(logps, out_shardings=replicated(setup.mesh))

    def __call__(self, batch: PreferenceBatch) -> np.ndarray:
        """Return the log-probabilities of a batch's answers, float32 [B, K, 2], in every process."""
        return np.asarray(self._logps(*self._weights, batch))


def _fill(setup: Setup, run: _Forward, table: _Table, votes: Votes, note: Callable[[str], None]) -> bool:
    """Compute what a table lacks; return whether nothing is left to do."""
    if table.is_complete:
        return True
    batches = heldout_batches(
        table.sets,
        seq_len=setup.config.data.seq_len,
        packing=setup.packing,
        batch_size=setup.eval_batch_size,
    )
    pace = Pace()
    for rows in batches:
        is_pair = rows["pair_weights"] != 0
        numbers = np.take_along_axis(rows["document_ids"], rows["ends"][..., 0], axis=1)[is_pair]
        if np.isfinite(table.logps[numbers]).all():
            continue
        table.logps[numbers] = run(setup.feed.whole_to_devices(rows))[is_pair]
        if votes.ask():
            table.save()
            return False
        if is_main() and pace.is_due():
            table.save()
            note(f"reference: {table.num_known:,} of {len(table.logps):,} pairs")
    if not table.is_complete:
        number = int(np.argmin(np.isfinite(table.logps).all(axis=1)))
        raise InputError(f"dpo.reference: its log-probability of pair {number} is not finite; are its weights whole?")
    table.save()
    note(f"reference: {len(table.logps):,} pairs")
    return True


def _read(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); delete the file, and it is made again") from error
