"""Every config loads, fits its model and hardware, says what it is for, and holds the published hyper-parameters."""

import re
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxllm.config import load_config
from jaxllm.nn.model import abstract_params, count_matmul_params
from jaxllm.sharding.mesh import MESH_AXES
from jaxllm.train.flops import train_flops_per_token
from jaxllm.train.schedule import BatchSizes
from jaxllm.train.setup import resolve_spec

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if path.stem != "quickstart"]
TIME = re.compile(r"#   (\S+) tokens x (\S+) FLOPs / \((\d+) chips x (\S+) FLOP/s x (\S+)\) = (\S+) days")
CHIPS_PER_HOST = {"TPU v5p": 4, "TPU v5e": 4, "NVIDIA H100": 8}
PEAKS = {"TPU v5p": 459e12, "TPU v5e": 197e12, "NVIDIA H100": 989e12}


def rows_of_the_table():
    """Return config name -> cells by heading, from docs/recipes.md."""
    lines = [line for line in (ROOT / "docs" / "recipes.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    named = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return {row["config"].strip("`"): row for row in named if row["config"] != "-"}


def amount(cell):
    """Read a number of steps, or of tokens such as "2.25B tokens"."""
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
    config, row = load_config([path]), rows_of_the_table()[path.stem]
    optimizer, schedule = config.optimizer, config.schedule
    found = (optimizer.learning_rate, optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm)
    assert found == tuple(float(row[name]) for name in ("peak rate", "b1", "b2", "decay", "clip"))
    if row["eps"] == "n/p":
        assert re.search(r"eps: 1\.0e-8 +# not published", path.read_text())
    else:
        assert optimizer.eps == float(row["eps"])
    assert (config.data.seq_len, schedule.warmup) == (int(row["seq"]), amount(row["warm-up"]))
    batch_tokens = config.train.batch_size * config.data.seq_len
    if row["batch, tokens"].endswith(" rows"):
        assert config.train.batch_size == int(row["batch, tokens"].removesuffix(" rows"))
    else:
        assert batch_tokens == int(row["batch, tokens"].removesuffix("M")) * 2**20
    tokens = BatchSizes(config).tokens_before(config.train.steps)
    assert abs(tokens - float(row["tokens"].removesuffix("T")) * 1e12) <= batch_tokens / 2
    shape = {
        "cosine": f"cosine to {schedule.floor}",
        "wsd": f"linear to {schedule.floor}",
        "multistep": ", ".join(f"{f} from {b}" for f, b in zip(schedule.factors, schedule.boundaries, strict=True)),
    }
    expected, _, end = row["schedule"].partition(" at ")
    assert (shape[schedule.kind], schedule.total) == (expected, amount(end) if end else None)
    assert schedule.unit == ("tokens" if "tokens" in row["warm-up"] else "steps")
    if schedule.kind == "wsd":
        assert schedule.warmup + schedule.decay == config.train.steps


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_time_of_the_header_follows_from_model_and_hardware(path):
    text, config = path.read_text(), load_config([path])
    spec = resolve_spec(config)
    (device,) = [name for name in PEAKS if name in text]
    tokens, flops, chips, peak, utilisation, days = map(float, TIME.search(text).groups())
    heads, width = spec.attention.num_heads, spec.attention.head_dim
    expected = train_flops_per_token(
        count_matmul_params(spec), spec.num_layers, heads, width, width, config.data.seq_len, spec.window
    )
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
    assert mesh.fsdp == "auto" and chips % (mesh.replica * mesh.tensor) == 0
    sizes = dict.fromkeys(MESH_AXES, 1) | {"replica": mesh.replica, "tensor": mesh.tensor}
    sizes["fsdp"] = chips // (mesh.replica * mesh.tensor)
    abstract = AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    abstract_params(resolve_spec(config), abstract)
    assert config.train.batch_size % (chips // mesh.tensor * config.train.grad_accum) == 0
    lanes = config.data.num_lanes or 64
    assert config.train.batch_size % lanes == 0 and lanes % (chips // CHIPS_PER_HOST[device]) == 0
