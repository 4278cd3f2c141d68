"""`import`: checkpoints of the original code."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from moeut_compose.cli.arguments import JsonOption
from moeut_compose.cli.failures import complain, leaving_on_interrupt
from moeut_compose.cli.output import print_json


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint file, or the folder around it.")],
    out: Annotated[Path, typer.Option(metavar="RUN", help="The run folder to write.")],
    origin: Annotated[
        Literal["moeut", "moeut-training"],
        typer.Option("--format", help="The clean release (moeut) or the training code of the paper."),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="moeut: JSON or YAML with the arguments of MoEUTLM, if not beside PATH."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The SentencePiece model that goes with the checkpoint."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint of the original code into a run folder.

    Nothing that the file brings along is executed. Weights are taken over, optimiser states are not.

    **Examples**

    - `moeut-compose import moeut_244m.pth --config moeut_244m.json --format moeut --out runs/moeut`
    - `moeut-compose import save/c4_moeut --format moeut-training --tokenizer c4.model --out runs/c4_moeut`
    """
    with leaving_on_interrupt():
        from moeut_compose.data.tokenizer import Tokenizer
        from moeut_compose.interchange.checkpoints import import_checkpoint, read_original

    original = read_original(path, origin=origin, config=config)
    spec = import_checkpoint(original, out, tokenizer=Tokenizer.load(tokenizer) if tokenizer else None)
    for note in original.notes:
        complain(note)
    if tokenizer is None:
        complain(f"no tokenizer: put one in {out / 'tokenizer.model'} before evaluating or generating")
    if as_json:
        print_json(
            {
                "run": str(out),
                "name": spec.name,
                "format": origin,
                "checkpoint": str(original.path),
                "step": original.step,
                "params": spec.num_params(),
            }
        )
    else:
        print(f"{out}: {spec.name}, {spec.num_params():,} parameters at step {original.step:,}")
