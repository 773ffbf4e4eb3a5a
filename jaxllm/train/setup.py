"""From a configuration to the things a run is made of; everything that can be refused early is refused here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.config import RunConfig, SourceConfig, validate
from jaxllm.config.stages import POLICY_STAGES
from jaxllm.data.blank_rows import BlankInfilling
from jaxllm.data.encoders import make_encoder
from jaxllm.data.example_rows import ExampleRows, PreferenceRows, PromptRows
from jaxllm.data.example_set import ExampleSet, prepare_examples
from jaxllm.data.examples import Encoder
from jaxllm.data.loader import RowRule, TrainLoader, boundary_ids, default_num_lanes, padding_row
from jaxllm.data.packing import Row
from jaxllm.data.rows import STAGE_PURPOSES
from jaxllm.data.shards import Progress, ShardSet, prepare_source
from jaxllm.errors import InputError
from jaxllm.sharding.mesh import make_mesh
from jaxllm.sharding.processes import gather, is_main, together
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers import Tokenizer
from jaxllm.train.computation import Computation, make_computation
from jaxllm.train.feed import Feed
from jaxllm.train.flops import peak_flops
from jaxllm.train.from_weights import run_chat_format, run_tokenizer
from jaxllm.train.pace import Pace
from jaxllm.train.records.progress import Speed
from jaxllm.train.signals import StopRequested, StopSignal

Source = ShardSet | ExampleSet


class ReferenceLogps(NamedTuple):
    """Log-probabilities of chosen and rejected answers, float32 [pairs of all sources, 2] each."""

    training: np.ndarray
    heldout: np.ndarray


class Opened(NamedTuple):
    """The sources of a run.

    Attributes:
      reference: what a reference says of pairs, where it was computed before; see `train.precomputed`.
    """

    training: list[Source]
    heldout: list[Source]
    pretrain: list[ShardSet]
    reference: ReferenceLogps | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(Computation):
    """The parts of a run that follow from its configuration and the devices.

    Attributes:
      start_id, eos_id: what opens and closes a document; None after pretraining.
      chat_format: name of the format of conversations; None: there is none.
      encoder: how examples become ids and labels; None in pretraining.
      packing: how documents or examples become rows.
    """

    tokenizer: Tokenizer
    start_id: int | None
    eos_id: int | None
    chat_format: str | None
    encoder: Encoder | None
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
            flops_per_token=self.objective.flops_per_token(config.data.seq_len),
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
    tokenizer = run_tokenizer(config)
    if tokenizer.vocab_size > spec.vocab_size:
        raise InputError(
            f"tokenizer: {config.tokenizer or config.model.weights} has {tokenizer.vocab_size} ids, but model "
            f"{config.model.label} has {spec.vocab_size} embeddings"
        )
    encoder, start_id, eos_id = None, None, None
    chat_format = run_chat_format(config, tokenizer)
    if config.stage == "pretrain":
        start_id, eos_id = boundary_ids(tokenizer)
        packing = _packing(config, spec, tokenizer, eos_id)
    else:
        encoder = make_encoder(config, spec, tokenizer, chat_format)
        packing = _example_rows(config, encoder)
    sizes = computation.batch_sizes.sizes()
    num_lanes = config.data.num_lanes or default_num_lanes(sizes)
    return Setup(
        **{field.name: getattr(computation, field.name) for field in dataclasses.fields(computation)},
        tokenizer=tokenizer,
        start_id=start_id,
        eos_id=eos_id,
        chat_format=chat_format,
        encoder=encoder,
        packing=packing,
        feed=Feed.create(computation.mesh, num_lanes, sizes),
    )


def open_sources(
    setup: Setup,
    cache_dir: Path,
    *,
    note: Callable[[str], None],
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> Opened:
    """Open the sources as token shards or example sets, tokenising text once into `cache_dir`.

    Args:
      note: takes a sentence for the log about each source.
      progress, scratch: see `prepare_source`.

    Raises:
      InputError: bad data, with file and line.
    """
    data = setup.config.data
    options = dict(max_bad_rows=data.max_bad_rows, progress=progress, scratch=scratch)

    def documents(source: SourceConfig) -> ShardSet:
        return prepare_source(source, setup.tokenizer, cache_dir, **options)

    def examples(source: SourceConfig) -> ExampleSet:
        purpose = STAGE_PURPOSES[setup.config.stage]
        limits = dict(seq_len=example_length(setup.config), too_long=data.too_long)
        return prepare_examples(source, purpose, setup.encoder, cache_dir, **limits, **options)

    def open_all(sources: list[SourceConfig], kind: str, prepare: Callable[[SourceConfig], Source]) -> list[Source]:
        opened = []
        for source in sources:
            opened.append(prepare(source))
            note(f"{kind} {source.path}: {opened[-1].summary()}")
        return opened

    prepare = documents if setup.encoder is None else examples
    return Opened(
        training=open_all(data.train, "train", prepare),
        heldout=open_all(data.heldout, "held-out", prepare),
        pretrain=open_all(data.pretrain, "pretraining", documents),
    )


def open_in_turn(setup: Setup, cache_dir: Path, signals: StopSignal, note: Callable[[str], None]) -> Opened | None:
    """Open the sources in all processes; process 0 tokenises text, then the others find its copy.

    Returns:
      None if a signal came to one of the processes.

    Raises:
      InputError: bad data, with file and line.
    """
    pace = Pace()

    def watch(documents: int, tokens: int) -> None:
        signals.check()
        if pace.is_due():
            note(f"tokenizing: {documents:,} documents, {tokens:,} tokens so far")

    def open_mine() -> Opened | None:
        with contextlib.suppress(StopRequested):
            return open_sources(setup, cache_dir, note=note, progress=watch)

    opened = None
    for on_duty in (is_main(), not is_main()):
        opened = together(open_mine if on_duty else lambda: None) or opened
        if any(gather(signals.received is not None)):
            return None
    return opened


def example_length(config: RunConfig) -> int:
    """Return how many tokens an example may have: a prompt what its answer leaves of a row."""
    if config.rollout is None or config.stage not in POLICY_STAGES:
        return config.data.seq_len
    return config.data.seq_len - config.rollout.max_new_tokens


def make_loader(setup: Setup, training: Sequence[Source]) -> TrainLoader:
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


def _example_rows(config: RunConfig, encoder: Encoder) -> RowRule:
    options = dict(places=encoder.places, packed=config.data.packing != "padded")
    if config.stage in POLICY_STAGES:
        return PromptRows(places=encoder.places)
    if config.stage == "sft":
        return ExampleRows(**options)
    margins = config.ranking.margins if config.stage == "reward" else "none"
    return PreferenceRows(**options, pairs_per_row=config.data.pairs_per_row, margins=margins)


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
            f"data.blank_infilling.tokens: found the id {largest}, but model {config.model.label} has "
            f"{spec.vocab_size} embeddings"
        )
    return task
