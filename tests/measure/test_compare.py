"""Rows of a comparison, from specs and from runs, and their picture."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moeut_compose.measure.compare import row_of_run, row_of_spec
from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.plots import draw_comparison, plot_comparison
from moeut_compose.spec.io import load_spec

TRAIN = {"event": "train", "cross_entropy": 4.0, "tokens_per_second": 100.0, "memory_bytes": 2**31}
REACHED = {"cross_entropy": 4.9, "perplexity": 134.3, "bits_per_byte": 2.2}


def write_metrics(folder: Path) -> None:
    entries = [
        TRAIN | {"step": 1, "tokens": 1000, "cross_entropy": 5.0, "memory_bytes": 2**30},
        {"event": "validation", "step": 1, "tokens": 1000} | REACHED,
        TRAIN | {"step": 2, "tokens": 3000, "tokens_per_second": 200.0},
    ]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_a_run_knows_what_it_reached_and_what_it_spent(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    spec = load_spec("moeut_tiny")
    row = row_of_run(tmp_path, spec, 64)
    per_token = count_macs(spec, 64).total_per_token
    assert row.name == tmp_path.name
    assert (row.tokens, row.training_macs) == (3000, 3 * per_token * 3000)
    assert (row.loss, row.validation_loss, row.perplexity, row.bits_per_byte) == (4.0, 4.9, 134.3, 2.2)
    assert (row.tokens_per_second, row.memory_gib) == (150.0, 2.0)
    assert [point.seconds for point in row.history] == [10.0, 20.0]


def test_a_spec_leaves_open_what_only_training_tells() -> None:
    row = row_of_spec(load_spec("dense_tiny"))
    assert row.macs_per_token == 2579968
    assert row.loss is row.tokens is row.tokens_per_second is None


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "tr',
        "3",
        '{"step": 4}',
        '{"event": "validation"}',
        json.dumps(TRAIN | {"tokens": "many"}),
        json.dumps(TRAIN | {"tokens": 10**400}),
        json.dumps(TRAIN | {"tokens": True}),
        "[" * 100_000,
        "9" * 5000,
    ],
)
def test_damaged_metrics_are_named(tmp_path: Path, line: str) -> None:
    write_metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:4: not a line of metrics"):
        row_of_run(tmp_path, load_spec("dense_tiny"), 64)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_names_every_model_and_unit(tmp_path: Path, ending: str) -> None:
    write_metrics(tmp_path / "run")
    rows = [row_of_spec(load_spec("dense_tiny")), row_of_run(tmp_path / "run", load_spec("moeut_tiny"), 64)]
    target = tmp_path / "deep" / f"sizes.{ending}"
    plot_comparison(rows, target)
    if ending == "svg":
        comments = "".join(ElementTree.parse(target, parser=_with_comments()).getroot().itertext())
        for text in (
            "dense_tiny",
            "parameters (millions)",
            "MACs per token (millions)",
            "nats per token",
            "minutes",
        ):
            assert text in comments
    else:
        assert target.read_bytes().startswith(b"\x89PNG")


def _with_comments() -> ElementTree.XMLParser:
    return ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))


def test_nothing_is_clipped_and_models_of_one_name_stay_apart(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run_with_a_rather_long_name-lr_0.003-d_model_1024")
    run = row_of_run(next(tmp_path.iterdir()), load_spec("moeut_tiny"), 64)
    rows = [row_of_spec(load_spec(name)) for name in ("dense_244m", "moeut_1b", "moeut_1b")] * 4 + [run]
    figure = draw_comparison(rows)
    figure.canvas.draw()
    (width, height), box = figure.get_size_inches(), figure.get_tightbbox()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    bars, *_ = figure.subfigs[0].axes
    assert len(bars.patches) == len(bars.get_yticklabels()) == 13
    assert len({round(patch.get_y(), 3) for patch in bars.patches}) == 13


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in one of"):
        plot_comparison([row_of_spec(load_spec("dense_tiny"))], tmp_path / "sizes.docx")
