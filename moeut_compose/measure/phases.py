"""What a model costs in use and in training, and what it remembers of every token; closed form, without torch.

- *prefill*: the forward pass over a prompt of `seq_len` tokens.
- *decode*: one new token that reads `seq_len` tokens in the cache and itself.
- *training*: a forward pass, and a backward pass of twice its products. With activation checkpointing the layers run
  forward once more; the head does not, because its loss computes the gradient at once.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from moeut_compose.measure.macs import count_macs
from moeut_compose.spec.model import ModelSpec

FORWARD_PASSES_PER_STEP = 3
"""A backward pass costs two forward passes."""

CacheDtype = Literal["fp32", "bf16", "fp16"]
DTYPE_BYTES: dict[CacheDtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class PhaseCount:
    """Exact multiply-accumulates: of a whole prompt, of one decoded token, of one token in training."""

    prefill: int
    decode: int
    training_per_token: int
    training_checkpointed_per_token: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def count_phases(spec: ModelSpec, seq_len: int | None = None, *, causal: bool = False) -> PhaseCount:
    """Count `spec` at `seq_len` (default: context length).

    `causal` halves scores where many positions run at once; a decoded token sees everything. Raises ValueError for a
    `seq_len` below 1.
    """
    forward = count_macs(spec, seq_len, causal=causal)
    training = FORWARD_PASSES_PER_STEP * forward.total_per_token
    return PhaseCount(
        prefill=forward.seq_len * forward.total_per_token,
        decode=count_macs(spec, forward.seq_len + 1).total_per_token,
        training_per_token=training,
        training_checkpointed_per_token=training + forward.layers_per_token,
    )


@dataclass(frozen=True)
class CacheMember:
    """The keys and values that one layer adds to the cache for every token, each time it runs."""

    path: str
    applications: int
    values_per_application: int


@dataclass(frozen=True)
class KeyValueCache:
    """What decoding keeps of every token: keys and values of each application, shared weights or not."""

    members: tuple[CacheMember, ...]

    @property
    def applications(self) -> int:
        return sum(member.applications for member in self.members)

    @property
    def values_per_token(self) -> int:
        return sum(member.applications * member.values_per_application for member in self.members)

    def bytes_per_token(self, dtype: CacheDtype) -> int:
        return DTYPE_BYTES[dtype] * self.values_per_token

    def to_dict(self) -> dict[str, object]:
        return {
            "applications": self.applications,
            "values_per_token": self.values_per_token,
            "bytes_per_token": {dtype: self.bytes_per_token(dtype) for dtype in DTYPE_BYTES},
            "members": [asdict(member) for member in self.members],
        }


def count_cache(spec: ModelSpec) -> KeyValueCache:
    """The cache of `spec`: keys and values alone; relative positions and experts of attention add nothing to it."""
    return KeyValueCache(
        tuple(
            CacheMember(member.path, member.applications, member.layer.mixer.cache_width())
            for member in spec.members()
        )
    )
