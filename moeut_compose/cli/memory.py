"""`memory`: what training and decoding need, before anything is allocated."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from moeut_compose.cli.arguments import JsonOption, SpecsArgument, architecture_overrides, specs_and_overrides
from moeut_compose.cli.devices import import_torch
from moeut_compose.cli.failures import wrong_usage
from moeut_compose.cli.output import print_csv, print_json, print_markdown, print_table
from moeut_compose.measure.phases import DTYPE_BYTES, count_cache
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec


class PrecisionName(StrEnum):
    """Arithmetic of a training step."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class DeviceType(StrEnum):
    """Whose implementations are meant; none has to be there."""

    cuda = "cuda"
    cpu = "cpu"


def memory(
    specs: SpecsArgument,
    batch: Annotated[int, typer.Option(min=1, help="Sequences held at once: the micro-batch.")] = 32,
    seq_len: Annotated[
        int | None, typer.Option(metavar="T", min=1, help="Default: the context length.")
    ] = None,
    precision: Annotated[PrecisionName, typer.Option(help="Weights stay float32.")] = PrecisionName.bf16,
    compiled: Annotated[bool, typer.Option("--compile", help="With compiled layers.")] = False,
    device: Annotated[DeviceType, typer.Option(help="A kind of device; none is needed.")] = DeviceType.cuda,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Bytes, one line for each spec.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table.")] = False,
) -> None:
    """Estimate the memory of a training step, with and without activation checkpointing, and of the cache in decoding.

    The peak is less than the sum: gradients come while activations go. Activations include 16-bit copies of weights and
    what one layer's backward needs for a moment.

    **Examples**

    - `moeut-compose memory dense_244m moeut_244m --compile`
    - `moeut-compose memory moeut_1b --batch 8 --json`
    """
    if as_json + as_csv + as_markdown > 1:
        raise wrong_usage("--json, --csv and --markdown exclude each other")
    names, overrides = specs_and_overrides(specs)
    changes = architecture_overrides(overrides)
    models = [load_spec(name, changes) for name in names]
    import_torch()
    rows = [
        _estimate(model, batch, seq_len or model.context_length, precision.value, device.value, compiled)
        for model in models
    ]
    if as_json:
        print_json(rows)
    elif as_csv:
        flat = [_flat(row) for row in rows]
        print_csv(list(flat[0]), [list(row.values()) for row in flat])
    else:
        (print_markdown if as_markdown else print_table)(*_table(rows))


def _estimate(
    spec: ModelSpec, batch: int, seq_len: int, precision: Any, device_type: str, compiled: bool
) -> dict[str, Any]:
    from moeut_compose.train.memory import estimate_memory, trace_activations

    activations = trace_activations(spec, seq_len, precision, device_type=device_type, compiled=compiled)
    n_params = spec.num_params()
    plain, selective, checkpointed = (
        estimate_memory(n_params, parts, batch)
        for parts in (activations, activations.checkpointed("selective"), activations.checkpointed("full"))
    )
    return {
        "name": spec.name,
        "seq_len": seq_len,
        "batch": batch,
        "precision": precision,
        "compiled": compiled,
        "weights": plain.weights,
        "gradients": plain.gradients,
        "optimizer": plain.optimizer,
        "activations": plain.activations,
        "peak": plain.peak,
        "activations_selective": selective.activations,
        "peak_selective": selective.peak,
        "activations_checkpointed": checkpointed.activations,
        "peak_checkpointed": checkpointed.peak,
        "kv_cache": count_cache(spec).to_dict(),
    }


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    by_dtype = row["kv_cache"]["bytes_per_token"]
    others = {key: value for key, value in row.items() if key != "kv_cache"}
    return others | {f"kv_cache_bytes_per_token_{dtype}": by_dtype[dtype] for dtype in DTYPE_BYTES}


_TITLES = {
    "weights": "weights, float32",
    "gradients": "gradients",
    "optimizer": "optimiser, two moments",
    "activations": "activations",
    "peak": "peak",
    "activations_selective": "activations, selective checkpointing",
    "peak_selective": "peak, selective checkpointing",
    "activations_checkpointed": "activations, full checkpointing",
    "peak_checkpointed": "peak, full checkpointing",
}


def _table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    first = rows[0]
    how = f"{first['precision']}{', compiled' if first['compiled'] else ''}, batch {first['batch']}"
    header = [f"GiB of a training step ({how})", *(f"{row['name']}, T={row['seq_len']}" for row in rows)]
    lines = [[title, *(f"{row[key] / 2**30:.2f}" for row in rows)] for key, title in _TITLES.items()]
    for dtype in ("fp32", "bf16"):
        cache = [f"{row['kv_cache']['bytes_per_token'][dtype]:,}" for row in rows]
        lines.append([f"cache in decoding, bytes per token, {dtype}", *cache])
    return header, lines
