"""PyTorch files that someone wrote by hand: nothing runs, and every one ends in one line."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from tests.test_tensor_files import FORMS, assert_same_bits, read_all, refused
from unclip_jax.weights.convert.torch import files
from unclip_jax.weights.convert.torch.layout import MAX_DEPTH, MAX_ENTRIES, MAX_NAME_LENGTH

torch = pytest.importorskip("torch")


class Runs:
    """Unpickled by Python, it calls a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path, program, storages=None, compression=zipfile.ZIP_STORED):
    """A zip file as `torch.save` lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as new:
        new.writestr("archive/data.pkl", program)
        for key, data in (storages or {}).items():
            new.writestr(f"archive/data/{key}", data)
    return path


def tensor_program(shape, strides, offset=0, numel=12, key="0", old=False):
    """The pickle of {"w": a float32 view of a storage}, as `torch.save` writes it.

    The old one is of Python 2 and PyTorch before 0.4.
    """

    class Writer(pickle._Pickler):
        def persistent_id(self, value):
            storage = ("storage", torch.FloatStorage, key, "cpu", numel)
            return storage if value is stands_in else None

        def save_global(self, value, name=None):
            self.write(f"c{value.__module__}\n{value.__qualname__}\n".encode())

    Writer.dispatch = {**pickle._Pickler.dispatch, type(torch.FloatStorage): Writer.save_global}
    stands_in = Runs(None)
    view = (stands_in, offset, shape, strides)
    stream = io.BytesIO()
    if old:
        tree = Runs(OrderedDict, [["w", Runs(torch._utils._rebuild_tensor, *view)]])
    else:
        tree = {"w": Runs(torch._utils._rebuild_tensor_v2, *view, False, OrderedDict())}
    Writer(stream, 2).dump(tree)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["zip", "legacy", "legacy, protocol 4"])
@pytest.mark.parametrize("function", ["os.system", "builtins.eval", "builtins.exec"])
def test_nothing_in_a_file_runs(tmp_path, form, function):
    marker = tmp_path / "ran"
    run = {
        "os.system": Runs(os.system, f"touch {marker}"),
        "builtins.eval": Runs(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": Runs(exec, f"open({str(marker)!r}, 'w')"),
    }[function]
    torch.save({"w": torch.ones(2), "x": run}, tmp_path / "w.pt", **FORMS[form])
    name = f"{os.system.__module__}.system" if function == "os.system" else function
    # Protocol 2 calls the module of the builtins by the name that it had in Python 2.
    names = (name, name.replace("builtins", "__builtin__"))
    assert any(repr(n) in refused(tmp_path / "w.pt", "refuses to build") for n in names)
    assert not marker.exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert marker.exists(), "the file would have run in PyTorch"


def test_what_is_no_tensor_is_refused_by_its_name(tmp_path):
    for value, name in (
        (np.float64(1.0), "multiarray.scalar"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        (torch.ones(2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        ({1, 2}, "set"),
    ):
        torch.save({"a": torch.ones(1), "b": value}, tmp_path / "w.pt")
        refused(tmp_path / "w.pt", "refuses to build", name, "safetensors")
    (tmp_path / "w.pt").unlink()
    torch.save({"b": torch.nn.Linear(1, 1)}, tmp_path / "w.pt", **FORMS["legacy"])
    refused(tmp_path / "w.pt", "torch.nn.modules.linear.Linear")


def test_a_negated_view_is_not_read_as_its_storage(tmp_path):
    negated = torch.ones(2, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    torch.save({"w": negated}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "negated")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00lstR.", "'posix.system'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "'os.system'"),
        (b"\x80\x04\x8c\x17unclip_jax.common.files\x8c\x01f\x93.", "'unclip_jax.common.files.f'"),
        (b"ios\nsystem\n.", "INST"),  # instances as protocol 0 makes them
        (b"(cos\nsystem\no.", "'os.system'"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02(X\x01\x00\x00\x00xQ.", "pickle is damaged"),
        (b"\x80\x02}Q.", "pickle is damaged"),
        (b"\x80\x02X\x07\x00\x00\x00storage\x85Q.", "pickle is damaged"),
        (b"\x80\x02X\x06\x00\x00\x00module\x85Q.", "pickled 'module'"),
        (b"\x80\x02}}b.", "sets attributes"),
        (b"\x80\x02}X\x03\x00\x00\x00abcb.", "pickle is damaged"),
        (b"\x80\x02c__torch__\nM\n)R.", "pickle is damaged"),  # a class is not called
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "pickle is damaged"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "pickle is damaged"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n}}}\x87R.", "pickle is damaged"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "pickle is damaged"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n)R.", "pickle is damaged"),
        (b"\x80\x02K\x01)R.", "pickle is damaged"),
        (b"\x80\x02}]K\x01s.", "a list is the key"),
        (b"\x80\x02}(K\x01u.", "pickle is damaged"),  # a key without a value
        (b"\x80\x02)K\x01a.", "pickle is damaged"),  # appending to a tuple
        (b"\x80\x02h\x05.", "pickle is damaged"),  # nothing remembered there
        (b"\x80\x02(0.", "POP"),
        (b"\x80\x02\x86.", "pickle is damaged"),
        (b"\x80\x02t.", "pickle is damaged"),
        (b"\x80\x02.", "pickle is damaged"),
        (b"\x80\x02}", "pickle is damaged"),
        (b"\x80\x02}X\xff\xff\xff\x7fa", "pickle is damaged"),  # 2 GiB of text announced
        (b"\x80\x05\x96" + struct.pack("<Q", 2**62), "pickle is damaged"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**64 - 1) + b"}.x\x00", None),  # a frame says nothing
        (b"\x80\x02\x8b\xff\xff\xff\x7f1", "pickle is damaged"),  # an integer of 2 GiB
        (b"\x80\x02}r\xff\xff\xff\xff.", None),  # remembered at place 2**32 - 1: costs nothing
    ],
)
def test_hostile_programs_end_in_one_line(tmp_path, program, words):
    path = archive(tmp_path / "w.pt", program)
    if words is None:
        assert read_all(path) == {}
    else:
        refused(path, words)


def test_containers_that_grow_without_end_are_refused(tmp_path):
    itself = b"\x80\x02]q\x00h\x00a."
    refused(archive(tmp_path / "itself.pt", itself), "inside themselves")
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    refused(archive(tmp_path / "deep.pt", deep), f"more than {MAX_DEPTH} deep")
    # A list, a list of ten times that one, and so on: 10**40 entries in a kilobyte.
    laughs = b"\x80\x02]q\x00" + b"".join(
        b"](" + b"h%c" % level * 10 + b"eq%c" % (level + 1) for level in range(40)
    )
    refused(archive(tmp_path / "laughs.pt", laughs + b"\x86" * 40 + b"."), f"over {MAX_ENTRIES}")
    name = b"n" * (MAX_NAME_LENGTH + 1)
    long = b"\x80\x02}X" + struct.pack("<I", len(name)) + name + b"]s."
    refused(archive(tmp_path / "long.pt", long), "a name of")


def test_pickles_beyond_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_PICKLE_BYTES", 5000)
    for form in ("zip", "legacy"):
        torch.save([torch.ones(2), *range(1000)], tmp_path / "w.pt", **FORMS[form])
        assert list(read_all(tmp_path / "w.pt")) == ["0"]
        torch.save([torch.ones(2), *range(5000)], tmp_path / "w.pt", **FORMS[form])
        refused(tmp_path / "w.pt", "at most 5000" if form == "zip" else "or over")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    t = torch.ones(1)
    for clash in ({"a": {"b": t}, "a.b": t}, {1: t, "1": t}, {"a": [t], "a.0": t}):
        torch.save(clash, tmp_path / "w.pt")
        refused(tmp_path / "w.pt", "two tensors are named")


# --- Views that leave their storage, and storages that aren't there -------------------------

TWELVE = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((3, 4), (4, 1), 0), ((4, 3), (1, 4), 0), ((2,), (1,), 10), ((), (), 11), ((2, 2), (0, 1), 3)],
)
def test_a_written_program_reads_as_the_view_it_says(tmp_path, shape, strides, offset):
    expected = torch.as_strided(torch.from_numpy(TWELVE), shape, strides, offset)
    for old in (False, True):
        program = tensor_program(shape, strides, offset, old=old)
        path = archive(tmp_path / "w.pt", program, {"0": TWELVE.tobytes()})
        assert_same_bits(read_all(path)["w"], expected)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (dict(shape=(3, 5), strides=(4, 1)), "ends at byte 52"),
        (dict(shape=(2,), strides=(1,), offset=11), "ends at byte 52"),
        (dict(shape=(0,), strides=(1,), offset=13), "ends at byte 52"),
        (dict(shape=(2,), strides=(12,)), "ends at byte 52"),
        (dict(shape=(2,), strides=(1,), offset=-1), "offset -1"),
        (dict(shape=(3,), strides=(-1,), offset=5), "strides (-1,)"),
        (dict(shape=(-3,), strides=(1,)), "shape (-3,)"),
        (dict(shape=(2, 2), strides=(1,)), "strides (1,)"),
        (dict(shape=(2**40,), strides=(0,)), "claims"),
        (dict(shape=(0, 2**62, 2**62), strides=(1, 1, 1)), "claims"),
        (dict(shape=(2**62,), strides=(2**62,)), "ends at byte"),
        (dict(shape=(1,) * 65, strides=(1,) * 65), "65 dimensions"),
        (dict(shape=(2**70,), strides=(1,)), "64 bits"),
        (dict(shape=(2,), strides=(1,), numel=2**70), "64 bits"),
        (dict(shape=(2,), strides=(1,), numel=-1), "pickle is damaged"),
        (dict(shape=("2",), strides=(1,)), "pickle is damaged"),
        (dict(shape=[2], strides=(1,)), "pickle is damaged"),
        (dict(shape=(2,), strides=(1,), numel=2**60), "expected 4611686018427387904 bytes"),
        (dict(shape=(2,), strides=(1,), numel=13), "has 48 bytes"),
        (dict(shape=(2,), strides=(1,), numel=11), "has 48 bytes"),
        (dict(shape=(2,), strides=(1,), key="../../0"), "is missing"),
    ],
)
def test_views_outside_their_storage_are_refused(tmp_path, view, words):
    path = archive(tmp_path / "w.pt", tensor_program(**view), {"0": TWELVE.tobytes()})
    refused(path, words)


def test_archives_that_torch_would_not_write_are_refused(tmp_path):
    program, data = tensor_program((12,), (1,)), {"0": TWELVE.tobytes()}
    refused(archive(tmp_path / "a", program, data, zipfile.ZIP_DEFLATED), "compressed")
    refused(archive(tmp_path / "b", program), "is missing")
    path = archive(tmp_path / "c", program, data)
    with zipfile.ZipFile(path, "a") as more, pytest.warns(UserWarning, match="Duplicate"):
        more.writestr("archive/data/0", bytes(48))
    refused(path, "two entries of one name")
    path = archive(tmp_path / "d", program, data)
    with zipfile.ZipFile(path, "a") as more:
        more.writestr("other/data.pkl", program)
    refused(path, "2 entries */data.pkl")
    path = archive(tmp_path / "e", program, data)
    with zipfile.ZipFile(path, "a") as more:
        more.writestr("archive/byteorder", "middle")
    refused(path, "byteorder is 'middle'")


@pytest.mark.parametrize(
    ("field", "lie"),
    [
        (20, struct.pack("<II", 2**30, 2**30)),  # the entry's size
        (42, struct.pack("<I", 2**31)),  # its place, after the end of the file
        (-6, struct.pack("<I", 2**31)),  # the directory's place, which puts it before the start
    ],
)
def test_an_archive_that_lies_about_places_and_sizes_is_refused(tmp_path, field, lie):
    numel = 2**28 if field == 20 else 1
    path = archive(tmp_path / "w.pt", tensor_program((1,), (1,), numel=numel), {"0": b"1234"})
    data = bytearray(path.read_bytes())
    place = field + (len(data) if field < 0 else data.rfind(b"PK\x01\x02"))
    data[place : place + len(lie)] = lie
    path.write_bytes(data)
    refused(path, "archive", "download")  # Python itself may see it first


def legacy(path, *pickles, tail=b""):
    """A file of the old format from its last pickles and what follows them."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    parts = [pickle.dumps(part, 2) for part in head[: 5 - len(pickles)]]
    path.write_bytes(b"".join([*parts, *pickles]) + tail)
    return path


def test_old_files_that_torch_would_not_write_are_refused(tmp_path):
    program, keys = tensor_program((12,), (1,)), pickle.dumps(["0"], 2)
    data = struct.pack("<q", 12) + TWELVE.tobytes()
    good = legacy(tmp_path / "good", program, keys, tail=data)
    np.testing.assert_array_equal(read_all(good)["w"], TWELVE)
    path = tmp_path / "w"
    refused(legacy(path, program, keys, tail=data[:-1]), "up to byte")
    refused(legacy(path, program, keys, tail=struct.pack("<q", 13) + data[8:]), "13 are said")
    refused(legacy(path, program, pickle.dumps([], 2), tail=data), "those it describes")
    refused(legacy(path, program, pickle.dumps(["0", "0"], 2), tail=data), "those it describes")
    refused(legacy(path, program, pickle.dumps([0], 2), tail=data), "those it describes")
    refused(legacy(path, program, pickle.dumps("0", 2), tail=data), "those it describes")
    big = pickle.dumps({"little_endian": False}, 2)
    refused(legacy(path, big, program, keys, tail=data), "big-endian")
    later = pickle.dumps(1002, 2)
    refused(legacy(path, later, big, program, keys, tail=data), "another version")
