"""`train --dry-run`: what a run would be, without a step."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.shards import ShardSet
from jaxllm.errors import EXIT_OK
from jaxllm.nn.model import count_active_params, count_params
from jaxllm.sharding.processes import on_main
from jaxllm.train.setup import Setup, make_loader, open_sources
from jaxllm.types import TrainState

_SHOWN_CHARACTERS = 300


def show_run(setup: Setup) -> int:
    """Print parameter shapes, memory per device from the compiled step, and the first batch; write nothing.

    Raises:
      InputError: bad data.
    """
    abstract_batch = setup.abstract_batch(max(setup.batch_sizes.sizes()))
    compiled = setup.train_step().lower(setup.state, abstract_batch, jnp.float32(0), None, setup.frozen).compile()
    on_main(lambda: _print_run(setup, compiled))
    return EXIT_OK


def _print_run(setup: Setup, compiled: jax.stages.Compiled) -> None:
    config = setup.config
    active = f", {count_active_params(setup.spec):,} for each token" if setup.spec.moe else ""
    print(f"\nmodel {config.model.label}: {count_params(setup.spec):,} parameters{active}")
    _print_shapes(setup.state)
    mesh = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items() if size > 1) or "one device"
    print(f"\nmesh: {mesh} ({setup.mesh.size} {jax.devices()[0].device_kind}, {jax.process_count()} processes)")
    _print_memory(setup.state, compiled.memory_analysis())
    cache = Path(config.data.cache_dir or Path(config.run_dir) / "data")
    with tempfile.TemporaryDirectory() as scratch:
        opened = open_sources(setup, cache, note=print, scratch=Path(scratch))
        _print_first_batch(setup, opened.training)
    held = sum(map(len, opened.heldout))
    steps, tokens = config.train.steps, setup.batch_sizes.tokens_before(config.train.steps)
    print(f"\n{steps:,} steps, {tokens:,} tokens, batch sizes {setup.batch_sizes.sizes()}, {held:,} held out")
    print("dry run: nothing was trained or written")


def _print_shapes(state: TrainState) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = "/".join(key.key for key in path)
        local = leaf.sharding.shard_shape(leaf.shape)
        print(f"  {name:<32} {leaf.dtype} {leaf.shape!s:<26} on a device {local}")


def _print_memory(state: TrainState, memory: object) -> None:
    def per_device(tree: object) -> float:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves) / 2**20

    print(f"\nmemory on a device: parameters {per_device(state.params):,.1f} MiB", end="")
    print(f", optimizer {per_device(state.opt_state):,.1f} MiB", end="")
    if memory is not None:
        print(f", gradients, activations and the rest {memory.temp_size_in_bytes / 2**20:,.1f} MiB", end="")
    stats = jax.devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    print(f"; the device has {limit / 2**20:,.0f} MiB" if limit else "")


def _print_first_batch(setup: Setup, training: list[ShardSet]) -> None:
    loader = make_loader(setup, training)
    rows = loader.next_batch(setup.batch_sizes.at(0))
    documents = loader.describe(rows["document_ids"])
    if "length" in rows:
        print(f"\nfirst prompts: {len(documents)} of up to {rows['length'].max():,} tokens; answers were not sampled")
        first = rows["tokens"][0, : rows["length"][0]]
    else:
        trained = np.count_nonzero(rows["loss_weights"])
        shape = rows["tokens"].shape
        print(f"\nfirst batch on this process: tokens {shape}, {trained:,} trained, {len(documents)} documents")
        first = rows["tokens"][0][rows["segment_ids"][0] == 1]
    print(f"  first document: {loader.describe(rows['document_ids'][:1].flat[:1])[0]}")
    # Special tokens that the config adds have no text.
    text = setup.tokenizer.decode(first[first < setup.tokenizer.vocab_size].tolist())
    print(f"  first row begins: {text[:_SHOWN_CHARACTERS]!r}")
