"""Schedules against the goldens, and the laws of the batch-size ramp."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config.schema import (
    BatchRampConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from jaxllm.train import schedule

GOLDEN = dict(np.load(Path(__file__).parents[1] / "goldens" / "schedules.npz", allow_pickle=False))
STEPS = GOLDEN["steps"]
SPAN = {"peak": 3e-4, "warmup": 2000, "total": 50_000}


def run_config(*, steps=1000, batch_size=8, ramp=None, seq_len=16, peak=3e-4, **schedule_options) -> RunConfig:
    return RunConfig(
        run_dir="run",
        tokenizer="tokenizer",
        model=ModelConfig(name="model"),
        data=DataConfig(seq_len=seq_len),
        optimizer=OptimizerConfig(learning_rate=peak),
        schedule=ScheduleConfig(**schedule_options),
        train=TrainConfig(steps=steps, batch_size=batch_size, batch_ramp=ramp),
    )


@pytest.mark.parametrize(
    ("key", "rates"),
    [
        ("cosine10_clamped", schedule.cosine(STEPS, **SPAN, floor=0.1)),
        ("ds_llm_80_90_316_100", schedule.multistep(STEPS, **SPAN, boundaries=[0.8, 0.9], factors=[0.316, 0.1])),
        ("ds_v2_60_90_x316", schedule.multistep(STEPS, **SPAN, boundaries=[0.6, 0.9], factors=[0.316, 0.316**2])),
        ("ds_v2_lite_80_90_x316", schedule.multistep(STEPS, **SPAN, boundaries=[0.8, 0.9], factors=[0.316, 0.316**2])),
        ("const_after_3pct_warmup", schedule.constant(STEPS, peak=3e-4, warmup=1500)),
        ("internlm2_rm_cosine_1e5_to_5e6", schedule.cosine(STEPS, peak=1e-5, warmup=0, total=50_000, floor=0.5)),
    ],
)
def test_schedule_equals_golden(key, rates):
    np.testing.assert_allclose(rates, GOLDEN[key], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("cosine10_clamped", {"kind": "cosine", "floor": 0.1}),
        (
            "ds_v2_60_90_x316",
            {"kind": "multistep", "boundaries": [0.6, 0.9], "factors": [0.316, 0.316**2]},
        ),
        ("const_after_3pct_warmup", {"kind": "constant", "warmup": 1500}),
    ],
)
@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_config_gives_the_golden_rates_in_either_unit(key, options, unit):
    per_unit = 8 * 16 if unit == "tokens" else 1
    options = {"warmup": 2000} | options
    options["warmup"] *= per_unit
    config = run_config(steps=50_000, unit=unit, **options)
    rates = [schedule.learning_rate_at(config, step=int(step), tokens=int(step) * 128) for step in STEPS]
    np.testing.assert_allclose(rates, GOLDEN[key], rtol=1e-12, atol=0)


def test_wsd_is_flat_and_then_falls_linearly_to_the_floor():
    config = run_config(steps=100, kind="wsd", warmup=10, decay=20, floor=0.2, peak=1.0)
    rates = [schedule.learning_rate_at(config, step=step, tokens=0) for step in (0, 5, 10, 80, 90, 100, 500)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 0.6, 0.2, 0.2], rtol=1e-12)


def test_total_sets_the_end_and_a_run_may_end_inside_its_warmup():
    longer = run_config(steps=10, warmup=0, total=100, floor=0.0, peak=1.0)
    assert schedule.learning_rate_at(longer, step=50, tokens=0) == pytest.approx(0.5)
    short = run_config(steps=10, warmup=40, peak=1.0)
    assert schedule.learning_rate_at(short, step=9, tokens=0) == pytest.approx(9 / 40)


def test_glm130b_batch_ramp_equals_golden():
    ramp = {"start": 192, "increment": 24, "batch_size": 4224, "ramp_samples": int(GOLDEN["glm130b_ramp_samples"])}
    sizes = [schedule.batch_ramp(int(consumed), **ramp) for consumed in GOLDEN["glm130b_ramp_consumed"]]
    np.testing.assert_array_equal(sizes, GOLDEN["glm130b_ramp_batch"])


def test_deepseek_v2_ramp_equals_golden():
    sizes = schedule.linear_ramp(GOLDEN["v2_ramp_tokens"], start=2304, end=9216, length=225e9)
    np.testing.assert_allclose(sizes, GOLDEN["v2_ramp_batch_linear"], rtol=1e-12)


@given(start=st.integers(1, 20), increment=st.integers(1, 7), stages=st.integers(1, 12), samples=st.integers(1, 3000))
def test_batch_sizes_equal_a_walk_over_the_steps(start, increment, stages, samples):
    full = start + increment * stages
    ramp = BatchRampConfig(start=start, increment=increment, samples=samples)
    sizes = schedule.BatchSizes(run_config(batch_size=full, ramp=ramp, seq_len=5))
    consumed = 0
    for step in range(60):
        expected = schedule.batch_ramp(
            consumed, start=start, increment=increment, batch_size=full, ramp_samples=samples
        )
        assert (sizes.samples_before(step), sizes.at(step)) == (consumed, expected)
        assert sizes.tokens_before(step) == 5 * consumed
        assert expected in sizes.sizes()
        consumed += expected
    assert sizes.at(10**9) == full
