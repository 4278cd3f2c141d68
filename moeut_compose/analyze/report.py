"""One page that holds everything: no script, no link to anything outside, figures as inline SVG."""

from __future__ import annotations

import math
import re
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from moeut_compose.analyze import words
from moeut_compose.analyze.draw import COLOURS, INK
from moeut_compose.analyze.findings import FINDINGS
from moeut_compose.analyze.left_out import left_out
from moeut_compose.analyze.tables import experts_section, halting_words

if TYPE_CHECKING:
    from moeut_compose.analyze.plots import Plot
    from moeut_compose.analyze.run import Analysis

SMALL = 400
"""Points of width up to which a figure fits on a phone as it is."""


def render_report(analysis: Analysis, plots: list[Plot]) -> str:
    """The page as HTML."""
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    title = escape(f"{analysis.spec.name} at step {analysis.step:,}")
    drawn = {plot.name: plot for plot in plots}
    sections = "".join(_section(name, analysis, drawn) for name in words.SECTIONS)
    links = "".join(f'<li><a href="#{_anchor(name)}">{name}</a></li>' for name in words.SECTIONS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Inside {title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>Inside {title}</h1>
<p class="soft">{escape(analysis.spec.description)}</p>
{_facts(analysis)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
{_order(analysis)}
<p class="soft sideways">On a narrow screen, figures and tables can be moved sideways.</p>
</header>
<main>
{sections}</main>
<footer>Read: {escape(analysis.source)}, in windows that begin without context. All figures lie beside this page as
PNG and SVG in <code>plots</code>, all numbers in <code>analysis.json</code>. Statistics are means over tokens that run;
expert choices of tokens that have halted are not counted, but for values, which others still read.</footer>
</body>
</html>
"""


def _facts(analysis: Analysis) -> str:
    seen = analysis.figures
    facts = {
        "perplexity": f"{math.exp(min(seen.cross_entropy, 700.0)):,.2f}",
        "cross entropy, nats": f"{seen.cross_entropy:.3f}",
        "parameters": f"{analysis.spec.num_params():,}",
        "layer applications": f"{len(seen.steps):,}",
        "routers": f"{len(seen.routers):,}",
        "tokens read": f"{seen.tokens:,}",
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _order(analysis: Analysis) -> str:
    """The applications in running order, which explains the labels of all figures."""
    names = analysis.names
    labels = [names.application(step) for step in analysis.figures.steps]
    items = "".join(f"<li>{label}</li>" for label in labels)
    meaning = "A letter is a set of weights"
    if max(names.repeats) > 1:
        meaning += ", a number behind it the pass"
    if len(names.repeats) > 1:
        meaning += ", a number before it the stage, from 0 as in the architecture file"
    return f'<p class="soft">Layers run in this order. {meaning}.</p><ol class="order">{items}</ol>'


def _section(section: str, analysis: Analysis, drawn: dict[str, Plot]) -> str:
    names = [name for name, text in words.WORDS.items() if text.section == section]
    missing = left_out(analysis.figures)
    parts = [_article(drawn[name], analysis) for name in names if name in drawn]
    if section == words.EXPERTS:
        parts.append(experts_section(analysis))
    if section == words.HALTING:
        parts.append(halting_words(analysis))
    reasons: dict[str, list[str]] = {}
    for name in names:
        if name not in drawn:
            reasons.setdefault(missing[name], []).append(words.WORDS[name].title)
    parts += [
        f'<p class="missing">Left out, because {reason}: {escape(", ".join(titles))}.</p>'
        for reason, titles in reasons.items()
    ]
    return f'<section id="{_anchor(section)}">\n<h2>{section}</h2>\n{"".join(parts)}</section>\n'


def _article(plot: Plot, analysis: Analysis) -> str:
    text = words.WORDS[plot.name]
    findings = FINDINGS[plot.name](analysis.figures, analysis.names) if plot.name in FINDINGS else []
    sentences = "".join(f"<p>{escape(finding)}</p>" for finding in findings)
    found = f'<div class="found"><b>In this run</b>{sentences}</div>' if findings else ""
    label = escape(" ".join((f"{text.title}.", *findings)), quote=True)
    width = svg_width(plot.svg)
    small = " small" if width <= SMALL else ""
    return f"""<article id="{plot.name}">
<h3>{text.title}</h3>
<p class="question">{escape(text.question)}</p>
<figure>
<div class="plot{small}" role="img" tabindex="0" aria-label="{label}">
{inline_svg(plot.name, plot.svg)}
</div>
<figcaption>{found}
<p><b>What it shows</b>{escape(text.shows)}</p>
<p><b>How to read it</b>{escape(text.reading)}</p>
</figcaption>
</figure>
</article>
"""


def svg_width(svg: str) -> float:
    """The width in points that a figure was drawn for."""
    found = re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)
    assert found is not None
    return float(found[1])


def inline_svg(name: str, svg: str) -> str:
    """The element alone: text and first line in the colours of the page, no metadata, ids that no other figure has."""
    svg = svg[svg.index("<svg") :].strip()
    width = svg_width(svg) * 4 / 3
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="max-width: {width:.0f}px"', svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return svg.replace(INK, "currentColor").replace(COLOURS[0].lower(), "var(--accent)")


def _anchor(section: str) -> str:
    return "section-" + section.lower().replace(" ", "-")
