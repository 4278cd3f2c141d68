"""Runs the cases of `test_sanitizer_cases.py` under compute-sanitizer: memory errors, races in shared memory, reads of
what was never written.

    python tests/kernels/sanitize.py [pytest options]

compute-sanitizer is looked for in COMPUTE_SANITIZER, on the PATH, in CUDA_HOME, and in the package
nvidia-cuda-sanitizer-api. Exit code 0: no tool found anything; 1: one did, or a test failed; 2: not run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "kernels" / "test_sanitizer_cases.py"
FOUND = 7
"""What compute-sanitizer returns where a test passed and the tool found errors."""

TOOLS = {
    # Libraries ask drivers for functions that old ones lack: such answers are no memory errors. Without padding a row
    # that is read beyond its end may belong to the next allocation.
    "memcheck": ["--report-api-errors", "no", "--padding", "512"],
    "racecheck": [],
    "initcheck": [],
}


def find() -> str | None:
    """The program, as a path."""
    folders = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"]
    spec = find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folders += [path.parent for path in sorted(Path(place).glob("*/bin/compute-sanitizer"))]
    search = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which(os.environ.get("COMPUTE_SANITIZER") or "compute-sanitizer", path=search)


def command(sanitizer: str, tool: str, options: list[str]) -> list[str]:
    """The tests under a tool, or under nothing."""
    limits = [
        "--target-processes",
        "application-only",
        "--launch-timeout",
        "120",
        "--error-exitcode",
        str(FOUND),
    ]
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        str(CASES),
        *options,
    ]
    return tests if tool == "nothing" else [sanitizer, "--tool", tool, *limits, *TOOLS[tool], *tests]


def main(options: list[str]) -> int:
    sanitizer = find()
    if sanitizer is None:
        print("compute-sanitizer is not found; it comes with CUDA, or: pip install nvidia-cuda-sanitizer-api")
        return 2
    import torch

    if not torch.cuda.is_available():
        print("compute-sanitizer needs a CUDA device")
        return 2
    environment = (
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # every tensor an allocation of its own, with ends that can be watched
        }
    )
    codes = {}
    for tool in (
        "nothing",
        *TOOLS,
    ):  # the first run compiles, so that the tools watch kernels and not the compiler
        print(f"== {tool}", flush=True)
        done = subprocess.run(command(sanitizer, tool, options), env=environment, cwd=ROOT, check=False)
        codes[tool] = done.returncode
        if tool == "nothing" and done.returncode:
            break
    for tool, code in codes.items():
        print(
            f"under {tool}: {'clean' if code == 0 else 'errors found' if code == FOUND else f'failed ({code})'}"
        )
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
