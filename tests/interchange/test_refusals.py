"""What is not read: programs in checkpoints, damaged files, architectures and weights that do not fit."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from moeut_compose.interchange.checkpoints import import_checkpoint, read_original
from moeut_compose.train.errors import CheckpointError, RunNotFound
from tests.interchange.originals import Golden, training_checkpoint


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
    with pytest.raises(CheckpointError, match=r"refused to import .*test_refusals\.Harmless"):
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
