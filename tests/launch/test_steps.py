"""The three steps as a user starts them: every launcher, one and two ranks, ZeRO-0 and ZeRO-3, models that move."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import STEPS, launch, make_model, read_metrics, run_command, slow_pair_loss, write_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from evaluation_scripts import rw_eval
from utils.data.preparation import create_prompt_dataset
from utils.model.tokenizer import load_hf_tokenizer

COMMON = ["--data_split", "1,1,1", "--dtype", "fp32", "--max_train_samples", "16", "--max_eval_samples", "8"]
ROWS = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--max_seq_len", "48"]


def _data(pairs_folder, cache_folder):
    return ["--data_path", pairs_folder, "--data_output_path", cache_folder, *COMMON]


@pytest.fixture(scope="session")
def sft(model_folder, pairs_folder, cache_folder, tmp_path_factory):
    """(folder, console) of a step 1 run under plain python, from another folder."""
    output = tmp_path_factory.mktemp("sft")
    code, console = launch(
        1,
        [
            *_data(pairs_folder, cache_folder),
            *ROWS,
            "--model_name_or_path",
            model_folder,
            "--output_dir",
            output,
            "--enable_tensorboard",
            "--tensorboard_path",
            output / "tb",
            "--print_loss",
            "--lora_dim",
            "4",
        ],
        cwd=output,
    )
    assert code == 0, console
    return output, console


@pytest.fixture(scope="session")
def reward(sft, pairs_folder, cache_folder, tmp_path_factory):
    """(folder, console) of a step 2 run under torchrun with two ranks."""
    output = tmp_path_factory.mktemp("reward")
    arguments = [*_data(pairs_folder, cache_folder), *ROWS, "--model_name_or_path", sft[0], "--output_dir", output]
    code, console = launch(2, [*arguments, "--num_padding_at_beginning", "0"], launcher="torchrun", ranks=2)
    assert code == 0, console
    return output, console


def _step3_arguments(sft, reward, pairs_folder, cache_folder, output):
    return [
        *_data(pairs_folder, cache_folder),
        "--actor_model_name_or_path",
        sft[0],
        "--critic_model_name_or_path",
        reward[0],
        "--per_device_generation_batch_size",
        "4",
        "--per_device_training_batch_size",
        "2",
        "--max_prompt_seq_len",
        "32",
        "--max_answer_seq_len",
        "8",
        "--output_dir",
        output,
        "--enable_ema",
        "--print_answers",
        "--num_warmup_steps",
        "0",
        "--gradient_accumulation_steps",
        "2",
    ]


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
    reward, run_step, pairs_folder, cache_folder, tmp_path, kind
):
    arguments = [*_data(pairs_folder, cache_folder), *ROWS, "--model_name_or_path", reward[0], "--dropout", 0]
    flags = ["--rm_loss", kind, "--rm_margin", 0.5, "--rm_center_coef", 0.1]
    run_step(2, [*arguments, *flags, "--output_dir", tmp_path])
    chosen, rejected = _held_out_pairs(reward[0], pairs_folder, cache_folder)
    values = _plain_values(reward[0], chosen), _plain_values(reward[0], rejected)
    expected = [slow_pair_loss(*pair, kind, 0.5, 0.1) for pair in zip(*values, chosen, rejected, strict=True)]
    # Before the first step the model is the one it started from, trained head included.
    assert read_metrics(tmp_path, "eval")[0]["eval/loss"] == pytest.approx(statistics.fmean(expected), rel=1e-4)


def test_rw_eval_finds_the_figures_of_step_2_on_the_same_pairs(
    run_step, model_folder, pairs_folder, cache_folder, tmp_path, capsys
):
    data = ["--data_path", pairs_folder, "--data_output_path", cache_folder, "--data_split", "0,1,0", "--dtype", "fp32"]
    run_step(2, [*data, "--model_name_or_path", model_folder, "--max_seq_len", 48, "--output_dir", tmp_path / "out"])
    last = read_metrics(tmp_path / "out", "eval")[-1]
    capsys.readouterr()
    flags = ["--data_path", str(pairs_folder), "--max_seq_len", "48", "--output", str(tmp_path / "scores.jsonl")]
    rw_eval.main(["--model_name_or_path", str(tmp_path / "out"), "--device", "cpu", *flags])
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == last["eval/pairs"] == 20
    for name, figure in (("correct", "accuracy"), ("chosen_score", "chosen_score"), ("rejected_score",) * 2):
        assert statistics.fmean(row[name] for row in rows) == pytest.approx(last[f"eval/{figure}"], abs=1e-5)
    _, scores, saved = capsys.readouterr().out.rstrip().rsplit("\n", 2)
    assert scores.split()[2:] == saved.split()[1:5]  # mean and std over the same pairs, as they were saved


def test_the_readme_s_lines_of_plain_transformers_give_the_scores_of_rw_eval(reward, tmp_path):
    readme = STEPS[2].with_name("README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1].replace('"OUT"', repr(str(reward[0])))
    names = {}
    exec(code, names)
    rows = [re.fullmatch("(?P<prompt>.*Assistant:)(?P<answer>.*)", text).groupdict() for text in names["texts"]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--data_path", str(tmp_path / "rows.json"), "--output", str(tmp_path / "scores.jsonl")]
    rw_eval.main(["--model_name_or_path", str(reward[0]), "--device", "cpu", *flags])
    ours = [json.loads(line)["score"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert names["scores"].tolist() == pytest.approx(ours, abs=1e-5)
    assert abs(ours[0] - ours[1]) > 1e-4


def test_step_2_counts_identical_pairs_aloud(run_step, model_folder, cache_folder, tmp_path, capsys):
    for split in ("train", "eval"):
        write_pairs(tmp_path / f"{split}.jsonl", 6)
        row = {"prompt": " Human: hi Assistant:", "chosen": " same.", "rejected": " same."}
        with open(tmp_path / f"{split}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    arguments = ["--data_path", tmp_path, "--data_output_path", cache_folder, "--data_split", "0,1,0"]
    run_step(2, [*arguments, "--dtype", "fp32", "--model_name_or_path", model_folder, "--max_seq_len", 48])
    console = capsys.readouterr().out
    for split in ("train", "eval"):
        assert re.search(rf"^data \({split}\): .*1 pairs dropped, their answers being identical", console, re.M), (
            console
        )


@pytest.mark.parametrize(("launcher", "ranks", "stage"), [("deepspeed", 2, 3), ("python", 1, 0)])
def test_step_3_runs_prints_and_saves_actor_critic_and_ema(
    sft, reward, pairs_folder, cache_folder, tmp_path, launcher, ranks, stage
):
    arguments = _step3_arguments(sft, reward, pairs_folder, cache_folder, tmp_path)
    stages = ["--actor_zero_stage", stage, "--critic_zero_stage", stage, "--enable_hybrid_engine"]
    code, console = launch(3, [*arguments, *stages], launcher=launcher, ranks=ranks)
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
    ]
    wanted += ["eos_rate", "actor_lr", "actor_grad_norm", "critic_grad_norm", "tokens_per_second"]
    assert all(isinstance(rows[-1][f"train/{name}"], float) for name in wanted)
    for name in ("actor", "actor_ema"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).num_parameters() > 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").config.num_labels == 1


def test_ranks_sample_different_answers(sft, reward, pairs_folder, cache_folder, tmp_path):
    """Both ranks get the same prompt; with equal seeds their answers would be equal too."""
    from conftest import write_pairs

    folder = tmp_path / "same"
    folder.mkdir()
    for name in ("train.jsonl", "eval.jsonl"):
        line = write_pairs(folder / name, 1).read_text()
        (folder / name).write_text(line * 24)
    script = tmp_path / "keep_samples.py"
    script.write_text(
        "import os, runpy, sys, torch\n"
        f"sys.path.insert(0, {str(STEPS[3].parents[2])!r})\n"
        "from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainer as Trainer\n"
        "generate = Trainer._generate_sequence\n"
        "def keep(self, *inputs):\n"
        "    sequences = generate(self, *inputs)\n"
        f"    torch.save(sequences, {str(tmp_path)!r} + '/rank' + os.environ['RANK'])\n"
        "    return sequences\n"
        "Trainer._generate_sequence = keep\n"
        f"runpy.run_path({str(STEPS[3])!r}, run_name='__main__')\n"
    )
    arguments = _step3_arguments(sft, reward, folder, cache_folder, tmp_path / "out")
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--standalone", "--nproc_per_node=2", script, *arguments]
    code, console = run_command([*command, "--enable_test_mode", "--test_stop_step", 1])
    assert code == 0, console
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert first.shape != second.shape or not torch.equal(first, second)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_other_families_go_through_the_three_steps(family, run_step, pairs_folder, cache_folder, tmp_path):
    base = make_model(tmp_path / "base", family, pad="</s>")  # pad = eos, as GPT-2 users have it
    data = _data(pairs_folder, cache_folder)
    run_step(
        1, [*data, *ROWS, "--model_name_or_path", base, "--output_dir", tmp_path / "sft", "--gradient_checkpointing"]
    )
    run_step(
        2,
        [
            *data,
            *ROWS,
            "--model_name_or_path",
            tmp_path / "sft",
            "--output_dir",
            tmp_path / "reward",
            "--lora_dim",
            2,
            "--only_optimize_lora",
            "--gradient_checkpointing",
        ],
    )
    arguments = _step3_arguments(
        [tmp_path / "sft"], [tmp_path / "reward"], pairs_folder, cache_folder, tmp_path / "rlhf"
    )
    run_step(3, [*arguments, "--actor_lora_dim", 2, "--enable_hybrid_engine", "--actor_gradient_checkpointing"])
    rows = read_metrics(tmp_path / "rlhf")
    assert abs(rows[0]["train/ratio"] - 1) < 1e-4
    assert (
        len(AutoTokenizer.from_pretrained(tmp_path / "rlhf/actor"))
        <= AutoModelForCausalLM.from_pretrained(tmp_path / "rlhf/actor").get_input_embeddings().num_embeddings
    )


def test_the_three_steps_run_in_bf16_at_zero_3_with_offload_lora_and_checkpointing(
    model_folder, pairs_folder, cache_folder, tmp_path
):
    data = _data(pairs_folder, cache_folder)
    data[data.index("fp32")] = "bf16"
    common = ["--zero_stage", 3, "--gradient_checkpointing", "--lora_dim", 2]
    for step, start, name in ((1, model_folder, "sft"), (2, tmp_path / "sft", "reward")):
        arguments = [*data, *ROWS, *common, "--model_name_or_path", start, "--output_dir", tmp_path / name]
        code, console = launch(step, arguments, launcher="deepspeed", ranks=2)
        assert code == 0, console
    arguments = _step3_arguments(
        [tmp_path / "sft"], [tmp_path / "reward"], pairs_folder, cache_folder, tmp_path / "rlhf"
    )
    arguments[arguments.index("fp32")] = "bf16"
    flags = ["--actor_zero_stage", 3, "--critic_zero_stage", 3, "--enable_hybrid_engine", "--actor_lora_dim", 2]
    flags += ["--offload_reference_model", "--offload_reward_model", "--actor_gradient_checkpointing"]
    code, console = launch(3, [*arguments, *flags], launcher="deepspeed", ranks=2)
    assert code == 0, console
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "rlhf/actor").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "rlhf/actor_ema").dtype == torch.float32


def test_sixteen_bits_at_stage_0_run_as_stage_1_and_say_so(run_step, model_folder, pairs_folder, cache_folder, capsys):
    data = _data(pairs_folder, cache_folder)
    data[data.index("fp32")] = "bf16"
    run_step(1, [*data, *ROWS, "--model_name_or_path", model_folder])
    assert "--zero_stage 0 runs as stage 1 in bf16" in capsys.readouterr().out


def test_a_second_save_leaves_nothing_of_the_first_to_be_loaded(tmp_path, model_folder):
    from types import SimpleNamespace

    from utils.model import saving
    from utils.model.loading import find_checkpoint
    from utils.model.model_utils import create_critic_model
    from utils.model.tokenizer import load_hf_tokenizer
    from utils.run.results import save_hf_format

    tokenizer = load_hf_tokenizer(model_folder)
    model = create_critic_model(model_folder, tokenizer)
    for size, value in (("5GB", 1.0), ("10KB", 2.0), ("5GB", 3.0)):
        model.v_head.weight.data.fill_(value)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saving, "MAX_SHARD_SIZE", size)
            save_hf_format(model, tokenizer, SimpleNamespace(output_dir=str(tmp_path)))
        assert (find_checkpoint(tmp_path).value_head() == value).all()
        assert (AutoModelForSequenceClassification.from_pretrained(tmp_path).score.weight == value).all()
        assert (tmp_path / "config.json").stat().st_mode & 0o044 == next(
            tmp_path.glob("model*.safetensors")
        ).stat().st_mode & 0o044


def test_packing_trains_on_the_same_rows_with_fewer_batches(
    run_step, model_folder, pairs_folder, cache_folder, tmp_path
):
    data = _data(pairs_folder, cache_folder)
    for name, flags in (("rows", []), ("packed", ["--packing"])):
        run_step(1, [*data, *ROWS, *flags, "--model_name_or_path", model_folder, "--output_dir", tmp_path / name])
    rows, packed = (read_metrics(tmp_path / name) for name in ("rows", "packed"))
    assert len(packed) < len(rows)
    perplexities = [read_metrics(tmp_path / name, "eval")[0]["eval/perplexity"] for name in ("rows", "packed")]
    assert perplexities[0] == pytest.approx(perplexities[1])
    assert read_metrics(tmp_path / "packed", "eval")[-1]["eval/perplexity"] < perplexities[0]


def test_packing_is_refused_where_positions_cannot_be_kept_apart(run_step, pairs_folder, cache_folder, tmp_path):
    from utils.process.errors import UserError

    base = make_model(tmp_path / "base", "bloom")
    with pytest.raises(UserError, match="--packing"):
        run_step(1, [*_data(pairs_folder, cache_folder), *ROWS, "--packing", "--model_name_or_path", base])


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_step_3_learns_from_plain_text_too(sft, reward, run_step, pairs_folder, cache_folder, tmp_path, suffix):
    lines = [f"the {color} house is {color}, thanks." for color in ("red", "green", "blue")] * 20
    file = tmp_path / f"text.{suffix}"
    file.write_text("".join((line if suffix == "txt" else json.dumps({"text": line})) + "\n" for line in lines))
    arguments = _step3_arguments(sft, reward, pairs_folder, cache_folder, tmp_path / "out")
    run_step(3, [*arguments, "--unsupervised_dataset_name", file, "--enable_test_mode", "--test_stop_step", 1])
    assert read_metrics(tmp_path / "out")[0]["train/unsupervised_loss"] > 1


def test_plain_text_becomes_blocks_joined_by_eos_and_bad_lines_are_named(model_folder, tmp_path):
    from types import SimpleNamespace

    from utils.data.unsupervised import get_unsupervised_data
    from utils.model.tokenizer import load_hf_tokenizer
    from utils.process.errors import UserError

    tokenizer = load_hf_tokenizer(model_folder)
    file = tmp_path / "text.jsonl"
    args = SimpleNamespace(
        unsupervised_dataset_name=str(file),
        unsupervised_dataset_config_name=None,
        data_output_path=str(tmp_path / "cache"),
        rebuild_cache=False,
        allow_special_tokens=False,
        max_prompt_seq_len=4,
        max_answer_seq_len=4,
    )
    file.write_text('{"text": "red green"}\n{"text": " "}\n{"text": "blue blue blue seven eight"}\n')
    blocks = get_unsupervised_data(args, tokenizer)
    texts = ["red green", "blue blue blue seven eight"]
    stream = [i for t in texts for i in [*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    assert [row["input_ids"] for row in blocks] == [stream[i : i + 8] for i in range(0, len(stream) // 8 * 8, 8)]
    file.write_text('{"text": "red"}\n{"words": "blue"}\n')
    with pytest.raises(UserError, match=r"field 'text' is missing \(.*text\.jsonl, line 2\); not enough text"):
        get_unsupervised_data(args, tokenizer)


def test_adapters_saved_alone_merge_into_the_models_that_each_step_saved(
    sft, reward, model_folder, pairs_folder, cache_folder, run_step, merge_lora, tmp_path
):
    lora = ["--only_optimize_lora", "--save_lora_adapters", "--num_warmup_steps", 0]
    one = ["--model_name_or_path", model_folder, "--lora_dim", 4, "--lora_scaling", 8, "--lora_dropout", 0.1, *ROWS]
    data = _data(pairs_folder, cache_folder)
    run_step(1, [*data, *one, *lora, "--output_dir", tmp_path / "sft"])
    run_step(2, [*data, *one, *lora, "--output_dir", tmp_path / "reward", "--lora_module_name", "all-linear"])
    actor = ["--actor_lora_dim", 4, "--actor_lora_scaling", 8, "--actor_lora_learning_rate", 0.01]
    critic = ["--critic_lora_dim", 2, "--critic_lora_module_name", "self_attn", "--critic_lora_learning_rate", 0.01]
    arguments = _step3_arguments(sft, reward, pairs_folder, cache_folder, tmp_path / "rlhf")
    run_step(3, [*arguments, *actor, *critic, *lora, "--enable_test_mode", "--test_stop_step", 1])
    for name in ("sft", "reward", "rlhf/actor", "rlhf/actor_ema", "rlhf/critic"):
        saved, merged = tmp_path / name, merge_lora(tmp_path / name / "adapter", output=f"merged/{name}")
        want, got = load_file(saved / "model.safetensors"), load_file(merged / "model.safetensors")
        assert want.keys() == got.keys(), name
        base = load_file((model_folder if name in ("sft", "reward") else sft[0]) / "model.safetensors")
        moved = [part for part in want if part in base and not torch.equal(want[part], base[part])]
        assert moved, name
        for part in want:
            assert torch.equal(want[part], got[part]), f"{name}: {part}"
        configs = [json.loads((folder / "config.json").read_text()) for folder in (saved, merged)]
        assert configs[0] == configs[1], name


@pytest.mark.parametrize("name", ["text", "rows"])
def test_plain_text_files_count_only_where_no_data_file_lies_beside_them(model_folder, tmp_path, name):
    from types import SimpleNamespace

    from utils.data.unsupervised import get_unsupervised_data
    from utils.model.tokenizer import load_hf_tokenizer

    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "LICENSE.txt").write_text("red red red red red red red red\n")
    if name == "rows":
        (folder / "train.jsonl").write_text('{"text": "blue blue blue blue blue blue blue blue"}\n')
    args = SimpleNamespace(
        unsupervised_dataset_name=str(folder),
        unsupervised_dataset_config_name=None,
        data_output_path=str(tmp_path / "cache"),
        rebuild_cache=False,
        allow_special_tokens=False,
        max_prompt_seq_len=2,
        max_answer_seq_len=2,
    )
    tokenizer = load_hf_tokenizer(model_folder)
    text = tokenizer.decode(get_unsupervised_data(args, tokenizer)[0]["input_ids"])
    assert ("blue" in text) == (name == "rows")


@pytest.mark.parametrize(
    "flags", [["--only_optimize_lora", "--lora_dim", 2, "--save_lora_adapters"], ["--soft_prompt", "prompt_tuning"]]
)
def test_what_needs_its_base_is_not_saved_over_it(run_step, model_folder, pairs_folder, cache_folder, flags):
    from utils.process.errors import UserError

    if "--soft_prompt" in flags:
        pytest.importorskip("peft")
    arguments = [*_data(pairs_folder, cache_folder), "--model_name_or_path", model_folder, *flags]
    with pytest.raises(UserError, match="another folder"):
        run_step(1, [*arguments, "--output_dir", model_folder])
    assert (model_folder / "model.safetensors").exists()
