"""torch, and the device that a command works on: loaded only when a command needs them."""

from typing import TYPE_CHECKING, Annotated

import typer

from moeut_compose.cli.failures import failed, leaving_on_interrupt, wrong_usage

if TYPE_CHECKING:
    import torch

DeviceOption = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]


def import_torch() -> None:
    """The slow part of every command here."""
    with leaving_on_interrupt():
        import torch  # noqa: F401
    try:
        import moeut_kernels.backend  # noqa: F401
    except ValueError as error:  # what the environment asks for does not exist
        raise failed(str(error)) from None


def named_device(name: str) -> "str | torch.device":
    if name == "auto":
        return name
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise wrong_usage(f"--device {name}: not a device; write auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise wrong_usage(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
