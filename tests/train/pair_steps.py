"""Steps of the preference stages on tiny models, without files: pairs of random tokens in rows of either kind."""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding

import jaxllm
from jaxllm.config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from jaxllm.data.example_rows import Item, PreferenceRows
from jaxllm.data.examples import Places, Tokens
from jaxllm.data.packing import stack_rows
from jaxllm.nn.param import initial_values
from jaxllm.sharding.mesh import make_mesh
from jaxllm.sharding.rules import RULES
from jaxllm.spec import spec_to_json, tiny
from jaxllm.tokenizers.chat import IGNORED
from jaxllm.train.computation import make_computation
from jaxllm.types import Batch, PreferenceBatch
from tests.tiny_models import random_params

SPEC = dataclasses.replace(tiny(jaxllm.spec("llama2-70b"), vocab_size=64), num_layers=1)
PAIRS, PAIRS_PER_ROW, LENGTH = 8, 2, 48


def random_pairs(seed, count=PAIRS):
    """Return pairs with prompts and answers of different lengths, with margins and levels."""
    rng = np.random.default_rng(seed)

    def answer(prompt):
        ids = np.concatenate([prompt, rng.integers(1, SPEC.vocab_size, rng.integers(2, 7))]).astype(np.int32)
        return Tokens(ids, np.where(np.arange(len(ids)) < len(prompt), IGNORED, ids).astype(np.int32))

    prompts = [rng.integers(1, SPEC.vocab_size, rng.integers(1, 6)) for _ in range(count)]
    return [
        Item(number, [answer(prompt), answer(prompt)], float(rng.random()), int(rng.integers(-1, 4)))
        for number, prompt in enumerate(prompts)
    ]


def pair_batch(items, *, packed, num_rows, ref_logps=None):
    """Return a host batch of pairs, several to a row or one; what is left of `num_rows` is padding."""
    rule = PreferenceRows(
        places=Places(SPEC), packed=packed, pairs_per_row=PAIRS_PER_ROW, margins="data", ref_logps=ref_logps
    )
    rows = [rule.empty_row(LENGTH) for _ in range(num_rows)]
    for number, item in enumerate(items):
        row, place = divmod(number, rule.most_items)
        begin = int((rows[row]["segment_ids"] != 0).sum())
        rule.place(rows[row], item, begin, place)
    fields = stack_rows(rows)
    names = {field.name for field in dataclasses.fields(Batch)}
    return PreferenceBatch(
        rows=Batch(**{name: array for name, array in fields.items() if name in names}),
        **{name: array for name, array in fields.items() if name not in names and name != "document_ids"},
    )


class Weights:
    """Stands for what a run starts from."""

    def __init__(self, params, score=None):
        self.params, self.its_score = params, score

    def model(self, path=None):
        return self.params

    def any_model(self):
        found = {"model": self.params}
        return found if self.its_score is None else found | {"score": self.its_score}

    def adapter(self, tuning):
        return None


class PairTrainer:
    """A preference stage on a mesh of the first devices, from the same weights on each."""

    def __init__(self, folder, stage, *, packed=True, grad_accum=1, mesh=None, **sections):
        (folder / "spec.json").write_text(spec_to_json(SPEC))
        self.packed, self.num_rows = packed, PAIRS // PAIRS_PER_ROW if packed else PAIRS
        config = RunConfig(
            run_dir="run",
            tokenizer="none",
            stage=stage,
            model=ModelConfig(name=str(folder / "spec.json"), compute_dtype="float32", remat="none"),
            data=DataConfig(
                train=[SourceConfig(path="pairs")],
                seq_len=LENGTH,
                packing="packed" if packed else "padded",
                pairs_per_row=PAIRS_PER_ROW,
            ),
            train=TrainConfig(steps=20, batch_size=self.num_rows, grad_accum=grad_accum),
            **sections,
        )
        sizes = mesh or {"fsdp": 1}
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        self.computation = make_computation(config, make_mesh(**{"fsdp": 1} | sizes, devices=devices))
        self.objective = self.computation.objective

    def start(self, weights=None):
        """Return (state of step 0, what is frozen)."""
        computation = self.computation
        weights = weights or Weights(random_params(SPEC, scale=0.1))
        declared = self.objective.declarations()
        fresh = initial_values(declared, jax.random.key(0), computation.initializer)
        params, frozen = self.objective.place(lambda: fresh, weights)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), computation.state)
        # Copies: a step gives away the arrays of its state, which may be those of the reference.
        host = jax.tree.map(np.array, zeros.replace(params=params))
        state = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), host, computation.state)
        if frozen is not None:
            frozen = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), frozen, computation.frozen)
        return state, frozen

    def batch(self, number, ref_logps=None):
        """Return a batch on the mesh."""
        host = pair_batch(random_pairs(number), packed=self.packed, num_rows=self.num_rows, ref_logps=ref_logps)
        return jax.device_put(host, NamedSharding(self.computation.mesh, RULES.spec(("batch",))))

    def run(self, steps, weights=None, learning_rate=1e-3):
        """Return (state, the metrics of each step) after steps on batches 0, 1, 2, 0, 1, 2, ..."""
        with jax.set_mesh(self.computation.mesh):
            state, frozen = self.start(weights)
            step, recorded = self.computation.train_step(), []
            for number in range(steps):
                state, metrics = step(state, self.batch(number % 3), np.float32(learning_rate), None, frozen)
                recorded.append({name: float(value) for name, value in metrics.items()})
        return state, recorded


def column(recorded, name="train_loss"):
    """Return one metric of all steps."""
    return np.array([metrics[name] for metrics in recorded])
