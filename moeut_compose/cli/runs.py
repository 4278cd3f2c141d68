"""A trained run on the command line: the argument that names it, its folder, and opening it."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeut_compose.cli.devices import named_device
from moeut_compose.cli.failures import complain
from moeut_compose.spec.find import NotFound, did_you_mean, nearest

if TYPE_CHECKING:
    from moeut_compose.train.run import Run

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")]


def find_run(name: str) -> Path:
    """The folder that RUN names, also by its last part below the folder of runs. Raises `NotFound`."""
    from moeut_compose.train.folder import runs_root

    for path in (Path(name).expanduser(), runs_root() / name):
        if path.exists():
            return path
    known = [path.name for path in sorted(runs_root().glob("*"), reverse=True) if path.is_dir()]
    raise NotFound(f"{name}: no such run{did_you_mean(nearest(Path(name).name, known))}")


def open_run(path: Path, device: str) -> "Run":
    """Load it on a device; warnings become lines on stderr."""
    from moeut_compose.train.device import choose_device
    from moeut_compose.train.run import load_run

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
        return load_run(path, device=choose_device(named_device(device)))
