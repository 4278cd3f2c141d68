"""What `test_parallel.py` starts under torchrun: a few steps of every engine, and what they come to.

`python parallel_worker.py OUT` writes `OUT/<architecture>-<engine>.safetensors` with the weights after the last step.
Alone, without torchrun, it writes `OUT/<architecture>-alone.safetensors`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from moeut_compose.build import build_model
from moeut_compose.evaluate.perplexity import measure_perplexity
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.recipe import AdamWSpec, CosineSchedule
from moeut_compose.train import parallel
from moeut_compose.train.checkpoint import weights_of
from moeut_compose.train.device import choose_precision
from moeut_compose.train.loop import Trainer
from moeut_compose.train.parallel import collect, spread
from moeut_compose.train.recompute import checkpoint_layers
from moeut_compose.world import started_world

SMALL = ["vocab_size=60", "context_length=16", "d_model=32"]
ARCHITECTURES = {
    "dense_tiny": ["stages.0.layers.0.count=2"],
    "moeut_tiny": ["stages.0.repeats=2"],
    "sut_tiny": ["stages.0.repeats=3"],
    "aux_free_moe_tiny": [],
}
STEPS = 20
BATCH = 8


class Numbers:
    """A text of random tokens, as evaluation reads it."""

    def __init__(self, n_windows: int) -> None:
        self._ids = torch.randint(0, 60, (n_windows, 17), generator=torch.Generator().manual_seed(5))
        self.index = type("Index", (), {"n_tokens": n_windows * 16, "n_bytes": n_windows * 64})

    def n_windows(self, context: int) -> int:
        return len(self._ids)

    def windows(self, indices, context):
        return self._ids[list(indices)].numpy()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    world = started_world()
    world.open(torch.device("cpu"))
    if world.size > 2:
        parallel.SMALLEST_UNIT = 1  # every layer for itself
    for name in ARCHITECTURES:
        for parallelism in ("ddp", "fsdp") if world.size > 1 else ("alone",):
            weights = train(name, parallelism, world)
            if world.is_main:
                save_file(weights, out / f"{name}-{parallelism}.safetensors")
    world.close()


def train(
    name: str, parallelism: str, world, *, steps: int = STEPS, checkpointing: str = "none"
) -> dict[str, torch.Tensor]:
    model = build_model(load_spec(name, SMALL + ARCHITECTURES[name]), dtype=torch.float64, seed=1)
    engine = spread(model, world, parallelism, graphed=False)
    checkpoint_layers(model, checkpointing)
    trainer = Trainer(
        model,
        optimizer=AdamWSpec(lr=3e-3),
        schedule=CosineSchedule(warmup_steps=4),
        steps=STEPS,
        clip_norm=0.25,
        precision=choose_precision("fp32", torch.device("cpu")),
        micro_batch=2,  # SUT has a loss that compares the tokens of a micro-batch, so this is the same everywhere
        world=world,
        engine=engine,
    )
    own = BATCH // world.size
    losses = []
    for step in range(steps):
        batch = torch.randint(0, 60, (BATCH, 17), generator=torch.Generator().manual_seed(step % 2))
        values = trainer.train_step(batch[world.rank * own : (world.rank + 1) * own])
        losses.append(torch.stack([values["loss"], values["grad_norm"]]))
    found = measure_perplexity(model, Numbers(7), context=16, batch_size=2, world=world)
    moments = trainer.state_dict()["optimizer"]  # while evaluation has left weights in one piece
    weights = collect(weights_of(model), keep=True) | {
        f"optimizer.{k}.{j}": v for k, s in moments.items() for j, v in s.items()
    }
    weights["losses"] = torch.stack(losses)
    weights["perplexity"] = torch.tensor(
        [found.cross_entropy, found.bits_per_byte, found.tokens], dtype=torch.float64
    )
    return {key: value.detach().clone().contiguous() for key, value in weights.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
