"""`params` and `macs`: what a model holds and what a token costs."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from moeut_compose.cli.arguments import JsonOption, SpecsArgument, architecture_overrides, specs_and_overrides
from moeut_compose.cli.failures import failed, wrong_usage
from moeut_compose.cli.output import print_csv, print_json, print_markdown, print_table
from moeut_compose.measure.macs import MacCount, count_macs
from moeut_compose.measure.params import count_params, params_by_member
from moeut_compose.measure.phases import count_cache, count_phases
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec


class Convention(StrEnum):
    """What counts as a multiply-accumulate."""

    exact = "exact"
    paper = "paper"


def params(
    specs: SpecsArgument,
    per_member: Annotated[
        bool, typer.Option("--per-member", help="Also each layer with weights of its own.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Count parameters: all of them, those that one token uses, and these as often as they run.

    **Examples**

    - `moeut-compose params dense_244m moeut_244m`
    - `moeut-compose params moeut_tiny d_model=256 --json`
    """
    names, overrides = specs_and_overrides(specs)
    changes = architecture_overrides(overrides)
    models = [load_spec(name, changes) for name in names]
    counts: list[dict[str, Any]] = [count_params(model).to_dict() for model in models]
    members = [[member.to_dict() for member in params_by_member(model)] for model in models]
    if as_json:
        if per_member:
            counts = [count | {"members": parts} for count, parts in zip(counts, members, strict=True)]
        print_json(counts)
        return
    print_table(list(counts[0]), [_cells(count) for count in counts])
    for count, parts in zip(counts, members, strict=True) if per_member else ():
        print()
        print_table([str(count["name"]), *list(parts[0])[1:]], [_cells(part) for part in parts])


def _cells(row: dict[str, Any]) -> list[str]:
    return [f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()]


def macs(
    specs: SpecsArgument,
    seq_len: Annotated[
        int | None, typer.Option(metavar="T", min=1, help="Default: the context length.")
    ] = None,
    per_module: Annotated[bool, typer.Option("--per-module", help="Traced, module by module.")] = False,
    convention: Annotated[
        Convention, typer.Option(help="Matrix products, or the published formula.")
    ] = Convention.exact,
    causal: Annotated[
        bool, typer.Option("--causal", help="Leave out the scores that the causal mask hides.")
    ] = False,
    phases: Annotated[
        bool, typer.Option("--phases", help="Also prefill, decoding with its cache, and training.")
    ] = False,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line for each spec.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table.")] = False,
) -> None:
    """Count multiply-accumulates per token by component; several specs side by side, with ratios to the first.

    `exact` counts matrix products, the head included, attention over all T positions; `--causal` counts the (T + 1) / 2
    that a token sees on average. `paper` is the formula published with arXiv:2405.16039, which leaves the head out.

    `--phases` adds the prefill of T tokens, one decoded token behind T tokens in the cache, a token in training (three
    forward passes; with activation checkpointing the layers run a fourth time), and the bytes of the cache per token.

    **Examples**

    - `moeut-compose macs dense_244m moeut_244m`
    - `moeut-compose macs moeut_244m --seq-len 4096 --phases --json`
    """
    _check_macs_options(
        as_json + as_csv + as_markdown, per_module, as_csv, convention, others=causal or phases
    )
    names, overrides = specs_and_overrides(specs)
    changes = architecture_overrides(overrides)
    models = [load_spec(name, changes) for name in names]
    counts = [_count(model, seq_len, convention, causal=causal) for model in models]
    extras = [_phases(model, seq_len, causal=causal) if phases else {} for model in models]
    modules = [_trace(model, seq_len) for model in models] if per_module else []
    if as_json:
        documents = [
            count.to_dict() | ({"causal": True} if causal else {}) | extra
            for count, extra in zip(counts, extras, strict=True)
        ]
        print_json(
            [d | {"by_module": m} for d, m in zip(documents, modules, strict=True)] if modules else documents
        )
        return
    if as_csv:
        _print_macs_csv(counts, [_flat(extra) for extra in extras])
        return
    show = print_markdown if as_markdown else print_table
    show(*_macs_table(counts, [_flat(extra) for extra in extras], causal=causal))
    for count, traced in zip(counts, modules, strict=False):
        rows = [[name or count.name, f"{n_macs:,}"] for name, n_macs in traced.items()]
        print()
        show([f"{count.name}, module", "MACs per token"], rows)


def _check_macs_options(
    n_forms: int, per_module: bool, as_csv: bool, convention: Convention, *, others: bool
) -> None:
    if n_forms > 1:
        raise wrong_usage("--json, --csv and --markdown exclude each other")
    if per_module and (as_csv or convention is Convention.paper):
        raise wrong_usage(
            "--per-module counts matrix products and goes with neither --csv nor --convention paper"
        )
    if others and (per_module or convention is Convention.paper):
        raise wrong_usage("--causal and --phases go with neither --per-module nor --convention paper")


def _count(model: ModelSpec, seq_len: int | None, convention: Convention, *, causal: bool) -> MacCount:
    try:
        return count_macs(model, seq_len, convention.value, causal=causal)
    except ValueError as error:
        raise failed(f"{model.name}: {error}") from None


def _phases(model: ModelSpec, seq_len: int | None, *, causal: bool) -> dict[str, Any]:
    return {
        "phases": count_phases(model, seq_len, causal=causal).to_dict(),
        "kv_cache": count_cache(model).to_dict(),
    }


def _flat(extra: dict[str, Any]) -> dict[str, int]:
    """What `--phases` adds, as columns."""
    if not extra:
        return {}
    by_dtype = extra["kv_cache"]["bytes_per_token"]
    cache = {f"kv_cache_bytes_{dtype}": n_bytes for dtype, n_bytes in by_dtype.items()}
    return {**extra["phases"], **cache}


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


def _print_macs_csv(counts: Sequence[MacCount], extras: Sequence[dict[str, int]]) -> None:
    totals = ["name", "seq_len", "convention", "total_per_token", "layers_per_token", "head_per_token"]
    components = _components(counts)
    rows = [
        [
            *(getattr(count, key) for key in totals),
            *(count.by_component.get(part, 0) for part in components),
            *extra.values(),
        ]
        for count, extra in zip(counts, extras, strict=True)
    ]
    print_csv([*totals, *components, *extras[0]], rows)


_PHASE_TITLES = {
    "prefill": "prefill of T tokens",
    "decode": "decode, T tokens in the cache",
    "training_per_token": "training, per token",
    "training_checkpointed_per_token": "training with checkpointing",
}


def _macs_table(
    counts: Sequence[MacCount], extras: Sequence[dict[str, int]], *, causal: bool
) -> tuple[list[str], list[list[str]]]:
    first = counts[0]
    title = f"MACs per token ({first.convention}{', causal' if causal else ''})"
    header = [title, *(f"{count.name}, T={count.seq_len}" for count in counts)]
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
    for key in extras[0]:
        name = _PHASE_TITLES.get(key) or f"cache per token, bytes in {key.rpartition('_')[2]}"
        rows.append([name, *(f"{extra[key]:,}" for extra in extras)])
    return header, rows


def _ratio(value: int, to: int) -> str:
    return f"{value / to:.4f}"
