"""Warnings about a run that learns nothing: when they come, how often, and what they leave alone."""

import json
import re
from types import SimpleNamespace

import pytest

from jaxllm.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, SourceConfig, TrainConfig
from jaxllm.config.alignment import AdapterConfig, DPOConfig, HealthConfig
from jaxllm.config.options import all_options
from jaxllm.train.health import REPEAT_STEPS, Health

WELL = {
    "reward_std": 0.4,
    "equal_groups": 0.5,
    "finished": 0.8,
    "answer_tokens": 100.0,
    "kl": 0.5,
    "clipped": 0.1,
    "reference_distance": 0.2,
    "trained_tokens": 512,
    "learning_rate": 1e-6,
}
# What is wrong, and after how many rounds it is told.
ILL = {
    "all_rewards_equal": ({"equal_groups": 1.0, "reward_std": 0.0}, 3),
    "clipped_ratio_high": ({"clipped": 0.6}, 1),
    "no_stop_token": ({"finished": 0.05}, 1),
    "kl_blow_up": ({"kl": 11.0}, 1),
    "length_explosion": ({"answer_tokens": 301.0}, 1),
    "loss_mask_empty": ({"trained_tokens": 0}, 1),
    "reference_equals_policy": ({"kl": 0.0, "reference_distance": 0.0}, 3),
}


def warned(lines):
    return [line.split(":")[0] for line in lines]


def well(steps=4):
    health = Health(HealthConfig())
    assert [health.observe(step, WELL) for step in range(1, steps + 1)] == [[]] * steps
    return health


@pytest.mark.parametrize("name", ILL)
def test_each_warning(name):
    wrong, patience = ILL[name]
    health = well()
    lines = [health.observe(5 + number, WELL | wrong) for number in range(patience)]
    assert lines[:-1] == [[]] * (patience - 1)
    (line,) = lines[-1]
    assert line.startswith(f"{name}: ") and "\n" not in line
    assert health.observe(5 + patience, WELL) == []


def test_warnings_name_options_that_exist():
    for wrong, patience in ILL.values():
        health = well()
        lines = [line for number in range(patience) for line in health.observe(5 + number, WELL | wrong)]
        named = re.findall(r"\b[a-z_]+\.[a-z_]+\b", lines[0])
        assert named and set(named) <= set(all_options()), lines[0]


@pytest.mark.parametrize("name", ILL)
def test_warnings_are_repeated_seldom(name):
    wrong, _ = ILL[name]
    health = well()
    told = [step for step in range(5, 5 + 3 * REPEAT_STEPS) if health.observe(step, WELL | wrong)]
    assert len(told) == 3 and told[1] - told[0] == told[2] - told[1] == REPEAT_STEPS


@pytest.mark.parametrize("name", ["all_rewards_equal", "reference_equals_policy"])
def test_chance_is_no_reason(name):
    wrong, patience = ILL[name]
    health = well()
    for step in range(5, 65):
        assert health.observe(step, WELL if step % patience == 0 else WELL | wrong) == []


def test_several_at_once():
    found = well().observe(9, WELL | {"kl": 100.0, "clipped": 1.0})
    assert warned(found) == ["clipped_ratio_high", "kl_blow_up"]


def test_metrics_of_other_stages_are_not_missed():
    health = Health(HealthConfig())
    assert [health.observe(step, {"loss": 1.0}) for step in range(9)] == [[]] * 9


def test_steps_between_rounds_do_not_count_as_rounds():
    """A round's metrics come with its first update only."""
    health, found = Health(HealthConfig()), []
    for step in range(1, 25):
        metrics = {"loss": 0.0, "clipped": 0.0, "learning_rate": 1e-6}
        if step % 4 == 1:
            metrics |= WELL | ILL["all_rewards_equal"][0]
        found += [(step, name) for name in warned(health.observe(step, metrics))]
    assert found == [(9, "all_rewards_equal")]


def test_equal_rewards_of_single_answers():
    health = Health(HealthConfig())
    lines = [health.observe(step, {"reward_std": 0.0}) for step in range(3)]
    assert [len(each) for each in lines] == [0, 0, 1]


def test_nothing_differs_before_the_first_update():
    """While the learning rate is 0 the reference is the policy."""
    health = Health(HealthConfig())
    same = {"reference_distance": 0.0}
    assert [health.observe(step, same | {"learning_rate": 0.0}) for step in range(9)] == [[]] * 9
    lines = [health.observe(9 + step, same | {"learning_rate": 1e-6}) for step in range(4)]
    assert [len(each) for each in lines] == [0, 0, 0, 1]


def test_what_parts_equal_models_is_rounding():
    def warned_at(distances, **options):
        health = Health(HealthConfig(), **options)
        metrics = [{"reference_distance": distance, "learning_rate": 1e-6} for distance in distances]
        return [step for step, each in enumerate(metrics) if health.observe(step, each)]

    same, learned = [3e-4, 4e-4, 2e-4, 5e-4], [3e-4, 4e-4, 2e-4, 7e-4]
    assert warned_at(same, begins_as_reference=True) == [3]
    assert warned_at(learned, begins_as_reference=True) == []
    assert warned_at(same) == []
    # While the learning rate warms up, rounding may hide what is learned.
    assert warned_at(same, begins_as_reference=True, learning_rate=3e-6) == []


def test_a_run_of_an_earlier_version_goes_on_as_one_that_has_left_its_reference():
    health = Health(HealthConfig(), begins_as_reference=True)
    state = health.state() | {"updated": True}
    del state["first_distance"]
    health.restore(state)
    assert [health.observe(step, {"kl": 0.5, "learning_rate": 1e-6}) for step in range(4)] == [[]] * 4


@pytest.mark.parametrize(
    ("sections", "equal"),
    [
        ({}, True),
        ({"dpo": DPOConfig(reference_weights="runs/sft")}, True),
        ({"dpo": DPOConfig(reference_weights="runs/other")}, False),
        ({"adapter": AdapterConfig()}, True),
        ({"adapter": AdapterConfig(weights="runs/adapter")}, False),
        ({"adapter": AdapterConfig(kind="prefix")}, False),
    ],
    ids=str,
)
def test_a_run_begins_as_its_reference_unless_something_parts_them(sections, equal):
    config = RunConfig(
        run_dir="r",
        tokenizer="t",
        stage="dpo",
        model=ModelConfig(name="m", weights="runs/sft"),
        data=DataConfig(train=[SourceConfig(path="p")]),
        train=TrainConfig(steps=9, batch_size=1),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        **sections,
    )
    health = Health.of_run(config, SimpleNamespace(draws=False, moves_reference=False))
    metrics = {"reference_distance": 1e-5, "learning_rate": 1e-6}
    assert [len(health.observe(step, metrics)) for step in range(4)] == [0, 0, 0, equal]


def test_a_reference_that_moves_may_be_the_policy():
    health = Health(HealthConfig(), reference_moves=True)
    assert [health.observe(step, WELL | {"kl": 0.0, "reference_distance": 0.0}) for step in range(9)] == [[]] * 9


def test_thresholds_are_options():
    metrics = WELL | {"kl": 11.0, "clipped": 0.6, "finished": 0.05, "answer_tokens": 350.0}
    patient = Health(HealthConfig(kl=12, clipped=0.7, unfinished=0.99, length_growth=4))
    assert [patient.observe(step, metrics if step > 3 else WELL) for step in range(6)] == [[]] * 6


def test_a_resumed_run_warns_as_if_it_had_not_stopped():
    wrongs = [ILL[name][0] for name in ILL] + [{}]
    metrics = [WELL | wrongs[step * step % len(wrongs)] | wrongs[step // 7 % len(wrongs)] for step in range(250)]
    whole = Health(HealthConfig())
    expected = [whole.observe(step, each) for step, each in enumerate(metrics)]
    assert sum(map(len, expected)) > 5
    health, found = Health(HealthConfig()), []
    for step, each in enumerate(metrics):
        state = json.loads(json.dumps(health.state()))
        health = Health(HealthConfig())
        health.restore(state)
        found.append(health.observe(step, each))
    assert found == expected
