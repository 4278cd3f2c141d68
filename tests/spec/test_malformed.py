"""Specs as people get them wrong, through the real command line: one line a problem, its place, exit 1 or 2."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeut_compose.cli import app

GOOD = """\
version: 1
name: foo
vocab_size: 2048
context_length: 128
d_model: 64
norm: {kind: layer_norm, placement: peri}
position: {kind: rope, fraction: 0.5, base: 10000}
stages:
  - pattern: ABAB
    repeats: 2
    layers:
      - count: 2
        mixer: {kind: switch_head, n_heads: 4, d_head: 16, n_experts: 4, top_k: 2}
        feedforward: {kind: sigma_moe, n_experts: 8, d_expert: 16, top_k: 2}
"""
FILE = "architectures/foo.yaml"


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


MISTAKES: dict[str, tuple[str | bytes, list[str]]] = {
    "misspelt key at the top": (
        changed("d_model:", "d_modle:"),
        [f"{FILE}:5:1: d_modle: unknown key; did you mean d_model?"],
    ),
    "misspelt key deep in a union": (
        changed("{kind: sigma_moe, n_experts:", "{kind: sigma_moe, n_expert:"),
        [f"{FILE}:14:40: stages.0.layers.0.feedforward.n_expert: unknown key; did you mean n_experts?"],
    ),
    "unknown key of a kind": (
        changed("fraction: 0.5", "max_distance: 5"),
        [f"{FILE}:7:24: position.max_distance: unknown key; known here: kind, fraction, base"],
    ),
    "misspelt kind": (
        changed("kind: sigma_moe", "kind: sigma_mo"),
        [
            f"{FILE}:14:29: stages.0.layers.0.feedforward.kind: unknown kind sigma_mo; did you mean sigma_moe? "
            "(one of dense, sigma_moe, moe)"
        ],
    ),
    "kind left out": (
        changed("{kind: switch_head, ", "{"),
        [
            f"{FILE}:13:16: stages.0.layers.0.mixer.kind: is missing; one of attention, switch_head, "
            "mixture_of_attention"
        ],
    ),
    "kind is a number": (
        changed("kind: rope", "kind: 3"),
        [f"{FILE}:7:18: position.kind: unknown kind 3; one of none, rope, relative"],
    ),
    "required key left out": (changed("vocab_size: 2048\n", ""), [f"{FILE}:1:1: vocab_size: is missing"]),
    "required key of a block left out": (
        changed(", d_head: 16", ""),
        [f"{FILE}:13:16: stages.0.layers.0.mixer.d_head: is missing"],
    ),
    "key without a value": (changed("d_model: 64", "d_model:"), [f"{FILE}:1:1: d_model: is missing"]),
    "text for a number": (
        changed("d_model: 64", "d_model: wide"),
        [f"{FILE}:5:10: d_model: expected a whole number, got the text 'wide'"],
    ),
    "number in quotes": (
        changed("d_model: 64", 'd_model: "64"'),
        [
            f"{FILE}:5:10: d_model: expected a whole number, got the text '64'; it is quoted, and so it is text: "
            "remove the quotes"
        ],
    ),
    "fraction for a count": (
        changed("repeats: 2", "repeats: 2.5"),
        [f"{FILE}:10:14: stages.0.repeats: expected a whole number, got 2.5"],
    ),
    "zero passes": (
        changed("repeats: 2", "repeats: 0"),
        [f"{FILE}:10:14: stages.0.repeats: expected a number above 0, got 0"],
    ),
    "negative width": (
        changed("d_model: 64", "d_model: -64"),
        [f"{FILE}:5:10: d_model: expected a number above 0, got -64"],
    ),
    "share above one": (
        changed("fraction: 0.5", "fraction: 1.5"),
        [f"{FILE}:7:34: position.fraction: expected a number of at most 1, got 1.5"],
    ),
    "infinite base": (
        changed("base: 10000", "base: .inf"),
        [f"{FILE}:7:45: position.base: expected a finite number, got .inf"],
    ),
    "unknown pattern": (
        changed("ABAB", "ABBA"),
        [f"{FILE}:9:14: stages.0.pattern: expected 'ABAB' or 'AABB', got the text 'ABBA'"],
    ),
    "YAML's no for a map": (
        changed("norm: {kind: layer_norm, placement: peri}", "norm: no"),
        [f"{FILE}:6:7: norm: expected a map, got the text 'no'; give it a kind, one of layer_norm, rms_norm"],
    ),
    "YAML's yes for a boolean": (
        GOOD + "final_norm: yes\n",
        [
            f"{FILE}:15:13: final_norm: expected true or false, got the text 'yes'; yes, no, on and off are plain "
            "words here: write true"
        ],
    ),
    "a number for a name": (
        changed("name: foo", "name: 12"),
        [f"{FILE}:2:7: name: expected text, got 12; quote it: '12'"],
    ),
    "a map for a list": (
        changed("      - count: 2\n        mixer:", "        count: 2\n        mixer:"),
        [f"{FILE}:12:9: stages.0.layers: expected a list, got a map"],
    ),
    "a list for a map": (
        changed("position: {kind: rope, fraction: 0.5, base: 10000}", "position: [rope]"),
        [
            f"{FILE}:7:11: position: expected a map, got a list of 1; give it a kind, one of none, rope, relative"
        ],
    ),
    "no stages": (
        GOOD[: GOOD.index("stages:")] + "stages: []\n",
        [f"{FILE}:8:9: stages: expected at least 1 item(s), got a list of 0"],
    ),
    "more experts chosen than there are": (
        changed("d_expert: 16, top_k: 2", "d_expert: 16, top_k: 9"),
        [f"{FILE}:14:75: stages.0.layers.0.feedforward: top_k=9 exceeds n_experts=8"],
    ),
    "peri without a router": (
        changed("{kind: sigma_moe, n_experts: 8, d_expert: 16, top_k: 2}", "{kind: dense, d_ff: 64}"),
        [rf"{FILE}:\d+:\d+: stages\.0\.layers\.0, stages\.0\.layers\.1: placement peri .*no router"],
    ),
    "a misspelt base": (
        "version: 1\nname: mine\nextend: moeut_tiny\nd_modell: 32\n",
        [f"{FILE}:3:1: extend: unknown key; did you mean extends\\?", f"{FILE}:4:1: d_modell: .*d_model"],
    ),
    "halting without passes over the group": (
        changed("pattern: ABAB", "pattern: AABB\n    halting: {kind: act}"),
        [rf"{FILE}:\d+:\d+: stages\.0: halting .*AABB"],
    ),
    "another version": (
        changed("version: 1", "version: 2"),
        [f"{FILE}:1:10: version: 2 is not a version that this release reads; it reads 1"],
    ),
    "a recipe's key": (
        GOOD + "optimizer: {kind: adamw, lr: 1e-3}\n",
        [
            f"{FILE}:15:1: optimizer: unknown key; belongs in a recipe (recipes/*.yaml, or recipe.optimizer=… when "
            "training), as optimizer"
        ],
    ),
    "a recipe's nested key": (
        GOOD + "weight_decay: 0.1\n",
        [
            f"{FILE}:15:1: weight_decay: unknown key; belongs in a recipe (recipes/*.yaml, or "
            "recipe.optimizer.weight_decay=… when training), as optimizer.weight_decay"
        ],
    ),
    "duplicate keys": (
        changed("repeats: 2", "repeats: 2\n    repeats: 3") + "name: bar\n",
        [
            f"{FILE}:11:5: stages.0.repeats: duplicate key",
            f"{FILE}:16:1: name: duplicate key",
        ],
    ),
    "dotted key out of range": (
        GOOD + "stages.1.repeats: 3\n",
        [f"{FILE}:15:1: stages.1: stages is a list of 1 item; reach them by number, from 0 to 0"],
    ),
    "dotted key into a number": (
        GOOD + "d_model.x: 3\n",
        [f"{FILE}:15:1: d_model: is 64 here, and has no keys"],
    ),
    "base that does not exist": (
        "extends: dense_tinny\nname: foo\n",
        [f"{FILE}:1:10: extends: dense_tinny is neither an architecture nor a file; did you mean dense_tiny"],
    ),
    "extends itself": (
        "extends: foo\nname: foo\n",
        [f"{FILE}:1:10: extends: goes round in a circle: {FILE} -> {FILE}"],
    ),
    "extends a map": (
        "extends: {name: dense_tiny}\n",
        [f"{FILE}:1:10: extends: expected a name, a path, or a list of them"],
    ),
    "tab": (changed("    repeats", "\trepeats"), [f"{FILE}:10:1: broken YAML: a tab; indent with spaces"]),
    "unclosed bracket": (changed("placement: peri}", "placement: peri"), [f"{FILE}:7:9: broken YAML: "]),
    "bad indentation": (changed("    repeats", "   repeats"), [f"{FILE}:10:4: broken YAML: "]),
    "unknown alias": (
        changed("d_model: 64", "d_model: *width"),
        [f"{FILE}:5:10: broken YAML: no anchor is named"],
    ),
    "a tag": (
        changed("d_model: 64", "d_model: !width 64"),
        [f"{FILE}:5:10: d_model: tag !width has no meaning in a spec"],
    ),
    "empty": ("", [f"{FILE}: is empty; a spec is a map of keys to values"]),
    "a list": ("- 1\n- 2\n", [f"{FILE}:1:1: holds a list; a spec is a map of keys to values"]),
    "a shell script": ("#!/bin/sh\nset -e\n", [f"{FILE}:1:1: a script, not a YAML spec"]),
    "a script without a first line": (
        "set -e\nexit 1\n",
        [f"{FILE}:1:1: holds text; a spec is a map of keys to values"],
    ),
    "a binary file": (b"\x93NUMPY\x01\x00v\x00{'descr'", [f"{FILE}: a binary file, not YAML"]),
    "another encoding": (
        "# naïve\n".encode("latin-1") + GOOD.encode(),
        [f"{FILE}:1:5: byte 0xef is not UTF-8 text"],
    ),
    "two documents": (GOOD + "---\n" + GOOD, [f"{FILE}:16:1: a second document begins here"]),
    "several at once": (
        changed("d_model: 64", "d_modl: 64")
        .replace("repeats: 2", "repeats: many")
        .replace("kind: rope", "kind: rop"),
        [
            f"{FILE}:5:1: d_modl: unknown key; did you mean d_model?",
            f"{FILE}:7:18: position.kind: unknown kind rop; did you mean rope?",
            f"{FILE}:10:14: stages.0.repeats: expected a whole number, got the text 'many'",
        ],
    ),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("architectures").mkdir()


def assert_lines(stderr: str, expected: list[str]) -> None:
    """As many lines as expected, each beginning as expected (or matching it as a pattern)."""
    lines = stderr.splitlines()
    assert len(lines) == len(expected), stderr
    for line, wanted in zip(lines, expected, strict=True):
        assert line.startswith(wanted) or re.match(wanted, line), f"{line!r} is not {wanted!r}"
    assert "Traceback" not in stderr


def test_the_spec_that_the_mistakes_are_made_in_is_good() -> None:
    Path(FILE).write_text(GOOD)
    assert CliRunner().invoke(app, ["validate", "foo"]).exit_code == 0


@pytest.mark.parametrize("command", ["validate", "params"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_its_place(mistake: str, command: str) -> None:
    content, expected = MISTAKES[mistake]
    Path(FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    result = CliRunner().invoke(app, [command, FILE])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert_lines(result.stderr, expected)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["params", "missing.yaml"], 2, ["error: missing.yaml is neither an architecture nor a file"]),
        (["show", "moeut_tinny"], 2, ["error: moeut_tinny is neither an architecture nor a recipe nor a file; did you mean moeut_tiny"]),
        (["validate", "architectures"], 2, ["error: architectures is a folder without architecture.yaml or recipe.yaml"]),
        (["macs", "foo", "d_model=wide"], 1, ["<command line> d_model=wide: d_model: expected a whole number"]),
        (["params", "foo", "stages.0.repeat=4"], 1, ["<command line> stages.0.repeat=4: stages.0.repeat: unknown key; did you mean repeats?"]),
        (["params", "foo", "stages.3.repeats=4"], 1, ["<command line> stages.3.repeats=4: stages.3: stages is a list of 1 item"]),
        (["params", "foo", "d_model=[1"], 1, ["<command line> d_model=[1: d_model: broken YAML"]),
        (["params", "foo", "recipe.steps=4"], 2, ["error: recipe.steps=4: no recipe is used here"]),
        (["params", "d_model=4"], 2, ["error: no SPEC is named, only changes"]),
        (["show", "foo", "d_model"], 2, ["error: 'd_model' is not a change; write key=value"]),
        (["train", "foo", "--recipe", "nowhere"], 2, ["error: nowhere is neither a recipe nor a file"]),
        (["train", "foo", "--recipe", "foo"], 2, ["error: foo is an architecture, and a recipe is needed here"]),
        (["train", "foo", "--recipe", "quickstart", "recipe.stepz=4"], 1, ["<command line> recipe.stepz=4: stepz: unknown key; did you mean steps?"]),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(arguments: list[str], code: int, expected: list[str]) -> None:
    Path(FILE).write_text(GOOD)
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert_lines(result.stderr, expected)


def test_a_problem_that_was_inherited_names_the_file_it_came_from() -> None:
    Path("architectures/base.yaml").write_text(changed("d_model: 64", "d_model: wide"))
    Path(FILE).write_text("extends: base\nname: foo\nstages.0.repeats: 0\n")
    result = CliRunner().invoke(app, ["validate", "foo"])
    assert result.exit_code == 1
    assert_lines(
        result.stderr,
        [
            f"{FILE}:3:19: stages.0.repeats: expected a number above 0, got 0",
            "architectures/base.yaml:5:10: d_model: expected a whole number, got the text 'wide'",
        ],
    )


def test_a_circle_through_several_files() -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        Path(f"architectures/{name}.yaml").write_text(f"extends: {base}\nname: {name}\n")
    result = CliRunner().invoke(app, ["validate", "a"])
    chain = " -> ".join(f"architectures/{name}.yaml" for name in "abca")
    assert result.exit_code == 1
    assert_lines(result.stderr, [f"architectures/c.yaml:1:10: extends: goes round in a circle: {chain}"])


def test_all_files_are_checked_and_all_problems_are_shown() -> None:
    Path(FILE).write_text(GOOD)
    Path("one.yaml").write_text(changed("d_model: 64", "d_model: 0"))
    Path("two.yaml").write_text(changed("repeats: 2", "repeats: 0"))
    result = CliRunner().invoke(app, ["validate", "one.yaml", "nowhere", "foo", "two.yaml"])
    assert result.exit_code == 1
    assert result.stdout == f"{FILE}: ok\n"
    assert_lines(result.stderr, ["one.yaml:5:10: ", "error: nowhere is neither ", "two.yaml:10:14: "])


@pytest.mark.parametrize("mistake", ["misspelt key deep in a union", "a binary file", "extends itself"])
def test_a_real_process_ends_the_same_way(command, mistake: str) -> None:
    content, expected = MISTAKES[mistake]
    Path(FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    result = command("params", FILE)
    assert (result.returncode, result.stdout) == (1, "")
    assert_lines(result.stderr, expected)
