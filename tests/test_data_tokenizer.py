"""The tokenizer against a plain re-telling of BPE, against Hugging Face, and against itself."""

import gzip
import hashlib
import html
import importlib.resources
import itertools
import unicodedata
import warnings

import ftfy
import numpy as np
import pytest

from unclip_jax.data.tokenizer import Tokenizer, clean
from unclip_jax.errors import UserError

HOSTILE = [
    "a photo of a cat",
    "",
    "   \t\n  ",
    "it's  what they'll've said: I'M, you'Re, 'tis",
    "naïve café, crème brûlée, Ångström",
    "日本の写真 中文字符 한국어 ภาษาไทย",
    "שלום עולם مرحبا بالعالم",
    "🍎🇩🇿👩‍🚒 red apple 👍🏽",
    "&lt;b&gt; fish &amp;amp; chips &quot;&eacute;&quot; &#128512; e&#769;",
    "a\x00b\x07c\x1bd\x7fe\u200bf\u2028g\xa0h",
    "1234567890 3.14 ½ ² Ⅷ ٣",
    "schÃ¶n â€œquotedâ€\x9d",
    "ΟΔΥΣΣΕΥΣ İstanbul ŉ ﬁne ſharp",
    "it'ſ",
    "!!!???... --- #hashtag @user http://a.b/c?d=e&f",
    "<|startoftext|> x<|endoftext|>y !<|endoftext|>! <|endoftext|><|endoftext|>",
    " ".join(f"word{n}" for n in range(40)),
    "ａｂｃ ＡＢＣ",
    "\ufeffbom \ud7ff \U0010ffff",
]


def vocabulary_file() -> list[tuple[str, ...]]:
    file = importlib.resources.files("unclip_jax.data") / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    return [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]


def byte_letters() -> dict[int, str]:
    """GPT-2's byte alphabet: printable Latin-1 bytes are themselves, others from U+0100 on."""
    visible = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xA0, 0xAD)]
    letters = {b: chr(b) for b in visible}
    letters.update(
        {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in visible)}
    )
    return letters


class PlainBpe:
    """OpenAI's tokenizer told in the plainest words: merge the best pair until none is left."""

    def __init__(self, vocab_size=49408):
        self.letters = byte_letters()
        merges = vocabulary_file()[: vocab_size - 514]
        self.rank = {pair: n for n, pair in enumerate(merges)}
        alphabet = list(self.letters.values())
        pieces = alphabet + [a + "</w>" for a in alphabet] + ["".join(p) for p in merges]
        self.id = {p: n for n, p in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}

    def word(self, word: str) -> list[int]:
        parts = [self.letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while True:
            pairs = [pair for pair in itertools.pairwise(parts) if pair in self.rank]
            if not pairs:
                return [self.id[part] for part in parts]
            best, merged = min(pairs, key=self.rank.get), []
            while parts:
                whole = tuple(parts[:2]) == best
                merged.append("".join(parts[:2]) if whole else parts[0])
                parts = parts[2 if whole else 1 :]
            parts = merged

    def text(self, text: str) -> list[int]:
        regex = pytest.importorskip("regex")
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = regex.sub(r"\s+", " ", text).strip().lower()
        pieces = regex.findall(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
            r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            text,
            flags=regex.IGNORECASE,
        )
        special = ("<|startoftext|>", "<|endoftext|>")
        return [i for p in pieces for i in ([self.id[p]] if p in special else self.word(p))]


def inner(tokens: np.ndarray, count: int) -> list[int]:
    return tokens[1 : 1 + count].tolist()


def test_the_vocabulary_is_openais():
    file = importlib.resources.files("unclip_jax.data") / "bpe_simple_vocab_16e6.txt.gz"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    # Ids that every user of CLIP has seen.
    tokens = Tokenizer().encode(["a photo of a cat"])[0]
    assert tokens[:8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]


@pytest.mark.parametrize("vocab_size", [514, 600, 4096, 49408])
def test_ids_are_those_of_plain_bpe_on_hostile_text(vocab_size):
    tokenizer, plain = Tokenizer(context_length=600, vocab_size=vocab_size), PlainBpe(vocab_size)
    for text, tokens in zip(HOSTILE, tokenizer.encode(HOSTILE), strict=True):
        ids = plain.text(text)
        assert inner(tokens, len(ids)) == ids, text
        assert tokens[0] == vocab_size - 2
        assert tokens[len(ids) + 1] == vocab_size - 1
        assert not tokens[len(ids) + 2 :].any()


def test_every_assigned_letter_and_sign_of_the_lower_planes_agrees():
    # Unassigned code points are left out: libraries differ in the Unicode they know. U+0345
    # is a mark that `regex`, told to ignore case, takes for the letter it capitalises to.
    points = [c for c in range(0x3100) if unicodedata.category(chr(c)) != "Cn" and c != 0x345]
    plain, texts = PlainBpe(), [f"a{chr(c)}b {chr(c)} '{chr(c)}1" for c in points]
    encoded = Tokenizer().encode(texts)
    for text, tokens in zip(texts, encoded, strict=True):
        ids = plain.text(text)
        assert inner(tokens, len(ids)) == ids, ascii(text)


def test_ids_are_those_of_hugging_face_on_cleaned_text():
    transformers = pytest.importorskip("transformers")
    plain = PlainBpe()
    theirs = transformers.CLIPTokenizer(
        vocab=plain.id, merges=vocabulary_file(), model_max_length=77
    )
    # Where they part from OpenAI: special tokens spelled out inside punctuation, accents that
    # entities leave decomposed, and the long s after an apostrophe.
    texts = [t for t in HOSTILE if not any(odd in t for odd in ("<|", "&#769;", "'ſ"))]
    texts.append(" ".join(["a very long caption"] * 50))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = Tokenizer().encode(texts)
    for text, tokens in zip(texts, ours, strict=True):
        ids = theirs(clean(text), truncation=True, max_length=77).input_ids
        assert tokens[: len(ids)].tolist() == ids, text


def test_decoding_gives_back_the_cleaned_words():
    tokenizer = Tokenizer()
    texts = ["a photo of a cat", "naïve café", "日本 の 写真", "", "🍎 red apple"]
    assert tokenizer.decode(tokenizer.encode(texts)) == texts
    small = Tokenizer(vocab_size=514)
    assert small.decode(small.encode(texts)) == texts


def test_a_smaller_vocabulary_encodes_anything_into_more_tokens():
    small, full = (Tokenizer(context_length=600, vocab_size=size) for size in (700, 49408))
    few, many = full.encode(HOSTILE), small.encode(HOSTILE)
    assert many.max() < 700
    assert ((many != 0).sum(-1) >= (few != 0).sum(-1)).all()


def test_truncation_keeps_the_end_token_and_warns_once():
    tokenizer = Tokenizer(context_length=8)
    texts = ["one two three four five six", "one two three four five six seven", "x " * 200]
    with pytest.warns(UserWarning) as caught:
        tokens = tokenizer.encode(texts)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "caption 1 (9 tokens" in message
    assert 'kept to "...three four five six"' in message
    assert "caption 2 (202 tokens" in message
    assert "caption 0" not in message
    assert (tokens[:, -1] == tokenizer.end_token).all()
    assert tokens[1, :-1].tolist() == tokens[0, :-1].tolist()


def test_whitespace_is_start_and_end_alone():
    tokenizer = Tokenizer(context_length=5)
    start, end = tokenizer.start_token, tokenizer.end_token
    assert tokenizer.encode(["", " \n\t "]).tolist() == [[start, end, 0, 0, 0]] * 2
    assert tokenizer.encode([]).shape == (0, 5)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Tokenizer(context_length=2), "context_length"),
        (lambda: Tokenizer(vocab_size=513), "vocab_size"),
        (lambda: Tokenizer(vocab_size=50000), "vocab_size"),
        (lambda: Tokenizer().encode("a string"), "texts"),
        (lambda: Tokenizer().encode(["a", None]), "texts"),
        (lambda: Tokenizer(vocab_size=600).decode([[1, 600]]), "tokens"),
    ],
)
def test_bad_input_is_named(make, field):
    with pytest.raises(UserError, match=field):
        make()
