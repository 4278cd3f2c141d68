"""Random valid architectures for property tests: every member of every union can come up, in any combination.

Sizes are tiny so that a model builds and runs in milliseconds.
"""

from typing import Any

from hypothesis import strategies as st

from moeut_compose.spec.model import ModelSpec

Data = dict[str, Any]

MAX_LENGTH = 12


def kinds(**options: st.SearchStrategy[Data]) -> st.SearchStrategy[Data]:
    """One of the variants of a union: its kind and settings."""
    return st.one_of(
        [settings.map(lambda data, kind=kind: {"kind": kind, **data}) for kind, settings in options.items()]
    )


def fields(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[Data]:
    return st.fixed_dictionaries(values)


nothing = st.just({})
dropout = st.sampled_from([0.0, 0.3])
weights = st.sampled_from([0.0, 0.01, 0.5])

positions = kinds(
    none=nothing,
    rope=fields(fraction=st.sampled_from([0.0, 0.3, 0.5, 1.0]), base=st.just(100.0)),
    relative=fields(max_distance=st.integers(1, 5)),
)


def norms(*, peri: bool) -> st.SearchStrategy[Data]:
    placement = st.sampled_from(["peri", "pre", "post"] if peri else ["pre", "post"])
    return kinds(layer_norm=fields(placement=placement), rms_norm=fields(placement=placement))


def balances(*, relu: bool) -> st.SearchStrategy[list[Data]]:
    names = ["entropy", "switch", "z_loss", "cv_squared", "mutual_information", "mutual_information_as_coded"]
    term = fields(
        kind=st.sampled_from([*names, "relu_l1"] if relu else names),
        weight=weights,
        scope=st.sampled_from(["sequence", "micro_batch"]),
    )
    return st.lists(term, max_size=2, unique_by=lambda data: data["kind"])


def routers(n_experts: int, top_k: int) -> st.SearchStrategy[Data]:
    """Routers that can learn with this many choices."""
    options = {
        "sigmoid": fields(expert_dropout=dropout),
        "softmax": fields(order=st.just("before_top_k"), expert_dropout=dropout),
        "biased_sigmoid": fields(normalize=st.just(False), expert_dropout=dropout),
        "relu": fields(max_active=st.none() | st.integers(top_k, n_experts), expert_dropout=dropout),
    }
    if top_k > 1:
        options["softmax"] = fields(
            order=st.sampled_from(["before_top_k", "after_top_k"]),
            normalize=st.booleans(),
            expert_dropout=dropout,
        )
        options["biased_sigmoid"] = fields(normalize=st.booleans(), scale=st.sampled_from([1.0, 2.5]))
        options["mlp"] = fields(n_sampled=st.integers(0, top_k), expert_dropout=dropout)
    return kinds(**options)


@st.composite
def experts(draw: st.DrawFn, *, router: bool) -> Data:
    """The settings that everything with experts has."""
    n_experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, n_experts))
    data: Data = {"n_experts": n_experts, "top_k": top_k}
    if router:
        data["router"] = draw(routers(n_experts, top_k))
    data["balance"] = draw(balances(relu=router and data["router"]["kind"] == "relu"))
    return data


@st.composite
def mixers(draw: st.DrawFn) -> Data:
    own = {"position": draw(st.none() | positions)}
    d_head = draw(st.integers(1, 5))
    match draw(st.sampled_from(["attention", "switch_head", "mixture_of_attention"])):
        case "attention":
            return own | {"kind": "attention", "n_heads": draw(st.integers(1, 3)), "d_head": d_head}
        case "switch_head":
            data = draw(experts(router=False)) | {"n_heads": draw(st.integers(1, 3)), "d_head": d_head}
            gates = draw(st.sampled_from(["both", "output"])) if data["n_experts"] == 1 else "both"
            return own | data | {"kind": "switch_head", "gates": gates, "expert_dropout": draw(dropout)}
        case _:
            width = d_head * draw(st.integers(1, 3))
            data = draw(experts(router=True)) | {"d_head": d_head, "d_expert": width}
            return own | data | {"kind": "mixture_of_attention"}


@st.composite
def feedforwards(draw: st.DrawFn, *, routed: bool) -> Data:
    activation = draw(st.sampled_from(["relu", "gelu", "silu", "swiglu"]))
    common = {"activation": activation, "bias": draw(st.booleans())}
    match draw(st.sampled_from(["sigma_moe", "moe"] if routed else ["dense", "sigma_moe", "moe"])):
        case "dense":
            return common | {"kind": "dense", "d_ff": draw(st.integers(1, 9))}
        case "sigma_moe":
            sizes = draw(experts(router=False)) | {"d_expert": draw(st.integers(1, 5))}
            return common | sizes | {"kind": "sigma_moe", "expert_dropout": draw(dropout)}
        case _:
            sizes = draw(experts(router=True)) | {"d_expert": draw(st.integers(1, 5))}
            init = draw(st.sampled_from(["depth_scaled", "uniform_fan_in"]))
            return common | sizes | {"kind": "moe", "n_shared": draw(st.integers(0, 2)), "init": init}


@st.composite
def stages(draw: st.DrawFn, *, peri: bool, halting: bool = True) -> Data:
    layers = [
        {
            "count": draw(st.sampled_from([1, 1, 1, 2])),
            "mixer": draw(mixers()),
            "feedforward": draw(feedforwards(routed=peri)),
            "norm": draw(st.none() | norms(peri=peri)),
        }
        for _ in range(draw(st.integers(1, 2)))
    ]
    stage: Data = {
        "repeats": draw(st.integers(1, 3)),
        "layers": layers,
        "lora": draw(st.none() | fields(rank=st.integers(1, 3))),
        "norms": draw(st.sampled_from(["shared", "per_repeat"])),
    }
    stage["pattern"] = draw(st.sampled_from(["ABAB", "AABB"]))
    if stage["pattern"] == "ABAB" or sum(layer["count"] for layer in layers) == 1:
        act = fields(threshold=st.sampled_from([0.5, 0.8, 0.999]), weight=weights)
        rules = {"act": act, "graves_act": act} if halting else {}
        stage["halting"] = draw(kinds(none=nothing, **rules))
        stage["inject"] = draw(fields(kind=st.sampled_from(["none", "add", "gate", "concat"])))
        stage["step"] = draw(kinds(none=nothing, sinusoidal=fields(positions=st.booleans()), learned=nothing))
    return stage


@st.composite
def model_specs(draw: st.DrawFn, *, halting: bool = True, max_stages: int = 2) -> ModelSpec:
    """A random architecture; without `halting`, one in which every token takes every pass."""
    peri = draw(st.booleans())
    return ModelSpec.model_validate(
        {
            "name": "random",
            "vocab_size": draw(st.integers(2, 30)),
            "context_length": draw(st.integers(4, MAX_LENGTH)),
            "d_model": draw(st.integers(2, 12)),
            "embedding": draw(
                fields(
                    scale=st.sampled_from([1, "sqrt_d_model"]), norm=st.sampled_from(["none", "layer_norm"])
                )
            ),
            "norm": draw(norms(peri=peri)),
            "position": draw(positions),
            "stages": draw(st.lists(stages(peri=peri, halting=halting), min_size=1, max_size=max_stages)),
            "final_norm": draw(st.booleans()),
            "head": draw(fields(bias=st.booleans(), tied=st.booleans())),
        }
    )
