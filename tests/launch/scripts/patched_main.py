"""A step with one change to it: PATCH=slow_steps torchrun … patched_main.py ARGUMENTS…

The changes are the functions below; the environment variable PATCH names one, for every process of the launch. The step
itself runs as it does from its own main.py.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from helpers import STEPS

from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainer as Trainer
from utils.run.checkpoint import Checkpoints

RANK = int(os.environ.get("RANK", 0))
PATCHES = {}


def patch(step, owner, name):
    """Of the function below: in that step it is called as ``name`` of ``owner``, first of all with what it replaces."""

    def register(function):
        original = getattr(owner, name)

        def apply():
            setattr(owner, name, lambda *arguments, **options: function(original, *arguments, **options))
            return str(STEPS[step])

        PATCHES[function.__name__] = apply
        return function

    return register


calls = []


@patch(3, Trainer, "_generate_sequence")
def empty_answers(generate, trainer, prompts, *others):
    """Rank 1 answers every prompt with EOS alone."""
    rollout = generate(trainer, prompts, *others)
    if RANK == 1:
        rollout.sequences[:, prompts.shape[1] :] = trainer.tokenizer.pad_token_id
        rollout.sequences[:, prompts.shape[1]] = trainer.tokenizer.eos_token_id
    return rollout


@patch(3, Trainer, "_generate_sequence")
def kept_sequences(generate, *inputs):
    """Each rank writes the rollouts of its last step to the folder SEQUENCES."""
    rollout = generate(*inputs)
    torch.save(rollout.sequences, Path(os.environ["SEQUENCES"]) / f"rank{RANK}")
    return rollout


@patch(3, Trainer, "train_rlhf")
def killed_in_an_update(train, *inputs):
    """Rank 1 dies in the first update of its second step; each has two."""
    calls.append(1)
    if RANK == 1 and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(*inputs)


@patch(3, Trainer, "actor_loss_fn")
def nan_loss(loss_fn, *inputs):
    """The loss of rank 1 is NaN in its second step, which has two updates."""
    loss = loss_fn(*inputs)
    calls.append(1)
    if RANK == 1 and len(calls) == 3:
        loss.loss = loss.loss * torch.nan
    return loss


@patch(3, Trainer, "generate_experience")
def nan_weights(generate, trainer, prompts, mask, step=0, *others):
    """The actor of rank 1 has weights that are NaN when it generates in step 1, so its logits are NaN too."""
    if RANK == 1 and step == 1:
        with torch.no_grad():
            trainer.actor_model.module.get_input_embeddings().weight.fill_(torch.nan)
    return generate(trainer, prompts, mask, step, *others)


@patch(1, DeepSpeedEngine, "step")
def slow_steps(step, engine):
    """Time to send a signal."""
    time.sleep(0.2)
    return step(engine)


@patch(1, DeepSpeedEngine, "step")
def stopped_rank(step, engine):
    """Rank 1 stands still in its second step, and its process stays."""
    calls.append(1)
    if RANK == 1 and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    return step(engine)


@patch(1, Checkpoints, "end_step")
def killed_once(end_step, checkpoints, *position):
    """Rank 1 dies after step 3, the first time torchrun starts the ranks."""
    end_step(checkpoints, *position)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and RANK == 1 and checkpoints.steps == 3:
        os.kill(os.getpid(), signal.SIGKILL)


sys.argv[0] = PATCHES[os.environ["PATCH"]]()
runpy.run_path(sys.argv[0], run_name="__main__")
