"""Compose, train, count and compare Transformers that share weights over depth and route tokens to experts.

Names are imported on first use, so that reading and counting specs never waits for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moeut_compose.blocks.cache import Cache as Cache
    from moeut_compose.build import build_model as build_model
    from moeut_compose.generate import Generator as Generator
    from moeut_compose.generate import Sampling as Sampling
    from moeut_compose.measure.macs import count_macs as count_macs
    from moeut_compose.measure.params import count_params as count_params
    from moeut_compose.spec.io import load_recipe as load_recipe
    from moeut_compose.spec.io import load_spec as load_spec
    from moeut_compose.train.run import load_run as load_run

_HOMES = {
    "Cache": "moeut_compose.blocks.cache",
    "Generator": "moeut_compose.generate",
    "Sampling": "moeut_compose.generate",
    "build_model": "moeut_compose.build",
    "count_macs": "moeut_compose.measure.macs",
    "count_params": "moeut_compose.measure.params",
    "load_recipe": "moeut_compose.spec.io",
    "load_run": "moeut_compose.train.run",
    "load_spec": "moeut_compose.spec.io",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
