"""The recipe: how a model is trained. It knows no architecture, so any recipe trains any architecture.

Defaults are the published settings of MoEUT (arXiv:2405.16039): AdamW on every parameter, linear warm-up and
a cosine to a tenth of the peak rate, 64 sequences a step, SentencePiece BPE, documents ended by the text
`<STORY_SEP>`.
"""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from moeut_compose.spec.base import Count, Fraction, PositiveFloat, Spec, Weight
from moeut_compose.spec.synthetic import SyntheticTaskSpec

PUBLISHED_SEPARATOR = "<STORY_SEP>"


def _whole(value: object) -> object:
    """Let people write 6.5e9 where a count is meant."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Steps = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
LargeCount = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
ProperFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Name = Annotated[str, Field(min_length=1)]


class DataOptions(Spec):
    """What every source of text has in common."""

    separator: str = PUBLISHED_SEPARATOR
    """Text appended to each non-empty document before tokenisation; empty for none."""
    max_tokens: LargeCount | None = None
    """Stop tokenising the training text here; none: all of it."""
    workers: Count | Literal["auto"] = "auto"
    """Processes that tokenise; they change no token. Auto: the CPUs at hand up to 8, and none for a small text."""


class BuiltinData(DataOptions):
    """The corpus that comes with the package."""

    kind: Literal["builtin"] = "builtin"
    name: Literal["classics"] = "classics"


class TextData(DataOptions):
    """Plain text files; `.gz`, `.bz2`, `.xz` and `.zst` are unpacked on the way."""

    kind: Literal["text"] = "text"
    files: Annotated[list[Name], Field(min_length=1)]
    """Paths or glob patterns, relative to the working directory."""
    validation_files: list[Name] = Field(default=[])
    """Held-out text; none: `validation_fraction` of `files`."""
    validation_fraction: ProperFraction = 0.01
    """Held-out share: the end of every file, or documents chosen by their hash where a file holds many."""
    document: Literal["file", "line", "paragraph"] = "file"
    """What one document is; paragraphs are separated by blank lines."""


class JsonlData(DataOptions):
    """Files of records, one document each: JSON Lines (`.gz`, `.bz2`, `.xz`, `.zst` are unpacked) or `.parquet`."""

    kind: Literal["jsonl"] = "jsonl"
    files: Annotated[list[Name], Field(min_length=1)]
    """Paths or glob patterns, relative to the working directory."""
    field: Name = "text"
    """The key or column that holds the text."""
    validation_files: list[Name] = Field(default=[])
    """Held-out documents; none: `validation_fraction` of `files`."""
    validation_fraction: ProperFraction = 0.01
    """Held-out share of the documents, chosen by their hash."""


class HuggingFaceData(DataOptions):
    """A dataset of the Hugging Face hub, or anything else that `datasets.load_dataset` opens."""

    kind: Literal["huggingface"] = "huggingface"
    dataset: Name
    """Repository (`allenai/c4`) or format (`json`, `parquet`, `text`) of `data_files`."""
    config: Name | None = None
    revision: Name | None = None
    data_files: dict[str, list[Name]] | None = None
    """Files of each split, as in `load_dataset`; `hf://datasets/…` addresses are allowed."""
    data_dirs: list[Name] = Field(default=[])
    """Folders of the repository that are read in turn, one document from each."""
    split: Name = "train"
    validation_split: Name | None = "validation"
    """Held-out split; none: `validation_fraction` of `split`."""
    validation_fraction: ProperFraction = 0.01
    """Held-out share of the documents, chosen by their hash, where there is no validation split."""
    field: Name = "text"
    """The column that holds the text."""
    streaming: bool = True
    """Read over the network instead of downloading the whole dataset first."""


TextDataSpec = BuiltinData | TextData | JsonlData | HuggingFaceData


class SyntheticData(Spec):
    """Examples that are made on the way, one a window; the tokenizer is the task's alphabet."""

    kind: Literal["synthetic"] = "synthetic"
    task: SyntheticTaskSpec
    seed: Seed = 0
    """Fixes tables and examples."""

    @property
    def max_tokens(self) -> None:
        """There is no end."""


DataSpec = Annotated[
    BuiltinData | TextData | JsonlData | HuggingFaceData | SyntheticData, Field(discriminator="kind")
]


class SentencePieceFile(Spec):
    """A trained SentencePiece model."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    file: Name


class TrainSentencePiece(Spec):
    """Train SentencePiece on the training text; the vocabulary size is the architecture's."""

    kind: Literal["train_sentencepiece"] = "train_sentencepiece"
    model_type: Literal["bpe", "unigram"] = "bpe"
    split_digits: bool = True
    character_coverage: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9995
    byte_fallback: bool = False
    """Spell characters outside the coverage as bytes instead of `<unk>`."""
    normalization: Literal["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"] = "nmt_nfkc"
    remove_extra_whitespaces: bool = True
    """Collapse newlines, tabs and runs of spaces to one space, as published."""
    max_sentence_length: Count = 4192
    """Bytes; SentencePiece ignores longer training texts."""
    long_documents: Literal["skip", "split"] = "skip"
    """Longer documents: ignored as published, or split at line ends and spaces so that no text is lost."""
    max_documents: LargeCount | None = None
    """Train on the first documents only."""
    max_bytes: LargeCount | None = None
    """Train on the first bytes of text only."""


TokenizerSpec = Annotated[SentencePieceFile | TrainSentencePiece, Field(discriminator="kind")]


class BatchSpec(Spec):
    """Sequences of one optimiser step."""

    size: Count = 64
    micro: Count | Literal["auto"] = "auto"
    """Sequences held in memory at once; gradients of the parts of a batch add up to those of the whole."""

    @model_validator(mode="after")
    def _micro_fits(self) -> Self:
        if self.micro != "auto" and self.micro > self.size:
            raise ValueError(f"micro={self.micro} exceeds size={self.size}")
        return self


class AdamWSpec(Spec):
    """AdamW with one group: weight decay reaches every parameter, as published."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 2.5e-4
    """Peak learning rate."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Weight = 0.01
    fused: bool | Literal["auto"] = "auto"
    """One kernel for the whole update; auto: on CUDA."""

    @model_validator(mode="after")
    def _betas_converge(self) -> Self:
        if 1.0 in self.betas:
            raise ValueError(f"betas={list(self.betas)} must lie below 1")
        return self


OptimizerSpec = AdamWSpec


class CosineSchedule(Spec):
    """Linear warm-up to the peak, then half a cosine down to `min_lr_multiplier` of it.

    The published clock of the cosine stands at 0 during the warm-up and its period is the whole run, so a run
    with a warm-up ends slightly above the floor.
    """

    kind: Literal["cosine"] = "cosine"
    warmup_steps: Steps = 4000
    min_lr_multiplier: Fraction = 0.1
    period: Count | None = None
    """Steps from peak to floor; none: the steps of the run."""


class ConstantSchedule(Spec):
    """Linear warm-up, then the peak rate."""

    kind: Literal["constant"] = "constant"
    warmup_steps: Steps = 0


ScheduleSpec = Annotated[CosineSchedule | ConstantSchedule, Field(discriminator="kind")]


class EvaluationSpec(Spec):
    """Perplexity on held-out text during training and at the end, and a sample of the model's writing."""

    interval: Count | None = 1000
    """Steps between evaluations; none: only at the end."""
    windows: Count | None = 1008
    """Windows of the validation text, from its start; none: all of it."""
    prompt: str = "The"
    """Beginning of the sample text."""
    sample_tokens: Steps = 100


class CheckpointSpec(Spec):
    """When to save, and what to keep."""

    interval: Count | None = 1000
    """Steps between checkpoints; none: only at the end or when stopped."""
    keep_last: Count = 2
    """Newest checkpoints to keep; older ones are deleted."""
    keep_every: Count | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    background: bool | Literal["auto"] = "auto"
    """Write while training goes on, from a copy in host memory; auto: on a GPU."""

    @model_validator(mode="after")
    def _kept_steps_are_saved(self) -> Self:
        if self.keep_every is not None and (self.interval is None or self.keep_every % self.interval):
            raise ValueError(f"keep_every={self.keep_every} must be a multiple of interval={self.interval}")
        return self


class LoggingSpec(Spec):
    """Metrics."""

    interval: Count = 10
    """Steps between rows of the metrics files; a row holds means over these steps."""
    tensorboard: bool = False
    """Also write the rows for TensorBoard, which has to be installed."""
    wandb: bool = False
    """Also log the rows to Weights & Biases, which has to be installed; its own settings apply."""


class HardwareSpec(Spec):
    """What is known of the device, for figures that depend on it."""

    peak_tflops: PositiveFloat | None = None
    """Peak speed in TFLOP/s that utilisation (MFU) refers to; none: that of the device by name, if it is known."""


class RecipeSpec(Spec):
    """How a model is trained."""

    version: Literal[1] = 1
    name: Name
    description: str = ""
    data: DataSpec = BuiltinData()
    tokenizer: TokenizerSpec = TrainSentencePiece()
    order: Literal["streams", "shuffled"] = "streams"
    """Order of the training windows: contiguous streams side by side as published, or permuted each epoch."""
    batch: BatchSpec = BatchSpec()
    context: Count | None = None
    """Tokens of a training window; none: the architecture's context length."""
    steps: LargeCount | None = None
    """Optimiser steps; give this or `tokens`."""
    tokens: LargeCount | None = None
    """Training tokens; give this or `steps`."""
    optimizer: OptimizerSpec = AdamWSpec()
    schedule: ScheduleSpec = CosineSchedule()
    clip_norm: PositiveFloat | None = 0.25
    """Upper bound of the gradient's global norm; none: no clipping."""
    max_skipped_steps: Count = 10
    """Steps with a loss or gradient that is not finite are skipped; after so many in a row the run stops."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the training step; auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on a CPU."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each distinct layer with torch.compile; auto: leave it off."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Save memory: run layers again in the backward pass, with the same experts. Of each the input is kept (full), or
    also what is dear to compute, attention and expert products (selective)."""
    cuda_graph: bool = False
    """On CUDA, record forward and backward once and replay them: no time is lost between kernels."""
    backend: Literal["auto", "triton", "torch", "grouped_mm", "bmm"] = "auto"
    """Implementation of the expert products."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """Where `torchrun` starts several processes: weights on each of them (ddp) or split over them (fsdp)."""
    deterministic: bool = False
    """Refuse operations whose results depend on timing."""
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    logging: LoggingSpec = LoggingSpec()
    hardware: HardwareSpec = HardwareSpec()
    seed: Seed = 0
    """Fixes initial weights, order of the data and sampling."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.steps is None and self.tokens is None:
            raise ValueError("the recipe never ends: give steps or tokens")
        if self.steps is not None and self.tokens is not None:
            raise ValueError(
                f"steps={self.steps} and tokens={self.tokens} are both given; set one of them to null"
            )
        return self

    @model_validator(mode="after")
    def _graphs_hold_whole_weights(self) -> Self:
        if self.cuda_graph and self.parallelism == "fsdp":
            raise ValueError(
                "cuda_graph=true records a step on whole weights and parallelism=fsdp splits them; change one of them"
            )
        return self

    def num_steps(self, context: int) -> int:
        """Optimiser steps of a run whose windows hold `context` tokens; a budget in tokens is rounded up."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // (self.batch.size * context))
