"""`train`, `evaluate` and `generate` through the command line, on a small model and the built-in corpus."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeut_compose.cli import app
from moeut_compose.cli.plan import draw_curve
from moeut_compose.spec.io import load_recipe, load_spec
from tests.conftest import ROOT

from .conftest import RECIPE, SMALL


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache of tokenised text for all tests here."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEUT_COMPOSE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made as a user makes one; tests must not write to it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "short.yaml").write_text(RECIPE)
    run = folder / "run"
    arguments = [
        "train",
        "moeut_tiny",
        *SMALL,
        "--recipe",
        str(folder / "short.yaml"),
        "--out",
        str(run),
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (folder / "stdout").write_text(result.stdout)
    return run


def test_a_run_ends_with_perplexity_sample_and_plot(trained: Path) -> None:
    lines = (trained.parent / "stdout").read_text().splitlines()
    assert lines[0].startswith("moeut_tiny: 2 steps, 128 tokens, ")
    assert float(lines[1].split()[2]) > 1
    assert lines[2] == "sample"
    plot = Path(lines[-2].removeprefix("loss plot").strip())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert lines[-1] == f"run folder  {trained}"


def test_a_run_folder_holds_what_was_asked_for(trained: Path) -> None:
    assert load_spec(trained) == load_spec("moeut_tiny", SMALL)
    assert load_recipe(trained).steps == 2
    assert json.loads((trained / "environment.json").read_text())["starts"][0]["device"] == "cpu"


def test_evaluate_json(trained: Path, cli_json) -> None:
    result = cli_json("evaluate", str(trained), "--device", "cpu")
    assert list(result) == [
        "name", "run", "step", "cross_entropy", "perplexity", "bits_per_byte", "tokens", "windows",
    ]  # fmt: skip
    assert (result["step"], result["windows"], result["tokens"]) == (2, 2, 64)
    said = float((trained.parent / "stdout").read_text().splitlines()[1].split()[2])
    assert result["perplexity"] == pytest.approx(said, abs=0.01)


def test_evaluate_for_people(trained: Path, cli) -> None:
    result = cli("evaluate", str(trained), "--windows", "1", "--device", "cpu")
    assert result.exit_code == 0
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[1:]] == [
        "perplexity",
        "cross entropy",
        "bits per byte",
    ]


def test_generate_repeats_itself_for_a_seed(trained: Path, cli, cli_json) -> None:
    arguments = ["generate", str(trained), "--prompt", "The sea", "--max-new-tokens", "5", "--device", "cpu"]
    first, again, other = cli(*arguments), cli(*arguments), cli(*arguments, "--seed", "1")
    assert first.stdout.startswith("The sea")
    assert first.stdout == again.stdout != other.stdout
    document = cli_json(*arguments)
    assert list(document) == ["name", "run", "step", "prompt", "text"]
    assert f"{document['text']}\n" == first.stdout


def test_a_run_is_found_below_the_folder_of_runs(trained: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEUT_COMPOSE_RUNS", str(trained.parent))
    assert cli("generate", "run", "--max-new-tokens", "1", "--device", "cpu").exit_code == 0
    result = cli("generate", "rum")
    assert (result.exit_code, result.stderr) == (2, "error: rum: no such run; did you mean run?\n")


def test_a_finished_run_goes_on_with_more_steps(trained: Path, cli_json, cli, tmp_path: Path) -> None:
    result = cli_json(
        "train", "--resume", str(trained), "recipe.steps=3", "--out", "longer", "--device", "cpu"
    )
    assert (result["run"], result["step"], result["tokens"]) == ("longer", 3, 192)
    again = cli("train", "longer", "--device", "cpu")
    assert again.exit_code == 0
    assert "going on at step 3" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--out", "RUN", "--resume", "none"], 1, "is not empty"),
        (["--out", "RUN", "d_model=64"], 1, "another architecture"),
        (["--recipe", "short.yaml", "recipe.context=9999"], 1, "recipe.context=9999 exceeds"),
        (["--recipe", "short.yaml", "--out", "file"], 1, "file is not empty"),
        (["--recipe", "short.yaml", "recipe.data={kind: text, files: [nowhere.txt]}"], 1, "nowhere.txt"),
        (
            ["--recipe", "short.yaml", "recipe.tokenizer={kind: sentencepiece, file: nowhere.model}"],
            1,
            "nowhere.model",
        ),
        (["--recipe", "short.yaml", "recipe.steps=null"], 1, "give steps or tokens"),
    ],
)
def test_training_that_cannot_start_says_why_in_one_line(
    trained: Path, cli, arguments: list[str], code: int, message: str
) -> None:
    Path("short.yaml").write_text(RECIPE)
    Path("file").touch()
    result = cli(
        "train", "moeut_tiny", *SMALL, "--device", "cpu", *(a.replace("RUN", str(trained)) for a in arguments)
    )
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not Path("runs").exists()


def test_a_run_without_a_whole_checkpoint_is_refused(trained: Path, cli) -> None:
    shutil.copytree(trained, "damaged")
    for file in Path("damaged/checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"nothing")
    result = cli("generate", "damaged", "--device", "cpu")
    assert (result.exit_code, result.stdout) == (1, "")
    warning, error = result.stderr.splitlines()
    assert warning.startswith("warning: damaged/checkpoints/step-00000002: ")
    assert error.startswith("error: damaged")


def test_a_run_goes_back_to_its_last_whole_checkpoint(trained: Path, cli) -> None:
    shutil.copytree(trained, "damaged")
    assert cli("train", "damaged", "recipe.steps=3", "--device", "cpu").exit_code == 0
    (newest,) = Path("damaged/checkpoints/step-00000003").glob("*.safetensors")
    newest.write_bytes(b"nothing")
    result = cli("generate", "damaged", "--max-new-tokens", "2", "--device", "cpu")
    assert (result.exit_code, len(result.stderr.splitlines())) == (0, 1)
    assert result.stderr.startswith("warning: damaged/checkpoints/step-00000003: ")


def test_a_folder_that_is_no_run_is_refused(trained: Path, cli) -> None:
    shutil.copytree(trained, "damaged")
    Path("damaged/architecture.yaml").unlink()
    result = cli("generate", "damaged", "--device", "cpu")
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: damaged")
    assert len(result.stderr.splitlines()) == 1


def test_a_dry_run_builds_no_data(cli, cli_json, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEUT_COMPOSE_CACHE", str(tmp_path / "untouched"))
    Path("short.yaml").write_text(RECIPE)
    arguments = ["train", "moeut_tiny", "--recipe", "short.yaml", "--dry-run", "--device", "cpu"]
    shown = cli(*arguments)
    assert shown.exit_code == 0
    for word in (
        "parameters      2,460,928 ",
        "steps           2",
        "tokens          128",
        "memory ",
        "learning rate",
    ):
        assert word in shown.stdout
    plan = cli_json(*arguments)
    assert (plan["params"], plan["steps"], plan["tokens"], plan["micro_batch"]) == (2_460_928, 2, 128, 1)
    assert plan["lr_curve"][-1][0] == 1
    assert not (tmp_path / "untouched").exists()
    assert not Path("runs").exists()


def test_the_curve_is_drawn_over_steps() -> None:
    lines = draw_curve([(0, 0.0), (50, 1.0), (99, 0.5)])
    bars = [line[:48] for line in lines[:4]]
    assert [row[10] for row in bars] == [" "] * 4
    assert [row[30] for row in bars] == ["█"] * 4
    assert [row[-1] for row in bars] == [" ", " ", "█", "█"]
    assert "peak 1 at step 50" in lines[0]
    assert lines[4].split() == ["0", "step", "99"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    cache: Path, trained: Path, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    recipe = trained.parent / "short.yaml"
    line = [sys.executable, "-m", "moeut_compose", "train", "moeut_tiny", *SMALL, "--recipe", str(recipe)]
    line += ["recipe.steps=1000000", "--out", "stopped", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    wait_for(process.stderr.readline, "run folder: stopped")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (code, "")
    assert "--resume" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert list(Path("stopped/checkpoints").glob("step-*/*.safetensors"))


def wait_for(readline: Callable[[], str], text: str) -> None:
    while line := readline():
        if line.startswith(text):
            return
    raise AssertionError(f"the process ended without {text!r}")


def wait_until(happened: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    import time

    while not happened():
        assert process.poll() is None, "the process ended early"
        time.sleep(0.05)


def test_a_file_of_prompts_gives_each_what_it_gives_alone(trained: Path, cli, cli_json) -> None:
    Path("prompts.txt").write_text("The sea\n\nA long time ago, in the house\n")
    Path("prompts.jsonl").write_text('{"prompt": "The sea"}\n"A long time ago, in the house"\n')
    settings = ["--max-new-tokens", "5", "--min-p", "0.01", "--repetition-penalty", "1.1", "--device", "cpu"]
    result = cli("generate", str(trained), "--prompts", "prompts.txt", "--json", *settings)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [list(line) for line in lines] == [["prompt", "text", "tokens", "seed", "end"]] * 2
    for index, line in enumerate(lines):
        alone = cli_json(
            "generate", str(trained), "--prompt", line["prompt"], "--seed", str(index), *settings
        )
        assert line["text"] == alone["text"]
    again = cli("generate", str(trained), "--prompts", "prompts.jsonl", "--batch-size", "1", *settings)
    assert again.stdout == "".join(f"{line['text']}\n" for line in lines)


def test_the_kernels_of_a_gpu_are_refused_on_a_cpu(trained: Path, cli) -> None:
    settings = ["recipe.backend=triton", "--device", "cpu", "--out", "new"]
    result = cli("train", "moeut_tiny", "--recipe", "quickstart", *settings)
    assert (result.exit_code, Path("new").exists()) == (1, False)
    assert result.stderr.splitlines()[-1].startswith("error: the back end triton needs a CUDA device")


def test_only_line_ends_part_prompts_and_white_space_begins_a_document(trained: Path, cli) -> None:
    Path("prompts.jsonl").write_bytes('\ufeff"a\u2028b"\r\n{"prompt": "\u200b"}\n"a\x85b"\n'.encode())
    settings = ["--max-new-tokens", "2", "--json", "--device", "cpu"]
    result = cli("generate", str(trained), "--prompts", "prompts.jsonl", *settings)
    prompts = [json.loads(line)["prompt"] for line in result.stdout.split("\n") if line]
    assert prompts == ["a\u2028b", "\u200b", "a\x85b"]
    assert cli("generate", str(trained), "--prompt", " ", *settings).exit_code == 0
    assert cli("generate", str(trained), "--seed", str(2**63), *settings).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompts", "nowhere.txt"], 1, "nowhere.txt: no such file or directory"),
        (
            ["--prompts", "bad.jsonl"],
            1,
            'bad.jsonl:2: neither a text nor an object with a text named "prompt"',
        ),
        (["--prompts", "worse.jsonl"], 1, "worse.jsonl:1: not JSON (Expecting value)"),
        (["--prompts", "bad.jsonl", "--prompt", "x"], 2, "give --prompt or --prompts, not both"),
        (["--min-p", "2"], 2, "min_p=2.0 must lie between 0 and 1"),
        (["--fast", "--device", "cpu"], 2, "--fast needs a CUDA device"),
    ],
)
def test_generate_refuses_in_one_line(
    trained: Path, cli, arguments: list[str], code: int, message: str
) -> None:
    Path("bad.jsonl").write_text('"fine"\n[1]\n')
    Path("worse.jsonl").write_text("nothing\n")
    result = cli("generate", str(trained), *arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"error: {message}\n")
