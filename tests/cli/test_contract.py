"""What scripts rely on: JSON keys, exit codes, streams, and no torch where none is needed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from moeut_compose.cli.output import as_json_text
from tests.conftest import ROOT

PARAMS = ["name", "total", "embedding", "head", "layers", "active_per_token", "unrolled_per_token"]
MACS = [
    "name",
    "seq_len",
    "convention",
    "total_per_token",
    "layers_per_token",
    "head_per_token",
    "by_component",
]


def test_numbers_that_are_none_are_null_in_json() -> None:
    found = as_json_text({"a": [float("nan"), 1.5], "b": (float("inf"), {"c": -math.inf})})
    assert json.loads(found, parse_constant=pytest.fail) == {"a": [None, 1.5], "b": [None, {"c": None}]}


def test_a_terminal_without_unicode(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = command("show", "moeut_tiny", "--tree")
    assert (result.returncode, result.stderr) == (0, "")


def test_params_json(cli_json) -> None:
    counts = cli_json("params", "moeut_244m", "dense_244m")
    assert [list(count) for count in counts] == [PARAMS, PARAMS]
    assert [count["name"] for count in counts] == ["moeut_244m", "dense_244m"]
    assert counts[0]["total"] == 243_326_784
    assert counts[1]["total"] == 243_568_700


def test_macs_json(cli_json) -> None:
    exact, _ = cli_json("macs", "moeut_244m", "dense_244m")
    assert list(exact) == MACS
    assert (exact["seq_len"], exact["convention"]) == (1024, "exact")
    assert exact["total_per_token"] == exact["layers_per_token"] + exact["head_per_token"]
    assert exact["total_per_token"] == sum(exact["by_component"].values())
    (paper,) = cli_json("macs", "moeut_244m", "--convention", "paper", "--seq-len", "512")
    assert (paper["seq_len"], paper["convention"], paper["head_per_token"]) == (512, "paper", 0)
    assert list(paper) == MACS


def test_macs_agree_with_the_published_numbers(cli_json) -> None:
    (exact,) = cli_json("macs", "moeut_244m")
    (paper,) = cli_json("macs", "moeut_244m", "--convention", "paper")
    assert exact["layers_per_token"] == 159_602_688
    assert paper["layers_per_token"] * 1024 == 162_338_439_168


def test_macs_csv(cli) -> None:
    lines = cli("macs", "moeut_tiny", "dense_tiny", "--csv").stdout.splitlines()
    header = lines[0].split(",")
    assert header[:6] == MACS[:6]
    assert len(lines) == 3
    assert {len(line.split(",")) for line in lines} == {len(header)}
    values = dict(zip(header, lines[2].split(","), strict=True))
    assert values["attn_select"] == "0"


def test_macs_markdown(cli) -> None:
    lines = cli("macs", "moeut_tiny", "dense_tiny", "--markdown").stdout.splitlines()
    assert lines[0] == "| MACs per token (exact) | moeut_tiny, T=256 | dense_tiny, T=256 |"
    assert lines[1] == "| --- | ---: | ---: |"
    assert "| lm_head | 262,144 | 262,144 |" in lines


def test_macs_of_phases(cli, cli_json) -> None:
    (count,) = cli_json("macs", "moeut_tiny", "--phases", "--seq-len", "64")
    assert list(count) == [*MACS, "phases", "kv_cache"]
    assert count["phases"]["prefill"] == 64 * count["total_per_token"]
    assert count["phases"]["training_per_token"] == 3 * count["total_per_token"]
    assert count["kv_cache"]["bytes_per_token"] == {"fp32": 6144, "bf16": 3072, "fp16": 3072}
    lines = cli("macs", "moeut_tiny", "--phases", "--seq-len", "64", "--csv").stdout.splitlines()
    row = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert int(row["decode"]) == count["phases"]["decode"]
    assert int(row["kv_cache_bytes_bf16"]) == 3072
    assert "decode, T tokens in the cache" in cli("macs", "moeut_tiny", "--phases").stdout


def test_macs_without_what_the_mask_hides(cli_json) -> None:
    (full,) = cli_json("macs", "moeut_tiny", "--seq-len", "63")
    (causal,) = cli_json("macs", "moeut_tiny", "--seq-len", "63", "--causal")
    assert list(causal) == [*MACS, "causal"]
    scores = "attn_scores_values"
    assert causal["by_component"][scores] * 63 == full["by_component"][scores] * 32
    assert causal["by_component"]["ffn"] == full["by_component"]["ffn"]


def test_params_per_member(cli, cli_json) -> None:
    (count,) = cli_json("params", "moeut_tiny", "--per-member")
    assert list(count) == [*PARAMS, "members"]
    assert sum(member["total"] for member in count["members"]) == count["layers"]
    assert {member["applications"] for member in count["members"]} == {3}
    assert "stages.0.layers.1" in cli("params", "moeut_tiny", "--per-member").stdout


def test_macs_side_by_side_with_ratios(cli) -> None:
    lines = cli("macs", "dense_244m", "moeut_244m").stdout.splitlines()
    ratios = next(line for line in lines if line.startswith("total, to the first"))
    assert ratios.split()[-2:] == ["1.0000", "0.6147"]
    assert {len(line) for line in lines} == {len(lines[0])}


def test_macs_per_module_add_up(cli_json) -> None:
    (count,) = cli_json("macs", "moeut_tiny", "--per-module")
    assert count["by_module"][""] == count["total_per_token"]


def test_ls_json(cli_json) -> None:
    everything = cli_json("ls")
    assert list(everything) == ["architectures", "recipes", "blocks"]
    assert list(everything["architectures"][0]) == ["name", "description", "path", "builtin"]
    assert list(everything["blocks"][0]) == ["family", "kind", "description"]
    kinds = {(block["family"], block["kind"]) for block in cli_json("ls", "blocks")["blocks"]}
    assert {
        ("mixer", "switch_head"),
        ("feedforward", "sigma_moe"),
        ("norm", "layer_norm"),
        ("data", "builtin"),
    } <= kinds
    assert all(block["description"] for block in everything["blocks"])
    assert all(spec["description"] for spec in everything["architectures"])
    assert list(cli_json("ls", "recipes")) == ["recipes"]


def test_show_json(cli_json) -> None:
    shown = cli_json("show", "moeut_tiny", "stages.0.repeats=5")
    assert list(shown) == ["kind", "path", "spec"]
    assert shown["spec"]["stages"][0]["repeats"] == 5
    changes = cli_json("show", "moeut_244m", "--diff", "ablations/moeut_244m_aabb")
    assert {"path": "stages.0.pattern", "from": "ABAB", "to": "AABB"} in changes


def test_validate_json(cli, cli_json) -> None:
    (report,) = cli_json("validate", "moeut_tiny")
    assert list(report) == ["spec", "kind", "path", "ok", "problems"]
    assert report["ok"]
    Path("bad.yaml").write_text("extends: moeut_tiny\nd_model: 0\n")
    result = cli("validate", "bad.yaml", "nowhere", "--json")
    bad, missing = json.loads(result.stdout)
    assert result.exit_code == 1
    (problem,) = bad["problems"]
    assert problem == {
        "file": "bad.yaml",
        "line": 2,
        "column": 10,
        "path": "d_model",
        "message": "expected a number above 0, got 0",
    }
    assert missing["problems"][0]["message"].startswith("nowhere is neither")
    assert result.stderr == ""


@pytest.mark.parametrize("kind", ["architecture", "recipe"])
def test_schema_is_one_json_document(cli, kind: str) -> None:
    document = json.loads(cli("schema", kind).stdout)
    assert document["$schema"].startswith("https://json-schema.org/")


def test_a_failure_with_json_leaves_stdout_empty(cli) -> None:
    result = cli("params", "moeut_tiny", "d_model=0", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("<command line> d_model=0: d_model: expected")


def test_an_undefined_count_is_a_failure(cli) -> None:
    result = cli("macs", "sut_tiny", "--convention", "paper")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: sut_tiny: the published formula is undefined")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["params"],
        ["params", "moeut_tiny", "--nonsense"],
        ["macs", "moeut_tiny", "--seq-len", "0"],
        ["macs", "moeut_tiny", "--seq-len", "many"],
        ["macs", "moeut_tiny", "--convention", "guess"],
        ["macs", "moeut_tiny", "--json", "--csv"],
        ["macs", "moeut_tiny", "--csv", "--markdown"],
        ["macs", "moeut_tiny", "--per-module", "--csv"],
        ["macs", "moeut_tiny", "--causal", "--convention", "paper"],
        ["macs", "moeut_tiny", "--phases", "--per-module"],
        ["ls", "nonsense"],
        ["show", "nowhere"],
        ["show", "moeut_tiny", "--diff", "default"],
        ["show", "default", "--tree"],
        ["new", "../evil"],
        ["new", "good", "--from", "nowhere"],
        ["train"],
        ["train", "moeut_tiny", "--resume", "nowhere"],
        ["train", "moeut_tiny", "--device", "abacus", "--dry-run"],
        ["evaluate", "nowhere"],
        ["evaluate", "nowhere", "--tasks", "chess"],
        ["generate", "nowhere"],
        ["generate", "nowhere", "--temperature", "-1"],
    ],
)
def test_wrong_usage_and_not_found_are_2(cli, arguments: list[str]) -> None:
    result = cli(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr
    assert "Traceback" not in result.stderr


LIGHT = [
    ["--help"],
    ["ls"],
    ["show", "moeut_tiny"],
    ["show", "moeut_244m", "--tree"],
    ["show", "moeut_244m", "--resolved"],
    ["show", "moeut_244m", "--diff", "dense_244m"],
    ["validate", "moeut_244m", "quickstart"],
    ["schema"],
    ["schema", "recipe"],
    ["schema", "sweep"],
    ["sweep", "--help"],
    ["params", "moeut_244m", "--json"],
    ["macs", "moeut_244m"],
    ["macs", "moeut_244m", "--phases", "--markdown"],
    ["new", "mine"],
    ["train", "--help"],
]


def test_commands_that_need_no_torch_import_none() -> None:
    """All in one process: what one of them imports stays imported, so the last look counts for all."""
    script = f"""
import sys
from typer.testing import CliRunner
from moeut_compose.cli import app
for arguments in {LIGHT!r}:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output)
    heavy = sorted({{"torch", "numpy", "triton", "datasets", "matplotlib", "sentencepiece"}} & set(sys.modules))
    assert not heavy, (arguments, heavy)
print("light")
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    line = [sys.executable, "-W", "error", "-c", script]
    result = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout == "light\n", result.stderr


def test_the_package_offers_its_names_without_torch() -> None:
    script = """
import sys
import moeut_compose as mc
spec = mc.load_spec("moeut_tiny", overrides=["stages.0.repeats=4"])
assert spec.stages[0].repeats == 4
assert mc.count_params(spec).total == 2_460_928
assert mc.count_macs(spec, seq_len=128).seq_len == 128
assert not hasattr(mc, "nonsense")
assert "torch" not in sys.modules
model = mc.build_model(spec, device="meta")
assert sum(p.numel() for p in model.parameters()) == 2_460_928
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    line = [sys.executable, "-c", script]
    result = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr


def test_module_and_version(command) -> None:
    from moeut_compose import __version__

    result = command("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"moeut-compose {__version__}\n", "")
    assert command("--help").stdout.count("moeut-compose") >= 5


def test_a_reader_that_leaves_early_is_no_error(command, tmp_path: Path) -> None:
    environment = f"PYTHONPATH={ROOT}:{ROOT / 'kernels'}"
    pipe = f"set -o pipefail; {environment} {sys.executable} -m moeut_compose ls | head -1"
    result = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "architectures\n", "")


def test_show_of_a_file_that_is_no_text(cli, tmp_path: Path) -> None:
    (tmp_path / "foo.yaml").write_bytes(b"name: foo\nd_model: \xa2\n")
    shown = cli("show", "foo.yaml")
    assert shown.exit_code == 1
    assert shown.stderr == "foo.yaml:2:10: byte 0xa2 is not UTF-8 text; save the file as UTF-8\n"
