"""Data sets of TFDS: which features are captions, pictures and classes, and which are refused."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.records import BadRecord
from unclip_jax.errors import UserError


def picture(level):
    file = io.BytesIO()
    Image.new("L", (6, 4), level * 30).save(file, "PNG")
    file.seek(0)
    return file


class Mixed(tfds.core.GeneratorBasedBuilder):
    """Four records with features like COCO's, flat names with slashes, and names of classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        of = tfds.features
        number = of.Tensor(shape=(), dtype=np.int64)
        text = of.Tensor(shape=(), dtype=np.str_)
        features = {
            "image": of.Image(),
            "image/filename": of.Text(),
            "image/id": number,
            "captions": of.Sequence({"id": number, "text": text}),
            "kind": of.ClassLabel(names=["cat", "ant"]),
            "listed": of.Text(),
            "deep": {"a/b": of.Text(), "mask": of.Image()},
        }
        return tfds.core.DatasetInfo(builder=self, features=of.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "validation": self._generate_examples()}

    def _generate_examples(self):
        for n in range(4):
            yield (
                n,
                {
                    "image": picture(n),
                    "image/filename": f"{n}.jpg",
                    "image/id": n,
                    "captions": [{"id": n, "text": f"note {k} of {n}"} for k in range(2)],
                    "kind": n % 2,
                    "listed": '["one", "two"]',
                    "deep": {"a/b": f"deep {n}" if n else b"\xfcber", "mask": picture(7)},
                },
            )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    Mixed(data_dir=folder, file_format="array_record").download_and_prepare()

    def made(split_field="split", **options):
        config = DataConfig(name="tfds:mixed", cache_dir=folder, **options)
        return load(config, split_field=split_field)

    return made


def captions(source):
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index]["caption"])
        except BadRecord as error:
            found.append(str(error).split(": ", 1)[1])
    return sorted(found)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"caption_key": "captions/text"}, [f"note {n % 2} of {n // 2}" for n in range(8)]),
        ({"caption_key": "image/filename"}, [f"{n}.jpg" for n in range(4)]),
        ({"caption_key": "kind"}, ["ant", "ant", "cat", "cat"]),
        ({"caption_key": "listed"}, ["one"] * 4 + ["two"] * 4),
        ({"bare": True}, [""] * 4),
        (
            {"caption_key": "deep/a/b"},
            ["deep 1", "deep 2", "deep 3",
             "its caption is text that is not UTF-8; save it as UTF-8"],
        ),
        ({"labels": True, "label_key": "kind"}, ["ant", "ant", "cat", "cat"]),
    ],
)  # fmt: skip
def test_what_is_text_is_a_caption(mixed, options, expected):
    assert captions(mixed(**options)) == sorted(expected)


def test_the_image_may_lie_inside(mixed):
    data = mixed(caption_key="listed", image_key="deep/mask")[0]["image"]
    assert np.asarray(Image.open(io.BytesIO(data))).max() == 210


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_key": "captions"}, "caption_key: got 'captions'.*with text; .*captions/text"),
        ({"caption_key": "captions/id"}, "caption_key: got 'captions/id'.*captions/text"),
        ({"caption_key": "image/id"}, "caption_key: got 'image/id'.*image/filename"),
        ({}, "caption_key: got 'caption'.*captions/text"),
        ({"labels": True, "caption_key": "captoin", "label_key": "kind"}, "got 'captoin'"),
        ({"caption_key": "listed", "image_key": "image/filename"}, "image_key: .*deep/mask"),
        ({"caption_key": "listed", "label_key": "gone"}, "label_key: got 'gone'.*kind"),
        (
            {"caption_key": "listed", "labels": True, "label_key": "image/id"},
            "have names; it has kind",
        ),
    ],
)
def test_what_is_none_is_refused_with_those_that_are(mixed, options, message):
    with pytest.raises(UserError, match=message):
        mixed(**options)


def test_a_held_out_split_is_named_as_such(mixed):
    with pytest.raises(UserError, match=r"split: got 'heldout', .*train, validation, all"):
        mixed(caption_key="listed", split="heldout")
    with pytest.raises(UserError, match=r"^config\.heldout_split: got 'heldout', .*validation"):
        mixed("config.heldout_split", caption_key="listed", split="heldout")
