"""Replay golden archives of the original code: `python tests/golden/run_case.py CASE.safetensors... [--dtype float32]`.

Prints one JSON line a case, exits with 1 if any case differs by more than it may (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from safetensors import safe_open
from torch import Tensor

from moeut_compose.blocks.model import LanguageModel
from moeut_compose.build import build_model
from moeut_compose.interchange.configs import Origin, spec_from_config
from moeut_compose.interchange.names import to_ours
from moeut_compose.spec.recipe import AdamWSpec, CosineSchedule
from moeut_compose.train.optim import build_optimizer, clip_gradients
from moeut_compose.train.schedule import lr_at

TOLERANCE = {
    torch.float64: {"ce": 1e-8, "lr": 1e-12, "default": 1e-6},
    torch.float32: {"ce": 1e-5, "lr": 1e-12, "default": 1e-4},
}


@dataclass(frozen=True)
class Case:
    """One archive: what the original computed, from which weights and settings."""

    name: str
    config: dict[str, Any]
    train: dict[str, Any]
    vocab_size: int
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path, device: str = "cpu") -> Case:
        with safe_open(str(path), "pt", device=device) as archive:
            metadata = archive.metadata()
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 - not a dict
        return cls(
            name=metadata["case"],
            config=json.loads(metadata["config"]),
            train=json.loads(metadata.get("train", "{}")),
            vocab_size=int(metadata["vocab"]),
            tensors=tensors,
        )

    @property
    def origin(self) -> Origin:
        clean = any(name.startswith("param.transformer.layers.") for name in self.tensors)
        return "moeut" if clean else "moeut-training"

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Tensors named `prefix.NAME`, under our names."""
        n_heads = self.config.get("n_heads", 1)
        found = {
            k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")
        }
        return to_ours(found, n_heads=n_heads)

    def build(self, dtype: torch.dtype) -> LanguageModel:
        spec = spec_from_config(
            self.config,
            origin=self.origin,
            vocab_size=self.vocab_size,
            context_length=self.tensors["tokens"].shape[-1],
            name=self.name,
        )
        model = build_model(spec, dtype=dtype, device=self.tensors["tokens"].device)
        model.load_state_dict(
            {name: tensor.to(dtype) for name, tensor in self.below("param").items()}, strict=True
        )
        return model


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; the plain norm where nothing is wanted."""
    difference, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    return difference / size if size > 1e-12 else difference


def worst(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The largest relative difference over tensors that must have equal names."""
    if got.keys() != want.keys():
        raise ValueError(f"parameters differ: {sorted(got.keys() ^ want.keys())}")
    return max(relative(got[name], want[name]) for name in want)


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def run_single(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Logits, losses and gradients of one batch."""
    model, tokens = case.build(dtype), case.tensors["tokens"]
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    model.train()
    cross_entropy = model(ids, targets=targets)
    train_logits = model(ids).logits
    regulariser = sum(cross_entropy.losses.values(), start=tokens.new_zeros((), dtype=dtype))
    (cross_entropy.cross_entropy + regulariser).backward()
    model.eval()
    with torch.no_grad():
        eval_logits = model(ids).logits
    errors = {
        "train_logits": relative(train_logits.detach(), case.tensors["train_logits"]),
        "eval_logits": relative(eval_logits, case.tensors["eval_logits"]),
        "ce": relative(cross_entropy.cross_entropy.detach().reshape(1), case.tensors["ce"]),
        "reg_loss": relative(regulariser.detach().reshape(1), case.tensors["reg_loss"]),
    }
    wanted = case.below("grad")
    if wanted:
        errors["grad"] = worst(gradients(model), wanted)
    return errors


def run_trajectory(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Optimiser steps one after the other, with the training code of the package."""
    model, settings = case.build(dtype), case.train
    adamw = AdamWSpec(
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    schedule = CosineSchedule(
        warmup_steps=settings["warmup_steps"],
        min_lr_multiplier=settings["min_lr_multiplier"],
        period=settings["cosine_steps"],
    )
    optimizer = build_optimizer(model, adamw)
    series: dict[str, list[float]] = {"lr": [], "ce": [], "reg_loss": [], "grad_norm": []}
    model.train()
    for step, tokens in enumerate(case.tensors["tokens"]):
        lr = lr_at(step, schedule, adamw.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        out = model(tokens[:, :-1], targets=tokens[:, 1:])
        regulariser = sum(out.losses.values(), start=tokens.new_zeros((), dtype=dtype))
        optimizer.zero_grad()
        (out.cross_entropy + regulariser).backward()
        norm = clip_gradients(model.parameters(), settings["grad_clip"])
        optimizer.step()
        for name, value in zip(series, (lr, out.cross_entropy, regulariser, norm), strict=True):
            series[name].append(float(value.detach() if isinstance(value, Tensor) else value))
    errors = {
        name: relative(torch.tensor(values, dtype=torch.float64), case.tensors[name].reshape(-1).cpu())
        for name, values in series.items()
    }
    errors["final"] = worst(dict(model.state_dict()), case.below("final"))
    return errors


def run(path: Path, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Any]:
    """Replay one archive and judge it."""
    case = Case.read(path, device)
    errors = run_trajectory(case, dtype) if case.train else run_single(case, dtype)
    tolerance = TOLERANCE[dtype]
    ok = all(error <= tolerance.get(name, tolerance["default"]) for name, error in errors.items())
    return {"case": case.name, "max_rel_err": errors, "ok": ok}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "cases", nargs="*", type=Path, help="archives; all beside this file when none is named"
    )
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    cases = arguments.cases or sorted(Path(__file__).parent.glob("*.safetensors"))
    results = [run(path, getattr(torch, arguments.dtype), arguments.device) for path in cases]
    for result in results:
        print(json.dumps(result))
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
