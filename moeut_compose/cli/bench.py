"""`bench`: how fast training steps and expert products are on this machine."""

from typing import Annotated

import typer

from moeut_compose.cli.arguments import JsonOption, SpecsArgument, architecture_overrides, specs_and_overrides
from moeut_compose.cli.failures import complain, wrong_usage
from moeut_compose.cli.output import print_json, print_table
from moeut_compose.spec.io import load_spec

bench = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)


@bench.command()
def step(
    specs: SpecsArgument,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 32,
    seq_len: Annotated[
        int | None, typer.Option(metavar="T", min=1, help="Default: the context length.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once. Default: the batch.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile every distinct layer.")] = False,
    graphed: Annotated[bool, typer.Option("--cuda-graph", help="Replay forward and backward.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps.")] = 15,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time whole training steps: forward, backward, clipping, optimiser; random tokens, median over the steps.

    **Example**

    - `moeut-compose bench step dense_244m moeut_244m --compile --cuda-graph`
    """
    names, overrides = specs_and_overrides(specs)
    models = [load_spec(name, architecture_overrides(overrides)) for name in names]
    from moeut_compose.bench.step import measure_step
    from moeut_compose.train.device import choose_device

    place = choose_device(device)
    if graphed and place.type != "cuda":
        raise wrong_usage("--cuda-graph needs a CUDA device")
    timings = []
    for model in models:
        complain(f"measuring {model.name}")
        timings.append(
            measure_step(
                model,
                batch=batch,
                seq_len=seq_len or model.context_length,
                micro_batch=micro_batch,
                device=place,
                compiled=compiled,
                graphed=graphed,
                steps=steps,
            )
        )
    if as_json:
        print_json([timing.to_dict() for timing in timings])
        return
    print(f"{timings[0].device}, {timings[0].precision}, batch {batch}")
    rows = [
        [
            timing.name,
            f"{timing.ms:.1f}",
            f"{timing.ms_low:.1f}-{timing.ms_high:.1f}",
            f"{timing.ms / timings[0].ms:.3f}",
            f"{timing.tokens_per_second:,.0f}",
            f"{timing.model_tflops:.1f}",
            "–" if timing.peak_gib is None else f"{timing.peak_gib:.1f}",
            f"{timing.estimated_gib:.1f}",
        ]
        for timing in timings
    ]
    print_table(
        ["model", "ms", "spread", "to the first", "tokens/s", "model TFLOP/s", "peak GiB", "expected"], rows
    )
