"""GRPO's advantages and losses against goldens of its variants, and their laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.losses import (
    group_advantages,
    grpo_loss,
    grpo_terms,
    grpo_weights,
    k1_kl,
    k2_kl,
    k3_kl,
    process_advantages,
)
from tests.losses.loss_goldens import Case, Reads, check

VARIANTS = {
    "grpo_paper_b004_e02": {"kl_coef": 0.04},
    "grpo_b0_e02": {},
    "bnpo_b004": {"kl_coef": 0.04, "reduction": "token_mean"},
    "dr_grpo_b0": {"reduction": "fixed"},
    "dapo_e02_028": {"clip_high": 0.28, "reduction": "token_mean"},
    "dapo_b004_e02_028": {"clip_high": 0.28, "kl_coef": 0.04, "reduction": "token_mean"},
    "gspo_seq_e02": {"ratio": "sequence"},
}
DEFAULTS = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0}


@pytest.fixture(scope="module")
def golden(goldens):
    return Reads(goldens / "losses/grpo.npz")


def loss_of(golden, **options):
    """Return a function of (policy, old policy, reference, advantages), and the log-probabilities of the golden."""
    mask, fixed = golden["mask"], int(golden["max_completion_length_for_dr_grpo"])
    options = DEFAULTS | ({"max_length": fixed} if options.get("reduction") == "fixed" else {}) | options
    arrays = [golden[f"{name}_logps"] for name in ("new", "old", "ref")]
    return lambda new, old, ref, advantages: grpo_loss(new, old, ref, advantages, mask, **options), arrays


def test_variants(golden):
    cases = {}
    for name, options in VARIANTS.items():
        loss, logps = loss_of(golden, **options)
        advantages = golden["adv_dr_grpo_no_std" if name == "dr_grpo_b0" else "adv_trl_samplestd_eps1e_4"]
        gradients = (golden[f"{name}_dlogps"],)
        cases[name] = Case(loss, [*logps, advantages], golden[f"{name}_loss"], gradients)
    paper = [*logps, golden["adv_paper_popstd"]]
    cases["population"] = Case(loss_of(golden, kl_coef=0.04)[0], paper, golden["grpo_popstd_b004_e02_loss"])
    whole = loss_of(golden, kl_coef=0.04, ratio="whole")[0]
    cases["DeepSeek-V2 eq. 32"] = Case(whole, paper, golden["dsv2_eq32_seqratio_loss_b004_e02"])
    check(cases)


@pytest.mark.parametrize("name", VARIANTS)
def test_statistics(golden, name):
    options = DEFAULTS | VARIANTS[name]
    options.pop("reduction", None)
    logps, mask = loss_of(golden)[1], golden["mask"]
    advantages = golden["adv_dr_grpo_no_std" if name == "dr_grpo_b0" else "adv_trl_samplestd_eps1e_4"]
    terms = jax.jit(lambda arrays: grpo_terms(*arrays, mask, **options))([*logps, advantages])
    expected = {
        "clip_ratio_low_mean": terms.clipped_low,
        "clip_ratio_high_mean": terms.clipped_high,
        "clip_ratio_region_mean": terms.clipped_low | terms.clipped_high,
    }
    if options["kl_coef"]:
        expected["kl"] = terms.kl
    prefix = f"{name}_metric_"
    assert {key.removeprefix(prefix) for key in golden if key.startswith(prefix)} == set(expected)
    for key, values in expected.items():
        assert abs((np.asarray(values) * mask).sum() / mask.sum() - golden[f"{prefix}{key}"]) < 1e-6, key


def test_advantages_and_divergences(golden):
    size, rewards = int(golden["group_size"]), (golden["rewards"],)
    logps = golden["new_logps"], golden["ref_logps"]
    cases = {name: Case(kl, logps, golden[f"{name}_kl"]) for name, kl in (("k1", k1_kl), ("k2", k2_kl), ("k3", k3_kl))}
    for name, options in {
        "adv_paper_popstd": {},
        "adv_trl_samplestd_eps1e_4": {"std": "sample", "eps": 1e-4},
        "adv_dr_grpo_no_std": {"std": None},
    }.items():
        advantages = functools.partial(group_advantages, group_size=size, **options)
        cases[name] = Case(advantages, rewards, golden[name])
    check(cases)


def test_process_advantages(golden):
    rewards, ends = golden["process_step_rewards"], golden["process_step_end_index"]
    lengths, expected = golden["process_completion_len"], golden["process_adv"]
    mask = np.arange(expected.shape[1]) < lengths[:, None]
    # A step more, which no answer has, changes nothing, whatever reward stands there.
    more = [np.concatenate([array, np.full((len(array), 1), fill)], 1) for array, fill in ((rewards, 9.9), (ends, -1))]
    size, normalized = len(rewards), golden["process_norm_rewards_popstd"]
    check(
        {
            "all": Case(lambda rewards: process_advantages(rewards, ends, mask, size), (rewards,), expected),
            "a step more": Case(lambda rewards: process_advantages(rewards, more[1], mask, size), more[:1], expected),
            "normalized": Case(lambda x: group_advantages(x, x.size), (rewards.ravel(),), normalized.ravel()),
        }
    )


def test_nothing_of_the_golden_is_left_out(golden):
    shared = {"group_size", "rewards", "mask", "max_completion_length_for_dr_grpo"}
    shared |= {f"{name}_logps" for name in ("old", "new", "ref")} | {"k1_kl", "k2_kl", "k3_kl"}
    tested = (*(f"{name}_" for name in VARIANTS), "adv_", "process_", "grpo_popstd", "dsv2_eq32")
    assert {key for key in golden if not key.startswith(tested)} == shared


advantages_of_four = jax.jit(lambda rewards, std: group_advantages(rewards, 4, std=std), static_argnums=1)


@given(
    st.lists(st.integers(-64, 64), min_size=12, max_size=12),
    st.sampled_from(["population", "sample", None]),
    st.sampled_from([0.5, 2.0, 4.0]),
    st.integers(-64, 64),
)
def test_advantages_are_centered_within_groups_and_know_no_offset(rewards, std, scale, offset):
    rewards = np.asarray(rewards, np.float32) / 4
    found = np.asarray(advantages_of_four(rewards, std))
    moved = advantages_of_four(scale * rewards + offset, std)
    np.testing.assert_allclose(found.reshape(-1, 4).sum(1), 0, atol=1e-4)
    np.testing.assert_allclose(moved, found * (scale if std is None else 1), atol=1e-4)
    for group, advantages in zip(rewards.reshape(-1, 4), found.reshape(-1, 4), strict=True):
        if np.ptp(group) == 0:
            assert (advantages == 0).all()
        elif std:
            assert abs(advantages.std(ddof=int(std == "sample")) - 1) < 1e-4
            assert (np.argsort(group, kind="stable") == np.argsort(advantages, kind="stable")).all()


@pytest.mark.parametrize("value", [0.1, 1e6, -3.3])
@pytest.mark.parametrize("std", ["population", "sample", None])
def test_equal_rewards_give_no_advantage_in_float32(value, std):
    np.testing.assert_array_equal(advantages_of_four(np.full(8, value, np.float32), std), 0)


def test_rewards_may_be_integers():
    rewards = np.array([1, 0, 0, 1, 1, 0, 0, 0])
    with jax.enable_x64(True):
        found = group_advantages(rewards, 4)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found[4:], np.array([3, -1, -1, -1]) / 3**0.5, rtol=1e-12)
    assert group_advantages(rewards, 4).dtype == jnp.float32


@functools.partial(jax.jit, static_argnames="reduction")
def loss_and_sums(arrays, mask, reduction):
    """Return the loss, and what a step adds up over microbatches."""
    new, old, ref, advantages = arrays
    options = DEFAULTS | {"kl_coef": 0.04}
    loss = grpo_loss(new, old, ref, advantages, mask, **options, reduction=reduction, max_length=12)
    terms = grpo_terms(new, old, ref, advantages, mask, **options)
    weights, denominators = grpo_weights(mask, reduction=reduction, max_length=12)
    return loss, jnp.sum(weights * terms.losses), jnp.sum(denominators)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "fixed"])
def test_microbatches_add_up(golden, reduction):
    """Sums over parts of the rows, over the sums of their denominators, are the loss of all rows."""
    arrays = [golden[f"{name}_logps"].astype(np.float32) for name in ("new", "old", "ref")]
    arrays.append(golden["adv_paper_popstd"].astype(np.float32))
    mask = golden["mask"].copy()
    mask[5] = 0
    total = loss_and_sums(arrays, mask, reduction)[0]
    halves = [
        loss_and_sums([array[rows] for array in arrays], mask[rows], reduction) for rows in np.split(np.arange(12), 2)
    ]
    np.testing.assert_allclose(sum(half[1] for half in halves) / sum(half[2] for half in halves), total, rtol=1e-5)
    others = np.arange(12) != 5
    kept = loss_and_sums([array[others] for array in arrays], mask[others], reduction)[0]
    # A mean over answers counts the one that has no tokens, as 0.
    share = 1 if reduction == "token_mean" else 11 / 12
    np.testing.assert_allclose(kept * share, total, rtol=1e-5)


def test_advantages_may_stand_at_each_token(golden):
    loss, logps = loss_of(golden)
    advantages = golden["adv_paper_popstd"]
    spread = np.where(golden["mask"], advantages[:, None], np.nan)
    loss = jax.jit(loss)
    np.testing.assert_allclose(loss(*logps, advantages), loss(*logps, spread), rtol=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence", "whole"])
def test_padding_is_not_read(ratio):
    mask, advantages = jnp.array([[1, 1, 0]]), jnp.array([1.0])
    logps, old, ref = (
        jnp.array([[-1.0, -2.0, 0.0]]),
        jnp.array([[-1.1, -1.5, -1e4]]),
        jnp.array([[-1.0, -3.0, jnp.inf]]),
    )
    options = DEFAULTS | {"kl_coef": 0.1, "ratio": ratio}
    loss_and_gradient = jax.jit(
        jax.value_and_grad(lambda logps: grpo_loss(logps, old, ref, advantages, mask, **options))
    )
    loss, gradient = loss_and_gradient(logps)
    assert np.isfinite(loss) and np.isfinite(gradient).all() and gradient[0, 2] == 0


def test_wrong_arguments():
    ones, mask = jnp.ones((4, 3)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match="group_size is 3; expected a divisor of the 4 rows"):
        group_advantages(jnp.ones(4), 3)
    with pytest.raises(ValueError, match="std is 'none'"):
        group_advantages(jnp.ones(4), 2, std="none")
    for wrong in ({"kl_coef": 0.1}, {"ratio": "row"}, {"reduction": "fixed"}, {"reduction": "mean"}):
        with pytest.raises(ValueError, match=r"expected|needs max_length"):
            grpo_loss(ones, ones, None, jnp.ones(4), mask, **(DEFAULTS | wrong))
