"""`bench kernels --tune`: tiles that are faster on this GPU than the static ones, kept for later processes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from moeut_compose.cli.failures import failed, wrong_usage
from moeut_compose.cli.output import print_json, print_table

if TYPE_CHECKING:
    import torch
    from moeut_kernels.bench.tune import Trial

DEFAULT_TOKENS = 32768


def tune_kernels(
    place: torch.device, *, products: str, tokens: int | None, repeats: int, as_json: bool
) -> None:
    """Try other tiles, write the winners down, and show every trial."""
    from moeut_kernels.backend import TRITON_IS_INSTALLED
    from moeut_kernels.bench.parts import CANDIDATES

    chosen = list(dict.fromkeys(products.split(","))) if products else list(CANDIDATES)
    if unknown := [name for name in chosen if name not in CANDIDATES]:
        raise wrong_usage(f"--products {unknown[0]}: choose among {', '.join(CANDIDATES)}")
    if place.type != "cuda":
        raise wrong_usage("--tune needs a CUDA device: elsewhere no product has tiles")
    if not TRITON_IS_INSTALLED:
        raise wrong_usage("--tune needs Triton, which is not installed")
    import torch
    from moeut_kernels.bench.tune import count, tune_device
    from moeut_kernels.tuned_tiles import SWITCH, is_enabled, setting_of

    from moeut_compose.progress import make_reporter

    reporter = make_reporter()
    n_tokens = tokens or DEFAULT_TOKENS
    try:
        with torch.cuda.device(place), reporter.task("tuning", total=count(chosen, CANDIDATES)) as task:
            path, trials = tune_device(
                chosen, n_tokens=n_tokens, repeats=repeats, tell=lambda text: task.advance(detail=text)
            )
    except torch.OutOfMemoryError:
        raise failed(
            f"the layers do not fit the memory of this GPU at {n_tokens} tokens; try --tokens"
        ) from None
    if not is_enabled():
        reporter.warn(f"{SWITCH} is off: the file is written, and will not be read")
    setting = setting_of(place)
    if as_json:
        document = {"file": str(path), **asdict(setting), "tokens": n_tokens}
        print_json(document | {"trials": [trial.to_dict() for trial in trials]})
        return
    print(f"{setting.device}; {n_tokens} tokens")
    static = {trial.product: trial.ms for trial in trials if trial.status == "static"}
    header = ["product", "tile", "status", "ms", "spread", "to the static", "error"]
    print_table(header, [_row(trial, static[trial.product]) for trial in trials], n_text_columns=3)
    n_winners = sum(trial.status == "wins" for trial in trials)
    reporter.note(f"{n_winners} of {len(chosen)} products have a faster tile; written to {path}")


def _row(trial: Trial, static: float | None) -> list[str]:
    rows, columns, depth, warps, stages = trial.tile
    row = [trial.product, f"{rows}x{columns}x{depth}, {warps} warps, {stages} stages", trial.status]
    if trial.ms is None or trial.spread_ms is None or not static:
        row += "–––"
    else:
        low, high = trial.spread_ms
        row += [f"{trial.ms:.4g}", f"{low:.4g}-{high:.4g}", f"{trial.ms / static:.3f}"]
    return [*row, "–" if trial.error is None else f"{trial.error:.1e}"]
