"""Time the expert layers on one GPU: correctness against float64 first, then medians of CUDA graph replays.

    python -m moeut_kernels.bench                     # layers: table, and JSON with --json FILE
    python -m moeut_kernels.bench --parts             # every kernel of the layers by itself
    python -m moeut_kernels.bench --tune              # other tiles for every product; later processes take the winners
    python -m moeut_kernels.bench --tune gather walk  # for the named products

A layer's time has routing preparation (sort, tile tables) in it and float32 weight gradients, from bfloat16 rows and
weights. Data is random and new every run. The spread is the 10th to the 90th percentile.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from moeut_kernels.bench.layers import (
    ATTENTIONS,
    FEEDFORWARDS,
    Attention,
    AttentionShape,
    Feedforward,
    FeedforwardShape,
    relative_error,
)
from moeut_kernels.bench.parts import CANDIDATES, parts
from moeut_kernels.bench.timing import time_graph
from moeut_kernels.bench.tune import count, tune_device


def check(layer: Feedforward | Attention, bound: float = 4e-3) -> float:
    """Largest relative error of outputs and gradients against float64; exits where it is above the bound."""
    errors = [relative_error(a, b) for a, b in zip(layer.both(), layer.exact(), strict=True)]
    if not max(errors) <= bound:
        sys.exit(f"{type(layer).__name__} {layer.shape.name}: errors {errors} above {bound}: not timed")
    return max(errors)


def layers() -> Iterable[dict[str, Any]]:
    """Forward, and forward + backward of each layer with its routing preparation."""
    small = [
        FeedforwardShape("244m", 2048, 1024, 387, 128, 16),
        FeedforwardShape("1b", 1024, 1536, 565, 128, 24),
    ]
    errors: dict[type, float] = {Feedforward: max(check(Feedforward(shape)) for shape in small)}
    errors[Attention] = check(Attention(AttentionShape("244m", 4096, 1024, 4, 128, 10)))
    shapes = (*FEEDFORWARDS, *ATTENTIONS)
    for shape in shapes:
        layer = Feedforward(shape) if isinstance(shape, FeedforwardShape) else Attention(shape)
        with torch.no_grad():
            forward = time_graph(layer.forward)
        both = time_graph(layer.both)
        yield {
            "layer": type(layer).__name__.lower(),
            **asdict(shape),
            "forward_ms": forward.median,
            "forward_backward_ms": both.median,
            "spread_ms": [both.low, both.high],
            "tflops": 6 * shape.flops / both.median / 1e9,
            "largest_error": errors[type(layer)],
        }
        del layer
        torch.cuda.empty_cache()


def table(records: list[dict[str, Any]]) -> str:
    """Records as aligned columns."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    cells = [columns] + [[_cell(record.get(c)) for c in columns] for record in records]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "-".join(_cell(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def tuned(products: list[str]) -> list[dict[str, Any]]:
    """Tune the products, and say on stderr how far it is and where the winners lie."""
    total, done = count(products, CANDIDATES), 0

    def tell(text: str) -> None:
        nonlocal done
        done += 1
        line = f"{done}/{total}  {text}"
        sys.stderr.write(f"\r{line:<78}" if sys.stderr.isatty() else f"{line}\n")
        sys.stderr.flush()

    try:
        path, trials = tune_device(products, n_tokens=32768, repeats=20, tell=tell)
    except OSError as error:
        sys.exit(f"the winners cannot be kept: {error}")
    sys.stderr.write(f"\nwritten to {path}\n")
    return [trial.to_dict() for trial in trials]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", action="store_true", help="time every kernel by itself")
    parser.add_argument(
        "--tune",
        nargs="*",
        metavar="PRODUCT",
        help="time other tiles for these products, or all; keep the winners",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the records and the device to FILE")
    arguments = parser.parse_args()
    if unknown := [product for product in arguments.tune or () if product not in CANDIDATES]:
        parser.error(f"--tune {unknown[0]}: choose among {', '.join(CANDIDATES)}")
    if not torch.cuda.is_available():
        sys.exit("moeut_kernels.bench needs a CUDA device")
    if arguments.tune is not None:
        records = tuned(arguments.tune or list(CANDIDATES))
    elif arguments.parts:
        records = []
        for name, run in parts().items():
            timing = time_graph(run)
            records.append({"part": name, "ms": timing.median, "spread_ms": [timing.low, timing.high]})
    else:
        records = list(layers())
    print(table(records))  # noqa: T201
    if arguments.json:
        device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        with open(arguments.json, "w") as file:
            json.dump({**device, "records": records}, file, indent=1)


if __name__ == "__main__":
    main()
