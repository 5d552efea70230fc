"""Where a model is: a folder, one in a bucket, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from unclip_jax.data.shards import storage
from unclip_jax.errors import UserError, one_line

# What a model is made of; code and other programs' formats stay where they are.
PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.ckpt", "*.th", "*.pt", "*.txt", "*.model")

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def folder_of(model: str | Path) -> Path:
    """The folder of a model, in a bucket too, as what can be asked like a path.

    Of a model folder in a bucket weights are copied to the cache folder as they are read, once.

    Args:
        model: as for `local_folder`, or gs:// or s3:// of what train.py or `UnCLIP.save` wrote.

    Raises:
        UserError: as for `local_folder`; or the bucket can't be reached.
    """
    return storage.place(model, "model") if storage.is_address(model) else local_folder(model)


def local_folder(model: str | Path) -> Path:
    """The folder of a model: itself where it is one, else a snapshot from the hub.

    A snapshot is downloaded once and kept in huggingface_hub's cache (HF_HOME). With
    HF_HUB_OFFLINE=1 only the cache is looked at.

    Args:
        model: a folder, or "owner/name" of a repository on the hub.

    Raises:
        UserError: there is no such folder, and it names no repository that can be had.
    """
    name, folder = str(model), Path(model)
    if name and folder.exists():
        return folder
    if storage.is_address(name):
        raise UserError(
            f"model: {name!r} is an address; public weights are read from files, so copy the folder"
            " here, or give a hub repository as owner/name"
        )
    if not _REPOSITORY.fullmatch(name):
        raise UserError(
            f"model: {name!r} is no folder; give a folder that train.py or UnCLIP.save wrote, a"
            " folder with Karlo's or Kandinsky's files, or a hub repository as owner/name"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(PATTERNS)))
    except hub_errors.RepositoryNotFoundError as error:
        raise UserError(
            f"model: {name!r} is no folder here, and the Hugging Face hub has no such repository"
            " (or it is private: log in with `hf auth login`)"
        ) from error
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model: {name!r} is no folder here, is not in the local cache, and the Hugging Face"
            f" hub cannot be reached ({type(error).__name__}); download it elsewhere and give its"
            " folder"
        ) from error
    except ValueError as error:  # names of files that would lie outside the snapshot
        what = f"{name!r} on the Hugging Face hub is refused ({one_line(error)})"
        raise UserError(f"model: {what}; use another repository") from error
