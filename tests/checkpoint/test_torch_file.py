"""torch.save files without torch: what is in them comes out, and nothing in them is ever executed."""

import json
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.checkpoint.formats import open_tensors
from jaxllm.checkpoint.restricted_pickle import MAX_BYTES
from jaxllm.checkpoint.torch_file import TorchFile
from jaxllm.errors import InputError
from tests.checkpoint.torch_writer import (
    Opcodes,
    View,
    integer,
    name,
    text,
    write_legacy,
    write_pickle,
    write_torch,
)

ARRAYS = {
    "float32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "float16": np.linspace(-1, 1, 5).astype(np.float16),
    "bfloat16": np.linspace(-1, 1, 6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "int64": np.arange(4),
    "bool": np.array([True, False]),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def assert_holds(file, arrays):
    assert set(file.names()) == set(arrays)
    for key, array in arrays.items():
        assert (file.dtype(key), file.shape(key)) == (array.dtype, array.shape)
        np.testing.assert_array_equal(file.read(key), array)


@pytest.mark.parametrize("write", [write_torch, write_legacy])
def test_every_dtype_comes_back(tmp_path, write):
    assert_holds(TorchFile(write(tmp_path / "x.bin", ARRAYS)), ARRAYS)


def test_strides_offsets_and_shared_storages(tmp_path):
    flat = np.arange(24, dtype=np.float32)
    views = {
        "whole": View(flat, (4, 6), (6, 1)),
        "transposed": View(flat, (6, 4), (1, 6)),
        "sliced": View(flat, (2, 3), (12, 2), offset=7),
    }
    file = TorchFile(write_torch(tmp_path / "x.bin", views))
    whole = flat.reshape(4, 6)
    assert_holds(file, {"whole": whole, "transposed": whole.T, "sliced": np.array([[7, 9, 11], [19, 21, 23]], "f4")})
    assert not file.read("whole").flags.writeable


def test_nested_dictionaries_and_what_lies_beside_the_tensors(tmp_path):
    value = {
        "module": {"a": ARRAYS["float32"], "b": ARRAYS["float16"]},
        "iteration": 300_000,
        "rng": (1, None, [2, "x"]),
        "args": Opcodes(name("argparse", "Namespace") + b")\x81}(" + text("lr") + integer(3) + b"ub"),
        "names": Opcodes(name("__builtin__", "set") + b"](" + text("a") + b"e\x85R"),
    }
    path = write_torch(tmp_path / "x.pt", value)
    assert set(TorchFile(path).names()) == {"module.a", "module.b"}
    assert_holds(TorchFile(path, "module."), {"a": ARRAYS["float32"], "b": ARRAYS["float16"]})
    with pytest.raises(InputError, match=r"holds no tensors under 'model\.'"):
        TorchFile(path, "model.")


def test_parameters_and_ordered_dictionaries(tmp_path):
    tensor = name("torch._utils", "_rebuild_parameter") + b"("
    ordered = name("collections", "OrderedDict") + b")R"
    # OrderedDict(w=Parameter(tensor)) with the attribute _metadata, as state_dict() gives it
    inner = write_torch(tmp_path / "inner.bin", ARRAYS["float32"])
    with zipfile.ZipFile(inner) as archive:
        array = archive.read("archive/data.pkl")[2:-1]
    value = (
        ordered + b"(" + text("w") + tensor + array + b"\x88" + ordered + b"tR" + b"u}(" + text("_metadata") + b"Nub"
    )
    path = write_torch(tmp_path / "x.bin", Opcodes(value), storages=[ARRAYS["float32"].tobytes()])
    assert_holds(TorchFile(path), {"w": ARRAYS["float32"]})


def test_folders_with_one_file_or_several(tmp_path):
    write_torch(tmp_path / "pytorch_model.bin", {"a": ARRAYS["float32"]})
    assert open_tensors(tmp_path).files == {"a": "pytorch_model.bin"}
    many = tmp_path / "many"
    many.mkdir()
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for key, file in files.items():
        write_torch(many / file, {key: ARRAYS["float32"]})
    (many / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    folder = open_tensors(many)
    assert folder.files == files
    np.testing.assert_array_equal(folder.read("b"), ARRAYS["float32"])
    (many / files["b"]).unlink()
    with pytest.raises(InputError, match=r"no pytorch_model-00002-of-00002\.bin"):
        open_tensors(many)


def test_a_folder_without_tensors_says_what_is_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"no tensors; expected model\.safetensors or .* pytorch_model\.bin"):
        open_tensors(tmp_path)


def call(function, *arguments):
    return b"\x80\x02" + name(*function) + b"(" + b"".join(arguments) + b"tR."


MARKER = "executed"


def doubled(depth):
    """Nest dictionaries that hold the one below twice: as many leaves as 2 to the depth."""
    if depth == 0:
        return b"}q\0"
    again = b"h" + bytes([depth - 1])
    return b"}(" + text("a") + doubled(depth - 1) + text("b") + again + b"uq" + bytes([depth])


TENSOR = name("torch._utils", "_rebuild_tensor_v2")
STORAGE = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + integer(4) + b"tQ"


def tensor(offset, shape, strides, storage=STORAGE):
    sizes = [b"(" + b"".join(map(integer, each)) + b"t" for each in (shape, strides)]
    return b"\x80\x02}" + text("w") + TENSOR + b"(" + storage + integer(offset) + b"".join(sizes) + b"\x89NtRs."


def storage(kind="FloatStorage", key=None, size=4, tag="storage"):
    key = text("0") if key is None else key
    return b"(" + text(tag) + name("torch", kind) + key + text("cpu") + integer(size) + b"tQ"


HOSTILE = {
    "os.system": (call(("os", "system"), text(f"touch {MARKER}")), "refused to execute os.system"),
    "posix.system": (call(("posix", "system"), text(f"touch {MARKER}")), "refused to execute posix.system"),
    "eval": (call(("builtins", "eval"), text(f"open('{MARKER}', 'w')")), "refused to execute builtins.eval"),
    "eval of python 2": (call(("__builtin__", "eval"), text("1")), "refused to execute __builtin__.eval"),
    "a name from the stack": (
        b"\x80\x04" + text("os") + text("system") + b"\x93" + text(f"touch {MARKER}") + b"\x85R.",
        "refused to execute os.system",
    ),
    "a dotted name": (b"\x80\x04" + text("torch") + text("os.system") + b"\x93.", "refused to execute torch.os.system"),
    "a getter": (call(("operator", "attrgetter"), text("system")), "refused to execute operator.attrgetter"),
    "torch.load itself": (call(("torch", "load"), text("x")), "refused to execute torch.load"),
    "INST": (b"(" + text("true") + b"ios\nsystem\n.", "refused opcode INST"),
    "OBJ": (b"(" + name("collections", "OrderedDict") + b"o.", "refused opcode OBJ"),
    "EXT1": (b"\x80\x02\x82\x01.", "refused opcode EXT1"),
    "PERSID": (b"Pfile\n.", "refused opcode PERSID"),
    "a call of text": (b"\x80\x02" + text("x") + b")R.", "a call of a str"),
    "a call of a dictionary": (b"\x80\x02})R.", "a call of a dict"),
    "attributes of a tensor": (tensor(0, (4,), (1,))[:-2] + b"}bs.", "attributes for a StoredTensor"),
    "a call with wrong arguments": (call(("torch._utils", "_rebuild_tensor_v2")), "wrong arguments"),
    "an ordered dictionary of many": (call(("collections", "OrderedDict"), b"]"), "wrong arguments"),
    "deep tuples": (b"\x80\x02)" + b"\x85" * 500_000 + b".", "expected a dictionary of tensors"),
    "deep tuples as key": (b"\x80\x02})" + b"\x85" * 500_000 + b"Ns.", "a dictionary key that is a tuple"),
    "a memo bomb": (b"\x80\x02" + doubled(60) + b".", "nest more than 4 deep, or one occurs twice"),
    "a dictionary in itself": (b"\x80\x02}q\0(" + text("a") + b"h\0u.", "or one occurs twice"),
    "too many objects": (b"\x80\x02" + b"}" * 200_000 + b".", "more than 100000"),
    "a huge count": (b"\x80\x02X" + struct.pack("<I", 2**31) + b"a.", "damaged"),
    "a huge number": (b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"a.", "damaged"),
    "an empty stack": (b"\x80\x02R.", "damaged"),
    "no mark": (b"\x80\x02t.", "no mark"),
    "an unknown memo entry": (b"\x80\x02h\x07.", "damaged"),
    "an unknown opcode": (b"\x80\x02\xff.", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
    "two results": (b"\x80\x02}}.", "2 objects are left"),
    "no dictionary": (b"\x80\x02K\x01.", "expected a dictionary of tensors, found a int"),
    "no tensors": (b"\x80\x02}.", "holds no tensors"),
    "a tensor beyond its storage": (tensor(0, (5,), (1,)), "beyond its storage of 4 elements"),
    "an offset beyond the storage": (tensor(1, (4,), (1,)), "beyond its storage"),
    "strides beyond the storage": (tensor(0, (2, 2), (3, 1)), "beyond its storage"),
    "a tensor larger than its storage": (tensor(0, (10**9, 10**9), (0, 0)), "beyond its storage"),
    "negative strides": (tensor(3, (4,), (-1,)), "not described as torch does"),
    "sizes without end": (tensor(0, (2,) * 40, (0,) * 40), "not described as torch does"),
    "shape and strides of other lengths": (tensor(0, (4,), (1, 1)), "not described as torch does"),
    "a storage of another name": (tensor(0, (4,), (1,), storage(key=text("7"))), "found no such storage"),
    "a storage named by a path": (tensor(0, (4,), (1,), storage(key=text("../data.pkl"))), "no such storage"),
    "a storage of another size": (tensor(0, (4,), (1,), storage(size=5)), "of 20 bytes, found 16 bytes"),
    "a storage of another dtype": (tensor(0, (4,), (1,), storage("DoubleStorage")), "of 32 bytes, found 16 bytes"),
    "a huge storage": (tensor(0, (4,), (1,), storage(size=2**61)), "found 16 bytes"),
    "a storage of no kind": (tensor(0, (4,), (1,), storage("Size")), "a storage of Size"),
    "a persistent id of another kind": (tensor(0, (4,), (1,), storage(tag="module")), "no plain storage"),
}


@pytest.mark.parametrize(("pickled", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_is_refused_and_nothing_is_executed(tmp_path, monkeypatch, pickled, expected):
    monkeypatch.chdir(tmp_path)
    path = write_pickle(tmp_path / "x.bin", pickled)
    with pytest.raises(InputError) as caught:
        TorchFile(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert [each.name for each in tmp_path.iterdir()] == ["x.bin"]


def test_the_builder_of_hostile_tensors_can_make_a_good_one(tmp_path):
    assert_holds(TorchFile(write_pickle(tmp_path / "x.bin", tensor(0, (2, 2), (2, 1)))), {"w": np.zeros((2, 2), "f4")})


def test_the_name_and_place_of_what_is_refused_are_told(tmp_path):
    path = write_pickle(tmp_path / "x.bin", b"\x80\x02}" + name("os", "system") + b"0.")
    with pytest.raises(InputError, match=r"os\.system, which no dictionary of tensors needs, at offset 3"):
        TorchFile(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@given(st.binary(max_size=60), st.integers(0, 300))
@settings(max_examples=150)
def test_no_damage_gives_anything_but_one_message(tmp_path_factory, noise, place):
    good = tensor(0, (2, 2), (2, 1))
    place %= len(good)
    path = write_pickle(tmp_path_factory.getbasetemp() / "x.bin", good[:place] + noise + good[place + len(noise) :])
    try:
        file = TorchFile(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert all(file.read(key).shape == file.shape(key) for key in file.names())


def test_a_pickle_that_is_too_long_is_refused(tmp_path):
    path = write_pickle(tmp_path / "x.bin", b"\x80\x02" + b"0" * MAX_BYTES)
    with pytest.raises(InputError, match=rf"data.pkl has {MAX_BYTES + 2} bytes, expected at most {MAX_BYTES}"):
        TorchFile(path)


def good(tmp_path, **options):
    return write_torch(tmp_path / "x.bin", {"a": ARRAYS["float32"]}, **options)


def refused(path, expected):
    with pytest.raises(InputError, match=expected) as caught:
        TorchFile(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_tricks_with_the_zip_file_are_refused(tmp_path):
    refused(good(tmp_path, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted")
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = good(tmp_path, extra=[("archive/data/0", b"other")])
    refused(path, "exactly one data.pkl and one entry of each name")
    refused(good(tmp_path, storages=[]), "found no such storage")
    refused(good(tmp_path, storages=[b"short"]), "of 48 bytes, found 5 bytes")
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/other.pkl", b"")
    refused(tmp_path / "x.bin", "exactly one data.pkl")


def test_names_that_leave_the_archive_are_nothing_to_us(tmp_path):
    path = good(tmp_path, extra=[("../../escaped", b"x"), ("/absolute", b"x")])
    assert_holds(TorchFile(path), {"a": ARRAYS["float32"]})
    assert [each.name for each in tmp_path.iterdir()] == ["x.bin"]


def test_damaged_zip_files_are_refused(tmp_path):
    content = good(tmp_path).read_bytes()
    path = tmp_path / "x.bin"
    for size in (0, 3, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path, "truncated|not written by torch.save")
    directory = content.rindex(b"PK\1\2")  # of the last entry: where its local header lies
    path.write_bytes(content[: directory + 42] + struct.pack("<I", 2**31) + content[directory + 46 :])
    refused(path, "not where the directory says|damaged or truncated")
    path.write_bytes(b"PK\3\4" + b"\0" * 100)
    refused(path, "damaged or truncated zip file")


def test_a_big_endian_file_is_refused(tmp_path):
    path = good(tmp_path, prefix="archive")
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/byteorder", "big")
    refused(path, "big-endian")
    assert content


def test_damaged_files_of_the_old_format_are_refused(tmp_path):
    path = write_legacy(tmp_path / "x.bin", {"a": ARRAYS["float32"]})
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refused(path, "storage '0' of 48 bytes lies beyond the end")
    path.write_bytes(content[: content.rindex(struct.pack("<Q", 12))] + struct.pack("<Q", 2**62))
    refused(path, "beyond the end of the file")
    path.write_bytes(b"\x80\x02K\x01.")
    refused(path, "damaged")
    path.write_bytes(b"\x80\x02K\x01." * 5)
    refused(path, "a pickle of something else")
    path.write_bytes(b"hello")
    refused(path, "neither a zip file nor a pickle")


def test_our_writer_writes_pickles(tmp_path):
    """Or the hostile ones would be refused for nothing."""
    for pickled, _ in (HOSTILE["os.system"], HOSTILE["eval"], HOSTILE["a tensor beyond its storage"]):
        assert [opcode.name for opcode, _, _ in pickletools.genops(pickled)][-1] == "STOP"


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_what_torch_itself_writes(tmp_path, new_format):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2)
    values = {
        "weight": layer.weight,
        "half": torch.ones(3).half(),
        "bfloat16": torch.linspace(-1, 1, 6).to(torch.bfloat16).reshape(2, 3).t(),
        "state": layer.state_dict(),
    }
    torch.save(values, tmp_path / "x.bin", _use_new_zipfile_serialization=new_format)
    file = TorchFile(tmp_path / "x.bin")
    assert set(file.names()) == {"weight", "half", "bfloat16", "state.weight", "state.bias"}
    np.testing.assert_array_equal(file.read("state.weight"), layer.weight.detach().numpy())
    np.testing.assert_array_equal(file.read("bfloat16").astype(np.float32), values["bfloat16"].float().numpy())
    torch.save(layer, tmp_path / "x.bin", _use_new_zipfile_serialization=new_format)
    refused(tmp_path / "x.bin", "refused to execute torch.nn.modules.linear.Linear")
