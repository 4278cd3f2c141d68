"""`evaluate`: how good a trained run is."""

from typing import Annotated

import typer

from moeut_compose.cli.arguments import JsonOption
from moeut_compose.cli.devices import DeviceOption, import_torch
from moeut_compose.cli.failures import wrong_usage
from moeut_compose.cli.harness import HarnessOption, IncludeOption, print_harness, run_harness
from moeut_compose.cli.output import print_json
from moeut_compose.cli.runs import RunArgument, find_run, open_run
from moeut_compose.cli.synthetic import (
    SYNTHETIC,
    RepeatsOption,
    checked_repeats,
    print_synthetic,
    run_synthetic,
)
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
TASK_NAMES = (PERPLEXITY, *TASKS, SYNTHETIC)


def evaluate(
    run: RunArgument,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...", help=f"Of: {', '.join(TASK_NAMES)}. Default: {PERPLEXITY}, unless --harness."
        ),
    ] = None,
    task_data: TaskDataOption = None,
    protocol: ProtocolOption = "published",
    harness: HarnessOption = None,
    harness_include: IncludeOption = None,
    repeats: RepeatsOption = None,
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
    - `moeut-compose evaluate runs/20260101-120000-moeut_tiny --harness lambada_openai --limit 100`
    """
    if tasks is None:
        tasks = PERPLEXITY if harness is None else ""
    if harness_include is not None and harness is None:
        raise wrong_usage("--harness-include: name the tasks in --harness TASK,...")
    if harness_include is not None and not harness_include.is_dir():
        raise wrong_usage(f"--harness-include: there is no folder {harness_include}")
    names = list(dict.fromkeys(tasks.split(","))) if tasks or harness is None else []
    unknown = [name for name in names if name not in TASK_NAMES]
    if unknown:
        raise wrong_usage(f"--tasks: {unknown[0]!r} is not one of {', '.join(TASK_NAMES)}")
    benchmarks = [name for name in names if name in TASKS]
    passes = checked_repeats(repeats, names)
    rules = checked_protocol(protocol)
    folder = checked_folder(task_data, benchmarks) if benchmarks else None
    import_torch()
    path = find_run(run)
    from moeut_compose.progress import make_reporter

    loaded, reporter = open_run(path, device), make_reporter()
    results = perplexity = by_harness = by_difficulty = None
    if benchmarks:
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
    if SYNTHETIC in names:
        by_difficulty = run_synthetic(loaded, passes, limit=limit, reporter=reporter)
    if harness is not None:
        by_harness = run_harness(
            loaded, harness, harness_include, limit=limit, batch_size=batch_size, reporter=reporter
        )
    if as_json:
        identity = {"name": loaded.spec.name, "run": str(loaded.path), "step": loaded.step}
        document = {} if results is None else results_document(loaded, rules, results)
        document |= {} if by_difficulty is None else {SYNTHETIC: by_difficulty}
        document |= {} if by_harness is None else {"harness": by_harness}
        print_json({**identity, **(perplexity or {}), **document})
        return
    if perplexity is not None:
        _print_perplexity(loaded.spec.name, perplexity)
    if results is not None:
        print(f"{loaded.spec.name} at step {loaded.step:,}, {protocol} protocol")
        print_results(results)
    if by_difficulty is not None:
        print(f"{loaded.spec.name} at step {loaded.step:,}, {loaded.recipe.name}")
        print_synthetic(by_difficulty)
    if by_harness is not None:
        print(f"{loaded.spec.name} at step {loaded.step:,}, lm-evaluation-harness {by_harness['version']}")
        print_harness(by_harness)


def _print_perplexity(name: str, result: "dict[str, float | int]") -> None:
    print(f"{name} at step {result['step']:,}, {result['tokens']:,} tokens of held-out text")
    print(f"perplexity     {result['perplexity']:.3f}")
    print(f"cross entropy  {result['cross_entropy']:.4f} nats per token")
    print(f"bits per byte  {result['bits_per_byte']:.4f}")
