"""`data prepare` and `tokenizer train`: what `train` does first, by itself.

On a machine with a network, or with many cores, before a GPU is asked for.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeut_compose.cli.arguments import JsonOption, OverridesArgument, SpecArgument, check_overrides
from moeut_compose.cli.devices import import_torch
from moeut_compose.cli.failures import wrong_usage
from moeut_compose.cli.output import print_json
from moeut_compose.cli.run import DEFAULT_RECIPE
from moeut_compose.spec.io import load_recipe, load_spec, split_overrides

if TYPE_CHECKING:
    from moeut_compose.spec.recipe import RecipeSpec

data = typer.Typer(help="Prepare training text.", no_args_is_help=True)
tokenizer = typer.Typer(help="Make tokenizers.", no_args_is_help=True)
RecipeOption = Annotated[str, typer.Option(metavar="R", help="The recipe whose data and settings to use.")]


@data.callback()
def _data() -> None:
    """Prepare training text."""


@tokenizer.callback()
def _tokenizer() -> None:
    """Make tokenizers."""


@data.command()
def prepare(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    recipe: RecipeOption = DEFAULT_RECIPE,
    as_json: JsonOption = False,
) -> None:
    """Tokenise what `train` would read, into the cache where `train` will find it.

    **Example**

    - `moeut-compose data prepare moeut_244m --recipe paper`
    """
    architecture_changes, recipe_changes = split_overrides(check_overrides(overrides))
    architecture, chosen = load_spec(spec, architecture_changes), load_recipe(recipe, recipe_changes)
    import_torch()
    from moeut_compose.data.prepare import prepare_data
    from moeut_compose.progress import make_reporter
    from moeut_compose.train.plan import context_of

    context = context_of(architecture, chosen)
    found = prepare_data(
        chosen, vocab_size=architecture.vocab_size, context=context, reporter=make_reporter()
    )
    parts = {"train": found.train, "validation": found.validation}
    if as_json:
        print_json(
            {
                "identity": found.identity,
                "vocab_size": found.tokenizer.vocab_size,
                "context": context,
                **{f"{name}_tokens": part.index.n_tokens for name, part in parts.items()},
                **{f"{name}_windows": part.n_windows(context) for name, part in parts.items()},
            }
        )
        return
    for name, part in parts.items():
        print(f"{name:<10}  {part.index.n_tokens:,} tokens, {part.n_windows(context):,} windows of {context}")


@tokenizer.command("train")
def train_tokenizer(
    overrides: OverridesArgument = None,
    vocab_size: Annotated[int, typer.Option(metavar="N", min=2, help="Pieces.")] = 8000,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The SentencePiece model to write.")
    ] = Path("tokenizer.model"),
    recipe: RecipeOption = DEFAULT_RECIPE,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
) -> None:
    """Train a SentencePiece model on the training text of a recipe.

    Name it in a recipe as `tokenizer: {kind: sentencepiece, file: FILE}`. **Example**

    - `moeut-compose tokenizer train --vocab-size 16000 -o mine.model recipe.tokenizer.model_type=unigram`
    """
    changes = check_overrides(overrides)
    misplaced = [change for change in changes if not change.startswith("recipe.")]
    if misplaced:
        raise wrong_usage(f"{misplaced[0]}: a tokenizer knows no architecture; changes begin with recipe.")
    if out.exists() and not force:
        raise wrong_usage(f"{out} exists; --force replaces it")
    chosen = load_recipe(recipe, split_overrides(changes)[1])
    import_torch()
    _train_tokenizer(chosen, vocab_size, out)
    print(f"{out}: {vocab_size:,} pieces")


def _train_tokenizer(recipe: "RecipeSpec", vocab_size: int, out: Path) -> None:
    from moeut_compose.data.errors import DataError
    from moeut_compose.data.sources import open_source
    from moeut_compose.data.tokenizer import prepare_tokenizer
    from moeut_compose.progress import make_reporter
    from moeut_compose.spec.recipe import SentencePieceFile, SyntheticData

    if isinstance(recipe.data, SyntheticData):
        raise DataError("synthetic examples have an alphabet of their own; there is nothing to train")
    if isinstance(recipe.tokenizer, SentencePieceFile):
        raise DataError(
            f"recipe.tokenizer names a trained model, {recipe.tokenizer.file}; there is nothing to train"
        )
    found = prepare_tokenizer(
        recipe.tokenizer,
        open_source(recipe.data),
        vocab_size=vocab_size,
        separator=recipe.data.separator,
        reporter=make_reporter(),
    )
    found.save(out)
