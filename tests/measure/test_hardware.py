"""Utilisation is arithmetic over a peak that is known, or nothing."""

import pytest

from moeut_compose.measure.hardware import (
    BF16_TFLOPS,
    FP16_TFLOPS,
    model_flops_utilisation,
    peak_tflops,
)


@pytest.mark.parametrize(
    ("name", "bf16", "fp16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 989.4),
        ("NVIDIA H100 PCIe", 756.0, 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 312.0),
        ("Tesla V100-SXM2-32GB", None, 125.0),
        ("NVIDIA H100", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("nvidia h100 pcie", None, None),
        ("CPU, 2 threads (x86_64)", None, None),
        ("", None, None),
    ],
)
def test_only_exact_names_have_a_peak(name: str, bf16: float | None, fp16: float | None) -> None:
    assert peak_tflops(name, "bf16") == bf16
    assert peak_tflops(name, "fp16") == fp16
    assert peak_tflops(name, "fp32") is None


def test_no_device_is_listed_twice() -> None:
    assert not BF16_TFLOPS.keys() & FP16_TFLOPS.keys()


def test_utilisation_is_three_forward_passes_of_two_flops_each() -> None:
    assert model_flops_utilisation(1_000_000, 50_000_000, 1000.0) == pytest.approx(0.3)
    assert model_flops_utilisation(1_000_000, 50_000_000, None) is None
