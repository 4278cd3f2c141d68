"""Runs the Triton tests in Triton's interpreter: float32 and float16 on the CPU, no GPU needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
@pytest.mark.parametrize("tests", ["test_triton*.py", "test_decode.py"])
def test_triton_kernels_in_the_interpreter(tests: str):
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, HERE.glob(tests)), "-q", "-x", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
