"""The counts of every built-in architecture, kept in files: a change of one is a decision, and is seen in review.

python tests/measure/golden.py     writes tests/measure/golden/ anew, from the closed form
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "golden"


def counts_of(name: str) -> dict[str, Any]:
    """Parameters and multiply-accumulates per token at the context length, by component, in both conventions."""
    from moeut_compose.measure.macs import count_macs
    from moeut_compose.measure.params import count_params, params_by_component
    from moeut_compose.measure.phases import count_cache
    from moeut_compose.spec.io import load_spec

    spec = load_spec(name)
    params = count_params(spec).to_dict()
    del params["name"]
    try:
        paper = count_macs(spec, convention="paper").by_component
    except ValueError:  # the published formula is undefined here
        paper = None
    return {
        "params": params,
        "params_by_component": params_by_component(spec),
        "seq_len": spec.context_length,
        "macs_exact": count_macs(spec).by_component,
        "macs_paper": paper,
        "cache_values_per_token": count_cache(spec).values_per_token,
    }


def file_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


def main() -> None:
    """Write all files, and take away those of architectures that are gone."""
    from moeut_compose.spec.find import list_specs

    for old in FOLDER.rglob("*.json"):
        old.unlink()
    for spec in list_specs("architectures"):
        path = file_of(spec.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(counts_of(spec.name), indent=1) + "\n")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    main()
