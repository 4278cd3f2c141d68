"""The command line: each command parses, calls one function and prints.

Results go to stdout, everything else to stderr. Nothing here imports torch at module level: `ls`, `show`, `validate`
and `params` answer before torch could have been loaded.
"""

import typer

from moeut_compose.cli.analyze import analyze
from moeut_compose.cli.author import new, schema, validate
from moeut_compose.cli.bench import bench
from moeut_compose.cli.browse import ls, show
from moeut_compose.cli.count import macs, params
from moeut_compose.cli.doctor import doctor
from moeut_compose.cli.failures import Commands
from moeut_compose.cli.generate import generate
from moeut_compose.cli.interchange import export, import_
from moeut_compose.cli.memory import memory
from moeut_compose.cli.prepare import data, tokenizer
from moeut_compose.cli.run import train
from moeut_compose.cli.sweep import sweep
from moeut_compose.cli.use import evaluate
from moeut_compose.cli.versus import compare, match

app = typer.Typer(
    name="moeut-compose",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from moeut_compose import __version__

        print(f"moeut-compose {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", help="Show the version.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Compose, train and compare Transformer variants from YAML specs.

    A SPEC is a name that `ls` shows, a YAML file, or a folder that holds one. `key=value` changes one setting of it.

    **Examples**

    - `moeut-compose ls`
    - `moeut-compose show moeut_tiny --tree`
    - `moeut-compose params dense_244m moeut_244m`
    - `moeut-compose match moeut_244m --to dense_244m --by params`
    - `moeut-compose train moeut_tiny --recipe quickstart`
    - `moeut-compose generate runs/... --prompt "The sea"`
    """


COMMANDS = (
    (ls, show, new, validate, schema),
    (params, macs, memory, match),
    (train, evaluate, generate, compare, analyze, sweep),
    (export,),
)
for family in COMMANDS:
    for command in family:
        app.command()(command)
app.command("import")(import_)
app.command()(doctor)
app.add_typer(data, name="data")
app.add_typer(tokenizer, name="tokenizer")
app.add_typer(bench, name="bench")
