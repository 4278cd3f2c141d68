"""The modelling file: cut from the modules themselves, complete, and nothing more than torch and transformers."""

import ast
import sys
from pathlib import Path

import pytest

from moeut_compose.interchange.huggingface import source
from moeut_compose.interchange.huggingface.bundle import Bundle, modeling_source
from moeut_compose.interchange.huggingface.source import read
from moeut_compose.interchange.huggingface.text import undefined_names


@pytest.fixture(scope="module")
def tree() -> ast.Module:
    return ast.parse(modeling_source())


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("moeut_compose.blocks.mixers", "SwitchHead"),
        ("moeut_compose.blocks.stages", "Stage"),
        ("moeut_compose.blocks.routers", "MLPRouter"),
        ("moeut_compose.blocks.model", "LanguageModel"),
        ("moeut_compose.build", "build_layer"),
        ("moeut_compose.interchange.huggingface.modeling", "MoeutComposeForCausalLM"),
    ],
)
def test_definitions_are_those_of_the_source(tree: ast.Module, module: str, name: str) -> None:
    statement = read(module).definition(name)
    assert statement is not None
    assert ast.unparse(definitions(tree)[name]) == ast.unparse(statement.node)


def test_nothing_but_torch_and_transformers_is_imported(tree: ast.Module) -> None:
    tried = {node for part in tree.body if isinstance(part, ast.Try) for node in ast.walk(part)}
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in tried
    ]
    names = {
        name.partition(".")[0]
        for node in imports
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
        if not getattr(node, "level", 0)
    }
    assert names - set(sys.stdlib_module_names) == {"torch", "transformers"}
    beside = [node.module for node in imports if getattr(node, "level", 0)]
    assert beside == ["configuration_moeut_compose"]


def test_what_no_exported_model_calls_is_left_out(tree: ast.Module) -> None:
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not names & {"num_params", "macs", "paper_macs", "check_routing", "steer_routers", "dump_yaml"}
    assert '"triton":' not in modeling_source()


def test_names_that_two_modules_give_are_told_apart(tree: ast.Module) -> None:
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert len(names) == len(set(names))
    assert {"_forward", "_forward_of_projection"} <= set(names)


def test_the_file_is_the_same_each_time() -> None:
    assert Bundle("moeut_compose.interchange.huggingface.modeling").render() == modeling_source()


def test_undefined_names() -> None:
    text = "import os\nA = 1\ndef f(x):\n    y = [z for z in x]\n    return os, A, y, len(x), g(x)\n"
    assert undefined_names(text) == {"g"}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of its own that bundles are made from."""
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source, "PACKAGES", ("shelf",))
    monkeypatch.setattr("moeut_compose.interchange.huggingface.bundle.PACKAGES", ("shelf",))
    source.read.cache_clear()
    source.is_module.cache_clear()
    yield tmp_path / "shelf"
    source.read.cache_clear()
    source.is_module.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "shelf"]:
        del sys.modules[name]


def run(text: str) -> dict[str, object]:
    namespace: dict[str, object] = {"__name__": "bundle"}
    exec(compile(text, "bundle", "exec"), namespace)
    return namespace


def test_modules_become_one(package: Path) -> None:
    (package / "a.py").write_text(
        "def _size():\n    return 2\n\n\ndef double(x):\n    return _size() * x\n\n\nUNUSED = 1\n"
    )
    (package / "b.py").write_text(
        "from shelf import a as first\nfrom shelf.a import double as twice\n\n\ndef _size():\n    return 5\n\n\n"
        "def f(x):\n    # as it was\n    return twice(x) + first.double(x) + _size()\n"
    )
    text = Bundle("shelf.b").render()
    assert run(text)["f"](1) == 9
    assert "    # as it was\n    return double(x) + double(x) + _size_of_b()" in text
    assert "UNUSED" not in text


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            "from shelf import a\n\n\ndef f(double):\n    return a.double(double)\n",
            "double would mean a local variable",
        ),
        (
            "from shelf.a import double\n\n\ndef f(x):\n    import shelf.a\n    return double(x)\n",
            "cannot `import shelf.a`",
        ),
        (
            "from math import pi as double\nfrom shelf import a\n\n\ndef f():\n    return a.double(double)\n",
            "mean two things: double",
        ),
    ],
)
def test_what_cannot_be_one_file_is_refused(package: Path, second: str, message: str) -> None:
    (package / "a.py").write_text("def double(x):\n    return 2 * x\n")
    (package / "b.py").write_text(second)
    with pytest.raises(ValueError, match=message):
        Bundle("shelf.b").render()
