"""What a run leaves behind: exact metrics, readable event files, a well-formed picture, correct speed and FLOPs."""

import importlib.util
import io
import itertools
import json
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxllm.errors import InputError
from jaxllm.train import flops
from jaxllm.train.records import Records, loss_plot, progress
from jaxllm.train.records.event_file import EventFile, crc32c
from jaxllm.train.records.metrics_file import MetricsFile, read_metrics

SVG = "{http://www.w3.org/2000/svg}"


def open_records(run_dir, *, total_steps=20, log_every=5, is_main=True, tensorboard=True) -> Records:
    speed = progress.Speed(total_tokens=total_steps * 64, flops_per_token=1e6, num_devices=2, peak_flops=None)
    return Records(
        run_dir, total_steps=total_steps, speed=speed, is_main=is_main, tensorboard=tensorboard, log_every=log_every
    )


def train(records: Records, steps) -> None:
    for step in steps:
        metrics = {"loss": np.float32(8 / step), "learning_rate": 3.9e-3, "grad_norm": np.float32(0.81)}
        records.train_step(step, metrics | {"tokens": step * 64})


def losses(run_dir) -> list[tuple[str, int, float]]:
    return [(record["kind"], record["step"], record["loss"]) for record in read_metrics(run_dir / "metrics.jsonl")]


def tensorboard_points(run_dir, tag) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(run_dir / "tb"), size_guidance={"scalars": 0}).Reload()
    return [(point.step, point.value) for point in accumulator.Scalars(tag)]


def test_every_step_is_recorded_exactly_and_speed_at_log_steps(tmp_path, capsys):
    records = open_records(tmp_path)
    train(records, range(1, 13))
    records.evaluation(12, {"loss": 4.125, "perplexity": 61.9, "bits_per_byte": 2.1})
    records.close()
    expected = [("train", step, float(np.float32(8 / step))) for step in range(1, 13)]
    assert losses(tmp_path) == [*expected, ("eval", 12, 4.125)]
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    with_speed = [row["step"] for row in rows if "tokens_per_second" in row]
    assert with_speed == [5, 10], "the first step waits for the compiler and has no speed"
    assert rows[4]["tokens_per_second"] == 2 * rows[4]["tokens_per_second_per_device"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "step 1/20  loss 8.000  lr 3.9e-03  grad 0.81  n/a tok/s  (n/a/device)  mfu n/a  eta n/a"
    )
    assert [line.split()[1] for line in lines[:-1]] == ["1/20", "5/20", "10/20"]
    assert lines[-1] == "evaluation at step 12  loss 4.125  perplexity 61.9  bits_per_byte 2.1"
    assert [line[21:] for line in (tmp_path / "log.txt").read_text().splitlines()] == lines


def test_resume_keeps_each_step_once_in_all_records(tmp_path, capsys):
    first = open_records(tmp_path)
    train(first, range(1, 11))
    first.evaluation(10, {"loss": 1.0})
    first.sync()
    train(first, range(11, 16))
    first.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "step": 16, "lo')

    second = open_records(tmp_path)
    second.resume_at(10)
    train(second, range(11, 21))
    second.close()
    steps = [(kind, step) for kind, step, _ in losses(tmp_path)]
    once = [("train", step) for step in range(1, 21)]
    assert steps == [*once[:10], ("eval", 10), *once[10:]]
    out = capsys.readouterr().out
    assert "dropped 5 records of steps after 10" in out
    assert "dropped a half-written last line" in out
    assert [step for step, _ in tensorboard_points(tmp_path, "train/loss")] == [1, 5, 10, 11, 15, 20]
    assert tensorboard_points(tmp_path, "eval/loss") == [(10, 1.0)]


def test_resume_at_zero_starts_over(tmp_path):
    first = open_records(tmp_path, tensorboard=False)
    first.evaluation(0, {"loss": 9.0})
    train(first, range(1, 4))
    first.close()
    second = open_records(tmp_path, tensorboard=False)
    second.resume_at(0)
    second.close()
    assert losses(tmp_path) == []


@given(
    cut=st.integers(0, 400),
    step=st.integers(0, 12),
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=10, max_size=10),
)
def test_any_cut_of_the_file_resumes_to_a_prefix(tmp_path_factory, cut, step, values):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    file = MetricsFile(path)
    for index, value in enumerate(values, start=1):
        file.append({"kind": "train", "step": index, "loss": value})
    file.close()
    path.write_bytes(path.read_bytes()[:cut])
    whole = path.read_bytes().count(b"\n")
    file = MetricsFile(path)
    dropped = file.resume_at(step)
    file.append({"kind": "train", "step": 99, "loss": 0.5})
    file.close()
    kept = min(step, whole)
    assert [record["loss"] for record in read_metrics(path)] == [*values[:kept], 0.5]
    assert dropped.records == whole - kept


def test_a_corrupt_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "loss": 2.0}\nnot json\n')
    file = MetricsFile(path)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        file.resume_at(5)
    file.close()


def test_a_loss_that_is_not_finite_stays_valid_json(tmp_path):
    records = open_records(tmp_path)
    records.train_step(1, {"loss": float("nan"), "learning_rate": 0.0, "grad_norm": float("inf"), "tokens": 64})
    records.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (record["loss"], record["grad_norm"]) == ("nan", "inf")


def test_other_processes_write_nothing(tmp_path, capsys):
    records = open_records(tmp_path, is_main=False)
    records.resume_at(3)
    train(records, range(4, 8))
    records.evaluation(7, {"loss": 1.0})
    records.event("hello")
    records.sync()
    records.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_crc32c_check_values():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_tensorboard_reads_back_what_was_written(tmp_path):
    file = EventFile(tmp_path / "tb", first_step=0)
    values = {step: float(np.float32(1 / (step + 1))) for step in (0, 1, 127, 128, 300, 2**40)}
    for step, value in values.items():
        file.scalars(step, {"train/loss": value, "验证/loss": -value})
    file.close()
    assert tensorboard_points(tmp_path, "train/loss") == list(values.items())
    assert tensorboard_points(tmp_path, "验证/loss") == [(step, -value) for step, value in values.items()]


def test_an_event_file_cut_off_by_a_kill_does_not_hide_the_next_one(tmp_path):
    first = EventFile(tmp_path / "tb", first_step=0)
    for step in range(1, 6):
        first.scalars(step, {"loss": 1.0})
    first.close()
    path = next((tmp_path / "tb").iterdir())
    path.write_bytes(path.read_bytes()[:-7])
    second = EventFile(tmp_path / "tb", first_step=4)
    second.scalars(4, {"loss": 2.0})
    second.close()
    assert tensorboard_points(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


@pytest.mark.parametrize("count", [1, 2, 999, 25_000])
def test_svg_is_well_formed_and_inside_its_axes(count):
    steps = np.arange(1, count + 1)
    curve = (steps, 4 + 3 / np.sqrt(steps) + 0.1 * np.sin(steps))
    heldout = (steps[count // 2 :: max(count // 4, 1)], curve[1][count // 2 :: max(count // 4, 1)])
    root = ElementTree.fromstring(loss_plot.loss_svg(curve, heldout))
    lines = {line.get("id"): line.get("points").split() for line in root.iter(f"{SVG}polyline")}
    assert set(lines) == {"train", "smoothed", "held-out"}
    assert len(lines["train"]) == min(count, 1000)
    assert len(list(root.iter(f"{SVG}circle"))) == heldout[0].size
    for x, y in (point.split(",") for point in itertools.chain(*lines.values())):
        assert 70 <= float(x) <= 760
        assert 40 <= float(y) <= 400
    labels = [text.text for text in root.iter(f"{SVG}text")]
    assert {"step", "loss (nats per token)", "train", "held-out"} <= set(labels)
    assert len(labels) >= 2 + 3 + 2 * 3, "each axis has ticks"


@given(low=st.floats(-1e6, 1e6), span=st.one_of(st.just(0.0), st.floats(1e-300, 1e7)))
def test_ticks_are_few_even_and_enclose_the_range(low, span):
    ticks = loss_plot._ticks(low, low + span)
    assert 2 <= len(ticks) <= 12
    assert ticks[0] <= low + 1e-9 and low + span - 1e-9 <= ticks[-1]
    np.testing.assert_allclose(np.diff(ticks), (ticks[-1] - ticks[0]) / (len(ticks) - 1), rtol=1e-3)


def test_the_running_mean_follows_a_line_and_averages_the_end():
    values = np.linspace(3.0, 8.0, 400)
    mean = loss_plot._running_mean(values)
    np.testing.assert_allclose(mean[:-10], values[:-10], rtol=1e-12)
    assert mean[-1] == pytest.approx(values[-11:].mean())


def test_png_is_drawn_or_its_extra_is_named(tmp_path):
    records = open_records(tmp_path)
    train(records, range(1, 8))
    records.close()
    if importlib.util.find_spec("matplotlib"):
        assert loss_plot.plot_png(tmp_path).read_bytes().startswith(b"\x89PNG")
    else:
        with pytest.raises(InputError, match=r"pip install 'jaxllm\[plot\]'"):
            loss_plot.plot_png(tmp_path)


def test_speed_leaves_out_compilation_and_pauses(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    speed = progress.Speed(total_tokens=10_000, flops_per_token=1e9, num_devices=4, peak_flops=1e12)
    clock[0] += 60  # compilation
    speed.start(1000)
    clock[0] += 2
    with speed.paused():
        clock[0] += 30
    lap = speed.lap(3000)
    assert lap == {
        "tokens_per_second": 1000.0,
        "tokens_per_second_per_device": 250.0,
        "mfu": 0.25,
        "seconds_left": 7.0,
    }
    clock[0] += 4
    lap = speed.lap(5000)
    assert lap["tokens_per_second"] == 500.0
    assert lap["seconds_left"] == pytest.approx(5000 / (4000 / 6))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (151, "2:31"), (59.7, "1:00"), (36_305, "10:05:05")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_and_keeps_the_notes(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    records = open_records(tmp_path)
    train(records, range(1, 21))
    records.event("a [note] to keep")
    records.close()
    shown = terminal.getvalue()
    assert "20/20" in shown
    assert "a [note] to keep" in shown
    assert "step 20/20  loss 0.400" in shown


def test_memory_is_that_of_a_process_with_jax():
    assert 5e7 < progress.memory_bytes() < 1e12


def test_flops_of_llama2_7b_follow_the_rule():
    embedding, total = 32_000 * 4096, 6_738_415_616
    norms = 65 * 4096
    per_token = flops.train_flops_per_token(total - embedding - norms, 32, 32, 128, 128, 4096)
    attention_of_palm = 12 * 32 * 32 * 128 * 4096
    assert per_token == 6 * (total - embedding - norms) + attention_of_palm / 2


def test_windows_cost_what_a_count_of_visible_keys_says():
    count = sum(min(i + 0.5, 64 - 0.5) for i in range(256)) / 256
    per_token = flops.train_flops_per_token(0, 2, 4, 16, 8, 256, windows=[64, None])
    assert per_token == pytest.approx(6 * 4 * 24 * (count + 128), rel=0.01)
    assert flops.train_flops_per_token(0, 1, 4, 16, 8, 256, windows=[999]) == 6 * 4 * 24 * 128
    with pytest.raises(ValueError, match="windows"):
        flops.train_flops_per_token(0, 2, 4, 16, 8, 256, windows=[64])


def test_peaks_of_known_devices():
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("TPU v5p") == flops.peak_flops("TPU v5") == 459e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("cpu") is None
