"""PyTorch's pickles read as data: a small interpreter that can build containers and tensors only.

A pickle is a program for a stack machine, and Python's own reader lets that program call any
function it names. This one knows a closed set of opcodes and a closed table of names, each of
which stands for an inert description: of a storage, of a tensor in it, of a plain container.
Nothing is imported, nothing of the file is ever called, and whatever is not in the tables is
refused by its name. The size of a pickle bounds the work and the memory of reading it.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.weights.convert.torch.layout import MAX_DIMENSIONS, REMEDY, Storage, StoredTensor

MAX_PICKLE_BYTES = 8 << 20  # a thousand tensors take about 200 KiB


def read_pickle(stream: BinaryIO, where: str) -> tuple[Any, dict[str, Storage]]:
    """Interpret one pickle, of protocol 2 to 5, and leave the stream behind it.

    Args:
        stream: positioned at the pickle; at most `MAX_PICKLE_BYTES` long, which is what bounds
            the work.
        where: the file, for messages.

    Returns:
        What the pickle describes, made of dicts, lists, tuples, scalars, strings, bytes, `Storage`
        and `StoredTensor`; and the storages it names, by key.

    Raises:
        UserError: it names anything but tensors and plain containers, or it is damaged.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
        return machine.result(), machine.storages
    except _Refused as error:
        raise UserError(f"{where}: {error}: {REMEDY}") from None
    except ValueError as error:
        what = f"its pickle is damaged, cut short or over {MAX_PICKLE_BYTES >> 20} MiB ({error})"
        raise UserError(f"{where}: {what}; download it again") from error


class _Refused(Exception):
    """The pickle is whole, but describes something beyond tensors and plain containers."""


# --- What the names in a pickle stand for ---------------------------------------------------


def _put(mapping: dict, key: Any, value: Any) -> None:
    if not isinstance(key, (str, int, float, type(None))):
        raise _Refused(f"a {type(key).__name__} is the key of a dict")
    mapping[key] = value


def _ordered_dict(pairs: Any = ()) -> dict:
    """An OrderedDict: empty and filled later, or, from Python 2, of a list of pairs."""
    mapping: dict = {}
    for pair in _expect((list, tuple), pairs):
        key, value = _expect(list, pair)
        _put(mapping, key, value)
    return mapping


def _expect(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} out of place")
    return value


def _expect_int64(value: Any) -> int:
    if not -(2**63) <= _expect(int, value) < 2**63:
        raise ValueError("a number beyond 64 bits")
    return value


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    if len(_expect(tuple, shape)) > MAX_DIMENSIONS or len(_expect(tuple, strides)) > len(shape):
        raise ValueError(f"a tensor of {len(shape)} dimensions and {len(strides)} strides")
    for number in (offset, *shape, *strides):
        _expect_int64(number)
    storage = _expect(Storage, storage)
    return StoredTensor(storage, storage.dtype, offset, shape, strides)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, flags: Any = None
) -> StoredTensor:
    """Whether it needs a gradient, and its hooks, don't matter; flags change its values."""
    if flags:
        raise _Refused("holds a tensor that is stored conjugated or negated")
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(*arguments: Any) -> StoredTensor:
    """As v2, but over untyped bytes, with the dtype said after the hooks."""
    *first, dtype = arguments[:7]
    tensor = _tensor_v2(*first, *arguments[7:])
    return dataclasses.replace(tensor, dtype=_expect(np.dtype, dtype))


def _parameter(tensor: Any, _grad: Any, _hooks: Any, _state: Any = None) -> StoredTensor:
    return _expect(StoredTensor, tensor)


def _typed_list(values: Any, _type: Any = None) -> Any:
    """TorchScript's lists and dicts, whose element types don't matter here."""
    return _expect((list, dict), values)


def _size(numbers: Any) -> tuple:
    return _expect(tuple, numbers)


def _passed_over(*_: Any) -> None:
    """A device, or bytes as protocol 2 writes them."""


_SCRIPT_CLASS = object()  # any class of a TorchScript archive: a dict of its attributes

_DTYPES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}
_WITHOUT_STORAGE = ("uint16", "uint32", "uint64")

_GLOBALS: dict[str, Callable[..., Any] | np.dtype] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "torch.device": _passed_over,
    "_codecs.encode": _passed_over,
    "__builtin__.bytes": _passed_over,
    "torch.jit._pickle.build_intlist": _typed_list,
    "torch.jit._pickle.build_doublelist": _typed_list,
    "torch.jit._pickle.build_boollist": _typed_list,
    "torch.jit._pickle.build_tensorlist": _typed_list,
    "torch.jit._pickle.restore_type_tag": _typed_list,
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
    **{f"torch.{name}": jnp.dtype(name) for name in (*_DTYPES, *_WITHOUT_STORAGE)},
    **{f"torch.{word}Storage": jnp.dtype(name) for name, word in _DTYPES.items()},
}


# --- The stack machine ----------------------------------------------------------------------


# Opcodes that put their argument on the stack, as it is.
_CONSTANTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
_CONSTANTS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS |= {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}


class _Machine:
    """Runs opcodes one at a time. A ValueError says that the program is malformed."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack at each open MARK
        self._memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise ValueError(f"{len(self._stack)} values are left at its end")
        return self._stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        """Runs one opcode, by the name that `pickletools` gives it."""
        match opcode:
            case "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise ValueError(f"nothing remembered as {argument}")
                self._stack.append(self._memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top(object)
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top(object)
            case name if name in _CONSTANTS:
                self._stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(opcode))
            case "MARK":
                self._marks.append(len(self._stack))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = 0 if opcode == "EMPTY_TUPLE" else int(opcode[-1])
                self._stack.append(tuple([self._pop() for _ in range(count)][::-1]))
            case "TUPLE":
                self._stack.append(tuple(self._pop_to_mark()))
            case "EMPTY_LIST":
                self._stack.append([])
            case "APPEND":
                self._append([self._pop()])
            case "APPENDS":
                self._append(self._pop_to_mark())
            case "EMPTY_DICT":
                self._stack.append({})
            case "SETITEM":
                self._set_items([self._pop(), self._pop()][::-1])
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "GLOBAL":
                self._stack.append(self._find(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = _expect(str, self._pop()), _expect(str, self._pop())
                self._stack.append(self._find(f"{module}.{name}"))
            case "REDUCE":
                self._reduce()
            case "NEWOBJ":
                self._new_object()
            case "BUILD":
                self._build()
            case "BINPERSID":
                self._stack.append(self._storage(self._pop()))
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise _Refused(f"its pickle uses {opcode}, which tensors don't need")

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("nothing to take from its stack")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("no mark on its stack")
        height = self._marks.pop()
        values = self._stack[height:]
        del self._stack[height:]
        return values

    def _top(self, kind: type) -> Any:
        if not self._stack:
            raise ValueError("nothing on its stack")
        return _expect(kind, self._stack[-1])

    def _append(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _set_items(self, items: list[Any]) -> None:
        mapping = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(mapping, key, value)

    def _find(self, name: str) -> Any:
        """What a dotted name stands for, if anything."""
        if name.startswith("__torch__."):
            return _SCRIPT_CLASS
        if name not in _GLOBALS:
            raise _Refused(f"refuses to build {name[:100]!r}")
        return _GLOBALS[name]

    def _reduce(self) -> None:
        """Calls one of the functions above; nothing else on the stack is callable."""
        arguments, function = _expect(tuple, self._pop()), self._pop()
        if not callable(function):
            raise ValueError("a call of something that is no function")
        try:
            self._stack.append(function(*arguments))
        except TypeError as error:
            raise ValueError(f"{len(arguments)} arguments where they don't fit") from error

    def _new_object(self) -> None:
        arguments, cls = _expect(tuple, self._pop()), self._pop()
        if cls is not _SCRIPT_CLASS or arguments:
            raise ValueError("an object of something that is no class of TorchScript")
        self._stack.append(_ScriptObject())

    def _build(self) -> None:
        """Sets attributes: all of a TorchScript object; of a dict, only module versions."""
        state, target = _expect(dict, self._pop()), self._top(dict)
        if isinstance(target, _ScriptObject):
            target.update(state)
        elif state.keys() != {"_metadata"}:
            raise _Refused("sets attributes of a dict")

    def _storage(self, persistent_id: Any) -> Storage:
        """The storage that `("storage", dtype, key, device, numel)` describes."""
        match persistent_id:
            case ("storage", np.dtype() as dtype, str(key), str(), int(numel), *view):
                pass
            case (str(kind), *_) if kind != "storage":
                raise _Refused(f"holds a pickled {kind[:100]!r}")
            case _:
                raise ValueError("a storage without dtype, key, device and size")
        if any(part is not None for part in view):
            raise _Refused("holds a storage that is a view of another, as PyTorch before 0.4 wrote")
        storage = Storage(key, dtype, _expect_int64(numel))
        if numel < 0 or self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"a storage of {numel} elements, or one declared in two ways")
        return storage


class _ScriptObject(dict):
    """An object of a TorchScript archive: its attributes by name."""
