"""CLIP's tokenizer: byte-level BPE on lower-cased text; and those that public weights bring.

`Tokenizer` has OpenAI's ids and cleaning, for CLIPs trained here. The merges are those of OpenAI's
vocabulary file (MIT licence, see `bpe_simple_vocab_16e6.LICENSE` beside this module); the Rust
library `tokenizers` applies them.

`FileTokenizer` does what a `tokenizer.json` says. Hugging Face's for CLIP has the same merges but
cleans otherwise: it doesn't repair mis-decoded text and curly quotes (ftfy), doesn't undo HTML
entities, and lowers each character by itself, so that a Greek final sigma differs. Given text from
`clean`, its ids are those of `Tokenizer`, with three exceptions: it composes what HTML entities
left decomposed (NFC), takes a spelled-out "<|endoftext|>" for the token even inside punctuation,
and doesn't know the clitic "'ſ".
"""

from __future__ import annotations

import abc
import functools
import gzip
import html
import importlib.resources
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import tokenizers

from unclip_jax.common import checks
from unclip_jax.errors import UserError, wrong

CONTEXT_LENGTH = 77
VOCAB_SIZE = 49408
MIN_VOCAB_SIZE = 2 * 256 + 2  # every byte, within a word and at its end; start, end
START, END = "<|startoftext|>", "<|endoftext|>"

_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_END_OF_WORD = "</w>"
# Special tokens, English clitics, words, single digits, runs of anything else. OpenAI
# matches whatever the case, and the long s is the one letter that lower-casing leaves.
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_NAMED_IN_WARNINGS = 5


def clean(text: str) -> str:
    """Text as CLIP was trained on it.

    Mis-decoded characters are repaired, HTML entities undone twice, white space
    collapsed, and everything lower-cased.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


def cut_in_words(cut: Sequence[str], texts: int, context_length: int) -> str:
    """One warning for all of the texts that were cut, the first few by name.

    Args:
        cut: one phrase for each text that was cut, as `encode_and_report` gives.
        texts: number of texts in all.
        context_length: tokens that a text may have.
    """
    more = f"; and {len(cut) - _NAMED_IN_WARNINGS} more"
    return (
        f"{len(cut)} of {texts} captions are longer than {context_length} tokens and were cut: "
        f"{'; '.join(cut[:_NAMED_IN_WARNINGS])}{more if len(cut) > _NAMED_IN_WARNINGS else ''}"
    )


class Encoder(abc.ABC):
    """What every tokenizer does: any number of texts to ids, in words if some are too long.

    Attributes:
        context_length: ids per text.
        end_token: the id that closes each text.
        pad_token: the id after it.
    """

    context_length: int
    end_token: int
    pad_token: int

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """The ids of some texts, int32 `[b, context_length]`.

        Those too long are cut, with one warning for all; a cut text keeps its end token.

        Raises:
            UserError: `texts` is one string, or holds anything but strings.
        """
        tokens, cut = self.encode_and_report(texts)
        if cut:
            warnings.warn(cut_in_words(cut, len(texts), self.context_length), stacklevel=2)
        return tokens

    def encode_and_report(self, texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Like `encode`, errors too, but says what was cut rather than warning of it.

        Returns:
            int32 `[b, context_length]`, and one phrase for each text that was cut: which it is,
            how many tokens it had, its last words kept.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"texts: {texts!r:.80}: expected a list of strings; give [text]")
        tokens = np.full((len(texts), self.context_length), self.pad_token, np.int32)
        cut = []
        for row, whole in enumerate(self._ids(list(texts))):
            kept = whole[: self.context_length]
            if len(whole) > self.context_length:
                kept[-1] = self.end_token
                last_words = " ".join(self._text(kept).split()[-4:])
                cut.append(f'caption {row} ({len(whole)} tokens, kept to "...{last_words}")')
            tokens[row, : len(kept)] = kept
        return tokens, cut

    @abc.abstractmethod
    def _ids(self, texts: list[str]) -> list[list[int]]:
        """All ids of each text, with those that open and close it."""

    @abc.abstractmethod
    def _text(self, ids: list[int]) -> str:
        """The words of some ids."""


class Tokenizer(Encoder):
    """Texts to ids and back.

    Ids are: the 256 bytes, the 256 bytes that end a word, merged tokens in the order of
    their merges, then start and end. A smaller vocabulary keeps the first merges of the
    same BPE: any text still encodes, into more tokens, and an embedding table is small.

    Attributes:
        context_length: ids per text, start and end included.
        vocab_size: number of ids.
        start_token: the id that opens each text, `vocab_size - 2`.
        end_token: the id that closes it, `vocab_size - 1`. Padding after it is 0.
    """

    pad_token = 0

    def __init__(self, context_length: int = CONTEXT_LENGTH, vocab_size: int = VOCAB_SIZE):
        """Makes a tokenizer.

        Raises:
            UserError: `context_length` is below 3 (start, one token, end), or `vocab_size` not in
                514 (bytes alone) to 49408 (CLIP's own).
        """
        self.context_length = checks.count("context_length", context_length, least=3)
        if not MIN_VOCAB_SIZE <= checks.count("vocab_size", vocab_size) <= VOCAB_SIZE:
            expected = f"{MIN_VOCAB_SIZE} (bytes alone) to {VOCAB_SIZE} (CLIP's own)"
            raise wrong("vocab_size", vocab_size, expected)
        self.vocab_size = vocab_size
        self.start_token = vocab_size - 2
        self.end_token = vocab_size - 1
        self._bpe = _bpe(vocab_size)

    def decode(self, tokens: np.ndarray) -> list[str]:
        """The texts of some ids, up to each end token: cleaned, lower-case.

        Args:
            tokens: int `[b, l]`; start, end and padding are left out.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        tokens = np.asarray(tokens)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            found = f"{tokens.min()}..{tokens.max()}"
            raise wrong("tokens", found, f"ids in 0..{self.vocab_size - 1}")
        return [self._text(row.tolist()) for row in tokens]

    def save(self, folder: str | Path) -> None:
        """Write the files that transformers' CLIPTokenizer reads; `folder` is created."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._bpe.model.save(str(folder))
        special = dict.fromkeys(("eos_token", "unk_token", "pad_token"), END)
        _write_settings(folder, self.context_length, {"bos_token": START} | special)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        cleaned = [clean(text) for text in texts]
        encodings = self._bpe.encode_batch_fast(cleaned, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        for row, text in enumerate(cleaned):
            if START in text or END in text:
                ids[row] = self._ids_with_specials(text)
        return [[self.start_token, *inner, self.end_token] for inner in ids]

    def _ids_with_specials(self, text: str) -> list[int]:
        """Ids of a text that spells out a special token, which stands for its id then."""
        special = {START: self.start_token, END: self.end_token}
        ids = []
        for piece, _ in self._bpe.pre_tokenizer.pre_tokenize_str(text):
            merged = [token.id for token in self._bpe.model.tokenize(piece)]
            ids.extend([special[piece]] if piece in special else merged)
        return ids

    def _text(self, ids: list[int]) -> str:
        inner = ids[: ids.index(self.end_token)] if self.end_token in ids else ids
        text = self._bpe.decode([i for i in inner if i != self.start_token])
        return " ".join(text.replace(_END_OF_WORD, " ").split())


class FileTokenizer(Encoder):
    """What a `tokenizer.json` says, with the ids and the padding of whoever wrote it.

    Attributes:
        context_length: ids per text, those that open and close it included.
        vocab_size: number of ids. An embedding table has at least as many rows.
        special: its special tokens by transformers' names, "eos_token" and "pad_token" among them.
        end_token: the id that closes each text.
        pad_token: the id after it.
    """

    def __init__(
        self, model: tokenizers.Tokenizer, context_length: int, special: Mapping[str, str]
    ):
        """Takes a tokenizer over; the padding and cutting that its file asks for are not obeyed."""
        model.no_padding()
        model.no_truncation()
        self.context_length, self.special = context_length, special
        self.vocab_size = model.get_vocab_size(with_added_tokens=True)
        self.end_token = model.token_to_id(special["eos_token"])
        self.pad_token = model.token_to_id(special["pad_token"])
        self._model = model

    @classmethod
    def of(cls, about: Mapping[str, Any], context_length: int) -> FileTokenizer:
        """The tokenizer that `describe` described."""
        return cls(_built(json.dumps(about["json"])), context_length, about["special"])

    def describe(self) -> dict[str, Any]:
        """Plain data from which `of` makes the tokenizer again, exactly.

        It is the `tokenizer.json`, in which a number n stands for the first n ids of CLIP's own
        vocabulary.
        """
        found = json.loads(self._model.to_str())
        inner = found["model"]
        size = len(inner["vocab"])
        if MIN_VOCAB_SIZE <= size <= VOCAB_SIZE and inner["type"] == "BPE":
            vocabulary, merges = _vocabulary(size)
            if inner["vocab"] == vocabulary and list(map(tuple, inner["merges"])) == merges:
                inner |= {"vocab": size, "merges": size}
        return {"special": dict(self.special), "json": found}

    def save(self, folder: str | Path) -> None:
        """Write the files that transformers' CLIPTokenizer reads; `folder` is created."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._model.save(str(folder / "tokenizer.json"))
        _write_settings(folder, self.context_length, self.special)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch(texts)]

    def _text(self, ids: list[int]) -> str:
        return self._model.decode(ids).replace(_END_OF_WORD, " ")


@functools.lru_cache(maxsize=4)
def _built(text: str) -> tokenizers.Tokenizer:
    """The tokenizer of a description's "json"."""
    found = json.loads(text)
    if isinstance(size := found["model"]["vocab"], int):
        vocabulary, merges = _vocabulary(size)
        found["model"] |= {"vocab": vocabulary, "merges": merges}
    return tokenizers.Tokenizer.from_str(json.dumps(found))


def _write_settings(folder: Path, context_length: int, special: Mapping[str, str]) -> None:
    """Write the tokenizer_config.json of a CLIPTokenizer."""
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **special}
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


@functools.cache
def _vocabulary(vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of CLIP's pieces, with the first merges alone, and those merges."""
    merges = _merges()[: vocab_size - MIN_VOCAB_SIZE]
    letters = _byte_letters()
    pieces = [*letters, *(letter + _END_OF_WORD for letter in letters)]
    pieces += ["".join(pair) for pair in merges]
    return {piece: number for number, piece in enumerate([*pieces, START, END])}, merges


@functools.cache
def _bpe(vocab_size: int) -> tokenizers.Tokenizer:
    """The byte-level BPE with the first merges of CLIP's."""
    vocabulary, merges = _vocabulary(vocab_size)
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD)
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(_PIECES), behavior="removed", invert=True
            ),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return bpe


def _merges() -> list[tuple[str, str]]:
    """CLIP's merges, best first."""
    file = importlib.resources.files(__package__).joinpath(_VOCABULARY)
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    first, count = 1, VOCAB_SIZE - MIN_VOCAB_SIZE  # the first line names the file's version
    return [tuple(line.split()) for line in lines[first : first + count]]


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of their ids.

    Printable Latin-1 bytes stand for themselves and come first; the others, in order,
    take the letters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(len(others))]
