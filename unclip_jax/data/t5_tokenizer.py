"""T5's tokenizer: a SentencePiece unigram model, read from a local folder's `tokenizer.json`.

The vocabulary is not part of this package; whoever has a T5's weights has its `tokenizer.json`
beside them. Text is neither lower-cased nor cleaned but as that file says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from unclip_jax.common import checks
from unclip_jax.data.tokenizer import FileTokenizer
from unclip_jax.errors import UserError, one_line

TOKENIZER_FILE = "tokenizer.json"
PAD, END = 0, 1
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>"}


class T5Tokenizer(FileTokenizer):
    """Texts to ids: the pieces of the text, the end token 1, and padding 0 after it.

    There is no start token. A special token that a text spells out, such as "</s>", stands for its
    id, as in transformers.
    """

    def __init__(self, folder: str | Path, context_length: int):
        """Reads a tokenizer.

        Args:
            folder: where `tokenizer.json` is.
            context_length: ids per text, at least 2: a token, end.

        Raises:
            UserError: no such folder or file, a damaged one, not a T5's, or a `context_length`
                below 2.
        """
        checks.count("context_length", context_length, least=2)
        super().__init__(_read(Path(folder).expanduser()), context_length, _SPECIAL)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encodings = self._model.encode_batch(texts, add_special_tokens=False)
        return [[*encoding.ids, END] for encoding in encodings]


def text_mask(tokens: Any) -> Any:
    """Where the text is: True through the last token that is no padding.

    Args:
        tokens: int `[..., l]`, numpy or jax.

    Returns:
        bool `[..., l]`, of the same kind.
    """
    return (tokens != PAD)[..., ::-1].cumsum(-1)[..., ::-1] > 0


def _read(folder: Path) -> tokenizers.Tokenizer:
    """The unigram model in a folder."""
    path = folder / TOKENIZER_FILE
    if not folder.is_dir():
        raise UserError(
            f"T5 {str(folder)!r}: no such folder; expected one with {TOKENIZER_FILE}, such as a"
            " copy of google/t5-v1_1-small"
        )
    if not path.is_file():
        how = (
            "make it of spiece.model, with transformers:"
            " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            if (folder / "spiece.model").is_file()
            else "copy it from where the T5 was found"
        )
        raise UserError(f"{path}: missing; {how}")
    try:
        model = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust library raises bare Exceptions
        raise UserError(f"{path}: cannot be read ({one_line(error)}); copy it again") from error
    for name, expected in zip(_SPECIAL.values(), (PAD, END), strict=True):
        if (found := model.token_to_id(name)) != expected:
            raise UserError(
                f"{path}: {name} has id {found}, expected {expected}; give the folder of a T5"
            )
    return model
