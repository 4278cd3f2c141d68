"""What was found in this run, in words: for each plot some sentences of figures, without judging them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from moeut_compose.analyze.draw import some
from moeut_compose.analyze.draw_routers import roles

if TYPE_CHECKING:
    from moeut_compose.analyze.collect import Figures
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
    most, least = int(np.argmax(update)), int(np.argmin(update))
    first, last = seen.residual.rms_after[0], seen.residual.rms_after[-1]
    return [
        f"{names.application(seen.steps[most])} moves the stream most, by {100 * update[most]:.0f} % of its size, "
        f"{names.application(seen.steps[least])} least ({100 * update[least]:.1f} %).",
        f"The stream goes from {first:.3g} after the first application to {last:.3g} after the last.",
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
        ran = [
            router.usage.max_over_mean[r]
            for router in routers
            for r in range(router.n_repeats)
            if router.usage.tokens[r]
        ]
        unused = sum(int((router.usage.share.sum(0) == 0).sum()) for router in routers)
        total = sum(router.n_heads * router.n_experts for router in routers)
        parts.append(
            f"{names.role(role)}: the most used takes {max(ran):.1f} times an even share, "
            f"{unused:,} of {total:,} were never used"
        )
    return _sentences(parts)


def expert_depth(seen: Figures, names: Names) -> list[str]:
    parts = []
    for role, routers in roles(seen).items():
        shared = [router for router in routers if router.n_repeats > 1]
        if shared:
            uses = np.concatenate(
                [
                    (router.usage.share * router.usage.tokens[:, None, None]).reshape(router.n_repeats, -1)
                    for router in shared
                    if router.n_repeats == shared[0].n_repeats
                ],
                axis=1,
            )
            uses = uses[:, uses.sum(0) > 0]
            top = (uses / uses.sum(0)).max(0)
            parts.append(
                f"{names.role(role)}: {100 * (top > 0.5).mean():.0f} % have more than half of their uses in one pass"
            )
    return _sentences(parts)


def sharpness(seen: Figures, names: Names) -> list[str]:
    parts = []
    for role, routers in roles(seen).items():
        ratio = [
            router.usage.top1_over_median[r]
            for router in routers
            for r in range(router.n_repeats)
            if router.usage.tokens[r]
        ]
        parts.append(
            f"{names.role(role)}: the largest probability is {min(ratio):.1f} to {max(ratio):.1f} times the median"
        )
    return _sentences(parts)


def overlap(seen: Figures, names: Names) -> list[str]:
    parts = []
    for role, routers in roles(seen).items():
        shared = [router for router in routers if router.n_repeats > 1]
        if not shared:
            continue
        next_pass = np.concatenate([np.diagonal(router.overlap.between, 1) for router in shared])
        fresh = np.concatenate([router.overlap.fresh for router in shared])
        paths = np.mean([router.overlap.path_diversity for router in shared])
        if np.isfinite(next_pass).any():
            parts.append(
                f"{names.role(role)}: {np.nanmean(next_pass):.2f} between successive passes, "
                f"{100 * np.nanmean(fresh):.1f} % of choices entirely new, "
                f"{paths:.2f} times as many experts over all passes as in one"
            )
    return _sentences(parts) or ["No token ran in two passes."]


def token_or_context(seen: Figures, names: Names) -> list[str]:
    parts = []
    for role in roles(seen):
        same = np.concatenate([router.overlap.same_token for router in roles(seen)[role]])
        other = np.concatenate([np.diagonal(router.overlap.unrelated) for router in roles(seen)[role]])
        parts.append(
            f"{names.role(role)}: {np.nanmean(same):.2f} for the same token, {np.nanmean(other):.2f} for unrelated ones"
        )
    return _sentences(parts)


def diversity(seen: Figures, names: Names) -> list[str]:
    parts = []
    for role, routers in roles(seen).items():
        effective = [
            expert.effective for router in routers for expert in router.diversity.experts if expert.uses
        ]
        whole = np.mean([router.diversity.effective for router in routers])
        parts.append(
            f"{names.role(role)}: median {np.median(effective):.0f} effective tokens, the text has {whole:.0f}"
        )
    return _sentences(parts)


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
