"""The wheel holds what the checkout holds, and works from anywhere."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

DATA_FOLDERS = ("architectures", "recipes", "schemas")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a program that must succeed, without this checkout on its path."""
    variables = {**os.environ, **environment}
    for name in ("PYTHONPATH", "MOEUT_COMPOSE_PATH", "MOEUT_COMPOSE_RUNS"):
        variables.pop(name, None)
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def source_files(folder: str) -> set[str]:
    """Files of the checkout below a folder, without what Python and tools leave behind."""
    found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts and path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "--wheel-dir", folder, sdist)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    run(*pip, wheel)
    own = run(
        programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    ).stdout.strip()
    Path(own, "dependencies.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
    )
    return programs


def test_the_wheel_holds_what_the_checkout_holds(wheel: Path) -> None:
    wanted = source_files("moeut_compose")
    wanted |= {name.removeprefix("kernels/") for name in source_files("kernels/moeut_kernels")}
    wanted |= {f"moeut_compose/{name}" for folder in DATA_FOLDERS for name in source_files(folder)}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == wanted
    for name in (
        "moeut_compose/py.typed",
        "moeut_kernels/py.typed",
        "moeut_compose/architectures/ablations/moeut_244m_aabb.yaml",
    ):
        assert name in packed
    assert any(name.startswith("moeut_compose/corpus/") and name.endswith(".xz") for name in packed)


def test_the_source_distribution_can_test_itself(sdist: Path) -> None:
    for name in (
        "LICENSE",
        "README.md",
        "Makefile",
        "constraints.txt",
        "tests/conftest.py",
        "tests/golden/run_case.py",
    ):
        assert (sdist / name).is_file(), name


def test_an_editable_install_copies_nothing(tmp_path: Path) -> None:
    script = f"from hatchling.build import build_editable; print(build_editable({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", script).stdout.split()[-1]
    with zipfile.ZipFile(tmp_path / name) as archive:
        files = [file for file in archive.namelist() if ".dist-info/" not in file]
        assert len(files) == 1
        assert set(archive.read(files[0]).decode().split()) == {str(ROOT), str(ROOT / "kernels")}


def test_an_installed_wheel_lists_and_validates_its_specs_from_anywhere(installed: Path) -> None:
    root = Path("/")
    listed = json.loads(run(installed / "moeut-compose", "ls", "--json", cwd=root).stdout)
    names = [spec["name"] for kind in ("architectures", "recipes") for spec in listed[kind]]
    assert {"moeut_244m", "ablations/moeut_244m_aabb", "quickstart", "default"} <= set(names)
    for kind in ("architectures", "recipes"):
        assert all(Path(spec["path"]).is_relative_to(installed.parent) for spec in listed[kind])
    assert run(installed / "moeut-compose", "validate", *names, cwd=root).stdout.count(": ok\n") == len(names)
    shown = run(installed / "moeut-compose", "show", "architectures/moeut_tiny.yaml", cwd=root).stdout
    assert shown == (ROOT / "architectures" / "moeut_tiny.yaml").read_text()


def test_an_installed_wheel_trains_a_built_in_by_name(installed: Path, tmp_path: Path) -> None:
    where = "import moeut_compose, moeut_kernels; print(moeut_compose.__file__, moeut_kernels.__file__)"
    for file in run(installed / "python", "-c", where, cwd=Path("/")).stdout.split():
        assert Path(file).is_relative_to(installed.parent)
    changes = ["d_model=32", "vocab_size=600", "context_length=64", "recipe.context=32", "recipe.steps=2"]
    changes += [
        "recipe.batch={size: 2, micro: 2}",
        "recipe.data.max_tokens=4000",
        "recipe.evaluation.windows=2",
    ]
    changes += [
        "recipe.tokenizer.max_bytes=100000",
        "recipe.evaluation.sample_tokens=4",
        "recipe.schedule.warmup_steps=1",
    ]
    result = run(
        installed / "moeut-compose", "train", "moeut_tiny", "--recipe", "quickstart", "--out", tmp_path / "run",
        "--device", "cpu", "--json", *changes, cwd=Path("/"), MOEUT_COMPOSE_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert json.loads(result.stdout)["step"] == 2
    assert (tmp_path / "run" / "checkpoints").is_dir()
