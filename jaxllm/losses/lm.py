"""Language-model losses. Arrays in, unreduced arrays out; all computed in promote_types(input, float32)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxllm.losses.masked import wide


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Return weights * -log softmax(logits)[target], in nats, [B, T].

    Args:
      logits: [B, T, V]. targets: int [B, T]; where the weight is 0 neither they nor the logits are looked at, elsewhere
        one outside the vocabulary makes the loss NaN. weights: [B, T].
    """
    # Logits that do not count may be anything, infinite ones too.
    logits = jnp.where((jnp.asarray(weights) != 0)[..., None], wide(logits), 0)
    targets = _counted(targets, weights, logits.shape[-1])
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked) * jnp.asarray(weights, logits.dtype)


def z_loss(logits: jax.Array) -> jax.Array:
    """Return logsumexp(logits)^2, [B, T] (arXiv:2204.02311 section 5, there times 1e-4)."""
    return jnp.square(jax.nn.logsumexp(wide(logits), axis=-1))


def max_z_loss(logits: jax.Array) -> jax.Array:
    """Return max(logits)^2, [B, T] (Baichuan 2, arXiv:2309.10305 section 2.5, there times 2e-4)."""
    return jnp.square(jnp.max(wide(logits), axis=-1))


def chunked_cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, *, chunk: int
) -> jax.Array:
    """Return `cross_entropy(hidden @ kernel, targets, weights)` [B, T] without ever holding all logits.

    The backward pass computes each chunk's logits again; where only the weighted sum is wanted,
    `chunked_loss_sums` computes them once.

    Args:
      hidden: [B, T, D]. kernel: [D, V].
      chunk: positions of each row whose logits exist at once; T need not be a multiple.
    """

    @jax.checkpoint
    def one_chunk(piece: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x, target, weight = piece
        return cross_entropy(_logits(x, kernel), target, weight)

    pieces = tuple(_split(array, chunk) for array in (hidden, targets, weights))
    return _join(jax.lax.map(one_chunk, pieces))[:, : hidden.shape[1]]


def weighted_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    most: jax.Array,
    chunk: int,
    temperature: float = 1.0,
) -> jax.Array:
    """Return `chunked_cross_entropy` [B, T], computing logits of little more than the positions that have a weight.

    Those come first in their row, and chunks without any are skipped.

    Args:
      most: int [], as many positions of a row as have a weight other than 0, or more; the same on all devices, as a
        chunk may hold collectives.
      hidden, kernel, targets, weights, chunk: as for `chunked_cross_entropy`.
      temperature: logits are divided by it, in their own dtype.
    """
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    pieces = tuple(_split(_reordered(array, order), chunk) for array in (hidden, targets, weights))

    def losses(x: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
        logits = _logits(x, kernel)
        return cross_entropy(logits if temperature == 1 else logits / temperature, target, weight)

    def nothing(x: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
        del target
        return jnp.zeros(weight.shape, wide(x[:0]).dtype)

    @jax.checkpoint
    def one_chunk(piece: tuple[jax.Array, ...]) -> jax.Array:
        first, *arrays = piece
        return jax.lax.cond(first < most, losses, nothing, *arrays)

    starts = chunk * jnp.arange(pieces[0].shape[0])
    found = _join(jax.lax.map(one_chunk, (starts, *pieces)))[:, : hidden.shape[1]]
    return _reordered(found, jnp.argsort(order, axis=1))


def chunked_loss_sums(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
    z_loss_weight: float = 0.0,
    max_z_loss_weight: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Return (sum of the training loss, sum of the cross-entropy alone) over all weighted positions.

    The training loss of a position is weight * (cross-entropy + z_loss_weight * z_loss + max_z_loss_weight *
    max_z_loss). Only the first result is differentiable. Its gradients are computed chunk by chunk in the forward
    pass, so logits are computed once and never held whole: since the result is one sum, the cotangent that arrives
    later is only a factor.

    Args:
      hidden: [B, T, D]. kernel: [D, V]. targets, weights: [B, T]. chunk: positions of each row at once.
    """
    return _loss_sums(hidden, kernel, targets, weights, chunk, z_loss_weight, max_z_loss_weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss_sums(hidden, kernel, targets, weights, chunk, z_loss_weight, max_z_loss_weight):
    def add_chunk(sums, piece):
        losses, _ = _chunk_losses(*piece, kernel, z_loss_weight, max_z_loss_weight)
        return (sums[0] + losses[0], sums[1] + losses[1]), None

    zero = jnp.zeros((), wide(hidden[:0]).dtype)
    pieces = tuple(_split(array, chunk) for array in (hidden, targets, weights))
    return jax.lax.scan(add_chunk, (zero, zero), pieces)[0]


def _loss_sums_forward(hidden, kernel, targets, weights, chunk, z_loss_weight, max_z_loss_weight):
    dtype = wide(hidden[:0]).dtype

    def add_chunk(carry, piece):
        sums, kernel_gradient = carry
        losses, logits_gradient = _chunk_losses(*piece, kernel, z_loss_weight, max_z_loss_weight)
        x = piece[0]
        logits_gradient = logits_gradient.astype(x.dtype)
        flat_gradient = logits_gradient.reshape(-1, logits_gradient.shape[-1])
        hidden_gradient = (flat_gradient @ kernel.astype(x.dtype).T).reshape(x.shape)
        kernel_gradient += jnp.matmul(x.reshape(-1, x.shape[-1]).T, flat_gradient, preferred_element_type=dtype)
        return ((sums[0] + losses[0], sums[1] + losses[1]), kernel_gradient), hidden_gradient

    zero = jnp.zeros((), dtype)
    pieces = tuple(_split(array, chunk) for array in (hidden, targets, weights))
    start = ((zero, zero), jnp.zeros(kernel.shape, dtype))
    (sums, kernel_gradient), hidden_gradient = jax.lax.scan(add_chunk, start, pieces)
    return sums, (_join(hidden_gradient)[:, : hidden.shape[1]], kernel_gradient.astype(kernel.dtype))


def _loss_sums_backward(chunk, z_loss_weight, max_z_loss_weight, gradients, cotangents):
    factor = cotangents[0]
    return *(gradient * factor.astype(gradient.dtype) for gradient in gradients), None, None


_loss_sums.defvjp(_loss_sums_forward, _loss_sums_backward)


def _chunk_losses(x, targets, weights, kernel, z_loss_weight, max_z_loss_weight):
    """Return ((training loss sum, cross-entropy sum), gradient of the first with respect to the logits)."""
    logits = _logits(x, kernel)
    weights = weights.astype(logits.dtype)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    targets = _counted(targets, weights, logits.shape[-1])
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    entropy_sum = loss_sum = jnp.sum(weights * (log_z - picked))
    softmax_factor = weights
    if z_loss_weight:
        loss_sum += z_loss_weight * jnp.sum(weights * jnp.square(log_z))
        softmax_factor = softmax_factor * (1 + 2 * z_loss_weight * log_z)
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    gradient = jnp.exp(logits - log_z[..., None]) * softmax_factor[..., None]
    gradient -= jnp.where(vocabulary == targets[..., None], weights[..., None], 0)
    if max_z_loss_weight:
        largest = jnp.max(logits, axis=-1)
        loss_sum += max_z_loss_weight * jnp.sum(weights * jnp.square(largest))
        at_largest = vocabulary == jnp.argmax(logits, axis=-1)[..., None]
        gradient += jnp.where(at_largest, (2 * max_z_loss_weight * weights * largest)[..., None], 0)
    return (loss_sum, entropy_sum), gradient


def _counted(targets: jax.Array, weights: jax.Array, vocab_size: int) -> jax.Array:
    """Return 0 where the weight is 0, and elsewhere no negative ids: as indices they would count from the end."""
    targets = jnp.asarray(targets)
    return jnp.where(weights == 0, 0, jnp.where(targets < 0, vocab_size, targets))


def _logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(flat, kernel.astype(x.dtype), preferred_element_type=dtype).reshape(*x.shape[:-1], -1)


def _reordered(array: jax.Array, order: jax.Array) -> jax.Array:
    """Return the positions [B, T, ...] of each row in another order, int [B, T]."""
    return jnp.take_along_axis(array, order.reshape(*order.shape, *[1] * (array.ndim - 2)), axis=1)


def _split(array: jax.Array, chunk: int) -> jax.Array:
    """Cut [B, T, ...] along T into [chunks, B, chunk, ...], zero-padded at the end."""
    batch, length, *rest = array.shape
    num_chunks = -(-length // chunk)
    padding = [(0, 0), (0, num_chunks * chunk - length)] + [(0, 0)] * len(rest)
    return jnp.moveaxis(jnp.pad(array, padding).reshape(batch, num_chunks, chunk, *rest), 1, 0)


def _join(pieces: jax.Array) -> jax.Array:
    """Undo `_split`, except for its padding."""
    num_chunks, batch, chunk, *rest = pieces.shape
    return jnp.moveaxis(pieces, 0, 1).reshape(batch, num_chunks * chunk, *rest)
