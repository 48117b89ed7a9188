"""DeepSpeed's configuration: published values, files laid over it, and offloading as it runs on CPU."""

import json
from types import SimpleNamespace

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.engine import DeepSpeedEngine
from helpers import assert_same_run, flags, killed_after, zero_stage

from utils import ds_utils
from utils.ds_utils import get_eval_ds_config, get_train_ds_config, merge_config_file, offloads_optimizer
from utils.process.errors import UserError


def _zero(stage, device, **more):
    return {
        "stage": stage,
        "overlap_comm": True,
        "offload_param": {"device": device},
        "offload_optimizer": {"device": device},
        "stage3_param_persistence_threshold": 1e4,
        "stage3_max_live_parameters": 3e7,
        "stage3_prefetch_bucket_size": 3e7,
        "memory_efficient_linear": False,
        **more,
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offload", [False, True])
def test_the_whole_configuration_of_a_trained_engine(stage, dtype, offload):
    precision = {
        "fp32": {},
        "bf16": {"bf16": {"enabled": True}},
        "fp16": {"fp16": {"enabled": True, "loss_scale_window": 100}},
    }
    assert get_train_ds_config(offload, dtype, stage) == {
        "steps_per_print": 10,
        "zero_optimization": _zero(stage, "cpu" if offload else "none"),
        **precision[dtype],
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        "hybrid_engine": {
            "enabled": False,
            "max_out_tokens": 512,
            "inference_tp_size": 1,
            "release_inference_cache": False,
            "pin_parameters": True,
            "tp_gather_partition_size": 8,
        },
        "tensorboard": {
            "enabled": False,
            "output_path": "/ds_tensorboard_logs/",
            "job_name": "_tensorboard",
        },
    }
    assert offloads_optimizer(get_train_ds_config(offload, dtype, stage)) is offload


def test_zero_plus_plus_quantises_frozen_weights_and_keeps_a_copy_per_node(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = get_train_ds_config(False, "bf16", 3, enable_mixed_precision_lora=True)
    more = {"zero_quantized_nontrainable_weights": True, "zero_hpz_partition_size": 8}
    assert config["zero_optimization"] == _zero(3, "none", **more)


def test_a_frozen_engine_shards_or_offloads_its_weights_alone():
    config = get_eval_ds_config(True, "bf16", 3)
    assert config["zero_optimization"] == {
        "stage": 3,
        "stage3_param_persistence_threshold": 1e4,
        "offload_param": {"device": "cpu"},
        "memory_efficient_linear": False,
    }
    assert config["bf16"] == {"enabled": True}


BAD = {
    "not JSON": ('{"a": 1,\n ]', "line 2 is not JSON"),
    "not text": (b"\xff\xfe\x00", "is not JSON"),
    "a list": ("[1]", "expected a JSON object, found list"),
    "batch size": ('{"train_batch_size": 8}', "train_batch_size is decided by the flags of batch sizes"),
    "micro-batch": ('{"train_micro_batch_size_per_gpu": 8}', "train_micro_batch_size_per_gpu is decided by"),
    "accumulation": ('{"gradient_accumulation_steps": 8}', "decided by --gradient_accumulation_steps"),
    "optimizer": ('{"optimizer": {"type": "Adam"}}', "optimizer is decided by --learning_rate"),
    "scheduler": ('{"scheduler": {"type": "WarmupLR"}}', "scheduler is decided by --lr_scheduler_type"),
    "checkpoints": ('{"checkpoint": {"load_universal": true}}', "checkpoint is decided by --checkpoint_steps"),
    "elasticity": ('{"elasticity": {"enabled": true}}', "elasticity is decided by the flags of batch sizes"),
    "a shard for other ranks": (
        '{"zero_optimization": {"elastic_checkpoint": true}}',
        r"elastic_checkpoint true: DeepSpeed could not read",
    ),
    "gradients unseen": (
        '{"zero_optimization": {"compute_grad_norm": false}}',
        r"compute_grad_norm false: gradients that are not finite",
    ),
    "gradients unseen in bf16": ('{"bf16": {"check_grad_overflow": false}}', "check_grad_overflow false: gradients"),
    "two optimizers": (
        '{"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}',
        r"ratio 0\.5: DeepSpeed's optimizer .* follows no schedule",
    ),
    "stage": ('{"zero_optimization": {"stage": 3}}', "stage 3 is not the stage 2"),
    "bf16 in fp32": ('{"bf16": {"enabled": true}}', r"bf16\.enabled true is not what --dtype says"),
    "no object": ('{"zero_optimization": 3}', "zero_optimization must be an object, not 3"),
    "unknown device": ('{"zero_optimization": {"offload_param": {"device": "tape"}}}', "'tape' is none of"),
    "parameters at stage 2": (
        '{"zero_optimization": {"offload_param": {"device": "cpu"}}}',
        "needs ZeRO stage 3, not 2",
    ),
    "nvme without a path": (
        '{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}',
        "needs nvme_path, a folder",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_laid_over_is_refused(case, tmp_path):
    text, message = BAD[case]
    file = tmp_path / "more.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        merge_config_file(get_train_ds_config(False, "fp32", 2), str(file))
    assert str(file) in str(caught.value)
    assert "--deepspeed_config_overrides" in str(caught.value)


def test_an_absent_file_and_a_fight_with_a_flag_are_refused_before_anything_is_loaded(run_step, tmp_path):
    nowhere = dict(model_name_or_path=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"absent\.json: No such file"):
        run_step(1, flags("--dtype fp32", deepspeed_config_overrides=tmp_path / "absent.json", **nowhere))
    (tmp_path / "more.json").write_text('{"train_batch_size": 8}')
    with pytest.raises(UserError, match="train_batch_size"):
        run_step(2, flags("--dtype fp32", deepspeed_config=tmp_path / "more.json", **nowhere))
    models = dict(actor_model_name_or_path=tmp_path, critic_model_name_or_path=tmp_path)
    with pytest.raises(UserError, match="train_batch_size"):
        run_step(3, flags("--dtype fp32", deepspeed_config_overrides=tmp_path / "more.json", **models))


def test_nvme_by_file_is_laid_over_where_the_machine_can_do_it(tmp_path, monkeypatch):
    from utils import ds_utils

    settings = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": False}
    (tmp_path / "more.json").write_text(json.dumps({"zero_optimization": {"offload_optimizer": settings}}))
    config = get_train_ds_config(False, "bf16", 3)
    monkeypatch.setattr(ds_utils.AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(UserError, match="libaio"):
        merge_config_file(config, str(tmp_path / "more.json"))
    monkeypatch.setattr(ds_utils.AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    merged = merge_config_file(config, str(tmp_path / "more.json"))
    assert merged["zero_optimization"]["offload_optimizer"] == settings
    assert offloads_optimizer(merged)
    with pytest.raises(UserError, match="needs ZeRO stage 3, not 2"):
        merge_config_file(get_train_ds_config(False, "bf16", 2), str(tmp_path / "more.json"))


@pytest.mark.parametrize("flag", ["--checkpoint_steps 2", "--checkpoint_dir c", "--resume auto"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_optimizer_states_on_nvme_and_checkpoints_are_refused(run_step, start, tmp_path, monkeypatch, step, flag):
    """A resumed run would start from the first weights: DeepSpeed's checkpoint leaves out what is on the disk."""
    from utils import ds_utils

    monkeypatch.setattr(ds_utils.AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    settings = {"device": "nvme", "nvme_path": str(tmp_path)}
    (tmp_path / "more.json").write_text(json.dumps({"zero_optimization": {"offload_optimizer": settings}}))
    places = dict(output_dir=tmp_path / "out", deepspeed_config_overrides=tmp_path / "more.json")
    arguments = [*start(step), *flags(f"{zero_stage(step, 3)} {flag}", **places)]
    with pytest.raises(UserError, match=r"more\.json: offload_optimizer to nvme and checkpoints: .*--checkpoint_steps"):
        run_step(step, arguments)


@pytest.mark.skipif(not AsyncIOBuilder().is_compatible(verbose=False), reason="needs libaio-dev")
def test_parameters_on_nvme_train_resume_and_end_as_in_memory(run_step, start, tmp_path, capfd):
    settings = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": False, "buffer_size": 100000}
    sections = {"zero_optimization": {"offload_param": settings, "reduce_bucket_size": 1000000}}
    (tmp_path / "more.json").write_text(json.dumps(sections))
    arguments = [*start(1), *flags("--zero_stage 3", output_dir=tmp_path / "plain")]
    run_step(1, arguments)
    places = dict(output_dir=tmp_path / "nvme", deepspeed_config_overrides=tmp_path / "more.json")
    arguments += flags("--checkpoint_steps 2", **places)
    with killed_after(5):
        run_step(1, arguments)
    run_step(1, [*arguments, "--resume", "auto"])
    assert "4 steps are done" in capfd.readouterr().out
    assert_same_run(tmp_path / "plain", tmp_path / "nvme")


@pytest.mark.parametrize(("ranks", "reduces"), [(1, False), (2, True)])
def test_one_rank_at_stage_0_does_not_copy_its_gradients_to_reduce_them(ranks, reduces, monkeypatch):
    """The copy is as large as the model, and was seen as the peak of small runs."""
    engine = SimpleNamespace(enable_backward_allreduce=True, zero_optimization_stage=lambda: 0, optimizer=None)
    monkeypatch.setattr(ds_utils, "get_world_size", lambda: ranks)
    monkeypatch.setattr(ds_utils.deepspeed, "initialize", lambda **given: (engine, None, None, None))
    assert ds_utils.initialize(None, get_train_ds_config(False, "fp32", 0)).enable_backward_allreduce == reduces
    engine.enable_backward_allreduce = True
    assert ds_utils.initialize(None, get_train_ds_config(False, "bf16", 0)).enable_backward_allreduce


def test_a_run_on_one_rank_copies_no_gradients(run_step, start, monkeypatch):
    def refuse(*_arguments):
        raise AssertionError("gradients were flattened")

    monkeypatch.setattr(DeepSpeedEngine, "allreduce_bucket", refuse)
    run_step(1, [*start(1), *flags("--zero_stage 0 --max_train_samples 4")])
