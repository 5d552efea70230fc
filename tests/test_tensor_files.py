"""Weight files: PyTorch's own values bit for bit, and words for whatever else a file may be."""

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from unclip_jax.errors import UserError
from unclip_jax.weights.convert.tensor_files import open_tensors

torch = pytest.importorskip("torch")

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8")
FORMS = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "protocol 5": {"pickle_protocol": 5},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}
# TorchScript is, and OpenAI's CLIP is published in it.
DEPRECATED = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def refused(path, *words):
    """The error of opening and reading a whole file: one line, with the path and these words."""
    with pytest.raises(UserError) as caught, open_tensors(path) as source:
        for name in source.shapes:
            source.read(name)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 700
    for word in words:
        assert word in message
    return message


def read_all(path):
    """Every tensor of a file, after checking that `shapes` told the truth about it."""
    with open_tensors(path) as source:
        arrays = {name: source.read(name) for name in source.shapes}
        for name, array in arrays.items():
            assert jax.ShapeDtypeStruct(array.shape, array.dtype) == source.shapes[name]
            assert array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative
    return arrays


def assert_same_bits(array, tensor):
    """A NumPy array holds what a PyTorch tensor does."""
    assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
    assert array.shape == tuple(tensor.shape)
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    assert array.tobytes() == raw.numpy().tobytes()


def a_state_dict():
    """Every dtype, and every way in which tensors lie in their storages."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    state = OrderedDict((name, (base * 50).to(getattr(torch, name))) for name in DTYPES)
    state["bool"] = base > 0
    state["uint16"] = torch.arange(5, dtype=torch.int32).to(torch.uint16)
    state["transposed"] = base.T
    state["strided"] = base[1:5:2, ::3]
    state["channels_last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state["expanded"] = base[:1].expand(4, 8)
    state["tied"] = base
    state["tail"] = base.flatten()[-3:]
    state["imaginary"] = torch.randn(4, dtype=torch.complex64).imag
    state["scalar"] = torch.tensor(-0.0, dtype=torch.float64)
    state["of a vector"] = base[2, 3]
    state["empty"] = torch.zeros(0, 7)
    state["odd strides"] = torch.as_strided(base, (1, 2), (1000, 3))
    state["nans"] = torch.tensor([float("nan"), float("-inf")], dtype=torch.bfloat16)
    state["parameter"] = torch.nn.Parameter(torch.randn(3))
    return state


@pytest.mark.parametrize("form", FORMS)
def test_torch_save_reads_back_bit_for_bit(tmp_path, form):
    state = a_state_dict()
    torch.save(state, tmp_path / "w.bin", **FORMS[form])
    arrays = read_all(tmp_path / "w.bin")
    assert list(arrays) == list(state)
    for name, tensor in state.items():
        assert_same_bits(arrays[name], tensor)


def test_a_checkpoint_of_nested_containers_has_dotted_names(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = {
        "state_dict": {"model": {"x": torch.ones(2)}},
        "module": model.state_dict(),  # an OrderedDict with an attribute, _metadata
        "optimizer": optimizer.state_dict(),
        "pair": (torch.zeros(1), [torch.zeros(2), "text"]),
        "step": 7,
        "settings": [None, True, 1.5, b"bytes", 2**70, {"size": torch.Size([3, 4])}],
        "where": torch.device("cpu"),
        "dtype": torch.float16,
    }
    names = {"state_dict.model.x", "pair.0", "pair.1.0"}
    names |= {f"module.{name}" for name in model.state_dict()}
    names |= {
        f"optimizer.state.{i}.{k}" for i in range(4) for k in ("step", "exp_avg", "exp_avg_sq")
    }
    for form in ("legacy", "protocol 5"):
        torch.save(checkpoint, tmp_path / "c.ckpt", **FORMS[form])
        assert set(read_all(tmp_path / "c.ckpt")) == names


def test_karlo_statistics_are_a_tuple_and_a_bare_tensor_has_no_name(tmp_path):
    mean, std = torch.randn(768), torch.rand(768)
    torch.save((mean, std), tmp_path / "stats.th", **FORMS["legacy"])
    arrays = read_all(tmp_path / "stats.th")
    assert_same_bits(arrays["0"], mean)
    assert_same_bits(arrays["1"], std)
    torch.save(mean, tmp_path / "mean.pt")
    assert list(read_all(tmp_path / "mean.pt")) == [""]


def test_a_big_endian_archive_reads_as_torch_reads_it(tmp_path):
    state = {name: (torch.arange(6) * 0.75).to(getattr(torch, name)) for name in DTYPES}
    torch.save(state, tmp_path / "little.pt")
    swap = {str(i): t.element_size() for i, t in enumerate(state.values())}
    with zipfile.ZipFile(tmp_path / "little.pt") as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for name, data in entries.items():
            key = name.rsplit("/", 1)[-1]
            if "/data/" in name:
                data = np.frombuffer(data, f"u{swap[key]}").byteswap().tobytes()
            new.writestr(name, b"big" if key == "byteorder" else data)
    arrays = read_all(tmp_path / "big.pt")
    for name, tensor in torch.load(tmp_path / "big.pt").items():
        assert_same_bits(arrays[name], tensor)
        assert torch.equal(tensor, state[name])


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4).half()
        self.tied = self.linear
        self.position = torch.nn.Parameter(torch.randn(4))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, x):
        return self.tied(self.linear(x.half()).float().half()) * self.position * self.mask


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv1d(1, 1, 1, bias=False)
        self.blocks = torch.nn.Sequential(Block(), Block())
        self.register_buffer("resolution", torch.tensor(224))
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.width = 4

    def forward(self, x):
        return self.blocks(self.conv1(x)) * self.logit_scale + self.resolution


@DEPRECATED
@pytest.mark.parametrize("compiler", ["script", "trace"])
def test_torchscript_archives_have_the_names_of_their_modules(tmp_path, compiler):
    model = Tower().eval()
    compiled = torch.jit.script(model) if compiler == "script" else None
    compiled = compiled or torch.jit.trace(model, torch.ones(1, 1, 4))
    torch.jit.save(compiled, tmp_path / "clip.pt")
    arrays = read_all(tmp_path / "clip.pt")
    expected = model.state_dict()
    assert set(arrays) == set(expected)
    for name, tensor in expected.items():
        assert_same_bits(arrays[name], tensor)


def test_safetensors_of_every_dtype(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = [*DTYPES, "bool", "uint16", "uint32", "uint64"]
    arrays = {n: rng.integers(0, 2, (3, 2)).astype(np.dtype(n)) for n in dtypes if n != "bfloat16"}
    arrays["bfloat16"] = np.array([1.5, np.inf], ml_dtypes.bfloat16)
    arrays["scalar"], arrays["empty"] = np.array(3.0, np.float32), np.zeros((0, 4), np.int8)
    save_file(arrays, tmp_path / "w.safetensors")
    found = read_all(tmp_path / "w.safetensors")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].tobytes() == array.tobytes() and found[name].shape == array.shape


def test_bytes_tell_the_format_not_the_name(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    for name in ("model.bin", "model.safetensors"):
        np.testing.assert_array_equal(read_all(str(tmp_path / name))["a"], np.ones(2))


def test_an_unknown_name_is_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt")
    with (
        open_tensors(tmp_path / "w.pt") as source,
        pytest.raises(UserError, match="no tensor 'b'"),
    ):
        source.read("b")


# --- What isn't a weight file ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\x07", "not a weight file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip"),
        (bytes(257) + b"ustar" + bytes(300), "tar archive"),
        (pickle.dumps({"a": 1}), "bare Python pickle"),
        (b'{"hidden_size": 768}', "without weight_map"),
        (b'{"weight_map": ' + b"[" * 100_000, "not JSON"),
        (b'{"weight_map": {}}', "without weight_map"),
        (b"PK\x03\x04" + bytes(100), "damaged or cut short"),
        (struct.pack("<Q", 90_000_000) + b"{", "damaged or cut short"),
    ],
)
def test_other_files_are_named_in_words(tmp_path, content, words):
    (tmp_path / "model.bin").write_bytes(content)
    refused(tmp_path / "model.bin", words)


def test_missing_files_folders_and_pipes(tmp_path):
    refused(tmp_path, "a folder")
    refused(tmp_path / "absent.bin", "no such file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")
    with zipfile.ZipFile(tmp_path / "arrays.npz", "w") as archive:
        archive.writestr("a.npy", b"")
    refused(tmp_path / "arrays.npz", "data.pkl")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_every_truncation_is_refused(tmp_path, form):
    whole = tmp_path / "whole"
    if form == "safetensors":
        save_file({"a": np.ones(50, np.float32), "b": np.ones(3, np.int8)}, whole)
    else:
        torch.save({"a": torch.ones(50), "b": torch.ones(3).bool()}, whole, **FORMS[form])
    data = whole.read_bytes()
    assert read_all(whole)["a"].sum() == 50
    for length in range(0, len(data), 7):
        (tmp_path / "cut").write_bytes(data[:length])
        refused(tmp_path / "cut")


@DEPRECATED
@pytest.mark.parametrize("form", ["zip", "legacy", "script", "safetensors"])
def test_damaged_bytes_never_end_in_a_traceback(tmp_path, form):
    """A flipped byte is refused, or changes numbers and names only."""
    whole = tmp_path / "whole"
    tensors = {"a": torch.ones(3, 4).T, "b": [torch.ones(3).bool()]}
    if form == "safetensors":
        save_file({"a": np.ones(50, np.float32), "b": np.ones(3, np.int8)}, whole)
    elif form == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), whole)
    else:
        torch.save(tensors, whole, **FORMS[form])
    data = whole.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(min(len(data), 1000), 300, replace=False):
        damaged = bytearray(data)
        damaged[place] = rng.integers(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            read_all(tmp_path / "damaged")
        except UserError as error:
            assert "\n" not in str(error)


# --- Shards ---------------------------------------------------------------------------------


def shards(folder, weight_map):
    """Two shards of two kinds, and an index that says `weight_map`."""
    save_file({"a": np.float32([1, 2]), "c": np.float32([3])}, folder / "one.safetensors")
    torch.save({"b": torch.ones(3), "d": torch.zeros(2)}, folder / "two.bin")
    index = folder / "model.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


GOOD = {"a": "one.safetensors", "b": "two.bin", "c": "one.safetensors", "d": "two.bin"}


def test_shards_read_as_one_file(tmp_path):
    arrays = read_all(shards(tmp_path, GOOD))
    assert set(arrays) == set(GOOD)
    assert [arrays[name].tolist() for name in "abcd"] == [[1, 2], [1, 1, 1], [3], [0, 0]]
    with open_tensors(tmp_path / "model.index.json") as source:  # in any order
        assert [source.read(name).size for name in "abcdab"] == [2, 3, 1, 2, 2, 3]


def test_an_index_of_links_reads(tmp_path):
    """Downloads are often folders of links into a store of files."""
    (tmp_path / "store").mkdir()
    (tmp_path / "links").mkdir()
    shards(tmp_path / "store", GOOD)
    for name in ("one.safetensors", "two.bin", "model.index.json"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "store" / name)
    assert set(read_all(tmp_path / "links" / "model.index.json")) == set(GOOD)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": "../one.safetensors"}, "beside the index"),
        ({"a": ".."}, "beside the index"),
        ({"a": "/etc/passwd"}, "beside the index"),
        ({"a": "sub\\one.safetensors"}, "beside the index"),
        ({"a": "C:one"}, "beside the index"),
        ({"a": "one\0"}, "beside the index"),
        ({"a": "one\nsafetensors"}, "beside the index"),
        ({"a": 3}, "beside the index"),
        ({"a": "three.bin"}, "1 of its 3 shards are not beside it ('three.bin')"),
        ({"e": "two.bin"}, "lists tensors that aren't in two.bin: 'e'"),
        ({"d": "one.safetensors"}, "lists tensors that aren't in one.safetensors: 'd'"),
        ({"d": None}, "beside the index"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, change, words):
    refused(shards(tmp_path, {**GOOD, **change}), words)


def test_a_shard_with_more_than_is_listed_is_refused(tmp_path):
    listed = {name: shard for name, shard in GOOD.items() if name != "d"}
    refused(shards(tmp_path, listed), "doesn't list tensors that are in two.bin: 'd'")


def test_a_shard_that_is_an_index_or_damaged_is_refused_by_its_own_path(tmp_path):
    index = shards(tmp_path, {**GOOD, "e": "again.json"})
    (tmp_path / "again.json").write_text(index.read_text())
    for shard, words in (
        ("again.json", "an index where a shard"),
        ("two.bin", "a pointer of Git LFS"),
    ):
        with pytest.raises(UserError, match=rf"/{shard}: {words}"), open_tensors(index):
            pass
        (tmp_path / "two.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1")
