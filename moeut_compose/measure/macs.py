"""Multiply-accumulates per token in closed form: from the spec alone, instantly, without torch.

Two conventions:

- `exact`: matrix products only, every layer counted as often as it runs, attention scores and values over all
  `seq_len` positions (no halving for the causal mask), the head included. Norms, activations, softmax, gates and the
  weighted sums over chosen experts are elementwise and not counted. Halting is counted as if no token rested.
  With `causal`, scores and values are the mean over positions that see only themselves and what stands before.
- `paper`: the formula published with the runs of arXiv:2405.16039. It leaves out the head, charges each attention
  router as if it had one head, and counts the gate-weighted sums of values and outputs. It is undefined for SUT.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from moeut_compose.spec.model import Member, ModelSpec

Convention = Literal["exact", "paper"]


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates per token at one sequence length."""

    name: str
    seq_len: int
    convention: Convention
    total_per_token: int
    layers_per_token: int
    head_per_token: int
    by_component: dict[str, int]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def member_macs(member: Member, d_model: int, seq_len: int, convention: Convention) -> dict[str, int]:
    """Components of one application of one layer. Raises ValueError where the published formula is undefined."""
    mixer, feedforward = member.layer.mixer, member.layer.feedforward
    if convention == "paper":
        return mixer.paper_macs(d_model, seq_len) | feedforward.paper_macs(d_model)
    parts = mixer.macs(d_model, seq_len, member.position) | feedforward.macs(d_model)
    for component, macs in member.lora_macs(d_model).items():
        parts[component] += macs
    return parts


def count_macs(
    spec: ModelSpec, seq_len: int | None = None, convention: Convention = "exact", *, causal: bool = False
) -> MacCount:
    """Count the multiply-accumulates of one token of `spec` in a sequence of `seq_len` (default: context length).

    `causal` leaves out what the causal mask hides: position i meets i keys, (T + 1) / 2 on average. Raises ValueError
    for a `seq_len` below 1, where the published formula is undefined, and for `causal` with that formula.
    """
    length = spec.context_length if seq_len is None else seq_len
    if length < 1:
        raise ValueError(f"seq_len={length} is below 1")
    if causal and convention == "paper":
        raise ValueError("the published formula counts all positions; it has no causal form")
    parts: dict[str, int] = {}
    for member in spec.members():
        for component, macs in member_macs(member, spec.d_model, length, convention).items():
            parts[component] = parts.get(component, 0) + member.applications * macs
    for stage in spec.stages:
        for component, macs in stage.own_macs(spec.d_model).items():
            parts[component] = parts.get(component, 0) + macs
    if causal:  # an even number of products for each key, for scores and values cost the same
        parts["attn_scores_values"] = parts["attn_scores_values"] // length * (length + 1) // 2
    layers = sum(parts.values())
    head = spec.vocab_size * spec.d_model if convention == "exact" else 0
    if convention == "exact":
        parts["lm_head"] = head
    return MacCount(
        name=spec.name,
        seq_len=length,
        convention=convention,
        total_per_token=layers + head,
        layers_per_token=layers,
        head_per_token=head,
        by_component={component: macs for component, macs in parts.items() if macs},
    )
