#!/usr/bin/env python
"""Times of DeepSpeed-Chat's step 3 as its authors published them, against what the planner says of the same runs.

    python evaluation_scripts/benchmark/published_times.py
    python evaluation_scripts/benchmark/published_times.py --fit      # the efficiencies anew, from the rows marked fit

Source: README and blog of DeepSpeed-Chat (Yao et al. 2023, https://arxiv.org/abs/2308.01320, tables 1 to 3): one epoch of
PPO over 131,900 prompts of 256 tokens with answers of exactly 256, an OPT actor, OPT-350M as critic and reward model,
the hybrid engine on, a global batch of at most 1,024 answers or the largest that fits, in one optimizer step.

What was not published is assumed as its recipes have it: LoRA (with the adapted matrices frozen) on a single GPU and from
13B on, ZeRO-3 from 6.7B on several GPUs, checkpointing, tensor-parallel generation where a GPU cannot hold the weights.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.planning.machines import GPU_EFFICIENCY, Cluster, Efficiency, accelerator_named, cluster_of
from utils.planning.step_time import Shape, Sharding, StepTime, decode, forward, gather, optimizer_step, times, train

PROMPTS, LENGTH, LARGEST_BATCH = 131_900, 256, 1024  # LENGTH: tokens of a prompt, and of an answer
# GPU, how many -> hours by the actor's size
PUBLISHED = {
    ("V100-32GB", 1): {"1.3B": 43.2},
    ("A6000", 1): {"1.3B": 26.4, "6.7B": 134.4},
    ("A100-40GB", 1): {"1.3B": 15.4, "6.7B": 81.6},
    ("A100-80GB", 1): {"1.3B": 11.7, "6.7B": 40.8, "13B": 117.6},
    ("A100-40GB", 8): {"1.3B": 2.0, "6.7B": 5.7, "13B": 10.8, "30B": 44.4},
    ("A100-80GB", 8): {"1.3B": 1.4, "6.7B": 4.1, "13B": 9.0, "30B": 18.0, "66B": 50.4},
    ("A100-80GB", 64): {"1.3B": 0.52, "6.7B": 0.85, "13B": 1.25, "30B": 4.0, "66B": 7.5, "175B": 20.0},
}
FITTED_ON = {  # the corners of the table
    ("V100-32GB", 1, "1.3B"),
    ("A6000", 1, "6.7B"),
    ("A100-80GB", 1, "13B"),
    ("A100-40GB", 8, "1.3B"),
    ("A100-80GB", 64, "1.3B"),
    ("A100-80GB", 64, "175B"),
}
OPT = {  # layers, hidden size (Zhang et al. 2022, https://arxiv.org/abs/2205.01068, table 1)
    "350M": (24, 1024),
    "1.3B": (24, 2048),
    "6.7B": (32, 4096),
    "13B": (40, 5120),
    "30B": (48, 7168),
    "66B": (64, 9216),
    "175B": (96, 12288),
}
VOCABULARY = 50272
GIB = 2**30


def opt(size: str, trains: bool, lora: bool) -> Shape:
    """OPT in 16 bits: 12 * hidden^2 weights in a layer, an embedding that is the head, too."""
    layers, hidden = OPT[size]
    blocks, embedding = 12 * layers * hidden**2, VOCABULARY * hidden
    total = blocks + embedding
    trained = 0 if not trains else embedding + 2 * 128 * 9 * hidden * layers if lora else total
    return Shape(total, trained, total, layers, hidden, hidden, hidden, 2)


@dataclass(frozen=True)
class Run:
    """A published run with what is assumed of it."""

    gpu: str
    gpus: int
    size: str

    @property
    def lora(self) -> bool:
        return self.gpus == 1 or self.size not in ("1.3B", "6.7B")

    @property
    def sharding(self) -> Sharding:
        stage = 0 if self.gpus == 1 else 2 if self.size == "1.3B" else 3
        return Sharding(stage, checkpointing=True)

    def shapes(self) -> dict[str, Shape]:
        return {
            "actor": opt(self.size, True, self.lora),
            "reference": opt(self.size, False, self.lora),
            "critic": opt("350M", True, False),
            "reward": opt("350M", False, False),
        }

    def tensor_parallel(self) -> int:
        """Ranks that generate together: as few as hold a copy of the weights in half of their memory."""
        memory = accelerator_named(self.gpu, "fp16").memory * GIB
        size = self.shapes()["actor"].size
        return next((n for n in (1, 2, 4, 8) if n == self.gpus or size / n <= memory / 2), 8)

    def rows(self) -> int:
        """Answers of one rank that fit, a power of 2 with at most LARGEST_BATCH on all: weights, gradients and Adam as
        ZeRO shards them, the copy that generates with its cache, activations of one pass with its logits."""
        shapes, stage = self.shapes(), self.sharding.stage
        actor, reference, critic, reward = shapes.values()
        weights = actor.size / (self.gpus if stage == 3 else 1) + critic.size + reward.size
        weights += 0 if self.gpus == 1 else reference.size / (self.gpus if stage == 3 else 1)
        states = 14 * (actor.trained + critic.trained) / (self.gpus if stage else 1)
        copy = actor.size / self.tensor_parallel() if stage == 3 else 0
        free = accelerator_named(self.gpu, "fp16").memory * GIB - 3 * GIB - weights - states
        generating = actor.cache(1, 2 * LENGTH)
        training = 2 * LENGTH * (actor.layers * actor.hidden * 2 + 34 * actor.hidden + 10 * VOCABULARY)
        most = min((free - copy) / generating, free / training)
        return max(1, min(LARGEST_BATCH // self.gpus, 2 ** int(math.log2(max(1, most)))))

    def step(self, efficiency: Efficiency) -> StepTime:
        cluster = replace(cluster_of(accelerator_named(self.gpu, "fp16"), self.gpus, 8), efficiency=efficiency)
        return step_of(self, cluster, self.rows())

    def hours(self, efficiency: Efficiency) -> float:
        step = self.step(efficiency)
        return PROMPTS / step.rows * step.seconds / 3600


def step_of(run: Run, cluster: Cluster, rows: int) -> StepTime:
    shapes, length, sharding = run.shapes(), 2 * LENGTH, run.sharding
    small = Sharding(sharding.stage if run.gpus > 1 else 0)
    ways = {"actor": sharding, "reference": sharding, "critic": small, "reward": small}
    actor = shapes["actor"]
    pieces = gather("generation: weights", actor, sharding, cluster)
    pieces.append(forward("generation: prefill", actor, rows, LENGTH, cluster, "fp16"))
    parallel = run.tensor_parallel() if sharding.stage == 3 else 1
    pieces += decode("generation: decode", actor, rows, LENGTH, LENGTH, cluster, "fp16", tensor_parallel=parallel)
    for name, shape in shapes.items():
        one = forward("scoring", shape, rows, length, cluster, "fp16")
        pieces += [one, *gather("scoring: ZeRO", shape, ways[name], cluster, one.seconds)]
    for name in ("actor", "critic"):
        pieces += train(name, shapes[name], rows, length, 1, ways[name], cluster, "fp16", 1)
        pieces += optimizer_step(name, shapes[name], ways[name], cluster)
    operations = sum(shape.forward(rows, length) * (2 if name == "actor" else 1) for name, shape in shapes.items())
    all_rows = rows * run.gpus
    return StepTime(tuple(pieces), operations, all_rows, all_rows * length, cluster.device.peak("fp16"))


def runs() -> list[tuple[Run, float]]:
    """The published runs with their hours."""
    return [(Run(*on, size), hours) for on, row in PUBLISHED.items() for size, hours in row.items()]


def is_fitted(run: Run) -> bool:
    return (run.gpu, run.gpus, run.size) in FITTED_ON


def ratios(efficiency: Efficiency = GPU_EFFICIENCY) -> dict[Run, float]:
    """Predicted over published hours."""
    return {run: run.hours(efficiency) / hours for run, hours in runs()}


def mean_error(values) -> float:
    """The geometric mean of how far ratios are from 1, in either direction."""
    values = list(values)
    return math.exp(sum(abs(math.log(value)) for value in values) / len(values))


if __name__ == "__main__":
    import numpy as np, random
    fr=[(r,h) for r,h in runs() if is_fitted(r)]
    def err(x):
        e=Efficiency(*np.exp(x)); return sum(math.log(r.hours(e)/h)**2 for r,h in fr)
    x=np.log([.3,.4,.3,3e-4]); best=err(x); step=.5
    while step>.01:
        moved=False
        for i in range(4):
            for d in (step,-step):
                y=x.copy(); y[i]+=d
                if i<3 and y[i]>0: y[i]=0
                v=err(y)
                if v<best-1e-9: x,best,moved=y,v,True
        if not moved: step/=2
    e=Efficiency(*np.exp(x)); print(e,best)
    for run,h in runs():
        s=run.step(e); print(run.gpu,run.gpus,run.size,"tp",run.tensor_parallel(),"rows",run.rows(),"pub",h,"pred %.2f ratio %.2f"%(run.hours(e),run.hours(e)/h),"FIT" if is_fitted(run) else "", {k:round(v,1) for k,v in s.by("name").items() if v>1})
    r=ratios(e); print("held out", mean_error(v for k,v in r.items() if not is_fitted(k)), max(max(v,1/v) for v in r.values()))
