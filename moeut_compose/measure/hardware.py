"""Peak speeds and memory bandwidths of devices by exact name, and how much of one a training step uses.

The figures are those of the makers' data sheets for dense 16-bit matrix products with float32 accumulation, at the
boost clock and without sparsity. A device that is not listed has no known peak: nothing is guessed from similar names.
"""

from typing import Literal

Precision = Literal["bf16", "fp16", "fp32"]

FLOPS_PER_MAC = 6
"""One multiplication and one addition, forward and twice backward."""

BF16_TFLOPS: dict[str, float] = {
    "NVIDIA B200": 2250.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A30": 165.0,
    "NVIDIA A40": 149.7,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
}
"""Devices that compute equally fast in bfloat16 and float16."""

FP16_TFLOPS: dict[str, float] = {
    "Tesla T4": 65.0,
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla V100-SXM2-32GB": 125.0,
    "Tesla V100-PCIE-16GB": 112.0,
    "Tesla V100-PCIE-32GB": 112.0,
}
"""Devices whose matrix units know float16 alone."""

GIGABYTES_PER_SECOND: dict[str, float] = {
    "NVIDIA B200": 8000.0,
    "NVIDIA H200": 4800.0,
    "NVIDIA H100 80GB HBM3": 3350.0,
    "NVIDIA H100 NVL": 3900.0,
    "NVIDIA H100 PCIe": 2000.0,
    "NVIDIA GH200 480GB": 4000.0,
    "NVIDIA A100-SXM4-40GB": 1555.0,
    "NVIDIA A100-SXM4-80GB": 2039.0,
    "NVIDIA A100-PCIE-40GB": 1555.0,
    "NVIDIA A100 80GB PCIe": 1935.0,
    "NVIDIA A30": 933.0,
    "NVIDIA A40": 696.0,
    "NVIDIA L4": 300.0,
    "NVIDIA L40": 864.0,
    "NVIDIA L40S": 864.0,
    "NVIDIA RTX A6000": 768.0,
    "NVIDIA GeForce RTX 3090": 936.0,
    "NVIDIA GeForce RTX 4090": 1008.0,
    "Tesla T4": 320.0,
    "Tesla V100-SXM2-16GB": 900.0,
    "Tesla V100-SXM2-32GB": 900.0,
    "Tesla V100-PCIE-16GB": 900.0,
}
"""Device memory."""


def memory_bandwidth(device_name: str) -> float | None:
    """Bytes a second of a device's memory, named as its driver names it; None where no figure is known."""
    gigabytes = GIGABYTES_PER_SECOND.get(device_name)
    return None if gigabytes is None else 1e9 * gigabytes


def peak_tflops(device_name: str, precision: Precision) -> float | None:
    """Peak TFLOP/s of a device, named as its driver names it; None where no figure is known, as for float32."""
    match precision:
        case "bf16":
            return BF16_TFLOPS.get(device_name)
        case "fp16":
            return BF16_TFLOPS.get(device_name, FP16_TFLOPS.get(device_name))
        case "fp32":
            return None


def model_flops_utilisation(
    macs_per_token: int, tokens_per_second: float, peak: float | None
) -> float | None:
    """Share of `peak` TFLOP/s that training uses: 6 x MACs x speed / peak; None where the peak is not known.

    `macs_per_token` are exact ones of the forward pass. What is computed twice to save memory does not count.
    """
    if peak is None:
        return None
    return FLOPS_PER_MAC * macs_per_token * tokens_per_second / (peak * 1e12)
