"""Router load of single repeats: those that routers were made to have, whatever splits the batch, and in every file."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from moeut_compose.blocks.model import LanguageModel
from moeut_compose.blocks.routers import LinearRouter
from moeut_compose.blocks.stats import totals
from moeut_compose.build import build_model
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import AdamWSpec, CosineSchedule, RecipeSpec
from moeut_compose.train import session
from moeut_compose.train.device import Precision
from moeut_compose.train.load_table import LoadTable
from moeut_compose.train.loop import Trainer
from moeut_compose.train.metrics import MetricsLog, read_rows, scalars
from moeut_compose.train.router_load import RouterLoads, loads_by_repeat
from moeut_compose.train.run import train

TAKEN = torch.tensor(False)
SMALL = ["vocab_size=60", "context_length=16", "d_model=32"]
EXPERTS = [
    "stages.0.repeats=3",
    "stages.0.layers.0.count=2",
    "stages.0.layers.0.feedforward.n_experts=4",
    "stages.0.layers.0.feedforward.top_k=1",
    "stages.0.layers.0.feedforward.balance={kind: switch, weight: 0.01}",
]
ROUTERS = [f"stages.0.layers.{member}.feedforward.router" for member in (0, 1)]
FORCED = ((0, 0, 0, 0), (0, 1, 2, 3), (2, 2, 2, 3))
"""By repeat: the expert of every fourth token, from the first on."""


def forced_model(pattern: str) -> LanguageModel:
    """Member 0 chooses what `FORCED` says, member 1 the same in the reverse order of repeats."""
    model = build_model(load_spec("moeut_tiny", [*SMALL, *EXPERTS, f"stages.0.pattern={pattern}"]), seed=1)
    for member, name in enumerate(ROUTERS):
        router = model.get_submodule(name)
        assert isinstance(router, LinearRouter)
        force(router, FORCED if member == 0 else FORCED[::-1])
    return model


def force(router: LinearRouter, forced: tuple[tuple[int, ...], ...]) -> None:
    scores, calls = router.scores, 0

    def chosen(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        experts = torch.tensor(forced[calls % len(forced)]).repeat(x.shape[1] // 4)
        calls += 1
        wanted = torch.nn.functional.one_hot(experts, router.n_experts)[None, :, None]
        return scores(x) * 0 + 4.0 * wanted

    router.scores = chosen  # type: ignore[method-assign]


def batch_of(n: int) -> torch.Tensor:
    return torch.randint(0, 60, (n, 17), generator=torch.Generator().manual_seed(0))


def trainer_of(model: LanguageModel, micro_batch: int) -> Trainer:
    return Trainer(
        model,
        optimizer=AdamWSpec(),
        schedule=CosineSchedule(warmup_steps=0),
        steps=10,
        clip_norm=None,
        precision=Precision("fp32", "cpu"),
        micro_batch=micro_batch,
    )


def loads() -> RouterLoads:
    return RouterLoads(torch.device("cpu"))


@pytest.mark.parametrize("pattern", ["ABAB", "AABB"])
@pytest.mark.parametrize("micro_batch", [6, 4])
def test_repeats_have_the_loads_that_routers_were_forced_to(pattern: str, micro_batch: int) -> None:
    trainer, seen = trainer_of(forced_model(pattern), micro_batch), loads()
    for _ in range(2):
        seen.add(trainer.seen, trainer.train_step(batch_of(6))["skipped"])
        counts = {name: trainer.seen[f"repeats.{name}"] for name in ROUTERS}
        by_hand = torch.tensor([[4, 0, 0, 0], [1, 1, 1, 1], [0, 0, 3, 1]])[:, None] * 6.0 * 4
        assert torch.equal(counts[ROUTERS[0]], by_hand)
        assert torch.equal(counts[ROUTERS[1]], by_hand.flip(0))
    seen.add(trainer.seen, TAKEN)
    found = seen.by_repeat()
    uneven = math.log(4) - 0.75 * math.log(3)
    first = found[ROUTERS[0]]
    assert first["max_over_mean"] == [4.0, 1.0, 3.0]
    assert first["entropy"] == pytest.approx([0.0, math.log(4), uneven])
    assert first["dead_experts"] == [3, 0, 2]
    assert found[ROUTERS[1]] == {figure: values[::-1] for figure, values in first.items()}
    pooled = seen.columns()
    for name in ROUTERS:
        assert pooled[f"load.{name}.max_over_mean"] == pytest.approx(5 / 3), "5 of 12 tokens"
        assert pooled[f"load.{name}.dead_experts"] == 0


@pytest.mark.parametrize(
    "name", ["moeut_tiny", "sut_tiny", "sigma_moe_tiny", "aux_free_moe_tiny", "dense_tiny"]
)
def test_repeats_add_up_to_what_is_pooled(name: str) -> None:
    model = build_model(load_spec(name, SMALL), seed=1).train()
    out = model(batch_of(4)[:, :-1])
    assert out.by_repeat.keys() == {name for name in out.stats if ".halting." not in name}
    for term, sums in out.by_repeat.items():
        assert not any(part.requires_grad for part in sums)
        torch.testing.assert_close(sum(sums), out.stats[term].detach())
    pooled = loads()
    pooled.add(totals(out.stats), TAKEN)
    routers = {key.removesuffix(".entropy")[5:] for key in pooled.columns() if key.endswith(".entropy")}
    repeats = loads_by_repeat(out.by_repeat)
    several = {name for name in routers if model.stages[0].schedule[-1][1] > 0}
    assert repeats.keys() == {f"repeats.{router}" for router in several}
    assert bool(repeats) == (name in ("moeut_tiny", "sut_tiny"))


def test_evaluation_returns_none() -> None:
    model = forced_model("ABAB").eval()
    assert model(batch_of(1)[:, :-1]).by_repeat == {}


def test_a_repeat_that_no_token_came_to_has_no_figures() -> None:
    seen = loads()
    seen.add({"repeats.r": torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]])}, TAKEN)
    figures = seen.by_repeat()["r"]
    assert figures == {
        "max_over_mean": [1.0, None],
        "entropy": [pytest.approx(math.log(2)), None],
        "dead_experts": [0, None],
    }
    assert seen.columns() == {}
    row = {"event": "train", "step": 3, "load_by_repeat": {"r": figures}}
    assert scalars(row)["load_by_repeat/r.max_over_mean/0"] == 1.0
    assert "load_by_repeat/r.max_over_mean/1" not in scalars(row)


def test_the_state_goes_on_with_that_of_a_checkpoint_without_repeats() -> None:
    load = torch.tensor([[3.0, 1.0]])
    step = {"r.load": load, "repeats.r": torch.stack((load, load.flip(-1)))}
    first, second, earlier = loads(), loads(), loads()
    first.add(step, TAKEN)
    second.load_state_dict(first.state_dict())
    second.add(step, TAKEN)
    assert (
        second.by_repeat()
        == first.by_repeat()
        == {
            "r": {
                "max_over_mean": [1.5, 1.5],
                "entropy": [pytest.approx(0.5623, abs=1e-4)] * 2,
                "dead_experts": [0, 0],
            }
        }
    )
    earlier.load_state_dict({"r": load.double()})
    assert earlier.by_repeat() == {}
    earlier.add(step, TAKEN)
    assert earlier.by_repeat() == first.by_repeat()
    earlier.clear()
    assert earlier.by_repeat() == {}


def test_a_run_writes_them_once_as_rows_and_once_as_a_table(
    spec: ModelSpec, recipe: RecipeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "plot_loss", lambda rows, folder, title: folder / "loss.png")
    run = train(spec, recipe).folder
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["event"] == "train"]
    routers = {key.split(".", 1)[1].removesuffix(".entropy") for key in rows[0] if key.endswith(".entropy")}
    routers = {name for name in routers if f"load.{name}.entropy" in rows[0]}
    assert len(routers) == 6
    table = list(csv.DictReader((run / "router_load.csv").read_text().splitlines()))
    assert len(table) == len(rows) * 6 * 2
    lines = iter(table)
    for row in rows:
        assert row["load_by_repeat"].keys() == routers
        for router, figures in row["load_by_repeat"].items():
            for repeat in (0, 1):
                line = next(lines)
                place = (str(row["step"]), str(row["tokens"]), router, str(repeat))
                assert (line["step"], line["tokens"], line["router"], line["repeat"]) == place
                for name, values in figures.items():
                    assert float(line[name]) == values[repeat]
    assert "load_by_repeat" not in (run / "metrics.csv").read_text()


def test_a_model_that_does_not_repeat_has_no_table(
    spec: ModelSpec, recipe: RecipeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "plot_loss", lambda rows, folder, title: folder / "loss.png")
    once = spec.model_validate(spec.model_dump() | {"stages": [spec.stages[0].model_dump() | {"repeats": 1}]})
    run = train(once, recipe).folder
    assert all("load_by_repeat" not in row for row in read_rows(run / "metrics.jsonl"))
    assert not (run / "router_load.csv").exists()


def row_at(step: int, value: float = 1.5) -> dict:
    figures = {"max_over_mean": [value, None], "entropy": [0.5, None], "dead_experts": [0, None]}
    return {"event": "note", "step": step, "tokens": 8 * step, "load_by_repeat": {"r": figures}}


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, keep_until=0)
    for step in (1, 2, 3):
        log.append(row_at(step))
    log.flush()
    log.close()
    table = tmp_path / "router_load.csv"
    header = "step,tokens,router,repeat,max_over_mean,entropy,dead_experts\n"
    lines = [f"{step},{8 * step},r,0,1.5,0.5,0\n{step},{8 * step},r,1,,,\n" for step in (1, 2, 3)]
    assert table.read_text() == header + "".join(lines)
    with table.open("a") as file:
        file.write("4,3")
    MetricsLog(tmp_path, keep_until=2).close()
    assert table.read_text() == header + "".join(lines[:2])
    MetricsLog(tmp_path, keep_until=0).close()
    assert not table.exists()


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [1],
        {"r": None},
        {"r": {"entropy": [1.0]}},
        {"r": {"max_over_mean": [1.0], "entropy": [1.0, 2.0], "dead_experts": [0]}},
        {"r": {"max_over_mean": [1.0], "entropy": ["1"], "dead_experts": [0]}},
    ],
    ids=json.dumps,
)
def test_damaged_figures_have_no_lines(tmp_path: Path, damaged: object) -> None:
    LoadTable(tmp_path, [row_at(1) | {"load_by_repeat": damaged}]).close()
    assert not (tmp_path / "router_load.csv").exists()
