"""Run folders with a checkpoint of any stage, written without training."""

import jax
import jax.numpy as jnp
import yaml

from jaxllm.checkpoint.manager import CheckpointManager
from jaxllm.checkpoint.run_folder import RunFolder
from jaxllm.config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig, dump_config
from jaxllm.spec import spec_to_json
from jaxllm.types import TrainState


def save_run(path, spec, params, *, stage="sft", tokenizer=None, init_from=None, name="m", **sections):
    """Write a run whose checkpoint of step 1 holds these parameters, and return its path as text."""
    run = RunFolder(path)
    run.path.mkdir()
    config = RunConfig(
        run_dir=str(path),
        tokenizer="t",
        stage=stage,
        model=ModelConfig(name=name),
        data=DataConfig(train=[SourceConfig(path="rows")]),
        train=TrainConfig(steps=1, batch_size=1),
        **sections,
    )
    meta = {"config": yaml.safe_load(dump_config(config)), "spec": spec_to_json(spec), "init_from": init_from}
    state = TrainState(
        step=jnp.int32(1), params=jax.tree.map(jnp.asarray, params), opt_state={}, rng=jnp.zeros(2, jnp.uint32)
    )
    with CheckpointManager(run.checkpoints, keep_last=1, keep_every=None) as manager:
        manager.save(state, data_state={}, meta=meta)
    if tokenizer is not None:
        tokenizer.save(run.tokenizer)
    return str(path)
