"""Exports of every family, visited by `transformers` in one process that cannot import this repository."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from moeut_compose.data.tokenizer import Tokenizer
from moeut_compose.interchange.huggingface import check
from moeut_compose.interchange.huggingface.back import import_export, read_export
from moeut_compose.interchange.huggingface.export import TEXTS, write_expected
from moeut_compose.interchange.huggingface.files import write_files
from moeut_compose.spec.find import list_specs
from moeut_compose.spec.recipe import TrainSentencePiece
from moeut_compose.train.run import Run, load_run
from tests.interchange.huggingface.models import FAMILIES, family, small_run, tokenizer_of

pytestmark = pytest.mark.slow

VISITOR = Path(__file__).with_name("visitor.py")
ONCE = "moeut_tiny"
TOKENIZERS = {
    "bpe": {},
    "unigram": {"model_type": "unigram", "normalization": "nmt_nfkc_cf"},
    "bytes": {"byte_fallback": True, "remove_extra_whitespaces": False},
    "identity": {"normalization": "identity", "remove_extra_whitespaces": False, "split_digits": False},
}


def hard_texts(n: int = 300) -> list[str]:
    """Texts of everything that Unicode has, also what no keyboard writes."""
    dice = random.Random(4)
    ranges = [
        (32, 126),
        (9, 13),
        (160, 0x24F),
        (0x300, 0x36F),
        (0x3000, 0x30FF),
        (0xD800, 0xDFFF),
        (0x1F600, 0x1F64F),
    ]
    texts = []
    for _ in range(n):
        chosen = (dice.choice(ranges) for _ in range(dice.randrange(1, 20)))
        texts.append("".join(chr(dice.randint(*span)) for span in chosen))
    return json.loads(json.dumps([*TEXTS, *texts]))  # which joins neighbouring surrogates


def add_gradients(run: Run, path: Path) -> None:
    """What the run answers in training: the loss of a text and all its gradients."""
    expected = load_file(path)
    ids = expected["ids"]
    loss = F.cross_entropy(run.model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    for name, parameter in run.model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected[f"gradient.model.{name}"] = gradient
    save_file(expected | {"loss": loss.detach()}, path)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: tokenizer_of(TrainSentencePiece(**settings)) for name, settings in TOKENIZERS.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Tokenizer]) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("runs")
    return {name: small_run(root / name, family(name), tokenizer=tokenizers["bpe"]) for name in FAMILIES}


@pytest.fixture(scope="module")
def exports(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    folders = {}
    for name, run in runs.items():
        folders[name] = root / name.replace(" ", "-")
        folders[name].mkdir()
        tokenizer = write_files(run, folders[name])
        write_expected(folders[name] / "expected.safetensors", run.model, tokenizer, n_new=4)
        add_gradients(run, folders[name] / "expected.safetensors")
    return folders


@pytest.fixture(scope="module")
def seen(
    exports: dict[str, Path], tokenizers: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("visit")
    folders = [exports[ONCE], *(folder for name, folder in exports.items() if name != ONCE)]
    for name, tokenizer in tokenizers.items():
        run = small_run(root / "runs" / name, family("dense_tiny"), tokenizer=tokenizer)
        folders.append(root / name)
        folders[-1].mkdir()
        write_files(run, folders[-1])
    (root / "texts.json").write_text(json.dumps(hard_texts()))
    places = [VISITOR, check.__file__, root / "answers.json", root / "texts.json", *folders]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(root / "modules"),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-P", *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "answers.json").read_text())


def test_every_small_architecture_is_exported() -> None:
    names = {entry.name for entry in list_specs("architectures")}
    assert {name for name in names if name.endswith("_tiny")} <= set(FAMILIES)


def test_the_code_is_the_same_for_every_model(exports: dict[str, Path]) -> None:
    for kind in ("modeling", "configuration", "tokenization"):
        assert len({(folder / f"{kind}_moeut_compose.py").read_bytes() for folder in exports.values()}) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_does_what_the_run_does(name: str, runs: dict[str, Run], seen: dict[str, Any]) -> None:
    result = seen[name.replace(" ", "-")]
    assert result["problem"] is None
    assert result["relative_difference"] <= 1e-6
    assert result["gradients"] < 1e-4
    assert result["layers of the cache"] == runs[name].spec.depth
    assert result["half"] == "torch.bfloat16"


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_cache(name: str, seen: dict[str, Any]) -> None:
    """As without it, and in batches that are filled up on the left as alone."""
    result = seen[name.replace(" ", "-")]
    assert (result["sampled"], result["ragged"]) == (True, True)
    assert result["padding"] < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_back_again_bit_for_bit(name: str, runs: dict[str, Run], exports: dict[str, Path]) -> None:
    exported = read_export(exports[name])
    assert exported.spec == runs[name].spec
    assert (exported.step, exported.recipe, exported.notes) == (7, runs[name].recipe, [])
    weights, others = exported.model().state_dict(), runs[name].model.state_dict()
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        assert torch.equal(tensor, others[key]), key


def test_back_to_a_run(runs: dict[str, Run], exports: dict[str, Path], tmp_path: Path) -> None:
    import_export(read_export(exports[ONCE]), tmp_path / "run")
    back = load_run(tmp_path / "run")
    assert (back.spec, back.step, back.recipe) == (runs[ONCE].spec, 7, runs[ONCE].recipe)
    assert back.tokenizer.fingerprint == runs[ONCE].tokenizer.fingerprint
    ids = torch.arange(20)[None]
    assert torch.equal(back.model(ids).logits, runs[ONCE].model(ids).logits)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_are_those_of_training(
    name: str, tokenizers: dict[str, Tokenizer], seen: dict[str, Any]
) -> None:
    ids = tokenizers[name].encode_batch(hard_texts())
    assert seen[name]["ids"] == ids
    assert seen[name]["texts"] == [tokenizers[name].decode(each) for each in ids]
    assert seen[name]["length"] == tokenizers[name].vocab_size
    text, control = seen[name]["texts"][0], seen[name]["special"]
    assert seen[name]["odd"] == [f"{text}{control}{text}", tokenizers[name].decode(ids[0] * 2)]


def test_what_else_transformers_offers(
    seen: dict[str, Any], exports: dict[str, Path], tmp_path: Path
) -> None:
    once = seen["once"]
    assert once["kinds"] == ["transformers_modules"] * 3
    assert (once["beams"], once["lookup"], once["greedy"]) == (True, True, True)
    assert (once["checked"]["problem"], once["checked"]["n_texts"]) == (None, len(TEXTS))
    text, length = once["written"]
    assert "e" in text.removeprefix("The sea")
    assert length < 60
    short, long = once["padded"]
    assert short == sorted(short)
    assert 0 < sum(short) < len(short) == sum(long)
    assert once["fresh"] == pytest.approx(1.0, abs=0.05)
    assert "must be a DynamicCache" in once["static"]
    assert "not be offloaded" in once["offloaded"]
    assert "does not support" in once["checkpointing"]
    assert once["positions"] == "position_ids has no place in this model"
    assert "attention_mask has length 3" in once["mask"]


def test_what_was_trained_on_there_comes_back(
    seen: dict[str, Any], exports: dict[str, Path], tmp_path: Path
) -> None:
    """`save_pretrained` splits the weights over files and leaves the recipe out."""
    assert seen["once"]["tuned"]
    tuned = exports[ONCE] / "tuned"
    assert len(list(tuned.glob("*.safetensors"))) > 1
    exported = read_export(tuned)
    assert exported.notes == [f"{tuned} has no recipe.yaml: the run gets the default recipe"]
    import_export(exported, tmp_path / "run")
    before = load_file(exports[ONCE] / "model.safetensors")["model.embedding.weight"]
    assert torch.equal(load_run(tmp_path / "run").model.embedding.weight, before * 1.5)
