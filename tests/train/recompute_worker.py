"""What `test_recompute.py` starts under torchrun: a few steps with activation checkpointing, by every engine.

`recompute_worker.py OUT` writes `OUT/<architecture>-<engine>-<mode>.safetensors`, also without checkpointing.
"""

import sys
from pathlib import Path

import torch
from parallel_worker import train
from safetensors.torch import save_file

from moeut_compose.train.recompute import MODES
from moeut_compose.world import started_world

ARCHITECTURES = ("dense_tiny", "moeut_tiny", "sut_tiny")
STEPS = 3


def main(out: Path) -> None:
    torch.set_num_threads(1)
    world = started_world()
    world.open(torch.device("cpu"))
    for name in ARCHITECTURES:
        for engine in ("ddp", "fsdp"):
            for mode in ("none", *MODES):
                weights = train(name, engine, world, steps=STEPS, checkpointing=mode)
                if world.is_main:
                    save_file(weights, out / f"{name}-{engine}-{mode}.safetensors")
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
