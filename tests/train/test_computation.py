"""What a run computes, from its configuration and a mesh alone."""

import jax
import pytest

from jaxllm.config import BatchRampConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from jaxllm.errors import InputError
from jaxllm.sharding.mesh import make_mesh
from jaxllm.train.computation import make_computation


def computation(**train):
    config = RunConfig(
        run_dir="run",
        tokenizer="none",
        model=ModelConfig(name="qwen-mini"),
        optimizer=OptimizerConfig(),
        train=TrainConfig(steps=100, **train),
    )
    return make_computation(config, make_mesh(fsdp=4, tensor=2))


def test_microbatches_stay_as_large_while_the_batch_ramps():
    ramp = BatchRampConfig(start=8, increment=8, samples=200)
    made = computation(batch_size=48, grad_accum=6, batch_ramp=ramp)
    assert made.batch_sizes.sizes() == [8, 16, 24, 32, 40, 48]
    assert [made.microbatches(size) for size in made.batch_sizes.sizes()] == [1, 2, 3, 4, 5, 6]


def test_a_batch_that_microbatches_do_not_divide_is_cut_into_smaller_ones():
    made = computation(batch_size=48, grad_accum=3, batch_ramp=BatchRampConfig(start=24, increment=12, samples=200))
    assert [made.microbatches(size) for size in (24, 36, 48)] == [2, 3, 3]  # of 3, 3 and 4 rows on a device


def test_batches_must_be_split_over_all_ways():
    with pytest.raises(InputError, match=r"train.batch_size: 6 rows cannot be split over 4 ways of data parallelism"):
        computation(batch_size=6)
    with pytest.raises(InputError, match=r"train.batch_ramp: a batch of 10 rows cannot be split over 4 ways"):
        computation(batch_size=16, batch_ramp=BatchRampConfig(start=4, increment=6, samples=50))


def test_the_step_traces_without_tokenizer_and_data():
    made = computation(batch_size=8, grad_accum=2)
    with jax.set_mesh(made.mesh):
        state, metrics = jax.eval_shape(made.train_step(), made.state, made.abstract_batch(8), 0.0, None)
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, made.state)
    assert metrics["loss"].shape == ()
