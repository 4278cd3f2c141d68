"""Inheritance, dotted keys, overrides, and the way back to YAML."""

from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, model_validator

from moeut_compose.spec.base import Count, Spec
from moeut_compose.spec.dump import dump_yaml
from moeut_compose.spec.find import builtin_root, list_specs
from moeut_compose.spec.io import SpecError, load_as, load_recipe, load_spec, parse_spec, split_overrides


class Circle(Spec):
    """Round."""

    kind: Literal["circle"] = "circle"
    radius: float


class Box(Spec):
    """Angular."""

    kind: Literal["box"] = "box"
    width: float
    height: float = 1.0

    @model_validator(mode="after")
    def _is_wide(self) -> Self:
        if self.width < self.height:
            raise ValueError(f"width={self.width} is below height={self.height}")
        return self


Figure = Annotated[Circle | Box, Field(discriminator="kind")]


class Part(Spec):
    """One of many."""

    n: Count = 1
    label: str = ""
    tags: list[str] = []


class Toy(Spec):
    """Everything that specs are made of, and little else."""

    version: Literal[1] = 1
    name: str
    size: Count = 3
    limit: float | None = 0.25
    mode: Literal["a", "b"] = "a"
    micro: Count | Literal["auto"] = "auto"
    flag: bool = False
    pair: tuple[float, float] = (0.9, 0.999)
    figure: Figure = Box(width=2.0)
    other: Figure | None = None
    parts: list[Part] = [Part()]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return name


def toy(text: str, *overrides: str) -> Toy:
    return load_as(Toy, "architectures", write("toy.yaml", text), overrides)


def complaints(text: str, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        toy(text, *overrides)
    return [str(problem) for problem in caught.value.problems]


def test_plain_values_and_defaults() -> None:
    spec = toy("name: no\nlimit: 1e-3\npair: [0.5, 1]\nparts:\n  - n: 2\n  - {label: b}\n")
    assert spec == Toy(name="no", limit=1e-3, pair=(0.5, 1.0), parts=[Part(n=2), Part(label="b")])


def test_maps_merge_and_lists_and_scalars_replace() -> None:
    write(
        "base.yaml",
        "name: base\nsize: 5\nfigure: {kind: box, width: 3, height: 2}\nparts: [{n: 1}, {n: 2}]\n",
    )
    spec = toy("extends: base\nname: child\nfigure: {width: 4}\nparts: [{n: 9}]\n")
    assert spec == Toy(name="child", size=5, figure=Box(width=4.0, height=2.0), parts=[Part(n=9)])


def test_a_map_of_another_kind_replaces() -> None:
    write("base.yaml", "name: base\nfigure: {kind: box, width: 3}\n")
    assert toy("extends: base\nfigure: {kind: circle, radius: 1}\n").figure == Circle(radius=1.0)


def test_null_takes_away() -> None:
    write(
        "base.yaml",
        "name: base\nsize: 5\nlimit: 1.0\nother: {kind: circle, radius: 1}\nfigure: {kind: box, width: 3, height: 2}\n",
    )
    spec = toy("extends: base\nsize: null\nlimit: null\nother: null\nfigure: {height: null}\n")
    assert spec == Toy(name="base", size=3, limit=None, other=None, figure=Box(width=3.0))


def test_null_does_not_excuse_an_unknown_key() -> None:
    assert complaints("name: a\nsiez: null\n") == ["toy.yaml:2:1: siez: unknown key; did you mean size?"]


def test_null_for_a_required_key_is_a_missing_key() -> None:
    assert complaints("name: null\n") == ["toy.yaml:1:1: name: is missing"]


def test_the_later_of_several_wins() -> None:
    write("one.yaml", "name: one\nsize: 1\nflag: true\n")
    write("two.yaml", "name: two\nsize: 2\n")
    assert toy("extends: [one, two]\n") == Toy(name="two", size=2, flag=True)


def test_a_relative_path_is_tried_before_a_name() -> None:
    write("deep/base.yaml", "name: beside\n")
    write("base.yaml", "name: above\n")
    write("deep/child.yaml", "extends: base\n")
    write("deep/other.yaml", "extends: ../base.yaml\n")
    assert load_as(Toy, "architectures", "deep/child.yaml").name == "beside"
    assert load_as(Toy, "architectures", "deep/other.yaml").name == "above"


def test_the_same_base_twice_is_no_circle() -> None:
    write("root.yaml", "name: root\nsize: 7\n")
    write("left.yaml", "extends: root\nflag: true\n")
    write("right.yaml", "extends: root\nmode: b\n")
    assert toy("extends: [left, right]\n") == Toy(name="root", size=7, flag=True, mode="b")


def test_dotted_keys_reach_into_maps_and_lists() -> None:
    write("base.yaml", "name: base\nfigure: {kind: box, width: 3}\nparts: [{n: 1}, {n: 2, tags: [x, y]}]\n")
    spec = toy("parts.1.tags.0: z\nextends: base\nfigure.width: 4\nparts.0: {label: a}\n")
    assert spec.figure == Box(width=4.0)
    assert spec.parts == [Part(n=1, label="a"), Part(n=2, tags=["z", "y"])]


def test_a_dotted_key_reaches_into_its_own_file() -> None:
    assert toy(
        'parts.0.n: 4\nname: a\nparts: [{n: 1}]\nfigure: {kind: box, width: 9, "height": 1}\nfigure.height: 2\n'
    ) == Toy(name="a", parts=[Part(n=4)], figure=Box(width=9.0, height=2.0))


def test_a_dotted_null_removes_an_item() -> None:
    write("base.yaml", "name: base\nparts: [{n: 1}, {n: 2}, {n: 3}]\n")
    assert toy("extends: base\nparts.0: null\nparts.2.n: 4\n").parts == [Part(n=2), Part(n=4)]


def test_a_dotted_key_reaches_into_defaults() -> None:
    spec = toy("name: a\nfigure.height: 2\npair.0: 0.5\n", "parts.0.label=b")
    assert spec == Toy(
        name="a", figure=Box(width=2.0, height=2.0), pair=(0.5, 0.999), parts=[Part(label="b")]
    )


def test_a_dotted_kind_starts_afresh() -> None:
    assert toy("name: a\n", "figure.kind=circle", "figure.radius=3").figure == Circle(radius=3.0)
    assert toy("name: a\n", "figure.radius=3", "figure.kind=circle").figure == Circle(radius=3.0)


def test_overrides_are_yaml_and_the_later_one_wins() -> None:
    spec = toy(
        "name: a\n",
        "size=4",
        "limit=1e-3",
        "parts=[{n: 2}, {n: 3}]",
        "parts.1.tags=[p, q]",
        "size=5",
        "name='7'",
    )
    assert spec == Toy(name="7", size=5, limit=1e-3, parts=[Part(n=2), Part(n=3, tags=["p", "q"])])


def test_every_problem_of_every_file_is_told_once_and_where_it_stands() -> None:
    write("base.yaml", "name: base\nsize: many\nparts:\n  - {n: 0}\n")
    text = "extends: base\nflag: yes\nflag: no\nfigure: {kind: bix, width: 1}\nmood: b\n"
    assert complaints(text, "limit=-x", "parts.0.tagz=[]") == [
        "toy.yaml:2:7: flag: expected true or false, got the text 'yes'; yes, no, on and off are plain words here: write true",
        "toy.yaml:3:1: flag: duplicate key; it is on line 2 already",
        "toy.yaml:4:16: figure.kind: unknown kind bix; did you mean box? (one of circle, box)",
        "toy.yaml:5:1: mood: unknown key; did you mean mode?",
        "base.yaml:2:7: size: expected a whole number, got the text 'many'",
        "base.yaml:4:9: parts.0.n: expected a number above 0, got 0",
        "<command line> limit=-x: limit: expected a number, got the text '-x'",
        "<command line> parts.0.tagz=[]: parts.0.tagz: unknown key; did you mean tags?",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: 3", "toy.yaml:1:7: name: expected text, got 3; quote it: '3'"),
        ("name: a\nsize: 1e2", "toy.yaml:2:7: size: expected a whole number, got 1e2; write 100"),
        ("name: a\nsize: '3'", "toy.yaml:2:7: size: expected a whole number, got the text '3'; it is quoted, and so it is text: "
         "remove the quotes"),
        ("name: a\nmode: c", "toy.yaml:2:7: mode: expected 'a' or 'b', got the text 'c'"),
        ("name: a\nmicro: some", "toy.yaml:2:8: micro: expected a whole number or 'auto', got the text 'some'"),
        ("name: a\npair: [1]", "toy.yaml:2:7: pair.1: is missing"),
        ("name: a\nfigure: no", "toy.yaml:2:9: figure: expected a map, got the text 'no'; give it a kind, one of circle, box"),
        ("name: a\nfigure: {width: 1}", "toy.yaml:2:9: figure.kind: is missing; one of circle, box"),
        ("name: a\nfigure: {kind: box}", "toy.yaml:2:9: figure.width: is missing"),
        ("name: a\nfigure: {kind: box, widht: 3}", "toy.yaml:2:21: figure.widht: unknown key; did you mean width?"),
        ("name: a\nfigure: {kind: box, width: 1, height: 2}", "toy.yaml:2:28: figure: width=1.0 is below height=2.0"),
        ("name: a\nother: {kind: circle, radius: big}", "toy.yaml:2:31: other.radius: expected a number, got the text 'big'"),
        ("name: a\nparts: {n: 1}", "toy.yaml:2:8: parts: expected a list, got a map"),
        ("name: a\nparts: [{n: 1}, 3]", "toy.yaml:2:17: parts.1: expected a map, got 3"),
        ("name: a\nparts: [{q: 1}]", "toy.yaml:2:10: parts.0.q: unknown key; known here: n, label, tags"),
        ("name: a\nversion: 2", "toy.yaml:2:10: version: 2 is not a version that this release reads; it reads 1"),
        ("name: a\nsize.x: 2", "toy.yaml:2:1: size: expected a whole number, got a map"),
        ("name: a\nparts: []\nparts.0.n: 2", "toy.yaml:3:1: parts.0: parts is an empty list; give it whole"),
        ("name: a\nsize: 3\nsize.x: 2", "toy.yaml:3:1: size: is 3 here, and has no keys"),
        ("name: a\nparts.3.n: 2", "toy.yaml:2:1: parts.3: parts is a list of 1 item; reach them by number, from 0 to 0"),
        ("name: a\nparts.x.n: 2", "toy.yaml:2:1: parts.x: parts is a list of 1 item; reach them by number, from 0 to 0"),
        ("extends: 3\nname: a", "toy.yaml:1:10: extends: expected a name, a path, or a list of them"),
        ("extends: nowhere\nname: a", "toy.yaml:1:10: extends: nowhere is neither an architecture nor a file"),
        ("extends: toy\nname: a", "toy.yaml:1:10: extends: goes round in a circle: toy.yaml -> toy.yaml"),
        ("a: [", "toy.yaml:2:1: broken YAML: while parsing a flow node, expected the node content, but found '<stream end>'"),
    ],
)  # fmt: skip
def test_one_mistake_one_line(text: str, complaint: str) -> None:
    assert complaints(text + "\n") == [complaint]


def test_a_circle_names_its_links() -> None:
    write("one.yaml", "extends: two\nname: one\n")
    write("two.yaml", "name: two\nextends:\n  - three\n")
    write("three.yaml", "extends: one.yaml\n")
    with pytest.raises(SpecError) as caught:
        load_as(Toy, "architectures", "one.yaml")
    message = (
        "three.yaml:1:10: extends: goes round in a circle: one.yaml -> two.yaml -> three.yaml -> one.yaml"
    )
    assert str(caught.value) == message


def test_what_a_broken_base_would_have_held_is_not_called_missing() -> None:
    write("base.yaml", "name: [\n")
    problems = complaints("extends: base\nsize: many\n")
    assert [problem.partition(": ")[0] for problem in problems] == ["toy.yaml:2:7", "base.yaml:2:1"]


def test_an_override_that_is_none() -> None:
    assert complaints("name: a\n", "size") == [
        "<command line> size: expected key=value, such as stages.0.repeats=4"
    ]
    assert complaints("name: a\n", "size=[1") == [
        "<command line> size=[1: size: broken YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"
    ]


def test_overrides_are_for_the_architecture_or_the_recipe() -> None:
    changes = ["d_model=3", "recipe.optimizer.lr=1e-3", "recipes=1"]
    assert split_overrides(changes) == (["d_model=3", "recipes=1"], ["recipe.optimizer.lr=1e-3"])
    write("r.yaml", "name: r\nsteps: 1\n")
    assert load_recipe("r.yaml", ["recipe.optimizer.lr=1e-3", "steps=2"]).optimizer.lr == 1e-3


def test_files_below_the_current_folder_are_named_relative_to_it(tmp_path: Path) -> None:
    write("deep/bad.yaml", "name: 3\n")
    for name in ("deep/bad.yaml", str(tmp_path / "deep/bad.yaml"), "./deep/../deep/bad.yaml"):
        with pytest.raises(SpecError, match=r"^deep/bad\.yaml:1:7: "):
            load_as(Toy, "architectures", name)


@pytest.mark.parametrize("spec", list_specs("architectures"), ids=lambda spec: spec.name)
def test_every_architecture_survives_the_way_to_yaml_and_back(spec) -> None:
    loaded = load_spec(spec.path)
    text = dump_yaml(loaded)
    assert parse_spec(text) == loaded
    assert dump_yaml(parse_spec(text)) == text
    assert loaded.name == spec.name.rpartition("/")[2]


@pytest.mark.parametrize("spec", list_specs("recipes"), ids=lambda spec: spec.name)
def test_every_recipe_survives_the_way_to_yaml_and_back(spec) -> None:
    loaded = load_recipe(spec.path)
    write("again.yaml", dump_yaml(loaded))
    assert load_recipe("again.yaml") == loaded
    assert loaded.name == spec.name


def test_text_that_looks_like_something_else_survives() -> None:
    for text in (
        "no",
        "1e-3",
        "1_000",
        "null",
        "",
        "~",
        "a: b",
        "x # y",
        "two\nlines",
        "ü",
        "'",
        "0x10",
        ".5",
        "- a",
        "{",
        "yes",
    ):
        spec = Toy(name=text, parts=[Part(label=text, tags=[text, text])], limit=1e-08)
        write("again.yaml", dump_yaml(spec))
        assert load_as(Toy, "architectures", "again.yaml") == spec


def test_a_stored_text_is_read_without_a_file() -> None:
    text = (builtin_root("architectures") / "moeut_tiny.yaml").read_text()
    assert parse_spec(text, ["d_model=256"]).d_model == 256
    with pytest.raises(SpecError, match=r"^weights:1:1: bogus: unknown key"):
        parse_spec(f"bogus: 1\n{text}", file="weights")


def test_a_key_of_the_other_kind_is_sent_home() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec("moeut_tiny", ["lr=1e-3"])
    assert "lr: unknown key; belongs in a recipe" in str(caught.value)
    assert "as optimizer.lr" in str(caught.value)
    write("bad.yaml", "name: bad\nsteps: 3\nd_model: 8\nn_experts: 3\n")
    with pytest.raises(SpecError) as caught:
        load_recipe("bad.yaml")
    assert [str(problem) for problem in caught.value.problems] == [
        "bad.yaml:3:1: d_model: unknown key; belongs in an architecture (architectures/*.yaml), as d_model",
        "bad.yaml:4:1: n_experts: unknown key; belongs in an architecture (architectures/*.yaml), as stages.0.layers.0.mixer.n_experts",
    ]
