"""Preference losses against goldens: from sequence log-probabilities and, end to end, from logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import cross_entropy, dpo_loss, implicit_rewards, sequence_logps
from tests.losses.loss_goldens import Case, Reads, check

FUNCTIONS = {
    "sigmoid_b01": {"beta": 0.1},
    "sigmoid_b01_ls01": {"beta": 0.1, "label_smoothing": 0.1},
    "sigmoid_b03_ls02": {"beta": 0.3, "label_smoothing": 0.2},
    "sigmoid_b01_reffree": {"beta": 0.1, "reference_free": True},
    "sigmoid_b01_ls01_reffree": {"beta": 0.1, "label_smoothing": 0.1, "reference_free": True},
    "robust_b01_ls01": {"beta": 0.1, "label_smoothing": 0.1, "variant": "robust"},
    "hinge_b01": {"beta": 0.1, "variant": "hinge"},
    "ipo_b01_sumlogps": {"beta": 0.1, "variant": "ipo"},
    "ipo_b01_avglogps": {"beta": 0.1, "variant": "ipo"},
}

# Variant and options, whether log-probabilities are means over tokens, weight of the cross-entropy of chosen answers.
TRAINERS = {
    "sigmoid": ({}, False, 0.0),
    "sigmoid_b05": ({}, False, 0.0),
    "ipo": ({"variant": "ipo"}, True, 0.0),
    "hinge": ({"variant": "hinge"}, False, 0.0),
    "robust_ls01": ({"variant": "robust", "label_smoothing": 0.1}, False, 0.0),
    "sigmoid_plus_sft": ({}, False, 0.2),
    "sigmoid_norm": ({"variant": "sigmoid_norm"}, True, 0.0),
}


def test_functions(goldens):
    golden = Reads(goldens / "losses/dpo_function.npz")
    arrays = [golden[key] for key in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")]
    lengths = [golden[key].astype(float) for key in ("len_chosen", "len_rejected")] * 2
    cases = {}
    for name, options in FUNCTIONS.items():
        divisors = lengths if name == "ipo_b01_avglogps" else [np.ones_like(length) for length in lengths]

        def losses(*arrays, divisors=divisors, options=options):
            logps = (array / jnp.asarray(divisor, array.dtype) for array, divisor in zip(arrays, divisors, strict=True))
            return dpo_loss(*logps, **options)

        cases[name] = Case(losses, arrays, golden[f"{name}_losses"])
        gradients = [golden[f"{name}_d_policy_{side}_of_mean"] for side in ("chosen", "rejected")]
        mean = golden[f"{name}_mean"]
        cases[f"{name} mean"] = Case(lambda *arrays, losses=losses: losses(*arrays).mean(), arrays, mean, gradients)
        for first, side in enumerate(("chosen", "rejected")):
            sides = [array / divisor for array, divisor in zip(arrays, divisors, strict=True)][first::2]
            rewards = functools.partial(implicit_rewards, beta=options["beta"])
            cases[f"{name} {side}"] = Case(rewards, sides, golden[f"{name}_{side}_rewards"])
    check(cases)
    assert golden.unread() == []


def test_from_logits(goldens):
    """Rows are the chosen answers and then the rejected ones; the logits of a token predict the next."""
    golden = Reads(goldens / "losses/dpo_trl.npz")
    both = golden["logits"], golden["ref_logits"]
    targets, mask = golden["input_ids"][:, 1:].astype(np.int32), golden["completion_mask"][:, 1:] != 0
    num_chosen = mask[: len(mask) // 2].sum()

    def token_logps(logits):
        return -cross_entropy(logits[:, :-1], targets, mask)

    def pairs(logps, *, mean=False):
        return jnp.split(sequence_logps(logps, mask, mean=mean), 2)

    cases = {}
    for prefix, logits in zip(("policy", "ref"), both, strict=True):
        cases[prefix] = Case(token_logps, (logits,), golden[f"{prefix}_token_logps"])
        for index, side in enumerate(("chosen", "rejected")):
            sums = golden[f"{prefix}_token_logps"]
            expected = golden[f"{prefix}_{side}_logps"]
            cases[f"{prefix} {side}"] = Case(lambda logps, index=index: pairs(logps)[index], (sums,), expected)
    for name, (options, mean, sft_weight) in TRAINERS.items():
        beta = float(golden[f"{name}_beta"])

        def loss(logits, ref_logits, beta=beta, options=options, mean=mean, sft_weight=sft_weight):
            logps = token_logps(logits)
            sides = pairs(logps, mean=mean), pairs(token_logps(ref_logits), mean=mean)
            losses = dpo_loss(*sides[0], *sides[1], beta=beta, **options)
            return losses.mean() - sft_weight * logps[: len(mask) // 2].sum() / num_chosen

        cases[name] = Case(loss, both, golden[f"{name}_loss"], (golden[f"{name}_dlogits"],))
        chosen, rejected = (
            beta * (golden[f"policy_{side}_logps"] - golden[f"ref_{side}_logps"]) for side in ("chosen", "rejected")
        )
        metrics = {
            "chosen": chosen,
            "rejected": rejected,
            "accuracies": chosen > rejected,
            "margins": chosen - rejected,
        }
        for key, values in metrics.items():
            assert abs(values.mean() - golden[f"{name}_metric_rewards_{key}"]) < 1e-6, (name, key)
    check(cases)
    assert golden.unread() == []


def test_reference_free_reads_no_reference():
    ones = jnp.ones(3)
    nothing = jnp.full(3, jnp.nan)
    losses = dpo_loss(ones, 2 * ones, nothing, nothing, beta=0.5, reference_free=True)
    np.testing.assert_allclose(losses, np.log1p(np.exp(0.5)), rtol=1e-6)


def test_losses_stay_finite_far_away():
    logps = jnp.array([-4000.0, 4000.0])
    for variant in ("sigmoid", "robust", "hinge", "ipo"):
        gradient = jax.grad(lambda x, variant=variant: dpo_loss(x, -x, x * 0, x * 0, beta=1.0, variant=variant).sum())
        assert np.isfinite(jax.jit(gradient)(logps)).all(), variant


@pytest.mark.parametrize("options", [{"variant": "kto"}, {"variant": "ipo", "label_smoothing": 0.1}])
def test_wrong_options(options):
    with pytest.raises(ValueError, match="expected"):
        dpo_loss(*[jnp.ones(1)] * 4, beta=0.1, **options)
