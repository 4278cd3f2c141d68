"""Trained runs for lm-evaluation-harness, which brings the tasks; likelihoods come from our own scorer.

Importing this module needs the extra `eval` and registers the model as `moeut_compose`. Versions of the harness
that read entry points find it by themselves; for the others
`python -m moeut_compose.evaluate.harness --model moeut_compose --model_args run=… --tasks …` is their command.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager

from moeut_compose.data.errors import DataError
from moeut_compose.data.hub import hub_failures
from moeut_compose.evaluate.continuation import Continuation
from moeut_compose.evaluate.passages import continuation_passage, document_passages
from moeut_compose.evaluate.scoring import score_passages
from moeut_compose.progress import SilentReporter, make_reporter
from moeut_compose.spec.find import NotFound, did_you_mean, nearest
from moeut_compose.train.device import choose_device
from moeut_compose.train.run import Run, load_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval.api.instance import Instance

    from moeut_compose.evaluate.scoring import Passage, Score
    from moeut_compose.progress import Reporter

NAME = "moeut_compose"
N_BOOTSTRAP = 1000
"""Resamplings for the standard error of metrics that have no formula for it."""
WAYS_OUT = """ways out:
  - run tasks of your own, over local files: --harness-include FOLDER with their YAML
  - run the built-in benchmarks over local files: --tasks … --task-data DIR
  - load the task once on a machine with a network; then set HF_HOME to its cache here"""


@register_model(NAME)
class HarnessModel(LM):
    """A run that answers the three kinds of requests of the harness, in float32."""

    def __init__(
        self,
        run: Run | str | Path,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        """`run` is a run, its folder, or that of a checkpoint. A batch holds as many tokens as `batch_size` windows.

        Raises what `load_run` raises.
        """
        super().__init__()
        self.run = run if isinstance(run, Run) else load_run(run, device=choose_device(device or "auto"))
        is_number = batch_size is not None and str(batch_size).isdecimal()
        self._max_tokens = (int(batch_size) if is_number else 8) * self.run.context  # type: ignore[arg-type]
        self._reporter = reporter or make_reporter()
        self._device = next(self.run.model.parameters()).device

    @property
    def max_length(self) -> int:
        """Tokens that a prediction may see."""
        return self.run.context

    @property
    def tokenizer_name(self) -> str:
        return self.run.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {"architecture": self.run.spec.name, "run": str(self.run.path), "step": self.run.step}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would write it."""
        passages = [
            continuation_passage(self.run.tokenizer, *request.args, context_length=self.max_length)
            for request in requests
        ]
        scores = self._scores("likelihoods", passages)
        results = [
            (score.log_likelihood, score.predictions == passage.targets)
            for passage, score in zip(passages, scores, strict=True)
        ]
        self._remember("loglikelihood", requests, results)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, every token once."""
        texts = [
            document_passages(self.run.tokenizer, *request.args, context_length=self.max_length)
            for request in requests
        ]
        scores = iter(self._scores("texts", [passage for passages in texts for passage in passages]))
        results = [math.fsum(next(scores).log_likelihood for _ in passages) for passages in texts]
        self._remember("loglikelihood_rolling", requests, results)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt, up to the first of the stop texts."""
        results = []
        with self._reporter.task("continuations", total=len(requests)) as task:
            for seed, request in enumerate(requests):  # repeats of a prompt are draws of their own
                prompt, settings = request.args
                continuation = Continuation.of(settings, context_length=self.max_length)
                results.append(continuation.write(self.run, prompt, seed=seed))
                task.advance()
        self._remember("generate_until", requests, results)
        return results

    def _scores(self, title: str, passages: Sequence[Passage]) -> list[Score]:
        with self._reporter.task(title, total=len(passages)) as task:
            return score_passages(self.run.model, passages, max_tokens=self._max_tokens, between=task.advance)

    def _remember(self, kind: str, requests: Sequence[Instance], results: Sequence[Any]) -> None:
        """Fill the response cache of the harness, if it is used."""
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)


def evaluate_with_harness(
    run: Run,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness; patterns such as `blimp_*` are allowed.

    `include` is a folder with YAML files of further tasks; `limit` takes the first items of each. Returns
    `version` of the harness, `limit`, and for every task or group its `title`, `n` items, `n_shot` and a list of
    `metrics`. Raises `NotFound` for tasks that the harness does not have, and `DataError` where items cannot be
    had or a task is refused.
    """
    manager = TaskManager(include_path=None if include is None else str(include))
    found = _load_tasks(manager, _known(manager, tasks))
    try:
        results = simple_evaluate(
            model=HarnessModel(run, batch_size=batch_size, reporter=reporter or SilentReporter()),
            tasks=found,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=N_BOOTSTRAP,
            log_samples=False,
        )
    except ValueError as error:
        raise DataError(f"lm-evaluation-harness refuses: {error}") from error
    assert results is not None, "there is one process"
    return {
        "version": version("lm_eval"),
        "limit": limit,
        "tasks": {name: _summary(name, results) for name in results["results"]},
    }


def _known(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    names: list[str] = []
    for task in tasks:
        found = manager.match_tasks([task])
        if not found:
            raise NotFound(
                f"--harness: lm-evaluation-harness has no task {task!r}"
                f"{did_you_mean(nearest(task, manager.all_tasks))}"
            )
        names += found
    return list(dict.fromkeys(names))


def _load_tasks(manager: TaskManager, names: list[str]) -> list[Any]:
    """Groups and single tasks with their items. Raises `DataError`."""
    found: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except ImportError as error:
            raise DataError(f"the task {name} needs a package that is not installed: {error}") from error
        except hub_failures() as error:
            raise DataError(f"cannot read the items of {name}: {error}\n{WAYS_OUT}") from error
        groups = loaded.get("groups", {})
        found += [groups[name]] if name in groups else loaded["tasks"].values()
    return found


def _summary(name: str, results: Any) -> dict[str, Any]:
    """One task of the results of the harness; `metric,filter` keys become records."""
    values = results["results"][name]
    metrics = []
    for key, value in values.items():
        metric, comma, rule = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{rule}")
        record = {"metric": metric, "filter": rule, "value": _finite(value), "stderr": _finite(stderr)}
        metrics.append(record)
    counts = results.get("n-samples", {}).get(name, {})
    return {
        "title": values.get("alias", name).strip(" -"),
        "n": counts.get("effective"),
        "n_shot": results.get("n-shot", {}).get(name),
        "metrics": metrics,
    }


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
