"""Loads are those that routers returned, over the steps of a row."""

import math

import pytest
import torch

from moeut_compose.build import build_model
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import AdamWSpec, CosineSchedule, RecipeSpec
from moeut_compose.train import session
from moeut_compose.train.device import Precision
from moeut_compose.train.loop import Trainer
from moeut_compose.train.metrics import read_rows
from moeut_compose.train.router_load import RouterLoads
from moeut_compose.train.run import train

TAKEN, SKIPPED = torch.tensor(False), torch.tensor(True)


def loads() -> RouterLoads:
    return RouterLoads(torch.device("cpu"))


def test_figures_of_a_known_load() -> None:
    seen = loads()
    seen.add({"r.load": torch.tensor([[3.0, 1.0, 0.0, 0.0]])}, TAKEN)
    seen.add({"r.load": torch.tensor([[3.0, 1.0, 0.0, 0.0]])}, TAKEN)
    seen.add({"r.load": torch.tensor([[math.nan, 9.0, 9.0, 9.0]])}, SKIPPED)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert seen.columns() == {
        "load.r.max_over_mean": 3.0,
        "load.r.entropy": pytest.approx(entropy),
        "load.r.dead_experts": 2,
    }


def test_heads_are_judged_one_by_one() -> None:
    seen = loads()
    seen.add({"r.load": torch.tensor([[4.0, 0.0], [2.0, 2.0]])}, TAKEN)
    columns = seen.columns()
    assert columns["load.r.max_over_mean"] == 2.0
    assert columns["load.r.entropy"] == pytest.approx(math.log(2) / 2)
    assert columns["load.r.dead_experts"] == 1


def test_counted_tokens_come_before_probabilities() -> None:
    even, uneven = torch.ones(1, 2), torch.tensor([[1.0, 0.0]])
    seen = loads()
    seen.add({"r.entropy.probability": even, "r.entropy.mass": even, "r.switch.count": uneven}, TAKEN)
    assert seen.columns()["load.r.dead_experts"] == 1
    assert len(seen.columns()) == 3


def test_depth_is_passes_per_token_and_state_goes_on() -> None:
    first, second = loads(), loads()
    part = {"stages.0.halting.passes": torch.tensor([6.0]), "stages.0.halting.tokens": torch.tensor([4.0])}
    first.add(part, TAKEN)
    second.load_state_dict(first.state_dict())
    second.add({name: value * 3 for name, value in part.items()} | {"r.load": torch.ones(1, 3)}, TAKEN)
    assert second.columns()["depth.stages.0"] == 1.5
    second.clear()
    assert second.columns() == {}


@pytest.mark.parametrize("name", ["aux_free_moe_tiny", "sut_tiny"])
def test_sums_do_not_depend_on_micro_batches(name: str) -> None:
    columns = []
    batch = torch.randint(0, 64, (6, 17), generator=torch.Generator().manual_seed(0))
    for micro_batch in (6, 4):
        trainer = Trainer(
            build_model(load_spec(name, ["context_length=16", "vocab_size=64"]), seed=1),
            optimizer=AdamWSpec(),
            schedule=CosineSchedule(warmup_steps=0),
            steps=10,
            clip_norm=None,
            precision=Precision("fp32", "cpu"),
            micro_batch=micro_batch,
        )
        torch.manual_seed(0)
        seen = loads()
        seen.add(trainer.seen, trainer.train_step(batch)["skipped"])
        assert seen.columns() == {}, "nothing is seen before the first step"
        seen.add(trainer.seen, TAKEN)
        columns.append(seen.columns())
    assert columns[0]
    assert columns[0].keys() == columns[1].keys()
    if name == "aux_free_moe_tiny":  # the other samples experts
        assert columns[0] == pytest.approx(columns[1])


def test_rows_hold_the_load_of_every_router(
    spec: ModelSpec, recipe: RecipeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "plot_loss", lambda rows, folder, title: folder / "loss.png")
    rows = [row for row in read_rows(train(spec, recipe).folder / "metrics.jsonl") if row["event"] == "train"]
    model = build_model(spec, device="meta")
    routers = {name for name, module in model.named_modules() if hasattr(module, "n_experts")}
    routers = {name for name in routers if name.endswith("router")}
    assert len(routers) == 6
    for row in rows:
        for router in routers:
            n_experts = model.get_submodule(router).n_experts
            assert 1 <= row[f"load.{router}.max_over_mean"] <= n_experts
            assert 0 < row[f"load.{router}.entropy"] <= math.log(n_experts) + 1e-6
            assert row[f"load.{router}.dead_experts"] == 0
