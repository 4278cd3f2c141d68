"""An analysis as one JSON document. `docs/analysis.md` explains every key; numbers that do not exist are null."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from moeut_compose.analyze.left_out import left_out

if TYPE_CHECKING:
    from moeut_compose.analyze.collect import RouterFigures
    from moeut_compose.analyze.diversity import ExpertTokens
    from moeut_compose.analyze.halting import Depths, TokenDepth
    from moeut_compose.analyze.run import Analysis

VERSION = 1
BEFORE, AFTER = 12, 4
"""Tokens of context around a place."""


def describe(analysis: Analysis) -> dict[str, Any]:
    """Everything but the names of the files."""
    seen, names = analysis.figures, analysis.names
    return {
        "version": VERSION,
        "name": analysis.spec.name,
        "run": str(analysis.run),
        "step": analysis.step,
        "text": {
            "source": analysis.source,
            "windows": seen.windows,
            "context": seen.context,
            "tokens": seen.tokens,
            "tokenizer": analysis.vocabulary.tokenizer is not None,
        },
        "cross_entropy": rounded(seen.cross_entropy),
        "perplexity": rounded(math.exp(min(seen.cross_entropy, 700.0))),
        "applications": [{"label": names.application(step), **step._asdict()} for step in seen.steps],
        "residual": {name: rounded(value) for name, value in vars(seen.residual).items()},
        "similarity": {name: rounded(value) for name, value in vars(seen.similarity).items()},
        "loss_by_repeats": [
            {
                "stage": curve.stage,
                "trained": curve.trained,
                "limit": curve.limit,
                "points": [
                    {"repeats": point.repeats, "cross_entropy": rounded(point.cross_entropy)}
                    for point in curve.points
                ],
            }
            for curve in seen.curves
        ],
        "routers": [_router(router, analysis) for router in seen.routers],
        "halting": [_depths(stage, depths, analysis) for stage, depths in seen.depths.items()],
        "left_out": left_out(seen),
    }


def _router(router: RouterFigures, analysis: Analysis) -> dict[str, Any]:
    usage, overlap = router.usage, router.overlap
    return {
        **router.name._asdict(),
        "label": analysis.names.member(router.name.stage, router.name.member),
        "n_heads": router.n_heads,
        "n_experts": router.n_experts,
        "n_repeats": router.n_repeats,
        "tokens": rounded(usage.tokens),
        "share": rounded(usage.share),
        "weight": rounded(usage.weight),
        "entropy": rounded(usage.entropy),
        "usage_entropy": rounded(usage.usage_entropy),
        "top1_over_median": rounded(usage.top1_over_median),
        "max_over_mean": rounded(usage.max_over_mean),
        "dead": rounded(usage.dead),
        "overlap": {
            "between": rounded(overlap.between),
            "unrelated": rounded(overlap.unrelated),
            "same_token": rounded(overlap.same_token),
            "fresh": rounded(overlap.fresh),
            "path_diversity": rounded(overlap.path_diversity),
        },
        "effective_tokens": rounded(router.diversity.effective),
        "experts": [_expert(expert, analysis) for expert in router.diversity.experts],
        "pairs": [{**asdict(pair), "lift": rounded(pair.lift)} for pair in router.pairs.closest()],
    }


def _expert(expert: ExpertTokens, analysis: Analysis) -> dict[str, Any]:
    pieces = analysis.vocabulary.pieces([token.id for token in expert.typical])
    return {
        "head": expert.head,
        "expert": expert.expert,
        "uses": expert.uses,
        "distinct_tokens": expert.distinct,
        "effective_tokens": rounded(expert.effective),
        "specialisation": rounded(expert.specialisation),
        "tokens": [
            {"id": token.id, "text": text, "share": rounded(token.share), "lift": rounded(token.lift)}
            for token, text in zip(expert.typical, pieces, strict=True)
        ],
        "contexts": [
            {
                "position": place.position,
                "repeat": place.repeat,
                "gate": rounded(place.gate),
                **context(analysis, place.position),
            }
            for place in expert.places
        ],
    }


def context(analysis: Analysis, position: int) -> dict[str, str]:
    """The text around a token: before it what the model could see in its window, after it what came next."""
    window = position - position % analysis.figures.context
    words = analysis.vocabulary
    return {
        "before": words.text(analysis.ids[max(window, position - BEFORE) : position]),
        "token": words.text(analysis.ids[position : position + 1]),
        "after": words.text(analysis.ids[position + 1 : position + 1 + AFTER]),
    }


def _depths(stage: int, depths: Depths, analysis: Analysis) -> dict[str, Any]:
    def words(found: tuple[TokenDepth, ...]) -> list[dict[str, Any]]:
        pieces = analysis.vocabulary.pieces([word.id for word in found])
        return [
            {"id": word.id, "text": text, "occurrences": word.occurrences, "expected": rounded(word.expected)}
            for word, text in zip(found, pieces, strict=True)
        ]

    return {
        "stage": stage,
        "tokens": depths.tokens,
        "mean": rounded(depths.mean),
        "passes": rounded(depths.passes),
        "mass": rounded(depths.mass),
        "expected": rounded(depths.expected),
        "loss_by_passes": rounded(depths.loss),
        "loss_by_expected": rounded(depths.loss_expected),
        "deepest": words(depths.deep),
        "shallowest": words(depths.shallow),
        "windows": [
            {"tokens": analysis.vocabulary.pieces(ids), "expected": rounded(expected)}
            for ids, expected in zip(depths.ids, depths.windows, strict=True)
        ],
    }


def rounded(value: Any) -> Any:
    """Six significant digits; whole numbers as such, NaN and infinity as null."""
    if isinstance(value, np.ndarray):
        return [rounded(part) for part in value] if value.ndim else rounded(value.item())
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number == int(number) and abs(number) < 1e15 else float(f"{number:.6g}")
