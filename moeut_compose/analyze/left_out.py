"""Which figures a model has nothing for, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeut_compose.analyze.collect import Figures

NO_REPEATS = "no stage of this model runs more than one pass"
NO_ROUTERS = "no layer of this model chooses between experts"
NO_SHARED = "no layer with experts runs in more than one pass"
NO_TEAMS = "no router of this model chooses several experts of one set"
NO_HALTING = "no stage of this model halts tokens"
ONE_APPLICATION = "the model has only one application"


def left_out(seen: Figures) -> dict[str, str]:
    """The reason by the name of the figure."""
    missing: dict[str, str] = {}
    if not seen.curves:
        missing["loss_by_repeats"] = NO_REPEATS
    if len(seen.steps) < 2:
        missing["similarity"] = ONE_APPLICATION
    if not seen.routers:
        figures = (
            "load",
            "expert_depth",
            "sharpness",
            "overlap",
            "token_or_context",
            "diversity",
            "co_occurrence",
        )
        missing |= dict.fromkeys(figures, NO_ROUTERS)
    else:
        if all(router.n_repeats == 1 for router in seen.routers):
            missing |= dict.fromkeys(("expert_depth", "overlap"), NO_SHARED)
        if not any(router.has_teams for router in seen.routers):
            missing["co_occurrence"] = NO_TEAMS
    if not seen.depths:
        missing |= dict.fromkeys(("halting", "halting_map"), NO_HALTING)
    return missing
