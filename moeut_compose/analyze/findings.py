"""What was found in this run, in words: for each plot some sentences of figures, without judging them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from moeut_compose.analyze.draw import some
from moeut_compose.analyze.draw_passes import passes_of_experts, shared_routers
from moeut_compose.analyze.draw_routers import roles
from moeut_compose.analyze.overlap import mean_of

if TYPE_CHECKING:
    from moeut_compose.analyze.collect import Figures, RouterFigures
    from moeut_compose.analyze.names import Names


def loss_by_repeats(seen: Figures, names: Names) -> list[str]:
    sentences = []
    for curve in seen.curves:
        at = {point.repeats: point.cross_entropy for point in curve.points}
        best = min(at, key=lambda number: at[number])
        of_stage = f"Stage {curve.stage}: " if len(seen.curves) > 1 else ""
        sentence = (
            f"{of_stage}{at[curve.trained]:.3f} nats at the trained {curve.trained} passes, {at[1]:.3f} at one; "
            f"lowest at {best} ({at[best]:.3f})"
        )
        beyond = max(at)
        if beyond > curve.trained:
            sentence += f"; {at[beyond]:.3f} at {beyond}"
        elif curve.limit is not None:
            sentence += "; the stage has weights for no more"
        sentences.append(sentence + ".")
    return sentences


def residual(seen: Figures, names: Names) -> list[str]:
    update = seen.residual.update
    most, least = int(np.nanargmax(update)), int(np.nanargmin(update))
    sizes = seen.residual.rms_after[np.isfinite(seen.residual.rms_after)]
    return [
        f"{names.application(seen.steps[most])} moves the stream most, by {100 * update[most]:.0f} % of its size, "
        f"{names.application(seen.steps[least])} least ({100 * update[least]:.1f} %).",
        f"The stream goes from {sizes[0]:.3g} after the first application to {sizes[-1]:.3g} after the last that ran.",
    ]


def similarity(seen: Figures, names: Names) -> list[str]:
    found = []
    places = {step: place for place, step in enumerate(seen.steps)}
    for step, place in places.items():
        later = places.get(step._replace(repeat=step.repeat + 1))
        if later is not None and np.isfinite(seen.similarity.updates[place, later]):
            found.append(seen.similarity.updates[place, later])
    if not found:
        return [
            f"Updates of neighbouring applications have a cosine of {_mean_neighbours(seen):.2f} on average."
        ]
    return [f"Updates of successive passes of one layer have a cosine of {np.mean(found):.2f} on average."]


def _mean_neighbours(seen: Figures) -> float:
    return float(np.nanmean(np.diagonal(seen.similarity.updates, 1)))


def load(seen: Figures, names: Names) -> list[str]:
    parts = []
    for role, routers in roles(seen).items():
        unused = sum(int((router.usage.share.sum(0) == 0).sum()) for router in routers)
        total = sum(router.n_heads * router.n_experts for router in routers)
        parts.append(
            f"{names.role(role)}: the most used takes {max(_ran(routers, 'max_over_mean')):.1f} times an even share, "
            f"{unused:,} of {total:,} were never used"
        )
    return _sentences(parts)


def expert_depth(seen: Figures, names: Names) -> list[str]:
    parts = []
    for role, routers in shared_routers(seen).items():
        largest = np.concatenate([passes_of_experts(router).max(0) for router in routers])
        share = 100 * mean_of((largest > 0.5).astype(float))
        parts.append(f"{names.role(role)}: {share:.0f} % have more than half of their uses in one pass")
    return _sentences(parts)


def sharpness(seen: Figures, names: Names) -> list[str]:
    parts = []
    for role, routers in roles(seen).items():
        ratio = _ran(routers, "top1_over_median")
        span = f"{_plain(min(ratio))} to {_plain(max(ratio))}"
        parts.append(f"{names.role(role)}: the largest probability is {span} times the median")
    return _sentences(parts)


def overlap(seen: Figures, names: Names) -> list[str]:
    parts = []
    for role, routers in shared_routers(seen).items():
        successive = np.concatenate([np.diagonal(router.overlap.between, 1) for router in routers])
        fresh = np.concatenate([router.overlap.fresh for router in routers])
        paths = np.array([router.overlap.path_diversity for router in routers])
        if np.isfinite(successive).any():
            parts.append(
                f"{names.role(role)}: {mean_of(successive):.2f} between successive passes, "
                f"{100 * mean_of(fresh):.1f} % of choices entirely new, "
                f"{mean_of(paths):.2f} times as many experts over all passes as in one"
            )
    return _sentences(parts) or ["No token ran in two passes."]


def token_or_context(seen: Figures, names: Names) -> list[str]:
    parts = []
    for role, routers in roles(seen).items():
        same = mean_of(np.concatenate([router.overlap.same_token for router in routers]))
        other = mean_of(np.concatenate([np.diagonal(router.overlap.unrelated) for router in routers]))
        if np.isfinite(same) and np.isfinite(other):
            parts.append(f"{names.role(role)}: {same:.2f} for the same token, {other:.2f} for unrelated ones")
    return _sentences(parts) or ["No token came twice in a window."]


def diversity(seen: Figures, names: Names) -> list[str]:
    parts = []
    for role, routers in roles(seen).items():
        experts = [expert for router in routers for expert in router.diversity.experts if expert.uses]
        if experts:
            middle = np.median([expert.effective for expert in experts])
            whole = mean_of(np.array([router.diversity.effective for router in routers]))
            parts.append(
                f"{names.role(role)}: median {middle:.0f} effective tokens, the text has {whole:.0f}"
            )
    return _sentences(parts) or ["No expert was used."]


def co_occurrence(seen: Figures, names: Names) -> list[str]:
    parts = []
    for router in some([router for router in seen.routers if router.has_teams]):
        closest = router.pairs.closest(1)
        if closest:
            pair = closest[0]
            member = names.member(router.name.stage, router.name.member)
            parts.append(
                f"{member}, {names.role(router.name.role)}: most above expectation are {pair.experts[0]} and "
                f"{pair.experts[1]}, {pair.count:,} times ({pair.lift:.1f} times as often as expected)"
            )
    return _sentences(parts)


def halting(seen: Figures, names: Names) -> list[str]:
    parts = []
    for stage, depths in seen.depths.items():
        of_stage = f"stage {stage}: " if len(seen.depths) > 1 else ""
        last = depths.passes[-1] / max(depths.tokens, 1)
        spread = depths.windows.max() - depths.windows.min()
        parts.append(
            f"{of_stage}{depths.mean:.2f} expected passes of {len(depths.passes)} on average, "
            f"{100 * last:.0f} % of tokens are computed to the end, "
            f"in the windows below depths differ by up to {spread:.2f} passes"
        )
    return _sentences(parts)


def _ran(routers: list[RouterFigures], values: str) -> list[float]:
    """A figure of `Usage` in all passes that any token ran in."""
    return [
        getattr(router.usage, values)[repeat]
        for router in routers
        for repeat in range(router.n_repeats)
        if router.usage.tokens[repeat]
    ]


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _sentences(parts: list[str]) -> list[str]:
    return [f"{part[:1].upper()}{part[1:]}." for part in parts]


FINDINGS: dict[str, Callable[[Figures, Names], list[str]]] = {
    "loss_by_repeats": loss_by_repeats,
    "residual": residual,
    "similarity": similarity,
    "load": load,
    "expert_depth": expert_depth,
    "sharpness": sharpness,
    "overlap": overlap,
    "token_or_context": token_or_context,
    "diversity": diversity,
    "co_occurrence": co_occurrence,
    "halting": halting,
}
