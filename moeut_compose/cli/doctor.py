"""`doctor`: what is installed here, what will run, and whether it computes the right thing."""

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeut_compose.cli.arguments import JsonOption
from moeut_compose.cli.devices import import_torch
from moeut_compose.cli.failures import failed
from moeut_compose.cli.output import print_json

if TYPE_CHECKING:
    import torch

VARIABLES = {
    "MOEUT_COMPOSE_BACKEND": "implementation of the expert products",
    "MOEUT_COMPOSE_CACHE": "folder for tokenizers and token files",
    "MOEUT_COMPOSE_PATH": "folders with specs of your own",
    "MOEUT_COMPOSE_RUNS": "folder for new runs",
    "MOEUT_KERNELS_CACHE": "folder for tuned tiles",
    "MOEUT_KERNELS_TUNED": "0 leaves tuned tiles unread",
}
TOLERANCE = 2e-3
"""Relative error of a float32 product, with room for matrix units that round their inputs to TF32."""


def doctor(as_json: JsonOption = False) -> None:
    """Show versions, devices, the implementation of expert products on each, settings and folders, and check them.

    The check takes a small layer of experts forward and backward on every device and implementation and compares with
    the definition in float64. Exit code 1 if one of them fails.

    **Examples**

    - `moeut-compose doctor`
    - `MOEUT_COMPOSE_BACKEND=torch moeut-compose doctor --json`
    """
    report = examine()
    if as_json:
        print_json(report)
    else:
        _print(report)
    broken = [f"{check['backend']} on {check['device']}" for check in report["checks"] if not check["ok"]]
    if broken:
        raise failed(f"the self-check failed: {', '.join(broken)}")


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows, as plain data."""
    import_torch()
    from moeut_compose.train.device import choose_device
    from moeut_compose.train.folder import environment, runs_root

    found = environment([], choose_device())
    devices = _devices()
    return {
        "versions": {
            "moeut-compose": found["moeut_compose"],
            "python": found["python"],
            **found["packages"],
            "cuda": _cuda_version(),
        },
        "platform": found["platform"],
        "executable": sys.executable,
        "devices": devices,
        "backends": {kind: _choice(kind) for kind in ("cpu", "cuda")},
        "tuned_tiles": [_tuned_tiles(entry["device"]) for entry in devices if entry["type"] == "cuda"],
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "cache": _folder(_cache_root()),
        "runs": _folder(runs_root().absolute()),
        "checks": [
            _check(device, backend)
            for device in dict.fromkeys(entry["type"] for entry in devices)
            for backend in _backends(device)
        ],
    }


def _cuda_version() -> str | None:
    import torch

    return torch.version.cuda


def _devices() -> list[dict[str, Any]]:
    import torch

    from moeut_compose.measure.hardware import peak_tflops
    from moeut_compose.train.device import choose_precision, describe_device, free_memory

    places = [torch.device("cpu")]
    places += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [
        {
            "device": str(place),
            "type": place.type,
            "name": describe_device(place),
            "precision": choose_precision("auto", place).name,
            "peak_tflops": peak_tflops(describe_device(place), choose_precision("auto", place).name),
            "free_memory": free_memory(place),
        }
        for place in places
    ]


def _choice(kind: str) -> dict[str, str]:
    """The implementation that a float32 product on such a device takes, and the reason."""
    import moeut_kernels
    import torch
    from moeut_kernels.backend import TRITON_IS_INSTALLED

    if kind == "cuda" and not torch.cuda.is_available():
        return {"backend": "none", "why": "no CUDA device is available"}
    requested = moeut_kernels.backend()
    chosen = moeut_kernels.resolve(torch.empty(1, device=kind))
    if requested != "auto":
        why = f"MOEUT_COMPOSE_BACKEND={requested}"
    elif kind == "cpu":
        why = "auto: PyTorch's grouped matrix product; bmm, its batched one, where experts have little to multiply"
    else:
        why = "auto: Triton is installed" if TRITON_IS_INSTALLED else "auto: Triton is not installed"
    return {"backend": chosen, "why": why}


def _tuned_tiles(device: str) -> dict[str, Any]:
    """Whether products of this device take tiles from a file of `bench kernels --tune`, and which."""
    import torch
    from moeut_kernels import tuned_tiles
    from moeut_kernels.backend import TRITON_IS_INSTALLED

    if not TRITON_IS_INSTALLED:
        return {"device": device, "file": None, "in_use": False, "problem": None, "products": []}
    found = tuned_tiles.look_up(torch.device(device))
    return {
        "device": device,
        "file": str(found.path),
        "in_use": bool(found.tiles) and tuned_tiles.is_enabled(),
        "problem": found.problem,
        "products": list(found.tiles),
    }


def _backends(kind: str) -> list[str]:
    from moeut_kernels.backend import TRITON_IS_INSTALLED

    if kind == "cpu":
        return ["torch", "grouped_mm", "bmm"]
    return ["torch", "grouped_mm"] + (["triton"] if TRITON_IS_INSTALLED else [])


def _check(device: str, backend: str) -> dict[str, Any]:
    """A small layer of experts, forward and backward, against the definition in float64."""
    import torch

    result: dict[str, Any] = {"device": device, "backend": backend, "error": None, "message": None}
    try:
        expected = _forward_backward("cpu", "torch", torch.float64)
        got = _forward_backward(device, backend, torch.float32)
    except (RuntimeError, ValueError, NotImplementedError, ImportError, OSError) as error:
        return result | {"ok": False, "message": str(error).splitlines()[0] if str(error) else repr(error)}
    errors = [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
    if not all(map(math.isfinite, errors)):
        return result | {"ok": False, "message": "a result is not finite"}
    return result | {"ok": max(errors) <= TOLERANCE, "error": max(errors)}


def _forward_backward(device: str, backend: str, dtype: "torch.dtype") -> list["torch.Tensor"]:
    """Output and gradients of rows, gates and both weights."""
    import moeut_kernels as mk
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    x, up, down, gate = draw(24, 32), draw(6, 32, 16), draw(6, 16, 32), draw(24, 1, 2)
    index = torch.randint(0, 6, (24, 1, 2), generator=generator).to(device)
    with mk.use_backend(backend):
        y = mk.expert_feedforward(x, up, down, mk.plan(index, 6), gate, activation="silu")
        gradients = torch.autograd.grad(y.square().sum(), [x, up, down, gate])
    return [y.detach(), *gradients]


def _cache_root() -> Path:
    from platformdirs import user_cache_path

    chosen = os.environ.get("MOEUT_COMPOSE_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("moeut-compose")


def _folder(path: Path) -> dict[str, Any]:
    """A folder, whether one can write to it, or to where it would be created."""
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    return {
        "path": str(path),
        "exists": path.is_dir(),
        "writable": nearest.is_dir() and os.access(nearest, os.W_OK),
    }


def _print(report: dict[str, Any]) -> None:
    sections: dict[str, list[tuple[str, str]]] = {
        "versions": [(name, version or "not installed") for name, version in report["versions"].items()],
        "devices": [
            (entry["device"], f"{entry['name']}, {entry['precision']}, {_peak(entry['peak_tflops'])}")
            for entry in report["devices"]
        ],
        "expert products": [
            *(
                (kind, f"{choice['backend']} ({choice['why']})")
                for kind, choice in report["backends"].items()
            ),
            *((f"tiles on {entry['device']}", _describe_tiles(entry)) for entry in report["tuned_tiles"]),
        ],
        "settings": [
            (name, report["variables"][name] or f"not set ({meaning})") for name, meaning in VARIABLES.items()
        ],
        "folders": [(name, _describe_folder(report[name])) for name in ("cache", "runs")],
        "self-check": [
            (f"{check['backend']} on {check['device']}", _verdict(check)) for check in report["checks"]
        ],
    }
    width = max(len(name) for lines in sections.values() for name, _ in lines)
    for title, lines in sections.items():
        print(title)
        for name, text in lines:
            print(f"  {name:<{width}}  {text}")


def _peak(tflops: float | None) -> str:
    return "peak not known" if tflops is None else f"peak {tflops:g} TFLOP/s"


def _describe_tiles(entry: dict[str, Any]) -> str:
    if entry["problem"] is not None:
        return f"static; {entry['file']} is ignored: {entry['problem']}"
    if not entry["products"]:
        return "static (`moeut-compose bench kernels --tune` looks for faster ones)"
    if not entry["in_use"]:
        return f"static; MOEUT_KERNELS_TUNED is off, {entry['file']} is not read"
    return f"tuned for {', '.join(entry['products'])}, from {entry['file']}"


def _describe_folder(folder: dict[str, Any]) -> str:
    notes = [] if folder["exists"] else ["not there yet"]
    notes += [] if folder["writable"] else ["not writable"]
    suffix = f" ({', '.join(notes)})" if notes else ""
    return f"{folder['path']}{suffix}"


def _verdict(check: dict[str, Any]) -> str:
    if check["message"] is not None:
        return f"failed: {check['message']}"
    return f"{'ok' if check['ok'] else 'WRONG'} (relative error {check['error']:.1e})"
