"""Configs as text: what is dumped loads back equal; differences and the table of options are complete."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.config import (
    BatchRampConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
    config_help,
    diff_configs,
    dump_config,
    load_config,
)

# Text that reads as something else without quotes, besides any text at all.
TRAPS = [
    "2e-4",
    "1.",
    "1_000",
    "010",
    "0o7",
    "yes",
    "null",
    "~",
    "True",
    "a: b",
    "# c",
    "*x",
    "- a",
    " x ",
    "a\nb",
    "\x85",
]
text = st.sampled_from(TRAPS) | st.text(min_size=1, max_size=20)
count = st.integers(1, 10**18 - 1)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
share = st.floats(0, 1, exclude_min=True, exclude_max=True)


def optional(strategy):
    return st.none() | strategy


@st.composite
def schedules(draw, steps):
    total = draw(optional(st.integers(2, 10**9)))
    length = steps if total is None else total
    warmup = draw(st.integers(0, length - 2))
    kind = draw(st.sampled_from(["cosine", "constant", "multistep", "wsd"]))
    boundaries = sorted(draw(st.sets(share, min_size=1, max_size=3))) if kind == "multistep" else []
    return ScheduleConfig(
        kind=kind,
        warmup=warmup,
        total=total,
        floor=draw(st.floats(0, 1)),
        boundaries=boundaries,
        factors=[draw(positive) for _ in boundaries],
        decay=draw(optional(st.integers(1, length - warmup))) if kind == "wsd" else None,
    )


@st.composite
def trains(draw, steps):
    start, increment, stages = (draw(st.integers(1, 100)) for _ in range(3))
    ramp = BatchRampConfig(start=start, increment=increment, samples=draw(count))
    return TrainConfig(
        steps=steps,
        batch_size=start + increment * stages,
        batch_ramp=draw(optional(st.just(ramp))),
        z_loss=draw(positive),
        loss_chunk=draw(optional(count)),
    )


def sources(weights, min_size=0):
    formats = st.sampled_from(["auto", "txt", "jsonl", "parquet", "shards"])
    return st.lists(
        st.builds(SourceConfig, path=text, format=formats, text_key=text, weight=weights), min_size=min_size, max_size=2
    )


@st.composite
def configs(draw):
    steps = draw(st.integers(2, 10**9))
    model = st.builds(
        ModelConfig,
        name=text,
        window=optional(st.lists(optional(count), min_size=1, max_size=3)),
        init=st.builds(InitConfig, std=positive, scale_outputs_by_depth=st.booleans()),
    )
    heldout = draw(sources(st.none()))
    return RunConfig(
        run_dir=draw(text),
        tokenizer=draw(text),
        seed=draw(st.integers(0, 2**32 - 1)),
        model=draw(model),
        data=DataConfig(
            train=draw(sources(st.none(), 1) | sources(positive, 1)),
            heldout=heldout,
            shuffle=draw(st.booleans()),
            cache_dir=draw(optional(text)),
        ),
        optimizer=draw(st.builds(OptimizerConfig, learning_rate=positive, b1=share, clip_norm=optional(positive))),
        schedule=draw(schedules(steps)),
        mesh=draw(st.builds(MeshConfig, fsdp=st.just("auto") | count)),
        train=draw(trains(steps)),
        checkpoint=draw(st.builds(CheckpointConfig, keep_every=optional(count))),
        eval=EvalConfig(every=draw(count) if heldout else None),
        log=LogConfig(profile=draw(optional(st.builds(ProfileConfig, start=st.integers(0, steps))))),
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("config") / "config.yaml"


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs())
def test_a_dumped_config_loads_back_equal(file, config):
    file.write_bytes(dump_config(config).encode())
    assert load_config([file]) == config


CONFIG = RunConfig(
    run_dir="r",
    tokenizer="t",
    model=ModelConfig(name="m", window=[64, None]),
    data=DataConfig(train=[SourceConfig(path="a")]),
    train=TrainConfig(steps=100, batch_size=8),
)


def test_lists_of_numbers_are_dumped_on_one_line():
    assert "\n  window: [64, null]\n" in dump_config(CONFIG)


def test_equal_configs_do_not_differ():
    assert diff_configs(CONFIG, dataclasses.replace(CONFIG)) == []


def test_differences_name_option_old_and_new():
    ramp = BatchRampConfig(start=2, increment=2, samples=9)
    new = dataclasses.replace(
        CONFIG,
        model=ModelConfig(name="n", window=None),
        data=DataConfig(train=[SourceConfig(path="a"), SourceConfig(path="b")], shuffle=False),
        train=TrainConfig(steps=100, batch_size=8, batch_ramp=ramp),
    )
    assert diff_configs(CONFIG, new) == [
        'model.name: "m" -> "n"',
        "model.window: [64, null] -> null",
        "data.shuffle: true -> false",
        "train.batch_ramp: null -> (absent)",
        'data.train.1.path: (absent) -> "b"',
        'data.train.1.format: (absent) -> "auto"',
        'data.train.1.rows: (absent) -> "auto"',
        'data.train.1.text_key: (absent) -> "text"',
        "data.train.1.system: (absent) -> null",
        "data.train.1.weight: (absent) -> null",
        "train.batch_ramp.start: (absent) -> 2",
        "train.batch_ramp.increment: (absent) -> 2",
        "train.batch_ramp.samples: (absent) -> 9",
    ]


def test_ignored_options_may_differ():
    new = dataclasses.replace(
        CONFIG, log=LogConfig(every=1, profile=ProfileConfig(start=1)), train=TrainConfig(steps=5, batch_size=8), seed=2
    )
    assert diff_configs(CONFIG, new, ignore=("train.steps", "log.*")) == ["seed: 0 -> 2"]


def test_the_help_has_every_option_with_its_help():
    help_text = config_help()
    rows = {line.split()[0] for line in help_text.splitlines() if not line.startswith(" ")}

    def check(config_class, prefix):
        for field in dataclasses.fields(config_class):
            assert field.metadata["help"]
            if not dataclasses.is_dataclass(field.default_factory):
                assert prefix + field.name in rows
                assert field.metadata["help"] in help_text
            else:
                check(field.default_factory, f"{prefix}{field.name}.")

    check(RunConfig, "")
    assert "data.train.*.path" in rows and "train.batch_ramp.start" in rows
