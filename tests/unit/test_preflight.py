"""--dry_run and utils.plan: what they find, what they suggest, and that they neither read weights nor write."""

import json
import shlex
from pathlib import Path

import psutil
import pytest
import torch
from helpers import WITH_EXPERTS, make_model, make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
)

from utils import arguments
from utils.planning import plan, preflight
from utils.planning.engine_memory import GIB, Bytes, Machine
from utils.planning.estimate import models_of_step
from utils.process.errors import UserError


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model_folder)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def dry_run(run_step, pairs_folder, cache_folder, tmp_path, capsys):
    """dry_run(step, flags...) -> (what was printed, the UserError or None); nothing may appear in --output_dir."""

    def run(step, *flags, data=pairs_folder):
        output, error = tmp_path / "output", None
        common = ["--dry_run", "--output_dir", output, "--data_path", data, "--data_output_path", cache_folder]
        try:
            run_step(step, [*common, *flags])
        except UserError as problem:
            error = str(problem)
        assert not output.exists()
        return capsys.readouterr().out, error

    return run


def line_of(printed: str, check: str) -> str:
    [line] = [
        line for line in printed.splitlines() if line[:3].strip(". ").isdigit() and line[4:].startswith(f"{check} ")
    ]
    return line


@pytest.mark.parametrize("step", [1, 2, "dpo", 3])
def test_a_run_that_would_work_passes_every_check(step, dry_run, model_folder, reward_folder):
    models = ["--model_name_or_path", model_folder]
    if step == 3:
        models = ["--actor_model_name_or_path", model_folder, "--critic_model_name_or_path", reward_folder]
        models += ["--enable_ema", "--enable_hybrid_engine", "--actor_lora_dim", "4", "--max_prompt_seq_len", "64"]
        models += ["--max_answer_seq_len", "64"]
    else:
        models += ["--max_seq_len", "128", "--lora_dim", "4"]
    printed, error = dry_run(step, *models)
    assert error is None, printed
    assert "problem  " not in printed and "no problem: the run can start" in printed
    train, evaluation = (12, 4) if step == 1 else (24, 8)  # of 60 and 20 rows, by --data_split 2,4,4
    assert f"{train} " in line_of(printed, "data") and f"{evaluation} to evaluate" in line_of(printed, "data")
    assert "(LoRA on 14 layers)" in line_of(printed, "parameters")
    assert "per rank at most" in line_of(printed, "memory")
    assert f"s per {'update' if step == 3 else 'optimizer step'}" in line_of(printed, "time")
    assert "hours in all; an estimate" in line_of(printed, "time")
    for part in ("parameters", "optimizer states", "activations kept", "  with checkpointing"):
        assert f"\n  {part}" in printed
    if step == 3:
        assert all(part in printed for part in ("KV cache", "folded LoRA", "fused weights", "EMA"))


def test_what_lora_leaves_out_of_a_mixture_is_said_by_dry_run_and_plan_as_by_a_run(
    dry_run, run_step, start, tmp_path, capsys
):
    folder = make_model(tmp_path / "mixture", WITH_EXPERTS["mixtral"])
    flags = ["--model_name_or_path", folder, "--lora_dim", "4", "--max_seq_len", "64"]
    said = "LoRA covers linear layers; "
    printed, error = dry_run(1, *flags)
    assert error is None and said in line_of(printed, "parameters")
    capsys.readouterr()
    plan.main(["--model", str(folder), "--lora_dim", "4", "--max_seq_len", "64", "--batch_size", "8"])
    planned = capsys.readouterr().out
    assert planned.count(f"model: {said}") == planned.count(said) == 1
    run_step(1, [*start(1), *flags, "--max_train_samples", "4", "--num_train_epochs", "1"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if said in line]
    assert line in printed and line in planned


def test_each_problem_has_a_line_with_its_reason(dry_run, model_folder, tmp_path):
    printed, error = dry_run(
        1, "--model_name_or_path", model_folder, "--lora_dim", "4", "--lora_module_name", "nowhere", "--max_seq_len", 64
    )
    assert "problem" in line_of(printed, "parameters") and "'nowhere' matches no linear layer" in printed
    assert "1 of" in error and "would not work" in error

    printed, error = dry_run(
        1, "--model_name_or_path", model_folder, "--max_seq_len", "64", data=tmp_path / "no such data"
    )
    assert "problem" in line_of(printed, "data") and "no such data" in line_of(printed, "data")
    assert "everything alive in a phase" in printed and "1 of" in error  # the estimate is there all the same

    printed, error = dry_run(1, "--model_name_or_path", model_folder, "--offload", "--max_seq_len", "100000")
    assert "needs --zero_stage" in line_of(printed, "flags") and "positions" in line_of(printed, "model")
    assert "2 of" in error

    make_model(tmp_path / "other", pad=None)
    printed, error = dry_run(
        3, "--actor_model_name_or_path", model_folder, "--critic_model_name_or_path", tmp_path / "other"
    )
    assert "holds no reward model" in line_of(printed, "critic")
    assert "the tokenizers differ" in line_of(printed, "tokenizer") and "2 of" in error


def test_the_disk_must_hold_checkpoints_and_all_models_that_stay(dry_run, model_folder, monkeypatch):
    flags = ["--model_name_or_path", model_folder, "--max_seq_len", "64", "--dtype", "bf16", "--zero_stage", "2"]
    trained = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model_folder).parameters())
    more = ["--checkpoint_steps", "1", "--keep_checkpoints", "4", "--save_best", "--save_interval", "2"]
    more += ["--save_total_limit", "3", "--num_train_epochs", "2"]
    args = arguments.build_parser(1).parse_args([*map(str, flags), *more, "--output_dir", "o"])
    config = AutoConfig.from_pretrained(model_folder)
    models = models_of_step(args, 1, {"model": config})
    needs = preflight._needed_on_disks(args, {}, models)
    assert needs["o/checkpoints"] == 5 * 14 * trained  # bf16, and in fp32 the weight and AdamW's two moments
    assert needs["o"] == 5 * models["model"].saved_bytes, "the last, the best, and three on the way"
    monkeypatch.setattr(preflight, "_free", lambda folder: (Path("/tmp"), needs["o/checkpoints"]))
    printed, _ = dry_run(1, *flags, *more)
    assert "checkpoints needs 0.0 GB, 0.0 GB with what else goes there, and its disk has" in line_of(printed, "disk")


def test_a_run_that_does_not_fit_is_told_flags_that_make_it_fit(dry_run, model_folder, monkeypatch):
    flags = ["--model_name_or_path", model_folder, "--max_seq_len", "128", "--pad_to_max_length"]
    flags += ["--per_device_train_batch_size", "64", "--dtype", "fp32"]

    def small_machine(room):
        return lambda: Machine(1, 1, True, room, room, Bytes(host=GIB))

    monkeypatch.setattr(preflight, "this_machine", small_machine(GIB + 30_000_000))
    printed, error = dry_run(1, *flags)
    line = line_of(printed, "memory")
    assert "problem" in line and "It would fit" in line and "1 of" in error
    suggestion = line.split(" with ")[-1]
    # The flags exist, and with them the dry run finds no problem.
    again, error = dry_run(1, *flags, *shlex.split(suggestion))
    assert error is None, again

    monkeypatch.setattr(preflight, "this_machine", small_machine(GIB))
    printed, error = dry_run(1, *flags)
    assert "No setting of these flags fits" in line_of(printed, "memory") and error


def test_a_model_of_70_billion_parameters_needs_no_memory_here(dry_run, tmp_path):
    folder = tmp_path / "large"
    make_tokenizer(folder)
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(folder)
    before = psutil.Process().memory_info().rss
    printed, error = dry_run(1, "--model_name_or_path", folder, "--gradient_checkpointing", "--max_seq_len", "128")
    assert psutil.Process().memory_info().rss - before < GIB
    assert "holds no weights" in line_of(printed, "model") and "70,553.7 M train" in line_of(printed, "parameters")
    # 2 + 4 + 8 bytes of each parameter, and more: nothing here has that.
    assert "problem" in line_of(printed, "memory") and "would not work" in error


# ---------------------------------------------------------------- the planner


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The configuration of a Llama as wide as one of 8 billion parameters, with three layers, alone."""
    folder = tmp_path_factory.mktemp("wide")
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=3,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("step", [1, 2, "dpo", 3])
def test_the_planned_command_is_one_the_step_understands_and_fits(step, wide, capsys):
    flags = ["--model", wide, "--step", step, "--gpus", 4, "--gpu_memory", 40, "--host_memory", 400]
    flags += ["--batch_size", 16, "--json"]
    assert plan.main([str(flag) for flag in [*flags, "--num_train_epochs", 3]]) == 0
    rows = json.loads(capsys.readouterr().out)
    [best] = [row for row in rows if row["recommended"]]
    assert best["fits"] and 0 < best["device_gib"] <= 40 and best["host_gib"] <= 400
    assert all(row["fits"] == (row["device_gib"] <= 40 and row["host_gib"] <= 400) for row in rows)
    for row in rows:
        words = shlex.split(row["command"])
        main = next(i for i, word in enumerate(words) if word.endswith("main.py"))
        args = arguments.build_parser(step).parse_args(words[main + 1 :])
        arguments.check_step(args, step)
        assert words[:3] == ["deepspeed", "--num_gpus", "4"] and args.num_train_epochs == 3
        if step != 3:
            assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 4 == 16
        else:
            assert args.per_device_generation_batch_size * args.generation_batches * 4 == 16


def test_the_plan_as_a_table_marks_one_row_and_says_when_nothing_fits(wide, capsys):
    common = ["--model", str(wide), "--batch_size", "4", "--max_seq_len", "128"]
    assert plan.main([*common, "--gpu_memory", "80"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n->") == 1 and "deepspeed --num_gpus 1 training/step1" in printed
    assert plan.main([*common, "--gpu_memory", "4"]) == 1
    assert "nothing fits" in capsys.readouterr().out
    with pytest.raises(UserError, match="do not divide"):
        plan.main([*common, "--gpus", "3"])


def test_the_reference_of_dpo_counts_where_it_is_a_model_of_its_own(dry_run, model_folder, monkeypatch):
    monkeypatch.setattr(preflight, "this_machine", lambda: Machine(1, 1, True, 2 * GIB, 2 * GIB, Bytes(host=GIB)))
    start = ["--model_name_or_path", model_folder, "--max_seq_len", "64"]
    for more, has in ((), True), (["--precompute_ref_log_probs"], False), (["--reference_free"], False):
        printed, error = dry_run("dpo", *start, *more)
        assert error is None, printed
        assert ("reference 0.0 M, frozen" in line_of(printed, "parameters")) == has
        assert ("reference: scores the answers" in printed) == has

    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=100_000)
    args = arguments.build_parser("dpo").parse_args(["--model_name_or_path", "x", "--max_seq_len", "8"])
    args.dtype, args.per_device_train_batch_size, args.per_device_eval_batch_size = "fp32", 1, 1
    machine = Machine(1, 1, True, 0, 10**12, Bytes())
    needs = [
        plan.Plan(args, "dpo", {"model": config}, None, machine).estimate_with(settings).host_peak[0]
        for settings in ({}, {"precompute_ref_log_probs": True})
    ]
    weights = 4 * 2 * 64 * 100_000  # embedding and head, in bytes, without the small rest
    assert needs[0] - needs[1] == pytest.approx(1.3 * weights, rel=0.02), "with the margin of a CPU"


def test_a_ranked_list_needs_the_memory_of_all_its_answers(dry_run, model_folder, monkeypatch):
    def activations(answers: int) -> float:
        def datasets_of_step(*given, **options):
            datasets = original(*given, **options)
            for dataset in datasets:
                dataset.answers_per_row = answers
            return datasets

        monkeypatch.setattr(preflight, "datasets_of_step", datasets_of_step)
        size = "--max_seq_len 512 --per_device_train_batch_size 64 --pad_to_max_length"
        printed, _ = dry_run(2, "--model_name_or_path", model_folder, *size.split())
        [line] = [line for line in printed.splitlines() if line.startswith("  activations, at most")]
        return float(line.split()[-1])

    original = preflight.datasets_of_step
    assert activations(6) == pytest.approx(3 * activations(2), rel=0.1)
