"""Names other people's code imports, signatures they call, and configuration values they rely on."""

import importlib
import inspect
import json

import pytest
import torch

from utils.arguments import build_parser
from utils.data.batching import to_device
from utils.ds_utils import get_eval_ds_config, get_train_ds_config, merge_config_file
from utils.engine.averages import ExponentialMovingAverage, MovingAverage
from utils.model.loading import load_state_dict_into_model
from utils.process.errors import UserError

NAMES = {
    "utils.utils": "print_rank_0 is_rank_0 to_device MovingAverage ExponentialMovingAverage set_random_seed "
    "get_all_reduce_mean get_optimizer_grouped_parameters load_hf_tokenizer save_hf_format save_zero_three_model "
    "moving_average load_state_dict_into_model",
    "utils.ds_utils": "get_train_ds_config get_eval_ds_config",
    "utils.module.lora": "LinearLayer_LoRA convert_linear_layer_to_lora convert_lora_to_linear_layer "
    "only_optimize_lora_parameters make_model_gradient_checkpointing_compatible",
    "utils.model.model_utils": "create_hf_model create_critic_model configure_dropout causal_lm_model_to_fp32_loss",
    "utils.model.reward_model": "RewardModel",
    "utils.data.raw_datasets": "PromptRawDataset DahoasRmstaticDataset LocalJsonFileDataset StanfordnlpSHPDataset",
    "utils.data.data_utils": "get_raw_dataset get_shuffle_idx get_raw_dataset_split_index create_dataset_split "
    "create_dataset create_prompt_dataset PromptDataset DataCollatorReward DataCollatorRLHF MiniDataset "
    "get_unsupervised_data",
    "utils.perf": "print_throughput print_throughput_step3 calculate_flops get_hf_configs",
    "training.step3_rlhf_finetuning.rlhf_engine": "DeepSpeedRLHFEngine",
    "training.step3_rlhf_finetuning.ppo_trainer": "DeepSpeedPPOTrainer DeepSpeedPPOTrainerUnsupervised "
    "gather_log_probs",
}


@pytest.mark.parametrize("module", NAMES)
def test_published_names_are_importable(module):
    loaded = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(loaded, name)] == []


def test_the_trainer_has_its_published_methods():
    from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainer

    for name in (
        "generate_experience",
        "compute_rewards",
        "train_rlhf",
        "actor_loss_fn",
        "critic_loss_fn",
        "get_advantages_and_returns",
    ):
        assert callable(getattr(DeepSpeedPPOTrainer, name))


def test_lora_and_configuration_keep_their_published_parameters():
    from utils.module.lora import LinearLayer_LoRA

    parameters = list(inspect.signature(LinearLayer_LoRA.__init__).parameters)
    assert parameters[1:6] == ["weight", "lora_dim", "lora_scaling", "lora_droppout", "bias"]
    published = inspect.signature(get_train_ds_config).parameters.values()
    assert [parameter.name for parameter in published if parameter.kind is not parameter.KEYWORD_ONLY] == [
        "offload", "dtype", "stage", "enable_hybrid_engine", "inference_tp_size", "release_inference_cache",
        "pin_parameters", "tp_gather_partition_size", "max_out_tokens", "enable_tensorboard",
        "enable_mixed_precision_lora", "tb_path", "tb_name",
    ]  # fmt: skip
    assert list(inspect.signature(get_eval_ds_config).parameters) == ["offload", "dtype", "stage"]


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
def test_every_published_flag_is_still_taken(step):
    known = {option for action in build_parser(step)._actions for option in action.option_strings}
    wanted = {f"--{name}" for name in PUBLISHED_FLAGS[step].split()} | {"--deepspeed", "--deepspeed_config"}
    assert wanted <= known, sorted(wanted - known)
