"""A run from start to end, and reading it back.

`train` prepares the data, finds out where to begin, and hands over to a `Session`. Everything a run needs
later lies in its folder: architecture, recipe, tokenizer, held-out text, metrics and checkpoints.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from moeut_kernels import tuned_tiles

from moeut_compose.build import build_model
from moeut_compose.data.errors import DataError
from moeut_compose.data.files import write_atomically
from moeut_compose.data.prepare import PreparedData, prepare_data
from moeut_compose.data.tokenizer import Tokenizer
from moeut_compose.data.tokens import TokenFile, save_head
from moeut_compose.progress import SilentReporter, format_duration
from moeut_compose.spec.io import dump_yaml, load_recipe, load_spec, parse_spec
from moeut_compose.spec.recipe import JsonlData, SentencePieceFile, TextData
from moeut_compose.train import folder as run_folder
from moeut_compose.train.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    open_checkpoint,
    tidy_checkpoints,
)
from moeut_compose.train.device import check_backend, choose_device, own_device
from moeut_compose.train.errors import CheckpointError, OtherProcessFailed, RunError, TrainError
from moeut_compose.train.folder import resume_folder as resume_folder
from moeut_compose.train.modes import execution_modes, kept_memory
from moeut_compose.train.plan import context_of, plan_training
from moeut_compose.train.session import Session, TrainResult
from moeut_compose.train.signals import catch_signals
from moeut_compose.train.tensorboard import summary_writer
from moeut_compose.train.weights_and_biases import import_wandb
from moeut_compose.world import PeerFailed, PeerLost, local_rank, started_world, translated

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.progress import Reporter
    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.spec.recipe import RecipeSpec
    from moeut_compose.train.checkpoint import Checkpoint
    from moeut_compose.train.folder import Resume
    from moeut_compose.train.plan import TrainingPlan
    from moeut_compose.world import World


@dataclass(frozen=True)
class Run:
    """A trained model with all that belongs to it."""

    path: Path
    spec: ModelSpec
    recipe: RecipeSpec
    model: LanguageModel
    step: int

    @property
    def context(self) -> int:
        """Tokens of a training window."""
        return self.recipe.context or self.spec.context_length

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; imported runs may have none. Raises `DataError`, also if it knows more than the model."""
        path = self.path / run_folder.TOKENIZER
        tokenizer = Tokenizer.load(path)
        if tokenizer.vocab_size > self.spec.vocab_size:
            raise DataError(
                f"{path} has {tokenizer.vocab_size} pieces, more than the model knows ({self.spec.vocab_size})"
            )
        return tokenizer


def load_run(path: str | Path, *, device: str | torch.device = "cpu") -> Run:
    """Read a run folder, at its newest whole checkpoint, or one checkpoint folder inside it.

    The architecture is the one that the weights carry. Warns of newer checkpoints that are damaged. Raises
    `RunError` or `CheckpointError`.
    """
    run, chosen = run_folder.split_path(Path(path))
    checkpoint = find_checkpoint(run, warn=_warn) if chosen is None else open_checkpoint(chosen)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint yet")
    spec = parse_spec(checkpoint.architecture(), file=str(checkpoint.path))
    model = build_model(spec, device=device, init=False)
    checkpoint.load_weights(model)
    return Run(
        path=run,
        spec=spec,
        recipe=load_recipe(run / run_folder.RECIPE),
        model=model.eval(),
        step=checkpoint.step,
    )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def train(
    spec: ModelSpec,
    recipe: RecipeSpec,
    *,
    out: str | Path | None = None,
    resume: Resume | str = "auto",
    argv: Sequence[str] = (),
    reporter: Reporter | None = None,
    device: str | torch.device = "auto",
) -> TrainResult:
    """Train an architecture after a recipe, to the end.

    `resume`: "auto" goes on with the run in `out` if there is one; "none" begins anew and wants `out` empty;
    a run or checkpoint folder is gone on with, in place or, with another `out`, in a new run.

    Started by `torchrun`, each process takes its part of every batch; the main one alone speaks and writes, and all
    return the same result.

    Raises `DataError`, `TrainError` and its kinds: `RunError`, `CheckpointError`, `TrainingDiverged`,
    `Interrupted`.
    """
    try:
        world = started_world()
    except ValueError as error:
        raise TrainError(str(error)) from error
    reporter = (reporter if world.is_main else None) or SilentReporter()
    recipe = with_absolute_paths(recipe)
    place = choose_device(device) if world.size == 1 else own_device(device, local_rank())
    check_backend(recipe.backend, place)
    if recipe.logging.tensorboard:
        summary_writer()  # what is missing is told before anything is prepared
    if recipe.logging.wandb:
        import_wandb()
    way: Resume = resume if resume in ("auto", "none") else Path(resume)
    wanted = None if out is None else Path(out)
    with ExitStack() as stack:
        stop = stack.enter_context(catch_signals(world))
        stack.enter_context(_company(world, place))
        stack.enter_context(execution_modes(recipe))
        stack.enter_context(kept_memory(place))
        plan = world.on_main(lambda: plan_training(spec, recipe, device=place, n_processes=world.size))
        origin = world.on_main(lambda: _Origin.of(spec, recipe, wanted, way))
        data = world.main_first(
            lambda: prepare_data(
                recipe,
                vocab_size=spec.vocab_size,
                context=plan.context,
                tokenizer=origin.tokenizer(),
                reporter=reporter,
            )
        )

        def open_folder() -> Checkpoint | None:
            stack.enter_context(run_folder.locked(origin.folder))
            tidy_checkpoints(origin.folder)
            found = origin.checkpoint(data, reporter)
            _write_folder(origin.folder, spec, recipe, data, plan, argv, place)
            _announce(spec, recipe, plan, data, origin.folder, found, reporter)
            if (tuned := tuned_tiles.in_use(place)) is not None:
                reporter.note(f"tuned tiles for {', '.join(tuned.tiles)}, from {tuned.path}")
            return found

        checkpoint = world.on_main(open_folder)
        model = build_model(spec, device=place, seed=recipe.seed, init=checkpoint is None)
        session = Session(
            origin.folder,
            model,
            recipe,
            plan,
            data,
            architecture=dump_yaml(spec),
            world=world,
            stop=stop,
            reporter=reporter,
        )
        stack.callback(session.close)
        session.begin(checkpoint)
        return session.run()


@contextmanager
def _company(world: World, device: torch.device) -> Iterator[None]:
    """The other processes of a run, and what their end means for this one. Raises `TrainError`."""
    try:
        with translated():
            world.open(device)
            yield
    except PeerFailed as error:
        raise OtherProcessFailed(str(error)) from error
    except PeerLost as error:
        raise TrainError(
            f"another process of this run is gone ({error}); what was saved is whole, and the same command goes on "
            "from the newest checkpoint if it names the run folder with --out or --resume"
        ) from error
    finally:
        world.close()


@dataclass(frozen=True)
class _Origin:
    """Where a run is written, and which earlier run it goes on with."""

    folder: Path
    earlier: Path | None
    chosen: Path | None
    """One checkpoint of the earlier run; none: its newest."""

    @classmethod
    def of(cls, spec: ModelSpec, recipe: RecipeSpec, out: Path | None, resume: Resume) -> _Origin:
        """Decide, and refuse what cannot be gone on with. Raises `RunError`."""
        earlier = resume_folder(out, resume)
        if earlier is None:
            folder = out or run_folder.new_folder(spec.name)
            run_folder.check_empty(folder)
            return cls(folder, None, None)
        chosen = run_folder.split_path(resume)[1] if isinstance(resume, Path) else None
        folder = out or earlier
        if folder.resolve() != earlier.resolve():
            run_folder.check_empty(folder)
        elif chosen is not None and chosen.resolve() != list_checkpoints(earlier)[-1].resolve():
            raise RunError(
                f"{earlier} has checkpoints after {chosen.name}; name a new folder in --out to branch off"
            )
        _check_same(earlier, spec, recipe)
        return cls(folder, earlier, chosen)

    def tokenizer(self) -> Tokenizer | None:
        return None if self.earlier is None else Tokenizer.load(self.earlier / run_folder.TOKENIZER)

    def checkpoint(self, data: PreparedData, reporter: Reporter) -> Checkpoint | None:
        """The state to begin with; none: from the beginning. Raises `RunError` if the text is another."""
        if self.earlier is None:
            return None
        if self.chosen is not None:
            found: Checkpoint | None = open_checkpoint(self.chosen)
        else:
            found = find_checkpoint(self.earlier, warn=reporter.warn, set_aside=self.earlier == self.folder)
        if found is not None and found.meta["data"] != data.identity:
            raise RunError(
                f"the training text or its tokenisation is not that of {found.path}; start a new run"
            )
        return found


def _check_same(earlier: Path, spec: ModelSpec, recipe: RecipeSpec) -> None:
    """Refuse to go on with another architecture or another order of the data."""
    ignored = {"name", "description"}
    before, now = (
        s.model_dump(exclude=ignored) for s in (load_spec(earlier / run_folder.ARCHITECTURE), spec)
    )
    if before != now:
        keys = ", ".join(key for key in before if before[key] != now[key])
        raise RunError(
            f"{earlier} has another architecture than the one given (they differ in {keys}); start a new run"
        )
    old = load_recipe(earlier / run_folder.RECIPE)
    order = {
        "batch.size": (old.batch.size, recipe.batch.size),
        "context": (context_of(spec, old), context_of(spec, recipe)),
        "order": (old.order, recipe.order),
        "seed": (old.seed, recipe.seed),
    }
    for key, (was, wanted) in order.items():
        if was != wanted:
            raise RunError(
                f"{earlier} was started with recipe.{key}={was}, which decides the order of its data, and "
                f"cannot go on with {wanted}; set recipe.{key}={was} or start a new run"
            )


def with_absolute_paths(recipe: RecipeSpec) -> RecipeSpec:
    """The recipe with its file names made absolute, so that it means the same from any working directory."""
    update: dict[str, Any] = {}
    data, tokenizer = recipe.data, recipe.tokenizer
    if isinstance(data, TextData | JsonlData):
        lists = {"files": _absolute(data.files), "validation_files": _absolute(data.validation_files)}
        update["data"] = data.model_copy(update=lists)
    if isinstance(tokenizer, SentencePieceFile):
        update["tokenizer"] = tokenizer.model_copy(update={"file": _absolute([tokenizer.file])[0]})
    return recipe.model_copy(update=update)


def _absolute(names: list[str]) -> list[str]:
    return [str(Path(name).expanduser().absolute()) for name in names]


def _write_folder(
    folder: Path,
    spec: ModelSpec,
    recipe: RecipeSpec,
    data: PreparedData,
    plan: TrainingPlan,
    argv: Sequence[str],
    device: torch.device,
) -> None:
    """Everything but metrics and checkpoints. Raises `RunError` if the disk refuses."""
    try:
        run_folder.write_environment(folder, argv, device)
        data.tokenizer.save(folder / run_folder.TOKENIZER)
        if isinstance(data.validation, TokenFile) and not (folder / run_folder.VALIDATION).is_dir():
            windows = recipe.evaluation.windows
            n_tokens = None if windows is None else windows * plan.context + 1
            save_head(data.validation, folder / run_folder.VALIDATION, n_tokens)
        write_atomically(folder / run_folder.ARCHITECTURE, dump_yaml(spec).encode())
        write_atomically(
            folder / run_folder.RECIPE, dump_yaml(recipe).encode()
        )  # last: it makes a folder a run
    except OSError as error:
        raise RunError(f"cannot write to the run folder {folder}: {error.strerror or error}") from error


def _place(plan: TrainingPlan, recipe: RecipeSpec) -> str:
    if plan.n_processes == 1:
        return plan.device_name
    return f"{plan.n_processes} processes ({recipe.parallelism}), each with {plan.device_name},"


def _announce(
    spec: ModelSpec,
    recipe: RecipeSpec,
    plan: TrainingPlan,
    data: PreparedData,
    folder: Path,
    checkpoint: Checkpoint | None,
    reporter: Reporter,
) -> None:
    passes = plan.tokens / max(1, data.train.index.n_tokens)
    reporter.note(
        f"{spec.name}: {plan.params:,} parameters; {plan.steps:,} steps of "
        f"{plan.batch_size} x {plan.context} tokens, "
        f"{passes:.2g} passes over {data.train.index.n_tokens:,} tokens"
    )
    parts = f"{plan.accumulation} x {plan.micro_batch} sequences a step"
    reporter.note(f"on {_place(plan, recipe)} in {plan.precision}, {parts}")
    left = 1 - (checkpoint.step if checkpoint else 0) / plan.steps
    if plan.seconds is not None and left > 0:
        reporter.note(f"expected to take about {format_duration(plan.seconds * left)} on this CPU")
    for note in plan.notes:
        reporter.warn(note)
    begin = f"going on at step {checkpoint.step:,} of {checkpoint.run}" if checkpoint else "a new run"
    reporter.note(f"run folder: {folder} ({begin})")
