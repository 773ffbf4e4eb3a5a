"""Losses: plain functions on arrays that know no model."""

from jaxllm.losses.lm import chunked_cross_entropy, chunked_loss_sums, cross_entropy, max_z_loss, z_loss

__all__ = ["chunked_cross_entropy", "chunked_loss_sums", "cross_entropy", "max_z_loss", "z_loss"]
