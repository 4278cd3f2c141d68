"""`generate`: let a trained run continue one text, or many from a file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeut_compose.cli.arguments import JsonOption
from moeut_compose.cli.devices import DeviceOption, import_torch
from moeut_compose.cli.failures import failed, wrong_usage
from moeut_compose.cli.output import print_json
from moeut_compose.cli.runs import RunArgument, find_run, open_run

if TYPE_CHECKING:
    from moeut_compose.generate import Generator, Sampling, Writing
    from moeut_compose.train.run import Run


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the text begins with.")] = "",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Many prompts instead: one a line, or, in a file *.jsonl, "text" or {"prompt": "text"} a line.',
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=0)] = 100,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="Choose among the K likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Choose among tokens of this joint probability.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Choose among tokens at least P times as likely as the likeliest."),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="R", help="Above 1: tokens that came before become less likely.")
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=2**63 - 1,
            help="The same seed gives the same text; prompt i of a file has N + i.",
        ),
    ] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End where this text comes; may be given several times."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts of a file at once; changes no result.")
    ] = 16,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="On a GPU: 16-bit weights, draws on the device, a CUDA graph per token."),
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Let a trained run continue a text, or each text of a file. With `--prompts`, `--json` prints JSON Lines.

    **Examples**

    - `moeut-compose generate runs/20260101-120000-moeut_tiny --prompt "The sea" --temperature 0.7`
    - `moeut-compose generate runs/20260101-120000-moeut_tiny --prompts questions.txt --stop "?" --json`
    """
    if prompts is not None and prompt:
        raise wrong_usage("give --prompt or --prompts, not both")
    texts = [prompt] if prompts is None else list(_read_prompts(prompts))
    import_torch()
    path = find_run(run)
    from moeut_compose.generate import Sampling
    from moeut_compose.spec.recipe import PUBLISHED_SEPARATOR

    try:
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
    except ValueError as error:
        raise wrong_usage(str(error)) from None
    loaded = open_run(path, device)
    generator = _generator(loaded, fast)
    stops = [PUBLISHED_SEPARATOR, *(stop or [])]
    if prompts is None:
        _write_one(loaded, generator, prompt, max_new_tokens, sampling, seed, stops, as_json)
        return
    for begin in range(0, len(texts), batch_size):
        writings = generator.write(
            texts[begin : begin + batch_size],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=seed + begin,
            stop=stops,
        )
        for writing in writings:
            print(json.dumps(_line(writing), ensure_ascii=False) if as_json else writing.text, flush=True)


def _write_one(
    loaded: "Run",
    generator: "Generator",
    prompt: str,
    max_new_tokens: int,
    sampling: "Sampling",
    seed: int,
    stops: list[str],
    as_json: bool,
) -> None:
    (writing,) = generator.write(
        [prompt],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=seed,
        stop=stops,
        stream=_ignore if as_json else _say,
    )
    if as_json:
        identity = {"name": loaded.spec.name, "run": str(loaded.path), "step": loaded.step}
        print_json({**identity, "prompt": prompt, "text": writing.text})
    else:
        print()


def _generator(loaded: "Run", fast: bool) -> "Generator":
    from moeut_compose.generate import Generator

    if not fast:
        return Generator(loaded.model, loaded.tokenizer)
    if next(loaded.model.parameters()).device.type != "cuda":
        raise wrong_usage("--fast needs a CUDA device")
    from moeut_compose.generate.graph import GraphDecoder
    from moeut_compose.progress import make_reporter

    decoder = GraphDecoder(loaded.model, reporter=make_reporter())
    return Generator(loaded.model, loaded.tokenizer, decoder=decoder)


def _line(writing: "Writing") -> dict[str, object]:
    return {
        "prompt": writing.prompt,
        "text": writing.text,
        "tokens": len(writing.ids),
        "seed": writing.seed,
        "end": writing.end,
    }


def _read_prompts(path: Path) -> Iterator[str]:
    """One prompt a line; empty lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise failed(f"{path}: not UTF-8 text ({error.reason})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        yield line if path.suffix != ".jsonl" else _prompt_of(line, f"{path}:{number}")


def _prompt_of(line: str, place: str) -> str:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise failed(f"{place}: not JSON ({error.msg})") from None
    prompt = document.get("prompt") if isinstance(document, dict) else document
    if not isinstance(prompt, str):
        raise failed(f'{place}: neither a text nor an object with a text named "prompt"')
    return prompt


def _say(index: int, text: str) -> None:
    print(text, end="", flush=True)


def _ignore(index: int, text: str) -> None:
    pass
