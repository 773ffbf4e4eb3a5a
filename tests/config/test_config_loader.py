"""Reading run configurations: precedence, overrides, and every kind of mistake with its place."""

import dataclasses

import pytest

from jaxllm.config import DataConfig, RunConfig, load_config
from jaxllm.config.options import all_options
from jaxllm.errors import InputError

VALID = """\
run_dir: runs/a
tokenizer: tok
model:
  name: tiny
data:
  train:
    - path: corpus.txt
  seq_len: 64
schedule: {warmup: 10}
train:
  steps: 100
  batch_size: 8
"""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text, *overrides):
    with open("run.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    return load_config(["run.yaml"], overrides)


def names(config_class):
    return [field.name for field in dataclasses.fields(config_class)]


def problems(text, *overrides):
    with pytest.raises(InputError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def test_absent_options_take_their_defaults():
    config = load(VALID)
    assert (config.run_dir, config.data.train[0].path, config.train.steps) == ("runs/a", "corpus.txt", 100)
    assert (config.optimizer.learning_rate, config.mesh.fsdp, config.data.train[0].format) == (3e-4, "auto", "auto")


@pytest.mark.parametrize("spelling", ["2e-4", "0.0002", ".0002", "2.e-4", "+2E-4"])
def test_float_spellings_are_floats(spelling):
    assert load(f"{VALID}optimizer: {{learning_rate: {spelling}}}").optimizer.learning_rate == 2e-4


def test_an_int_is_a_float_and_underscores_group_digits():
    config = load(VALID + "optimizer: {clip_norm: 2}", "train.steps=1_000")
    assert isinstance(config.optimizer.clip_norm, float)
    assert config.train.steps == 1000


def test_null_is_taken_only_where_it_is_allowed():
    assert load(VALID + "optimizer: {clip_norm: null}").optimizer.clip_norm is None
    assert load(VALID + "optimizer: {clip_norm: }").optimizer.clip_norm is None
    assert problems(VALID + "seed: ~") == ["run.yaml:13: seed: expected int, found null"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_problem():
    assert load("\ufeff" + VALID.replace("\n", "\r\n")) == load(VALID)


def test_later_files_win_key_by_key_and_lists_are_replaced(tmp_path):
    load(VALID)
    (tmp_path / "more.yaml").write_text("train: {steps: 7}\nschedule: {warmup: 1}\ndata: {train: [{path: other}]}\n")
    config = load_config(["run.yaml", "more.yaml"])
    assert (config.train.steps, config.train.batch_size, config.data.seq_len) == (7, 8, 64)
    assert [source.path for source in config.data.train] == ["other"]


def test_an_empty_file_changes_nothing(tmp_path):
    expected = load(VALID)
    (tmp_path / "empty.yaml").write_text("# nothing here\n")
    assert load_config(["run.yaml", "empty.yaml"]) == expected


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.b1=0.5"],
        ["--optimizer.b1=0.5"],
        ["--optimizer.b1", "0.5"],
        ["optimizer={b1: 0.5}"],
        ["optimizer.b1=5e-1"],
    ],
)
def test_overrides_win_over_files(overrides):
    config = load(VALID + "optimizer: {b1: 0.7, b2: 0.8}", *overrides)
    assert (config.optimizer.b1, config.optimizer.b2) == (0.5, 0.8)


def test_overrides_set_lists_and_entries_of_lists():
    config = load(VALID, "--model.window", "[64, null]", "data.train.0.text_key=body", "data.train.1.path=*.txt")
    assert config.model.window == [64, None]
    first, second = config.data.train
    assert (first.path, first.text_key, second.path) == ("corpus.txt", "body", "*.txt")
    assert load(VALID, 'data.train=[{path: "a b"}]').data.train[0].path == "a b"


def test_overrides_open_and_close_optional_sections():
    config = load(VALID, "train.batch_ramp.start=4", "train.batch_ramp.increment=2", "train.batch_ramp.samples=10")
    assert config.train.batch_ramp.increment == 2
    ramp = VALID + "  batch_ramp: {start: 4, increment: 2, samples: 10}\n"
    assert load(ramp, "train.batch_ramp=null").train.batch_ramp is None


def test_signs_of_yaml_mean_nothing_in_a_plain_override():
    config = load(VALID, "run_dir=a: b #c", "--tokenizer", "*x&y", "--data.cache_dir=k=v")
    assert (config.run_dir, config.tokenizer, config.data.cache_dir) == ("a: b #c", "*x&y", "k=v")


def test_a_config_may_come_from_overrides_alone():
    train = ["train.steps=2", "train.batch_size=1", "schedule.warmup=0", "data.train.0.path=x"]
    config = load_config([], ["run_dir=r", "tokenizer=t", "model.name=m", *train])
    assert (config.model.name, config.data.train[0].path) == ("m", "x")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("seeed: 1", "unknown key 'seeed'; did you mean 'seed'?"),
        ("optimizer: {weight_decy: 0.1}", "unknown key 'optimizer.weight_decy'; did you mean 'weight_decay'?"),
        ("weight_decay: 0.1", "unknown key 'weight_decay'; 'weight_decay' belongs under 'optimizer'"),
        ("mesh: {seed: 1}", "unknown key 'mesh.seed'; 'seed' belongs at the top level"),
        ("optimizer.b1: 0.9", "unknown key 'optimizer.b1'; 'b1' belongs under 'optimizer'"),
        (
            "mesh: {batch_size: 1}",
            "unknown key 'mesh.batch_size'; 'batch_size' belongs under 'train' or under 'eval' or under 'rollout'",
        ),
        (
            "text_key: body",
            "unknown key 'text_key'; 'text_key' belongs under 'data.train.*' or under 'data.heldout.*' or under "
            "'data.pretrain.*'",
        ),
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean 'optimizer.learning_rate'?"),
        ("mesh: {zzz: 1}", "unknown key 'mesh.zzz'; expected one of replica, fsdp, expert, tensor, collectives"),
        ("optimizer: {learning_rate: fast}", "optimizer.learning_rate: expected float, found 'fast' (text)"),
        ('optimizer: {learning_rate: "2e-4"}', "optimizer.learning_rate: expected float, found '2e-4' (text)"),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate: expected float, found '.nan' (text)"),
        ("optimizer: {learning_rate: 1e999}", "optimizer.learning_rate: expected float, found '1e999' (text)"),
        ("seed: 1.5", "seed: expected int, found 1.5 (float)"),
        ("seed: 1e3", "seed: expected int, found 1e3 (float)"),
        ("seed: 010", "seed: expected int, found '010' (text)"),
        ('seed: "1"', "seed: expected int, found '1' (text)"),
        ("seed: true", "seed: expected int, found true (true or false)"),
        ("seed: [1]", "seed: expected int, found a list"),
        ("log: {tensorboard: 1}", "log.tensorboard: expected true | false, found 1 (int)"),
        ("log: {tensorboard: yes}", "log.tensorboard: expected true | false, found 'yes' (text)"),
        ("optimizer: {b1: false}", "optimizer.b1: expected float, found false (true or false)"),
        ("log: 3", "log: expected mapping, found 3 (int)"),
        ("log:", "log: expected mapping, found null"),
        ("log: {profile: [1]}", "log.profile: expected mapping | null, found a list"),
        ("mesh: {fsdp: 1.5}", "mesh.fsdp: expected int | 'auto', found 1.5 (float)"),
        ("mesh: {fsdp: atuo}", "mesh.fsdp: expected int | 'auto', found 'atuo' (text); did you mean 'auto'?"),
        (
            "schedule: {kind: cosin}",
            "schedule.kind: expected 'cosine' | 'constant' | 'multistep' | 'wsd', found 'cosin' (text); "
            "did you mean 'cosine'?",
        ),
        ("eval: {every: 0}", "eval.every: expected >= 1, found 0"),
        ("optimizer: {b2: 1}", "optimizer.b2: expected >= 0 and < 1, found 1.0"),
        ("seed: &a 1", None),
        ("seed: !!int 1", "not valid YAML: tags are not supported ('tag:yaml.org,2002:int')"),
        ("? [a]\n: 1", "expected the name of an option, found a list or mapping"),
        ("tokenizer: other", "duplicate key 'tokenizer', first given at run.yaml:2"),
        ("log: {profile: {}}", "missing required key 'log.profile.start' (int: first step traced)"),
    ],
)
def test_one_mistake_is_one_line_with_its_place(line, problem):
    text = VALID.replace("schedule: {warmup: 10}\n", "") + "schedule: {warmup: 10}\n"
    if line.startswith("schedule"):
        text = text.replace("schedule: {warmup: 10}\n", "")
        line = line.replace("{", "{warmup: 10, ")
    number = text.count("\n") + 1
    if problem is None:
        assert load(text + line).seed == 1
    else:
        assert problems(text + line) == [f"run.yaml:{number}: {problem}"]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optimzer.b1=1", "unknown key 'optimzer'; did you mean 'optimizer'?"),
        ("train.stepz=1", "unknown key 'train.stepz'; did you mean 'steps'?"),
        ("train.steps=many", "train.steps: expected int, found 'many' (text)"),
        ("run_dir=2026", "run_dir: expected text, found 2026 (int); quotes make it text"),
        ("run_dir=", "run_dir: expected text, found null"),
        ('run_dir=""', "run_dir: expected text, found nothing"),
        ("data.train.2.path=x", "index 2 is past the end of a list of 1"),
        ("0=x", "unknown key '0'; expected one of " + ", ".join(names(RunConfig))),
        ("data.0.path=x", "unknown key 'data.0'; expected one of " + ", ".join(names(DataConfig))),
        ("optimizer.0=1", "optimizer: expected mapping, found a list"),
        ("steps", "expected key=value or --key value, found 'steps'"),
        ("--train.steps", "expected key=value or --key value, found '--train.steps'"),
        (
            "model.window=[64",
            "not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
        ),
        ("train.steps.x=1", "train.steps: expected int, found a mapping"),
    ],
)
def test_mistakes_on_the_command_line(override, problem):
    assert problems(VALID, override) == [f"command line: {problem}"]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_input(tmp_path):
    (tmp_path / "base.yaml").write_text("run_dir: r\nmesh:\n  lr: 1\ntrain: {steps: 1.5}\n")
    (tmp_path / "run.yaml").write_text(
        "log:\n  profile: {steps: 1}\nmodel: {nam: x, window: [1, two, 0]}\n"
        "data:\n  train: [{pth: a}]\ntrain:\n  grad_accum: 3\n  batch_size: 8\n"
    )
    with pytest.raises(InputError) as caught:
        load_config(["base.yaml", "run.yaml"], ["sed=1", "log.every=0"])
    path = all_options()["data.train.*.path"].help
    assert str(caught.value).splitlines() == [
        "base.yaml:3: unknown key 'mesh.lr'; expected one of replica, fsdp, expert, tensor, collectives",
        "base.yaml:4: train.steps: expected int, found 1.5 (float)",
        "run.yaml:2: missing required key 'log.profile.start' (int: first step traced)",
        "run.yaml:3: model.window.1: expected int | null, found 'two' (text)",
        "run.yaml:3: unknown key 'model.nam'; did you mean 'name'?",
        f"run.yaml:5: missing required key 'data.train.0.path' (text: {path})",
        "run.yaml:5: unknown key 'data.train.0.pth'; did you mean 'path'?",
        "run.yaml:7: train.grad_accum: expected a divisor of train.batch_size (8), found 3",
        "base.yaml, run.yaml: model.name: missing; expected a size from `jaxllm env --models`, a config.json, or "
        "model.weights",
        "base.yaml, run.yaml: tokenizer: missing; expected a folder or file, or model.weights, which has one",
        "command line: log.every: expected >= 1, found 0",
        "command line: unknown key 'sed'; did you mean 'seed'?",
    ]


def test_a_rule_is_reported_where_its_option_was_given():
    assert problems(VALID, "schedule.total=10") == [
        "run.yaml:9: schedule.warmup: expected less than the schedule.total (10), found 10"
    ]
    assert problems(VALID, "schedule.warmup=100", "schedule.total=50") == [
        "command line: schedule.warmup: expected less than the schedule.total (50), found 100"
    ]


def test_a_run_may_be_shorter_than_its_warm_up():
    assert load(VALID, "train.steps=5").schedule.warmup == 10


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"seed: 1\nrun_dir: \xff\n", "run.yaml:2: not UTF-8 text: byte 0xff"),
        (b"seed: 1\nrun_dir: \x07\n", "run.yaml:2: not valid YAML: unprintable character '\\x07'"),
        (b"- a\n- b\n", "run.yaml:1: expected a mapping of options, found a list"),
        (b"just text\n", "run.yaml:1: expected a mapping of options, found 'just text' (text)"),
        (
            b"seed: 1\nmodel:\n\tname: x\n",
            "run.yaml:3: not valid YAML: while scanning for the next token, "
            "found character '\\t' that cannot start any token",
        ),
        (
            b"seed: 1\nrun_dir: [a\nstage: x\n",
            "run.yaml:3: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got ':'",
        ),
        (
            b"a: 1\n---\nb: 1\n",
            "run.yaml:2: not valid YAML: expected a single document in the stream, but found another document",
        ),
        (b"a: &x 1\nb: *x\n", "run.yaml:2: not valid YAML: aliases are not supported"),
        (b"a: &x [*x]\n", "run.yaml:1: not valid YAML: aliases are not supported"),
        (b"a: " + b"[" * 500, "run.yaml:1: not valid YAML: nested too deeply"),
    ],
)
def test_a_file_that_is_no_yaml_mapping(tmp_path, data, problem):
    (tmp_path / "run.yaml").write_bytes(data)
    with pytest.raises(InputError) as caught:
        load_config(["run.yaml"])
    assert str(caught.value) == problem


def test_an_unreadable_file_hides_no_mistake_elsewhere_and_makes_none_up(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: x\n")
    with pytest.raises(InputError) as caught:
        load_config(["run.yaml", "absent.yaml", "."])
    assert str(caught.value).splitlines() == [
        "run.yaml:1: seed: expected int, found 'x' (text)",
        "absent.yaml: cannot read the config: No such file or directory",
        ".: cannot read the config: Is a directory",
    ]
