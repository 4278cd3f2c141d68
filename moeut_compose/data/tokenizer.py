"""SentencePiece: training with the published settings, and the one tokenizer that everything else uses.

Every document is encoded on its own, so each begins with the word-start mark, and no control tokens are
added.
"""

from __future__ import annotations

import hashlib
import io
import json
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import read_plain, write_atomically
from moeut_compose.data.location import cache_folder
from moeut_compose.progress import SilentReporter
from moeut_compose.spec.recipe import SentencePieceFile, TrainSentencePiece

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from moeut_compose.data.sources import Source
    from moeut_compose.progress import Reporter, Task
    from moeut_compose.spec.recipe import TokenizerSpec


class Tokenizer:
    """Text to ids and back."""

    def __init__(self, model: bytes) -> None:
        """`model` is the content of a SentencePiece `.model` file. Raises `DataError` if it is not one."""
        self.model = model
        """What the file holds."""
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"this is not a SentencePiece model: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a `.model` file."""
        try:
            return cls(read_plain(path))
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Write a `.model` file that `load` and SentencePiece itself read."""
        write_atomically(path, self.model)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def start_id(self) -> int | None:
        """Id of `<s>`, or else of `</s>`; None if there is neither. Training text holds none of them."""
        known = (self._processor.bos_id(), self._processor.eos_id())
        return next((identity for identity in known if identity >= 0), None)

    def control_pieces(self) -> dict[str, tuple[str, int]]:
        """The pieces for `unk`, `bos`, `eos` and `pad`, as far as there are any, and their ids."""
        ids = {name: getattr(self._processor, f"{name}_id")() for name in ("unk", "bos", "eos", "pad")}
        return {
            name: (self._processor.id_to_piece(index), index) for name, index in ids.items() if index >= 0
        }

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """`[V]` UTF-8 bytes of the text of each piece: one for a byte or what is unknown, none for control pieces."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for index in range(self.vocab_size):
            if self._processor.is_byte(index) or self._processor.is_unknown(index):
                lengths[index] = 1
            elif not self._processor.is_control(index):
                lengths[index] = len(self._processor.id_to_piece(index).replace("▁", " ").encode())
        return lengths

    def encode(self, text: str) -> list[int]:
        """Ids of one document."""
        return self._processor.encode(_valid(text))

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = -1) -> list[list[int]]:
        """Ids of many documents, each on its own."""
        return self._processor.encode([_valid(text) for text in texts], num_threads=num_threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a sequence of ids; the word-start mark of the first piece is dropped.

        Ids without a piece, which a model with a larger vocabulary can write, have no text.
        """
        return self._processor.decode([identity for identity in ids if 0 <= identity < self.vocab_size])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces behind ids, one by one; `▁` marks where a word starts."""
        return [self._processor.id_to_piece(int(identity)) for identity in ids]


def _valid(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def prepare_tokenizer(
    spec: TokenizerSpec, source: Source, *, vocab_size: int, separator: str, reporter: Reporter | None = None
) -> Tokenizer:
    """Load the tokenizer that a recipe names, or train it on the source and remember it.

    `vocab_size` is the architecture's. Raises `DataError` if the tokenizer does not fit it or cannot be made.
    """
    reporter = reporter or SilentReporter()
    if isinstance(spec, SentencePieceFile):
        tokenizer = _load_file(spec)
    else:
        tokenizer = _train_cached(spec, source, vocab_size, separator, reporter)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} pieces but the architecture's vocab_size is "
            f"{vocab_size}; set vocab_size={tokenizer.vocab_size} or name another tokenizer"
        )
    return tokenizer


def _load_file(spec: SentencePieceFile) -> Tokenizer:
    from pathlib import Path

    return Tokenizer.load(Path(spec.file).expanduser())


def _train_cached(
    spec: TrainSentencePiece, source: Source, vocab_size: int, separator: str, reporter: Reporter
) -> Tokenizer:
    settings = [spec.model_dump(mode="json"), vocab_size, separator, sentencepiece.__version__]
    key = hashlib.sha256(json.dumps([source.fingerprint("train"), settings]).encode()).hexdigest()[:24]
    path = cache_folder("tokenizers") / f"{key}.model"
    if path.is_file():
        return Tokenizer.load(path)
    texts = with_separator(source.documents("train"), separator)
    tokenizer = train_tokenizer(spec, texts, vocab_size=vocab_size, reporter=reporter)
    tokenizer.save(path)
    return tokenizer


def train_tokenizer(
    spec: TrainSentencePiece, texts: Iterable[str], *, vocab_size: int, reporter: Reporter | None = None
) -> Tokenizer:
    """Train SentencePiece on `texts`, one document each. Raises `DataError` if there is too little text."""
    reporter = reporter or SilentReporter()
    output = io.BytesIO()
    with reporter.task(f"training a tokenizer of {vocab_size} pieces: reading", total=None) as task:
        sentences = TrainingText(texts, spec, task)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=output,
                model_type=spec.model_type,
                vocab_size=vocab_size,
                split_digits=spec.split_digits,
                character_coverage=spec.character_coverage,
                byte_fallback=spec.byte_fallback,
                normalization_rule_name=spec.normalization,
                remove_extra_whitespaces=spec.remove_extra_whitespaces,
                max_sentence_length=spec.max_sentence_length,
                minloglevel=2,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise sentences.error or DataError(_training_failure(error, sentences, vocab_size)) from error
    if sentences.n_skipped:
        reporter.warn(
            f"the tokenizer ignored {sentences.n_skipped:,} of {sentences.n_documents:,} documents, "
            f"which are longer than {spec.max_sentence_length} bytes, as published; "
            "tokenizer.long_documents=split uses them"
        )
    return Tokenizer(output.getvalue())


def _training_failure(error: Exception, sentences: TrainingText, vocab_size: int) -> str:
    if sentences.n_documents == 0:
        return "there is no training text to train a tokenizer on"
    if sentences.n_skipped == sentences.n_documents:
        return (
            f"all {sentences.n_documents:,} documents are too long to train a tokenizer on; "
            "set tokenizer.long_documents=split"
        )
    return (
        f"cannot train a tokenizer of {vocab_size} pieces on {sentences.n_documents:,} documents, "
        f"{sentences.n_bytes:,} bytes: {error}; use more text or a smaller vocab_size"
    )


class TrainingText:
    """The sentences that SentencePiece sees, and a count of what it does not."""

    def __init__(self, texts: Iterable[str], spec: TrainSentencePiece, task: Task) -> None:
        self._texts = texts
        self._spec = spec
        self._task = task
        self.n_documents = 0
        self.n_bytes = 0
        self.n_skipped = 0
        self.error: DataError | None = None
        """What ended the reading: SentencePiece makes an error of its own of it."""

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._sentences()
        except DataError as error:
            self.error = error
            raise

    def _sentences(self) -> Iterator[str]:
        limit = self._spec.max_sentence_length
        for text in self._texts:
            if self.n_documents == self._spec.max_documents or self._full():
                return
            text = _valid(text)
            self.n_documents += 1
            size = len(text.encode())
            self.n_bytes += size
            self._task.advance()
            if self._spec.long_documents == "split":
                yield from split_text(text, limit)
            else:
                self.n_skipped += size > limit
                yield text

    def _full(self) -> bool:
        return self._spec.max_bytes is not None and self.n_bytes >= self._spec.max_bytes


def split_text(text: str, max_bytes: int) -> Iterator[str]:
    """Cut a text into its lines, and lines longer than `max_bytes` of UTF-8 at spaces, or else anywhere."""
    for line in text.splitlines():
        while len(line.encode()) > max_bytes:
            head = line.encode()[:max_bytes].decode(errors="ignore")
            border = head.rfind(" ") + 1 or len(head)
            yield line[:border]
            line = line[border:]
        if line.strip():
            yield line


def with_separator(texts: Iterable[str], separator: str) -> Iterator[str]:
    """Non-empty documents, each ended by the separator."""
    for text in texts:
        if text:
            yield text + separator
