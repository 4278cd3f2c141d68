"""`show --tree`: a model drawn as it computes, with shapes and parameters."""

import sys

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from moeut_compose.spec.base import Spec
from moeut_compose.spec.model import Member, ModelSpec
from moeut_compose.spec.stages import StageSpec, stage_schedule

MAX_WIDTH = 1000
_SHOWN_ELSEWHERE = {"kind", "balance", "position", "norm"}


def print_tree(spec: ModelSpec) -> None:
    """Draw `spec` on stdout; outside a terminal no line is wrapped."""
    width = None if sys.stdout.isatty() else MAX_WIDTH
    Console(file=sys.stdout, highlight=False, width=width).print(draw(spec))


def draw(spec: ModelSpec) -> Tree:
    """The tree of `spec`."""
    root = Tree(
        _line(spec.name, f"{spec.depth} layers deep, context {spec.context_length}", spec.num_params())
    )
    vocabulary = f"{spec.vocab_size} × {spec.d_model}"
    root.add(
        _line(
            "embedding",
            f"{vocabulary}{_settings(spec.embedding, {'scale': 1, 'norm': 'none'})}",
            spec.embedding_params(),
        )
    )
    members = list(spec.members())
    for index, stage in enumerate(spec.stages):
        _add_stage(root, spec, stage, index, [member for member in members if member.stage == index])
    if spec.final_norm:
        root.add(_line("final norm", f"{spec.norm.kind}, {spec.d_model}", spec.final_norm_params()))
    bias = " + bias" if spec.head.bias else ""
    tied = ", the embedding's weights" if spec.head.tied else ""
    root.add(_line("head", f"{spec.d_model} × {spec.vocab_size}{bias}{tied}", spec.head_params()))
    return root


def _add_stage(root: Tree, spec: ModelSpec, stage: StageSpec, index: int, members: list[Member]) -> None:
    passes = "pass" if stage.repeats == 1 else "passes"
    group = f"{stage.n_members} member{'s' if stage.n_members > 1 else ''} × {stage.repeats} {passes}"
    order = f", {_unrolled(stage)}" if stage.repeats > 1 or stage.n_members > 1 else ""
    total = sum(member.num_params(spec.d_model) for member in members) + stage.own_params(spec.d_model)
    branch = root.add(_line(f"stage {index}", f"{group}{order}", total))
    first = 0
    for layer in stage.layers:
        _add_layer(branch, spec, members[first], first, layer.count)
        first += layer.count
    for name, part, n_params in (
        ("inject", stage.inject, stage.inject.num_params(spec.d_model)),
        ("step", stage.step, stage.step.num_params(spec.d_model, stage.repeats)),
        ("halting", stage.halting, stage.halting.num_params(spec.d_model)),
    ):
        if part.kind != "none":
            branch.add(_line(name, _part(part), n_params))


def _add_layer(branch: Tree, spec: ModelSpec, member: Member, first: int, count: int) -> None:
    """One node for all members of the same shape; numbers are those of one member."""
    names = letters(first) if count == 1 else f"{letters(first)} … {letters(first + count - 1)}"
    each = f", {count} times these weights" if count > 1 else ""
    node = branch.add(
        _line(names, f"runs {member.applications}×{each}", count * member.num_params(spec.d_model))
    )
    mixer, feedforward = member.layer.mixer, member.layer.feedforward
    n_norms = 2 * (member.applications if member.has_own_norms else 1)
    norms = f"{member.norm.kind}, {member.norm.placement}, {n_norms} × {spec.d_model}"
    node.add(_line("norms", norms, n_norms * member.norm.num_params(spec.d_model)))
    position = "" if member.position.kind == "none" else f"; {_part(member.position)}"
    node.add(_line("mixer", f"{_part(mixer)}{position}", mixer.num_params(spec.d_model, member.position)))
    node.add(_line("feedforward", _part(feedforward), feedforward.num_params(spec.d_model)))
    if member.lora is not None:
        changes = member.applications * sum(member.lora_macs(spec.d_model).values())
        node.add(_line("lora", f"rank {member.lora.rank}, {member.applications} changes", changes))


def letters(member: int) -> str:
    """Members are called A, B, … Z, A1, B1, …"""
    round_number, letter = divmod(member, 26)
    return f"{chr(ord('A') + letter)}{round_number or ''}"


def _unrolled(stage: StageSpec) -> str:
    """The order in which members run, such as ABABAB."""
    order = [letters(member) for member, _ in stage_schedule(stage.n_members, stage.repeats, stage.pattern)]
    return "".join(order) if len(order) <= 24 else f"{''.join(order[:10])} … {''.join(order[-4:])}"


def _part(spec: Spec) -> str:
    """What a block is: its kind and its settings."""
    return f"{getattr(spec, 'kind', '')}{_settings(spec, {})}"


def _settings(spec: Spec, usual: dict[str, object]) -> str:
    """Numbers always; everything else where it differs from the default."""
    parts: list[str] = []
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in _SHOWN_ELSEWHERE - set(usual) or value == usual.get(name):
            continue
        if isinstance(value, Spec):
            parts.append(f"{name} {_part(value)}")
        elif (is_number and value) or value != field.default:
            parts.append(f"{name} {value}")
    return f": {', '.join(parts)}" if parts else ""


def _line(name: str, text: str, n_params: int) -> Text:
    return Text.assemble((name, "bold"), "  ", text, "  ", (f"{n_params:,}", "cyan"))
