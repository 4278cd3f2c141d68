"""From a recipe to tokens on disk: the tokenizer, the training text and the held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeut_compose.data.errors import DataError
from moeut_compose.data.sources import open_source
from moeut_compose.data.synthetic import (
    SyntheticWindows,
    alphabet_tokenizer,
    synthetic_identity,
    synthetic_windows,
)
from moeut_compose.data.tokenizer import prepare_tokenizer
from moeut_compose.data.tokens import TokenFile, prepare_tokens, token_key
from moeut_compose.spec.recipe import SyntheticData

if TYPE_CHECKING:
    from moeut_compose.data.tokenizer import Tokenizer
    from moeut_compose.progress import Reporter
    from moeut_compose.spec.recipe import DataSpec, RecipeSpec


Windows = TokenFile | SyntheticWindows


@dataclass(frozen=True)
class PreparedData:
    """Everything that training reads."""

    tokenizer: Tokenizer
    train: Windows
    validation: Windows
    identity: str
    """Equal for equal training tokens."""


def prepare_data(
    recipe: RecipeSpec,
    *,
    vocab_size: int,
    context: int,
    tokenizer: Tokenizer | None = None,
    reporter: Reporter | None = None,
) -> PreparedData:
    """Tokenise what a recipe names, or find it in the cache. Raises `DataError`.

    `tokenizer` replaces the recipe's, so that a resumed run keeps the one it began with.
    """
    data = recipe.data
    if isinstance(data, SyntheticData):
        return _prepare_synthetic(data, vocab_size, context)
    source = open_source(data)
    if tokenizer is None:
        tokenizer = prepare_tokenizer(
            recipe.tokenizer, source, vocab_size=vocab_size, separator=data.separator, reporter=reporter
        )
    train = prepare_tokens(
        source,
        "train",
        tokenizer,
        separator=data.separator,
        max_tokens=data.max_tokens,
        workers=data.workers,
        reporter=reporter,
    )
    check_length(train, context, recipe)
    validation = prepare_validation(
        data, tokenizer, context=context, windows=recipe.evaluation.windows, reporter=reporter
    )
    identity = token_key(source, "train", tokenizer, separator=data.separator, max_tokens=data.max_tokens)
    return PreparedData(tokenizer, train, validation, identity)


def prepare_validation(
    data: DataSpec,
    tokenizer: Tokenizer,
    *,
    context: int,
    windows: int | None,
    reporter: Reporter | None = None,
) -> Windows:
    """Tokenise the held-out text; of a remote source only the `windows` that are asked for."""
    if isinstance(data, SyntheticData):
        return synthetic_windows(data, "validation")
    source = open_source(data)
    enough = windows * context + 1 if source.is_remote and windows is not None else None
    tokens = prepare_tokens(
        source,
        "validation",
        tokenizer,
        separator=data.separator,
        max_tokens=enough,
        workers=data.workers,
        reporter=reporter,
    )
    if tokens.n_windows(context) == 0:
        raise DataError(
            f"the held-out text has {tokens.index.n_tokens:,} tokens, less than one window of {context}; "
            "raise data.validation_fraction, name data.validation_files, or shorten the context"
        )
    return tokens


def _prepare_synthetic(data: SyntheticData, vocab_size: int, context: int) -> PreparedData:
    train = synthetic_windows(data, "train")
    train.n_windows(context)
    tokenizer = alphabet_tokenizer(train.task, vocab_size=vocab_size)
    return PreparedData(tokenizer, train, synthetic_windows(data, "validation"), synthetic_identity(data))


def check_length(train: TokenFile, context: int, recipe: RecipeSpec) -> None:
    """Refuse text that cannot fill one batch. Raises `DataError`."""
    available = train.n_windows(context)
    needed = recipe.batch.size if recipe.order == "streams" else 1
    if available < needed:
        raise DataError(
            f"the training text has {train.index.n_tokens:,} tokens, {available} windows of {context}, "
            f"but order: {recipe.order} needs {needed}; "
            "use more text, a shorter context, a smaller batch or order: shuffled"
        )
