"""Steps on tiny models from states that numpy drew, so that no test compiles an initialisation."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxllm
from jaxllm.config import OptimizerConfig
from jaxllm.nn.model import decay_mask, declarations
from jaxllm.sharding.mesh import MESH_AXES, make_mesh
from jaxllm.sharding.rules import RULES
from jaxllm.spec import tiny
from jaxllm.train.forward import Forward
from jaxllm.train.objectives.language_modeling import LanguageModeling
from jaxllm.train.optimizer import make_optimizer
from jaxllm.train.step import abstract_state, make_eval_step, make_train_step
from jaxllm.train.tuning import FullTuning
from jaxllm.types import Batch
from tests.tiny_models import random_params

SPECS = {"llama": tiny(jaxllm.spec("llama2-70b")), "qwen": tiny(jaxllm.spec("qwen-7b"))}
ROWS, LENGTH = 8, 32


def batch(seed, spec=SPECS["llama"]):
    """Return a host Batch with documents packed unevenly, padding, and positions that are not trained."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, spec.vocab_size, (ROWS, LENGTH), np.int32)
    starts = rng.random((ROWS, LENGTH)) < 0.1
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    slots = np.arange(LENGTH, dtype=np.int32)
    positions = slots - np.maximum.accumulate(np.where(starts, slots, 0), axis=1)
    segments[-1, LENGTH // 2 :] = 0
    trained = (rng.random((ROWS, LENGTH)) < np.linspace(0.1, 1, ROWS)[:, None]) & (segments > 0)
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        loss_weights=trained.astype(np.float32),
        positions=positions.astype(np.int32),
        segment_ids=segments,
    )


def torus_mesh(**sizes):
    """Return a mesh of CPU devices whose FSDP axes are given one by one, as those of a TPU torus."""
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def language_modeling(
    spec, *, compute_dtype="float32", remat="none", chunk=LENGTH, attention_impl=None, staged=False, **options
):
    """Return the objective of a whole model's cross-entropy."""
    forward = Forward(
        spec=spec,
        tuning=FullTuning(spec),
        compute_dtype=jnp.dtype(compute_dtype),
        remat=remat,
        chunk=chunk,
        attention_impl=attention_impl,
        staged=staged,
    )
    return LanguageModeling(forward=forward, **options)


class Trainer:
    """A training step on a mesh of the first devices, and the state it starts from.

    `torus` gives the sizes of mesh axes, and weights are then gathered by hand.
    """

    def __init__(
        self,
        spec=SPECS["llama"],
        *,
        grad_accum=1,
        compute_dtype="float32",
        remat="none",
        optimizer=None,
        torus=None,
        **sizes,
    ):
        if torus is None:
            axes = {"replica": 1, "fsdp": 1, "expert": 1, "tensor": 1}
            axes |= {name: sizes.pop(name) for name in axes if name in sizes}
            self.mesh = make_mesh(**axes, devices=jax.devices()[: np.prod(list(axes.values()))])
        else:
            self.mesh = torus_mesh(**torus)
        self.spec = spec
        self.optimizer = make_optimizer(optimizer or OptimizerConfig(), decay_mask(spec))
        self.objective = language_modeling(
            spec, compute_dtype=compute_dtype, remat=remat, staged=torus is not None, **sizes
        )
        self.abstract = abstract_state(declarations(spec), self.optimizer, self.mesh)
        with jax.set_mesh(self.mesh):
            self.step = make_train_step(self.objective, self.optimizer, self.abstract, self.mesh, grad_accum=grad_accum)

    def fresh(self):
        """Place the same random parameters and zero moments on the mesh."""
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self.abstract)
        host = zeros.replace(params=random_params(self.spec, scale=0.1))
        return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), host, self.abstract)

    def place(self, host):
        """Put a host Batch onto the mesh."""
        return jax.device_put(host, jax.sharding.NamedSharding(self.mesh, RULES.spec(("batch", "length"))))

    def evaluate(self, state):
        """Return the cross-entropy sum of batch 0."""
        with jax.set_mesh(self.mesh), jax.default_matmul_precision("highest"):
            placed = self.place(batch(0, self.spec))
            return float(make_eval_step(self.objective)(state.params, placed, None)[0]["entropy"])

    def run(self, num_steps, learning_rate=1e-3):
        """Return (state, losses) after some steps on batches 0, 1, 2, 0, 1, 2, ..."""
        state, losses = self.fresh(), []
        with jax.set_mesh(self.mesh), jax.default_matmul_precision("highest"):
            for number in range(num_steps):
                placed = self.place(batch(number % 3, self.spec))
                state, metrics = self.step(state, placed, np.float32(learning_rate), None)
                losses.append(float(metrics["loss"]))
        return state, np.array(losses)
