"""Training of mixtures of experts: balance losses, dropping, what is reported, and meshes that split experts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.config import load_config
from jaxllm.errors import InputError
from jaxllm.losses.lm import cross_entropy
from jaxllm.nn.model import apply, declarations
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import BalanceLosses, spec_to_json, tiny
from jaxllm.train.balance import balance_losses
from jaxllm.train.objectives.language_modeling import draw_rows
from jaxllm.train.records.metrics_file import read_metrics
from jaxllm.train.setup import make_setup
from jaxllm.train.step import abstract_state, make_train_step
from tests.tiny_models import random_params
from tests.train.training_steps import LENGTH, ROWS, Trainer, batch, language_modeling

PLAIN = tiny(jaxllm.spec("deepseek-v2"))
LITE = tiny(jaxllm.spec("deepseek-v2-lite"))


def mixture(spec=PLAIN, **options):
    return dataclasses.replace(spec, moe=dataclasses.replace(spec.moe, **options))


# Weights that matter, so that a wrong sum shows.
WEIGHTS = BalanceLosses(expert=0.03, device=0.5, communication=0.2)
# Without a dense layer there is less to compile.
BALANCED = mixture(balance=WEIGHTS, first_k_dense=0)
DROPPING = mixture(balance=WEIGHTS, capacity_factor=0.8)


def even_batch(seed=0):
    """A batch whose rows all train as many positions, as packed rows do."""
    return batch(seed, PLAIN).replace(
        loss_weights=np.ones((ROWS, LENGTH), np.float32), segment_ids=np.ones((ROWS, LENGTH), np.int32)
    )


def one_step(spec, data, **options):
    trainer = Trainer(spec, **options)
    with jax.set_mesh(trainer.mesh), jax.default_matmul_precision("highest"):
        _, metrics = trainer.step(trainer.fresh(), trainer.place(data), np.float32(1e-3), None)
    return {name: float(value) for name, value in metrics.items()}


@functools.cache
def expected_step():
    """Metrics of the even batch from whole logits, and the norm of the gradients of their sum."""
    data = even_batch()

    def losses(params):
        output = apply(BALANCED, params, data, train=True)
        entropy = jnp.mean(cross_entropy(output.logits, data.targets, data.loss_weights))
        balance = balance_losses(BALANCED.moe, output.aux.statistics)
        return entropy + balance, (entropy, balance, output.aux.statistics.load)

    (loss, (entropy, balance, load)), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(
        random_params(BALANCED, scale=0.1)
    )
    load = np.asarray(load).sum(axis=1)
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(gradients)))
    return {
        "loss": float(entropy),
        "train_loss": float(loss),
        "balance_loss": float(balance),
        "grad_norm": norm,
        "max_expert_load": (load / load.mean(axis=1, keepdims=True)).max(),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"grad_accum": 2, "remat": "full"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"grad_accum": 4, "remat": "dots"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_adds_the_balance_losses_and_reports_them_apart(options):
    expected = expected_step()
    metrics = one_step(BALANCED, even_batch(), **options)
    assert metrics.pop("trained_tokens") == even_batch().loss_weights.sum()
    assert metrics.keys() == expected.keys()
    assert expected["balance_loss"] > 0.5 and expected["max_expert_load"] > 1.1
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)


def test_a_dense_model_reports_no_balance():
    trainer = Trainer(tiny(jaxllm.spec("llama2-7b")))
    _, metrics = jax.eval_shape(trainer.step, trainer.abstract, even_batch(), np.float32(1e-3), None)
    assert metrics.keys() == {"loss", "trained_tokens", "train_loss", "grad_norm"}


class MeshTrainer(Trainer):
    """A training step on a mesh that may split experts."""

    def __init__(self, sizes, spec, **options):
        super().__init__(spec, **options)
        self.mesh = make_mesh(**{"fsdp": 1} | sizes, devices=jax.devices()[: math.prod(sizes.values())])
        self.abstract = abstract_state(declarations(spec), self.optimizer, self.mesh)
        with jax.set_mesh(self.mesh):
            self.step = make_train_step(self.objective, self.optimizer, self.abstract, self.mesh)


MESHES = [
    {"fsdp": 2, "expert": 2, "tensor": 2},
    pytest.param({"replica": 2, "expert": 4}, marks=pytest.mark.slow),
    pytest.param({"expert": 8}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 4, "expert": 2}, marks=pytest.mark.slow),
]


@functools.cache
def one_device():
    return Trainer(DROPPING, never_dropped=0.3).run(4)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_that_splits_experts_gives_the_losses_of_one_device(sizes):
    state, losses = one_device()
    trainer = MeshTrainer(sizes, DROPPING, never_dropped=0.3, remat="full")
    on_mesh, losses_on_mesh = trainer.run(4)
    np.testing.assert_allclose(losses_on_mesh, losses, rtol=0, atol=1e-5)
    for found, expected in zip(jax.tree.leaves(on_mesh.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(on_mesh.params):
        whole, part = leaf.size, leaf.addressable_shards[0].data.size
        replicas = sizes.get("replica", 1)
        if whole > 3000:
            assert whole * replicas == trainer.mesh.size * part, jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def entropies():
    """Cross-entropies of the same parameters: in a training step with a capacity, and in evaluations."""
    data, params = even_batch(), random_params(PLAIN, scale=0.3)

    @functools.partial(jax.jit, static_argnums=0)
    def entropy(objective, data, step, row_keys):
        totals = objective.totals(data)
        return objective.loss_sums(params, None, data, totals, train=True, step=step, row_keys=row_keys)[1]["entropy"]

    def find(spec, step, never_dropped=0.0):
        keys = jax.random.key_data(jax.random.split(jax.random.key(0), ROWS)) if never_dropped else None
        return float(entropy(language_modeling(spec, never_dropped=never_dropped), data, step, keys))

    return find


def test_training_drops_and_evaluation_does_not(entropies):
    tight, step = mixture(capacity_factor=0.3), jnp.int32(0)
    whole = entropies(PLAIN, step)
    assert abs(entropies(tight, step) / whole - 1) > 1e-4
    assert entropies(tight, None) == pytest.approx(whole, rel=1e-6)
    assert entropies(tight, step, 1.0) == pytest.approx(whole, rel=1e-6)


def test_rows_that_are_never_dropped_are_drawn_anew_in_each_step():
    def draw(step):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 512)
        return np.asarray(draw_rows(jax.random.key_data(keys), 0.1))

    drawn = np.stack([draw(step) for step in range(8)])
    assert abs(drawn.mean() - 0.1) < 0.02
    assert len({row.tobytes() for row in drawn}) == 8
    assert (draw(3) == drawn[3]).all()
    assert language_modeling(DROPPING, never_dropped=0.1).draws
    assert not language_modeling(DROPPING).draws


def test_the_balance_loss_spreads_the_load():
    """Few distinct tokens go to few experts at first."""

    def loads(weight):
        spec = mixture(LITE, balance=BalanceLosses(expert=weight), first_k_dense=0)
        trainer = Trainer(dataclasses.replace(spec, num_layers=1))
        state, loads, data = trainer.fresh(), [], even_batch()
        data = trainer.place(data.replace(tokens=data.tokens % 16, targets=data.targets % 16))
        with jax.set_mesh(trainer.mesh):
            for _ in range(30):
                state, metrics = trainer.step(state, data, np.float32(3e-3), None)
                loads.append(float(metrics["max_expert_load"]))
        return loads

    balanced, free = loads(1.0), loads(0.0)
    assert balanced[0] == free[0] > 2
    assert max(balanced[-5:]) < 1.2 and min(free[-5:]) > 1.8


@pytest.fixture
def config(world, tmp_path):
    """Write a config of a tiny DeepSeek-V2: (spec, **overrides) -> its path."""

    def write(spec=PLAIN, **overrides):
        spec = dataclasses.replace(spec, vocab_size=320)
        (tmp_path / "moe.json").write_text(spec_to_json(spec))
        return world.write_config(tmp_path / "run", model__name=str(tmp_path / "moe.json"), **overrides)

    return write


def test_options_replace_what_the_spec_says_and_null_keeps_it(config):
    spec = mixture(balance=BalanceLosses(expert=0.5, device=0.25))
    given = {"device_balance": 0.125, "per_sequence": False, "capacity_factor": 1.5, "never_dropped": 0.1}
    setup = make_setup(load_config([config(spec, train__moe=given)]))
    balance = BalanceLosses(expert=0.5, device=0.125, per_sequence=False)
    assert setup.objective.forward.spec.moe == dataclasses.replace(spec.moe, balance=balance, capacity_factor=1.5)
    assert setup.objective.never_dropped == 0.1
    assert setup.spec.moe == spec.moe, "the model that is saved has no options of the run"
    kept = make_setup(load_config([config(spec)])).objective
    assert (kept.forward.spec.moe, kept.never_dropped) == (spec.moe, 0.0)


@pytest.mark.parametrize(
    ("spec", "options", "problem"),
    [
        (tiny(jaxllm.spec("llama2-7b")), {}, r"train\.moe: model .*moe\.json has no mixture of experts; expected null"),
        (LITE, {"device_balance": 0.1}, r"train\.moe\.device_balance: the experts of model .* are not in groups"),
        (LITE, {"capacity_factor": 1.0}, r"train\.moe\.capacity_factor: the experts of model .* are not in groups"),
        (PLAIN, {"never_dropped": 0.1}, r"train\.moe\.never_dropped: expected 0 without train\.moe\.capacity_factor"),
        (PLAIN, {"expert_balance": -0.1}, r"train\.moe\.expert_balance: expected >= 0, found -0\.1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_refused(config, spec, options, problem):
    with pytest.raises(InputError, match=problem):
        make_setup(load_config([config(spec, train__moe=options)]))


@pytest.mark.parametrize(("option", "weight"), [(None, 2e-4), (0.0, 0.0), (1e-3, 1e-3)])
def test_the_max_z_loss_is_the_models_own_unless_another_is_given(config, option, weight):
    baichuan = tiny(jaxllm.spec("baichuan2-7b"))
    spec = dataclasses.replace(baichuan, head=dataclasses.replace(baichuan.head, max_z_loss=2e-4))
    assert make_setup(load_config([config(spec, train__max_z_loss=option)])).objective.max_z_loss == weight


@pytest.mark.slow
def test_a_run_records_the_balance(config, start, tmp_path):
    path = config(train__moe={"expert_balance": 0.01, "capacity_factor": 1.0}, train__steps=4, mesh={"expert": 2})
    command = start(tmp_path / "out", "train", "--config", path, devices=2)
    assert command.wait() == 0, command.text
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert all(row["train_loss"] == pytest.approx(row["loss"] + row["balance_loss"], rel=1e-5) for row in rows)
    assert all(row["max_expert_load"] >= 1 for row in rows)
    command = start(tmp_path / "dry", "train", "--config", path, "--dry-run", devices=2)
    assert command.wait() == 0 and " for each token\n" in command.text and "expert 2" in command.text, command.text
