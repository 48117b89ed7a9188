"""Names other people's code imports, signatures they call, and configuration values they rely on."""

import functools
import importlib
import inspect
import json
import re
from itertools import takewhile

import pytest
import torch
from helpers import PROJECT

from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainerUnsupervised
from utils.arguments import build_parser
from utils.data.batching import to_device
from utils.ds_utils import get_train_ds_config, merge_config_file
from utils.engine.averages import ExponentialMovingAverage, MovingAverage
from utils.model.loading import load_state_dict_into_model
from utils.process.errors import UserError

PUBLISHED_NAMES = {
    "utils.utils": "print_rank_0 is_rank_0 to_device MovingAverage ExponentialMovingAverage get_tokenizer "
    "load_hf_tokenizer save_hf_format set_random_seed get_all_reduce_mean load_state_dict_into_model "
    "get_optimizer_grouped_parameters _z3_params_to_fetch moving_average save_zero_three_model",
    "utils.ds_utils": "get_train_ds_config get_eval_ds_config",
    "utils.module.lora": "LinearLayer_LoRA convert_linear_layer_to_lora _z3_params_to_fetch "
    "convert_lora_to_linear_layer only_optimize_lora_parameters make_model_gradient_checkpointing_compatible",
    "utils.model.model_utils": "create_hf_model create_critic_model configure_dropout causal_lm_model_to_fp32_loss",
    "utils.model.reward_model": "RewardModel",
    "utils.data.raw_datasets": "PromptRawDataset",
    "utils.data.data_utils": "get_raw_dataset get_shuffle_idx get_raw_dataset_split_index create_dataset_split "
    "create_dataset create_prompt_dataset PromptDataset DataCollatorReward DataCollatorRLHF MiniDataset "
    "get_unsupervised_data",
    "utils.perf": "print_throughput print_throughput_step3 calculate_flops get_hf_configs",
    "training.step3_rlhf_finetuning.rlhf_engine": "DeepSpeedRLHFEngine log_init",
    "training.step3_rlhf_finetuning.ppo_trainer": "DeepSpeedPPOTrainer DeepSpeedPPOTrainerUnsupervised "
    "gather_log_probs print_all_ranks get_model_norm",
}
TRAINER_METHODS = (
    "_generate_sequence generate_experience compute_rewards train_rlhf get_overflow actor_loss_fn critic_loss_fn "
    "get_advantages_and_returns _validate_training_mode _validate_evaluation_mode train eval dump_model_norms "
    "train_unsupervised"
)
# The parameters of published calls, in their order; ours may have more behind them.
PUBLISHED_PARAMETERS = {
    "utils.utils": {
        "print_rank_0": "msg rank",
        "is_rank_0": "",
        "to_device": "batch device",
        "ExponentialMovingAverage": "alpha",
        "get_tokenizer": "model_name_or_path fast_tokenizer",
        "load_hf_tokenizer": "model_name_or_path fast_tokenizer add_special_tokens",
        "save_hf_format": "model tokenizer args sub_folder",
        "set_random_seed": "seed",
        "get_all_reduce_mean": "tensor",
        "load_state_dict_into_model": "model_to_load state_dict start_prefix zero_stage",
        "get_optimizer_grouped_parameters": "model weight_decay lora_lr no_decay_name_list lora_name_list",
        "_z3_params_to_fetch": "param_list",
        "moving_average": "model model_ema beta device zero_stage",
        "save_zero_three_model": "model_ema global_rank save_dir zero_stage",
    },
    "utils.ds_utils": {
        "get_train_ds_config": "offload dtype stage enable_hybrid_engine inference_tp_size release_inference_cache "
        "pin_parameters tp_gather_partition_size max_out_tokens enable_tensorboard enable_mixed_precision_lora tb_path "
        "tb_name",
        "get_eval_ds_config": "offload dtype stage",
    },
    "utils.perf": {
        "print_throughput": "hf_model args e2e_time rank",
        "print_throughput_step3": "actor_model critic_model args e2e_time gen_exp_time train_time rank",
        "calculate_flops": "checkpoint_activations_factor batch_size seq_length hf_config",
        "get_hf_configs": "hf_config",
    },
    "utils.data.data_utils": {
        "get_raw_dataset": "dataset_name output_path seed local_rank",
        "get_shuffle_idx": "seed size",
        "get_raw_dataset_split_index": "local_rank output_path dataset_name seed split_name data_split split_index "
        "data_size rebuild",
        "PromptDataset": "prompt_dataset chosen_dataset reject_dataset pad_token_id train_phase",
        "create_dataset_split": "current_dataset raw_dataset train_phase tokenizer end_of_conversation_token "
        "max_seq_len",
        "create_dataset": "local_rank dataset_name data_split output_path train_phase seed tokenizer "
        "end_of_conversation_token max_seq_len rebuild",
        "create_prompt_dataset": "local_rank data_path data_split output_path train_phase seed tokenizer max_seq_len "
        "end_of_conversation_token sft_only_data_path reload",
        "DataCollatorReward": "",
        "DataCollatorRLHF": "max_token_len inference_tp_size",
        "get_unsupervised_data": "args tokenizer",
        "MiniDataset": "max_size small_batch_size",
        "MiniDataset.seperate": "self",
        "MiniDataset.add": "self data",
        "MiniDataset.free": "self",
    },
    "utils.data.raw_datasets": {"PromptRawDataset": "output_path seed local_rank dataset_name"},
    "utils.model.model_utils": {
        "configure_dropout": "model_config dropout",
        "causal_lm_model_to_fp32_loss": "model",
        "create_hf_model": "model_class model_name_or_path tokenizer ds_config rlhf_training dropout",
        "create_critic_model": "model_name_or_path tokenizer ds_config num_padding_at_beginning rlhf_training dropout "
        "zero_stage compute_fp32_loss",
    },
    "utils.model.reward_model": {
        "RewardModel": "base_model tokenizer num_padding_at_beginning compute_fp32_loss",
        "RewardModel.forward": "self input_ids past_key_values attention_mask position_ids head_mask inputs_embeds "
        "use_cache",
        "RewardModel.forward_value": "self input_ids attention_mask past_key_values position_ids head_mask "
        "inputs_embeds return_value_only prompt_length use_cache",
    },
    "utils.module.lora": {
        "LinearLayer_LoRA": "weight lora_dim lora_scaling lora_droppout bias",
        "convert_linear_layer_to_lora": "model part_module_name lora_dim lora_scaling lora_droppout",
        "convert_lora_to_linear_layer": "model",
        "only_optimize_lora_parameters": "model force_optimize_params",
        "make_model_gradient_checkpointing_compatible": "model",
        "_z3_params_to_fetch": "param_list",
    },
    "training.step3_rlhf_finetuning.rlhf_engine": {
        "DeepSpeedRLHFEngine": "actor_model_name_or_path critic_model_name_or_path tokenizer args num_total_iters",
    },
    "training.step3_rlhf_finetuning.ppo_trainer": {
        "DeepSpeedPPOTrainer": "rlhf_engine args",
        "DeepSpeedPPOTrainer._generate_sequence": "self prompts mask step",
        "DeepSpeedPPOTrainer.generate_experience": "self prompts mask step",
        "gather_log_probs": "logits labels",
    },
}
PAGE = (PROJECT / "training/UPGRADING.md").read_text()


def rows_of_table(header: str) -> list[list[str]]:
    """The cells of each row of the table of UPGRADING that begins with a header."""
    rows = takewhile(lambda line: line.startswith("|"), PAGE.partition(f"| {header} |")[2].splitlines()[2:])
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def reached(place, name: str):
    """What a dotted name stands for; None if there is no such thing."""
    return functools.reduce(lambda thing, part: getattr(thing, part, None), name.split("."), place)


def test_the_table_of_names_says_of_each_published_one_whether_it_is_there_and_where_it_is_defined():
    listed = {place: set() for place in PUBLISHED_NAMES}
    for place, names, state, defined, _ in rows_of_table("published place"):
        module = importlib.import_module(quoted(place)[0])
        for name in quoted(names):
            listed[module.__name__].add(name)
            value = reached(module, name)
            assert (value is None) == (state == "gone"), name
            assert state in ("same", "differs", "gone"), name
            assert state == "gone" or value.__module__ == quoted(defined)[0], name
    assert listed == {place: set(names.split()) for place, names in PUBLISHED_NAMES.items()}


def test_the_table_of_trainer_methods_says_which_are_there():
    found = {}
    for names, state, _ in rows_of_table("method of the trainer"):
        found |= dict.fromkeys(quoted(names), state)
    assert found.keys() == set(TRAINER_METHODS.split())
    for name, state in found.items():
        assert callable(reached(DeepSpeedPPOTrainerUnsupervised, name)) == (state != "gone"), name


@pytest.mark.parametrize("place", PUBLISHED_PARAMETERS)
def test_published_calls_take_their_arguments_in_the_published_order(place):
    module = importlib.import_module(place)
    for name, published in PUBLISHED_PARAMETERS[place].items():
        parameters = inspect.signature(reached(module, name)).parameters.values()
        ours = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert ours[: len(published.split())] == published.split(), name
        more = [p for p in parameters if p.name not in published.split()]
        assert all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in more), name


def test_every_published_line_that_is_not_gone_is_printed_somewhere():
    files = [file for top in ("training", "utils") for file in (PROJECT / top).rglob("*.py")]
    sources = "".join(file.read_text() for file in files)
    code = re.sub(r'"\n\s+f?"', "", sources)  # strings over several lines are one
    lines = rows_of_table("line")
    assert len(lines) == 23
    for line, _, state, _ in lines:
        parts = [part.replace("\\|", "|").strip(" ,") for part in quoted(line)[0].split("…")]
        missing = [part for part in parts if part and part not in code]
        assert bool(missing) == (state == "gone"), missing or line


def test_the_training_configuration_has_its_published_values():
    config = get_train_ds_config(True, "fp16", 3, enable_tensorboard=True, tb_path="t", tb_name="n")
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["stage3_param_persistence_threshold"], zero["memory_efficient_linear"]) == (
        3,
        1e4,
        False,
    )
    assert (zero["stage3_max_live_parameters"], zero["stage3_prefetch_bucket_size"]) == (3e7, 3e7)
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"
    assert config["fp16"] == {"enabled": True, "loss_scale_window": 100}
    assert config["tensorboard"] == {
        "enabled": True,
        "output_path": "t/ds_tensorboard_logs/",
        "job_name": "n_tensorboard",
    }
    assert (config["steps_per_print"], config["gradient_clipping"], config["prescale_gradients"]) == (10, 1.0, False)
    assert "bf16" not in config
    assert get_train_ds_config(False, "bf16")["bf16"] == {"enabled": True}
    assert not {"fp16", "bf16"} & get_train_ds_config(False, "fp32").keys()
    assert get_train_ds_config(False)["zero_optimization"]["offload_param"]["device"] == "none"
    with pytest.raises(ValueError, match="fp8"):
        get_train_ds_config(False, "fp8")


def test_an_overrides_file_reaches_any_setting(tmp_path):
    file = tmp_path / "more.json"
    file.write_text(json.dumps({"gradient_clipping": 0.5, "zero_optimization": {"overlap_comm": False}}))
    merged = merge_config_file(get_train_ds_config(False), str(file))
    assert merged["gradient_clipping"] == 0.5
    assert merged["zero_optimization"]["overlap_comm"] is False
    assert merged["zero_optimization"]["stage"] == 2


def test_averages_by_hand():
    mean, smooth = MovingAverage(), ExponentialMovingAverage(alpha=0.5)
    assert [mean.update(x) for x in (1, 3)] == [1, 2]
    assert [smooth.update(x) for x in (4, 0)] == [4, 2]
    assert smooth.get() == 2


def test_to_device_moves_nested_tensors_and_passes_the_rest():
    batch = to_device({"a": [torch.zeros(1), 2], "b": "text"}, "meta")
    assert batch["a"][0].device.type == "meta"
    assert batch["a"][1] == 2
    assert batch["b"] == "text"


def test_a_checkpoint_that_does_not_fit_is_refused_by_name_and_loads_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    before = model[0].weight.detach().clone()
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(4), "1.weight": torch.ones(1, 3), "x": torch.ones(1)}
    with pytest.raises(UserError, match=r"missing: 1\.bias; unexpected: x; of another shape: 0\.bias"):
        load_state_dict_into_model(model, state)
    assert torch.equal(model[0].weight, before)
    fitting = {f"m.{name}": torch.full_like(value, 2) for name, value in model.state_dict().items()}
    load_state_dict_into_model(model, fitting, start_prefix="m.")
    assert all((value == 2).all() for value in model.state_dict().values())


PUBLISHED_FLAGS = {
    1: (
        "data_path data_split sft_only_data_path data_output_path model_name_or_path "
        "per_device_train_batch_size per_device_eval_batch_size max_seq_len learning_rate weight_decay "
        "num_train_epochs gradient_accumulation_steps lr_scheduler_type num_warmup_steps output_dir seed "
        "local_rank gradient_checkpointing dropout offload dtype zero_stage lora_dim lora_module_name "
        "only_optimize_lora lora_learning_rate compute_fp32_loss enable_tensorboard tensorboard_path "
        "add_eot_token eot_token print_loss"
    ),
    2: (
        "data_path data_split data_output_path model_name_or_path num_padding_at_beginning "
        "per_device_train_batch_size per_device_eval_batch_size max_seq_len learning_rate weight_decay "
        "num_train_epochs gradient_accumulation_steps lr_scheduler_type num_warmup_steps output_dir seed "
        "local_rank gradient_checkpointing dropout offload dtype zero_stage lora_dim lora_module_name "
        "only_optimize_lora lora_learning_rate eval_interval eval_iters compute_fp32_loss enable_tensorboard "
        "tensorboard_path add_eot_token"
    ),
    "dpo": (
        "data_path data_split data_output_path model_name_or_path per_device_train_batch_size "
        "per_device_eval_batch_size max_seq_len learning_rate weight_decay num_train_epochs beta label_smoothing "
        "gradient_accumulation_steps lr_scheduler_type num_warmup_steps output_dir seed local_rank "
        "gradient_checkpointing dropout offload dtype offload_reference_model zero_stage lora_dim lora_module_name "
        "only_optimize_lora lora_learning_rate compute_fp32_loss enable_tensorboard tensorboard_path add_eot_token "
        "print_loss"
    ),
    3: (
        "data_path data_split data_output_path unsupervised_dataset_name unsupervised_dataset_config_name "
        "unsup_coef actor_model_name_or_path critic_model_name_or_path num_padding_at_beginning "
        "per_device_generation_batch_size per_device_training_batch_size generation_batches ppo_epochs "
        "max_prompt_seq_len max_answer_seq_len actor_learning_rate critic_learning_rate actor_weight_decay "
        "critic_weight_decay num_train_epochs lr_scheduler_type gradient_accumulation_steps num_warmup_steps "
        "output_dir seed preprocessing_num_workers local_rank enable_hybrid_engine unpin_actor_parameters "
        "release_inference_cache inference_tp_size tp_gather_partition_size offload dtype "
        "offload_reference_model offload_reward_model actor_zero_stage critic_zero_stage "
        "actor_gradient_checkpointing critic_gradient_checkpointing actor_dropout critic_dropout "
        "actor_lora_dim actor_lora_module_name critic_lora_dim critic_lora_module_name only_optimize_lora "
        "actor_lora_learning_rate critic_lora_learning_rate enable_ema enable_mixed_precision_lora "
        "compute_fp32_loss enable_tensorboard tensorboard_path add_eot_token align_overflow print_answers "
        "print_answers_interval enable_test_mode test_stop_step"
    ),
}


@pytest.mark.parametrize("step", PUBLISHED_FLAGS)
def test_every_published_flag_is_taken_and_in_the_table_of_flags(step):
    known = {option for action in build_parser(step)._actions for option in action.option_strings}
    wanted = {f"--{name}" for name in PUBLISHED_FLAGS[step].split()} | {"--deepspeed", "--deepspeed_config"}
    assert wanted <= known, sorted(wanted - known)
    listed = {
        flag: state
        for flags, steps, state, _ in rows_of_table("flags")
        for flag in quoted(flags)
        if str(step).upper() in steps
    }
    assert listed.keys() == wanted
    assert set(listed.values()) <= {"same", "differs"}
