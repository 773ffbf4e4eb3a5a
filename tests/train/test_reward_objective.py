"""The objective of reward models: published numbers, where it starts, its terms, rows of either kind and meshes."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.config.alignment import AdapterConfig, RankingConfig
from jaxllm.data.example_rows import LEVELS
from jaxllm.nn import score
from jaxllm.nn.param import Initializer, initial_values
from jaxllm.train.objectives.reward import RewardModeling
from jaxllm.train.step import make_eval_step
from tests.tiny_models import random_params
from tests.train.pair_steps import SPEC, PairTrainer, Weights, column, random_pairs

ALL_TERMS = RankingConfig(margins="data", barrier=0.02, center=0.01, language_modeling=0.1)


@pytest.mark.parametrize(
    ("name", "options", "margins"),
    [
        ("nomargin", {}, None),
        ("small", {"margins": "small"}, "margin_small"),
        ("large", {"margins": "large"}, "margin_large"),
        ("center001", {"center": 0.01}, None),
    ],
)
def test_pair_losses_are_those_of_trl(goldens, name, options, margins):
    with np.load(goldens / "losses" / "reward_ranking.npz", allow_pickle=False) as golden:
        scores = np.stack([golden["r_chosen"], golden["r_rejected"]], axis=-1)[:, None]
        given = np.zeros(len(scores)) if margins is None else golden[margins]
        with jax.enable_x64(True):
            found = mean_loss(RankingConfig(**options), scores, given[:, None])
        np.testing.assert_allclose(found, golden[f"{name}_loss"], rtol=1e-9)


def test_focal_ranking_adds_the_barrier_of_both_scores(goldens):
    with np.load(goldens / "losses" / "focal_ranking.npz", allow_pickle=False) as golden:
        scores = np.stack([golden["r_chosen"], golden["r_rejected"]], axis=-1)[:, None]
        options = RankingConfig(loss="focal", gamma=float(golden["gamma"]), barrier=float(golden["lam"]))
        with jax.enable_x64(True):
            found = mean_loss(options, scores, np.zeros((len(scores), 1)))
        np.testing.assert_allclose(found, golden["total_penalty_sum_over_pair"], rtol=1e-9)


def mean_loss(options, scores, margins):
    objective = RewardModeling(forward=None, ranking=options, pairs_per_row=1)
    parts = objective.pair_losses(scores, margins).values()
    return np.mean(sum(weight * np.asarray(losses) for weight, losses in parts))


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return PairTrainer(tmp_path_factory.mktemp("reward"), "reward", ranking=ALL_TERMS).run(20)[1]


@pytest.mark.parametrize(
    "how",
    [
        {"mesh": {"fsdp": 2, "tensor": 2}, "grad_accum": 2, "packed": False},
        pytest.param({"mesh": {"fsdp": 2, "tensor": 2}}, marks=pytest.mark.slow),
        pytest.param({"grad_accum": 2}, marks=pytest.mark.slow),
        pytest.param({"packed": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_neither_mesh_nor_microbatches_nor_packing_change_the_steps(one_device, tmp_path, how):
    recorded = PairTrainer(tmp_path, "reward", ranking=ALL_TERMS, **how).run(20)[1]
    assert column(one_device)[18] < column(one_device)[0] - 0.05
    for name in one_device[0]:
        np.testing.assert_allclose(column(recorded, name), column(one_device, name), rtol=0, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(column(recorded), column(one_device), rtol=0, atol=1e-5)


def test_the_loss_is_made_of_the_recorded_terms(one_device):
    first = one_device[0]
    total = first["loss"] + 0.02 * first["barrier"] + 0.01 * first["center"] + 0.1 * first["language_modeling_loss"]
    assert first["train_loss"] == pytest.approx(total, rel=1e-6)
    assert first["margin"] == pytest.approx(first["chosen_reward"] - first["rejected_reward"], abs=1e-6)


def test_a_fresh_score_is_normal_and_on_every_device():
    spec = dataclasses.replace(SPEC, hidden_size=4096)
    declared = score.declarations(spec)
    values = np.asarray(initial_values(declared, jax.random.key(0), Initializer())["kernel"])
    assert values.shape == (4096,) and values.std() == pytest.approx(4097**-0.5, rel=0.05)
    assert declared["kernel"].axes == ("norm",)


def test_what_no_score_needs_is_not_trained(tmp_path):
    plain, mixed = (PairTrainer(tmp_path, "reward", ranking=options) for options in (RankingConfig(), ALL_TERMS))
    names = random_params(SPEC).keys()
    assert "head" in names
    assert plain.objective.declarations()["model"].keys() == names - {"head"}
    assert mixed.objective.declarations()["model"].keys() == names


def test_a_reward_model_goes_on_with_its_score(tmp_path):
    trainer = PairTrainer(tmp_path, "reward")
    params = random_params(SPEC, scale=0.1)
    body = {name: part for name, part in params.items() if name != "head"}
    kept = {"kernel": np.arange(SPEC.hidden_size, dtype=np.float32)}
    for weights in (Weights(body, kept), Weights(params, kept)):
        state, _ = trainer.start(weights)
        np.testing.assert_array_equal(state.params["score"]["kernel"], kept["kernel"])
        assert state.params["model"].keys() == body.keys()
    fresh, _ = trainer.start(Weights(params))
    assert not np.array_equal(fresh.params["score"]["kernel"], kept["kernel"])
    mixed = PairTrainer(tmp_path, "reward", ranking=ALL_TERMS)
    with pytest.raises(jaxllm.InputError, match="without an output matrix"):
        mixed.start(Weights(body, kept))


def test_an_adapter_trains_beside_the_score(tmp_path):
    trainer = PairTrainer(tmp_path, "reward", adapter=AdapterConfig(rank=4, alpha=8.0))
    before, frozen = trainer.start()
    base = jax.tree.map(np.array, frozen)
    state, recorded = trainer.run(10, learning_rate=1e-2)
    assert "head" not in frozen and recorded[9]["loss"] < recorded[0]["loss"] - 0.1
    assert not np.array_equal(state.params["score"]["kernel"], before.params["score"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, base, trainer.start()[1])
    with pytest.raises(jaxllm.InputError, match="has no output matrix"):
        PairTrainer(tmp_path, "reward", adapter=AdapterConfig(targets=["head"]))


def test_accuracy_is_told_by_level_over_all_batches(tmp_path):
    trainer = PairTrainer(tmp_path, "reward")
    with jax.set_mesh(trainer.computation.mesh):
        state, _ = trainer.start()
        evaluate, sums = make_eval_step(trainer.objective), None
        for number in range(2):
            found = jax.tree.map(np.asarray, evaluate(state.params, trainer.batch(number), None, None)[:2])
            sums = found if sums is None else jax.tree.map(np.add, sums, found)
    metrics = trainer.objective.metrics(*sums)
    levels = np.array([item.level for number in range(2) for item in random_pairs(number)])
    counts = {name: (levels == place).sum() for place, name in enumerate(LEVELS) if (levels == place).any()}
    told = {name.removeprefix("accuracy_"): value for name, value in metrics.items() if name.startswith("accuracy_")}
    assert told.keys() == counts.keys() and len(counts) == 4
    right = sum(counts[name] * told[name] for name in counts)
    assert right <= metrics["accuracy"] * len(levels) + 1e-4 <= right + (levels == -1).sum() + 2e-4
