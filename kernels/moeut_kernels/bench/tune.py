"""Other tiles for the products of the layers: who computes the same, repeats, and is faster beyond the spread, wins.

A candidate is first run with the tile that would be taken without tuning beside it: its results may differ by rounding
only, and a second run must give the same bits. Only then it is timed. The fastest is timed once more after the others,
in turn with the static tile, because a device that slows down while it warms up favours whoever came first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeut_kernels import tuned_tiles
from moeut_kernels.backend import use_backend
from moeut_kernels.bench.timing import Timing
from moeut_kernels.tuned_tiles import Sizes

Part = Callable[[], object]
Time = Callable[[Part], Timing]
Tell = Callable[[str], None]

BOUND = 4e-3
"""Relative Frobenius error allowed between results of two tiles, in bfloat16."""
CHUNK = 1 << 24


@dataclass(frozen=True)
class Trial:
    """What became of one tile of one product; times add up those of the product's parts."""

    product: str
    tile: Sizes
    status: str
    """static, wins, "not the fastest", "within the spread", slower, "did not fit", "does not compile", wrong or
    "does not repeat"."""
    ms: float | None = None
    spread_ms: tuple[float, float] | None = None
    """10th and 90th percentile."""
    error: float | None = None
    """Relative Frobenius error against the results with the static tile, the largest of all results."""
    why: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def products_of(parts: Mapping[str, Part]) -> dict[str, list[Part]]:
    """The parts of every product: the first word of a part's name is its product."""
    grouped: dict[str, list[Part]] = {}
    for name, run in parts.items():
        grouped.setdefault(name.split()[0], []).append(run)
    return grouped


def count(products: Sequence[str], candidates: Mapping[str, Sequence[Sizes]]) -> int:
    """How often `tune` speaks: for every tile, and for the last comparison of each product."""
    return sum(len(candidates[product]) + 2 for product in products)


def tune(
    products: Mapping[str, Sequence[Part]],
    candidates: Mapping[str, Sequence[Sizes]],
    static: Mapping[str, Sizes],
    *,
    time: Time,
    tell: Tell = lambda text: None,
) -> Iterator[Trial]:
    """Try the candidates of each product against its static tile. `tell` hears of every step."""
    for product, parts in products.items():
        yield from _tune(product, parts, candidates[product], static[product], time, tell)


def _tune(
    product: str, parts: Sequence[Part], candidates: Sequence[Sizes], static: Sizes, time: Time, tell: Tell
) -> Iterator[Trial]:
    expected = _results(product, static, parts)
    first = _time(product, static, parts, time)
    tell(f"{product} {_described(static)}: {first.median:.4g} ms")
    trials = []
    for sizes in candidates:
        if sizes == static:
            tell(f"{product} {_described(sizes)}: static")
            continue
        trial = _try(product, sizes, parts, expected, time)
        trials.append(trial)
        tell(f"{product} {_described(sizes)}: {trial.status if trial.ms is None else f'{trial.ms:.4g} ms'}")
    del expected
    timed = [trial for trial in trials if trial.ms is not None]
    fastest = min(timed, key=lambda trial: trial.ms, default=None)
    second, again = first, None
    if fastest is not None and beats(_timing(fastest), first):
        second = _time(product, static, parts, time)
        again = _time(product, fastest.tile, parts, time)
    wins = again is not None and beats(again, first) and beats(again, second)
    tell(f"{product}: {_described(fastest.tile) if wins else 'the static tile'} it is")
    yield _timed(Trial(product, static, "static", error=0.0), second)
    for trial in trials:
        if trial.ms is None:
            yield trial
        elif trial is fastest and wins:
            yield _timed(replace(trial, status="wins"), again)
        else:
            yield replace(trial, status=_verdict(_timing(trial), first, wins))


def beats(one: Timing, other: Timing) -> bool:
    """Whether one median lies below another by more than either spread."""
    return other.median - one.median > max(one.high - one.low, other.high - other.low)


def _verdict(timing: Timing, static: Timing, someone_wins: bool) -> str:
    if beats(timing, static):
        return "not the fastest" if someone_wins else "within the spread"
    return "slower" if beats(static, timing) else "within the spread"


def _try(
    product: str, sizes: Sizes, parts: Sequence[Part], expected: list[list[Tensor]], time: Time
) -> Trial:
    """Run, compare, repeat, time."""
    from triton import OutOfResources
    from triton.errors import TritonError

    trial = Trial(product, sizes, "timed")
    largest = 0.0
    try:
        for part, wanted in zip(parts, expected, strict=True):
            got = _results(product, sizes, [part])[0]
            largest = max(largest, *(relative_error(a, b) for a, b in zip(got, wanted, strict=True)))
            if not largest <= BOUND:
                return replace(trial, status="wrong", error=largest if isfinite(largest) else None)
            again = _results(product, sizes, [part])[0]
            if not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
                return replace(trial, status="does not repeat", error=largest)
    except TritonError as error:
        status = "did not fit" if isinstance(error, OutOfResources) else "does not compile"
        return replace(trial, status=status, why=(str(error).splitlines() or [""])[0][:200])
    return _timed(replace(trial, error=largest), _time(product, sizes, parts, time))


def _results(product: str, sizes: Sizes, parts: Sequence[Part]) -> list[list[Tensor]]:
    """What each part computes with a tile, copied: parts may write to the same memory again."""
    from moeut_kernels.triton_tiles import Tile, override

    with override(product, Tile(*sizes)):
        return [[tensor.clone() for tensor in _tensors(part())] for part in parts]


def _tensors(result: object) -> list[Tensor]:
    found = result if isinstance(result, tuple | list) else [result]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expectation, in pieces: results have a gigabyte."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = scale = 0.0
    for a, b in zip(actual.flatten().split(CHUNK), expected.flatten().split(CHUNK), strict=True):
        difference += (a.double() - b.double()).square().sum().item()
        scale += b.double().square().sum().item()
    if difference == 0:
        return 0.0
    return (difference / scale) ** 0.5 if scale and difference == difference else float("inf")


def _time(product: str, sizes: Sizes, parts: Sequence[Part], time: Time) -> Timing:
    """The parts of a product one after the other, added up."""
    from moeut_kernels.triton_tiles import Tile, override

    with override(product, Tile(*sizes)):
        timings = [time(part) for part in parts]
    return Timing(sum(t.median for t in timings), sum(t.low for t in timings), sum(t.high for t in timings))


def _timed(trial: Trial, timing: Timing) -> Trial:
    return replace(trial, ms=timing.median, spread_ms=(timing.low, timing.high))


def _timing(trial: Trial) -> Timing:
    return Timing(trial.ms, *trial.spread_ms)


def _described(sizes: Sizes) -> str:
    return "x".join(map(str, sizes[:3])) + f", {sizes[3]} warps, {sizes[4]} stages"


def tune_device(
    products: Sequence[str], *, n_tokens: int, repeats: int, tell: Tell = lambda text: None
) -> tuple[Path, list[Trial]]:
    """Tune the current CUDA device and write the winners down: the file, and every trial.

    Raises `OSError` where the file cannot be written, and `torch.OutOfMemoryError` where the layers do not fit.
    """
    from moeut_kernels.bench.parts import CANDIDATES, parts
    from moeut_kernels.bench.timing import time_graph
    from moeut_kernels.triton_tiles import static_tiles

    device = torch.device("cuda", torch.cuda.current_device())
    tuned_tiles.folder().mkdir(parents=True, exist_ok=True)  # one that refuses is known before the work
    static = {name: astuple(tile) for name, tile in static_tiles(device).items()}
    with use_backend("triton"):  # whatever the environment says: nobody else has tiles
        grouped = products_of(parts(n_tokens))
        trials = list(
            tune(
                {name: grouped[name] for name in products},
                CANDIDATES,
                static,
                time=lambda part: time_graph(part, repeats=repeats),
                tell=tell,
            )
        )
    return save(tuned_tiles.setting_of(device), trials), trials


def save(setting: tuned_tiles.Setting, trials: Sequence[Trial]) -> Path:
    """Write what was tried, and the winners. Raises `OSError`."""
    winners = {trial.product: trial.tile for trial in trials if trial.status == "wins"}
    products = sorted({trial.product for trial in trials})
    return tuned_tiles.write(setting, winners, [trial.to_dict() for trial in trials], products)
