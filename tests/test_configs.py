"""Every config loads, fits its model and hardware, says what it is for, and holds the published hyper-parameters."""

import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import AbstractMesh, AxisType

from jaxllm.config import load_config, validate
from jaxllm.config.options import flatten
from jaxllm.nn.model import abstract_params
from jaxllm.sharding.mesh import MESH_AXES
from jaxllm.sharding.rules import FSDP_AXES
from jaxllm.tokenizers.train import train_bpe
from jaxllm.train.computation import resolve_spec, with_balance
from jaxllm.train.flops import model_flops_per_token
from jaxllm.train.schedule import BatchSizes, learning_rate_at
from jaxllm.train.setup import make_setup

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
OWN = ("quickstart", "long_context_tiny")
PUBLISHED = [path for path in CONFIGS if path.parent.name == "pretrain" and path.stem not in OWN]
AFTER_PRETRAINING = [path for path in CONFIGS if path.parent.name != "pretrain" and not path.stem.startswith("demo_")]
TIME = re.compile(r"#   (\S+) tokens x (\S+) FLOPs / \((\d+) chips x (\S+) FLOP/s x (\S+)\) = (\S+) days")
CHIPS_PER_HOST = {"TPU v5p": 4, "TPU v5e": 4, "NVIDIA H100": 8}
OPTIMIZER = {
    "learning_rate": "peak rate", "b1": "b1", "b2": "b2", "eps": "eps", "weight_decay": "decay", "clip_norm": "clip"
}  # fmt: skip
PEAKS = {"TPU v5p": 459e12, "TPU v5e": 197e12, "NVIDIA H100": 989e12}


def rows_of_the_table(number=0):
    """Return config name -> cells by heading, from a table of docs/recipes.md."""
    table = (ROOT / "docs" / "recipes.md").read_text().split("**Sources.**")[number]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    named = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return {row["config"].strip("`"): row for row in named if row["config"] != "-"}


def is_published(found, cell, option, text):
    """Compare an option with a cell: a number, a range "1 to 2", or n/p, which the config must say in a comment."""
    line = next((line for line in text.splitlines() if re.match(rf" *{option}: ", line)), "")
    if cell == "n/p":
        return "# not published" in line
    low, _, high = cell.partition(" to ")
    return float(low) <= found <= float(high or low) and ("# not published" in line or not high)


def amount(cell, steps):
    """Read a number of steps, of tokens such as "2.25B tokens", or a share of the steps such as "2.5 %"."""
    if cell.endswith(" %"):
        return round(float(cell.removesuffix(" %")) / 100 * steps)
    billions = cell.removesuffix("B tokens")
    return int(cell) if billions == cell else round(float(billions) * 1e9)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_short_loads_strictly_and_opens_with_its_purpose(path):
    text = path.read_text()
    lines = text.splitlines()
    header = "\n".join(line for line in lines if line.startswith("# ") or line.startswith("#   "))
    assert len(lines) <= 40 and text.startswith("# ")
    assert all(f"{word}: " in header or f"{word}, " in header for word in ("Hardware", "Time", "Metric"))
    config = load_config([path])
    assert config.run_dir == f"runs/{path.stem}"
    assert resolve_spec(config).vocab_size > 0
    assert config.data.heldout


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_hyper_parameters_are_the_published_ones(path):
    text, config, row = path.read_text(), load_config([path]), rows_of_the_table()[path.stem]
    optimizer, steps = config.optimizer, config.train.steps
    for option, column in OPTIMIZER.items():
        assert is_published(getattr(optimizer, option), row[column], option, text), option
    assert is_published(config.data.seq_len, row["seq"], "seq_len", text)
    rows = row["batch, tokens"]
    batch_tokens = config.train.batch_size * config.data.seq_len
    if rows.endswith("M"):
        assert batch_tokens == int(rows.removesuffix("M")) * 2**20
    else:
        assert is_published(config.train.batch_size, rows.removesuffix(" rows"), "batch_size", text)
    tokens = BatchSizes(config).tokens_before(steps)
    assert abs(tokens - float(row["tokens"].removesuffix("T")) * 1e12) <= batch_tokens / 2


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_schedules_are_the_published_ones(path):
    text, config, row = path.read_text(), load_config([path]), rows_of_the_table()[path.stem]
    schedule, steps = config.schedule, config.train.steps
    warmup = row["warm-up"]
    if warmup == "n/p":
        assert is_published(schedule.warmup, warmup, "warmup", text)
    elif schedule.unit == "tokens" and "tokens" not in warmup:
        assert schedule.warmup == BatchSizes(config).tokens_before(amount(warmup, steps))
    else:
        assert schedule.warmup == amount(warmup, steps)
        assert schedule.unit == ("tokens" if "tokens" in warmup else "steps")
    shape = {
        "constant": "constant",
        "cosine": f"cosine to {schedule.floor}",
        "wsd": f"linear to {schedule.floor}",
        "multistep": ", ".join(f"{f} from {b}" for f, b in zip(schedule.factors, schedule.boundaries, strict=True)),
    }[schedule.kind]
    expected, _, end = row["schedule"].partition(" at ")
    if expected.endswith("n/p"):
        assert shape.startswith(expected.removesuffix("n/p"))
        assert is_published(schedule.floor, "n/p", "floor", text)
    else:
        assert shape == expected
    assert schedule.total == (amount(end, steps) if end else None)
    if schedule.kind == "wsd":
        assert schedule.warmup + schedule.decay == steps


PLACES = {
    "batch, rows": "train.batch_size",
    "length": "data.seq_len",
    "peak rate": "optimizer.learning_rate",
    "b2": "optimizer.b2",
    "decay": "optimizer.weight_decay",
    "clip": "optimizer.clip_norm",
}


@pytest.mark.parametrize("path", AFTER_PRETRAINING, ids=lambda path: path.stem)
def test_a_config_after_pretraining_is_of_its_stage_and_source(path):
    config, row = load_config([path]), rows_of_the_table(1).get(path.stem)
    assert config.stage == path.parent.name and config.model.weights and not validate(config)
    if row is None:
        assert re.search(r"arXiv:\d|as qwen_7b_lora", path.read_text())
        return
    values = flatten(config)
    expected = {place: row[column] for column, place in PLACES.items() if row[column] != "n/p"}
    expected |= dict(option.split() for option in row["options"].split(", ") if option)
    for option, cell in expected.items():
        assert values[option] == yaml.safe_load(cell) or values[option] == float(cell), option
    steps = config.train.steps
    if row["steps"].isdigit():
        assert steps == int(row["steps"])
    if row["warm-up"] != "n/p":
        assert config.schedule.warmup == pytest.approx(amount(row["warm-up"], steps), rel=0.02)
    kind, _, floor = row["schedule"].partition(" to ")
    if kind != "n/p":
        assert config.schedule.kind == kind and floor in ("", "n/p", str(config.schedule.floor))


@pytest.mark.parametrize(
    ("name", "balance", "capacity_factor", "never_dropped"),
    [("deepseek_v2", (0.003, 0.05, 0.02), 1.0, 0.1), ("deepseek_v2_lite", (0.001, 0.0, 0.0), None, 0.0)],
)
def test_experts_are_balanced_as_published(name, balance, capacity_factor, never_dropped):
    """arXiv:2405.04434 section 3.1 and appendix B."""
    config = load_config([ROOT / "configs" / "pretrain" / f"{name}.yaml"])
    spec = with_balance(resolve_spec(config), config)
    found = spec.moe.balance
    assert ((found.expert, found.device, found.communication), found.per_sequence) == (balance, True)
    assert (spec.moe.capacity_factor, config.train.moe.never_dropped) == (capacity_factor, never_dropped)


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_baichuan2_has_its_max_z_loss(size):
    config = load_config([ROOT / "configs" / "pretrain" / f"baichuan2_{size}.yaml"])
    assert config.train.max_z_loss == 2e-4 and resolve_spec(config).head.normalized


@pytest.mark.parametrize("size", ["7b", "20b"])
def test_the_second_phase_of_internlm2_goes_on_at_the_rate_of_the_first(size):
    first, second = (
        load_config([ROOT / "configs" / "pretrain" / f"internlm2_{size}{phase}.yaml"]) for phase in ("", "_32k")
    )
    rate = learning_rate_at(first, step=first.train.steps, tokens=0)
    assert second.optimizer.learning_rate == pytest.approx(rate, rel=1e-3)
    assert second.optimizer.learning_rate * second.schedule.floor == pytest.approx(3e-5, rel=1e-2)
    assert second.train.steps / first.train.steps == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_time_of_the_header_follows_from_model_and_hardware(path):
    text, config = path.read_text(), load_config([path])
    spec = resolve_spec(config)
    (device,) = [name for name in PEAKS if name in text]
    tokens, flops, chips, peak, utilisation, days = map(float, TIME.search(text).groups())
    expected = model_flops_per_token(spec, config.data.seq_len)
    assert f"Hardware: {chips:.0f} {device}" in text and peak == PEAKS[device]
    assert flops == pytest.approx(expected, rel=2e-3)
    assert tokens == pytest.approx(BatchSizes(config).tokens_before(config.train.steps), rel=1e-5)
    assert days == pytest.approx(tokens * flops / (chips * peak * utilisation) / 86400, abs=0.06)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_config_fits_its_mesh_and_its_hosts(path):
    config = load_config([path])
    chips = int(TIME.search(path.read_text())[3])
    (device,) = [name for name in PEAKS if name in path.read_text()]
    mesh = config.mesh
    given = {"replica": mesh.replica, "expert": mesh.expert, "tensor": mesh.tensor}
    others = math.prod(given.values())
    assert mesh.fsdp == "auto" and chips % others == 0
    sizes = dict.fromkeys(MESH_AXES, 1) | given | {FSDP_AXES[0]: chips // others}
    abstract = AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    abstract_params(resolve_spec(config), abstract)
    ways = chips // mesh.tensor
    lanes = config.data.num_lanes or 64
    assert config.train.batch_size % (ways * config.train.grad_accum) == 0
    assert all(size % ways == 0 and size % lanes == 0 for size in BatchSizes(config).sizes())
    assert lanes % min(chips // CHIPS_PER_HOST[device], ways) == 0


QUICK = ("deepseek_v2", "baichuan2_13b")
TEXT_CONFIGS = [
    pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
    for path in PUBLISHED
    if not path.stem.startswith("glm")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["a few words"], vocab_size=264).save(folder)
    return folder


@pytest.mark.parametrize("path", TEXT_CONFIGS)
def test_a_config_describes_a_step_of_its_whole_batch(path, tokenizer):
    """Traced on eight devices, which hold nothing of it."""
    few = {"replica": 1, "expert": 2, "tensor": 2}
    overrides = [f"tokenizer={tokenizer}", "train.grad_accum=1", *(f"mesh.{axis}={ways}" for axis, ways in few.items())]
    setup = make_setup(load_config([path], overrides))
    with jax.set_mesh(setup.mesh):
        batch = setup.abstract_batch(max(setup.batch_sizes.sizes()))
        state, metrics = jax.eval_shape(setup.train_step(), setup.state, batch, np.float32(0), None)
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, setup.state)
    assert ("max_expert_load" in metrics) == (setup.spec.moe is not None)
