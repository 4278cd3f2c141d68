"""`new`, `show` and the schema: writing specs by hand."""

import json
from pathlib import Path

import jsonschema
import pytest

from moeut_compose.spec.find import Kind, list_specs, singular
from moeut_compose.spec.io import load_spec, model_of
from moeut_compose.spec.nodes import plain
from moeut_compose.spec.schema import field_docs, json_schema, models_below
from moeut_compose.spec.shapes import Shape
from moeut_compose.spec.yaml import parse_document, read_document
from tests.conftest import ROOT

KINDS: list[Kind] = ["architectures", "recipes"]


def errors(text: str, kind: Kind = "architectures") -> list[str]:
    """Where the schema of a kind finds fault with a text."""
    root = parse_document(text.encode(), "x").root
    assert root is not None
    validator = jsonschema.Draft202012Validator(json_schema(model_of(kind), kind))
    return list(dict.fromkeys(error.json_path for error in validator.iter_errors(plain(root))))


def test_new_writes_a_variant_that_is_valid_and_names_its_schema(cli) -> None:
    result = cli("new", "ablations/wide", "--from", "moeut_44m")
    assert result.exit_code == 0
    assert result.stdout == "architectures/ablations/wide.yaml\n"
    path = Path("architectures/ablations/wide.yaml")
    first, *_ = path.read_text().splitlines()
    schema = path.parent / first.removeprefix("# yaml-language-server: $schema=")
    assert json.loads(schema.read_text()) == json_schema(model_of("architectures"), "architectures")
    spec = load_spec("ablations/wide")
    assert spec.name == "wide"
    assert spec.stages == load_spec("moeut_44m").stages
    assert errors(path.read_text()) == []


def test_what_new_suggests_works(cli) -> None:
    cli("new", "mine")
    path = Path("architectures/mine.yaml")
    suggestions = [
        line.removeprefix("# ")
        for line in path.read_text().splitlines()
        if line.startswith("# ") and ": " in line
    ]
    path.write_text(path.read_text() + "".join(f"{line}\n" for line in suggestions if "$schema" not in line))
    assert cli("validate", "mine").exit_code == 0


def test_new_from_a_file_names_it_relative_to_the_new_one(cli) -> None:
    Path("deep").mkdir()
    Path("deep/base.yaml").write_text("extends: moeut_tiny\nname: base\nd_model: 256\n")
    assert cli("new", "mine", "--from", "deep/base.yaml").exit_code == 0
    assert load_spec("mine").d_model == 256


def test_new_overwrites_nothing(cli) -> None:
    cli("new", "mine")
    before = Path("architectures/mine.yaml").read_text()
    result = cli("new", "mine")
    assert (result.exit_code, result.stderr) == (2, "error: architectures/mine.yaml exists already\n")
    assert Path("architectures/mine.yaml").read_text() == before


def test_new_cannot_extend_itself(cli) -> None:
    result = cli("new", "moeut_tiny")
    assert result.exit_code == 2
    assert not Path("architectures/moeut_tiny.yaml").exists()


def test_show_prints_the_file_as_it_is(cli) -> None:
    text = "# mine\nextends: moeut_tiny\nname: mine\n"
    Path("mine.yaml").write_text(text)
    assert cli("show", "mine.yaml").stdout == text


def test_show_resolved_is_a_spec_again(cli) -> None:
    Path("again.yaml").write_text(cli("show", "moeut_244m", "stages.0.repeats=4", "--resolved").stdout)
    assert load_spec("again.yaml") == load_spec("moeut_244m", ["stages.0.repeats=4"])


def test_show_diff_names_what_differs(cli) -> None:
    lines = cli("show", "moeut_244m", "--diff", "ablations/moeut_244m_aabb").stdout.splitlines()
    assert lines[:2] == ["--- moeut_244m", "+++ moeut_244m_aabb"]
    assert "-  - pattern: ABAB" in lines
    assert "+  - pattern: AABB" in lines
    assert cli("show", "moeut_244m", "--diff", "moeut_244m").stdout == ""


def test_the_tree_adds_up(cli) -> None:
    lines = cli("show", "sut_tiny", "--tree").stdout.splitlines()
    numbers = {
        line.strip("│├└─ ").split("  ")[0]: int(line.rsplit("  ", 1)[1].replace(",", "")) for line in lines
    }
    assert numbers["sut_tiny"] == numbers["embedding"] + numbers["stage 0"] + numbers["head"]
    assert numbers["stage 0"] == numbers["A"] + numbers["halting"]
    assert numbers["A"] == numbers["norms"] + numbers["mixer"] + numbers["feedforward"]


def test_the_tree_of_many_members_stays_short(cli) -> None:
    lines = cli("show", "dense_1b", "--tree").stdout.splitlines()
    assert len(lines) < 12
    assert any("36 times these weights" in line for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_all_built_in_specs_satisfy_their_schema(kind: Kind) -> None:
    validator = jsonschema.Draft202012Validator(json_schema(model_of(kind), kind))
    validator.check_schema(validator.schema)
    for spec in list_specs(kind):
        root = read_document(spec.path, spec.name).root
        assert root is not None
        assert [error.message for error in validator.iter_errors(plain(root))] == [], spec.name


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_in_the_repository_is_this_one(kind: Kind) -> None:
    stored = (ROOT / "schemas" / f"{singular(kind)}.json").read_text()
    wanted = json.dumps(json_schema(model_of(kind), kind), indent=2, ensure_ascii=False)
    assert stored == f"{wanted}\n", f"moeut-compose schema {singular(kind)} > schemas/{singular(kind)}.json"


@pytest.mark.parametrize("kind", KINDS)
def test_built_in_specs_name_a_schema_that_exists(kind: Kind) -> None:
    for spec in list_specs(kind):
        first = spec.path.read_text().partition("\n")[0]
        assert first.startswith("# yaml-language-server: $schema="), spec.name
        assert (spec.path.parent / first.partition("=")[2]).is_file(), spec.name


@pytest.mark.parametrize(
    "text",
    [
        "extends: moeut_tiny\nname: a\n",
        "extends: [moeut_tiny, ../b.yaml]\nd_model: null\nstages.0.repeats: 4\n",
        "extends: moeut_tiny\nposition: {fraction: 1.0}\nnorm.eps: 1e-6\n",
    ],
)
def test_the_schema_allows_what_extends_allows(text: str) -> None:
    assert errors(text) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name: a\n", "$"),
        ("extends: moeut_tiny\nd_modl: 3\n", "$"),
        ("extends: moeut_tiny\nd_model: wide\n", "$.d_model"),
        ("extends: moeut_tiny\nposition: {kind: rope, fractoin: 1}\n", "$.position"),
        ("extends: moeut_tiny\nposition: {fractoin: 1}\n", "$.position"),
        ("extends: 3\n", "$.extends"),
    ],
)
def test_the_schema_refuses(text: str, place: str) -> None:
    assert errors(text) == [place]


def test_every_description_below_a_field_reaches_the_schema() -> None:
    for kind in KINDS:
        schema = json_schema(model_of(kind), kind)
        for model in models_below(Shape.of(model_of(kind))):
            properties = (schema if model is model_of(kind) else schema["$defs"][model.__name__])[
                "properties"
            ]
            for field, text in field_docs(model).items():
                assert properties[field]["description"] == text
    assert field_docs(model_of("architectures"))["final_norm"].startswith("A norm before the head")
