"""Reading PyTorch files that hold more than weights, without running anything they bring along.

`torch.load` reads plain tensors and containers safely. Checkpoints of the training code also hold
dictionaries of its own framework; these become plain ones here. Whatever else a file asks to import is
refused by name.
"""

from __future__ import annotations

import collections
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any

import torch

from moeut_compose.train.errors import CheckpointError

_PLAIN = {
    **{
        ("builtins", kind.__name__): kind
        for kind in (bool, bytearray, bytes, complex, dict, float, frozenset)
    },
    **{("builtins", kind.__name__): kind for kind in (int, list, range, set, slice, str, tuple)},
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}
_FRAMEWORK_DICTIONARIES = ("DotDict", "DotDefaultDict")
_TENSOR_BUILDERS = ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
_NUMPY_BUILDERS = ("dtype", "ndarray", "scalar", "_reconstruct")


class Dictionary(dict[Any, Any]):
    """Stands for a dictionary of the framework: the items, and none of its behaviour."""

    def __setstate__(self, state: object) -> None:
        """Attributes are not kept."""


class Refused(pickle.UnpicklingError):
    """A file asks for something that is neither a tensor nor a plain value."""


class RestrictedUnpickler(pickle.Unpickler):
    """Builds tensors, numbers and containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What a global of the file stands for. Raises `Refused` naming it."""
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module.startswith("framework.") and name in _FRAMEWORK_DICTIONARIES:
            return Dictionary
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module == "torch._utils" and name in _TENSOR_BUILDERS) or _is_numpy(module, name):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how numbers of numpy keep their bytes
            return super().find_class(module, name)
        raise Refused(f"{module}.{name}")


def _is_numpy(module: str, name: str) -> bool:
    root = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    return root and name in _NUMPY_BUILDERS


def load_safely(path: Path) -> Any:
    """The content of a PyTorch file, on the CPU.

    Raises `CheckpointError` if the file is none, or asks for anything but tensors, numbers and containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).name for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a PyTorch file of version 1.6 or later: {error}") from error
    if "data.pkl" not in names or "constants.pkl" in names:
        raise CheckpointError(f"{path} holds a program or something else than a PyTorch checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass  # more than weights: read it with the list above
    reader: Any = types.SimpleNamespace(Unpickler=RestrictedUnpickler, __name__=__name__)
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)
    except Refused as error:
        raise CheckpointError(
            f"{path}: refused to import {error}; a checkpoint needs tensors, numbers and containers only, and "
            "loading anything else could run a program"
        ) from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
