"""From figures to files: JSON keys, plots, and a page that needs nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moeut_compose.analyze.collect import observe_model
from moeut_compose.analyze.document import describe, rounded
from moeut_compose.analyze.draw import INK
from moeut_compose.analyze.left_out import left_out
from moeut_compose.analyze.names import Names
from moeut_compose.analyze.plots import PLOTS
from moeut_compose.analyze.report import inline_svg
from moeut_compose.analyze.run import Analysis, Vocabulary, write_analysis
from moeut_compose.analyze.words import WORDS
from moeut_compose.data.tokens import TokenFile
from moeut_compose.spec.io import load_spec

from .conftest import CONTEXT, VOCABULARY, make, random_text

VOID = {"meta", "br", "link", "img", "input", "hr"}


def analysis_of(name: str, text: TokenFile, *, words: bool = True) -> Analysis:
    model, spec = make(name)
    figures = observe_model(model, spec, text, context=CONTEXT, windows=5)
    tokenizer = SimpleNamespace(
        vocab_size=VOCABULARY - 5, pieces=lambda ids: [f"▁<w{i}>&" if i else "<0x0A>" for i in ids]
    )
    vocabulary = Vocabulary(tokenizer if words else None)  # type: ignore[arg-type]
    ids = text.ids[: figures.tokens + 1]
    return Analysis(spec, Path("runs/x"), 7, figures, ids, vocabulary, "a text")


class Page(HTMLParser):
    """Checks that elements nest, and collects what matters."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.handle_attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handle_attributes(attrs)

    def handle_attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href", "src", "srcset", "action", "data"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module", params=["dense_tiny", "moeut_act_tiny", "looped_tiny"])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Analysis, Path]:
    analysis = analysis_of(request.param, random_text())
    out = tmp_path_factory.mktemp("analysis") / "out"
    write_analysis(analysis, out)
    return analysis, out


def test_the_page_holds_every_figure_and_nothing_from_outside(written: tuple[Analysis, Path]) -> None:
    analysis, out = written
    html = (out / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", html)
    missing = left_out(analysis.figures)
    assert set(missing) <= set(PLOTS)
    for name in PLOTS:
        assert (name in page.ids) != (name in missing)
        assert (WORDS[name].title in html) or name not in missing
        for ending in ("png", "svg"):
            assert (out / "plots" / f"{name}.{ending}").exists() != (name in missing)
    assert page.tags.count("svg") == len(PLOTS) - len(missing)
    for reason in missing.values():
        assert f"Left out, because {reason}" in html
    assert INK not in html, "text of figures takes the colour of the page"


def test_the_document_has_the_keys_of_its_page(written: tuple[Analysis, Path]) -> None:
    analysis, out = written
    document = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert list(document) == [
        "version", "name", "run", "step", "text", "cross_entropy", "perplexity", "applications", "residual", "similarity",
        "loss_by_repeats", "routers", "halting", "left_out", "figures", "report",
    ]  # fmt: skip
    assert document["text"] == {
        "source": "a text",
        "windows": 5,
        "context": 12,
        "tokens": 60,
        "tokenizer": True,
    }
    n_applications = analysis.spec.depth
    assert len(document["applications"]) == n_applications
    assert list(document["residual"]) == [
        "tokens", "rms_before", "rms_after", "update", "mixer", "feedforward", "cosine",
    ]  # fmt: skip
    assert np.shape(document["similarity"]["states"]) == (n_applications, n_applications)
    assert document["left_out"] == left_out(analysis.figures)
    for figure in document["figures"]:
        assert (out / figure["png"]).read_bytes().startswith(b"\x89PNG")
        assert (out / figure["svg"]).read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert (out / document["report"]).is_file()
    documented = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text(encoding="utf-8")
    for key in keys_of(document):
        assert f"`{key}`" in documented, f"docs/analysis.md does not explain {key}"


def keys_of(value: object) -> set[str]:
    """All keys at any depth, but for those that are names of figures."""
    if isinstance(value, dict):
        own = {key for key in value if key not in PLOTS}
        return own.union(*(keys_of(part) for part in value.values()))
    if isinstance(value, list):
        return set().union(*(keys_of(part) for part in value[:2]))
    return set()


def test_a_router_in_the_document(text: TokenFile) -> None:
    document = describe(analysis_of("moeut_tiny", text))
    router = next(router for router in document["routers"] if router["role"] == "feedforward.router")
    assert (router["label"], router["n_heads"], router["n_experts"], router["n_repeats"]) == ("A", 1, 8, 3)
    assert np.shape(router["share"]) == (3, 1, 8)
    assert np.sum(router["share"]) == pytest.approx(3 * 3, rel=1e-5), "three experts in each of three passes"
    expert = max(router["experts"], key=lambda expert: expert["uses"])
    assert expert["contexts"][0]["token"].strip()
    assert all(token["lift"] > 1 for token in expert["tokens"])


def test_contexts_do_not_reach_over_the_start_of_a_window(text: TokenFile) -> None:
    from moeut_compose.analyze.document import context

    analysis = analysis_of("dense_tiny", text, words=False)
    around = context(analysis, CONTEXT + 2)
    assert around["before"] == f"#{text.ids[CONTEXT]} #{text.ids[CONTEXT + 1]}"
    assert around["token"] == f"#{text.ids[CONTEXT + 2]}"
    assert around["after"].split()[0] == f"#{text.ids[CONTEXT + 3]}"


def test_words_of_a_vocabulary() -> None:
    tokenizer = SimpleNamespace(vocab_size=3, pieces=lambda ids: [["▁a", "b", "<0x0A>"][i] for i in ids])
    words = Vocabulary(tokenizer)  # type: ignore[arg-type]
    assert words.pieces(np.array([0, 1, 5])) == ["▁a", "b", "#5"]
    assert words.text([0, 1, 0, 2]) == " ab a⏎"
    assert Vocabulary(None).text([4, 5]) == "#4 #5"


def test_names_of_applications() -> None:
    from moeut_compose.spec.stages import Step

    one, several = Names((3,)), Names((1, 4))
    assert one.application(Step(0, 1, 2)) == "B3"
    assert several.application(Step(0, 0, 0)) == "0.A"
    assert several.application(Step(1, 1, 3)) == "1.B4"
    assert Names((1,)).member(0, 30) == "M30"
    assert Names.of(load_spec("looped_tiny")).repeats == (1, 4, 1)


def test_numbers_of_the_document() -> None:
    assert rounded(np.array([[1.0, 0.123456789], [np.nan, np.inf]])) == [[1, 0.123457], [None, None]]
    assert rounded(np.float32(2.5)) == 2.5
    assert isinstance(rounded(3.0), int)


def test_experts_that_nothing_uses(text: TokenFile, tmp_path: Path) -> None:
    """Routers that see only zeros: ReLU routers then choose nothing at all."""
    model, spec = make("remoe_tiny")
    for name, weight in model.named_parameters():
        if name.endswith("router.weight"):
            weight.data.zero_()
    figures = observe_model(model, spec, text, context=CONTEXT, windows=2)
    ids = text.ids[: figures.tokens + 1]
    analysis = Analysis(spec, Path("x"), 0, figures, ids, Vocabulary(None), "a text")
    document = write_analysis(analysis, tmp_path)
    assert not np.any([router["share"] for router in document["routers"]])
    assert all(expert["contexts"] == [] for expert in document["routers"][0]["experts"])
    assert "were never used" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_two_inlined_figures_share_no_ids() -> None:
    svg = (
        '<?xml version="1.0"?><svg width="300pt" height="100pt" viewBox="0 0 1 1"><metadata>http://x</metadata>'
        f'<g id="a" clip-path="url(#b)" style="fill: {INK}"/><use xlink:href="#a"/></svg>'
    )
    inlined = inline_svg("load", svg)
    assert inlined == (
        '<svg style="max-width: 400px" viewBox="0 0 1 1">'
        '<g id="load-a" clip-path="url(#load-b)" style="fill: currentColor"/><use xlink:href="#load-a"/></svg>'
    )
