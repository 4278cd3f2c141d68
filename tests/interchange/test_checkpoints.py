"""Checkpoints of both original repositories, there and back; the weights are those of the golden cases."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import moeut_compose as mc
from moeut_compose.build import build_model
from moeut_compose.cli import app
from moeut_compose.interchange.checkpoints import (
    import_checkpoint,
    model_of,
    original_weights,
    read_original,
)
from moeut_compose.train.errors import RunError
from tests.interchange.originals import (
    CLEAN,
    GOLDEN,
    TRAINING,
    DotDict,
    Golden,
    check_logits,
    training_checkpoint,
)


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch) -> type:
    """The module that checkpoints of the training code name; it is gone when they are read."""
    module = types.ModuleType("framework.data_structures.dotdict")
    module.DotDict = DotDict
    monkeypatch.setitem(sys.modules, "framework", types.ModuleType("framework"))
    monkeypatch.setitem(
        sys.modules, "framework.data_structures", types.ModuleType("framework.data_structures")
    )
    monkeypatch.setitem(sys.modules, "framework.data_structures.dotdict", module)
    monkeypatch.setattr(DotDict, "__module__", "framework.data_structures.dotdict")
    return DotDict


def test_all_archives_are_read() -> None:
    names = {path.stem for path in GOLDEN.glob("*.safetensors")}
    assert names == {*CLEAN, *TRAINING, "training_trajectory"}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_checkpoint_becomes_a_run(name: str, wrapped: bool, tmp_path: Path) -> None:
    golden = Golden(name)
    if wrapped:
        torch.save({"model": golden.weights, "config": golden.config, "step": 3}, tmp_path / "a.pth")
    else:
        torch.save(golden.weights, tmp_path / "a.pth")
        (tmp_path / "config.json").write_text(json.dumps(golden.config))
    original = read_original(tmp_path / "a.pth", origin="moeut")
    import_checkpoint(original, tmp_path / "run")
    check_logits(tmp_path / "run", golden)


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_checkpoint_becomes_a_run(name: str, tmp_path: Path, framework: type) -> None:
    golden = Golden(name)
    folder = tmp_path / "save" / "checkpoint"
    folder.mkdir(parents=True)
    training_checkpoint(name, golden, folder / "model-900.pth", framework)
    file = training_checkpoint(name, golden, folder / "model-1000.pth", framework)
    for module in [name for name in sys.modules if name.split(".")[0] == "framework"]:
        del sys.modules[module]
    original = read_original(tmp_path / "save", origin="moeut-training")
    assert original.path == file
    import_checkpoint(original, tmp_path / "run")
    check_logits(tmp_path / "run", golden)
    run = mc.load_run(tmp_path / "run")
    assert run.step == 1234
    recipe = run.recipe
    assert (recipe.batch.size, recipe.batch.micro, recipe.context, recipe.steps) == (64, 32, 16, 100000)
    assert (recipe.optimizer.lr, recipe.clip_norm, recipe.schedule.warmup_steps) == (2.5e-4, 0.25, 4000)
    assert "peS2o" in recipe.data.model_dump_json()


@pytest.mark.parametrize("name", [*CLEAN, *TRAINING])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    golden = Golden(name)
    origin = "moeut" if name in CLEAN else "moeut-training"
    if origin == "moeut":
        torch.save({"model": golden.weights, "config": golden.config}, tmp_path / "a.pth")
    else:
        training_checkpoint(name, golden, tmp_path / "a.pth")
    original = read_original(tmp_path / "a.pth", origin=origin)
    back = original_weights(model_of(original, original.spec()), original.spec(), origin=origin)
    assert back.keys() == golden.weights.keys()
    for key, tensor in back.items():
        assert torch.equal(tensor, golden.weights[key]), key


def test_settings_of_the_command_line_become_those_of_the_spec(tmp_path: Path) -> None:
    golden = Golden("sut_act")
    path = training_checkpoint("sut_act", golden, tmp_path / "a.pth")
    spec = read_original(path, origin="moeut-training").spec()
    assert spec.stages[0].halting.weight == 0.01
    assert spec.position.max_distance == 8
    (term,) = spec.stages[0].layers[0].feedforward.balance
    assert (term.kind, term.weight) == ("mutual_information_as_coded", 0.01)
    assert (spec.embedding.scale, spec.embedding.norm, spec.final_norm) == (
        "sqrt_d_model",
        "layer_norm",
        False,
    )


def test_the_two_repositories_differ_with_one_attention_expert() -> None:
    """The clean release gates outputs only, the training code values as well."""
    clean = Golden("moeut_single_attention_expert")
    assert not any("sel_v" in name for name in clean.weights)
    spec = mc.load_spec("sigma_moe_tiny")
    names = original_weights(build_model(spec), spec, origin="moeut-training")
    assert "unique_layers.0.self_attn.selections.v" in names
    assert names["unique_layers.0.self_attn.projections.v"].shape == (4, 128, 32)


@pytest.mark.parametrize("name", ["looped_tiny", "relaxed_recursive_tiny", "deepseek_moe_tiny"])
def test_what_the_original_cannot_hold_is_named(name: str) -> None:
    spec = mc.load_spec(name)
    with pytest.raises(ValueError, match="has no place for stages"):
        original_weights(build_model(spec, device="meta"), spec, origin="moeut-training")


def test_safetensors(tmp_path: Path) -> None:
    golden = Golden("moeut_g2")
    metadata = {"config": json.dumps(golden.config)}
    save_file({k: v.contiguous() for k, v in golden.weights.items()}, tmp_path / "a.safetensors", metadata)
    import_checkpoint(read_original(tmp_path, origin="moeut"), tmp_path / "run")
    check_logits(tmp_path / "run", golden)


def test_published_profiles_need_no_more_than_they_say(tmp_path: Path) -> None:
    """A profile of the clean release leaves expert size and attention choices to the defaults of its class."""
    sizes = {"d_model": 412, "n_layers": 16, "n_heads": 4, "d_head": 82, "group_size": 2}
    profile = sizes | {"ff_n_experts": 155, "att_n_experts": 8, "ff_k": 12}
    torch.save({"embedding.weight": torch.zeros(8000, 412)}, tmp_path / "profile.pth")
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    spec = read_original(tmp_path / "profile.pth", origin="moeut").spec()
    ignored = {"name", "description"}
    assert spec.model_dump(exclude=ignored) == mc.load_spec("moeut_44m").model_dump(exclude=ignored)


def test_the_command(tmp_path: Path) -> None:
    golden = Golden("moeut_g2")
    torch.save(golden.weights, tmp_path / "mine.pth")
    (tmp_path / "c.yaml").write_text(json.dumps(golden.config))
    command = [
        "import",
        str(tmp_path / "mine.pth"),
        "--format",
        "moeut",
        "--config",
        str(tmp_path / "c.yaml"),
    ]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["name"] == "mine"
    assert "tokenizer" in result.stderr
    check_logits(tmp_path / "run", golden)
    again = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run")])
    assert again.exit_code == 1
    assert "is not empty" in again.stderr
    assert CliRunner().invoke(app, ["import", "nowhere", "--format", "moeut", "--out", "x"]).exit_code == 2


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    golden = Golden("moeut_g2")
    torch.save({"model": golden.weights, "config": golden.config}, tmp_path / "a.pth")
    with pytest.raises(RunError, match="not empty"):
        import_checkpoint(read_original(tmp_path / "a.pth", origin="moeut"), tmp_path)
