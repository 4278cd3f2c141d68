"""YAML as people write it: what words mean, and where everything stands."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeut_compose.spec.nodes import ListNode, MapNode, Scalar, plain
from moeut_compose.spec.problems import Place
from moeut_compose.spec.yaml import MAX_BYTES, Document, parse_document, parse_value, resolve


def read(text: str) -> Document:
    return parse_document(text.encode(), "a.yaml")


def data(text: str) -> object:
    document = read(text)
    assert document.root is not None
    assert document.problems == []
    return plain(document.root)


def complaint(content: str | bytes) -> str:
    document = parse_document(content if isinstance(content, bytes) else content.encode(), "a.yaml")
    assert len(document.problems) == 1
    return str(document.problems[0])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-2.5e+4", -25000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("12", 12),
        ("+12", 12),
        ("100_000", 100000),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.inf", -math.inf),
    ],
)
def test_a_plain_word_means(text: str, value: object) -> None:
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


@pytest.mark.parametrize(
    "word",
    ["no", "yes", "on", "off", "y", "n", "1_", "_1", "1e", "e5", "1:30", "2024-01-01", "0b1", "1.2.3", "nan"],
)
def test_a_plain_word_stays_text(word: str) -> None:
    assert resolve(word) == word


def test_not_a_number_is_a_number() -> None:
    assert isinstance(resolve(".nan"), float)


def test_quotes_make_text() -> None:
    assert data("a: '1e-3'\nb: \"true\"\nc: |\n  12\n") == {"a": "1e-3", "b": "true", "c": "12\n"}


def test_every_key_and_value_has_its_place() -> None:
    root = read("a: 1\nlist:\n  - {x: 2}\n  -   y:\n        z: 3\n").root
    assert isinstance(root, MapNode)
    assert root.entries["a"].key_place == Place("a.yaml", 1, 1)
    assert root.entries["a"].node.place == Place("a.yaml", 1, 4)
    items = root.entries["list"].node
    assert isinstance(items, ListNode)
    first, second = items.items
    assert isinstance(first, MapNode)
    assert first.entries["x"].node.place == Place("a.yaml", 3, 9)
    assert isinstance(second, MapNode)
    inner = second.entries["y"].node
    assert isinstance(inner, MapNode)
    assert inner.entries["z"].key_place == Place("a.yaml", 5, 9)


def test_anchors_aliases_and_merge_keys() -> None:
    text = "base: &b {x: 1, y: 2}\nsame: *b\nmore: {<<: *b, y: 3}\nboth: {<<: [{x: 9}, *b], z: 4}\n"
    assert data(text) == {
        "base": {"x": 1, "y": 2},
        "same": {"x": 1, "y": 2},
        "more": {"x": 1, "y": 3},
        "both": {"x": 9, "y": 2, "z": 4},
    }


def test_a_byte_order_mark_is_no_character() -> None:
    assert data("\ufeffa: 1") == {"a": 1}


def test_all_duplicate_keys_are_found() -> None:
    problems = [str(problem) for problem in read("a: 1\nb: {c: 1, c: 2}\na: 2\n").problems]
    assert problems == [
        "a.yaml:2:11: b.c: duplicate key; it is on line 2 already",
        "a.yaml:3:1: a: duplicate key; it is on line 1 already",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.yaml: is empty; a spec is a map of keys to values"),
        ("# only a comment\n", "a.yaml: is empty; a spec is a map of keys to values"),
        ("- a\n", "a.yaml:1:1: holds a list; a spec is a map of keys to values, such as `d_model: 128`"),
        ("just words\n", "a.yaml:1:1: holds text; a spec is a map of keys to values, such as `d_model: 128`"),
        ("#!/bin/sh\nexit 1\n", "a.yaml:1:1: a script, not a YAML spec"),
        (b"\x80\x02}q\x00.", "a.yaml: a binary file, not YAML"),
        (b"name: a\ncity: Z\xfcrich\n", "a.yaml:2:8: byte 0xfc is not UTF-8 text; save the file as UTF-8"),
        ("a: 1\n---\nb: 2\n", "a.yaml:3:1: a second document begins here; a spec file holds one"),
        ("a:\n\tb: 1\n", "a.yaml:2:1: broken YAML: a tab; indent with spaces"),
        ("a: {b: 1\nc: 2\n", "a.yaml:2:2: broken YAML: while parsing a flow mapping"),
        ("a: b: c\n", "a.yaml:1:5: broken YAML: mapping values are not allowed here"),
        ("a: *nobody\n", "a.yaml:1:4: broken YAML: no anchor is named 'nobody'"),
        (
            "a: !!python/object:os.system {}\n",
            "a.yaml:1:4: a: tag tag:yaml.org,2002:python/object:os.system has no meaning",
        ),
        ("a: !mine 1\n", "a.yaml:1:4: a: tag !mine has no meaning in a spec"),
        ("a: !!int x\n", "a.yaml:1:4: a: 'x' cannot be read as !!int"),
        ("? [a, b]\n: 1\n", "a.yaml:1:3: a key must be a plain word"),
        ("a: \x07\n", "a.yaml:1:4: character #x0007 is not allowed in YAML"),
        ("a: &x [*x]\n", "a.yaml:1:4: a.0: an alias that contains itself"),
        ("a: {<<: 3}\n", "a.yaml:1:5: a: << takes an alias of a map"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply for a spec"),
        ("a: " + "[" * 5000, "nested too deeply for a spec"),
        (b"#" * (MAX_BYTES + 1), "a.yaml: larger than 4 MiB, which no spec is"),
    ],
)
def test_a_file_that_is_no_spec(content: str | bytes, message: str) -> None:
    assert message in complaint(content)


def test_aliases_that_unfold_without_end_are_cut_off() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    problems = read("\n".join(lines)).problems
    assert problems
    assert {problem.message for problem in problems} == {"aliases unfold to more than a spec holds"}


def test_the_value_of_an_override_stands_on_the_command_line() -> None:
    place = Place("<command line> a=[1, {b: 1e-3}]")
    node, problems = parse_value("[1, {b: 1e-3}]", place)
    assert problems == []
    assert plain(node) == [1, {"b": 0.001}]
    assert node.place == place


def test_an_empty_value_is_null() -> None:
    node, problems = parse_value("", Place("<command line> a="))
    assert isinstance(node, Scalar)
    assert node.value is None
    assert problems == []


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.binary(max_size=60), st.text("{}[]:,-'\"*&!|>#%@ \n\tab0.~<?", max_size=60).map(str.encode))
)
def test_no_bytes_at_all_raise(content: bytes) -> None:
    document = parse_document(content, "a.yaml")
    assert document.root is not None or document.problems
    for problem in document.problems:
        assert str(problem).startswith("a.yaml")
        assert "\n" not in str(problem)
