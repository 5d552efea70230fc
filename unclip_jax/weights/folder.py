"""Model folders that describe themselves: `config.json` beside `params.safetensors`.

`config.json` holds the schema version, the version of unclip_jax that wrote it, the fingerprint
of the weights and a description: the stage with all its settings, the data set, the step, the
fingerprint of the CLIP it stands on. So a folder can be moved, renamed and loaded with nothing
else known, and weights never meet a network they were not made for: every name, shape and dtype
is checked. Nor does a changed byte go unnoticed: the fingerprint of what is read must be the one
in `config.json`, which has a checksum of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import unclip_jax
from unclip_jax.common.files import (
    default_cache_dir,
    flush,
    making_folder,
    remove_leftovers,
    replacing,
)
from unclip_jax.common.params import (
    Fingerprint,
    Params,
    compare_shapes,
    fingerprint,
    flatten,
    in_weights,
    listing,
    unflatten,
)
from unclip_jax.data.shards import storage
from unclip_jax.errors import UserError
from unclip_jax.weights.mapped import mapped, shapes

SCHEMA_VERSION = 1
CONFIG_FILE = "config.json"
PARAMS_FILE = "params.safetensors"


def save_stage(
    folder: str | Path,
    *,
    params: Params,
    description: Mapping[str, Any],
    dtype: str | None = None,
) -> None:
    """Write a model folder, whole or not at all; an older model there is replaced.

    Args:
        folder: created, with its parents.
        params: nested dict of arrays.
        description: JSON-able; what `load_stage` gives back.
        dtype: store floating-point weights so ("bfloat16" halves the file). Constants keep their
            own dtype, see `params.is_weights`.

    Raises:
        UserError: `folder` is something other than a model folder, or an unknown dtype.
    """
    folder = Path(os.path.abspath(folder))
    if dtype is not None:
        params = _cast(params, dtype)
    flat = {name: np.asarray(value, order="C") for name, value in flatten(params).items()}
    mark = fingerprint(params)
    config = {
        "schema_version": SCHEMA_VERSION,
        "unclip_jax_version": unclip_jax.__version__,
        "params_fingerprint": mark,
        "storage_dtype": dtype,
        "description": dict(description),
    }
    config = {"checksum": _config_checksum(config)} | config  # first: a line that can be deleted
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with _replacing_folder(folder) as temporary:
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        save_tensors(flat, temporary / PARAMS_FILE, metadata={"fingerprint": mark})
        for name in (CONFIG_FILE, PARAMS_FILE):
            flush(temporary / name)


def save_tensors(
    arrays: dict[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that others may read where they may read any new file.

    The library by itself leaves its files to their owner alone (0.8), whatever the umask.

    Args:
        arrays: contiguous ones, by name.
        path: of the file, in a folder that is there.
        metadata: strings that the file's header has beside the tensors.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(arrays, path, metadata=metadata)
    path.chmod(mode)


def _cast(params: Params, dtype: str) -> Params:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype: got {dtype!r}, expected float32, bfloat16 or float16")

    def cast(value: Any) -> Any:
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        return np.asarray(value).astype(jnp.dtype(dtype), copy=False) if floating else value

    flat = flatten(params)
    return unflatten({name: cast(x) if in_weights(name) else x for name, x in flat.items()})


@contextlib.contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; it takes the place of `folder` if the block succeeds.

    The old folder is moved aside, the new one moved in, the old one removed. A crash between the
    two moves leaves the old model whole under its aside name; the next save puts it back first.
    """
    aside = _aside(folder)
    if aside.exists() and not folder.exists():
        aside.rename(folder)
    _check_replaceable(folder)
    shutil.rmtree(aside, ignore_errors=True)
    remove_leftovers(folder.parent, folder.name)
    with making_folder(folder) as temporary:
        yield temporary
        if folder.exists():
            folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _check_replaceable(folder: Path) -> None:
    """Refuse to overwrite anything that `save_stage` did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"model folder {str(folder)!r}: a file of that name exists; choose another")
    foreign = sorted({child.name for child in folder.iterdir()} - {CONFIG_FILE, PARAMS_FILE})
    if foreign:
        what = f"it also holds {listing(foreign)}, which saving would delete"
        do = "choose another folder or move that away"
        raise UserError(f"model folder {str(folder)!r}: {what}; {do}")


def read_description(folder: str | Path) -> dict[str, Any]:
    """The description in a model folder, without touching its weights.

    Raises:
        UserError: not a model folder, a damaged config.json, or another schema version.
    """
    return _read_config(storage.place(folder, "model"))["description"]


def read_fingerprint(folder: str | Path) -> str:
    """The fingerprint of the weights in a model folder, without touching them.

    Raises:
        UserError: as for `read_description`.
    """
    return _read_config(storage.place(folder, "model"))["params_fingerprint"]


def read_dtype(folder: str | Path) -> str:
    """The dtype that a model folder's weights are stored in; "" for whatever they were.

    Raises:
        UserError: as for `read_description`.
    """
    return _read_config(storage.place(folder, "model"))["storage_dtype"] or ""


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        expected = f"a folder with {CONFIG_FILE} and {PARAMS_FILE}, as train.py writes them"
        raise UserError(f"model folder {str(folder)!r}: {_what_is(folder)}; expected {expected}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); copy the folder again") from error
    if not isinstance(config, dict) or "schema_version" not in config:
        what = "has no schema_version, so it is not a model of unclip_jax"
        raise UserError(f"{path}: {what}; expected a folder that train.py wrote")
    version = config["schema_version"]
    if version != SCHEMA_VERSION:
        writer = config.get("unclip_jax_version", "unknown")
        raise UserError(
            f"{path}: schema_version {version!r}, written by unclip_jax {writer}; this"
            f" unclip_jax {unclip_jax.__version__} reads {SCHEMA_VERSION}; use the"
            " version that wrote it"
        )
    missing = {"description", "params_fingerprint", "storage_dtype"} - set(config)
    if missing or not isinstance(config["description"], dict):
        lost = listing(sorted(missing or {"description"}))
        raise UserError(f"{path}: damaged, without {lost}; copy the folder again")
    _check_intact(config, path)
    return config


_FIELDS = {
    "schema_version", "unclip_jax_version", "params_fingerprint", "storage_dtype", "description",
    "checksum",
}  # fmt: skip


def _config_checksum(config: Mapping[str, Any]) -> str:
    """16 hex digits that change with any value in a config, but for `checksum` itself."""
    rest = {name: value for name, value in config.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def _check_intact(config: Mapping[str, Any], path: Path) -> None:
    """Raise UserError if a config is not as it was written. Early ones have no checksum."""
    unknown = sorted(set(config) - _FIELDS)
    if unknown:
        raise UserError(f"{path}: damaged, with an unknown {unknown[0]!r}; copy the folder again")
    if "checksum" in config and config["checksum"] != _config_checksum(config):
        raise UserError(
            f"{path}: damaged, its content has changed since it was written; copy the folder again"
            ' (or delete the line "checksum", if you changed it on purpose)'
        )


def _what_is(folder: Path) -> str:
    """What stands where a model folder was expected."""
    if folder.is_file():
        return "that is a file"
    if not folder.exists():
        here = not storage.is_address(folder)
        if here and (aside := _aside(Path(os.path.abspath(folder)))).exists():
            return f"a save was cut short (the model before it is whole: rename {aside} back)"
        return "no such folder"
    names = sorted(child.name for child in folder.iterdir())
    return f"found {listing(names)} there" if names else "the folder is empty"


def load_stage(
    folder: str | Path,
    expected_shapes: Params | None = None,
    dtype: str = "",
    place: Callable[[str, np.ndarray], jax.Array] = lambda _, array: jnp.asarray(array),
) -> tuple[Params, dict[str, Any]]:
    """Read a model folder; the weights are mapped into memory and placed one by one.

    They are compared with the fingerprint they were written with, so a changed byte is told. That
    costs the time of a SHA-256: 0.6 s per GiB where the processor has instructions for it.

    Args:
        folder: what `save_stage` wrote; or its address in a bucket, of which weights are copied to
            the cache folder once.
        expected_shapes: tree of `jax.ShapeDtypeStruct` (from `jax.eval_shape`), to which names,
            shapes and dtypes must conform. Weights stored in a narrower dtype by `save_stage`
            come back in the expected one. With None, whatever is there is taken.
        dtype: of the floating-point weights in memory, whatever is expected; constants keep
            theirs. "" stands for the expected one.
        place: puts an array of a name, joined by "/", on its devices; else the default device.

    Returns:
        params as they were placed, and the description.

    Raises:
        UserError: not a model folder, a damaged file, another schema version, or weights that
            are missing, unexpected, or of another shape or dtype.
    """
    folder = storage.place(folder, "model")
    config = _read_config(folder)
    path = folder / PARAMS_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing, though {CONFIG_FILE} is there; copy the folder again")
    if remote := storage.is_address(folder):
        path = _copied(path, config)
    with mapped(path) as file:
        _check_together(file, config, path)
        found = shapes(file, path)
        if expected_shapes is None:
            dtypes = {name: found[name].dtype for name in flatten(unflatten(found))}
        else:
            dtypes = _dtypes(found, flatten(expected_shapes), config, path, dtype)
        mark, flat = Fingerprint(), {}
        for name, in_memory in dtypes.items():
            array = file.get_tensor(name)
            mark.add(name, array)
            flat[name] = place(name, array.astype(in_memory, copy=False))
    if mark.hexdigest() != config["params_fingerprint"]:
        if remote:  # the next attempt copies it again
            path.unlink()
        marks = f"fingerprint {mark.hexdigest()}, expected {config['params_fingerprint']}"
        what = f"damaged, the weights have changed since they were written ({marks})"
        raise UserError(f"{path}: {what}; copy or download it again")
    return unflatten(flat), config["description"]


def _copied(path: Path, config: Mapping[str, Any]) -> Path:
    """A bucket's weights in the cache folder, under their fingerprint: copied once."""
    here = default_cache_dir() / "models" / f"{config['params_fingerprint']}.safetensors"
    if not here.is_file():
        with replacing(here) as temporary:
            storage.copy(str(path), temporary)
            with mapped(temporary) as file:
                _check_together(file, config, path)
    return here


def _check_together(file: Any, config: Mapping[str, Any], path: Path) -> None:
    """Raise UserError unless the weights in an open file, of `path`, are those of a config."""
    if (file.metadata() or {}).get("fingerprint") != config["params_fingerprint"]:
        raise UserError(
            f"{path}: belongs to another {CONFIG_FILE} than the one beside it (their"
            " fingerprints differ); copy the whole folder again"
        )


def _dtypes(
    found: dict[str, Any], expected: dict[str, Any], config: dict[str, Any], path: Path, dtype: str
) -> dict[str, Any]:
    """The dtype in memory of each array that is expected, after comparing it with what is there."""

    def conforms(found: np.dtype, wanted: np.dtype) -> bool:
        both_floating = jnp.issubdtype(found, np.floating) and jnp.issubdtype(wanted, np.floating)
        return found == wanted or (both_floating and found.name == config["storage_dtype"])

    if problems := compare_shapes(found, expected, conforms):
        raise UserError(f"{path}: the weights do not fit this model: {problems}")

    def in_memory(name: str) -> Any:
        floating = jnp.issubdtype(expected[name].dtype, jnp.floating)
        rounded = dtype and floating and in_weights(name)
        return dtype if rounded else expected[name].dtype

    return {name: in_memory(name) for name in expected}
