"""What a folder says of its images: where captions may stand, and what is left out and why."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from unclip_jax.data import images, tables, texts
from unclip_jax.data.listing import Listing, endings, parted, stem
from unclip_jax.data.matches import Matcher
from unclip_jax.data.records import class_names, is_heldout, progress
from unclip_jax.data.tables import Keys
from unclip_jax.errors import UserError, one_line

_FIRST = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
_NAMED = re.compile(r"(?:.*/)?(?:captions|metadata)\.(?:jsonl|csv|tsv|parquet)")
_BESIDE = (".txt", ".caption", ".json")
_SPLIT = re.compile(r"(?<![a-z])(train|valid|val|dev|test|heldout)(?:ing|ation)?(?![a-z])")
_NOT_READ = (".heic", ".heif", ".jxl", ".svg", ".eps", ".cr2", ".nef", ".arw", ".dng", ".raw")
_MOST_TABLES = 64  # that are looked into where none has a usual name


class Told(NamedTuple):
    """What a folder says of an image."""

    captions: tuple[str, ...]
    label: str = ""
    split: str = ""  # "train", "heldout", or "" where its name decides


class Reader:
    """Finds out what a folder says of its images.

    Attributes:
        listing: of its files.
        images: the names of its pictures, sorted.
        skipped: what is left out -> why.
        layout: where the captions were found, for messages.
    """

    def __init__(self, name: str, split: str, keys: Keys, labels: bool, bare: bool):
        """List the folder; `UserError` if it is none, or has no pictures."""
        self._table = ""
        if os.path.isfile(os.path.expanduser(name)):
            name, self._table = _around(name)
        self.listing = Listing(name)
        self.skipped = self.listing.left_out
        self._split, self._keys, self._labels, self._bare = split, keys, labels, bare
        self._tabled = False  # whether classes stand in a table
        self._found: list[str] = []  # tables that don't serve, and why
        self.layout = ""
        files = self.listing.files
        beside = (name for name in files if name.lower().endswith(_BESIDE))
        self._texts = {"".join(parted(name)): name for name in beside}  # by lower-case suffixes
        self.images = self._pictures()

    def takes(self, name: str, split: str = "") -> bool:
        """Whether an image is in the split that is asked for; `split` is what a table says."""
        if self._split == "all":
            return True
        if split:
            return split == self._split
        return is_heldout(name) == (self._split == "heldout")

    def told(self) -> dict[str, Told]:
        """Each usable image -> what is said of it; the others go into `skipped`."""
        found = self._from_any()
        if self._labels:
            self._tabled = bool(self._keys.label) or any(one.label for one in found.values())
            found = {name: self._classed(name, found.get(name, Told(()))) for name in self.images}
        elif self._bare:
            told = ((name, found.get(name, Told(()))) for name in self.images)
            found = {name: one._replace(captions=one.captions or ("",)) for name, one in told}
        for name in self.images:
            if not (name in found and found[name].captions):
                self.skipped.setdefault(name, f"no caption in {self.layout or 'any file'}")
        kept = {name: one for name, one in found.items() if one.captions}
        if not kept:
            raise self._without_captions()
        return kept

    def classes(self, told: Mapping[str, Told]) -> tuple[str, ...]:
        """The names of the classes of what `told` returned, in the order of their numbers."""
        labels = {one.label for one in told.values()}
        return class_names(labels, self.listing.name) if self._tabled else tuple(sorted(labels))

    def _pictures(self) -> list[str]:
        """The files that are pictures; a captioned file that is none is `skipped`.

        A usual suffix is believed until the file is read. Others are looked into: all with a
        caption beside them, and of the rest three of each suffix, more if one was a picture.
        """
        usual, found, files = frozenset(images.suffixes()), [], self.listing.files
        tried: dict[str, int] = {}  # suffix -> how many were no pictures, far below 0 if any was
        for name, (size, _) in files.items():
            base, suffix = parted(name)
            if suffix in usual:
                if size:
                    found.append(name)
                else:
                    self.skipped[name] = "an empty file"
                continue
            wanted = base + ".txt" in files or base + ".caption" in files or suffix in _NOT_READ
            if suffix in (*_BESIDE, *tables.SUFFIXES) or not (wanted or tried.get(suffix, 0) < 3):
                continue
            try:
                is_picture = images.is_picture(self.listing.read(name, images.HEAD))
            except OSError as error:
                self.skipped[name] = f"can't be read ({error.strerror})"
                continue
            tried[suffix] = tried.get(suffix, 0) + (-(10**9) if is_picture else 1)
            if is_picture:
                found.append(name)
            elif wanted:
                self.skipped[name] = f"no picture that is read here ({suffix or 'no suffix'})"
        if not found:
            raise UserError(f"name: {self.listing.name}: no images in it; {self._instead()}")
        return sorted(found)

    def _instead(self) -> str:
        """What a folder without pictures may be, and how that is read."""
        name, files = self.listing.name.rstrip("/"), self.listing.files
        counts = endings(iter(files))
        if any(f.startswith(("img_emb/", "text_emb/")) for f in files) or "meta.json" in files:
            return f"it holds stored embeddings, which --config.data.name=embeddings:{name} reads"
        if "dataset_info.json" in files:
            return f"it holds a data set of TFDS, which --config.data.name=tfds:{name} reads"
        for suffix, kind in ((".tar", "wds"), (".parquet", "parquet")):
            if suffix in counts:
                one = next(f for f in files if f.endswith(suffix))
                folder = f"{name}/{os.path.dirname(one)}".rstrip("/")
                return (
                    f"it holds {counts[suffix]} {suffix} files, which"
                    f" --config.data.name={kind}:{folder}/*{suffix} reads"
                )
        there = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in counts.items())
        left = "; ".join(f"{n}: {why}" for n, why in list(self.skipped.items())[:3])
        return f"expected files such as .png, .jpg or .webp; it has {there[:200] or 'no files'}" + (
            f"; left out {left}" if left else ""
        )

    # ------------------------------------------------------------------ where captions are

    def _tables(self) -> tuple[list[str], list[str]]:
        """The tables with usual names: those that come first, and those that come last."""
        if self._table:
            return [self._table], []
        named = [name for name in self.listing.files if _NAMED.fullmatch(name)]
        bases = {stem(name) for name in self.images}
        others = [name for name in named if name not in _FIRST and stem(name) not in bases]
        at_top = [name for name in others if "/" not in name]
        return [name for name in _FIRST if name in named], at_top or others

    def _from_any(self) -> dict[str, Told]:
        """Captions from the first place that has any."""
        top, below = self._tables()
        if len(top) > 1:
            raise UserError(
                f"name: {self.listing.name}: it has {' and '.join(sorted(top))}; keep one of them,"
                " or name one: --config.data.name=FOLDER/FILE"
            )
        if top:
            return self._from_tables(top)
        suffix = "." + self._keys.image.lstrip(".").lower()
        chosen = [n for n in self.images if n.lower().endswith(suffix)] if suffix != "." else []
        self.images = chosen or self.images
        found = self._beside()
        if found is None:
            found = self._from_tables(below or self._other_tables())
            chosen = chosen or found
        if suffix != "." and not chosen:
            raise UserError(
                f"image_key: got {self._keys.image!r}, expected a field of a table of captions, or"
                f" a suffix of the images of {self.listing.name}: {_shown(self.images)}"
                + "".join(f"; {why}" for why in self._found[:3])
            )
        key = self._keys.caption
        if key and not any(one.captions for one in found.values()):
            raise UserError(
                f"caption_key: got {key!r}, expected a suffix of files beside the images of"
                f" {self.listing.name}, or a field of their .json or of a table of captions"
                + "".join(f"; {why}" for why in self._found[:3])
            )
        return found

    def _beside(self) -> dict[str, Told] | None:
        """Captions from the files beside the images; None where no image has any."""
        found, fields = {}, {}
        places = {name: self._place(name) for name in self.images}
        if not any(places.values()):
            return None
        self.layout = "the file beside it"
        # Another split's images count, and their captions are not read.
        read = {n for n, place in places.items() if place and (self._keys.label or self.takes(n))}
        contents = self.listing.read_all(place for n, place in places.items() if n in read)
        with progress(f"{self.listing.name}: captions", " images", len(places)) as bar:
            for name, place in places.items():
                bar.update()
                if name not in read:
                    found[name] = Told(("",)) if place else Told(())
                    continue
                if isinstance(content := next(contents), OSError):
                    self.skipped[name] = f"its caption can't be read ({content.strerror})"
                    continue
                try:
                    found[name] = self._read(place, content, fields)
                except texts.NotText as error:
                    self.skipped[name] = f"its caption is {error}"
        if any(one.captions for one in found.values()):
            return found
        more = f"; caption_key may be {texts.offered(fields)}" if fields else ""
        self._found.append(f"the files beside the images have no captions{more}")
        return None

    def _place(self, name: str) -> str:
        """The file beside an image that has its captions; "" for none."""
        key, base = self._keys.caption, stem(name)
        for suffix in (f".{key.lstrip('.')}", ".json") if key else _BESIDE:
            for place in (base + suffix, name + suffix):
                if place in self._texts or (key and place in self.listing.files):
                    return self._texts.get(place, place)
        return ""

    def _read(self, place: str, content: bytes, fields: dict[str, None]) -> Told:
        """What a file beside an image says; the names of a `.json`'s texts go into `fields`."""
        text = texts.file_text(content)
        if not place.lower().endswith(".json"):
            return Told(tuple(c for line in text.split("\n") for c in texts.captions(line)))
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise texts.NotText(f"no JSON ({one_line(error)})") from error
        if not isinstance(content, dict):
            return Told(texts.captions(content))
        fields |= dict.fromkeys(texts.text_fields(content))
        key = self._keys.caption or texts.field_of(content, texts.CAPTION_FIELDS)
        label = content.get(self._keys.label, "") if self._keys.label else ""
        try:
            return Told(texts.captions(texts.lookup(content, key) if key else None), str(label))
        except KeyError:
            return Told((), str(label))

    def _from_tables(self, names: Sequence[str]) -> dict[str, Told]:
        """Captions from the rows of tables."""
        found: dict[str, Told] = {}
        for table in names:
            self.layout = ", ".join(names[:3])
            matcher = Matcher(self.listing, self.images, os.path.dirname(table))
            split = self._split_of(table, names)
            missed: list[str] = []
            for row in self._rows(table, matcher.is_image):
                name = matcher.match(row)
                if name is None:
                    missed.append(row.file)
                    self.skipped[row.file] = f"{row.where} names it, but no such image is there"
                elif row.fault:
                    self.skipped[name] = f"{row.where} has {row.fault}"
                else:
                    before = found.get(name, Told(()))
                    captions = before.captions + row.captions
                    found[name] = Told(captions, row.label or before.label, split)
            if missed and len(missed) == matcher.asked:
                self._found.append(f"{table} names {matcher.asked} files, {matcher.advice(missed)}")
        return found

    def _rows(self, table: str, is_image: Callable[[str], bool]) -> Iterator[tables.Row]:
        where = f"{self.listing.name.rstrip('/')}/{table}"
        try:
            data = self.listing.read(table)
        except OSError as error:
            raise UserError(f"{where}: can't be read ({error.strerror})") from error
        keys = self._keys if self._labels else self._keys._replace(label="")
        bare = self._bare or self._labels
        yield from tables.rows(where, data, keys, bare=bare, is_image=is_image)

    def _split_of(self, table: str, names: Sequence[str]) -> str:
        """The split that a table's own path says, where tables say different ones."""

        def said(name: str) -> str:
            match = _SPLIT.search(name.lower())
            return match[1] if match else ""

        told = {said(name) for name in names}
        if "train" not in told or len(told) < 2:
            return ""
        held = next((s for s in ("heldout", "val", "valid", "dev", "test") if s in told), "")
        return {"train": "train", held: "heldout"}.get(said(table), "none")

    def _other_tables(self) -> list[str]:
        """Tables without a usual name that tell captions of images that are there."""
        bases = {stem(name) for name in self.images} | set(self.images)
        candidates = [
            name
            for name in self.listing.files
            if name.lower().endswith(tables.SUFFIXES) and stem(name) not in bases
        ]
        if len(candidates) > _MOST_TABLES:
            self._found.append(
                f"{len(candidates)} texts or tables such as {candidates[0]}, which stand beside no"
                " image of the same name"
            )
            return []
        captioned = [name for name in candidates if "caption" in name.lower()]
        usable: dict[str, set[str]] = {}
        for name in captioned or candidates:
            matcher = Matcher(self.listing, self.images, os.path.dirname(name))
            matched, missed = set(), []
            try:
                for row in self._rows(name, matcher.is_image):
                    if file := matcher.match(row):
                        matched.add(file)
                    else:
                        missed.append(row.file)
            except UserError as error:
                if matched:
                    raise
                self._found.append(str(error).removeprefix(self.listing.name.rstrip("/") + "/"))
                continue
            if matched:
                usable[name] = matched
            elif missed:
                self._found.append(f"{name} names {matcher.asked} files, {matcher.advice(missed)}")
            elif not name.lower().endswith(".txt"):
                self._found.append(f"{name} has no rows")
        chosen: dict[str, set[str]] = {}
        for name, matched in usable.items():
            for other, theirs in chosen.items():
                if matched & theirs:
                    raise UserError(
                        f"name: {self.listing.name}: {other} and {name} both have captions of its"
                        f" images; name one: --config.data.name={self.listing.name}/{other}"
                    )
            chosen[name] = matched
        return list(chosen)

    def _classed(self, name: str, told: Told) -> Told:
        """What is said of an image, with its class, which is its caption if there is no other."""
        if self._tabled and not told.label:
            return Told(())
        label, slash, _ = (told.label, "/", "") if self._tabled else name.partition("/")
        if not slash:
            outside = [name for name in self.images if "/" not in name]
            raise UserError(
                f"labels: {self.listing.name}: {outside[0]} lies in no sub-folder, and the"
                f" sub-folders are the classes; move it ({len(outside)} such images) into one, or"
                " give label_key, a field of a table"
            )
        return told._replace(captions=told.captions or (label,), label=label)

    def _without_captions(self) -> UserError:
        """The error where no image has a caption: what was found, and what would be read."""
        count, first = len(self.images), self.images[0]
        why = next(
            (
                r
                for n, r in self.skipped.items()
                if r != f"no caption in {self.layout or 'any file'}"
            ),
            "",
        )
        if self._found:
            do = "mend it, or name another table: --config.data.name=FOLDER/FILE"
            if not any(" files, " in told for told in self._found):
                do += f"; or write {stem(first)}.txt beside {first} and so on"
            # What names files at all comes before what is no table of captions.
            what = "; ".join(sorted(self._found, key=lambda told: " files, " not in told)[:3])
        elif not self.layout:
            do = f"write captions.jsonl, or {stem(first)}.txt beside {first} and so on"
            what = "there is no table of captions, and no .txt, .caption or .json beside an image"
        else:
            what = f"{self.layout} has none that can be read" + (f" ({why})" if why else "")
            do = "check its fields, or set caption_key"
        return UserError(
            f"name: {self.listing.name}: none of its {count} images has a caption: {what}; {do}"
        )


def _around(table: str) -> tuple[str, str]:
    """The folder whose images a table tells of, and the table's path in it."""
    if table.endswith((".tar", ".tgz", ".tar.gz")):
        raise UserError(f"name: {table}: a tar; name it wds:{table}")
    if not table.lower().endswith(tables.SUFFIXES):
        raise UserError(f"name: {table}: a file; give a folder: unpack it, or name what it lies in")
    folder, name = os.path.split(table)
    near = Listing(folder or ".")
    usual = images.suffixes()
    if any(name.lower().endswith(usual) for name in near.files):
        return folder or ".", name
    above, last = os.path.split(os.path.abspath(os.path.expanduser(folder or ".")))
    return above, f"{last}/{name}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(f"{n} {suffix}" for suffix, n in endings(iter(names)).items())
