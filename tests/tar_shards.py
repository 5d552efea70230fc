"""Tar shards of small pictures, and sources of them."""

import io
import tarfile

from PIL import Image

from unclip_jax.data.datasets import DataConfig, load


def jpeg(level, side=16):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (level % 256,) * 3).save(file, "JPEG")
    return file.getvalue()


def archive(members, form=tarfile.USTAR_FORMAT):
    """A tar of (name, content) pairs."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as opened:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return file.getvalue()


def shard(numbers, **form):
    members = []
    for number in numbers:
        key = f"{number:06d}"
        members += [(f"{key}.jpg", jpeg(number)), (f"{key}.txt", f"picture {number}".encode())]
    return archive(members, **form)


def fill(folder):
    """Three shards of ten pictures each; picture n is grey, of level n."""
    for number in range(3):
        (folder / f"{number:05d}.tar").write_bytes(shard(range(10 * number, 10 * number + 10)))
    return folder


def source(folder, pattern="*.tar", **options):
    name = pattern if "://" in pattern else f"{folder}/{pattern}"
    options = {"split": "all", "cache_dir": str(folder / "cache"), **options}
    return load(DataConfig(name=f"wds:{name}", **options))
