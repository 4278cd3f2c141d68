"""Checkpoints of both original repositories, there and back; the weights are those of the golden cases."""

import collections
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
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
from moeut_compose.train.errors import CheckpointError, RunError, RunNotFound

GOLDEN = Path(__file__).parents[1] / "golden"
CLEAN = [
    "moeut_g1",
    "moeut_g2",
    "moeut_g4_unshared",
    "moeut_ff_k1_big_d_head",
    "moeut_single_attention_expert",
]
TRAINING = {
    "dense_pre_norm": {"transformer.variant": "preln_rope"},
    "dense_post_norm": {"transformer.variant": "rope"},
    "moeut_peri_abab": {"transformer.variant": "preln_moe_universal", "moe.nonorm": 1},
    "moeut_peri_aabb": {
        "transformer.variant": "preln_moe_universal",
        "moe.nonorm": 1,
        "transformer.universal.group_type": "aabb",
    },
    "moeut_pre": {"transformer.variant": "preln_moe_universal"},
    "moeut_post": {"transformer.variant": "moe_universal"},
    "sut_act": {"transformer.variant": "actsut_universal"},
    "sut_no_act": {"transformer.variant": "sut_universal"},
}


class Golden:
    """An archive: weights under the original names, configuration, and what the original computed."""

    def __init__(self, name: str) -> None:
        with safe_open(str(GOLDEN / f"{name}.safetensors"), "pt") as archive:
            keys = archive.keys()
            tensors = {key: archive.get_tensor(key) for key in keys}
            self.config: dict[str, Any] = json.loads(archive.metadata()["config"])
        self.weights = {key[6:]: value.float() for key, value in tensors.items() if key.startswith("param.")}
        self.ids, self.logits = tensors["tokens"][:, :-1], tensors["eval_logits"]


class DotDict(dict):
    """As the training code has it: what `state` is pickled as."""

    def __getattr__(self, item: str) -> Any:
        return self[item]

    __setattr__ = dict.__setitem__


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


def arguments(name: str, golden: Golden) -> dict[str, Any]:
    """The command line of a golden case, numbers as the parser of the training code keeps them."""
    config = golden.config
    given = {
        "transformer.variant": "",
        "state_size": config["d_model"],
        "transformer.encoder_n_layers": config["n_layers"],
        "transformer.n_heads": config.get("n_heads", 8),
        "transformer.head_projection_size": str(config["d_head"]),
        "transformer.universal.group_size": config["group_size"],
        "lm.trafo.context_blocks": 0,
        "lm.trafo.norm_input": int(config["norm_input"]),
        "lm.unroll": 16,
        "task": "pes2o_transformer",
        "batch_size": 64,
        "n_microbatch": "2",
        "lr": 0.00025,
        "min_lr_multiplier": 0.1,
        "wd": 0.01,
        "lr_warmup": 4000,
        "lr_sched.type": "cos",
        "grad_clip": "0.25",
        "stop_after": "100000",
        "moe.perplexity_reg": config.get("entropy_reg", 0.0),
        "moe.att.perplexity_reg": str(config.get("att_entropy_reg", "none")),
        "moe.att.enable": 1,
        "moe.att.q_expert": 0,
        "moe.att.k_expert": 0,
        "moa.miloss": config.get("mi_loss", 0.0),
        "transformer.act_loss": config.get("act_loss", 0.0),
        "sut.max_relative_positions": config.get("max_relative_positions", 64),
    }
    if "d_ff" in config:
        given["transformer.ff_multiplier"] = config["d_ff"] / config["d_model"]
    names = {
        "ff_n_experts": "moe.n_experts",
        "ff_expert_size": "moe.expert_size",
        "ff_k": "pkm.n_heads",
        "att_n_experts": "moe.att.n_experts",
        "att_k": "moe.att.k",
        "att_expert_size": "moe.att.expert_size",
    }
    given |= {theirs: config[ours] for ours, theirs in names.items() if ours in config}
    return given | TRAINING[name]


def training_checkpoint(name: str, golden: Golden, path: Path, dictionary: type = dict) -> Path:
    """What the training code's saver writes."""
    counters = {
        f"unique_layers.{layer}.pkm.{counter}": torch.zeros(3)
        for layer in range(golden.config["group_size"])
        for counter in ("iter", "kv_sel_counts_100")
        if "pkm.keys" in " ".join(golden.weights)
    }
    state = dictionary()
    state.update(
        {"iter": 1234, "epoch": 0, "best_losses": {"val": {"iter": 3, "loss": 1.5, "accuracy": 0.5}}}
    )
    parameters = [torch.nn.Parameter(torch.ones(2))]
    content = {
        "state": state,
        "run_invariants": {"args": arguments(name, golden), "wandb_id": {"project": "x", "run_id": "y"}},
        "sampler": {},
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
        "model": collections.OrderedDict(golden.weights | counters),
        "interface": {},
        "optimizer": torch.optim.AdamW(parameters).state_dict(),
    }
    torch.save(content, path)
    return path


def check_logits(run: Path, golden: Golden) -> None:
    loaded = mc.load_run(run)
    with torch.no_grad():
        logits = loaded.model(golden.ids).logits
    torch.testing.assert_close(logits.double(), golden.logits, rtol=1e-4, atol=1e-4)


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


class Bomb:
    """What a hostile checkpoint would bring."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


class Harmless:
    """Not hostile, and yet unknown."""


@pytest.mark.parametrize("origin", ["moeut", "moeut-training"])
def test_nothing_of_a_checkpoint_is_executed(
    origin: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {"embedding.weight": torch.zeros(2, 2)}, "state": Bomb()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"refused to import (builtins|__builtin__)\.print"):
        read_original(tmp_path / "a.pth", origin=origin)
    assert "executed" not in capsys.readouterr().out


def test_unknown_classes_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": {}, "extra": Harmless()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"refused to import .*test_checkpoints\.Harmless"):
        read_original(tmp_path / "a.pth", origin="moeut")


def test_numbers_of_numpy_are_welcome(tmp_path: Path) -> None:
    import numpy as np

    golden = Golden("moeut_g2")
    content = {
        "model": golden.weights,
        "config": golden.config,
        "loss": np.float64(1.5),
        "curve": np.arange(3.0),
    }
    torch.save(content, tmp_path / "a.pth")
    assert read_original(tmp_path / "a.pth", origin="moeut").spec().depth == 4


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="not a PyTorch file"):
        read_original(tmp_path / "a.pth", origin="moeut")
    torch.save({"a": 1}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="is it of format moeut"):
        read_original(tmp_path / "b.pth", origin="moeut-training")
    torch.save({"embedding.weight": torch.zeros(2, 2)}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="says nothing of its configuration"):
        read_original(tmp_path / "c.pth", origin="moeut")
    with pytest.raises(RunNotFound, match="does not exist"):
        read_original(tmp_path / "d.pth", origin="moeut")
    with pytest.raises(CheckpointError, match=r"it holds a\.pth, b\.pth, c\.pth"):
        read_original(tmp_path, origin="moeut")


def test_a_truncated_file(tmp_path: Path) -> None:
    golden = Golden("moeut_g2")
    torch.save(golden.weights, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        read_original(tmp_path / "a.pth", origin="moeut")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.variant": "preln_moe_parallel"}, "transformer.variant=preln_moe_parallel"),
        ({"moe.selection_mode": "gate"}, "moe.selection_mode=gate"),
        ({"moe.att.q_expert": 1}, "moe.att.q_expert=1"),
        ({"lm.trafo.context_blocks": 1}, "lm.trafo.context_blocks=1"),
        ({"transformer.embedding_scale": "3.0"}, "transformer.embedding_scale=3.0"),
        ({"transformer.activation": "gelu"}, "transformer.activation=gelu"),
    ],
)
def test_architectures_that_no_spec_describes_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    golden = Golden("moeut_peri_abab")
    path = training_checkpoint("moeut_peri_abab", golden, tmp_path / "a.pth")
    content = torch.load(path, weights_only=True)
    content["run_invariants"]["args"] |= change
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        read_original(path, origin="moeut-training")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    golden = Golden("moeut_g2")
    config = golden.config | {"ff_n_experts": 7}
    torch.save({"model": golden.weights, "config": config}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"does not fit.*feedforward"):
        import_checkpoint(read_original(tmp_path / "a.pth", origin="moeut"), tmp_path / "run")
    extra = golden.weights | {"transformer.layers.0.attention.bias": torch.zeros(1)}
    torch.save({"model": extra, "config": golden.config}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="unknown parameter name"):
        import_checkpoint(read_original(tmp_path / "b.pth", origin="moeut"), tmp_path / "run")


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
