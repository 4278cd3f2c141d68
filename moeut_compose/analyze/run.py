"""Analysing a trained run: its text, its names, and the files that hold the results."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeut_compose.analyze.collect import Figures, observe_model
from moeut_compose.analyze.names import Names
from moeut_compose.data.errors import DataError
from moeut_compose.data.files import write_atomically
from moeut_compose.data.tokenizer import Tokenizer
from moeut_compose.data.tokens import TokenFile, open_tokens
from moeut_compose.evaluate.perplexity import held_out_text
from moeut_compose.progress import SilentReporter
from moeut_compose.spec.recipe import TextData
from moeut_compose.train.folder import TOKENIZER, VALIDATION

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from moeut_compose.progress import Reporter
    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.train.run import Run

DEFAULT_WINDOWS = 32
FOLDER = "analysis"
DOCUMENT = "analysis.json"
REPORT = "report.html"
PLOTS = "plots"


class NoText(DataError):
    """There is nothing that the run could read while it is watched."""


@dataclass(frozen=True)
class Vocabulary:
    """What ids stand for; without a tokenizer, numbers."""

    tokenizer: Tokenizer | None

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Each token as text; `▁` marks where a word starts."""
        if self.tokenizer is None:
            return [f"#{int(identity)}" for identity in ids]
        known = self.tokenizer.vocab_size
        return [
            self.tokenizer.pieces([identity])[0] if identity < known else f"#{identity}"
            for identity in map(int, ids)
        ]

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Tokens as one line of text."""
        between = " " if self.tokenizer is None else ""
        return between.join(self.pieces(ids)).replace("▁", " ").replace("<0x0A>", "⏎")


@dataclass(frozen=True)
class Analysis:
    """The figures of one run, and what is needed to name things in them."""

    spec: ModelSpec
    run: Path
    step: int
    figures: Figures
    ids: np.ndarray
    """The text that was read, as ids."""
    vocabulary: Vocabulary
    source: str
    """Which text that was."""

    @property
    def names(self) -> Names:
        return Names.of(self.spec)


def analyze_run(
    run: Run,
    *,
    windows: int | None = None,
    text_file: Path | None = None,
    batch_size: int = 4,
    reporter: Reporter | None = None,
) -> Analysis:
    """Watch a trained run read held-out text, or the text in `text_file`.

    By default as many windows are read as the run folder holds, at most `DEFAULT_WINDOWS`. Raises `NoText`
    where there is no text to read, `DataError` where it cannot be used.
    """
    reporter = reporter or SilentReporter()
    vocabulary = _vocabulary(run, reporter)
    text, source = _find_text(run, vocabulary, windows, text_file, reporter)
    figures = observe_model(
        run.model,
        run.spec,
        text,
        context=run.context,
        windows=windows or DEFAULT_WINDOWS,
        batch_size=batch_size,
        reporter=reporter,
    )
    sizes = figures.residual.rms_after  # not a number also where no token comes to a pass
    if np.isnan(sizes).all() or np.isinf(sizes).any():
        raise DataError("what the model computes is not finite: there is nothing to look at")
    if windows is not None and figures.windows < windows:
        reporter.warn(f"the text has {figures.windows} windows of {run.context} tokens, not {windows}")
    ids = text.ids[: figures.tokens + 1]
    return Analysis(run.spec, run.path, run.step, figures, ids, vocabulary, source)


def _vocabulary(run: Run, reporter: Reporter) -> Vocabulary:
    if (run.path / TOKENIZER).is_file():
        return Vocabulary(run.tokenizer)
    reporter.warn(f"{run.path} has no {TOKENIZER}; tokens are shown as numbers")
    return Vocabulary(None)


def _find_text(
    run: Run, vocabulary: Vocabulary, windows: int | None, text_file: Path | None, reporter: Reporter
) -> tuple[TokenFile, str]:
    """The text to read, and what it is called."""
    if text_file is None:
        with suppress(DataError):
            stored = open_tokens(run.path / VALIDATION, vocabulary.tokenizer)
            stored.check(run.spec.vocab_size)
            if stored.n_windows(run.context) >= (windows or 1):
                return stored, "held-out text of the run"
    if vocabulary.tokenizer is None:
        raise NoText(
            f"{run.path} has no tokenizer, and {_missing(text_file)}: put the SentencePiece model of the run "
            f"at {run.path / TOKENIZER}, or name it in `import --tokenizer`; "
            "`show`, `params` and `macs` work without one"
        )
    data = None
    if text_file is not None:
        data = TextData(files=[str(text_file)], validation_files=[str(text_file)])
    try:
        text = held_out_text(run, windows=windows or DEFAULT_WINDOWS, data=data, reporter=reporter)
    except DataError as error:
        if text_file is not None:
            raise
        raise NoText(f"{error}; --text FILE reads a text of your own instead") from error
    if not isinstance(text, TokenFile):
        raise NoText("synthetic examples are no text; `evaluate --tasks synthetic` scores them by difficulty")
    return text, "held-out text of the recipe" if text_file is None else str(text_file)


def _missing(text_file: Path | None) -> str:
    if text_file is not None:
        return f"{text_file} cannot be tokenised"
    return "its folder does not hold enough tokenised text to read"


def write_analysis(analysis: Analysis, out: Path) -> dict[str, Any]:
    """Write `analysis.json`, plots and `report.html` into a folder; returns the document. Raises `OSError`."""
    from moeut_compose.analyze.document import describe
    from moeut_compose.analyze.plots import draw_plots
    from moeut_compose.analyze.report import render_report

    plots = draw_plots(analysis.figures, analysis.names)
    (out / PLOTS).mkdir(parents=True, exist_ok=True)
    files = [plot.write(out / PLOTS) for plot in plots]
    document = describe(analysis)
    document["figures"] = [
        {name: f"{PLOTS}/{value}" if name != "name" else value for name, value in entry.items()}
        for entry in files
    ]
    document["report"] = REPORT
    write_atomically(out / DOCUMENT, f"{json.dumps(document, ensure_ascii=False)}\n".encode())
    write_atomically(out / REPORT, render_report(analysis, plots).encode())
    return document
