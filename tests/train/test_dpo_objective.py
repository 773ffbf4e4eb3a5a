"""The DPO objective: published numbers, rows of either kind, meshes, references and adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.config.alignment import AdapterConfig, DPOConfig
from jaxllm.losses.lm import cross_entropy
from jaxllm.train.objectives.dpo import DirectPreference
from jaxllm.train.objectives.pairs import answer_sums
from jaxllm.types import Batch, PreferenceBatch
from tests.tiny_models import random_params
from tests.train.pair_steps import PAIRS, SPEC, PairTrainer, Weights, column

VARIANTS = {
    "sigmoid": {},
    "sigmoid_b05": {},
    "ipo": {"variant": "ipo"},
    "hinge": {"variant": "hinge"},
    "robust_ls01": {"variant": "robust", "label_smoothing": 0.1},
    "sigmoid_plus_sft": {"sft_weight": 0.2},
    "sigmoid_norm": {"variant": "sigmoid_norm"},
}


@pytest.fixture(scope="module")
def golden(goldens):
    with np.load(goldens / "losses" / "dpo_trl.npz", allow_pickle=False) as file:
        return dict(file)


def golden_batch(golden, pairs_per_row):
    """Lay the golden's rows, chosen ones first, out as pairs: both answers of a pair in one row."""
    num_pairs, length = len(golden["input_ids"]) // 2, golden["input_ids"].shape[1]
    order = np.arange(2 * num_pairs).reshape(2, num_pairs).T.reshape(-1, 2 * pairs_per_row)
    slots = 2 * pairs_per_row * length

    def laid_out(array):
        return jnp.asarray(array[order].reshape(-1, slots, *array.shape[2:]))

    trained = np.pad(golden["completion_mask"][:, 1:], [(0, 0), (0, 1)]).astype(np.float64)
    each = (num_pairs // pairs_per_row, pairs_per_row)
    batch = PreferenceBatch(
        rows=Batch(
            tokens=laid_out(golden["input_ids"]),
            targets=laid_out(np.roll(golden["input_ids"], -1, axis=1)),
            loss_weights=laid_out(trained),
            positions=jnp.zeros((each[0], slots), jnp.int32),
            segment_ids=jnp.broadcast_to(jnp.repeat(jnp.arange(2 * pairs_per_row) + 1, length), (each[0], slots)),
        ),
        ends=jnp.zeros((*each, 2), jnp.int32),
        margins=jnp.zeros(each),
        pair_weights=jnp.ones(each),
    )
    return (
        batch,
        laid_out,
        lambda found: np.asarray(found).reshape(-1, length, *found.shape[2:])[np.argsort(order.ravel())],
    )


@pytest.mark.parametrize("pairs_per_row", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_those_of_trl_from_logits_on(golden, name, pairs_per_row):
    with jax.enable_x64(True):
        batch, laid_out, as_given = golden_batch(golden, pairs_per_row)
        options = DPOConfig(beta=float(golden[f"{name}_beta"]), **VARIANTS[name])
        objective = DirectPreference(forward=None, options=options, reference=None, pairs_per_row=pairs_per_row)
        totals = objective.totals(batch)

        def sums(logits):
            return answer_sums(-cross_entropy(logits, batch.rows.targets, batch.rows.loss_weights), batch)

        def loss(logits):
            total, parts = objective.sums_of(sums(logits), sums(laid_out(golden["ref_logits"])), batch, totals)
            return total / totals["weight"], objective.metrics(parts, totals)

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(laid_out(golden["logits"]))
    np.testing.assert_allclose(value, golden[f"{name}_loss"], rtol=1e-9)
    np.testing.assert_allclose(as_given(gradient), golden[f"{name}_dlogits"], rtol=1e-9, atol=1e-9)
    for ours, theirs in (
        ("chosen_reward", "chosen"),
        ("rejected_reward", "rejected"),
        ("accuracy", "accuracies"),
        ("margin", "margins"),
    ):
        np.testing.assert_allclose(metrics[ours], golden[f"{name}_metric_rewards_{theirs}"], rtol=1e-9)
    np.testing.assert_allclose(metrics["chosen_logps"], golden["policy_chosen_logps"].mean(), rtol=1e-9)
    np.testing.assert_allclose(metrics["rejected_logps"], golden["policy_rejected_logps"].mean(), rtol=1e-9)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    options = DPOConfig(sft_weight=0.2)
    return PairTrainer(tmp_path_factory.mktemp("dpo"), "dpo", dpo=options).run(20)[1]


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
    recorded = PairTrainer(tmp_path, "dpo", dpo=DPOConfig(sft_weight=0.2), **how).run(20)[1]
    assert column(one_device)[18] < column(one_device)[0] - 0.05
    for name in one_device[0]:
        np.testing.assert_allclose(column(recorded, name), column(one_device, name), rtol=0, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(column(recorded), column(one_device), rtol=0, atol=1e-5)


def test_the_policy_begins_as_its_reference_and_leaves_it(one_device):
    assert one_device[0]["reference_distance"] == 0
    assert one_device[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert one_device[19]["reference_distance"] > 0.1


def test_a_precomputed_reference_gives_the_steps_of_a_live_one(tmp_path):
    live = PairTrainer(tmp_path, "dpo")
    ready = PairTrainer(tmp_path, "dpo", dpo=DPOConfig(reference="precomputed"))
    assert ready.objective.frozen_declarations() is None
    with jax.set_mesh(live.computation.mesh):
        state, frozen = live.start()
        batch = live.batch(0)
        live_sums = answer_sums(
            live.objective.reference.token_logps(state.params, None, frozen["reference"], batch.rows), batch
        )
        per_pair = np.asarray(live_sums).reshape(PAIRS, 2)
        policy = Weights(random_params(SPEC, seed=1, scale=0.1))
        rate = np.float32(1e-3)
        expected = live.computation.train_step()(live.start(policy)[0], batch, rate, None, frozen)[1]
        found = ready.computation.train_step()(ready.start(policy)[0], ready.batch(0, per_pair), rate, None)[1]
    assert float(expected["reference_distance"]) > 0.1
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_without_a_reference_only_the_policy_counts(tmp_path):
    trainer = PairTrainer(tmp_path, "dpo", dpo=DPOConfig(reference="none", beta=0.5))
    assert trainer.objective.frozen_declarations() is None
    first = trainer.run(1)[1][0]
    assert "reference_distance" not in first
    assert first["chosen_reward"] == pytest.approx(0.5 * first["chosen_logps"], rel=1e-6)


def test_an_adapter_is_its_own_reference_when_it_is_off(tmp_path):
    trainer = PairTrainer(tmp_path, "dpo", adapter=AdapterConfig(rank=4, alpha=8.0))
    frozen = trainer.objective.frozen_declarations()
    assert frozen.keys() == {"policy"}
    state, recorded = trainer.run(12, learning_rate=1e-2)
    losses = column(recorded, "loss")
    assert recorded[0]["reference_distance"] == 0 and recorded[11]["reference_distance"] > 0.1
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[9] < losses[0] - 0.1
    assert all("a" in leaf or "b" in leaf for leaf in _leaf_names(state.params))


def _leaf_names(tree):
    return [jax.tree_util.keystr(path[-1:]) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_another_reference_than_the_base_of_an_adapter_is_held_whole(tmp_path):
    options = DPOConfig(reference_weights="elsewhere")
    trainer = PairTrainer(tmp_path, "dpo", adapter=AdapterConfig(rank=4), dpo=options)
    assert trainer.objective.frozen_declarations()["reference"].keys() == random_params(SPEC).keys()


def test_a_reference_needs_weights(tmp_path):
    with pytest.raises(jaxllm.InputError, match=r"model.weights: found none"):
        PairTrainer(tmp_path, "dpo").start(Weights(None))
