"""Rules between the options of a run, on configs built in Python."""

import dataclasses

import pytest

from jaxllm.config import (
    BatchRampConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
    validate,
)

SOURCES = [SourceConfig(path="a")]
CONFIG = RunConfig(
    run_dir="r",
    tokenizer="t",
    model=ModelConfig(name="m"),
    data=DataConfig(train=SOURCES, heldout=SOURCES, seq_len=16),
    schedule=ScheduleConfig(warmup=10),
    train=TrainConfig(steps=100, batch_size=8),
)


def ramp(grad_accum=1, **ramp):
    return {"train": TrainConfig(steps=100, batch_size=8, grad_accum=grad_accum, batch_ramp=BatchRampConfig(**ramp))}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"schedule": ScheduleConfig(warmup=0, kind="constant")},
        {"schedule": ScheduleConfig(warmup=150, total=200)},
        {"schedule": ScheduleConfig(unit="tokens", warmup=100 * 8 * 16 - 1)},
        {"schedule": ScheduleConfig(kind="wsd", warmup=10, decay=90)},
        {"schedule": ScheduleConfig(kind="multistep", warmup=1, boundaries=[0.8, 0.9], factors=[0.3, 0.1])},
        {"log": LogConfig(profile=ProfileConfig(start=100))},
        {"eval": EvalConfig(every=5)},
        ramp(start=2, increment=3, samples=5),
    ],
)
def test_sound_configs_have_no_violations(sections):
    assert validate(dataclasses.replace(CONFIG, **sections)) == []


@pytest.mark.parametrize(
    ("sections", "violation"),
    [
        ({"run_dir": ""}, "run_dir: expected text, found nothing"),
        ({"optimizer": OptimizerConfig(eps=float("nan"))}, "optimizer.eps: expected a finite number, found nan"),
        (
            {"optimizer": OptimizerConfig(clip_norm=float("inf"))},
            "optimizer.clip_norm: expected a finite number, found inf",
        ),
        ({"optimizer": OptimizerConfig(b1=1.0)}, "optimizer.b1: expected >= 0 and < 1, found 1.0"),
        ({"model": ModelConfig(name="m", window=[4, None, 0])}, "model.window: expected >= 1, found 0"),
        (
            {"model": ModelConfig(name="m", window=[])},
            "model.window: expected an entry for each layer, found none; null is full attention in all layers",
        ),
        ({"data": DataConfig()}, "data.train: expected at least one source, found none"),
        (
            {"data": DataConfig(train=[*SOURCES, SourceConfig(path="b", weight=0.0)])},
            "data.train.1.weight: expected > 0, found 0.0",
        ),
        (
            {"data": DataConfig(train=[*SOURCES, SourceConfig(path="b", weight=1.0)])},
            "data.train.0.weight: missing; expected a weight for every source or for none",
        ),
        (
            {"data": DataConfig(train=SOURCES, num_lanes=3)},
            "data.num_lanes: expected a divisor or a multiple of train.batch_size (8), found 3",
        ),
        (
            {"data": DataConfig(train=SOURCES, num_lanes=4)} | ramp(start=4, increment=2, samples=5),
            "data.num_lanes: expected a divisor of train.batch_ramp's start (4) and increment (2), found 4",
        ),
        (
            {"train": TrainConfig(steps=100, batch_size=8, grad_accum=3)},
            "train.grad_accum: expected a divisor of train.batch_size (8), found 3",
        ),
        ({"train": TrainConfig(steps=100, batch_size=8, grad_accum=0)}, "train.grad_accum: expected >= 1, found 0"),
        (
            ramp(start=8, increment=3, samples=5),
            "train.batch_ramp.start: expected less than train.batch_size (8), found 8",
        ),
        (
            ramp(start=4, increment=3, samples=5),
            "train.batch_ramp.increment: expected a divisor of train.batch_size - start (8 - 4), found 3",
        ),
        (
            {"schedule": ScheduleConfig(warmup=200, total=200)},
            "schedule.warmup: expected less than the schedule.total (200), found 200",
        ),
        (
            {"schedule": ScheduleConfig(kind="wsd", warmup=10, decay=91)},
            "schedule.decay: expected at most the total, train.steps (100), less the warm-up (10), found 91",
        ),
        (
            {"schedule": ScheduleConfig(warmup=10, decay=5)},
            "schedule.decay: only schedule.kind 'wsd' has a decay (found 'cosine'); set it to null",
        ),
        (
            {"schedule": ScheduleConfig(warmup=1, boundaries=[0.5], factors=[0.1])},
            "schedule.boundaries: only schedule.kind 'multistep' has boundaries (found 'cosine'); set them to []",
        ),
        (
            {"schedule": ScheduleConfig(warmup=1, kind="multistep")},
            "schedule.boundaries: schedule.kind 'multistep' needs at least one, such as [0.8, 0.9]",
        ),
        (
            {"schedule": ScheduleConfig(warmup=1, kind="multistep", boundaries=[0.5, 0.5], factors=[1.0, 0.1])},
            "schedule.boundaries: expected rising shares of the total, found [0.5, 0.5]",
        ),
        (
            {"schedule": ScheduleConfig(warmup=1, kind="multistep", boundaries=[0.5], factors=[1.0, 0.1])},
            "schedule.factors: expected one for each of the 1 schedule.boundaries, found 2",
        ),
        (
            {"data": DataConfig(train=SOURCES), "eval": EvalConfig(every=5)},
            "eval.every: expected null without data.heldout, found 5",
        ),
        (
            {"log": LogConfig(profile=ProfileConfig(start=101))},
            "log.profile.start: expected at most train.steps (100), found 101",
        ),
    ],
)
def test_each_broken_rule_names_its_option(sections, violation):
    assert validate(dataclasses.replace(CONFIG, **sections)) == [violation]
