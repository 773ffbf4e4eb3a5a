"""Language-model losses against goldens in float64, and the chunked forms against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.losses import chunked_cross_entropy, chunked_loss_sums, cross_entropy, max_z_loss, z_loss
from jaxllm.losses.lm import weighted_cross_entropy

ROWS, WIDTH, VOCAB = 2, 6, 11


@pytest.fixture(scope="module")
def golden(goldens):
    return np.load(goldens / "sft_ce_packing_zloss.npz")


@pytest.fixture
def exact(golden):
    """Logits, targets with -100 where nothing is trained, and weights, all in float64 mode."""
    with jax.enable_x64(True):
        labels = jnp.asarray(golden["labels_shifted"])
        yield jnp.asarray(golden["logits"]), labels, (labels != -100).astype(jnp.float64)


def assert_exact(found, expected):
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, atol=1e-9, rtol=1e-9)


def test_cross_entropy_golden(golden, exact):
    logits, labels, weights = exact
    losses = jax.jit(cross_entropy)(logits, labels, weights)
    trained = golden["labels_shifted"] != -100
    assert_exact(losses, np.where(trained, golden["per_position_ce"], 0))
    losses, weights, count = np.asarray(losses), np.asarray(weights), int(golden["n_tokens"])
    assert weights.sum() == count
    assert_exact(losses.sum(), golden["loss_token_sum"])
    assert_exact(losses.sum() / count, golden["loss_token_mean"])
    assert_exact((losses.sum(axis=1) / weights.sum(axis=1)).mean(), golden["loss_row_mean"])
    assert abs(losses.sum() / count - golden["hf_float32_loss"]) < 1e-6
    assert abs(losses.sum() / count - golden["WRONG_loss_if_boundary_tokens_trained"]) > 0.1
    gradient = jax.jit(jax.grad(lambda logits: cross_entropy(logits, labels, weights).sum() / count))(logits)
    assert_exact(gradient, golden["dlogits_token_mean"])


def test_targets_and_weights_of_any_dtype():
    logits = np.random.default_rng(0).standard_normal((2, 3, VOCAB))
    targets, weights = np.array([[1, 2, -100], [0, -100, 10]]), np.array([[1, 1, 0], [1, 0, 1]])
    for x64 in (True, False):
        with jax.enable_x64(x64):
            x = jnp.asarray(logits, jnp.float32)
            expected = np.asarray(cross_entropy(x, targets, weights.astype(np.float32)))
            for dtype in (bool, np.int64, np.float64, jnp.bfloat16):
                found = jax.jit(lambda x: cross_entropy(x, targets, weights.astype(dtype)))(x)  # noqa: B023
                assert found.dtype == jnp.float32
                np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_document_mean_is_a_choice_of_weights(golden, exact):
    logits, labels, weights = exact
    documents = golden["segment_ids"] + 100 * np.arange(2)[:, None]
    sizes = {name: int(((documents == name) & (weights == 1)).sum()) for name in np.unique(documents)}
    trained = {name: size for name, size in sizes.items() if size}
    shares = np.array([[trained.get(int(name), 1) for name in row] for row in documents])
    losses = cross_entropy(logits, labels, weights / shares)
    assert_exact(losses.sum() / len(trained), golden["loss_document_mean"])


def test_z_loss_goldens(golden, exact):
    logits, _, weights = exact

    def mean(loss, logits):
        return (loss(logits) * weights).sum() / weights.sum()

    assert_exact(z_loss(logits).mean(), golden["logz_sq_mean_all_positions"])
    for loss, factor, name in ((z_loss, 1e-4, "palm_z"), (max_z_loss, 2e-4, "baichuan_maxz")):
        value, gradient = jax.jit(jax.value_and_grad(lambda logits, loss=loss: mean(loss, logits)))(logits)
        expected = golden["palm_z_loss_1e_4" if loss is z_loss else "baichuan_maxz_2e_4"]
        assert_exact(factor * value, expected)
        assert_exact(factor * gradient, golden[f"{name}_dlogits"])


def test_chunked_goldens(golden, exact):
    """With an identity as output matrix the hidden states are the logits."""
    logits, labels, weights = exact
    chunk, kernel, count = 5, jnp.eye(logits.shape[-1]), int(golden["n_tokens"])
    losses = chunked_cross_entropy(logits, kernel, labels, weights, chunk=chunk)
    assert_exact(losses.sum() / count, golden["loss_token_mean"])
    cases = [
        ({}, "loss_token_mean", {"dlogits_token_mean"}),
        ({"z_loss_weight": 1e-4}, "total_ce_plus_palm_z", {"dlogits_token_mean", "palm_z_dlogits"}),
        ({"max_z_loss_weight": 2e-4}, "total_ce_plus_maxz", {"dlogits_token_mean", "baichuan_maxz_dlogits"}),
    ]
    for extra, total, parts in cases:

        def mean_loss(hidden, kernel, extra=extra):
            loss, entropy = chunked_loss_sums(hidden, kernel, labels, weights, chunk=chunk, **extra)
            return loss / count, entropy / count

        gradient_of = jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)
        (loss, entropy), (of_hidden, of_kernel) = jax.jit(gradient_of)(logits, kernel)
        assert_exact(loss, golden[total])
        assert_exact(entropy, golden["loss_token_mean"])
        expected = sum(golden[part] for part in parts)
        assert_exact(of_hidden, expected)
        assert_exact(of_kernel, np.einsum("btd,btv->dv", golden["logits"], expected))


def random_case(seed, length):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(ROWS, length, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    weights = (rng.uniform(0.1, 2, (ROWS, length)) * (rng.random((ROWS, length)) < 0.7)).astype(np.float32)
    targets = np.where(weights == 0, rng.choice([-100, VOCAB, 2**30]), rng.integers(0, VOCAB, (ROWS, length)))
    return hidden, kernel, targets.astype(np.int32), weights


def total_loss(hidden, kernel, targets, weights, z_weight, max_weight):
    logits = hidden @ kernel
    extra = z_weight * z_loss(logits) + max_weight * max_z_loss(logits)
    return jnp.sum(cross_entropy(logits, targets, weights) + extra * weights)


whole = jax.jit(jax.value_and_grad(total_loss, (0, 1)), static_argnums=(4, 5))
chunked = jax.jit(
    jax.value_and_grad(
        lambda hidden, kernel, targets, weights, chunk, z_weight, max_weight: chunked_loss_sums(
            hidden, kernel, targets, weights, chunk=chunk, z_loss_weight=z_weight, max_z_loss_weight=max_weight
        ),
        (0, 1),
        has_aux=True,
    ),
    static_argnums=(4, 5, 6),
)
by_position = jax.jit(
    jax.value_and_grad(lambda *args: jnp.sum(chunked_cross_entropy(*args[:-1], chunk=args[-1])), (0, 1)),
    static_argnums=4,
)


@pytest.mark.parametrize(
    ("length", "chunk", "extras"),
    [(1, 4, (0.0, 0.0)), (7, 3, (0.1, 0.2)), (6, 2, (0.0, 0.3))],
)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_chunk_gives_the_loss_and_gradients_of_whole_logits(length, chunk, extras, seed):
    case = random_case(seed, length)
    expected, expected_gradients = whole(*case, *extras)
    (loss, entropy), gradients = chunked(*case, chunk, *extras)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    if extras == (0.0, 0.0):
        assert entropy == loss
        alone, alone_gradients = by_position(*case, chunk)
        np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-5)
        for found, wanted in zip(alone_gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_logits_of_positions_without_a_weight_are_not_computed():
    """Weighted positions come first, whatever lies between them, and what they say returns to its place."""
    *case, weights = random_case(3, 13)
    most = (weights != 0).sum(axis=1).max()
    assert 4 < most < 13

    def total(losses, hidden, kernel, targets):
        found = losses(hidden, kernel, targets, weights)
        return jnp.sum(found @ jnp.arange(13.0)), found

    def value(losses):
        return jax.jit(jax.value_and_grad(lambda *arrays: total(losses, *arrays), (0, 1), has_aux=True))(*case)

    def sparse(most):
        return lambda *arrays: weighted_cross_entropy(*arrays, most=jnp.int32(most), chunk=2)

    expected = value(lambda hidden, kernel, *rest: cross_entropy(hidden @ kernel, *rest))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), value(sparse(most)), expected)
    few = np.asarray(value(sparse(2))[0][1])
    first = (np.cumsum(weights != 0, axis=1) <= 2) & (weights != 0)
    np.testing.assert_allclose(few, np.where(first, expected[0][1], 0), rtol=1e-5, atol=1e-6)


def test_bfloat16_states_and_a_float32_kernel_stay_within_rounding():
    hidden, kernel, targets, weights = random_case(1, 6)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    (loss, entropy), (of_hidden, of_kernel) = chunked(hidden, kernel, targets, weights, 2, 0.0, 0.3)
    assert (loss.dtype, entropy.dtype) == (jnp.float32, jnp.float32)
    assert (of_hidden.dtype, of_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = jnp.asarray(kernel, jnp.bfloat16).astype(jnp.float32)
    expected, gradients = whole(hidden.astype(jnp.float32), rounded, targets, weights, 0.0, 0.3)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, wanted in zip((of_hidden, of_kernel), gradients, strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.02 * float(jnp.abs(wanted).max()))


def test_a_temperature_divides_logits_not_rounded_states():
    hidden, kernel, targets, weights = random_case(2, 6)
    hidden, temperature = jnp.asarray(hidden, jnp.bfloat16), 0.7
    rounded = [array.astype(jnp.float32) for array in (hidden, jnp.asarray(kernel, jnp.bfloat16))]
    expected = cross_entropy(jnp.matmul(*rounded) / temperature, targets, weights)
    found = weighted_cross_entropy(
        hidden, kernel, targets, weights, most=jnp.int32(6), chunk=2, temperature=temperature
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    early = weighted_cross_entropy(hidden / temperature, kernel, targets, weights, most=jnp.int32(6), chunk=2)
    assert np.abs(early - expected).max() > 1e-3


def test_logits_never_exist_whole():
    """The largest array of the compiled step is a chunk of logits, not all of them."""
    rows, length, width, vocab, chunk = 4, 256, 8, 1024, 16
    shapes = (
        jax.ShapeDtypeStruct((rows, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
    )
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    memory = chunked.lower(*shapes, ids, weights, chunk, 0.0, 0.0).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * rows * length * vocab * 4


def test_logits_without_weight_may_be_anything():
    logits = np.random.default_rng(0).standard_normal((1, 4, VOCAB)).astype(np.float32)
    targets, weights = np.array([[1, 2, 3, 4]]), np.float32([[1, 0, 1, 0]])
    odd = logits.copy()
    odd[0, 1], odd[0, 3, 0] = np.nan, -np.inf
    differentiate = jax.jit(jax.value_and_grad(lambda logits: cross_entropy(logits, targets, weights).sum()))
    for found, expected in zip(differentiate(odd), differentiate(logits), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_a_target_outside_the_vocabulary_does_not_pass_for_a_loss(wrong):
    hidden, kernel, targets, weights = random_case(2, 7)
    targets, weights = np.array(targets), np.ones_like(weights)
    targets[:] = 1
    targets[0, 2] = wrong
    assert np.isnan(whole(hidden, kernel, targets, weights, 0.1, 0.2)[0])
    assert np.isnan(chunked(hidden, kernel, targets, weights, 3, 0.1, 0.2)[0][0])
