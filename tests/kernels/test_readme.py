"""The example of the README runs, and gives a gradient to everything that learns."""

from __future__ import annotations

from pathlib import Path

import moeut_kernels as mk


def test_example_runs():
    text = (Path(mk.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code, names)
    assert names["y"].shape == names["x"].shape
    assert all(names[name].grad.abs().sum() > 0 for name in ("x", "w_up", "w_down"))
