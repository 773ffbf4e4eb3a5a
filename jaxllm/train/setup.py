"""From a configuration to the things a run is made of; everything that can be refused early is refused here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from jaxllm.config import RunConfig, SourceConfig, validate
from jaxllm.data.blank_rows import BlankInfilling
from jaxllm.data.loader import RowRule, TrainLoader, boundary_ids, default_num_lanes, padding_row
from jaxllm.data.packing import Row
from jaxllm.data.shards import Progress, ShardSet, prepare_source
from jaxllm.errors import InputError
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers import Tokenizer, load_tokenizer
from jaxllm.train.computation import Computation, make_computation
from jaxllm.train.feed import Feed
from jaxllm.train.flops import model_flops_per_token, peak_flops
from jaxllm.train.progress import Speed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(Computation):
    """The parts of a run that follow from its configuration and the devices.

    Attributes:
      start_id, eos_id: what opens and closes a document.
      packing: how documents become rows.
    """

    tokenizer: Tokenizer
    start_id: int
    eos_id: int
    packing: RowRule
    feed: Feed

    @property
    def eval_batch_size(self) -> int:
        """Sequences in an evaluation batch."""
        return self.config.eval.batch_size or self.config.train.batch_size

    @property
    def empty_row(self) -> Row:
        """A row of padding with the fields that all rows have."""
        return padding_row(self.config.data.seq_len, self.packing)

    def speed(self) -> Speed:
        """Return the clock of this run."""
        config = self.config
        given = config.log.peak_tflops
        return Speed(
            total_tokens=self.batch_sizes.tokens_before(config.train.steps),
            flops_per_token=model_flops_per_token(self.spec, config.data.seq_len),
            num_devices=self.mesh.size,
            peak_flops=peak_flops(jax.devices()[0].device_kind) if given is None else given * 1e12,
        )


def make_setup(config: RunConfig) -> Setup:
    """Check a configuration against the devices and files it names, and build what it describes.

    Raises:
      InputError: options that contradict each other, unknown model, unreadable tokenizer, vocabulary larger than the
        model's, mesh that does not fit.
    """
    if problems := validate(config):
        raise InputError("\n".join(problems))
    computation = make_computation(config, make_mesh(**config.mesh.sizes()))
    spec = computation.spec
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > spec.vocab_size:
        raise InputError(
            f"tokenizer: {config.tokenizer} has {tokenizer.vocab_size} ids, but model {config.model.name} has "
            f"{spec.vocab_size} embeddings"
        )
    start_id, eos_id = boundary_ids(tokenizer)
    sizes = computation.batch_sizes.sizes()
    num_lanes = config.data.num_lanes or default_num_lanes(sizes)
    return Setup(
        **{field.name: getattr(computation, field.name) for field in dataclasses.fields(computation)},
        tokenizer=tokenizer,
        start_id=start_id,
        eos_id=eos_id,
        packing=_packing(config, spec, tokenizer, eos_id),
        feed=Feed.create(computation.mesh, num_lanes, sizes),
    )


def open_sources(
    setup: Setup,
    cache_dir: Path,
    *,
    note: Callable[[str], None],
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> tuple[list[ShardSet], list[ShardSet]]:
    """Open training and held-out sources as token shards, tokenising text once into `cache_dir`.

    Args:
      note: takes a sentence for the log about each source.
      progress, scratch: see `prepare_source`.

    Raises:
      InputError: bad data, with file and line.
    """
    data = setup.config.data

    def open_all(sources: list[SourceConfig], kind: str) -> list[ShardSet]:
        opened = []
        for source in sources:
            shards = prepare_source(
                source,
                setup.tokenizer,
                cache_dir,
                max_bad_rows=data.max_bad_rows,
                progress=progress,
                scratch=scratch,
            )
            skipped = f", {shards.index.bad_rows} bad rows skipped" if shards.index.bad_rows else ""
            note(f"{kind} {source.path}: {len(shards):,} documents, {shards.num_tokens:,} tokens{skipped}")
            opened.append(shards)
        return opened

    return open_all(data.train, "train"), open_all(data.heldout, "held-out")


def make_loader(setup: Setup, training: Sequence[ShardSet]) -> TrainLoader:
    """Open this process's lanes of the training sources at the beginning."""
    data = setup.config.data
    return TrainLoader(
        training,
        [source.weight for source in data.train],
        seq_len=data.seq_len,
        packing=setup.packing,
        num_lanes=setup.feed.num_lanes,
        seed=setup.config.seed,
        shuffle=data.shuffle,
        start_id=setup.start_id,
        eos_id=setup.eos_id,
        lanes=setup.feed.lanes,
    )


def _packing(config: RunConfig, spec: ModelSpec, tokenizer: Tokenizer, eos_id: int) -> RowRule:
    data = config.data
    if data.packing != "blank_infilling":
        return data.packing
    task = BlankInfilling.create(
        data.blank_infilling, tokenizer, eos_id=eos_id, two_positions=spec.uses_block_positions
    )
    largest = len(task.ends_sentence) - 1
    if largest >= spec.vocab_size:
        raise InputError(
            f"data.blank_infilling.tokens: found the id {largest}, but model {config.model.name} has "
            f"{spec.vocab_size} embeddings"
        )
    return task
