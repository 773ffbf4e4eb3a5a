"""Losses of reward models against goldens, values and gradients, and at scores far apart."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.losses import LLAMA2_MARGINS, center_loss, focal_ranking_loss, log_barrier, ranking_loss
from tests.losses.loss_goldens import Reads, check_gradients, check_values

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
    for name, loss in losses.items():
        gradients = golden[f"{name}_d_chosen"], golden[f"{name}_d_rejected"]
        check_gradients(loss, scores, golden[f"{name}_loss"], gradients, name)
        assert abs((scores[0] > scores[1]).mean() - golden[f"{name}_accuracy"]) < 1e-6
    assert golden.unread() == []


def test_focal_goldens(goldens):
    golden = Reads(goldens / "losses/focal_ranking.npz")
    scores = golden["r_chosen"], golden["r_rejected"]
    gamma, weight = float(golden["gamma"]), float(golden["lam"])

    def total(chosen, rejected, share=1.0):
        barrier = log_barrier(chosen) + log_barrier(rejected)
        return (focal_ranking_loss(chosen, rejected, gamma) + weight * share * barrier).mean()

    rank = golden["rank_loss"]
    check_values(focal_ranking_loss, scores, rank, "rank_loss")
    gradient = golden["d_rank_d_rchosen_each"]
    check_gradients(lambda *scores: focal_ranking_loss(*scores).sum(), scores, rank.sum(), (gradient, -gradient), "")
    for power in (0, 1):
        check_values(
            lambda *scores, power=power: focal_ranking_loss(*scores, power),
            scores,
            golden[f"gamma{power}_rank_loss"],
            f"gamma {power}",
        )
    for score, name in zip(scores, ("chosen", "rejected"), strict=True):
        check_values(log_barrier, (score,), golden[f"penalty_{name}"], name)
    gradients = golden["d_total_sum_d_chosen"], golden["d_total_sum_d_rejected"]
    check_gradients(total, scores, golden["total_penalty_sum_over_pair"], gradients, "total")
    mean = golden["total_penalty_mean_over_pair"]
    check_values(lambda *scores: total(*scores, share=0.5), scores, mean, "mean over a pair")
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
    values, slopes = jax.vmap(jax.value_and_grad(log_barrier))(jnp.array([-7.0, -4.9999, 0.0, 4.9999, 7.0]))
    assert jnp.isfinite(values).all()
    assert (jnp.sign(slopes) == jnp.array([-1, -1, 0, 1, 1])).all()
    assert values[0] > values[1] > values[2] < values[3] < values[4]
    np.testing.assert_allclose(log_barrier(jnp.float32(1.5), 2.0), -np.log(3.5 * 0.5), rtol=1e-6)
