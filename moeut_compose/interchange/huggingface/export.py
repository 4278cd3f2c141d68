"""A run as a folder that `transformers` loads, checked before anybody sees it.

The folder is written under another name, loaded in a process of its own that cannot import this package, compared
with the run, and only then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from moeut_compose.blocks.cache import Cache
from moeut_compose.interchange.huggingface import check
from moeut_compose.interchange.huggingface.files import write_files
from moeut_compose.progress import SilentReporter
from moeut_compose.train.errors import TrainError

if TYPE_CHECKING:
    from torch import Tensor

    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.data.tokenizer import Tokenizer
    from moeut_compose.progress import Reporter
    from moeut_compose.train.run import Run

EXTRA = "moeut-compose[hf]"
N_IDS, N_NEW = 32, 8
TEXTS = (
    "",
    " ",
    "The sea was calm, and 1,234 ships lay in the harbour.",
    "  two  spaces, a\ttab,\na line\n\n and the end  ",
    "ﬁne Ⅷ ½ naïve cafe\u0301 Ω ｆｕｌｌ \u200b\u00a0width\u3000",
    "日本語 🙂 שלום ٣ \u0000 \ufffd \ud800",
    "</s> <s> <unk> <pad> <0x41> ▁ <STORY_SEP>",
)
"""What tokenizers find hard: spaces, line ends, characters to normalise or unknown, names of control pieces."""


class ExportError(TrainError):
    """A run cannot be exported, or its export does not do what the run does."""


@dataclass(frozen=True)
class Export:
    """A finished export, and what was compared."""

    folder: Path
    relative_difference: float
    """Largest difference of two logits over the largest logit."""
    tolerance: float
    n_texts: int
    """Texts whose ids were compared; 0 without a tokenizer."""
    transformers: str
    """The version that loaded it."""


def export_run(run: Run, destination: Path, *, reporter: Reporter | None = None) -> Export:
    """Write `destination` for `transformers` and check that it gives the logits, tokens and ids of `run`.

    The model of `run` lies on the CPU in float32. Raises `ExportError`, and then leaves nothing behind, if
    `destination` is not empty, `transformers` is missing, or the export differs.
    """
    reporter = reporter or SilentReporter()
    require_transformers()
    place = destination.expanduser().resolve()
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise ExportError(f"{destination} is not empty; name another folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir()
        with reporter.task("writing the export", total=None):
            tokenizer = write_files(run, folder)
        with reporter.task("checking the export with transformers", total=None):
            result = check_folder(folder, run.model, tokenizer)
        if place.exists():
            place.rmdir()
        folder.rename(place)
    except SafetensorError as error:
        raise ExportError(f"cannot write {destination}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Export(destination, **result)


def require_transformers() -> None:
    """Raises `ExportError` unless there is a `transformers` that can load an export."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ExportError(
            f"this needs transformers 5, which is not installed: pip install '{EXTRA}'"
        ) from None
    if int(found.partition(".")[0]) < 5:
        raise ExportError(f"this needs transformers 5, and {found} is installed: pip install '{EXTRA}'")


def check_folder(folder: Path, model: LanguageModel, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Load the folder in another process and compare. Raises `ExportError` naming the first difference."""
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch, "expected.safetensors")
        write_expected(expected, model, tokenizer)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(Path(scratch, "modules")),
            "TRANSFORMERS_VERBOSITY": "error",
        }
        answer = Path(scratch, "result.json")
        command = [sys.executable, "-P", check.__file__, str(folder), str(expected), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ExportError(f"transformers cannot load the export: {last}")
        result = json.loads(answer.read_text(encoding="utf-8"))
    problem = result.pop("problem")
    if problem is not None:
        raise ExportError(f"the export differs from the run: {problem}")
    return {"n_texts": 0, **result}


def write_expected(
    path: Path, model: LanguageModel, tokenizer: Tokenizer | None, *, n_new: int = N_NEW
) -> None:
    """What the run answers: tensors in `path`, texts in the JSON document beside it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.embedding.num_embeddings, (2, N_IDS), generator=generator)
    with torch.no_grad():
        logits = model(ids).logits
    save_file({"ids": ids, "logits": logits, "written": greedy(model, ids, n_new)}, path)
    texts = [] if tokenizer is None else [described(text, tokenizer) for text in TEXTS]
    path.with_suffix(".json").write_text(json.dumps({"n_new": n_new, "texts": texts}), encoding="utf-8")


def described(text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """A text, its ids, and what they decode to."""
    ids = tokenizer.encode(text)
    return {"text": text, "ids": ids, "decoded": tokenizer.decode(ids)}


@torch.no_grad()
def greedy(model: LanguageModel, ids: Tensor, n_new: int) -> Tensor:
    """`ids [B, T]` and the likeliest `n_new` tokens after them."""
    cache: Cache | None = Cache()
    new = ids
    for _ in range(n_new):
        out = model(new, cache=cache)
        cache, new = out.cache, out.logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, new), dim=1)
    return ids
