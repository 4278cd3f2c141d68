"""The tuner: who computes the same, repeats and is faster beyond the spread wins. Times come from a table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import moeut_kernels as mk
import pytest
import torch
from moeut_kernels import tuned_tiles
from moeut_kernels.bench import parts, timing
from moeut_kernels.bench import tune as tuning
from moeut_kernels.bench.timing import Timing
from moeut_kernels.bench.tune import beats, count, products_of, relative_error, save, tune

triton_tiles = pytest.importorskip("moeut_kernels.triton_tiles")

ROOT = Path(__file__).resolve().parents[2]
LIKE = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cpu"))
STATIC = (64, 128, 0, 4, 4)
A, B, C = (128, 64, 0, 4, 3), (64, 64, 0, 4, 4), (64, 256, 0, 8, 3)
RIGHT = torch.arange(1.0, 9).bfloat16()


def sizes_now() -> tuple[int, ...]:
    t = triton_tiles.tile("walk", LIKE)  # set by `override`, as a kernel would see it
    return t.rows, t.columns, t.depth, t.warps, t.stages


def part(results: dict | None = None) -> Callable[[], object]:
    """Something that computes `RIGHT` with every tile but those named, whose result is made for each call."""

    def run() -> object:
        make = (results or {}).get(sizes_now())
        return RIGHT if make is None else make()

    return run


def clock(milliseconds: dict, spread: float = 0.01) -> Callable[[Callable], Timing]:
    """Times by tile; a list is used up call by call."""

    def time(run: Callable[[], object]) -> Timing:
        run()
        now = milliseconds[sizes_now()]
        ms = now.pop(0) if isinstance(now, list) else now
        return Timing(ms, ms - spread / 2, ms + spread / 2)

    return time


def statuses(parts: list, time: Callable, candidates=(A, B, C)) -> dict:
    return {
        trial.tile: trial
        for trial in tune({"walk": parts}, {"walk": candidates}, {"walk": STATIC}, time=time)
    }


def test_the_fastest_beyond_the_spread_wins() -> None:
    found = statuses([part()], clock({STATIC: 1.0, A: 0.9, B: 0.8, C: 1.3}))
    assert [found[tile].status for tile in (STATIC, A, B, C)] == [
        "static",
        "not the fastest",
        "wins",
        "slower",
    ]
    assert found[B].ms == 0.8
    assert found[B].spread_ms == pytest.approx((0.795, 0.805))
    assert found[B].error == 0


def test_nobody_wins_within_the_spread() -> None:
    found = statuses([part()], clock({STATIC: 1.0, A: 0.95, B: 0.98, C: 1.02}, spread=0.06))
    assert {found[tile].status for tile in (A, B, C)} == {"within the spread"}
    assert not beats(Timing(0.9, 0.9, 0.9), Timing(1.0, 0.95, 1.06)), "the spread of either side counts"
    assert not beats(Timing(0.9, 0.85, 0.96), Timing(1.0, 1.0, 1.0))
    assert not beats(Timing(1.0, 1.0, 1.0), Timing(1.0, 1.0, 1.0))


def test_who_came_first_is_timed_again() -> None:
    """The device was cold, or busy, when the static tile had its turn: it is as fast as the candidate."""
    found = statuses([part()], clock({STATIC: [1.0, 0.8], A: 0.8, B: 0.9, C: 1.2}))
    assert "wins" not in {trial.status for trial in found.values()}
    assert found[A].status == "within the spread"
    found = statuses([part()], clock({STATIC: [1.0, 1.0], A: [0.8, 1.0], B: 0.9, C: 1.2}))
    assert "wins" not in {trial.status for trial in found.values()}, "the candidate was lucky once"


def test_who_is_wrong_cannot_win() -> None:
    wrong = {A: lambda: 1.02 * RIGHT, B: lambda: RIGHT * float("nan"), C: lambda: RIGHT[:4]}
    found = statuses([part(wrong)], clock({STATIC: 1.0, A: 0.1, B: 0.1, C: 0.1}))
    assert {found[tile].status for tile in (A, B, C)} == {"wrong"}
    assert found[A].error == pytest.approx(0.02, rel=0.2)
    assert found[B].error is found[C].error is None
    assert all(found[tile].ms is None for tile in (A, B, C))


def test_rounding_is_not_wrong() -> None:
    nearly = {A: lambda: torch.cat([RIGHT[:1] * (1 + 2**-7), RIGHT[1:]])}
    found = statuses([part(nearly)], clock({STATIC: 1.0, A: 0.5}), candidates=(A,))
    assert found[A].status == "wins"
    assert 0 < found[A].error < tuning.BOUND


def test_who_does_not_repeat_cannot_win() -> None:
    """Also where the results of every call lie in the same memory."""
    shared = RIGHT.float().clone()
    drifts = {A: lambda: shared.mul_(1 + 2**-20), B: lambda: RIGHT * (1 + 1e-3 * torch.rand(8))}
    found = statuses([part(drifts)], clock({STATIC: 1.0, A: 0.1, B: 0.1}), candidates=(A, B))
    assert {found[tile].status for tile in (A, B)} == {"does not repeat"}


def test_every_result_of_every_part_counts() -> None:
    def pair() -> object:
        return RIGHT, 2 * RIGHT if sizes_now() != A else 3 * RIGHT

    found = statuses([part(), pair], clock({STATIC: 1.0, A: 0.1, B: 0.9}), candidates=(A, B))
    assert found[A].status == "wrong"
    assert found[B].status == "wins"
    assert found[B].ms == pytest.approx(1.8), "the times of both parts"


def fails(error: Exception) -> Callable[[], object]:
    def run() -> object:
        raise error

    return run


def test_what_does_not_fit_is_left_out() -> None:
    from triton import OutOfResources
    from triton.runtime.errors import PTXASError

    errors = {
        A: fails(OutOfResources(300000, 232448, "shared memory")),
        B: fails(PTXASError("no\nregisters")),
    }
    found = statuses([part(errors)], clock({STATIC: 1.0, C: 0.5}))
    assert found[A].status == "did not fit"
    assert "shared memory, Required: 300000" in found[A].why
    assert (found[B].status, found[B].why) == ("does not compile", "PTXAS error: no")
    assert found[C].status == "wins"


def test_a_fault_of_the_device_ends_the_tuning() -> None:
    """After an illegal access every further result is worthless."""
    broken = {A: fails(RuntimeError("CUDA error: an illegal memory access was encountered"))}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        statuses([part(broken)], clock({STATIC: 1.0}))


@pytest.mark.parametrize("candidates", [(A, B, C), (STATIC, A), (STATIC,), ()])
def test_progress_comes_to_its_total(candidates: tuple) -> None:
    said = []
    time = clock({STATIC: 1.0, A: 0.9, B: 0.8, C: 1.3})
    trials = list(
        tune({"walk": [part()]}, {"walk": candidates}, {"walk": STATIC}, time=time, tell=said.append)
    )
    assert len(said) == count(["walk"], {"walk": candidates})
    assert len(trials) == len({STATIC, *candidates})
    assert not triton_tiles._overrides


def test_parts_belong_to_the_product_of_their_name() -> None:
    named = {"walk down": part(), "sum": part(), "walk dx": part()}
    assert products_of(named) == {"walk": [named["walk down"], named["walk dx"]], "sum": [named["sum"]]}


def test_errors_are_added_up_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    actual, expected = torch.randn(7, 5), torch.randn(7, 5)
    whole = ((actual - expected).double().norm() / expected.double().norm()).item()
    monkeypatch.setattr(tuning, "CHUNK", 4)
    assert relative_error(actual, expected) == pytest.approx(whole)
    assert relative_error(torch.empty(0), torch.empty(0)) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) == float("inf")


def test_winners_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEUT_KERNELS_CACHE", str(tmp_path))
    setting = tuned_tiles.Setting("Pretend GPU", "2.11", "3.6", "0123456789ab")
    found = statuses([part({C: lambda: RIGHT * 2})], clock({STATIC: 1.0, A: 0.9, B: 0.8}))
    path = save(setting, list(found.values()))
    assert tuned_tiles.read(path, setting) == {"walk": B}
    save(setting, [trial for trial in found.values() if trial.status != "wins"])
    assert tuned_tiles.read(path, setting) == {}, "what no longer wins is forgotten"


def test_a_device_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the device: tokens and repeats arrive, winners are kept, a folder that refuses is told first."""
    seen: list[object] = []
    milliseconds = clock({STATIC: 1.0, A: 0.9, B: 0.8})

    def parts_of(n_tokens: int) -> dict[str, Callable[[], object]]:
        seen.append((n_tokens, mk.backend()))
        return {"walk down": part(), "walk dx": part(), "sum": fails(RuntimeError("not asked for"))}

    monkeypatch.setenv("MOEUT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(parts.CANDIDATES, "walk", (A, B))
    monkeypatch.setattr(parts, "parts", parts_of)
    monkeypatch.setattr(timing, "time_graph", lambda run, repeats: seen.append(repeats) or milliseconds(run))
    monkeypatch.setattr(triton_tiles, "static_tiles", lambda device: {"walk": triton_tiles.Tile(*STATIC)})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    setting = tuned_tiles.Setting("Pretend GPU", "2.11", "3.6", "0123456789ab")
    monkeypatch.setattr(tuned_tiles, "setting_of", lambda device: setting)
    path, trials = tuning.tune_device(["walk"], n_tokens=512, repeats=9)
    assert seen[0] == (512, "triton")
    assert set(seen[1:]) == {9}
    assert [trial.status for trial in trials] == ["static", "not the fastest", "wins"]
    assert tuned_tiles.read(path, setting) == {"walk": B}
    monkeypatch.setenv("MOEUT_KERNELS_CACHE", str(path))
    seen.clear()
    with pytest.raises(FileExistsError):
        tuning.tune_device(["walk"], n_tokens=512, repeats=9)
    assert not seen


@pytest.fixture
def far_apart(tmp_path: Path) -> dict[str, str]:
    """The environment of processes whose cache is empty."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return {**os.environ, "PYTHONPATH": path, "MOEUT_KERNELS_CACHE": str(tmp_path / "cache")}


TUNES = """
import torch
from moeut_kernels.bench import parts, timing
from moeut_kernels.bench.tune import tune_device
from moeut_kernels.triton_tiles import Tile, static_tiles, tile


def clock(part, *, repeats):
    part()
    ms = 1.0 if tile("weight", torch.empty(0, device="cuda", dtype=torch.bfloat16)).rows == 64 else 2.0
    return timing.Timing(ms, ms, ms)


timing.time_graph = clock
slow, fast = (16, 16, 16, 1, 1), (64, 64, 32, 4, 3)
static_tiles(torch.device("cuda", 0))["weight"] = Tile(*slow)
parts.CANDIDATES["weight"] = (fast, (256, 128, 128, 8, 8))
path, trials = tune_device(["weight"], n_tokens=4096, repeats=5)
print(path)
print(*(trial.status for trial in trials), sep=",")
"""
TAKES = """
import torch
from moeut_kernels.triton_tiles import tile

t = tile("weight", torch.empty(0, device="cuda", dtype=torch.bfloat16))
print(t.rows, t.columns, t.depth, t.warps, t.stages)
"""


@pytest.mark.gpu
def test_the_next_process_takes_what_one_has_tuned(far_apart: dict[str, str]) -> None:
    """Real kernels, but a clock that knows who is to win, whatever else the GPU does; the third is too large."""

    def python(program: str, **changes: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=far_apart | changes,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    path, found = python(TUNES)
    assert found == "static,wins,did not fit"
    assert Path(path).is_file()
    assert python(TAKES) == ["64 64 32 4 3"]
    assert python(TAKES, MOEUT_KERNELS_TUNED="0") != ["64 64 32 4 3"]
