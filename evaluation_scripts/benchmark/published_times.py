#!/usr/bin/env python
"""Times of DeepSpeed-Chat's step 3 as its authors published them, against what the planner says of the same runs.

    python evaluation_scripts/benchmark/published_times.py
    python evaluation_scripts/benchmark/published_times.py --fit      # the efficiencies anew, from the rows marked fit

Source: README and blog of DeepSpeed-Chat (Yao et al. 2023, https://arxiv.org/abs/2308.01320): one epoch of
PPO over 131,900 prompts of 256 tokens with answers of exactly 256, an OPT actor, OPT-350M as critic and reward model,
the hybrid engine on, a global batch of at most 1,024 answers or the largest that fits, in one optimizer step.

What was not published is assumed as its recipes have it: LoRA (with the adapted matrices frozen) on a single GPU and
from 13B on, ZeRO-3 from 6.7B on several GPUs, checkpointing, tensor-parallel generation where half of a GPU's memory
cannot hold the weights.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.planning.machines import GPU_EFFICIENCY, GRAPH_LAUNCH, Efficiency, accelerator_named, cluster_of
from utils.planning.step_time import Rollouts, Shape, Sharding, StepTime, Updates, hours, rlhf_step

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
RECIPE_ROWS = 8  # of its recipe for 6.7B on one GPU
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
        """Answers of one rank that fit, a power of 2 with at most LARGEST_BATCH on all.

        Fewer than RECIPE_ROWS on a single GPU: its reference goes to the host, and what fits then counts.
        """
        room = self._room(reference_on_host=False)
        if self.gpus == 1 and room < RECIPE_ROWS:
            room = self._room(reference_on_host=True)
        return max(1, min(LARGEST_BATCH // self.gpus, 2 ** int(math.log2(max(1, room)))))

    def _room(self, reference_on_host: bool) -> float:
        """Answers beside weights, gradients and Adam as ZeRO shards them: the copy that generates with its cache, or
        the activations of one pass with its logits."""
        stage, (actor, reference, critic, reward) = self.sharding.stage, self.shapes().values()
        weights = (actor.size + reference.size * (not reference_on_host)) / (self.gpus if stage == 3 else 1)
        states = 14 * (actor.trained + critic.trained) / (self.gpus if stage else 1) + critic.size + reward.size
        copy = actor.size / self.tensor_parallel() if stage == 3 else 0
        free = (accelerator_named(self.gpu, "fp16").memory - 3) * GIB - weights - states
        training = 2 * LENGTH * (actor.layers * actor.hidden * 2 + 34 * actor.hidden + 10 * VOCABULARY)
        return min((free - copy) / actor.cache(1, 2 * LENGTH), free / training)

    def step(self, efficiency: Efficiency = GPU_EFFICIENCY, **how) -> StepTime:
        """An update. how: of Rollouts, where this project makes answers otherwise."""
        device, rows = accelerator_named(self.gpu, "fp16"), self.rows()
        cluster = replace(cluster_of(device, self.gpus, 8), efficiency=efficiency)
        small = Sharding(self.sharding.stage)
        ways = {"actor": self.sharding, "reference": self.sharding, "critic": small, "reward": small}
        how = {"tensor_parallel": self.tensor_parallel() if self.sharding.stage == 3 else 1} | how
        rollouts = Rollouts(rows, 1, LENGTH, LENGTH, **how)
        return rlhf_step(self.shapes(), ways, rollouts, Updates(rows), cluster, "fp16")


def runs() -> list[tuple[Run, float]]:
    """The published runs with their hours."""
    return [(Run(*on, size), published) for on, row in PUBLISHED.items() for size, published in row.items()]


def is_fitted(run: Run) -> bool:
    return (run.gpu, run.gpus, run.size) in FITTED_ON


def ratios(efficiency: Efficiency = GPU_EFFICIENCY) -> dict[Run, float]:
    """Predicted over published hours."""
    return {run: hours(run.step(efficiency), PROMPTS) / published for run, published in runs()}


def mean_error(values: Iterable[float]) -> float:
    """The geometric mean of how far ratios are from 1, in either direction."""
    return math.exp(statistics.fmean(abs(math.log(value)) for value in values))


def fit() -> Efficiency:
    """compute and launch with the least squared error of logarithms on the rows of FITTED_ON, by a pattern search.

    The other two stay: these rows hardly tell them (bandwidth 0.4 and 0.9 fit nearly as well), since decoding waits for
    kernels and what ZeRO sends hides behind the passes.
    """
    chosen = [(run, published) for run, published in runs() if is_fitted(run)]

    def error(efficiency: Efficiency) -> float:
        return sum(math.log(hours(run.step(efficiency), PROMPTS) / published) ** 2 for run, published in chosen)

    best, width = replace(GPU_EFFICIENCY, compute=0.3, launch=5e-4), 2.0
    least = error(best)
    while width > 1.005:
        factors = itertools.product((1 / width, 1, width), repeat=2)
        tried = [replace(best, compute=min(1, best.compute * x), launch=best.launch * y) for x, y in factors]
        errors = [error(one) for one in tried]
        if min(errors) < least:
            least = min(errors)
            best = tried[errors.index(least)]
        else:
            width = math.sqrt(width)
    return best


def table(efficiency: Efficiency) -> str:
    """Markdown: published and predicted hours; beside them this project's on the same machines, where vLLM generates.

    Its own loop makes the same passes as DeepSpeed-Chat: the prediction is its own, too.
    """
    lines = ["| GPUs | actor | published h | predicted h | ratio | with vLLM h |", "|---" * 6 + "|"]
    for run, published in runs():
        predicted = hours(run.step(efficiency), PROMPTS)
        vllm = hours(run.step(efficiency, vllm=True, launch=GRAPH_LAUNCH), PROMPTS)
        ratio = f"{predicted / published:.2f}{' (fit)' if is_fitted(run) else ''}"
        name = f"{run.gpus} x {run.gpu} | {run.size}"
        lines.append(f"| {name} | {published:g} | {predicted:.2f} | {ratio} | {vllm:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the efficiencies anew and use them")
    efficiency = fit() if parser.parse_args().fit else GPU_EFFICIENCY
    print(efficiency, table(efficiency), sep="\n\n")
    found = ratios(efficiency)
    held_out = [ratio for run, ratio in found.items() if not is_fitted(run)]
    worst = max(max(ratio, 1 / ratio) for ratio in held_out)
    print(f"\n{len(held_out)} rows that nothing was fitted on: off by {mean_error(held_out):.2f} x in the geometric")
    print(f"mean, {worst:.2f} x at most")


if __name__ == "__main__":
    main()
