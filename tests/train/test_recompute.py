"""Activation checkpointing: the same gradients to the bit, the same experts, and less work or less memory."""

import math
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import moeut_kernels as mk
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from moeut_compose.blocks.layers import add_parts
from moeut_compose.blocks.model import LanguageModel
from moeut_compose.blocks.roles import Router, Routing
from moeut_compose.blocks.routers import LinearRouter
from moeut_compose.blocks.stages import skip_resting
from moeut_compose.build import build_model
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train import modes, recompute, run, session
from moeut_compose.train.recompute import ActivationCheckpointing, checkpoint_layers

HERE = Path(__file__).parent
SMALL = ["vocab_size=60", "context_length=16", "d_model=32"]
DROPOUT = [*SMALL, "stages.0.layers.0.count=1", "stages.0.layers.0.feedforward.expert_dropout=0.3"]
SAMPLED = [*SMALL, "stages.0.layers.0.feedforward.router.n_sampled=1"]
ARCHITECTURES: dict[str, tuple[str, list[str]]] = {
    "dense": ("dense_tiny", SMALL),
    "sigma_moe": ("sigma_moe_tiny", SMALL),
    "moeut": ("moeut_tiny", SMALL),
    "expert_dropout": ("moeut_tiny", DROPOUT),
    "halting": ("sut_tiny", SMALL),
    "sampled_experts": ("sut_tiny", SAMPLED),
    "steered": ("aux_free_moe_tiny", SMALL),
}


def small(architecture: str) -> LanguageModel:
    name, overrides = ARCHITECTURES[architecture]
    return build_model(load_spec(name, overrides), seed=1).train()


def backward(model: LanguageModel, *, autocast: bool = False) -> tuple[dict[str, torch.Tensor], Any]:
    """Gradients of a step, and its output."""
    ids = torch.randint(0, 60, (2, 17), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(ids[:, :-1], targets=ids[:, 1:])
        loss = out.cross_entropy + sum(out.losses.values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, out


def assert_same(
    ours: tuple[dict[str, torch.Tensor], Any], theirs: tuple[dict[str, torch.Tensor], Any]
) -> None:
    gradients, out = ours
    expected, plain = theirs
    assert gradients.keys() == expected.keys()
    different = [name for name, gradient in expected.items() if not torch.equal(gradients[name], gradient)]
    assert not different
    assert torch.equal(out.cross_entropy, plain.cross_entropy)
    assert out.stats.keys() == plain.stats.keys()
    assert all(torch.equal(value, plain.stats[name]) for name, value in out.stats.items())
    assert out.by_repeat.keys() == plain.by_repeat.keys()
    for name, sums in out.by_repeat.items():
        assert all(torch.equal(*pair) for pair in zip(sums, plain.by_repeat[name], strict=True))


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_and_statistics_are_those_of_a_layer_that_keeps_everything(
    architecture: str, autocast: bool, mode: ActivationCheckpointing
) -> None:
    """Under autocast with `selective`, weights that run several times also wait for the rows of all their uses."""
    plain, checkpointed = small(architecture), small(architecture)
    if mode == "full":
        recompute.defer_gradients(plain, False)
    checkpoint_layers(checkpointed, mode)
    assert_same(backward(checkpointed, autocast=autocast), backward(plain, autocast=autocast))


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_the_same_where_norms_take_sums_along(
    autocast: bool, mode: ActivationCheckpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Triton trains. `selective` adds up heads apart, so the layer that keeps everything does here, too."""
    monkeypatch.setattr(mk, "fans", lambda x: torch.is_grad_enabled())
    plain, checkpointed = small("moeut"), small("moeut")
    if mode == "full":
        recompute.defer_gradients(plain, False)
    add_parts(plain, mode != "selective")
    checkpoint_layers(checkpointed, mode)
    with Calls() as calls:
        ours = backward(checkpointed, autocast=autocast)
    assert calls.count["moeut::norm_fan_backward"] == 2 * len(checkpointed.stages[0].schedule)
    assert_same(ours, backward(plain, autocast=autocast))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_rows_are_handed_in_once_however_often_a_layer_runs(mode: ActivationCheckpointing) -> None:
    plain, checkpointed = small("moeut"), small("moeut")
    checkpoint_layers(checkpointed, mode)
    recompute.defer_gradients(checkpointed)
    with Calls() as calls:
        ours = backward(checkpointed, autocast=True)
    n_weights = 4 * len(checkpointed.stages[0].layers)
    assert calls.count["moeut::deferred_gradient"] == n_weights
    assert_same(ours, backward(plain, autocast=True))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_tokens_at_rest_stay_where_they_were(mode: ActivationCheckpointing) -> None:
    plain, checkpointed = small("halting"), small("halting")
    for model in (plain, checkpointed):
        skip_resting(model)
    checkpoint_layers(checkpointed, mode)
    assert_same(backward(checkpointed), backward(plain))


class Calls(TorchDispatchMode):
    """Counts operators that are really run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_what_runs_again_and_what_does_not() -> None:
    found = {}
    for mode in ("none", "full", "selective"):
        model = small("moeut")
        checkpoint_layers(model, mode)
        with Calls() as calls:
            backward(model)
        found[mode] = calls.count
    none, full, selective = found["none"], found["full"], found["selective"]
    assert none["aten::topk"] == full["aten::topk"] == selective["aten::topk"] > 0
    products = ["plan", "expert_feedforward", "expert_split", "expert_merge"]
    for name in (
        *(f"moeut::{name}" for name in products),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ):
        assert full[name] == 2 * none[name] > 0, name
        assert selective[name] == none[name], name
        assert full[f"{name}_backward"] == none[f"{name}_backward"]
    assert none["aten::linalg_vector_norm"] == full["aten::linalg_vector_norm"]


def choices(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
    """Of every router, in the order of its calls, where scores have the other sign from the backward pass on."""
    seen: dict[str, list[torch.Tensor]] = {}
    sign = 1.0

    def note(module: Router, args: Any, routing: Routing, name: str) -> None:
        seen.setdefault(name, []).append(routing.index)

    for name, module in model.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(partial(note, name=name))
    by_head = LinearRouter.by_head
    monkeypatch.setattr(LinearRouter, "by_head", lambda self, columns: sign * by_head(self, columns))

    def turn(gradient: torch.Tensor) -> None:
        nonlocal sign
        sign = -1.0

    def begins(module: Any, args: Any, out: Any) -> None:
        out.cross_entropy.register_hook(turn)

    model.register_forward_hook(begins)
    backward(model)
    return seen


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("architecture", ["moeut", "expert_dropout", "steered"])
def test_tokens_stay_with_their_experts_where_scores_change(
    monkeypatch: pytest.MonkeyPatch, architecture: str, mode: ActivationCheckpointing
) -> None:
    model = small(architecture)
    checkpoint_layers(model, mode)
    for of_router in choices(model, monkeypatch).values():
        half = len(of_router) // 2
        assert len(of_router) == 2 * half > 0, "each call is repeated"
        for first, second in zip(of_router[:half], reversed(of_router[half:]), strict=True):
            assert torch.equal(first, second)


def test_without_kept_choices_tokens_would_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above can fail."""
    monkeypatch.setattr(recompute, "keeps", lambda mode, op, compiled: False)
    model = small("moeut")
    checkpoint_layers(model, "full")
    seen = choices(model, monkeypatch)
    assert any(not torch.equal(of_router[0], of_router[-1]) for of_router in seen.values())


@pytest.mark.filterwarnings("ignore")  # of the compiler, about tensors that it looks at
@pytest.mark.parametrize(
    "architecture",
    ["expert_dropout", pytest.param("halting", marks=pytest.mark.slow)],
)
def test_compiled_layers_choose_once_and_compute_again(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """One graph without breaks; the backward graph holds what the mode leaves out, and no choice."""
    graphs: list[Counter[str]] = []

    def note(module: torch.fx.GraphModule, inputs: Any) -> Any:
        targets = [node.target for node in module.graph.nodes]
        graphs.append(
            Counter(t.name().split(".")[0] for t in targets if isinstance(t, torch._ops.OpOverload))
        )
        return module.forward

    backend = aot_autograd(fw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    compiler = torch.compile
    monkeypatch.setattr(modes.torch, "compile", partial(compiler, backend=backend, fullgraph=True))
    plain = small(architecture)
    recompute.defer_gradients(plain, False)
    expected = backward(plain)
    for mode in ("full", "selective"):
        graphs.clear()
        torch._dynamo.reset()
        checkpointed = small(architecture)
        checkpoint_layers(checkpointed, mode)
        modes.compile_layers(checkpointed)
        gradients, out = backward(checkpointed)
        for name, gradient in expected[0].items():
            assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)
        assert_close(out.by_repeat, expected[1].by_repeat)
        backwards = [graph for graph in graphs if graph["moeut::expert_feedforward_backward"]]
        assert backwards
        for graph in backwards:
            assert not graph["aten::topk"]
            assert not graph["aten::rand_like"]
            for product in ("expert_feedforward", "expert_split", "expert_merge"):
                assert graph[f"moeut::{product}"] == (
                    graph[f"moeut::{product}_backward"] if mode == "full" else 0
                )
    torch._dynamo.reset()


def test_nothing_is_wrapped_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, checkpointed = small("moeut"), small("moeut")
    checkpoint_layers(checkpointed, "full")
    monkeypatch.setattr(recompute, "checkpoint", None)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(checkpointed(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_run_ends_with_the_same_weights(
    tmp_path: Path, spec: ModelSpec, recipe: RecipeSpec, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Through the recipe, in float32."""
    monkeypatch.setattr(session, "plot_loss", lambda rows, folder, title: folder / "loss.png")
    begun = recipe.model_copy(update={"activation_checkpointing": mode})
    plain, other = (run.train(spec, r, out=tmp_path / r.activation_checkpointing) for r in (recipe, begun))
    assert math.isfinite(plain.loss)
    weights, ours = (load_file(result.checkpoint / "model.safetensors") for result in (plain, other))
    assert all(torch.equal(ours[name], weight) for name, weight in weights.items())


@pytest.mark.slow
def test_two_processes_take_the_same_steps(tmp_path: Path) -> None:
    """With DDP and with FSDP2, layers and whole stages as units, in float64 and in several micro-batches."""
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE.parents[1] / 'kernels'}"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(HERE / "recompute_worker.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    files = {file.stem: load_file(file) for file in tmp_path.iterdir()}
    assert len(files) == 18
    for name, ours in files.items():
        plain = files[f"{name.rpartition('-')[0]}-none"]
        assert ours.keys() == plain.keys()
        for key, value in plain.items():
            assert_close(ours[key], value, rtol=1e-9, atol=1e-12)
