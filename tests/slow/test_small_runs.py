"""Runs of the steps in this process, each for one thing that a whole run must do."""

import json
import re
import statistics

import pytest
import torch
from helpers import flags, make_model, read_metrics, write_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation_scripts import rw_eval
from utils.process.errors import UserError


def test_rw_eval_finds_the_figures_of_step_2_on_the_same_pairs(
    run_step, model_folder, pairs_folder, cache_folder, tmp_path, capsys
):
    places = dict(data_path=pairs_folder, data_output_path=cache_folder, output_dir=tmp_path / "out")
    text = "--data_split 0,1,0 --dtype fp32 --max_seq_len 48"
    run_step(2, flags(text, model_name_or_path=model_folder, **places))
    last = read_metrics(tmp_path / "out", "eval")[-1]
    capsys.readouterr()
    places = dict(data_path=pairs_folder, output=tmp_path / "scores.jsonl", model_name_or_path=tmp_path / "out")
    rw_eval.main(flags("--max_seq_len 48 --device cpu", **places))
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == last["eval/pairs"] == 20
    for name, figure in (("correct", "accuracy"), ("chosen_score", "chosen_score"), ("rejected_score",) * 2):
        assert statistics.fmean(row[name] for row in rows) == pytest.approx(last[f"eval/{figure}"], abs=1e-5)
    _, scores, saved = capsys.readouterr().out.rstrip().rsplit("\n", 2)
    assert scores.split()[2:] == saved.split()[1:5]  # mean and std over the same pairs, as they were saved


def test_step_2_counts_identical_pairs_aloud(run_step, model_folder, cache_folder, tmp_path, capsys):
    for split in ("train", "eval"):
        write_pairs(tmp_path / f"{split}.jsonl", 6)
        row = {"prompt": " Human: hi Assistant:", "chosen": " same.", "rejected": " same."}
        with open(tmp_path / f"{split}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    places = dict(data_path=tmp_path, data_output_path=cache_folder, model_name_or_path=model_folder)
    run_step(2, flags("--data_split 0,1,0 --dtype fp32 --max_seq_len 48", **places))
    console = capsys.readouterr().out
    for split in ("train", "eval"):
        assert re.search(rf"^data \({split}\): .*1 pairs dropped, their answers being identical", console, re.M), (
            console
        )


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_other_families_go_through_the_three_steps(family, run_step, start, tmp_path):
    base = make_model(tmp_path / "base", family, pad="</s>")  # pad = eos, as GPT-2 users have it
    sft, reward, rlhf = (tmp_path / name for name in ("sft", "reward", "rlhf"))
    text = "--num_train_epochs 1 --per_device_train_batch_size 4 --gradient_checkpointing"
    run_step(1, [*start(1), *flags(text, model_name_or_path=base, output_dir=sft)])
    text += " --lora_dim 2 --only_optimize_lora"
    run_step(2, [*start(2), *flags(text, model_name_or_path=sft, output_dir=reward)])
    text = """
        --per_device_generation_batch_size 4 --per_device_training_batch_size 4 --actor_lora_dim 2 --enable_ema
        --actor_dropout 0 --enable_hybrid_engine --actor_gradient_checkpointing
    """
    models = dict(actor_model_name_or_path=sft, critic_model_name_or_path=reward)
    run_step(3, [*start(3), *flags(text, output_dir=rlhf, **models)])
    rows = read_metrics(tmp_path / "rlhf")
    assert abs(rows[0]["train/ratio"] - 1) < 1e-4
    assert (
        len(AutoTokenizer.from_pretrained(tmp_path / "rlhf/actor"))
        <= AutoModelForCausalLM.from_pretrained(tmp_path / "rlhf/actor").get_input_embeddings().num_embeddings
    )


def test_sixteen_bits_at_stage_0_run_as_stage_1_and_say_so(run_step, start, capsys):
    run_step(1, [*start(1), *flags("--dtype bf16")])
    assert "--zero_stage 0 runs as stage 1 in bf16" in capsys.readouterr().out


def test_packing_trains_on_the_same_rows_with_fewer_batches(run_step, start, tmp_path, capsys):
    learns = []
    for name, text in (("rows", ""), ("packed", "--packing")):
        text = f"--num_train_epochs 1 --console brief {text}"
        run_step(1, [*start(1), *flags(text, output_dir=tmp_path / name)])
        learns += re.findall(r"learns from \d+ rows", capsys.readouterr().out)
    assert len(learns) == 2 and learns[0] == learns[1]
    rows, packed = (read_metrics(tmp_path / name) for name in ("rows", "packed"))
    assert len(packed) < len(rows)
    perplexities = [read_metrics(tmp_path / name, "eval")[0]["eval/perplexity"] for name in ("rows", "packed")]
    assert perplexities[0] == pytest.approx(perplexities[1])
    assert read_metrics(tmp_path / "packed", "eval")[-1]["eval/perplexity"] < perplexities[0]


def test_packing_is_refused_where_positions_cannot_be_kept_apart(run_step, start, tmp_path):
    base = make_model(tmp_path / "base", "bloom")
    with pytest.raises(UserError, match="--packing"):
        run_step(1, [*start(1), *flags("--packing", model_name_or_path=base)])


def test_adapters_saved_alone_merge_into_the_models_that_each_step_saved(
    start, small_models, run_step, merge_lora, tmp_path
):
    text = "--only_optimize_lora --save_lora_adapters --num_warmup_steps 0"
    one = f"{text} --dropout 0 --num_train_epochs 1 --lora_dim 4 --lora_scaling 8 --lora_dropout 0.1"
    run_step(1, [*start(1), *flags(one, output_dir=tmp_path / "sft")])
    one += " --lora_module_name all-linear"
    run_step(2, [*start(2), *flags(one, output_dir=tmp_path / "reward")])
    text += """
        --actor_lora_dim 4 --actor_lora_scaling 8 --actor_lora_learning_rate 0.01 --critic_lora_dim 2 --enable_ema
        --critic_lora_module_name self_attn --critic_lora_learning_rate 0.01 --enable_test_mode --test_stop_step 1
        --actor_dropout 0
    """
    run_step(3, [*start(3), *flags(text, output_dir=tmp_path / "rlhf")])
    for name in ("sft", "reward", "rlhf/actor", "rlhf/actor_ema", "rlhf/critic"):
        saved, merged = tmp_path / name, merge_lora(tmp_path / name / "adapter", output=f"merged/{name}")
        want, got = load_file(saved / "model.safetensors"), load_file(merged / "model.safetensors")
        assert want.keys() == got.keys(), name
        base = load_file(small_models / "actor/model.safetensors")
        moved = [part for part in want if part in base and not torch.equal(want[part], base[part])]
        assert moved, name
        for part in want:
            assert torch.equal(want[part], got[part]), f"{name}: {part}"
        configs = [json.loads((folder / "config.json").read_text()) for folder in (saved, merged)]
        assert configs[0] == configs[1], name


@pytest.mark.parametrize(
    "text", ["--only_optimize_lora --lora_dim 2 --save_lora_adapters", "--soft_prompt prompt_tuning"]
)
def test_what_needs_its_base_is_not_saved_over_it(run_step, model_folder, start, text):
    if "--soft_prompt" in text:
        pytest.importorskip("peft")
    with pytest.raises(UserError, match="another folder"):
        run_step(1, [*start(1), *flags(text, model_name_or_path=model_folder, output_dir=model_folder)])
    assert (model_folder / "model.safetensors").exists()
