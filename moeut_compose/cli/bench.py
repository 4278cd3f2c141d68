"""`bench`: how fast training steps, expert products and writing are on this machine."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from moeut_compose.cli.arguments import (
    JsonOption,
    SpecsArgument,
    architecture_overrides,
    specs_and_overrides,
)
from moeut_compose.cli.failures import complain, wrong_usage
from moeut_compose.cli.output import print_json, print_table
from moeut_compose.cli.tuning import tune_kernels
from moeut_compose.spec.io import load_spec

if TYPE_CHECKING:
    from moeut_kernels.bench.compare import Result

bench = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)


@bench.command()
def step(
    specs: SpecsArgument,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Of the expert products: auto, triton, grouped_mm, bmm, torch; or loop, loop_indexed: one expert "
            "after the other in Python.",
        ),
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step, on each process.")] = 32,
    seq_len: Annotated[
        int | None, typer.Option(metavar="T", min=1, help="Default: the context length.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once. Default: the batch.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile every distinct layer.")] = False,
    graphed: Annotated[bool, typer.Option("--cuda-graph", help="Replay forward and backward.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps.")] = 15,
    parallelism: Annotated[
        str, typer.Option(metavar="ddp|fsdp", help="How the processes that torchrun starts share the model.")
    ] = "ddp",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time whole training steps: forward, backward, clipping, optimiser; random tokens, median over the steps.

    With several back ends the models take turns, one step of each a round. **Examples**

    - `moeut-compose bench step dense_244m moeut_244m --compile --cuda-graph`
    - `moeut-compose bench step dense_tiny moeut_tiny --backend auto,loop --batch 8 --device cpu`
    - `torchrun --nproc-per-node 2 -m moeut_compose bench step moeut_244m --compile --parallelism fsdp`
    """
    if parallelism not in ("ddp", "fsdp"):
        raise wrong_usage(f"--parallelism {parallelism}: write ddp or fsdp")
    names, overrides = specs_and_overrides(specs)
    models = [load_spec(name, architecture_overrides(overrides)) for name in names]
    from moeut_compose.bench.step import BACKENDS, measure_in_turn, measure_step
    from moeut_compose.train.device import check_backend, choose_device, own_device
    from moeut_compose.train.modes import kept_memory, uncut_layers
    from moeut_compose.world import local_rank, started_world

    backends = backend.split(",")
    if unknown := [name for name in backends if name not in BACKENDS]:
        raise wrong_usage(f"--backend {unknown[0]}: choose among {', '.join(BACKENDS)}")
    if backends != ["auto"] and (graphed or compiled):
        raise wrong_usage("--backend compares eager steps; leave out --compile and --cuda-graph")
    if graphed and parallelism == "fsdp":
        raise wrong_usage("--cuda-graph records a step on whole weights and --parallelism fsdp splits them")
    world = started_world()
    if backends != ["auto"] and world.size > 1:
        raise wrong_usage("--backend compares steps of one process")
    place = choose_device(device) if world.size == 1 else own_device(device, local_rank())
    for name in backends:
        check_backend(name, place)
    if graphed and place.type != "cuda":
        raise wrong_usage("--cuda-graph needs a CUDA device")
    timings = []
    with kept_memory(place), uncut_layers():
        if backends != ["auto"]:
            complain(
                f"measuring {', '.join(model.name for model in models)} on {', '.join(backends)} in turn"
            )
            timings += measure_in_turn(
                models,
                backends,
                batch=batch,
                seq_len=seq_len,
                micro_batch=micro_batch,
                device=place,
                steps=steps,
            )
            models = []
        world.open(place)
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
                    world=world,
                    parallelism=parallelism,  # type: ignore[arg-type]
                )
            )
    world.close()
    if not world.is_main:
        return
    if as_json:
        print_json([timing.to_dict() for timing in timings])
        return
    processes = "" if world.size == 1 else f"{world.size} processes ({parallelism}), each with "
    print(f"{processes}{timings[0].device}, {timings[0].precision}, batch {batch}")
    rows = [
        [
            timing.name,
            timing.backend,
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
        [
            "model",
            "backend",
            "ms",
            "spread",
            "to the first",
            "tokens/s",
            "model TFLOP/s",
            "peak GiB",
            "expected",
        ],
        rows,
        n_text_columns=2,
    )


@bench.command()
def decode(
    specs: SpecsArgument,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Sequences side by side.")] = "1,64",
    tokens: Annotated[int, typer.Option(metavar="N", min=32, help="Tokens to write.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to read before.")] = 64,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0 takes the likeliest token.")] = 0,
    modules: Annotated[
        bool,
        typer.Option("--modules", help="Run the modules themselves where kernels for a few tokens would do."),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time reading prompts and writing after them, beside the bound that memory traffic sets.

    Random weights in 16 bits on a GPU, random prompts. **Example**

    - `moeut-compose bench decode moeut_244m --batch 1,64`
    """
    batches = [int(part) if part.isdecimal() else 0 for part in batch.split(",")]
    if min(batches) < 1:
        raise wrong_usage(f"--batch {batch}: write numbers from 1 on with commas between them")
    names, overrides = specs_and_overrides(specs)
    models = [load_spec(name, architecture_overrides(overrides)) for name in names]
    from moeut_compose.bench.decode import measure_decode
    from moeut_compose.generate import Sampling
    from moeut_compose.progress import make_reporter
    from moeut_compose.train.device import choose_device

    timings = [
        timing
        for model in models
        for timing in measure_decode(
            model,
            batches=batches,
            prompt_tokens=prompt_tokens,
            new_tokens=tokens,
            device=choose_device(device),
            sampling=Sampling(temperature=temperature),
            fused=not modules,
            reporter=make_reporter(),
        )
    ]
    if as_json:
        print_json([timing.to_dict() for timing in timings])
        return
    graphed = ", one CUDA graph a token" if timings[0].is_graphed else ""
    print(f"{timings[0].device}, {timings[0].dtype}{graphed}; {prompt_tokens} tokens read, {tokens} written")
    rows = [
        [
            timing.name,
            "fused" if timing.is_fused else "modules",
            str(timing.batch),
            f"{timing.prefill_tokens_per_second:,.0f}",
            f"{timing.step_ms:.3f}",
            f"{timing.step_ms_low:.3f}-{timing.step_ms_high:.3f}",
            f"{timing.tokens_per_second:,.0f}",
            f"{(timing.weight_bytes + timing.cache_bytes) / 1e6:,.0f}",
            *_beside_bound(timing.tokens_per_second, timing.bound_tokens_per_second),
        ]
        for timing in timings
    ]
    header = ["model", "kernels", "batch", "read tokens/s", "ms a step", "spread", "tokens/s"]
    print_table([*header, "MB a step", "bound", "of bound"], rows, n_text_columns=2)


@bench.command()
def kernels(
    shape: Annotated[
        str, typer.Option(metavar="NAME", help="tiny, 244m or 1b. Default: 244m on a GPU, else tiny.")
    ] = "",
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Default: that of the shape.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, in which everybody is timed once.")] = 20,
    tune: Annotated[
        bool, typer.Option("--tune", help="Try other tiles instead, and keep the faster ones for later runs.")
    ] = False,
    products: Annotated[
        str, typer.Option(metavar="NAME,...", help="With --tune: of these products. Default: all.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time one expert feedforward: our kernels, PyTorch paths, loops, and published packages that are installed.

    Outputs and gradients are compared with float64 first; who is wrong is not timed. Random data, new every time;
    bfloat16 on a GPU, float32 elsewhere.

    With `--tune` the products of the 244m layers are timed with other tile sizes than the built-in ones. What
    computes the same, repeats bit for bit and is faster by more than the spread goes to a file that later runs on
    this model of GPU read (`doctor` shows it); `MOEUT_KERNELS_TUNED=0` leaves it unread. **Examples**

    - `moeut-compose bench kernels --shape 244m`
    - `moeut-compose bench kernels --tune`
    """
    from moeut_kernels.bench.compare import SHAPES, compare

    from moeut_compose.train.device import choose_device, describe_device

    place = choose_device(device)
    if products and not tune:
        raise wrong_usage("--products goes with --tune")
    if tune:
        if shape:
            raise wrong_usage("--tune has a shape of its own; leave out --shape")
        tune_kernels(place, products=products, tokens=tokens, repeats=repeats, as_json=as_json)
        return
    shape = shape or ("244m" if place.type == "cuda" else "tiny")
    if shape not in SHAPES:
        raise wrong_usage(f"--shape {shape}: choose one of {', '.join(SHAPES)}")
    size = replace(SHAPES[shape], n_tokens=tokens or SHAPES[shape].n_tokens)
    results = compare(size, device=place, repeats=repeats, tell=complain)
    if as_json:
        described = {"device": describe_device(place), "shape": asdict(size)}
        print_json(described | {"results": [result.to_dict() for result in results]})
        return
    print(
        f"{describe_device(place)}; {size.n_tokens} tokens of {size.d_model}, "
        f"{size.n_experts} experts of {size.d_expert}, {size.top_k} a token"
    )
    times = [result.forward_backward_ms for result in results if result.forward_backward_ms is not None]
    header = [
        "implementation",
        "status",
        "error",
        "forward ms",
        "spread",
        "with backward",
        "spread",
        "to the first",
    ]
    print_table(header, [_kernel_row(result, times[0]) for result in results], n_text_columns=2)
    for result in results:
        if result.status in ("does not run", "wrong"):
            complain(f"{result.implementation} {result.status}: {result.why}")


def _kernel_row(result: Result, first: float) -> list[str]:
    row = [result.implementation, result.status]
    row.append("–" if result.largest_error is None else f"{result.largest_error:.1e}")
    if result.forward_backward_ms is None:
        return [*row, *"–––––"]
    for ms, spread in (
        (result.forward_ms, result.forward_spread_ms),
        (result.forward_backward_ms, result.forward_backward_spread_ms),
    ):
        assert ms is not None and spread is not None
        row += [f"{ms:.3g}", f"{spread[0]:.3g}-{spread[1]:.3g}"]
    return [*row, f"{result.forward_backward_ms / first:.2f}"]


def _beside_bound(speed: float, bound: float | None) -> list[str]:
    return ["n/a", "n/a"] if bound is None else [f"{bound:,.0f}", f"{speed / bound:.0%}"]
