"""scripts/plan_scale.py: which rows are planned again, what the table says of each, and one row on a small slice."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from jaxllm.errors import InputError
from jaxllm.plan.topology import parse_topology
from tests.plan.plan_configs import needs_libtpu, write_config

ROOT = Path(__file__).parents[1]
# The script imports its neighbour, in a process of its own too, which gets this path.
sys.path.insert(0, str(ROOT / "scripts"))

import plan_scale  # noqa: E402
import scale_rows  # noqa: E402
from scale_table import mesh_text, waiting_text  # noqa: E402

HEADER = "# Hardware: 4 TPU v5e chips (v5e:2x2). Time: none.\n"
PLAN = {
    "date": "2026-11-22T05:00:00+00:00",
    "fits": True,
    "model": {"params": 7_721_000_000},
    "mesh": {"replica": 2, "fsdp_x": 2, "fsdp_y": 1, "fsdp_z": 4, "tensor": 1},
    "step": {"rows": 64, "seq_len": 128, "microbatches": 2, "remat": "full"},
    "memory": {"params": 2**30, "optimizer": 2**31, "gradients": 2**30, "activations": 2**29, "temporaries": 2**30}
    | {"total": 11 * 2**29, "limit": 11 * 2**30, "exceeded": 0},
    "seconds": {"compile": 61.7},
    "estimate": {"step_s": 2.0, "tokens_per_second_per_chip": 4321.0, "mfu": 0.5, "binding": "compute"}
    | {"spent": {"ici": 0.25, "dcn": 0.05}, "link_bytes": {"fsdp_x": 2**31, "fsdp_z": 0.0}},
    "collectives": [
        {
            "kind": "all-gather",
            "axes": ["fsdp_x"],
            "overlapped": True,
            "ici_bytes": 2.0**27,
            "dcn_bytes": 0,
            "count": 8,
        },
        {
            "kind": "all-gather",
            "axes": ["fsdp_z"],
            "overlapped": False,
            "ici_bytes": 2.0**20,
            "dcn_bytes": 0,
            "count": 3,
        },
        {
            "kind": "all-reduce",
            "axes": ["replica"],
            "overlapped": False,
            "ici_bytes": 2.0**30,
            "dcn_bytes": 0,
            "count": 1,
        },
    ],
}


@pytest.fixture
def folders(tmp_path):
    """Return (folder with one config for four chips, folder for the table), both new."""
    configs = tmp_path / "configs"
    configs.mkdir()
    config = write_config(configs)
    config.write_text(HEADER + config.read_text())
    return configs, tmp_path / "out"


def rows_of(folders):
    return list(scale_rows.list_rows(folders[0], folders[1] / "scale"))


def keep(row, plan, **changes):
    row.kept.parent.mkdir(parents=True, exist_ok=True)
    decides = {"config": dataclasses.asdict(row.load()), "request": plan_scale.request(row) | changes}
    row.kept.write_text(json.dumps(plan | decides))


def page(folders):
    plan_scale.write_table(rows_of(folders), folders[1])
    return (folders[1] / "scale.md").read_text()


def test_every_config_names_a_slice_of_as_many_chips_as_its_hardware():
    rows = list(scale_rows.list_rows(ROOT / "configs" / "pretrain", ROOT / "docs" / "scale"))
    assert len({row.name for row in rows}) == len(rows) >= 30
    for row in rows:
        topology = parse_topology(row.topology)
        given = row.overrides or scale_rows.TUNED.get(row.name.replace(".", "/", 1))
        assert given or f"# Hardware: {topology.num_chips} " in row.config.read_text(), row.name


def test_a_row_is_planned_again_when_anything_that_decides_it_has_changed(folders):
    (row,) = rows_of(folders)
    assert not plan_scale.is_done(row)
    keep(row, PLAN)
    assert plan_scale.is_done(row)
    assert not plan_scale.is_done(dataclasses.replace(row, overrides=("train.grad_accum=2",)))
    keep(row, PLAN, versions={"jax": "0.0.1"})
    assert not plan_scale.is_done(row)
    keep(row, PLAN, sources_sha256="other")
    assert not plan_scale.is_done(row) and plan_scale.is_done(row, ignore_sources=True)
    keep(row, {"date": PLAN["date"], "failed": "out of luck"})
    assert not plan_scale.is_done(row)
    keep(row, PLAN)
    row.config.write_text(row.config.read_text().replace("batch_size: 16", "batch_size: 32"))
    assert not plan_scale.is_done(row)


def test_an_option_that_is_newer_than_a_plan_changes_nothing_at_its_default(folders):
    (row,) = rows_of(folders)
    keep(row, PLAN)
    plan = json.loads(row.kept.read_text())
    del plan["config"]["model"]["dropout"], plan["config"]["grpo"], plan["config"]["data"]["train"][0]["weight"]
    row.kept.write_text(json.dumps(plan))
    assert plan_scale.is_done(row)
    changed = dataclasses.replace(row, overrides=("model.dropout=0.1",))
    row.kept.write_text(json.dumps(plan | {"request": plan_scale.request(changed)}))
    assert plan_scale.is_done(row) is plan_scale.is_done(changed) is False
    plan["config"]["model"]["gone"] = 1
    row.kept.write_text(json.dumps(plan))
    assert not plan_scale.is_done(row)


def test_rows_of_post_training_have_a_table_of_their_own(folders):
    config = folders[0].parent / "grpo" / "deepseekmath_7b.yaml"
    config.parent.mkdir()
    config.write_text((folders[0] / "plan.yaml").read_text())
    _, row = rows_of(folders)
    assert (row.name, row.topology, row.is_tuned) == ("grpo.deepseekmath_7b", "v5e:2x2", True)
    program = {"estimate": {"step_s": 0.25}, "seconds_to_compile": 3.0}
    memory = {"resident": 2**30, "copied": 2**31, "cache": 0, "total": 2**32, "limit": 2**33}
    rollouts = {"answers": 64, "max_new_tokens": 32, "round": {"num_passes": 2}, "fits": True, "round_s": 16.6}
    programs = {"gather": None, "prefill": program, "decode": program}
    keep(row, PLAN | {"rollouts": rollouts | {"memory": memory, "programs": programs}})
    lines = page(folders).partition("## Post-training")[2].splitlines()
    (answers,) = [line for line in lines if line.startswith("| `grpo.deepseekmath_7b` | 64 x 2")]
    assert answers.endswith("| 1.0 | 2.0 | 0.0 | 4.0 (50%) |  | 0.25 | 0.25 | 16.6 | 6 |")


def test_a_comment_in_a_config_decides_nothing(folders):
    (row,) = rows_of(folders)
    keep(row, PLAN)
    row.config.write_text(row.config.read_text() + "# a comment\n")
    assert plan_scale.is_done(row)


def test_the_table_tells_what_is_kept_and_what_is_not(folders):
    (row,) = rows_of(folders)
    row.kept.parent.mkdir(parents=True)
    assert "| `plan` |  | v5e:2x2 | not compiled yet |" in page(folders)
    keep(row, PLAN)
    cells = [cell.strip() for cell in page(folders).partition("| `plan` |")[2].splitlines()[0].split("|")]
    assert cells[:6] == ["7.7B", "v5e:2x2", "fsdp 2x4, replica 2", "64 x 128 / 2", "full", "3.0"]
    assert cells[6:10] == ["0.5", "2.0", "5.5 (50%)", "62"]
    assert cells[10:16] == ["2.00", "4,321", "50.0%", "compute", "15%: all-reduce over replica", "2026-11-22"]
    too_large = PLAN["memory"] | {"exceeded": 4096}
    keep(row, PLAN | {"fits": False, "memory": too_large, "estimate": None, "collectives": None})
    assert "5.5 (50%) **does not fit**" in page(folders) and "4,096 bytes too many" in page(folders)
    keep(row, {"date": PLAN["date"], "failed": "out of luck"})
    assert "**not compiled**" in page(folders) and "out of luck" in page(folders)


def test_the_table_tells_that_a_config_has_changed(folders):
    (row,) = rows_of(folders)
    keep(row, PLAN)
    assert "before its config changed" not in page(folders)
    row.config.write_text(row.config.read_text().replace("batch_size: 16", "batch_size: 32"))
    assert "`plan` (as it was before its config changed)" in page(folders)


def test_texts_of_a_plan():
    assert mesh_text({"replica": 1, "fsdp_x": 1, "tensor": 1}) == "one device"
    assert mesh_text({"fsdp_x": 4, "fsdp_y": 8, "fsdp_z": 8, "tensor": 2}) == "fsdp 4x8x8, tensor 2"
    assert waiting_text(PLAN | {"collectives": []}) == "15%"


def test_the_page_is_that_of_the_kept_rows(tmp_path):
    rows = list(scale_rows.list_rows(ROOT / "configs" / "pretrain", ROOT / "docs" / "scale"))
    plan_scale.write_table(rows, tmp_path)
    assert (tmp_path / "scale.md").read_text() == (ROOT / "docs" / "scale.md").read_text()


def test_bad_input_is_told(folders):
    configs, out = folders
    with pytest.raises(InputError, match="unknown row 'nothing'; known: plan"):
        plan_scale.main(["nothing", "--configs", str(configs), "--out", str(out)])
    (configs / "plan.yaml").write_text((configs / "plan.yaml").read_text().removeprefix(HEADER))
    with pytest.raises(InputError, match=r"plan\.yaml: no line like .* names a slice"):
        rows_of(folders)


@pytest.mark.slow
@needs_libtpu
def test_a_row_is_planned_apart_and_only_once(folders, capfd):
    configs, out = folders
    command = ["--configs", str(configs), "--out", str(out)]
    assert plan_scale.main(command) == 0
    assert "plan on v5e:2x2: " in capfd.readouterr().out
    plan = json.loads((out / "scale" / "plan.json").read_text())
    assert plan["fits"] and plan["topology"]["name"] == "v5e:2x2" and plan["request"]["versions"]["libtpu"]
    assert plan_scale.main(command) == 0
    assert capfd.readouterr().out == "plan: kept\n"
    (configs / "plan.yaml").write_text((configs / "plan.yaml").read_text() + "mesh: {fsdp: 3}\n")
    assert plan_scale.main(command) == 0
    reason = "3 devices, but there are 4"
    assert reason in capfd.readouterr().out and reason in (out / "scale.md").read_text()
    assert plan_scale.main([*command, "--limit", "0.01"]) == 0
    assert "not compiled: not done within 0 s" in capfd.readouterr().out
