"""Losses of reward models against goldens, values and gradients, and at scores far apart."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.losses import LLAMA2_MARGINS, center_loss, focal_ranking_loss, log_barrier, ranking_loss
from tests.losses.loss_goldens import Case, Reads, check

LABELS = ["negligible", "slightly", "better", "significantly"]


def test_ranking_goldens(goldens):
    golden = Reads(goldens / "losses/reward_ranking.npz")
    scores = golden["r_chosen"], golden["r_rejected"]
    losses = {
        "nomargin": lambda chosen, rejected: ranking_loss(chosen, rejected).mean(),
        "center001": lambda chosen, rejected: (
            ranking_loss(chosen, rejected) + 0.01 * center_loss(chosen, rejected)
        ).mean(),
    }
    for name in ("small", "large"):
        margin = np.array([LLAMA2_MARGINS[name][LABELS[level]] for level in golden["level"]])
        np.testing.assert_allclose(margin, golden[f"margin_{name}"], rtol=1e-15)
        losses[name] = lambda chosen, rejected, margin=margin: ranking_loss(
            chosen, rejected, jnp.asarray(margin, chosen.dtype)
        ).mean()
    cases = {}
    for name, loss in losses.items():
        gradients = golden[f"{name}_d_chosen"], golden[f"{name}_d_rejected"]
        cases[name] = Case(loss, scores, golden[f"{name}_loss"], gradients)
        assert abs((scores[0] > scores[1]).mean() - golden[f"{name}_accuracy"]) < 1e-6
    check(cases)
    assert golden.unread() == []


def test_focal_goldens(goldens):
    golden = Reads(goldens / "losses/focal_ranking.npz")
    scores = golden["r_chosen"], golden["r_rejected"]
    gamma, weight = float(golden["gamma"]), float(golden["lam"])

    def total(chosen, rejected, share=1.0):
        barrier = log_barrier(chosen) + log_barrier(rejected)
        return (focal_ranking_loss(chosen, rejected, gamma) + weight * share * barrier).mean()

    rank, slope = golden["rank_loss"], golden["d_rank_d_rchosen_each"]
    gradients = golden["d_total_sum_d_chosen"], golden["d_total_sum_d_rejected"]
    mean = golden["total_penalty_mean_over_pair"]
    cases = {
        "rank": Case(focal_ranking_loss, scores, rank),
        "rank sum": Case(lambda *scores: focal_ranking_loss(*scores).sum(), scores, rank.sum(), (slope, -slope)),
        "gamma 0": Case(lambda *scores: focal_ranking_loss(*scores, 0), scores, golden["gamma0_rank_loss"]),
        "gamma 1": Case(lambda *scores: focal_ranking_loss(*scores, 1), scores, golden["gamma1_rank_loss"]),
        "chosen": Case(log_barrier, scores[:1], golden["penalty_chosen"]),
        "rejected": Case(log_barrier, scores[1:], golden["penalty_rejected"]),
        "total": Case(total, scores, golden["total_penalty_sum_over_pair"], gradients),
        "mean over a pair": Case(lambda *scores: total(*scores, share=0.5), scores, mean),
    }
    check(cases)
    assert golden.unread() == []


@jax.jit
def focal_and_slope(difference, gamma):
    return jax.value_and_grad(lambda x: focal_ranking_loss(x, jnp.zeros_like(x), gamma))(difference)


@given(st.floats(-200, 200), st.floats(0, 4))
def test_focal_loss_fades_and_stays_finite(difference, gamma):
    value, slope = focal_and_slope(jnp.float32(difference), jnp.float32(gamma))
    plain = np.logaddexp(0, -difference)
    assert 0 <= value <= plain * (1 + 1e-5) and jnp.isfinite(slope) and slope <= 0
    if difference <= 0:
        np.testing.assert_allclose(value, plain, rtol=1e-5)


def test_barrier_pushes_back_from_beyond_its_bound():
    scores = jnp.array([-7.0, -4.9999, 0.0, 4.9999, 7.0])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(log_barrier)))(scores)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(np.sign(slopes), [-1, -1, 0, 1, 1])
    assert values[0] > values[1] > values[2] < values[3] < values[4]
    np.testing.assert_allclose(log_barrier(jnp.float32(1.5), 2.0), -np.log(3.5 * 0.5), rtol=1e-6)


def test_barrier_is_the_formula_up_to_close_to_its_bound():
    for score in (4.995, -4.999):
        np.testing.assert_allclose(log_barrier(jnp.float32(score)), -np.log(25 - score**2), rtol=1e-4)
