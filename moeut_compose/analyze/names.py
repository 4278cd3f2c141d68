"""What people call the parts of a model: `A2` is the second pass of the first member."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.spec.stages import Step

ROLES = {
    "mixer.value_router": "attention, value experts",
    "mixer.output_router": "attention, output experts",
    "mixer.router": "attention experts",
    "feedforward.router": "feedforward experts",
}


@dataclass(frozen=True)
class Names:
    """Names in one model."""

    repeats: tuple[int, ...]
    """Passes of each stage."""

    @classmethod
    def of(cls, spec: ModelSpec) -> Names:
        return cls(tuple(stage.repeats for stage in spec.stages))

    def member(self, stage: int, member: int) -> str:
        """`A`, `B`, ...; with the number of the stage in front where there are several."""
        letter = chr(ord("A") + member) if member < 26 else f"M{member}"
        return f"{stage}.{letter}" if len(self.repeats) > 1 else letter

    def application(self, step: Step) -> str:
        """`A1`, `B1`, `A2`, ...; without the pass in a stage that makes only one."""
        member = self.member(step.stage, step.member)
        return f"{member}{step.repeat + 1}" if self.repeats[step.stage] > 1 else member

    @staticmethod
    def role(role: str) -> str:
        return ROLES.get(role, role.replace(".", ", ").replace("_", " "))
