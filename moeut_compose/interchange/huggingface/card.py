"""The model card of an export: what the run says of itself, and nothing that it does not know."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moeut_compose import __version__
from moeut_compose.evaluate.zero_shot import FOLDER as EVALUATION
from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.params import count_params
from moeut_compose.spec.dump import dump_yaml
from moeut_compose.spec.recipe import BuiltinData, HuggingFaceData, RecipeSpec, SyntheticData

if TYPE_CHECKING:
    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.train.run import Run

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- moeut-compose
- custom_code
---

# {name}

{description}

A causal language model trained with moeut-compose {version}, at step {step:,}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
inputs = tokenizer("{prompt}", return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=50, do_sample=True, temperature=0.8)
print(tokenizer.decode(written[0]))
```

The code beside this card needs `torch`, `transformers` 5 and, for the tokenizer, `sentencepiece`. {separator}
`moeut-compose import PATH --format transformers --out RUN` turns this folder into a run again.

## Architecture

| | |
| --- | --- |
{sizes}

<details><summary>Every setting</summary>

```yaml
{architecture}```

</details>

## Training

| | |
| --- | --- |
{training}

<details><summary>Every setting</summary>

```yaml
{recipe}```

</details>

## Results

{results}

## Licence and limits

Licence: not stated. It is for whoever publishes this model to choose one that the training data allow.
{data_licence} What the model writes has not been checked for truth, bias or harm.
"""


def model_card(run: Run, recipe: RecipeSpec) -> str:
    """The text of `README.md`. `recipe` is the run's as it may be shown."""
    separator = "" if isinstance(recipe.data, SyntheticData) else recipe.data.separator
    return CARD.format(
        name=run.spec.name,
        description=run.spec.description or "No description.",
        version=__version__,
        step=run.step,
        prompt="The sea",
        separator=(
            f'Documents end with the text `{separator}`: pass `stop_strings=["{separator}"], tokenizer=tokenizer` to '
            "end there."
            if separator
            else "Documents of the training text end without a mark."
        ),
        sizes=table(sizes(run.spec)),
        architecture=dump_yaml(run.spec),
        training=table(training(run, recipe)),
        recipe=dump_yaml(recipe),
        results=results(run),
        data_licence=(
            "The built-in corpus is in the public domain."
            if isinstance(recipe.data, BuiltinData)
            else "Their terms are not known here."
        ),
    )


def table(rows: dict[str, str]) -> str:
    """Rows of a Markdown table with two columns."""
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def sizes(spec: ModelSpec) -> dict[str, str]:
    """What the model is and costs."""
    params, macs = count_params(spec), count_macs(spec)
    stages = "; ".join(
        f"{stage.n_members} × {stage.repeats} ({', '.join(sorted({layer.mixer.kind for layer in stage.layers}))} and "
        f"{', '.join(sorted({layer.feedforward.kind for layer in stage.layers}))})"
        for stage in spec.stages
    )
    return {
        "layers × repeats of each stage": stages,
        "model width": f"{spec.d_model:,}",
        "vocabulary": f"{spec.vocab_size:,}",
        "context in training": f"{spec.context_length:,} tokens",
        "norm, position": f"{spec.norm.kind} ({spec.norm.placement}), {spec.position.kind}",
        "parameters": f"{params.total:,}",
        "active for one token": f"{params.active_per_token:,}",
        "multiply-accumulates per token": f"{macs.total_per_token:,}, head included, at {macs.seq_len:,} tokens",
    }


def training(run: Run, recipe: RecipeSpec) -> dict[str, str]:
    """How it was trained: what the recipe says."""
    n_tokens = run.step * recipe.batch.size * run.context
    budget = f"{n_tokens:,} in {run.step:,} steps of {recipe.batch.size} × {run.context:,}"
    data = recipe.data
    origin = f" ({data.dataset})" if isinstance(data, HuggingFaceData) else ""
    return {
        "data": f"{data.kind}{origin}",
        "tokens": budget if run.step else "not recorded",
        "optimiser": f"{recipe.optimizer.kind}, peak rate {recipe.optimizer.lr:g}, "
        f"weight decay {recipe.optimizer.weight_decay:g}",
        "schedule": recipe.schedule.kind,
        "precision": recipe.precision,
    }


def results(run: Run) -> str:
    """What was measured at this step, as a table."""
    rows: dict[str, str] = {}
    validation = last_validation(run)
    if validation is not None:
        rows["perplexity on held-out text"] = f"{validation['perplexity']:.3f}"
        rows["bits per byte on held-out text"] = f"{validation['bits_per_byte']:.4f}"
        rows["tokens of held-out text"] = f"{validation['validation_tokens']:,}"
    for path in sorted((run.path / EVALUATION).glob("*.json")):
        result = read_json(path.read_text(encoding="utf-8"))
        if result.get("step") == run.step and "accuracy" in result:
            name = f"{result['task']} ({result['protocol']} protocol, {result['n']:,} items)"
            rows[name] = f"{100 * result['accuracy']:.2f} %"
    return f"| | |\n| --- | --- |\n{table(rows)}" if rows else "Nothing was measured at this step."


def last_validation(run: Run) -> dict[str, Any] | None:
    """The row of the metrics with the validation at this step."""
    path = run.path / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [
        row for row in map(read_json, lines) if row.get("event") == "validation" and row["step"] == run.step
    ]
    return rows[-1] if rows else None


def read_json(text: str) -> dict[str, Any]:
    """A document, empty where it is damaged: a card does without."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
