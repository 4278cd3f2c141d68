"""Every golden archive of the original code, in float64 and float32."""

from pathlib import Path

import moeut_kernels as mk
import pytest
import run_case
import torch

CASES = sorted(Path(__file__).parent.glob("*.safetensors"))


def test_all_archives_are_here() -> None:
    assert len(CASES) == 14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_agrees_with_the_original_code(path: Path, dtype: torch.dtype) -> None:
    result = run_case.run(path, dtype)
    assert result["ok"], result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "path", [path for path in CASES if "peri" in path.stem or "_g" in path.stem], ids=lambda path: path.stem
)
def test_agrees_through_fans(path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums, norms and casts in one pass, as where Triton trains."""
    made = []
    monkeypatch.setattr(mk, "fans", lambda x: torch.is_grad_enabled())
    norm_fan = mk.norm_fan
    monkeypatch.setattr(mk, "norm_fan", lambda *a, **k: made.append(1) or norm_fan(*a, **k))
    result = run_case.run(path, dtype)
    assert result["ok"], result
    assert made


@pytest.mark.gpu
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_agrees_on_a_gpu_in_float32(path: Path) -> None:
    result = run_case.run(path, torch.float32, device="cuda")
    assert result["ok"], result


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    case = run_case.Case.read(CASES[0])
    case.tensors["param.embedding.weight"][3] *= 1.001
    errors = run_case.run_single(case, torch.float64)
    assert errors["train_logits"] > 1e-6
