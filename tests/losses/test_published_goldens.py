"""What a family does beside its losses, through the model's own code: Baichuan 2's head, GLM-130B's embedding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.losses import chunked_loss_sums
from jaxllm.nn import model
from jaxllm.nn.decoder import head_kernel
from jaxllm.spec import Head
from tests.losses.loss_goldens import Case, Reads, check
from tests.tiny_models import LLAMA, make_batch, random_params

NORMALIZED = dataclasses.replace(LLAMA, head=Head(normalized=True))


def test_normalized_head_with_max_z_loss(goldens):
    golden = Reads(goldens / "losses/normhead_maxz.npz")
    labels = golden["labels"].astype(np.int32)[None]
    ones = np.ones(labels.shape, np.float32)

    def kernel_of(weight):
        return head_kernel(NORMALIZED, {"head": weight.T})

    def loss(hidden, weight):
        sums = chunked_loss_sums(hidden[None], kernel_of(weight), labels, ones, chunk=4, max_z_loss_weight=2e-4)
        return sums[0] / labels.size

    arrays = golden["hidden"], golden["weight"]
    gradients = golden["d_hidden"], golden["d_weight"]
    logits = Case(lambda hidden, weight: hidden @ kernel_of(weight), arrays, golden["logits"])
    check({"logits": logits, "loss": Case(loss, arrays, golden["loss"], gradients)})
    assert golden.unread() == []


def test_embedding_gradient_shrink(goldens):
    golden = Reads(goldens / "losses/glm130b_embedding_gradient_shrink.npz")
    table, upstream = golden["embedding"], golden["upstream"]
    vocab_size, hidden_size = table.shape
    spec = dataclasses.replace(LLAMA, vocab_size=vocab_size, hidden_size=hidden_size, num_layers=1)
    params, alpha = random_params(spec), golden["alpha"]
    batch = make_batch(np.arange(vocab_size)[None])

    def embedded(table, upstream):
        cast = jax.tree.map(lambda array: jnp.asarray(array, table.dtype), params) | {"embedding": table}
        scale = jnp.asarray(alpha, table.dtype)
        output = model.apply(spec, cast, batch, return_hidden=True, return_logits=False, embedding_gradient_scale=scale)
        return output.hidden[0, 0]

    def product(table, upstream):
        return jnp.sum(embedded(table, upstream) * upstream)

    arrays, gradients = (table, upstream), (golden["d_embedding"],)
    forward = Case(embedded, arrays, golden["forward"])
    check({"forward": forward, "gradient": Case(product, arrays, (table * upstream).sum(), gradients)})
    assert golden.unread() == []
