"""`evaluate`: how good a trained run is."""

from typing import Annotated

import typer

from moeut_compose.cli.arguments import JsonOption
from moeut_compose.cli.devices import DeviceOption, import_torch
from moeut_compose.cli.failures import wrong_usage
from moeut_compose.cli.output import print_json
from moeut_compose.cli.runs import RunArgument, find_run, open_run
from moeut_compose.cli.zero_shot import (
    AnewOption,
    LimitOption,
    ProtocolOption,
    TaskDataOption,
    checked_folder,
    checked_protocol,
    print_results,
    results_document,
)
from moeut_compose.evaluate.tasks import TASKS

PERPLEXITY = "perplexity"
TASK_NAMES = (PERPLEXITY, *TASKS)


def evaluate(
    run: RunArgument,
    tasks: Annotated[
        str, typer.Option(metavar="TASK,...", help=f"Of: {', '.join(TASK_NAMES)}.")
    ] = PERPLEXITY,
    task_data: TaskDataOption = None,
    protocol: ProtocolOption = "published",
    limit: LimitOption = None,
    anew: AnewOption = False,
    windows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Windows of held-out text; default: the recipe's.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Windows at once, or as many tokens; changes no result.")
    ] = 8,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure a trained run: its perplexity on held-out text, or its accuracy on zero-shot benchmarks.

    Finished benchmarks are kept in the run folder, and not run again unless `--anew`.

    **Examples**

    - `moeut-compose evaluate runs/20260101-120000-moeut_tiny --json`
    - `moeut-compose evaluate runs/20260101-120000-moeut_tiny --tasks blimp,piqa --task-data benchmarks`
    """
    names = list(dict.fromkeys(tasks.split(",")))
    unknown = [name for name in names if name not in TASK_NAMES]
    if unknown:
        raise wrong_usage(f"--tasks: {unknown[0]!r} is not one of {', '.join(TASK_NAMES)}")
    benchmarks = [name for name in names if name != PERPLEXITY]
    rules = checked_protocol(protocol)
    folder = checked_folder(task_data, benchmarks) if benchmarks else None
    import_torch()
    path = find_run(run)
    from moeut_compose.progress import make_reporter

    loaded, reporter = open_run(path, device), make_reporter()
    results = perplexity = None
    if folder is not None:
        from moeut_compose.evaluate.zero_shot import evaluate_tasks

        results = evaluate_tasks(
            loaded,
            benchmarks,
            folder,
            protocol=rules,
            limit=limit,
            max_tokens=batch_size * loaded.context,
            anew=anew,
            reporter=reporter,
        )
    if PERPLEXITY in names:
        from moeut_compose.evaluate.perplexity import evaluate_run

        perplexity = evaluate_run(loaded, windows=windows, batch_size=batch_size, reporter=reporter)
    if as_json:
        identity = {"name": loaded.spec.name, "run": str(loaded.path)}
        document = {} if results is None else results_document(loaded, rules, results)
        print_json({**identity, **(perplexity or {}), **document})
        return
    if perplexity is not None:
        _print_perplexity(loaded.spec.name, perplexity)
    if results is not None:
        print(f"{loaded.spec.name} at step {loaded.step:,}, {protocol} protocol")
        print_results(results)


def _print_perplexity(name: str, result: "dict[str, float | int]") -> None:
    print(f"{name} at step {result['step']:,}, {result['tokens']:,} tokens of held-out text")
    print(f"perplexity     {result['perplexity']:.3f}")
    print(f"cross entropy  {result['cross_entropy']:.4f} nats per token")
    print(f"bits per byte  {result['bits_per_byte']:.4f}")
