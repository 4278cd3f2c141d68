"""`params` and `macs`: what a model holds and what a token costs."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

from moeut_compose.cli.arguments import JsonOption, SpecsArgument, architecture_overrides, specs_and_overrides
from moeut_compose.cli.failures import failed, wrong_usage
from moeut_compose.cli.output import print_csv, print_json, print_table
from moeut_compose.measure.macs import MacCount, count_macs
from moeut_compose.measure.params import count_params
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec


class Convention(StrEnum):
    """What counts as a multiply-accumulate."""

    exact = "exact"
    paper = "paper"


def params(specs: SpecsArgument, as_json: JsonOption = False) -> None:
    """Count parameters: all of them, those that one token uses, and these as often as they run.

    **Examples**

    - `moeut-compose params dense_244m moeut_244m`
    - `moeut-compose params moeut_tiny d_model=256 --json`
    """
    names, overrides = specs_and_overrides(specs)
    changes = architecture_overrides(overrides)
    counts = [count_params(load_spec(name, changes)).to_dict() for name in names]
    if as_json:
        print_json(counts)
        return
    header = list(counts[0])
    rows = [
        [f"{value:,}" if isinstance(value, int) else value for value in count.values()] for count in counts
    ]
    print_table(header, rows)


def macs(
    specs: SpecsArgument,
    seq_len: Annotated[
        int | None, typer.Option(metavar="T", min=1, help="Default: the context length.")
    ] = None,
    per_module: Annotated[bool, typer.Option("--per-module", help="Traced, module by module.")] = False,
    convention: Annotated[
        Convention, typer.Option(help="Matrix products, or the published formula.")
    ] = Convention.exact,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line for each spec.")] = False,
) -> None:
    """Count multiply-accumulates per token by component; several specs side by side, with ratios to the first.

    `exact` counts matrix products, the head included, attention over all T positions without halving for the causal
    mask. `paper` is the formula published with arXiv:2405.16039, which leaves the head out.

    **Examples**

    - `moeut-compose macs dense_244m moeut_244m`
    - `moeut-compose macs moeut_244m --seq-len 4096 --json`
    """
    if as_json and as_csv:
        raise wrong_usage("--json and --csv exclude each other")
    if per_module and (as_csv or convention is Convention.paper):
        raise wrong_usage(
            "--per-module counts matrix products and goes with neither --csv nor --convention paper"
        )
    names, overrides = specs_and_overrides(specs)
    changes = architecture_overrides(overrides)
    models = [load_spec(name, changes) for name in names]
    counts = [_count(model, seq_len, convention) for model in models]
    modules = [_trace(model, seq_len) for model in models] if per_module else []
    if as_json:
        documents = [count.to_dict() for count in counts]
        print_json(
            [d | {"by_module": m} for d, m in zip(documents, modules, strict=True)] if modules else documents
        )
    elif as_csv:
        _print_macs_csv(counts)
    else:
        _print_macs_table(counts)
        for count, traced in zip(counts, modules, strict=False):
            rows = [[name or count.name, f"{n_macs:,}"] for name, n_macs in traced.items()]
            print()
            print_table([f"{count.name}, module", "MACs per token"], rows)


def _count(model: ModelSpec, seq_len: int | None, convention: Convention) -> MacCount:
    try:
        return count_macs(model, seq_len, convention.value)
    except ValueError as error:
        raise failed(f"{model.name}: {error}") from None


def _trace(model: ModelSpec, seq_len: int | None) -> dict[str, int]:
    from moeut_compose.measure.trace import UncountedOperator, trace_macs

    try:
        return trace_macs(model, seq_len).by_module
    except UncountedOperator as error:
        raise failed(f"{model.name}: {error}") from None


def _components(counts: Sequence[MacCount]) -> list[str]:
    """All components, in the order of the model that has most of them."""
    by_length = sorted(counts, key=lambda count: -len(count.by_component))
    return list(dict.fromkeys(component for count in by_length for component in count.by_component))


def _print_macs_csv(counts: Sequence[MacCount]) -> None:
    totals = ["name", "seq_len", "convention", "total_per_token", "layers_per_token", "head_per_token"]
    components = _components(counts)
    rows = [
        [*(getattr(count, key) for key in totals), *(count.by_component.get(part, 0) for part in components)]
        for count in counts
    ]
    print_csv([*totals, *components], rows)


def _print_macs_table(counts: Sequence[MacCount]) -> None:
    first = counts[0]
    header = [
        f"MACs per token ({first.convention})",
        *(f"{count.name}, T={count.seq_len}" for count in counts),
    ]
    rows = [
        [part, *(f"{count.by_component.get(part, 0):,}" for count in counts)] for part in _components(counts)
    ]
    rows.append(["layers", *(f"{count.layers_per_token:,}" for count in counts)])
    rows.append(["total", *(f"{count.total_per_token:,}" for count in counts)])
    if len(counts) > 1:
        rows.append(
            ["layers, to the first", *(_ratio(c.layers_per_token, first.layers_per_token) for c in counts)]
        )
        rows.append(
            ["total, to the first", *(_ratio(c.total_per_token, first.total_per_token) for c in counts)]
        )
    print_table(header, rows)


def _ratio(value: int, to: int) -> str:
    return f"{value / to:.4f}"
