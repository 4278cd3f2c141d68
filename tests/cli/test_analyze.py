"""`analyze` on trained runs of several families, as a user calls it, and what it says when it cannot."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moeut_compose.analyze import plots, report
from moeut_compose.blocks.stick_breaking import StickBreaking
from moeut_compose.cli import app
from moeut_compose.cli.runs import open_run
from moeut_compose.train.run import Run

from .conftest import RECIPE

SIZES = ["d_model=32", "vocab_size=600", "context_length=64"]
FAMILIES = {
    "moeut_tiny": ["stages.0.layers.0.feedforward.n_experts=8"],
    "sut_tiny": ["stages.0.repeats=3"],
    "dense_tiny": ["stages.0.layers.0.count=2"],
    "looped_tiny": [],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of finished runs, one of each family; tests must not write to them."""
    folder = tmp_path_factory.mktemp("analyze")
    (folder / "short.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEUT_COMPOSE_CACHE", str(folder / "cache"))
        for name, changes in FAMILIES.items():
            options = ["--recipe", str(folder / "short.yaml"), "--out", str(folder / name), "--device", "cpu"]
            result = CliRunner().invoke(app, ["train", name, *SIZES, *changes, *options])
            assert result.exit_code == 0, result.output
        yield folder


@pytest.fixture
def without(runs: Path, tmp_path: Path):
    """A copy of the MoEUT run without some of its parts."""

    def copy(*parts: str) -> Path:
        run = tmp_path / "copy"
        shutil.copytree(runs / "moeut_tiny", run)
        for part in parts:
            path = run / part
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return run

    return copy


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time."""
    monkeypatch.setattr(plots, "draw_plots", lambda *_: [])
    monkeypatch.setattr(report, "render_report", lambda *_: "")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_its_report(name: str, runs: Path, tmp_path: Path, cli_json) -> None:
    out = tmp_path / "look"
    document = cli_json("analyze", str(runs / name), "--out", str(out), "--device", "cpu")
    assert document == json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert (document["name"], document["step"], document["text"]["windows"]) == (name, 2, 2)
    assert bool(document["routers"]) == (name in ("moeut_tiny", "sut_tiny"))
    assert bool(document["halting"]) == (name == "sut_tiny")
    assert bool(document["loss_by_repeats"]) == (name != "dense_tiny")
    evaluated = cli_json("evaluate", str(runs / name), "--device", "cpu")
    assert document["cross_entropy"] == pytest.approx(evaluated["cross_entropy"], rel=1e-5)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert f"Inside {name} at step 2" in html
    for figure in document["figures"]:
        assert f'<article id="{figure["name"]}">' in html
        assert (out / figure["png"]).is_file()


@pytest.mark.usefixtures("no_plots")
def test_for_people_and_into_the_run_folder(without, cli) -> None:
    run = without()
    result = cli("analyze", str(run), "--windows", "1", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("moeut_tiny at step 2, 32 tokens: ")
    assert "Overlap of expert sets between passes" in lines
    assert lines[-2] == f"report   {run / 'analysis' / 'report.html'}"
    assert (run / "analysis" / "report.html").is_file()
    assert "observing: 1/1" in result.stderr


@pytest.mark.usefixtures("no_plots")
def test_text_of_my_own(runs: Path, tmp_path: Path, cli_json) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("The sea is wide and the whale is in it. " * 40)
    document = cli_json(
        "analyze",
        str(runs / "moeut_tiny"),
        "--text",
        str(mine),
        "--out",
        str(tmp_path / "o"),
        "--device",
        "cpu",
    )
    assert document["text"]["source"] == str(mine)
    contexts = [place for expert in document["routers"][-1]["experts"] for place in expert["contexts"]]
    assert any("whale" in place["before"] + place["token"] + place["after"] for place in contexts)


@pytest.mark.usefixtures("no_plots")
def test_without_a_tokenizer_words_are_numbers(without, tmp_path: Path, cli) -> None:
    run = without("tokenizer.model")
    result = cli("analyze", str(run), "--out", str(tmp_path / "o"), "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["text"]["tokenizer"] is False
    assert document["routers"][0]["experts"][0]["contexts"][0]["token"].startswith("#")
    assert "has no tokenizer.model; tokens are shown as numbers" in result.stderr


@pytest.mark.parametrize("options", [[], ["--text", "mine.txt"]])
def test_with_neither_tokenizer_nor_text(options: list[str], without, tmp_path: Path, cli) -> None:
    """As after `import` without `--tokenizer`."""
    Path("mine.txt").write_text("text")
    run = without("tokenizer.model", "validation")
    result = cli("analyze", str(run), "--device", "cpu", *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"put the SentencePiece model of the run at {run / 'tokenizer.model'}" in result.stderr
    assert "`show`, `params` and `macs` work without one" in result.stderr
    assert not any((run / "analysis").iterdir())


def test_data_that_cannot_be_reached(without, tmp_path: Path, cli) -> None:
    """As after `import`: the recipe names a data set, and nothing is stored."""
    run = without("validation")
    recipe = run / "recipe.yaml"
    text = recipe.read_text()
    begin, end = text.index("data:"), text.index("tokenizer:")
    recipe.write_text(f"{text[:begin]}data: {{kind: text, files: [gone.txt]}}\n{text[end:]}")
    result = cli("analyze", str(run), "--out", str(tmp_path / "o"), "--device", "cpu")
    assert result.exit_code == 1
    assert "no file matches 'gone.txt'" in result.stderr
    assert "--text FILE reads a text of your own instead" in result.stderr


@pytest.mark.usefixtures("no_plots")
def test_more_windows_than_there_are(runs: Path, tmp_path: Path, cli) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The sea is wide. " * 20)
    options = ["--text", str(text), "--windows", "90", "--out", str(tmp_path / "o"), "--device", "cpu"]
    result = cli("analyze", str(runs / "dense_tiny"), *options)
    assert result.exit_code == 0, result.stderr
    assert "windows of 32 tokens, not 90" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "nowhere: no such run"),
        (["moeut_tiny", "--windows", "0"], 2, "--windows"),
        (["moeut_tiny", "--device", "moon"], 2, "--device moon: not a device"),
        (["moeut_tiny", "--text", "missing.txt"], 1, "no file matches 'missing.txt'"),
        (["moeut_tiny", "--text", "empty.txt"], 1, "less than one window of 32"),
        (["moeut_tiny", "--out", "empty.txt/o"], 1, "empty.txt"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str], code: int, message: str, runs: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    monkeypatch.setenv("MOEUT_COMPOSE_RUNS", str(runs))
    Path("empty.txt").write_text("a")
    result = cli("analyze", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("broken", [False, True])
def test_a_pass_that_nobody_reaches_is_no_error_and_a_broken_model_is(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """All tokens halt before the last pass, which has no figures; or nothing that the model computes is a number."""

    def changed(path: Path, device: str) -> Run:
        run = open_run(path, device)
        with torch.no_grad():
            for halting in (module for module in run.model.modules() if isinstance(module, StickBreaking)):
                halting.inner.weight.zero_()
                halting.inner.bias.fill_(0.12)
                halting.outer.weight.copy_(
                    torch.tensor([[-1.0], [1.0]]).expand(2, halting.inner.out_features)
                )
            if broken:
                run.model.embedding.weight.fill_(float("nan"))
        return run

    monkeypatch.setattr(sys.modules["moeut_compose.cli.analyze"], "open_run", changed)
    shutil.copytree(runs / "sut_tiny", tmp_path / "run")
    result = CliRunner().invoke(app, ["analyze", str(tmp_path / "run"), "--windows", "1", "--device", "cpu"])
    assert (result.exit_code, "is not finite" in result.output) == (int(broken), broken), result.output
    if not broken:
        numbers = json.loads((tmp_path / "run" / "analysis" / "analysis.json").read_text())
        assert "null" in json.dumps(numbers["residual"]["rms_after"])
