"""Compose, train and compare Transformer variants from YAML specs.

    import moeut_compose as mc

    spec = mc.load_spec("moeut_tiny", overrides=["stages.0.repeats=4"])
    model = mc.build_model(spec)

Names are imported when they are first used, so that specs and counts never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeut_compose.build import build_model
    from moeut_compose.measure.macs import count_macs
    from moeut_compose.measure.params import count_params
    from moeut_compose.spec.dump import dump_yaml
    from moeut_compose.spec.io import NotFound, SpecError, load_recipe, load_spec
    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.spec.recipe import RecipeSpec
    from moeut_compose.train.run import load_run

__version__ = "0.1.0"

__all__ = [
    "ModelSpec",
    "NotFound",
    "RecipeSpec",
    "SpecError",
    "__version__",
    "build_model",
    "count_macs",
    "count_params",
    "dump_yaml",
    "load_recipe",
    "load_run",
    "load_spec",
]

_HOMES = {
    "build_model": "build",
    "count_macs": "measure.macs",
    "count_params": "measure.params",
    "dump_yaml": "spec.dump",
    "NotFound": "spec.io",
    "SpecError": "spec.io",
    "load_recipe": "spec.io",
    "load_spec": "spec.io",
    "ModelSpec": "spec.model",
    "RecipeSpec": "spec.recipe",
    "load_run": "train.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
