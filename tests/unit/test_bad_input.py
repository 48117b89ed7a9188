"""What cannot work is refused before any training, with a reason."""

import pytest
from helpers import STEPS, flags, make_model, write_pairs

from utils.process.errors import UserError


@pytest.fixture
def good(model_folder, pairs_folder, cache_folder, tmp_path):
    """Arguments of step 1 that work; of a flag that is given again, the second counts."""
    places = dict(data_path=pairs_folder, data_output_path=cache_folder, output_dir=tmp_path / "out")
    text = "--data_split 1,1,1 --dtype fp32 --max_train_samples 8"
    return flags(text, model_name_or_path=model_folder, **places)


BAD = {  # case: (flags, message)
    "no model": ("--model_name_or_path {tmp}/nowhere", r"nowhere"),
    "a folder that is no model": ("--model_name_or_path {tmp}", r"no (model|tokenizer) could be loaded"),
    "no data": ("--data_path {tmp}/nowhere.jsonl", r"nowhere\.jsonl"),
    "an empty file": ("--data_path {tmp}/empty.jsonl", r"empty\.jsonl"),
    "rows without a field": ("--data_path {tmp}/fieldless.jsonl", r"(?s)fieldless\.jsonl.*chosen"),
    "a line that is not JSON": ("--data_path {tmp}/broken.jsonl", r"(?s)broken\.jsonl.*line 2"),
    "an unknown dataset": ("--data_path someone_unknown", r"(?s)someone_unknown.*Dahoas/rm-static"),
    "a dataset that the hub cannot give": (
        "--data_path someone/unknown",
        r"someone/unknown[^\n]*\n[^\n]*hf download --repo-type dataset someone/unknown --local-dir \S+; then [^\n]*$",
    ),
    "LoRA that matches nothing": ("--lora_dim 4 --lora_module_name decoder.layers.", r"(?s)matches no.*q_proj"),
    "only LoRA without LoRA": ("--only_optimize_lora", r"--lora_dim"),
    "adapters that would not hold what trained": (
        "--lora_dim 4 --save_lora_adapters",
        r"--save_lora_adapters needs --only_optimize_lora",
    ),
    "an output folder that cannot be made": (
        "--output_dir {tmp}/empty.jsonl/out",
        r"--output_dir .*cannot be written",
    ),
    "an output folder among the data": (
        "--data_path {tmp} --output_dir {tmp}/out",
        r"--output_dir .*/out lies in --data_path .*, so it would be read as data",
    ),
    "a cache among the data": (
        "--data_path {tmp} --data_output_path {tmp}",
        r"--data_output_path .* lies in --data_path",
    ),
    "rows longer than the model": ("--max_seq_len 513", r"--max_seq_len 513 is more than the 512 positions"),
    "offload without ZeRO": ("--offload", r"--zero_stage"),
    "a configuration that is not there": ("--deepspeed_config {tmp}/nowhere.json", r"nowhere\.json"),
    "a share of nothing": ("--data_split 0,1,1", r"no train row"),
    "a split that is none": ("--data_split a,b", r"--data_split 'a,b'"),
    "an overrides file that is not JSON": ("--deepspeed_config_overrides {tmp}/broken.jsonl", r"not JSON"),
}


def _prepare(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "fieldless.jsonl").write_text('{"prompt": " Human: a Assistant:"}\n' * 4)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')


@pytest.mark.parametrize("case", BAD)
def test_step_1_refuses(case, good, run_step, tmp_path):
    text, message = BAD[case]
    _prepare(tmp_path)
    with pytest.raises(UserError, match=message):
        run_step(1, [*good, *flags(text.format(tmp=tmp_path))])
    assert not (tmp_path / "out" / "model.safetensors").exists()


STEP_3_BAD = {
    "batches that do not divide": (
        "--per_device_training_batch_size 3",
        r"4 x --generation_batches 1 = 4 answers do not",
    ),
    "accumulation that does not divide": (
        "--generation_batches 3 --gradient_accumulation_steps 2",
        r"do not divide by",
    ),
    "tensor-parallel generation": ("--inference_tp_size 2", r"--inference_tp_size"),
    "a backend of no engine": ("--hybrid_engine_backend own", r"--hybrid_engine_backend own .*generate\(\)"),
    "kernels without CUDA": (
        "--enable_hybrid_engine --hybrid_engine_backend deepspeed",
        r"--hybrid_engine_backend deepspeed: .*CUDA.* on cpu",
    ),
    "align_overflow": ("--align_overflow --dtype fp32", r"fp32 gradients do not overflow"),
    "ZeRO++ without CUDA": ("--enable_mixed_precision_lora", r"CUDA"),
    "test mode without an end": ("--enable_test_mode", r"--test_stop_step"),
    "a critic that is no reward model": ("", r"score\.weight"),
    "too few prompts": ("--max_train_samples 2 --critic_model_name_or_path {reward}", r"2 prompts do not fill"),
}


@pytest.fixture
def step_3(model_folder, pairs_folder, cache_folder):
    """Arguments of step 3; the critic is no reward model."""
    models = dict(actor_model_name_or_path=model_folder, critic_model_name_or_path=model_folder)
    text = "--dtype fp32 --per_device_generation_batch_size 4 --per_device_training_batch_size 4"
    return flags(text, data_path=pairs_folder, data_output_path=cache_folder, **models)


@pytest.mark.parametrize("case", STEP_3_BAD)
def test_step_3_refuses(case, step_3, small_models, run_step):
    text, message = STEP_3_BAD[case]
    with pytest.raises(UserError, match=message):
        run_step(3, [*step_3, *flags(text.format(reward=small_models / "reward"))])


def test_actor_and_critic_with_different_tokenizers_are_both_named(step_3, model_folder, run_step, tmp_path):
    other = make_model(tmp_path / "other", pad=None)
    with pytest.raises(UserError, match=rf"(?s)the tokenizers differ.*{model_folder.name}.*other"):
        run_step(3, [*step_3, *flags(critic_model_name_or_path=other)])


def test_step_2_refuses_data_without_rejected_answers(good, run_step, tmp_path):
    file = write_pairs(tmp_path / "sft_only.jsonl", 20)
    file.write_text(file.read_text().replace('"rejected"', '"other"'))
    with pytest.raises(UserError, match="rejected"):
        run_step(2, [*good, *flags(data_path=file)])


def test_a_reward_model_is_no_actor(small_models, run_step, good):
    with pytest.raises(UserError, match="is a reward model"):
        run_step(1, [*good, *flags(model_name_or_path=small_models / "reward")])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_help_fits_100_columns_and_every_flag_explains_itself(step, run_step, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        run_step(step, ["--help"])
    console = capsys.readouterr().out
    assert end.value.code == 0
    assert max(map(len, console.splitlines())) <= 100
    assert STEPS[step].name in console


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_missing_model_flag_is_named(step, run_step, capsys):
    with pytest.raises(SystemExit) as end:
        run_step(step, [])
    assert end.value.code == 2
    assert "model_name_or_path" in capsys.readouterr().err
