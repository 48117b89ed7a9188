"""Evaluations while a run trains: no trace in the training, the best model, an early end, saved models on the way."""

import json
import shutil

import pytest
import torch
from helpers import MEASURED, assert_same_run, flags, killed_after, read_metrics, zero_stage
from safetensors.torch import load_file

from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainer
from utils import arguments
from utils.arguments.watching import worse_than_at_start
from utils.process.errors import UserError
from utils.run.checkpoint import Checkpoints
from utils.run.evaluation import BEST_RECORD


def _training_rows(folder):
    rows = read_metrics(folder)
    return [{name: value for name, value in row.items() if not any(m in name for m in MEASURED)} for row in rows]


def _models(folder):
    return sorted(file.relative_to(folder) for file in folder.rglob("*.safetensors") if "step-" not in str(file))


# The hybrid engine at stage 3 gathers and lets go, so that an evaluation could disturb most there.
@pytest.mark.parametrize(
    ("step", "more"),
    [
        (1, "--zero_stage 0"),
        (1, "--zero_stage 3 --lora_dim 4"),
        (2, "--zero_stage 2"),
        ("dpo", "--zero_stage 3 --precompute_ref_log_probs"),
        (3, f"{zero_stage(3, 0)} --enable_ema"),
        (3, f"{zero_stage(3, 3)} --enable_hybrid_engine --actor_lora_dim 4"),
    ],
)
def test_evaluations_and_saved_models_leave_no_trace_in_the_training(run_step, start, tmp_path, step, more):
    watching = "--eval_interval 2 --save_best --save_interval 3 --save_total_limit 1"
    watching += " --eval_prompts 5" if step == 3 else " --eval_iters 1"
    run_step(step, [*start(step), *flags(more, output_dir=tmp_path / "plain")])
    run_step(step, [*start(step), *flags(f"{more} {watching}", output_dir=tmp_path / "watched")])
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert _training_rows(plain) == _training_rows(watched)
    for file in _models(plain):
        want, got = load_file(plain / file), load_file(watched / file)
        assert want and all(torch.equal(want[name], got[name]) for name in want), file
    evaluations = read_metrics(watched, "eval")
    assert len(evaluations) > len(read_metrics(plain, "eval")) + 2
    assert len(list(watched.glob("step-*"))) == 1
    assert _models(watched / "best") == [file for file in _models(plain) if "checkpoint" not in str(file)]


def test_step_3_evaluates_held_out_prompts_with_the_same_random_numbers(run_step, start, tmp_path, capsys):
    """A policy that does not move gives the same answers each time, to prompts of the eval split, fillers left out."""
    text = "--eval_interval 2 --eval_prompts 5 --actor_learning_rate 0 --critic_learning_rate 0 --sample_interval 0"
    arguments = [*start(3), *flags(text, output_dir=tmp_path)]
    run_step(3, arguments)
    rows = [{n: v for n, v in row.items() if n not in ("step", "time")} for row in read_metrics(tmp_path, "eval")]
    assert [row["step"] for row in read_metrics(tmp_path, "eval")] == [0, 2, 4, 6, 8]
    assert all(row == rows[0] for row in rows)
    assert rows[0]["eval/used_answers"] + rows[0]["eval/unused_answers"] == 5
    assert {"eval/score", "eval/kl", "eval/eos_rate", "eval/answer_length"} <= set(rows[0])
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 2, 4, 6, 8} and all(row["evaluation"] for row in samples)
    assert capsys.readouterr().out.count("5 answers to prompts that are not trained on") == 5


def test_the_best_model_is_that_of_the_best_evaluation(run_step, start, tmp_path):
    """At a rate that ruins the model, an early one is the best, and it is not the last."""
    text = "--eval_interval 2 --save_best loss --save_interval 2 --learning_rate 0.03 --lr_scheduler_type constant"
    run_step(1, [*start(1), *flags(text, output_dir=tmp_path)])
    losses = {row["step"]: row["eval/loss"] for row in read_metrics(tmp_path, "eval") if row["step"] > 0}
    best = min(losses, key=losses.get)
    record = json.loads((tmp_path / "best/best.json").read_text())
    assert (record["step"], record["value"], record["metric"]) == (best, losses[best], "loss")
    kept, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("best", f"step-{best:06d}"))
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    assert len(list(tmp_path.glob("step-*"))) == 8, "without a limit all stay"
    assert (tmp_path / "best/config.json").exists() and (tmp_path / "best/tokenizer.json").exists()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_patience_ends_a_run_as_a_finished_one(run_step, start, tmp_path, capsys, step):
    """Nothing moves at a rate of 0, so that no evaluation is better than the first."""
    rates = "--learning_rate 0" if step < 3 else "--actor_learning_rate 0 --critic_learning_rate 0 --eval_prompts 2"
    text = f"{rates} --eval_interval 1 --early_stopping_patience 2 --checkpoint_steps 1"
    arguments = [*start(step), *flags(text, output_dir=tmp_path)]
    run_step(step, arguments)
    out = capsys.readouterr().out
    assert "early stopping: 2 evaluations without a better" in out and "after 3 steps" in out
    assert len(read_metrics(tmp_path)) == 3
    assert (tmp_path / "checkpoints/finished.json").exists() and list(tmp_path.rglob("model.safetensors"))


def test_a_policy_that_says_nothing_is_never_the_best(run_step, start, tmp_path, monkeypatch, capsys):
    """From its third step on it answers EOS alone; 0 would be a higher score than those of this reward model."""
    generate, steps = DeepSpeedPPOTrainer._generate_sequence, []

    def mute(self, prompts, *others):
        rollout = generate(self, prompts, *others)
        if len(steps) >= 2:
            rollout.sequences[:, prompts.shape[1] :] = self.tokenizer.pad_token_id
            rollout.sequences[:, prompts.shape[1]] = self.tokenizer.eos_token_id
        return rollout

    end_step = Checkpoints.end_step
    monkeypatch.setattr(Checkpoints, "end_step", lambda *given: steps.append(1) or end_step(*given))
    monkeypatch.setattr(DeepSpeedPPOTrainer, "_generate_sequence", mute)
    monkeypatch.setattr(DeepSpeedPPOTrainer, "_final_scores", lambda self, parts, ended: parts[:, 0] * 0 - 1)
    text = "--eval_interval 1 --eval_prompts 2 --save_best --early_stopping_patience 3"
    run_step(3, [*start(3), *flags(text, output_dir=tmp_path)])
    assert json.loads((tmp_path / "best" / BEST_RECORD).read_text())["value"] == -1
    assert [row["eval/score"] for row in read_metrics(tmp_path, "eval")] == [-1, -1, -1, None, None]
    assert "worse than it began: score -1 before training, nan now" in capsys.readouterr().out


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_keeps_the_best_value_and_its_patience(run_step, start, tmp_path, step):
    rates = "--learning_rate 0" if step == 1 else "--actor_learning_rate 0 --critic_learning_rate 0 --eval_prompts 2"
    text = f"{rates} --eval_interval 2 --early_stopping_patience 2 --save_best --checkpoint_steps 1"
    for name in ("plain", "killed"):
        arguments = [*start(step), *flags(text, output_dir=tmp_path / name)]
        with killed_after(5 if name == "killed" else None):
            run_step(step, arguments)
        if name == "killed":
            run_step(step, [*arguments, "--resume", "auto"])
        shutil.rmtree(tmp_path / name / "checkpoints")
    assert len(read_metrics(tmp_path / "killed")) == 6
    assert_same_run(tmp_path / "plain", tmp_path / "killed")


def test_a_run_resumed_after_it_had_stopped_early_does_not_train_on(run_step, start, tmp_path, capsys):
    text = "--learning_rate 0 --eval_interval 1 --early_stopping_patience 1 --checkpoint_steps 1"
    arguments = [*start(1), *flags(text, output_dir=tmp_path)]
    with killed_after(2):
        run_step(1, arguments)
    run_step(1, [*arguments, "--resume", "auto"])
    assert len(read_metrics(tmp_path)) == 2 and (tmp_path / "model.safetensors").exists()


def test_the_newest_saved_models_stay(run_step, start, tmp_path):
    """Those of a later step are of a run that went on from an earlier one, and no folder of another name is touched."""
    for name in ("step-000001", "step-000900", "step-notes", "steps"):
        (tmp_path / name).mkdir()
    text = "--save_interval 4 --save_total_limit 2"
    run_step(2, [*start(2), *flags(text, output_dir=tmp_path)])
    names = {folder.name for folder in tmp_path.iterdir() if folder.name.startswith("step")}
    assert names == {"step-000012", "step-000016", "step-000900", "step-notes", "steps"}
    config = json.loads((tmp_path / "step-000012/config.json").read_text())
    evaluated = {row["step"]: row["eval/score_mean"] for row in read_metrics(tmp_path, "eval")}
    assert config["reward_score_mean"] == evaluated[12], "of this very model"


def test_the_last_evaluation_takes_all_rows_and_the_comparison_takes_as_many_as_before(run_step, start, tmp_path):
    text = "--eval_interval 8 --eval_iters 1 --save_best"
    run_step(2, [*start(2), *flags(text, output_dir=tmp_path)])
    rows = [(row["step"], row["eval/pairs"]) for row in read_metrics(tmp_path, "eval")]
    assert rows == [(0, 4), (8, 4), (16, 4), (16, rows[-1][1])] and rows[-1][1] > 4
    assert json.loads((tmp_path / "best/best.json").read_text())["figures"]["pairs"] == 4


@pytest.mark.parametrize(
    ("step", "text", "message"),
    [
        (1, "--save_best --output_dir OUT", "a run of one epoch makes one, at its end: give --eval_interval"),
        (2, "--early_stopping_patience 2 --output_dir OUT", "--early_stopping_patience compares evaluations"),
        (3, "--save_best --output_dir OUT", "step 3 makes none without --eval_interval"),
        (1, "--save_best --eval_interval 2", "--save_best saves models under --output_dir, which is not given"),
        (1, "--save_interval 2", "--save_interval saves models under --output_dir"),
        (1, "--save_total_limit 2 --output_dir OUT", "keeps the newest models of --save_interval, which is not given"),
    ],
)
def test_what_would_do_nothing_is_refused(run_step, start, tmp_path, step, text, message):
    epochs = ["--num_train_epochs", "1"]
    with pytest.raises(UserError, match=message):
        run_step(step, [*start(step), *epochs, *flags(text.replace("OUT", str(tmp_path / "out")))])


# ---------------------------------------------------------------- worse than at the start


@pytest.mark.parametrize("more", ["", "--eval_iters 1 --per_device_eval_batch_size 1"])
def test_a_run_that_made_its_model_worse_says_so_at_its_end(run_step, start, capsys, more):
    run_step(1, [*start(1), *flags(f"--learning_rate 1 --lr_scheduler_type constant {more}")])
    said = [line for line in capsys.readouterr().out.splitlines() if "ended worse than it began" in line]
    assert len(said) == 1 and said[0].startswith("the evaluation ended worse than it began: loss ")
    assert "before training" in said[0] and "lower --learning_rate" in said[0]


@pytest.mark.parametrize("step", [1, 2, "dpo", 3])
def test_a_model_that_did_not_move_is_not_called_worse_and_the_first_evaluation_can_be_left_out(
    run_step, start, tmp_path, capsys, step
):
    rates = "--learning_rate 0" if step != 3 else "--actor_learning_rate 0 --critic_learning_rate 0 --eval_interval 90"
    more = "--eval_prompts 2" if step == 3 else "--dropout 0"
    for name, skip in (("with", ""), ("without", "--skip_initial_evaluation")):
        run_step(step, [*start(step), *flags(f"{rates} {more} {skip}", output_dir=tmp_path / name)])
    assert "ended worse" not in capsys.readouterr().out
    both = [[row["step"] for row in read_metrics(tmp_path / name, "eval")] for name in ("with", "without")]
    assert both[0][0] == 0 and both[0][1:] == both[1] != []
    assert _training_rows(tmp_path / "with") == _training_rows(tmp_path / "without")


@pytest.mark.parametrize(
    ("step", "text", "start", "end", "words"),
    [
        (1, "", {"loss": 2.530}, {"loss": 2.729}, ["loss 2.53 before training, 2.729 now; lower --learning_rate"]),
        (1, "", {"loss": 2.530}, {"loss": 2.5305}, []),
        (1, "", {"loss": 2.530}, {"loss": float("nan")}, ["nan now"]),
        (1, "", {}, {"loss": 2.729}, []),
        (1, "--lora_dim 4", {"loss": 2.0}, {"loss": 2.1}, ["lower --lora_learning_rate"]),
        (1, "--soft_prompt p_tuning", {"loss": 2.0}, {"loss": 2.1}, ["lower --soft_prompt_learning_rate"]),
        (2, "", {"accuracy": 0.55, "loss": 0.7}, {"accuracy": 0.5, "loss": 0.6}, ["accuracy 0.55 before training"]),
        (2, "", {"accuracy": 0.55, "loss": 0.7}, {"accuracy": 0.6, "loss": 0.8}, []),
        ("dpo", "", {"accuracy": 0.5}, {"accuracy": 0.49}, ["lower --learning_rate"]),
        (3, "", {"score": 0.0, "eos_rate": 0.6}, {"score": 0.1, "eos_rate": 0.56}, []),
        (3, "", {"score": 0.0, "eos_rate": 0.6}, {"score": 0.1, "eos_rate": 0.5}, ["raise --missing_eos_penalty"]),
        (3, "--actor_lora_dim 4", {"score": 0.0}, {"score": -0.1}, ["lower --actor_lora_learning_rate"]),
    ],
)
def test_what_is_worse_is_told_with_the_flag_to_turn(step, text, start, end, words):
    model = "--actor_model_name_or_path" if step == 3 else "--model_name_or_path"
    args = arguments.build_parser(step).parse_args([model, "x", *text.split()])
    lines = worse_than_at_start(args, step, start, end)
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True)), lines


def test_a_resumed_run_still_knows_where_it_started(run_step, start, tmp_path, capsys):
    text = "--learning_rate 1 --lr_scheduler_type constant --checkpoint_steps 1"
    arguments_of_run = [*start(1), *flags(text, output_dir=tmp_path)]
    with killed_after(3):
        run_step(1, arguments_of_run)
    assert "ended worse" not in capsys.readouterr().out
    run_step(1, [*arguments_of_run, "--resume", "auto"])
    assert "ended worse than it began" in capsys.readouterr().out


def test_leaving_out_an_evaluation_that_step_3_does_not_make_is_refused(run_step, start):
    with pytest.raises(UserError, match="--skip_initial_evaluation: step 3 evaluates nothing without --eval_interval"):
        run_step(3, [*start(3), "--skip_initial_evaluation"])
