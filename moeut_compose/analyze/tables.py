"""The parts of the report that are words: what experts work for, and a text coloured by depth."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from moeut_compose.analyze.document import context

if TYPE_CHECKING:
    from moeut_compose.analyze.collect import RouterFigures
    from moeut_compose.analyze.diversity import ExpertTokens
    from moeut_compose.analyze.halting import Depths, TokenDepth
    from moeut_compose.analyze.run import Analysis

N_MOST_USED = 5
N_SPECIALISTS = 7
MIN_USES = 20
"""Uses below which an expert is no specialist, only rare."""
MAX_TABLES = 24


def experts_section(analysis: Analysis) -> str:
    """A table of the most used and the most specialised experts of each router."""
    routers = analysis.figures.routers
    if not routers:
        return ""
    ranked = sorted(routers, key=lambda router: -router.n_experts)[:MAX_TABLES]
    shown = [router for router in routers if router in ranked]
    widest = max(shown, key=lambda router: router.n_experts)
    tables = "".join(_router_table(router, analysis, is_open=router is widest) for router in shown)
    rest = len(routers) - len(shown)
    more = f'<p class="soft">{rest} more routers are in analysis.json.</p>' if rest else ""
    return f"""<article id="experts">
<h3>What experts work for</h3>
<p class="question">Can the job of an expert be told from its tokens?</p>
<p>The experts that are used most, and the most specialised ones: those whose tokens differ most from those of the
router as a whole. Tokens are ordered by their part in that difference; ▁ marks the start of a word. Places are where
the expert weighs most.</p>
{tables}{more}</article>
"""


def _router_table(router: RouterFigures, analysis: Analysis, *, is_open: bool) -> str:
    names = analysis.names
    experts = choose_experts(router)
    rows = "".join(_expert_row(expert, router, analysis) for expert in experts)
    title = f"{names.member(router.name.stage, router.name.member)}: {names.role(router.name.role)}"
    passes = "<th>passes</th>" if router.n_repeats > 1 else ""
    return f"""<details{" open" if is_open else ""}><summary>{escape(title)}</summary>
<div class="table"><table><thead><tr><th>expert</th><th class="number">uses / even</th>
<th class="number">effective tokens</th>{passes}<th>typical tokens</th><th>strongest places</th></tr></thead><tbody>
{rows}</tbody></table></div></details>
"""


def choose_experts(router: RouterFigures) -> list[ExpertTokens]:
    """The most used experts, then the most specialised of the others."""
    by_use = sorted(router.diversity.experts, key=lambda expert: -expert.uses)
    most_used = [expert for expert in by_use[:N_MOST_USED] if expert.uses]
    others = [expert for expert in by_use[N_MOST_USED:] if expert.uses >= MIN_USES]
    return most_used + sorted(others, key=lambda expert: -expert.specialisation)[:N_SPECIALISTS]


def _expert_row(expert: ExpertTokens, router: RouterFigures, analysis: Analysis) -> str:
    name = f"{expert.head}.{expert.expert}" if router.n_heads > 1 else str(expert.expert)
    of_head = [other.uses for other in router.diversity.experts if other.head == expert.head]
    pieces = analysis.vocabulary.pieces([token.id for token in expert.typical])
    tokens = "".join(
        f'<span class="token" title="{100 * token.share:.1f} % of its uses, {token.lift:.1f} times the usual share">'
        f"{escape(text)}</span>"
        for text, token in zip(pieces, expert.typical, strict=True)
    )
    places = "".join(_place(analysis, place.position) for place in expert.places[:2])
    passes = f"<td>{_bars(router, expert)}</td>" if router.n_repeats > 1 else ""
    return (
        f'<tr><td>{name}</td><td class="number">{expert.uses / np.mean(of_head):.2f}</td>'
        f'<td class="number">{expert.effective:.1f}</td>{passes}<td>{tokens}</td><td>{places}</td></tr>\n'
    )


def _place(analysis: Analysis, position: int) -> str:
    around = {name: escape(text) for name, text in context(analysis, position).items()}
    return f'<span class="place">…{around["before"]}<mark>{around["token"]}</mark>{around["after"]}…</span>'


def _bars(router: RouterFigures, expert: ExpertTokens) -> str:
    """How the uses of an expert divide over the passes."""
    uses = router.usage.share[:, expert.head, expert.expert] * router.usage.tokens
    share = uses / max(uses.sum(), 1)
    text = ", ".join(f"pass {number + 1}: {100 * part:.0f} %" for number, part in enumerate(share))
    bars = "".join(f'<i style="height: {100 * part:.0f}%"></i>' for part in share)
    return f'<span class="bars" role="img" aria-label="{text}" title="{text}">{bars}</span>'


def halting_words(analysis: Analysis) -> str:
    """The first window with its depths as colours, and the words that go deepest."""
    return "".join(_stage_words(stage, depths, analysis) for stage, depths in analysis.figures.depths.items())


def _stage_words(stage: int, depths: Depths, analysis: Analysis) -> str:
    expected = depths.windows[0]
    low, high = float(expected.min()), float(expected.max())
    scaled = (expected - low) / (high - low) if high > low else np.zeros_like(expected)
    text = "".join(
        f'<span style="--d: {place:.2f}" title="{depth:.2f} passes">{escape(_readable(piece))}</span>'
        for piece, place, depth in zip(
            analysis.vocabulary.pieces(depths.ids[0]), scaled, expected, strict=True
        )
    )
    return f"""<article id="halting-words-{stage}">
<h3>A text by depth</h3>
<p class="question">Which words does the model go on with?</p>
<p>The first window, each token coloured by its expected number of passes: {low:.2f} <span class="scale"></span>
{high:.2f}. A pointer that rests on a token shows its number.</p>
<p class="words">{text}</p>
<p><b>Deepest on average:</b> {_word_list(depths.deep, analysis)}</p>
<p><b>Shallowest on average:</b> {_word_list(depths.shallow, analysis)}</p>
</article>
"""


def _word_list(found: tuple[TokenDepth, ...], analysis: Analysis) -> str:
    pieces = analysis.vocabulary.pieces([word.id for word in found])
    return "".join(
        f'<span class="token" title="{word.occurrences} times">{escape(text)} {word.expected:.2f}</span>'
        for text, word in zip(pieces, found, strict=True)
    )


def _readable(piece: str) -> str:
    return piece.replace("▁", " ").replace("<0x0A>", "⏎\n")
