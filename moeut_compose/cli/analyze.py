"""`analyze`: what a trained run does inside."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeut_compose.cli.arguments import JsonOption
from moeut_compose.cli.devices import DeviceOption, import_torch
from moeut_compose.cli.output import print_json
from moeut_compose.cli.runs import RunArgument, find_run, open_run

if TYPE_CHECKING:
    from moeut_compose.analyze.run import Analysis


def analyze(
    run: RunArgument,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to write; default: `analysis` in the run folder."),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Windows of held-out text; default: those of the run, at most 32."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read this text file instead of the held-out text.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Windows at once; changes memory and no result.")
    ] = 4,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Look inside a trained run: experts, routers, the residual stream, halting, and passes at test time.

    Writes `analysis.json`, `report.html` (one page that needs nothing else) and `plots/*.png` and `*.svg`.

    **Examples**

    - `moeut-compose analyze runs/20260101-120000-moeut_tiny`
    - `moeut-compose analyze runs/20260101-120000-moeut_tiny --windows 100 --out analysis --json`
    """
    import_torch()
    path = find_run(run)
    from moeut_compose.analyze.run import DOCUMENT, FOLDER, REPORT, analyze_run, write_analysis
    from moeut_compose.progress import make_reporter

    loaded, reporter = open_run(path, device), make_reporter()
    folder = out or loaded.path / FOLDER
    folder.mkdir(parents=True, exist_ok=True)  # if nothing can be written, say so before the work
    analysis = analyze_run(loaded, windows=windows, text_file=text, batch_size=batch_size, reporter=reporter)
    reporter.note("drawing")
    document = write_analysis(analysis, folder)
    if as_json:
        print_json(document)
        return
    _print_findings(analysis)
    print(f"report   {folder / REPORT}")
    print(f"numbers  {folder / DOCUMENT}")


def _print_findings(analysis: "Analysis") -> None:
    from moeut_compose.analyze.findings import FINDINGS
    from moeut_compose.analyze.left_out import left_out
    from moeut_compose.analyze.words import WORDS

    seen = analysis.figures
    missing = left_out(seen)
    loss = f"{seen.cross_entropy:.4f} nats per token"
    print(f"{analysis.spec.name} at step {analysis.step:,}, {seen.tokens:,} tokens: {loss}")
    for name, found in FINDINGS.items():
        if name not in missing:
            print(f"\n{WORDS[name].title}")
            print("\n".join(f"  {sentence}" for sentence in found(seen, analysis.names)))
    print()
    for reason in dict.fromkeys(missing.values()):
        print(
            f"left out, because {reason}: {', '.join(WORDS[name].title for name in missing if missing[name] == reason)}"
        )
