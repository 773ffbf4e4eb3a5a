"""Safetensors folders: every way a file or an index can be wrong gives one message that names it."""

import json
import os
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.checkpoint.tensors import INDEX_FILE, SINGLE_FILE, TensorFolder, safetensors_files
from jaxllm.errors import InputError


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def raw(header, data=b"", length=None):
    """Return the bytes of a safetensors file; `length`: what it claims its header to have."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}'
HOSTILE = {
    "empty": b"",
    "shorter than its length": b"\x01\0",
    "huge header length": raw({"a": entry(0, 8)}, b"x" * 8, length=2**62),
    "header length beyond the file": raw({"a": entry(0, 8)}, b"x" * 8, length=10_000),
    "header length inside the header": raw({"a": entry(0, 8)}, b"x" * 8, length=3),
    "no header": raw(b"", b"x" * 8),
    "no JSON": raw(b"{abc}"),
    "no object": raw(b"[1]"),
    "no UTF-8": raw(b'{"\xff": 1}'),
    "deeply nested": raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "offsets beyond the file": raw({"a": entry(0, 16, (4,))}, b"x" * 8),
    "offsets that go back": raw({"a": entry(8, 0)}, b"x" * 8),
    "negative offsets": raw({"a": entry(-8, 0)}, b"x" * 8),
    "overlapping ranges": raw({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12),
    "the same range twice": raw({"a": entry(0, 8), "b": entry(0, 8)}, b"x" * 8),
    "a hole": raw({"a": entry(0, 8), "b": entry(12, 20)}, b"x" * 20),
    "more data than tensors": raw({"a": entry(0, 8)}, b"x" * 20),
    "truncated data": raw({"a": entry(0, 8)}, b"x" * 4),
    "a shape of another size": raw({"a": entry(0, 8, (3,))}, b"x" * 8),
    "a shape that overflows": raw({"a": entry(0, 8, (2**62, 2**62))}, b"x" * 8),
    "an unknown dtype": raw({"a": entry(0, 8, (2,), "F17")}, b"x" * 8),
    "a name twice": raw(TWICE, b"x" * 8),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path, content):
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(InputError) as caught:
        TensorFolder(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / SINGLE_FILE))
    assert "\n" not in str(caught.value)


def test_the_file_builder_can_make_a_good_one(tmp_path):
    (tmp_path / SINGLE_FILE).write_bytes(raw({"a": entry(0, 8), "b": entry(8, 12, (2,), "BF16")}, b"\0\0\x80?" * 3))
    folder = TensorFolder(tmp_path)
    np.testing.assert_array_equal(folder.read("a"), np.ones(2, np.float32))
    assert folder.dtype("b") == ml_dtypes.bfloat16
    np.testing.assert_array_equal(folder.read("b").astype(np.float32), [0.0, 1.0])


def test_a_dtype_that_cannot_be_computed_with_is_named(tmp_path):
    (tmp_path / SINGLE_FILE).write_bytes(raw({"a": entry(0, 8, (8,), "F8_E4M3")}, b"x" * 8))
    folder = TensorFolder(tmp_path)
    with pytest.raises(InputError, match=r"a has dtype F8_E4M3, expected F64, F32, F16, BF16"):
        folder.dtype("a")


SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


def write_shards(folder, shards=None, weight_map=None):
    shards = shards or SHARDS
    for name, file in shards.items():
        save_file({name: np.ones(3, np.float32)}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": shards if weight_map is None else weight_map}))


def test_a_shard_that_the_index_does_not_name_is_refused(tmp_path):
    write_shards(tmp_path)
    assert TensorFolder(tmp_path).files == SHARDS
    save_file({"c": np.ones(3, np.float32)}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(InputError, match=r"model-00003-of-00003\.safetensors.* not part of the model that .*index"):
        TensorFolder(tmp_path)


def test_shards_beside_a_single_file_are_refused(tmp_path):
    write_shards(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    save_file({"a": np.ones(3, np.float32)}, tmp_path / SINGLE_FILE)
    with pytest.raises(InputError, match=r"not part of the model that model\.safetensors describes"):
        TensorFolder(tmp_path)


def test_files_of_other_programs_are_left_alone(tmp_path):
    write_shards(tmp_path)
    save_file({"x": np.ones(3, np.float32)}, tmp_path / "consolidated.safetensors")
    assert TensorFolder(tmp_path).files == SHARDS


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"a": SHARDS["a"], "b": "model-00009-of-00009.safetensors"}, "no model-00009-of-00009.safetensors"),
        ({"a": SHARDS["a"]}, "not part of the model"),
        (SHARDS | {"c": SHARDS["a"]}, "disagree about .'c'."),
        (SHARDS | {"a": "../x.safetensors"}, "a is said to be in '../x.safetensors'"),
        (SHARDS | {"a": "/x.safetensors"}, "a is said to be in '/x.safetensors'"),
        (SHARDS | {"a": "x.bin"}, "expected the name of a .safetensors file"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, weight_map, expected):
    write_shards(tmp_path, weight_map=weight_map)
    with pytest.raises(InputError, match=expected):
        TensorFolder(tmp_path)


def test_an_index_nested_without_end_is_refused(tmp_path):
    (tmp_path / INDEX_FILE).write_text("[" * 200_000)
    with pytest.raises(InputError, match="expected a JSON object with 'weight_map'"):
        TensorFolder(tmp_path)


def test_two_hundred_shards_keep_few_files_open(tmp_path):
    shards = {f"t{i}": f"model-{i + 1:05d}-of-00200.safetensors" for i in range(200)}
    write_shards(tmp_path, shards)
    before = len(os.listdir("/proc/self/fd"))
    folder = TensorFolder(tmp_path)
    assert sum(folder.read(name).sum() for name in shards) == 600
    assert len(os.listdir("/proc/self/fd")) < before + 10


def test_reading_one_tensor_reads_no_other(tmp_path):
    save_file({"large": np.zeros(8_000_000, np.float32), "small": np.ones(10, np.float32)}, tmp_path / SINGLE_FILE)
    tracemalloc.start()
    assert TensorFolder(tmp_path).read("small").sum() == 10
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


class Listed:
    """Tensors of 4 GB, by the file each is in."""

    def __init__(self, files):
        self.files = files

    def shape(self, _):
        return (1_000_000_000,)

    def dtype(self, _):
        return np.dtype(np.float32)


def test_other_formats_get_file_names_of_their_own():
    torch_files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    assert safetensors_files(Listed(torch_files)) == SHARDS
    assert safetensors_files(Listed(SHARDS)) == SHARDS
    assert safetensors_files(Listed({"a": "pytorch_model.bin"})) == {"a": SINGLE_FILE}
    assert safetensors_files(Listed({"a": "x.gguf", "b": "x.gguf"})) == SHARDS
