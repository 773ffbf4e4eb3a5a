import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import abstract, assert_same, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.checkpoint.manager import CheckpointManager
from jaxllm.checkpoint.reader import CheckpointReader, open_checkpoint
from jaxllm.errors import InputError
from jaxllm.types import TrainState

HERE = Path(__file__).parent
ABSTRACT = abstract(state_of(0))


@pytest.fixture
def new_manager(tmp_path):
    managers = []

    def build(folder=tmp_path / "checkpoints", keep_last=3, keep_every=None):
        managers.append(CheckpointManager(folder, keep_last=keep_last, keep_every=keep_every))
        return managers[-1]

    yield build
    for manager in managers:
        manager.close()


def save(manager, *steps):
    for step in steps:
        manager.save(state_of(step), data_state={"step": step}, meta={"spec": {"layers": step}})
    manager.wait()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with checkpoints 4 and 9, for tests that only read it or copy it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    manager = CheckpointManager(folder, keep_last=2, keep_every=None)
    save(manager, 4, 9)
    manager.close()
    return folder


def test_round_trip_of_each_step(two_steps):
    reader = CheckpointReader(two_steps)
    assert reader.steps() == [4, 9]
    for asked, step in ((4, 4), (9, 9), (None, 9)):
        state, data_state, meta = reader.restore(ABSTRACT, asked)
        assert_same(state, state_of(step))
        assert (data_state, meta) == ({"step": step}, {"spec": {"layers": step}})
        assert reader.read_meta(asked) == meta


def test_layout(two_steps):
    expected = {"params", "opt_state", "data", "meta.json", "manifest.json"}
    assert expected <= {path.name for path in (two_steps / "9").iterdir()}
    assert sorted(path.name for path in two_steps.iterdir()) == ["4", "9"]


def test_donating_the_state_right_after_save_changes_nothing(new_manager):
    manager = new_manager()
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 1, state), donate_argnums=0)
    big = state_of(5, width=50_000)
    expected = jax.tree.map(lambda x: np.array(x, copy=True), big)
    advance.lower(big).compile()
    manager.save(big, data_state={}, meta={})
    advance(big)
    manager.wait()
    assert_same(manager.restore(abstract(expected))[0], expected)


def on_mesh(*sizes):
    assert len(jax.devices()) >= 8, "tests/conftest.py forces 8 host devices"
    mesh = jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])

    def sharding_of(x):
        spec = ("fsdp", "tensor") if x.ndim == 2 and x.shape[0] == 16 else (None, "fsdp") if x.ndim == 3 else ()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return sharding_of


@pytest.mark.parametrize("target", [(2, 4), (8, 1)])
def test_restore_goes_straight_into_the_shardings_of_another_mesh(new_manager, target):
    manager = new_manager()
    state = state_of(6)
    manager.save(jax.device_put(state, jax.tree.map(on_mesh(4, 2), state)), data_state={}, meta={})
    manager.wait()
    wanted = abstract(state, on_mesh(*target))
    found, _, _ = manager.restore(wanted)
    assert_same(found, state)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, wanted)
    shards = found.params["embed"]["kernel"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(16 // target[0], 8 // target[1])}


def test_params_alone_need_no_optimizer_state_and_are_cast(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/9/opt_state")
    reader = CheckpointReader(tmp_path / "copy")
    assert_same(reader.restore_params(ABSTRACT.params), state_of(9).params)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), ABSTRACT.params)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state_of(9).params)
    assert_same(reader.restore_params(half), expected)
    with pytest.raises(InputError, match="damaged checkpoint: opt_state"):
        reader.restore(ABSTRACT)


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [truncate, lengthen, Path.unlink])
def test_every_damaged_file_is_noticed_and_named(two_steps, tmp_path, damage):
    names = files_of(two_steps / "9")
    assert len(names) > 15
    reader = CheckpointReader(tmp_path / "copy")
    shutil.copytree(two_steps / "4", reader.folder / "4")
    for name in names:
        shutil.copytree(two_steps / "9", reader.folder / "9")
        damage(reader.folder / "9" / name)
        with pytest.raises(InputError) as caught:
            reader.restore(ABSTRACT)
        assert f"{reader.folder}/9: damaged checkpoint: {name.as_posix()}" in str(caught.value)
        assert "--from-step 4" in str(caught.value)
        shutil.rmtree(reader.folder / "9")
    assert_same(reader.restore(ABSTRACT, 4)[0], state_of(4))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_flipped_bit_never_gives_other_numbers(two_steps, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flipped")
    shutil.copytree(two_steps / "9", folder / "9")
    path = folder / "9" / data.draw(st.sampled_from(files_of(folder / "9")))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        state, data_state, meta = CheckpointReader(folder).restore(ABSTRACT)
    except InputError as error:
        assert "damaged checkpoint" in str(error) and "there is no other one" in str(error)
    else:
        assert path.name == "manifest.json"  # a blank of its layout became another blank
        assert_same(state, state_of(9))
        assert (data_state, meta) == ({"step": 9}, {"spec": {"layers": 9}})


def message_of(action, *args):
    with pytest.raises(InputError) as caught:
        action(*args)
    return str(caught.value)


def test_nothing_to_restore(two_steps, tmp_path):
    assert "no such folder" in message_of(CheckpointReader(tmp_path / "none").restore, ABSTRACT)
    assert "an empty folder" in message_of(CheckpointReader(tmp_path).restore, ABSTRACT)
    (tmp_path / "model.safetensors").touch()
    assert "found model.safetensors" in message_of(CheckpointReader(tmp_path).restore_params, ABSTRACT.params)
    assert "no checkpoint of step 5; there are 9, 4" in message_of(CheckpointReader(two_steps).restore, ABSTRACT, 5)
    (tmp_path / "7").mkdir()
    assert "jaxllm did not write this folder" in message_of(CheckpointReader(tmp_path).read_meta)


def changed(tree, path, shape=None, dtype=None):
    """Copy an abstract tree of dicts with one leaf's shape or dtype changed."""
    head, *rest = path
    if rest:
        return tree | {head: changed(tree[head], rest, shape, dtype)}
    leaf = tree[head]
    return tree | {head: jax.ShapeDtypeStruct(shape or leaf.shape, dtype or leaf.dtype, sharding=leaf.sharding)}


def test_another_model_or_optimizer_is_refused_by_name(two_steps):
    reader = CheckpointReader(two_steps)
    params = changed(ABSTRACT.params, ("layers", "bias"), shape=(2, 9))
    expected = "params/layers/bias is float32[2,8], expected float32[2,9]"
    assert expected in message_of(reader.restore_params, params)
    assert expected in message_of(reader.restore, ABSTRACT.replace(params=params))

    params = changed(ABSTRACT.params, ("embed", "kernel"), dtype=jnp.float16)
    assert "params/embed/kernel is float32[16,8], expected float16" in message_of(
        reader.restore, ABSTRACT.replace(params=params)
    )
    extra = ABSTRACT.params | {"head": {"kernel": ABSTRACT.params["embed"]["kernel"]}}
    assert "params/head/kernel is missing, expected float32[16,8]" in message_of(reader.restore_params, extra)
    fewer = {"layers": ABSTRACT.params["layers"]}
    assert "params/embed/kernel float32[16,8] is not part of" in message_of(reader.restore_params, fewer)
    sgd = ABSTRACT.replace(opt_state=(ABSTRACT.opt_state[0],))
    assert "opt_state/optimizer/1/0/count int32[] is not part of" in message_of(reader.restore, sgd)


def test_open_checkpoint_finds_what_the_user_means(two_steps, tmp_path):
    for path, step in ((two_steps.parent, None), (two_steps, None), (two_steps / "4", 4)):
        reader, found = open_checkpoint(path)
        assert (reader.folder, found) == (two_steps, step)
    assert "no checkpoint" in message_of(open_checkpoint, tmp_path)
    shutil.copytree(two_steps / "4", tmp_path / "best")
    assert "must be named by its step" in message_of(open_checkpoint, tmp_path / "best")


def test_retention(new_manager):
    manager = new_manager(keep_last=2, keep_every=4)
    save(manager, 1, 2, 3, 4, 5, 6, 7)
    assert manager.steps() == [4, 6, 7]
    assert_same(manager.restore(ABSTRACT, 4)[0], state_of(4))


def test_going_back_replaces_that_step_and_drops_later_ones(new_manager):
    manager = new_manager()
    save(manager, 2, 4, 6)
    manager.save(state_of(4), data_state={"again": True}, meta={})
    manager.wait()
    assert manager.steps() == [2, 4]
    assert manager.restore(ABSTRACT)[1] == {"again": True}
    assert any("removed checkpoints [6]" in note for note in manager.notes)


def test_start_repairs_what_a_kill_left(new_manager, two_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps / "4", folder / "4.replaced")
    shutil.copytree(two_steps / "4", folder / "2.replaced")
    for name in ("2", "9.saving", "12.saving.orbax-checkpoint-tmp", "1.deleting"):
        shutil.copytree(two_steps / "9", folder / name)
    (folder / "notes.saving").mkdir()
    assert CheckpointReader(folder).steps() == [2]
    manager = new_manager(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "notes.saving"]
    assert [note.split(":")[0] for note in manager.notes] == [
        "removed 12.saving.orbax-checkpoint-tmp",
        "removed 9.saving",
    ]


def test_too_little_disk_space_is_refused_before_writing(new_manager):
    manager = new_manager()
    save(manager, 1)
    huge = np.broadcast_to(np.float32(0), (2**44,))
    state = TrainState(step=jnp.int32(2), params={"w": huge}, opt_state=(), rng=jnp.zeros(2, jnp.uint32))
    message = message_of(lambda: manager.save(state, data_state={}, meta={}))
    assert "checkpoint needs 7.18e+04 GB" in message and "GB free" in message
    assert sorted(path.name for path in manager.folder.iterdir()) == ["1"]


def helper_environment():
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(HERE)}


def test_failed_write_is_one_message_and_leaves_the_older_checkpoint(tmp_path, new_manager):
    folder = tmp_path / "checkpoints"
    command = [sys.executable, HERE / "failed_write.py", folder]
    child = subprocess.run(command, env=helper_environment(), capture_output=True, text=True, timeout=60)
    assert child.stdout == f"{folder}: step 2 could not be saved: File too large; the newest checkpoint is 1\n"
    assert (child.returncode, child.stderr) == (0, "")
    manager = new_manager(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3"]
    assert_same(manager.restore(ABSTRACT, 1)[0], state_of(1))
    assert_same(manager.restore(ABSTRACT, 3)[0], state_of(3))


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk(new_manager, small_disk):
    manager = new_manager(small_disk / "checkpoints")
    save(manager, 1)
    state = state_of(2, width=8192)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - int(1.02 * arrays) - 8192))
    manager.save(state, data_state={}, meta={})  # passes the check, but leaves no room for metadata
    assert "step 2 could not be saved" in message_of(manager.wait)
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free + filler.stat().st_size - arrays // 2))
    assert "free some space" in message_of(lambda: manager.save(state, data_state={}, meta={}))
    filler.unlink()
    assert sorted(path.name for path in manager.folder.iterdir()) == ["1"]
    manager.save(state, data_state={}, meta={})
    manager.wait()
    assert_same(manager.restore(abstract(state))[0], state)


def test_unwritable_folder(tmp_path):
    (tmp_path / "checkpoints").touch()
    message = message_of(lambda: CheckpointManager(tmp_path / "checkpoints", keep_last=1, keep_every=None))
    assert "checkpoints cannot be written here" in message


def kill_while(writer, folder, moment):
    """Start a writer on `folder`, kill it with SIGKILL after `moment()`, and wait until it is gone."""
    writer.stdin.write(f"{folder}\n")
    writer.stdin.flush()
    pid = int(writer.stdout.readline())
    moment()
    os.kill(pid, signal.SIGKILL)
    assert writer.stdout.readline() == "dead\n"


def wait_for(condition):
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_kill_9_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path, new_manager):
    reader = CheckpointReader(tmp_path / "checkpoints")
    moments = random.Random(0)
    writer = subprocess.Popen(
        [sys.executable, HERE / "kill_writer.py"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=helper_environment(), text=True,
    )  # fmt: skip
    interrupted = 0
    for _ in range(4):
        before = reader.latest_step() or 0

        def moment(before=before):
            wait_for(lambda: (reader.latest_step() or 0) > before)
            wait_for(lambda: any(reader.folder.glob("*.saving*")))
            time.sleep(moments.uniform(0, 0.1))

        kill_while(writer, reader.folder, moment)
        interrupted += any(reader.folder.glob("*.saving*"))
        state, data_state, meta = reader.restore(ABSTRACT)
        step = int(state.step)
        assert step == reader.latest_step() > before
        assert_same(state, state_of(step))
        assert (data_state, meta) == ({"step": step}, {"half": step / 2})
    writer.stdin.close()
    assert writer.wait() == 0
    assert interrupted > 0
    assert new_manager().steps()[-1] == step
    assert not any(reader.folder.glob("*.*"))


def test_two_processes_save_restore_and_agree_on_damage(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, HERE / "two_processes.py", str(port)]
    workers = [
        subprocess.Popen(
            [*command, str(i), tmp_path / "c"], env=helper_environment(), stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    outputs = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert all(output.endswith("both as expected\n") for output in outputs)
