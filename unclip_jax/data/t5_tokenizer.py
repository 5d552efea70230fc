"""T5's tokenizer: a SentencePiece unigram model, read from a local folder's `tokenizer.json`.

The vocabulary is not part of this package; whoever has a T5's weights has its `tokenizer.json`
beside them. The Rust library `tokenizers` applies it, with the normalisation the file asks for:
text is neither lower-cased nor otherwise cleaned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from unclip_jax.data.tokenizer import Encoder
from unclip_jax.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
PAD, END = 0, 1
_SPECIAL = {"<pad>": PAD, "</s>": END}


class T5Tokenizer(Encoder):
    """Texts to ids: the pieces of the text, the end token 1, and padding 0 after it.

    There is no start token. A special token that a text spells out, such as "</s>", stands for its
    id, as in transformers.

    Attributes:
      context_length: ids per text, the end included.
      vocab_size: number of ids. A T5's embedding table has at least as many rows.
    """

    def __init__(self, folder: str | Path, context_length: int):
        """Reads a tokenizer.

        Args:
          folder: where `tokenizer.json` is.
          context_length: ids per text, at least 2.

        Raises:
          UserError: no such folder or file, a damaged one, not a T5's, or a `context_length`
            below 2.
        """
        if context_length < 2:
            raise UserError(f"context_length: {context_length}: expected at least 2: a token, end")
        self.context_length = context_length
        self._model = _read(Path(folder).expanduser())
        self.vocab_size = self._model.get_vocab_size(with_added_tokens=True)

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        tokens = np.full((len(texts), self.context_length), PAD, np.int32)
        cut = []
        for row, encoding in enumerate(
            self._model.encode_batch(list(texts), add_special_tokens=False)
        ):
            kept = encoding.ids[: self.context_length - 1]
            if len(kept) < len(encoding.ids):
                last_words = " ".join(self._model.decode(kept).split()[-4:])
                count = len(encoding.ids) + 1
                cut.append(f'caption {row} ({count} tokens, kept to "...{last_words}")')
            tokens[row, : len(kept) + 1] = [*kept, END]
        return tokens, cut


def text_mask(tokens: Any) -> Any:
    """Where the text is: True through the last token that is no padding.

    Args:
      tokens: int `[..., l]`, numpy or jax.

    Returns:
      bool `[..., l]`, of the same kind.
    """
    return (tokens != PAD)[..., ::-1].cumsum(-1)[..., ::-1] > 0


def _read(folder: Path) -> tokenizers.Tokenizer:
    """The unigram model in a folder, without the padding and cutting its file may ask for."""
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
        why = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({why}); copy it again") from error
    for name, expected in _SPECIAL.items():
        if (found := model.token_to_id(name)) != expected:
            raise UserError(
                f"{path}: {name} has id {found}, expected {expected}; give the folder of a T5"
            )
    model.no_padding()
    model.no_truncation()
    return model
