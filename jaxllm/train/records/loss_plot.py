"""The training curve as an SVG file, drawn without any plotting package, and as a PNG file with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxllm.errors import InputError, missing_extra
from jaxllm.files import atomic_file
from jaxllm.train.records.metrics_file import read_metrics

_WIDTH, _HEIGHT = 800, 450
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 760, 40, 400
_MAX_POINTS = 1000
_RAW, _SMOOTH, _HELDOUT = "#9ecae1", "#08519c", "#d95f02"

Curve = tuple[np.ndarray, np.ndarray]
Axis = Callable[[npt.ArrayLike], np.ndarray]


def write_svg(path: Path, train: Curve, heldout: Curve) -> None:
    """Write the picture so that a crash leaves either the old or the new file, never a part."""
    with atomic_file(path) as file:
        file.write(loss_svg(train, heldout))


def loss_svg(train: Curve, heldout: Curve) -> str:
    """Draw training loss, its running mean and held-out losses over steps.

    Args:
      train, heldout: (steps, losses in nats per token), finite, in order of steps; `train` is not empty.
    """
    raw = _thin(train)
    x_ticks = _ticks(*_range(train[0], heldout[0], [0.0]))
    y_ticks = _ticks(*_range(raw[1], heldout[1]))
    x = _axis(x_ticks, _LEFT, _RIGHT)
    y = _axis(y_ticks, _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        *_grid(x_ticks, y_ticks, x, y),
        _line("train", raw, x, y, _RAW, 1.0),
        _line("smoothed", (raw[0], _running_mean(raw[1])), x, y, _SMOOTH, 2.0),
        _line("held-out", heldout, x, y, _HELDOUT, 1.0),
        *_dots("held-out-points", heldout, x, y, _HELDOUT),
        *_legend(("train", _RAW), ("train, running mean", _SMOOTH), ("held-out", _HELDOUT)),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def plot_png(run_dir: Path) -> Path:
    """Draw RUN/training_loss.png from RUN/metrics.jsonl with matplotlib and return its path.

    Raises InputError if matplotlib is missing or the run has no records.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "a PNG plot") from error
    train, heldout = read_curves(run_dir / "metrics.jsonl")
    figure = Figure(figsize=(8, 4.5), dpi=150)
    axes = figure.subplots()
    raw = _thin(train)
    axes.plot(*raw, color=_RAW, linewidth=1, label="train")
    axes.plot(raw[0], _running_mean(raw[1]), color=_SMOOTH, linewidth=2, label="train, running mean")
    axes.plot(*heldout, "o-", color=_HELDOUT, markersize=4, linewidth=1, label="held-out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    path = run_dir / "training_loss.png"
    figure.savefig(path)
    return path


def read_curves(path: Path) -> tuple[Curve, Curve]:
    """Read (training, held-out) losses from a metrics.jsonl file, finite ones only.

    Raises InputError if there are none of training.
    """
    points = {"train": [], "eval": []}
    for record in read_metrics(path):
        loss = float(record["loss"])
        if math.isfinite(loss):
            points[record["kind"]].append((record["step"], loss))
    if not points["train"]:
        raise InputError(f"{path}: expected records of training steps, found none")
    train, heldout = (np.array(points[kind], np.float64).reshape(-1, 2).T for kind in ("train", "eval"))
    return (train[0], train[1]), (heldout[0], heldout[1])


def _thin(curve: Curve) -> Curve:
    """Average neighbouring points so that at most `_MAX_POINTS` remain."""
    steps, losses = curve
    if steps.size <= _MAX_POINTS:
        return curve
    starts = np.linspace(0, steps.size, _MAX_POINTS, endpoint=False).astype(int)
    counts = np.diff(starts, append=steps.size)
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(losses, starts) / counts


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over a centred window of about a twentieth of the curve.

    It narrows towards the steep start, and keeps its left half at the end, where a single point would mislead.
    """
    index = np.arange(values.size)
    reach = np.minimum(values.size // 40, index)
    first, last = index - reach, np.minimum(index + reach, values.size - 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _range(*parts: npt.ArrayLike) -> tuple[float, float]:
    values = np.concatenate(parts)
    return float(values.min()), float(values.max())


def _ticks(low: float, high: float) -> list[float]:
    """Return evenly spaced round numbers, about 4 to 10, that enclose the range."""
    span = max(high - low, 1e-6 * max(abs(low), abs(high), 1.0))
    power = 10.0 ** math.floor(math.log10(span / 4))
    spacing = power * next((factor for factor in (5, 2) if span >= 4 * power * factor), 1)
    first, last = math.floor(low / spacing), math.ceil(high / spacing)
    return [round(index * spacing, 12) for index in range(first, max(last, first + 1) + 1)]


def _axis(ticks: Sequence[float], start: float, end: float) -> Axis:
    """Return the map from values to pixels that takes the first tick to `start` and the last to `end`."""
    scale = (end - start) / (ticks[-1] - ticks[0])
    return lambda values: start + (np.asarray(values) - ticks[0]) * scale


def _grid(x_ticks: Sequence[float], y_ticks: Sequence[float], x: Axis, y: Axis) -> list[str]:
    parts = []
    for tick in x_ticks:
        at = f"{x(tick):.1f}"
        parts.append(f'<line x1="{at}" y1="{_TOP}" x2="{at}" y2="{_BOTTOM}" stroke="#eee"/>')
        parts.append(f'<text x="{at}" y="{_BOTTOM + 18}" text-anchor="middle">{tick:,.10g}</text>')
    for tick in y_ticks:
        at = f"{y(tick):.1f}"
        parts.append(f'<line x1="{_LEFT}" y1="{at}" x2="{_RIGHT}" y2="{at}" stroke="#eee"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at}" dy="4" text-anchor="end">{tick:.10g}</text>')
    middle = (_TOP + _BOTTOM) / 2
    return [
        *parts,
        f'<path d="M{_LEFT},{_TOP} V{_BOTTOM} H{_RIGHT}" fill="none" stroke="#333"/>',
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">step</text>',
        f'<text transform="translate(18,{middle}) rotate(-90)" text-anchor="middle">loss (nats per token)</text>',
    ]


def _line(name: str, curve: Curve, x: Axis, y: Axis, colour: str, width: float) -> str:
    if not curve[0].size:
        return ""
    points = " ".join(f"{px:.1f},{py:.1f}" for px, py in zip(x(curve[0]), y(curve[1]), strict=True))
    return f'<polyline id="{name}" points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _dots(name: str, curve: Curve, x: Axis, y: Axis, colour: str) -> list[str]:
    dots = [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in zip(x(curve[0]), y(curve[1]), strict=True)]
    return [f'<g id="{name}" fill="{colour}">', *dots, "</g>"]


def _legend(*entries: tuple[str, str]) -> list[str]:
    parts = []
    for index, (label, colour) in enumerate(entries):
        left = _LEFT + 20 + 190 * index
        parts.append(f'<line x1="{left}" y1="22" x2="{left + 24}" y2="22" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{left + 30}" y="26">{label}</text>')
    return parts
