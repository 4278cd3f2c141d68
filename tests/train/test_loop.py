"""A step is the same whatever the micro-batch, and happens whole or not at all."""

import pytest
import torch

from moeut_compose.build import build_model
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import AdamWSpec, CosineSchedule
from moeut_compose.train.device import Precision
from moeut_compose.train.errors import TrainError
from moeut_compose.train.loop import Trainer


def make_trainer(spec: ModelSpec, micro_batch: int, precision: str = "fp32") -> Trainer:
    return Trainer(
        build_model(spec, seed=1),
        optimizer=AdamWSpec(lr=1e-2),
        schedule=CosineSchedule(warmup_steps=2),
        steps=10,
        clip_norm=0.25,
        precision=Precision(precision, "cpu"),
        micro_batch=micro_batch,
    )


def batches(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 120, (6, 17), generator=generator) for _ in range(n)]


def test_uneven_micro_batches_add_up_to_the_batch(spec: ModelSpec) -> None:
    whole, parts = make_trainer(spec, 6), make_trainer(spec, 4)
    for batch in batches(3):
        a, b = whole.train_step(batch), parts.train_step(batch)
        assert set(a) == set(b) >= {"loss", "cross_entropy", "grad_norm"}
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_the_loss_holds_the_balance_terms(spec: ModelSpec) -> None:
    values = make_trainer(spec, 6).train_step(batches(1)[0])
    terms = [value for name, value in values.items() if name not in ("loss", "grad_norm", "skipped")]
    assert len(terms) > 1
    torch.testing.assert_close(values["loss"], sum(terms))


def test_a_step_uses_the_rate_of_its_number(spec: ModelSpec) -> None:
    trainer = make_trainer(spec, 6)
    rates = []
    for batch in batches(3):
        trainer.train_step(batch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.005, 0.01, 0.01])


def test_an_interrupted_step_leaves_no_trace(spec: ModelSpec) -> None:
    first, second, third = batches(3)
    undisturbed, disturbed = make_trainer(spec, 2), make_trainer(spec, 2)
    undisturbed.train_step(first)
    disturbed.train_step(first)

    def stop(share: float) -> None:
        torch.rand(3)  # as a model that draws random numbers would
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disturbed.train_step(second, between=stop)
    assert disturbed.step == 1
    for trainer in (undisturbed, disturbed):
        trainer.train_step(third)
    for p, q in zip(undisturbed.model.parameters(), disturbed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(undisturbed.state_dict()["random"]["torch"], disturbed.state_dict()["random"]["torch"])


def test_state_goes_through_weights_only_loading(spec: ModelSpec, tmp_path) -> None:
    trainer = make_trainer(spec, 6)
    first, second = batches(2)
    trainer.train_step(first)
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    other = make_trainer(spec, 6)
    other.model.load_state_dict(trainer.model.state_dict())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for t in (trainer, other):
        t.train_step(second)
    assert other.step == 2
    for p, q in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_bfloat16_trains_with_float32_weights(spec: ModelSpec) -> None:
    trainer = make_trainer(spec, 6, "bf16")
    batch = batches(1)[0]
    losses = [trainer.train_step(batch)["cross_entropy"].item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_memory_running_out_shrinks_the_micro_batch_or_says_what_to_do(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_of_memory(self: Trainer, batch: torch.Tensor, **options) -> dict[str, torch.Tensor]:
        if self.micro_batch > 2:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB\nand so on")
        return original(self, batch, **options)

    original = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", short_of_memory)
    trainer, warnings = make_trainer(spec, 6), []
    options = {"between": lambda share: None, "warn": warnings.append}
    with pytest.raises(
        TrainError, match=r"micro-batches of 6 x 16 tokens; set recipe\.batch\.micro .*\(tried"
    ):
        trainer.fitting_step(batches(1)[0], may_shrink=False, **options)
    trainer.fitting_step(batches(1)[0], may_shrink=True, **options)
    assert (trainer.micro_batch, trainer.step, len(warnings)) == (2, 1, 2)


def test_routers_under_feedback_are_steered_after_each_step() -> None:
    spec = load_spec("aux_free_moe_tiny", ["context_length=16", "vocab_size=64"])
    model = build_model(spec, seed=1)
    trainer = Trainer(
        model,
        optimizer=AdamWSpec(),
        schedule=CosineSchedule(warmup_steps=0, period=10),
        steps=10,
        clip_norm=None,
        precision=Precision("fp32", "cpu"),
        micro_batch=2,
    )
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("bias")}
    trainer.train_step(torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0)))
    assert before
    assert all(not torch.equal(before[name], model.get_buffer(name)) for name in before)
