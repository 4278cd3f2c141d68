"""`export` to `transformers`, `import` from there and of checkpoints of the original code."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from moeut_compose.cli.arguments import JsonOption
from moeut_compose.cli.failures import complain, leaving_on_interrupt, wrong_usage
from moeut_compose.cli.output import print_json
from moeut_compose.cli.runs import RunArgument, find_run, open_run


def export(
    run: RunArgument,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The folder to write; new, or empty.")],
    target: Annotated[
        Literal["transformers"],
        typer.Option("--format", help="A folder that Hugging Face transformers loads, with code of its own."),
    ] = "transformers",
    as_json: JsonOption = False,
) -> None:
    """Write a run for use elsewhere, and check that it does there what it does here.

    The folder holds weights, tokenizer, the code that runs them and a model card. Before it gets its name it is
    loaded with `transformers`, and logits, greedy decoding and token ids are compared. Needs `moeut-compose[hf]`.

    **Example**

    - `moeut-compose export runs/20260101-120000-moeut_tiny exported/moeut_tiny --format transformers`
    """
    with leaving_on_interrupt():
        from moeut_compose.interchange.huggingface.export import export_run, require_transformers
        from moeut_compose.progress import make_reporter

    require_transformers()
    loaded = open_run(find_run(run), "cpu")
    result = export_run(loaded, destination, reporter=make_reporter())
    if result.n_texts == 0:
        complain(f"no tokenizer: {loaded.path} has none to export")
    if as_json:
        print_json(
            {
                "name": loaded.spec.name,
                "run": str(loaded.path),
                "step": loaded.step,
                "destination": str(result.folder),
                "format": target,
                "transformers": result.transformers,
                "relative_difference": result.relative_difference,
                "tolerance": result.tolerance,
                "texts": result.n_texts,
            }
        )
        return
    difference = f"{result.relative_difference:.1e} of the largest (tolerance {result.tolerance:.0e})"
    print(f"{result.folder}: {loaded.spec.name} at step {loaded.step:,}")
    print(
        f"checked with transformers {result.transformers}: logits differ by {difference}, same tokens written,"
    )
    print(f"same ids for {result.n_texts} texts")


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint file, or the folder around it.")],
    out: Annotated[Path, typer.Option(metavar="RUN", help="The run folder to write.")],
    origin: Annotated[
        Literal["moeut", "moeut-training", "transformers"],
        typer.Option(
            "--format",
            help="The clean release (moeut), the training code of the paper, or a folder that `export` wrote.",
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="moeut: JSON or YAML with the arguments of MoEUTLM, if not beside PATH."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The SentencePiece model that goes with the checkpoint, if not in an export."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint of the original code, or an export, into a run folder.

    Nothing that the file brings along is executed. Weights are taken over, optimiser states are not.

    **Examples**

    - `moeut-compose import moeut_244m.pth --config moeut_244m.json --format moeut --out runs/moeut`
    - `moeut-compose import save/c4_moeut --format moeut-training --tokenizer c4.model --out runs/c4_moeut`
    - `moeut-compose import exported/moeut_tiny --format transformers --out runs/moeut_tiny`
    """
    if origin == "transformers" and config is not None:
        raise wrong_usage("--config belongs to --format moeut; an export has its own")
    with leaving_on_interrupt():
        from moeut_compose.data.tokenizer import Tokenizer
        from moeut_compose.interchange.checkpoints import import_checkpoint, read_original
        from moeut_compose.interchange.huggingface.back import import_export, read_export

    own = Tokenizer.load(tokenizer) if tokenizer else None
    if origin == "transformers":
        exported = read_export(path)
        spec, step, notes = import_export(exported, out, tokenizer=own), exported.step, exported.notes
        own, source = own or exported.tokenizer, path
    else:
        original = read_original(path, origin=origin, config=config)
        spec, step, notes = import_checkpoint(original, out, tokenizer=own), original.step, original.notes
        source = original.path
    for note in notes:
        complain(note)
    if own is None:
        complain(f"no tokenizer: put one in {out / 'tokenizer.model'} before evaluating or generating")
    if as_json:
        print_json(
            {
                "run": str(out),
                "name": spec.name,
                "format": origin,
                "checkpoint": str(source),
                "step": step,
                "params": spec.num_params(),
            }
        )
    else:
        print(f"{out}: {spec.name}, {spec.num_params():,} parameters at step {step:,}")
