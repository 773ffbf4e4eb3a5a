"""From a configuration to the things a run is made of; everything that can be refused early is refused here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxllm.checkpoint.formats import read_json
from jaxllm.config import RunConfig, SourceConfig, validate
from jaxllm.data.blank_rows import BlankInfilling
from jaxllm.data.loader import RowRule, TrainLoader, boundary_ids, default_num_lanes, padding_row
from jaxllm.data.packing import Row
from jaxllm.data.shards import Progress, ShardSet, prepare_source
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.families import spec as published_spec
from jaxllm.nn.model import decay_mask
from jaxllm.nn.param import Initializer
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import LearnedBlock, ModelSpec, spec_from_json
from jaxllm.tokenizers import Tokenizer, load_tokenizer
from jaxllm.train.feed import Feed, batch_ways
from jaxllm.train.flops import model_flops_per_token, peak_flops
from jaxllm.train.objective import LanguageModeling, default_chunk
from jaxllm.train.optimizer import make_optimizer
from jaxllm.train.progress import Speed
from jaxllm.train.schedule import BatchSizes
from jaxllm.train.spec_changes import change_spec
from jaxllm.train.step import abstract_state
from jaxllm.types import TrainState


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run that follow from its configuration and the devices.

    Attributes:
      start_id, eos_id: what opens and closes a document.
      packing: how documents become rows.
      state: shapes, dtypes and shardings of the training state.
    """

    config: RunConfig
    spec: ModelSpec
    tokenizer: Tokenizer
    start_id: int
    eos_id: int
    packing: RowRule
    mesh: Mesh
    batch_sizes: BatchSizes
    feed: Feed
    objective: LanguageModeling
    optimizer: optax.GradientTransformation
    initializer: Initializer
    state: TrainState

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
    spec = resolve_spec(config)
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > spec.vocab_size:
        raise InputError(
            f"tokenizer: {config.tokenizer} has {tokenizer.vocab_size} ids, but model {config.model.name} has "
            f"{spec.vocab_size} embeddings"
        )
    start_id, eos_id = boundary_ids(tokenizer)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    batch_sizes = BatchSizes(config)
    sizes = batch_sizes.sizes()
    num_lanes = config.data.num_lanes or default_num_lanes(sizes)
    ways = batch_ways(mesh)
    microbatches = ways * config.train.grad_accum
    for size in sizes:
        if size % microbatches:
            raise InputError(
                f"train.batch_size: {size} rows cannot be split over {ways} ways of data parallelism times "
                f"train.grad_accum {config.train.grad_accum}"
            )
    if config.eval.batch_size is not None and config.eval.batch_size % ways:
        raise InputError(
            f"eval.batch_size: {config.eval.batch_size} rows cannot be split over {ways} ways of data parallelism"
        )
    optimizer = make_optimizer(config.optimizer, decay_mask(spec))
    return Setup(
        config=config,
        spec=spec,
        tokenizer=tokenizer,
        start_id=start_id,
        eos_id=eos_id,
        packing=_packing(config, spec, tokenizer, eos_id),
        mesh=mesh,
        batch_sizes=batch_sizes,
        feed=Feed.create(mesh, num_lanes, sizes),
        objective=_objective(config, spec, mesh, max(sizes) // microbatches),
        optimizer=optimizer,
        initializer=_initializer(config, spec),
        state=abstract_state(spec, optimizer, mesh),
    )


def resolve_spec(config: RunConfig) -> ModelSpec:
    """Return the spec of `model.name`, with what the options of `model` change.

    Raises:
      InputError: unknown name, unreadable file, or changes that do not fit the model.
    """
    name = config.model.name
    path = Path(name)
    if path.suffix != ".json":
        spec = published_spec(name)
    elif not path.is_file():
        raise InputError(f"model.name: {name}: no such file")
    elif "architectures" in read_json(path):
        raw = read_json(path)
        spec = family_of_config(raw, name).spec_from_hf(raw)
    else:
        spec = spec_from_json(path.read_text(), name)
    return change_spec(spec, config.model)


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


def _objective(config: RunConfig, spec: ModelSpec, mesh: Mesh, rows: int) -> LanguageModeling:
    chunk = config.train.loss_chunk or default_chunk(rows, config.data.seq_len, spec.vocab_size // mesh.shape["tensor"])
    train = config.train
    return LanguageModeling(
        spec=with_balance(spec, config),
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        remat=config.model.remat,
        chunk=chunk,
        z_loss=train.z_loss,
        max_z_loss=spec.head.max_z_loss if train.max_z_loss is None else train.max_z_loss,
        embedding_shrink=train.embedding_gradient_shrink,
        never_dropped=0.0 if train.moe is None else train.moe.never_dropped,
    )


def with_balance(spec: ModelSpec, config: RunConfig) -> ModelSpec:
    """Return the spec with what `train.moe` gives its mixture of experts; it is no part of the model that is saved."""
    given, name = config.train.moe, config.model.name
    if given is None:
        return spec
    if spec.moe is None:
        raise InputError(f"train.moe: model {name} has no mixture of experts; expected null")
    for option in ("device_balance", "communication_balance", "capacity_factor"):
        if getattr(given, option) and spec.moe.num_groups == 1:
            raise InputError(f"train.moe.{option}: the experts of model {name} are not in groups; expected null")
    balance = _replaced(
        spec.moe.balance,
        expert=given.expert_balance,
        device=given.device_balance,
        communication=given.communication_balance,
        per_sequence=given.per_sequence,
    )
    return dataclasses.replace(spec, moe=_replaced(spec.moe, balance=balance, capacity_factor=given.capacity_factor))


def _replaced(part: Any, **options: Any) -> Any:
    """Return a dataclass with those options that are not None."""
    return dataclasses.replace(part, **{name: value for name, value in options.items() if value is not None})


def _packing(config: RunConfig, spec: ModelSpec, tokenizer: Tokenizer, eos_id: int) -> RowRule:
    data = config.data
    if isinstance(spec.position, LearnedBlock) and data.seq_len > spec.position.num_positions:
        raise InputError(
            f"data.seq_len: found {data.seq_len}, but model {config.model.name} has learned positions for "
            f"{spec.position.num_positions} tokens"
        )
    if data.packing != "blank_infilling":
        if spec.mask == "prefix":
            raise InputError(
                f"data.packing: found {data.packing!r}, but model {config.model.name} fills blanks from a context that "
                "all tokens see; expected 'blank_infilling'"
            )
        return data.packing
    if spec.mask != "prefix":
        raise InputError(
            f"data.packing: 'blank_infilling' needs a model that reads a context in both directions; model "
            f"{config.model.name} does not"
        )
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


def _initializer(config: RunConfig, spec: ModelSpec) -> Initializer:
    given = config.model.init
    return Initializer(
        scheme=given.scheme,
        std=given.std,
        embedding_std=given.embedding_std,
        output_scale=(2 * spec.num_layers) ** -0.5 if given.scale_outputs_by_depth else 1.0,
    )
