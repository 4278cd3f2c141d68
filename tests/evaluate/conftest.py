"""A run of two steps, and the command line on the CPU."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moeut_compose.cli import app
from tests.cli.conftest import RECIPE, SMALL


def call(*arguments: str) -> Result:
    """Run a command; an unexpected exception fails the test."""
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "short.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEUT_COMPOSE_CACHE", str(folder / "cache"))
        recipe, out = ["--recipe", str(folder / "short.yaml")], ["--out", str(folder / "run")]
        call("train", "moeut_tiny", *SMALL, *recipe, *out)
    return folder / "run"
