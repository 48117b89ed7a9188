"""What cannot work is refused before any training, with a reason, by every rank, and without a traceback."""

import os
from types import SimpleNamespace

import pytest
from conftest import STEPS, launch, make_model, run_command, write_pairs

from utils.model.model_utils import create_critic_model
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError
from utils.run.results import save_hf_format


@pytest.fixture
def good(model_folder, pairs_folder, cache_folder, tmp_path):
    return {
        "--model_name_or_path": model_folder,
        "--data_path": pairs_folder,
        "--data_output_path": cache_folder,
        "--data_split": "1,1,1",
        "--dtype": "fp32",
        "--max_train_samples": 8,
        "--output_dir": tmp_path / "out",
    }


def _flags(settings):
    return [part for pair in settings.items() for part in pair if part is not None]


BAD = {
    "no model": ({"--model_name_or_path": "{tmp}/nowhere"}, r"nowhere"),
    "a folder that is no model": ({"--model_name_or_path": "{tmp}"}, r"no (model|tokenizer) could be loaded"),
    "no data": ({"--data_path": "{tmp}/nowhere.jsonl"}, r"nowhere\.jsonl"),
    "an empty file": ({"--data_path": "{tmp}/empty.jsonl"}, r"empty\.jsonl"),
    "rows without a field": ({"--data_path": "{tmp}/fieldless.jsonl"}, r"(?s)fieldless\.jsonl.*chosen"),
    "a line that is not JSON": ({"--data_path": "{tmp}/broken.jsonl"}, r"(?s)broken\.jsonl.*line 2"),
    "an unknown dataset": ({"--data_path": "someone/unknown"}, r"(?s)someone/unknown.*Dahoas/rm-static"),
    "LoRA that matches nothing": (
        {"--lora_dim": 4, "--lora_module_name": "decoder.layers."},
        r"(?s)matches no.*q_proj",
    ),
    "only LoRA without LoRA": ({"--only_optimize_lora": None}, r"--lora_dim"),
    "adapters that would not hold what trained": (
        {"--lora_dim": 4, "--save_lora_adapters": None},
        r"--save_lora_adapters needs --only_optimize_lora",
    ),
    "an output folder that cannot be made": (
        {"--output_dir": "{tmp}/empty.jsonl/out"},
        r"--output_dir .*cannot be written",
    ),
    "an output folder among the data": (
        {"--data_path": "{tmp}", "--output_dir": "{tmp}/out"},
        r"--output_dir .*/out lies in --data_path .*, so it would be read as data",
    ),
    "a cache among the data": (
        {"--data_path": "{tmp}", "--data_output_path": "{tmp}"},
        r"--data_output_path .* lies in --data_path",
    ),
    "rows longer than the model": ({"--max_seq_len": 513}, r"--max_seq_len 513 is more than the 512 positions"),
    "offload without ZeRO": ({"--offload": None}, r"--zero_stage"),
    "a configuration that is not there": ({"--deepspeed_config": "{tmp}/nowhere.json"}, r"nowhere\.json"),
    "a share of nothing": ({"--data_split": "0,1,1"}, r"no train row"),
    "a split that is none": ({"--data_split": "a,b"}, r"--data_split 'a,b'"),
    "an overrides file that is not JSON": ({"--deepspeed_config_overrides": "{tmp}/broken.jsonl"}, r"not JSON"),
}


def _prepare(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "fieldless.jsonl").write_text('{"prompt": " Human: a Assistant:"}\n' * 4)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')


@pytest.mark.parametrize("case", BAD)
def test_step_1_refuses(case, good, run_step, tmp_path):
    changes, message = BAD[case]
    _prepare(tmp_path)
    settings = good | {
        flag: value.format(tmp=tmp_path) if isinstance(value, str) else value for flag, value in changes.items()
    }
    with pytest.raises(UserError, match=message):
        run_step(1, _flags_with_switches(settings, changes))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def _flags_with_switches(settings, changes):
    switches = [flag for flag, value in changes.items() if value is None]
    return _flags({k: v for k, v in settings.items() if v is not None}) + switches


def _save_reward_model(model_folder, tmp_path):
    tokenizer = load_hf_tokenizer(model_folder)
    save_hf_format(create_critic_model(model_folder, tokenizer), tokenizer, SimpleNamespace(output_dir=tmp_path / "rm"))
    return tmp_path / "rm"


STEP_3_BAD = {
    "batches that do not divide": (
        ["--per_device_training_batch_size", 3],
        r"4 x --generation_batches 1 = 4 answers do not",
    ),
    "accumulation that does not divide": (
        ["--generation_batches", 3, "--gradient_accumulation_steps", 2],
        r"do not divide by",
    ),
    "tensor-parallel generation": (["--inference_tp_size", 2], r"--inference_tp_size"),
    "a backend of no engine": (["--hybrid_engine_backend", "own"], r"--hybrid_engine_backend own .*generate\(\)"),
    "kernels without CUDA": (
        ["--enable_hybrid_engine", "--hybrid_engine_backend", "deepspeed"],
        r"--hybrid_engine_backend deepspeed: .*CUDA.* on cpu",
    ),
    "align_overflow": (["--align_overflow", "--dtype", "fp32"], r"fp32 gradients do not overflow"),
    "ZeRO++ without CUDA": (["--enable_mixed_precision_lora"], r"CUDA"),
    "test mode without an end": (["--enable_test_mode"], r"--test_stop_step"),
    "a critic that is no reward model": ([], r"score\.weight"),
    "too few prompts": (
        ["--max_train_samples", 2, "--critic_model_name_or_path", "{reward}"],
        r"2 prompts do not fill",
    ),
}


@pytest.mark.parametrize("case", STEP_3_BAD)
def test_step_3_refuses(case, model_folder, pairs_folder, cache_folder, run_step, tmp_path):
    flags, message = STEP_3_BAD[case]
    if "{reward}" in flags:
        flags = [_save_reward_model(model_folder, tmp_path) if flag == "{reward}" else flag for flag in flags]
    arguments = [
        "--actor_model_name_or_path",
        model_folder,
        "--critic_model_name_or_path",
        model_folder,
        "--data_path",
        pairs_folder,
        "--data_output_path",
        cache_folder,
        "--dtype",
        "fp32",
        "--per_device_generation_batch_size",
        4,
        "--per_device_training_batch_size",
        4,
    ]
    with pytest.raises(UserError, match=message):
        run_step(3, [*arguments, *flags])


def test_actor_and_critic_with_different_tokenizers_are_both_named(
    model_folder, pairs_folder, cache_folder, run_step, tmp_path
):
    other = make_model(tmp_path / "other", pad=None)
    with pytest.raises(UserError, match=rf"(?s)the tokenizers differ.*{model_folder.name}.*other"):
        run_step(
            3,
            [
                "--actor_model_name_or_path",
                model_folder,
                "--critic_model_name_or_path",
                other,
                "--data_path",
                pairs_folder,
                "--data_output_path",
                cache_folder,
                "--dtype",
                "fp32",
            ],
        )


def test_step_2_refuses_data_without_rejected_answers(good, run_step, tmp_path):
    file = write_pairs(tmp_path / "sft_only.jsonl", 20)
    file.write_text(file.read_text().replace('"rejected"', '"other"'))
    with pytest.raises(UserError, match="rejected"):
        run_step(2, _flags(good | {"--data_path": file}))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_process_ends_with_one_readable_line_and_code_1_on_all_ranks(good, tmp_path, ranks):
    settings = good | {"--data_path": tmp_path / "nowhere.jsonl"}
    code, console = launch(1, _flags(settings), launcher="torchrun" if ranks == 2 else "python", ranks=ranks)
    assert code != 0
    assert console.count("error: ") >= 1
    assert "nowhere.jsonl" in console
    assert "Traceback" not in console.split("error: ")[0]


def test_an_unwritable_output_folder_is_refused_by_two_ranks_without_a_hang(good, tmp_path):
    (tmp_path / "file").write_text("")
    code, console = launch(1, _flags(good | {"--output_dir": tmp_path / "file" / "out"}), launcher="deepspeed", ranks=2)
    assert code != 0
    assert "cannot be written" in console


@pytest.mark.parametrize("step", [1, 2, 3])
def test_help_fits_100_columns_and_every_flag_explains_itself(step):
    import sys

    code, console = run_command([sys.executable, STEPS[step], "--help"], COLUMNS="200")
    assert code == 0
    lines = [line for line in console.splitlines() if "kernels-community" not in line]  # bitsandbytes' own, on a CPU
    assert max(map(len, lines)) <= 100
    assert os.path.basename(STEPS[step]) in console


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_missing_model_flag_is_named(step):
    import sys

    code, console = run_command([sys.executable, STEPS[step]])
    assert code == 2
    assert "model_name_or_path" in console


def test_a_reward_model_is_no_actor(model_folder, run_step, good, tmp_path):
    with pytest.raises(UserError, match="is a reward model"):
        run_step(1, _flags(good | {"--model_name_or_path": _save_reward_model(model_folder, tmp_path)}))


def test_an_error_of_one_rank_alone_is_told(tmp_path):
    import sys

    script = tmp_path / "one_rank.py"
    script.write_text(
        "import sys, time, argparse\n"
        f"sys.path.insert(0, {str(STEPS[1].parents[2])!r})\n"
        "from utils.process.errors import UserError\n"
        "from utils.process.launch import init_distributed, run_main\n"
        "from utils.process.world import get_rank\n"
        "def main():\n"
        "    init_distributed(argparse.Namespace(local_rank=-1, comm_timeout=60))\n"
        "    if get_rank() == 1:\n"
        "        raise UserError('only here')\n"
        "    time.sleep(15)\n"
        "run_main(main)\n"
    )
    torchrun = os.path.join(os.path.dirname(sys.executable), "torchrun")
    code, console = run_command([torchrun, "--standalone", "--nproc_per_node=2", script])
    assert code != 0
    assert "error: rank 1: only here" in console


def test_a_failure_of_the_rank_that_prepares_the_data_reaches_the_other(good, tmp_path):
    file = write_pairs(tmp_path / "late.jsonl", 300)
    lines = file.read_text().splitlines()
    lines[250] = '{"prompt": '  # found only when the row is read, by the first rank alone
    file.write_text("\n".join(lines) + "\n")
    settings = {flag: value for flag, value in good.items() if flag != "--max_train_samples"}
    settings |= {"--data_path": file, "--data_split": "1,0,0"}
    code, console = launch(1, _flags(settings), launcher="torchrun", ranks=2)
    assert code != 0
    assert "late.jsonl" in console
    assert "line 251" in console
    assert "Traceback" not in console.split("error: ")[0]
