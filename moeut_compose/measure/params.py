"""Parameter counts in closed form: from the spec alone, instantly, without torch.

- *total*: every stored number once, however often its layer runs.
- *active per token*: what one token's forward pass reads, once: one embedding row, the layers with only the chosen
  experts, the head.
- *unrolled per token*: the same with every layer counted as often as it runs.
"""

from dataclasses import asdict, dataclass

from moeut_compose.spec.model import ModelSpec


@dataclass(frozen=True)
class ParamCount:
    """Numbers of parameters; `layers` holds the stages without embedding, final norm and head."""

    name: str
    total: int
    embedding: int
    head: int
    layers: int
    active_per_token: int
    unrolled_per_token: int

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


def count_params(spec: ModelSpec) -> ParamCount:
    """Count the parameters of `spec` without building it."""
    d_model = spec.d_model
    outside = (
        d_model
        + spec.final_norm_params()
        + spec.vocab_size * d_model
        + (spec.vocab_size if spec.head.bias else 0)
    )
    stages = sum(stage.own_params(d_model) for stage in spec.stages)
    stages_unrolled = sum(stage.own_unrolled_params(d_model) for stage in spec.stages)
    members = list(spec.members())
    active = sum(member.active_params(d_model) for member in members)
    unrolled = sum(member.unrolled_params(d_model) for member in members)
    return ParamCount(
        name=spec.name,
        total=spec.num_params(),
        embedding=spec.embedding_params(),
        head=spec.head_params(),
        layers=spec.layer_params(),
        active_per_token=outside + stages + active,
        unrolled_per_token=outside + stages_unrolled + unrolled,
    )


@dataclass(frozen=True)
class MemberParams:
    """Parameters of one layer with weights of its own, and how often it runs."""

    path: str
    applications: int
    mixer: int
    feedforward: int
    norms: int
    lora: int
    total: int
    active_per_token: int

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


def params_by_member(spec: ModelSpec) -> list[MemberParams]:
    """Count every layer of `spec` once, part by part."""
    d_model = spec.d_model
    return [
        MemberParams(
            path=member.path,
            applications=member.applications,
            mixer=member.layer.mixer.num_params(d_model, member.position),
            feedforward=member.layer.feedforward.num_params(d_model),
            norms=member.norm_params(d_model),
            lora=member.lora_params(d_model),
            total=member.num_params(d_model),
            active_per_token=member.active_params(d_model),
        )
        for member in spec.members()
    ]


def params_by_component(spec: ModelSpec) -> dict[str, int]:
    """All parameters of `spec` by what they serve; components without any are left out."""
    d_model, members = spec.d_model, params_by_member(spec)
    parts = {
        "embedding": spec.embedding_params(),
        "mixer": sum(member.mixer for member in members),
        "feedforward": sum(member.feedforward for member in members),
        "norm": sum(member.norms for member in members) + spec.final_norm_params(),
        "lora": sum(member.lora for member in members),
        "halting": sum(stage.halting.num_params(d_model) for stage in spec.stages),
        "injection": sum(stage.inject.num_params(d_model) for stage in spec.stages),
        "step": sum(stage.step.num_params(d_model, stage.repeats) for stage in spec.stages),
        "head": spec.head_params(),
    }
    return {component: number for component, number in parts.items() if number}
