"""Non-finite values: a loss, a gradient or logits that are not finite stop a run with engine, step and rows, or are
left out where the user allows it; the state before the step is saved, and nothing else."""

import re

import pytest
import torch
from helpers import assert_same_run, flags, read_metrics, zero_stage
from safetensors.torch import load_file

from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainer
from utils.model import losses
from utils.model.reward_model import RewardModel
from utils.process.errors import UserError
from utils.run.checkpoint_files import newest_checkpoint

BROKEN = {
    "loss": lambda loss: loss * torch.nan,
    "gradient": lambda loss: loss + (loss * 0).sqrt(),  # the loss is as it was, its gradient infinity times zero
}


@pytest.fixture
def break_step(monkeypatch):
    """break_step(step of the pipeline, kind, micro-batches, of the critic): what is BROKEN there."""

    def patch(step, kind, micro_batches, critic=False):
        owner, name = {
            1: (losses, "causal_lm_loss_sum"),
            2: (RewardModel, "forward"),
            3: (DeepSpeedPPOTrainer, "critic_loss_fn" if critic else "actor_loss_fn"),
        }[step]
        calls, original = [], getattr(owner, name)

        def broken(*args, **kwargs):
            found = original(*args, **kwargs)
            if torch.is_grad_enabled() and not kwargs.get("values_only"):
                calls.append(1)
                if len(calls) - 1 in micro_batches:
                    if step == 1:
                        return BROKEN[kind](found)
                    if step == 2:
                        return found | {"loss": BROKEN[kind](found["loss"])}
                    found.loss = BROKEN[kind](found.loss)
            return found

        monkeypatch.setattr(owner, name, broken)

    return patch


ONE_EPOCH = "--num_train_epochs 1 --lr_scheduler_type constant"
LOSS = {1: "train/loss", 2: "train/loss", 3: "train/actor_loss"}


ENGINES = {  # name: (stage, flags)
    **{f"ZeRO-{stage}": (stage, "") for stage in range(4)},
    "ZeRO-2, offload": (2, "--offload"),
    "ZeRO-3, bf16, offload": (3, "--offload --dtype bf16"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_step_that_may_be_left_out_makes_no_update_in_any_engine(
    run_step, start, break_step, tmp_path, capsys, step, kind, engine
):
    stage, more = ENGINES[engine]
    # PPO's steps have two updates of one micro-batch each here.
    bad, steps = (3, 8) if step < 3 else (2, 8)
    break_step(step, kind, (3,) if step < 3 else (4, 5))
    text = f"{ONE_EPOCH} {zero_stage(step, stage)} {more} --skip_nonfinite 2"
    run_step(step, [*start(step), *flags(text, output_dir=tmp_path)])
    rows = read_metrics(tmp_path)
    left_out = 1 if step < 3 else 2
    assert [row["train/skipped_steps"] for row in rows] == [0] * bad + [left_out] * (steps - bad)
    if kind == "loss":
        assert rows[bad][LOSS[step]] is None
    assert all(abs(row[LOSS[step]]) < 20 for i, row in enumerate(rows) if i != bad)
    files = list(tmp_path.rglob("*.safetensors"))
    assert files and all(value.isfinite().all() for file in files for value in load_file(file).values())
    name = "gradient norm" if kind == "gradient" else LOSS[step].removeprefix("train/")
    assert f"the {name} of the engine '{'actor' if step == 3 else 'model'}' is " in capsys.readouterr().out


STOPS = {  # what is broken: (step, of the critic, words of the message)
    "sft": (1, False, "loss of the engine 'model'"),
    "reward": (2, False, "loss of the engine 'model'"),
    "actor": (3, False, "actor_loss of the engine 'actor'"),
    "critic": (3, True, "critic_loss of the engine 'critic'"),
}


@pytest.mark.parametrize("case", STOPS)
def test_the_run_stops_with_engine_step_and_rows_saves_the_state_before_and_goes_on_from_it_bit_for_bit(
    run_step, start, break_step, tmp_path, case
):
    """A fault that does not come back (of the hardware, say) leaves no trace."""
    step, critic, name = STOPS[case]
    arguments = [*start(step), *flags("--num_train_epochs 1")]
    run_step(step, [*arguments, *flags(output_dir=tmp_path / "plain")])
    arguments += flags("--checkpoint_steps 2", output_dir=tmp_path / "resumed")
    break_step(step, "loss", (5,) if step < 3 else (6,), critic)
    with pytest.raises(UserError) as stop:
        run_step(step, arguments)
    bad = 5 if step < 3 else 3
    found = re.search(
        rf"the {name} is nan in epoch 0, step {bad} \(training rows ([\d, ]+)\).*step-{bad:08d}", str(stop.value)
    )
    assert found, stop.value
    assert len(found[1].split(",")) == 2
    assert newest_checkpoint(tmp_path / "resumed/checkpoints").state["position"] == [0, bad]
    # The micro-batches of the second start are counted on, so that nothing is broken any more.
    run_step(step, [*arguments, "--resume", "auto"])
    assert_same_run(tmp_path / "plain", tmp_path / "resumed")


def test_what_was_saved_can_go_on_without_the_step(run_step, start, break_step, tmp_path):
    break_step(1, "gradient", (3, 4))  # the second start begins with the step that failed
    arguments = [*start(1), *flags(f"{ONE_EPOCH} --checkpoint_steps 2", output_dir=tmp_path)]
    with pytest.raises(UserError, match=r"the gradient norm of the engine 'model' is (nan|inf) in epoch 0, step 3"):
        run_step(1, arguments)
    run_step(1, [*arguments, *flags("--resume auto --skip_nonfinite 1")])
    rows = read_metrics(tmp_path)
    assert [row["train/skipped_steps"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_a_dropped_step_leaves_weights_and_averages_as_they_were(run_step, start, monkeypatch, tmp_path):
    """The loss of the critic alone is none, and the actor's gradient is a fine one: neither takes the step."""
    seen, original = [], DeepSpeedPPOTrainer.train_rlhf

    def watched(self, *args):
        actor = [param.detach().clone() for param in self.actor_model.module.parameters()]
        metrics = original(self, *args)
        same = all(map(torch.equal, actor, self.actor_model.module.parameters()))
        seen.append((same, metrics["actor_step_applied"]))
        return metrics

    critic_loss, calls = DeepSpeedPPOTrainer.critic_loss_fn, []

    def broken(self, *args):
        loss = critic_loss(self, *args)
        calls.append(1)
        if len(calls) == 3:
            loss.loss = loss.loss * torch.nan
        return loss

    monkeypatch.setattr(DeepSpeedPPOTrainer, "train_rlhf", watched)
    monkeypatch.setattr(DeepSpeedPPOTrainer, "critic_loss_fn", broken)
    text = f"{zero_stage(3, 2)} --enable_ema --skip_nonfinite 1"
    run_step(3, [*start(3), *flags(text, output_dir=tmp_path)])
    assert [step == (True, False) for step in seen] == [False, False, True] + [False] * 13


def test_a_step_that_has_made_updates_already_is_not_saved_half(run_step, start, break_step, tmp_path):
    break_step(3, "loss", (7,))  # the second of the two updates of step 3
    with pytest.raises(UserError, match=r"in epoch 0, step 3 .*; the last checkpoint is .*step-00000002"):
        run_step(3, [*start(3), *flags("--checkpoint_steps 2", output_dir=tmp_path)])
    assert newest_checkpoint(tmp_path / "checkpoints").state["position"] == [0, 2]


@pytest.mark.parametrize("token, when", [("seen", "in epoch 0, step 4"), ("unseen", "in step 6")])
def test_weights_that_are_no_numbers_are_not_saved(run_step, start, monkeypatch, tmp_path, token, when):
    """Whatever made them so, and whether the loss sees them or not: the checkpoint before is worth more."""
    loss_sum, calls = losses.causal_lm_loss_sum, []

    def spoiled(scorer, inputs, labels):
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 5:
                row = int(inputs["input_ids"][0, 0]) if token == "seen" else -1
                scorer.model.get_input_embeddings().weight.data[row] = torch.nan
        return loss_sum(scorer, inputs, labels)

    monkeypatch.setattr(losses, "causal_lm_loss_sum", spoiled)
    told = r"the weights of the engine 'model' are not finite.*no checkpoint.*step-00000003"
    with pytest.raises(UserError, match=told) as stop:
        run_step(1, [*start(1), *flags("--checkpoint_steps 3", output_dir=tmp_path)])
    assert when in str(stop.value)
    assert newest_checkpoint(tmp_path / "checkpoints").state["steps"] == 3
