"""The table of perplexities by context length: its cells, what it finds, and a whole tiny run of the script."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.checkpoint.opened import Opened
from jaxllm.errors import InputError
from jaxllm.losses import cross_entropy
from jaxllm.nn.model import apply
from jaxllm.spec import ChunkedNTK, tiny
from jaxllm.types import Batch

SCRIPT = Path(__file__).parents[1] / "scripts" / "long_context.py"
module = importlib.util.spec_from_file_location("long_context", SCRIPT)
long_context = importlib.util.module_from_spec(module)
module.loader.exec_module(long_context)

TRAIN_LENGTH = 32
SPEC = tiny(jaxllm.spec("qwen-mini"), vocab_size=50)


@pytest.fixture(scope="module")
def model():
    # Large enough for the rules of positions to show in the loss.
    params = jax.tree.map(lambda leaf: 4 * leaf, jaxllm.init(SPEC, jax.random.key(0)))
    return Opened(SPEC, params)


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(0).integers(0, 50, (2, 4 * TRAIN_LENGTH))


def test_a_cell_is_the_loss_of_rows_of_its_length(model, text):
    found = long_context.stretch_losses(SPEC, model, text, 2 * TRAIN_LENGTH)
    rows = jnp.asarray(text.reshape(-1, 2 * TRAIN_LENGTH))
    places = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    batch = Batch(tokens=rows, positions=places, segment_ids=jnp.ones_like(rows))
    logits = jax.jit(apply, static_argnums=0)(SPEC, model.params, batch).logits[:, :-1]
    expected = cross_entropy(logits, rows[:, 1:], jnp.ones_like(rows[:, 1:])).mean(axis=1).reshape(2, 2).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_all_techniques_agree_at_the_training_length_and_each_counts_beyond(model, text):
    specs = long_context.techniques(SPEC, TRAIN_LENGTH)

    def losses(length):
        return {name: long_context.stretch_losses(at(length), model, text, length) for name, at in specs.items()}

    short, long = losses(TRAIN_LENGTH), losses(4 * TRAIN_LENGTH)
    for name in specs:
        np.testing.assert_allclose(short[name], short["plain"], atol=1e-5, err_msg=name)
    assert len({tuple(np.round(loss, 5)) for loss in long.values()}) == len(specs)


def test_each_step_keeps_what_the_steps_before_have():
    plain, ntk, logn, windows = (long_context.techniques(SPEC, 32)[name](64) for name in long_context.STEPS)
    assert plain.position.scaling is None and plain.logn is None and plain.window is None
    assert ntk == dataclasses.replace(plain, position=ntk.position)
    assert ntk.position.scaling == ChunkedNTK(train_length=32)
    assert logn == dataclasses.replace(ntk, logn=logn.logn) and logn.logn.train_length == 32
    assert windows == dataclasses.replace(logn, window=(32, 64))


def table(**changes):
    losses = {name: np.full((3, 2), 1.0) for name in long_context.STEPS}
    losses["plain"] = np.array([[1, 1], [1.2, 1.2], [1.8, 1.8]])
    return losses | {name.replace("_", " "): np.array(values) for name, values in changes.items()}


@pytest.mark.parametrize(
    ("losses", "fails"),
    [
        (table(), set()),
        (table(plain=[[1, 1], [1.2, 1.2], [1.6, 1.6]]), {"plain"}),
        (table(**{"+ LogN": [[1, 1], [1, 1], [1.1, 1.0]]}), {"+ LogN"}),
        (table(**{"+ windows": [[1.01, 1], [0.9, 0.9], [0.9, 0.9]]}), {"+ windows"}),
    ],
    ids=["as-published", "no-explosion", "logn-hurts", "windows-hurt-at-the-training-length"],
)
def test_findings_hold_or_not(losses, fails):
    found = long_context.findings([32, 64, 128], losses)
    assert {statement.partition(":")[0] for statement, holds in found.items() if not holds} == fails


def test_a_model_without_rotary_positions_is_refused():
    with pytest.raises(InputError, match="no rotary positions"):
        long_context.techniques(jaxllm.spec("baichuan-13b"), 32)


def test_a_missing_run_is_refused(tmp_path, capsys):
    assert long_context.main(["--run", str(tmp_path / "none")]) == 2
    assert "none/config.yaml: cannot read" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_trains_and_plain_gets_worse_beyond_twice_the_training_length(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(SCRIPT.parents[1])
    overrides = ["data.seq_len=64", "model.rope.theta=25", "train.batch_size=16", "train.steps=250"]
    places = [f"run_dir={tmp_path / 'run'}", f"tokenizer={tmp_path / 'bytes'}", "log.tensorboard=false"]
    result = tmp_path / "table.json"
    assert long_context.main([*places, *overrides, "--stretches", "4", "--json", str(result)]) == 0
    found = json.loads(result.read_text())
    perplexity = {name: np.array(row) for name, row in found["perplexity"].items()}
    assert found["lengths"] == [64, 128, 256, 512]
    assert all(np.isfinite(row).all() for row in perplexity.values())
    assert (perplexity["plain"][2:] > 1.2 * perplexity["plain"][0]).all()
    assert (perplexity["+ dynamic NTK"][2:] < perplexity["plain"][2:]).all()
    assert "holds: + dynamic NTK: at most 'plain' at every length" in capsys.readouterr().out
