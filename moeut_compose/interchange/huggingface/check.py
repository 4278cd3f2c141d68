"""Load an export as a stranger would and compare it with what the exporter saw.

Run as a program of its own, `python check.py FOLDER EXPECTED RESULT`, in an environment that has `transformers`
and, to prove that the folder stands alone, may not import this package. RESULT is a JSON document.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

TOLERANCE = 1e-5
"""Largest difference of two logits, relative to the largest logit."""

HIDDEN = ("moeut_compose", "moeut_kernels")


def check(folder: Path, expected_file: Path) -> dict[str, Any]:
    """What was compared, and the first thing that differs (`problem`, None if nothing does)."""
    from transformers import AutoModelForCausalLM

    expected = json.loads(expected_file.with_suffix(".json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    result: dict[str, Any] = {"transformers": importlib.metadata.version("transformers")}
    result |= check_model(model, expected_file, expected["n_new"])
    if result["problem"] is None and expected["texts"]:
        result |= check_tokenizer(folder, expected["texts"])
    return result


def check_model(model: Any, expected_file: Path, n_new: int) -> dict[str, Any]:
    """Logits of given ids, and what greedy decoding with the cache writes after them."""
    import torch
    from safetensors.torch import load_file

    expected = load_file(expected_file)
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    largest = float(expected["logits"].abs().max())
    difference = float((logits - expected["logits"]).abs().max()) / max(largest, 1e-30)
    result = {"relative_difference": difference, "tolerance": TOLERANCE, "problem": None}
    if not difference <= TOLERANCE:  # not a number is a difference too
        return result | {
            "problem": f"logits differ by {difference:.1e} of the largest, beyond {TOLERANCE:.0e}"
        }
    model.generation_config.eos_token_id = None
    prompt = expected["ids"]
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n_new, do_sample=False, pad_token_id=0
    )
    if not torch.equal(written, expected["written"]):
        return result | {"problem": "greedy decoding with a cache writes other tokens"}
    return result


def check_tokenizer(folder: Path, texts: list[dict[str, Any]]) -> dict[str, Any]:
    """Ids of texts and the texts of ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for case in texts:
        ids = tokenizer(case["text"])["input_ids"]
        if ids != case["ids"]:
            return {"problem": f"the tokenizer gives {case['text']!r} other ids: {ids}, not {case['ids']}"}
        text = tokenizer.decode(ids)
        if text != case["decoded"]:
            return {"problem": f"the tokenizer decodes {ids} as {text!r}, not {case['decoded']!r}"}
    return {"n_texts": len(texts)}


if __name__ == "__main__":
    for package in HIDDEN:
        sys.modules[package] = None  # type: ignore[assignment]  # as if it were not installed
    folder, expected, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(check(folder, expected)), encoding="utf-8")
