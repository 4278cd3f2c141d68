"""The tokenizer of moeut-compose for `transformers`: SentencePiece itself, with the ids of training.

Text is text here: a `</s>` that a user types is encoded in pieces, as it was in training, and never becomes the
control token of that name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer


class MoeutComposeTokenizer(PreTrainedTokenizer):
    """Text to ids and back. Nothing is added to a text, and batches are filled up on the left."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str, **settings: Any) -> None:
        self.vocab_file = vocab_file
        self.processor = SentencePieceProcessor(model_file=vocab_file)
        super().__init__(**{"split_special_tokens": True, "special_tokens_pattern": "none", **settings})

    @property
    def vocab_size(self) -> int:
        return self.processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.processor.id_to_piece(index): index for index in range(self.vocab_size)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        """The pieces of a text by their names, that of the unknown piece included; lone surrogates become `?`."""
        valid = text.encode("utf-8", "replace").decode("utf-8")
        return [self.processor.id_to_piece(index) for index in self.processor.encode(valid)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str | None:
        return self.processor.id_to_piece(index) if index < self.vocab_size else None

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.processor.decode([self.processor.piece_to_id(token) for token in tokens])

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of ids. Ids that a wider model has beyond the tokenizer's have none, control tokens their names."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        texts: list[str] = []
        pieces: list[int] = []
        for index in [index for index in ids if 0 <= index < self.vocab_size and index not in skipped]:
            if self.processor.is_control(index):
                texts += [self.processor.decode(pieces), self.processor.id_to_piece(index)]
                pieces = []
            else:
                pieces.append(index)
        return "".join([*texts, self.processor.decode(pieces)])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model"
        target = Path(save_directory, name)
        if target.absolute() != Path(self.vocab_file).absolute():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
