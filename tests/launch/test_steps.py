"""The three steps as a user starts them: every launcher, one and two ranks, ZeRO-0 and ZeRO-3, models that move."""

import json
import re
import statistics

import pytest
import torch
from helpers import (
    SCRIPTS,
    STEPS,
    flags,
    launch,
    read_metrics,
    run_in_one_launch,
    slow_pair_loss,
    write_pairs,
    zero_stage,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from evaluation_scripts import rw_eval
from utils.data.preparation import create_prompt_dataset
from utils.model.tokenizer import load_hf_tokenizer

COMMON = "--data_split 1,1,1 --dtype fp32 --max_train_samples 16 --max_eval_samples 8"
ROWS = "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --max_seq_len 48"
RLHF = """
    --per_device_generation_batch_size 4 --per_device_training_batch_size 2 --max_prompt_seq_len 32
    --max_answer_seq_len 8 --enable_ema --print_answers --num_warmup_steps 0 --gradient_accumulation_steps 2
"""


@pytest.fixture(scope="session")
def data(pairs_folder, cache_folder):
    """The arguments of all steps."""
    return flags(COMMON, data_path=pairs_folder, data_output_path=cache_folder)


def step_3_arguments(actor, critic, output):
    models = dict(actor_model_name_or_path=actor, critic_model_name_or_path=critic)
    return flags(RLHF, output_dir=output, **models)


@pytest.fixture(scope="session")
def sft(model_folder, data, tmp_path_factory):
    """(folder, console) of a step 1 run under plain python, from another folder."""
    output = tmp_path_factory.mktemp("sft")
    text = f"{ROWS} --enable_tensorboard --print_loss --lora_dim 4"
    places = dict(model_name_or_path=model_folder, output_dir=output, tensorboard_path=output / "tb")
    code, console = launch(1, [*data, *flags(text, **places)], cwd=output)
    assert code == 0, console
    return output, console


@pytest.fixture(scope="session")
def reward(sft, data, tmp_path_factory):
    """(folder, console) of a step 2 run under torchrun with two ranks."""
    output = tmp_path_factory.mktemp("reward")
    arguments = flags(f"{ROWS} --num_padding_at_beginning 0", model_name_or_path=sft[0], output_dir=output)
    code, console = launch(2, [*data, *arguments], launcher="torchrun", ranks=2)
    assert code == 0, console
    return output, console


def test_step_1_prints_the_lines_that_parsers_read(sft):
    _, console = sft
    for line in (
        r"^\*\*\*\*\* Running training \*\*\*\*\*$",
        r"^\*\*\*\*\* Evaluating perplexity, Epoch 0/1 \*\*\*\*\*$",
        r"^ppl: [\d.]+, loss: [\d.]+$",
        r"^Beginning of Epoch 1/1, Total Micro Batches 4$",
        r"^Time: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, Epoch: 0, Step: 3, Rank: 0, loss = [\d.]+$",
        r"^Model Parameters: [\d.]+ B, Latency: [\d.]+s, TFLOPs: [\d.]+, Samples/sec: [\d.]+, Time/seq [\d.]+s, "
        r"Batch Size: 4, Sequence Length: \d+$",
        r"^saving the final model \.\.\.$",
    ):
        assert re.search(line, console, re.M), f"{line}\n{console}"


def test_step_1_lowers_the_perplexity_and_writes_metrics(sft):
    folder, _ = sft
    before, after = (row["eval/perplexity"] for row in read_metrics(folder, "eval"))
    assert after < before
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["train/grad_norm"] > 0 and row["train/lr"] >= 0 for row in rows)
    assert list((folder / "tb").glob("events*"))


def test_a_saved_model_stands_alone_with_lora_folded_in(sft, tmp_path):
    folder, _ = sft
    names = set(load_file(folder / "model.safetensors"))
    assert not any("lora" in name for name in names)
    moved = tmp_path / "moved"
    moved.symlink_to(folder)
    model, info = AutoModelForCausalLM.from_pretrained(moved, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(moved)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert json.loads((folder / "config.json").read_text()).get("use_cache", True)
    assert not list(folder.glob(".saving*"))


def test_step_2_prints_its_lines_and_its_model_scores_in_plain_transformers(reward):
    folder, console = reward
    for line in (
        r"^\*\*\*\*\* Evaluating reward, Epoch 1/1 \*\*\*\*\*$",
        r"^chosen_last_scores \(higher is better\) : -?[\d.e-]+, "
        r"rejected_last_scores \(lower is better\) : -?[\d.e-]+, acc \(higher is better\) : [\d.]+$",
        r"^Epoch 1/1 with loss [\d.]+$",
        r"^saving model \.\.\.$",
        r"^note: --num_padding_at_beginning is ignored",
    ):
        assert len(re.findall(line, console, re.M)) >= 1, f"{line}\n{console}"
    assert len(re.findall(r"^saving model", console, re.M)) == 1
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.num_labels == 1


def _plain_values(folder, rows):
    """fp32 values at every token of rows of ids, one row at a time, by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = [model.base_model(torch.tensor([row])).last_hidden_state[0] for row in rows]
        return [model.score(states).flatten().tolist() for states in hidden]


def _held_out_pairs(folder, pairs_folder, cache_folder):
    """Chosen and rejected ids of the rows that step 2 evaluates on under COMMON and ROWS."""
    tokenizer, limits = load_hf_tokenizer(folder), dict(max_train_samples=16, max_eval_samples=8)
    place = (0, [str(pairs_folder)], "1,1,1", str(cache_folder))
    _, rows = create_prompt_dataset(*place, 2, 1234, tokenizer, 48, **limits)
    return [row["chosen_ids"] for row in rows], [row["rejected_ids"] for row in rows]


def test_step_2_saves_mean_and_std_of_its_held_out_scores_over_all_ranks(reward, pairs_folder, cache_folder):
    folder, _ = reward
    chosen, rejected = _held_out_pairs(folder, pairs_folder, cache_folder)
    assert len(chosen) % 2 == 1, "one of the two ranks should have a filler"
    scores = [values[-1] for values in _plain_values(folder, chosen + rejected)]
    config = json.loads((folder / "config.json").read_text())
    assert config["reward_score_mean"] == pytest.approx(statistics.fmean(scores), abs=1e-5)
    assert config["reward_score_std"] == pytest.approx(statistics.pstdev(scores), rel=1e-4)
    last = read_metrics(folder, "eval")[-1]
    won = sum(c > r for c, r in zip(scores[: len(chosen)], scores[len(chosen) :], strict=True))
    assert last["eval/accuracy"] == pytest.approx(won / len(chosen))
    assert last["eval/pairs"] == len(chosen)


@pytest.mark.parametrize("kind", ["per_token", "end_token"])
def test_the_loss_flags_of_step_2_are_those_of_the_formula(
    reward, run_step, data, pairs_folder, cache_folder, tmp_path, kind
):
    text = f"{ROWS} --dropout 0 --rm_loss {kind} --rm_margin 0.5 --rm_center_coef 0.1"
    run_step(2, [*data, *flags(text, model_name_or_path=reward[0], output_dir=tmp_path)])
    chosen, rejected = _held_out_pairs(reward[0], pairs_folder, cache_folder)
    values = _plain_values(reward[0], chosen), _plain_values(reward[0], rejected)
    expected = [slow_pair_loss(*pair, kind, 0.5, 0.1) for pair in zip(*values, chosen, rejected, strict=True)]
    # Before the first step the model is the one it started from, trained head included.
    assert read_metrics(tmp_path, "eval")[0]["eval/loss"] == pytest.approx(statistics.fmean(expected), rel=1e-4)


def test_the_readme_s_lines_of_plain_transformers_give_the_scores_of_rw_eval(reward, tmp_path):
    readme = STEPS[2].with_name("README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1].replace('"OUT"', repr(str(reward[0])))
    names = {}
    exec(code, names)
    rows = [re.fullmatch("(?P<prompt>.*Assistant:)(?P<answer>.*)", text).groupdict() for text in names["texts"]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    places = dict(data_path=tmp_path / "rows.json", output=tmp_path / "scores.jsonl", model_name_or_path=reward[0])
    rw_eval.main(flags("--device cpu", **places))
    ours = [json.loads(line)["score"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert names["scores"].tolist() == pytest.approx(ours, abs=1e-5)
    assert abs(ours[0] - ours[1]) > 1e-4


@pytest.mark.parametrize(("launcher", "ranks", "stage"), [("deepspeed", 2, 3), ("python", 1, 0)])
def test_step_3_runs_prints_and_saves_actor_critic_and_ema(sft, reward, data, tmp_path, launcher, ranks, stage):
    arguments = [*data, *step_3_arguments(sft[0], reward[0], tmp_path)]
    engines = flags(f"{zero_stage(3, stage)} --enable_hybrid_engine")
    code, console = launch(3, [*arguments, *engines], launcher=launcher, ranks=ranks)
    assert code == 0, console
    for line in (
        r"^\|E2E latency=[\d.]+s \|Gather latency=[\d.]+s \([\d.]+%\) \|Generate time=[\d.]+s \([\d.]+%\) "
        r"\|Training time=[\d.]+s \([\d.]+%\) \|Others=[\d.]+ \([\d.]+%\)"
        r"\|CurSamplesPerSec=[\d.]+ \|AvgSamplesPerSec=[\d.]+$",
        r"^Epoch: 0 \| Step: 1 \| PPO Epoch: 1 \| Actor Loss: -?[\d.e-]+ \| Critic Loss: [\d.e-]+ \| "
        r"Unsupervised Loss: 0.0$",
        r"^End-to-End => Latency: [\d.]+s, TFLOPs: [\d.]+, Samples/sec: [\d.]+, Time/seq [\d.]+s, Batch Size: \d+, "
        r"Total Seq\. Length: 40$",
        r"^Generation => Latency: [\d.]+s, Per-token Latency [\d.]+ ms, TFLOPs: [\d.]+, BW: [\d.]+ GB/sec, "
        r"Answer Seq\. Length: 8$",
        r"^Training   => Latency: [\d.]+s, TFLOPs: [\d.]+$",
        r"^Actor Model Parameters => [\d.]+ B, Critic Model Parameters => [\d.]+ B$",
        r"^Average reward score: -?[\d.]+ \| EMA reward score: -?[\d.]+$",
        r"^--- ans    --> step=0, ",
    ):
        assert re.search(line, console, re.M), f"{line}\n{console}"
    rows = read_metrics(tmp_path)
    assert len(rows) == 16 // (4 * ranks)
    assert abs(rows[0]["train/ratio"] - 1) < 1e-5
    assert rows[0]["train/kl"] == pytest.approx(0, abs=1e-4)
    wanted = [
        "score",
        "score_std",
        "kl",
        "clip_fraction",
        "approx_kl",
        "entropy",
        "explained_variance",
        "answer_length",
        "eos_rate",
        "actor_lr",
        "actor_grad_norm",
        "critic_grad_norm",
        "tokens_per_second",
    ]
    assert all(isinstance(rows[-1][f"train/{name}"], float) for name in wanted)
    for name in ("actor", "actor_ema"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).num_parameters() > 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").config.num_labels == 1


def test_ranks_sample_different_answers(sft, reward, cache_folder, tmp_path):
    """Both ranks get the same prompt; with equal seeds their answers would be equal too."""
    folder = tmp_path / "same"
    folder.mkdir()
    for name in ("train.jsonl", "eval.jsonl"):
        line = write_pairs(folder / name, 1).read_text()
        (folder / name).write_text(line * 24)
    data = flags(f"{COMMON} --enable_test_mode --test_stop_step 1", data_path=folder, data_output_path=cache_folder)
    arguments = [*data, *step_3_arguments(sft[0], reward[0], tmp_path / "out")]
    environment = dict(PATCH="kept_sequences", SEQUENCES=str(tmp_path))
    code, console = launch(SCRIPTS / "patched_main.py", arguments, "torchrun", ranks=2, **environment)
    assert code == 0, console
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert first.shape != second.shape or not torch.equal(first, second)


def test_the_three_steps_run_in_bf16_at_zero_3_with_offload_lora_and_checkpointing(model_folder, data, tmp_path):
    sft, reward, rlhf = (tmp_path / name for name in ("sft", "reward", "rlhf"))
    data = [*data, *flags("--dtype bf16")]
    common = f"{ROWS} --zero_stage 3 --gradient_checkpointing --lora_dim 2"
    engines = f"""
        {zero_stage(3, 3)} --enable_hybrid_engine --actor_lora_dim 2 --actor_gradient_checkpointing
        --offload_reference_model --offload_reward_model
    """
    runs = [
        (1, [*data, *flags(common, model_name_or_path=model_folder, output_dir=sft)]),
        (2, [*data, *flags(common, model_name_or_path=sft, output_dir=reward)]),
        (3, [*data, *step_3_arguments(sft, reward, rlhf), *flags(engines)]),
    ]
    run_in_one_launch(runs, tmp_path, launcher="deepspeed")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "rlhf/actor").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "rlhf/actor_ema").dtype == torch.float32
