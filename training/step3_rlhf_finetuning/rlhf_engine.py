"""The models of PPO, each in a DeepSpeed engine of its own: actor, reference, EMA of the actor, critic, reward."""

import time
from contextlib import contextmanager, nullcontext

import psutil
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM, get_scheduler

from utils.ds_utils import (
    TORCH_DTYPES,
    get_eval_ds_config,
    get_train_ds_config,
    initialize,
    merge_config_file,
    offloads_optimizer,
    with_batch_sizes,
)
from utils.engine.optimizer import get_optimizer_grouped_parameters, make_optimizer
from utils.engine.steps import moving_average
from utils.generation.hybrid_engine import HybridEngine
from utils.model.model_utils import adapt_model, add_lora_layers, create_critic_model, create_hf_model
from utils.module.lora import lora_disabled
from utils.process.console import print_rank_0


def frozen_zero_stage(trained_stage: int, offload: bool) -> int:
    """Without an optimizer only ZeRO-3 shards anything, and only ZeRO-3 can keep weights in host memory."""
    return 3 if trained_stage == 3 or offload else 0


class DeepSpeedRLHFEngine:
    """Builds the engines and holds them as attributes.

    Attributes:
        actor: the policy, trained. generator: its HybridEngine.
        ref: the policy as it was at the start, frozen; None where that is the actor with its adapters off.
        actor_ema: fp32 exponential moving average of the actor, or None.
        critic: a RewardModel that predicts the return, trained; starts from the reward model. None without GAE.
        reward: the reward model, frozen; None where only reward functions score.
    """

    def __init__(self, actor_model_name_or_path, critic_model_name_or_path, tokenizer, args, num_total_iters):
        self.args, self.tokenizer, self.num_total_iters = args, tokenizer, num_total_iters
        self.actor = self._init_actor(actor_model_name_or_path)
        self.generator = HybridEngine(
            self.actor,
            args.enable_hybrid_engine,
            not args.unpin_actor_parameters,
            args.release_inference_cache,
            args.hybrid_engine_backend,
            args.max_prompt_seq_len + args.max_answer_seq_len if args.compile_generation else None,
        )
        self.ref = self._init_ref(actor_model_name_or_path) if args.separate_ref else None
        self.actor_ema = self._init_ema(actor_model_name_or_path) if args.enable_ema else None
        self.critic = self._init_critic(critic_model_name_or_path) if args.advantage_estimator == "gae" else None
        self.reward = self._init_reward(critic_model_name_or_path) if args.reward_model_weight else None

    def reference_weights(self):
        """While open, the actor is the reference if that has no engine of its own."""
        return lora_disabled(self.actor.module) if self.ref is None else nullcontext()

    def trained_engines(self) -> dict:
        """Name -> engine, of those with an optimizer."""
        return {"actor": self.actor} | ({} if self.critic is None else {"critic": self.critic})

    def _model_options(self, dropout=None, dtype=None) -> dict:
        args = self.args
        return dict(
            rlhf_training=True,
            dropout=dropout,
            dtype=TORCH_DTYPES[dtype or args.dtype],
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
        )

    def _train_config(
        self, stage: int, enable_mixed_precision_lora: bool = False, deepspeed_kernels: bool = False
    ) -> dict:
        args = self.args
        config = get_train_ds_config(
            args.offload and stage > 0,
            args.dtype,
            stage,
            enable_mixed_precision_lora=enable_mixed_precision_lora,
            enable_hybrid_engine=deepspeed_kernels,
            release_inference_cache=args.release_inference_cache,
            pin_parameters=not args.unpin_actor_parameters,
            max_out_tokens=args.max_prompt_seq_len + args.max_answer_seq_len,
        )
        config = merge_config_file(config, args.deepspeed_config_overrides)
        return with_batch_sizes(config, args.per_device_training_batch_size, args.gradient_accumulation_steps)

    def _eval_config(self, stage: int, offload: bool = False, dtype=None) -> dict:
        return with_batch_sizes(
            get_eval_ds_config(offload, dtype or self.args.dtype, stage), self.args.per_device_training_batch_size
        )

    def _trained(self, model, config, learning_rate, lora_learning_rate, weight_decay):
        args = self.args
        groups = get_optimizer_grouped_parameters(model, weight_decay, lora_learning_rate)
        optimizer = make_optimizer(groups, learning_rate, offloads_optimizer(config))
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, self.num_total_iters)
        return initialize(model, config, optimizer, scheduler)

    def _init_actor(self, path):
        args = self.args
        with _announced("actor"):
            config = self._train_config(
                args.actor_zero_stage, args.enable_mixed_precision_lora, args.hybrid_engine_backend == "deepspeed"
            )
            model = create_hf_model(
                AutoModelForCausalLM, path, self.tokenizer, config, **self._model_options(args.actor_dropout)
            )
            adapt_model(model, args, "actor_", args.actor_gradient_checkpointing)
            return self._trained(
                model, config, args.actor_learning_rate, args.actor_lora_learning_rate, args.actor_weight_decay
            )

    def _init_ref(self, path):
        args = self.args
        with _announced("reference"):
            stage = frozen_zero_stage(args.actor_zero_stage, args.offload_reference_model)
            config = self._eval_config(stage, args.offload_reference_model)
            model = create_hf_model(AutoModelForCausalLM, path, self.tokenizer, config, **self._model_options())
            return _frozen(model, config)

    def _init_ema(self, path):
        args = self.args
        with _announced("EMA"):
            config = self._eval_config(frozen_zero_stage(args.actor_zero_stage, False), dtype="fp32")
            # A small weight that stays gathered would not follow its shard.
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            model = create_hf_model(
                AutoModelForCausalLM, path, self.tokenizer, config, **self._model_options(dtype="fp32")
            )
            add_lora_layers(model, args, "actor_")
            engine = _frozen(model, config)
            moving_average(
                self.actor, engine, beta=0.0, zero_stage=args.actor_zero_stage
            )  # the same random LoRA factors
            return engine

    def _init_critic(self, path):
        args = self.args
        with _announced("critic"):
            config = self._train_config(args.critic_zero_stage)
            model = create_critic_model(path, self.tokenizer, config, **self._model_options(args.critic_dropout))
            adapt_model(model, args, "critic_", args.critic_gradient_checkpointing, keep_trainable=["v_head.weight"])
            return self._trained(
                model, config, args.critic_learning_rate, args.critic_lora_learning_rate, args.critic_weight_decay
            )

    def _init_reward(self, path):
        args = self.args
        with _announced("reward"):
            stage = frozen_zero_stage(args.critic_zero_stage, args.offload_reward_model)
            config = self._eval_config(stage, args.offload_reward_model)
            return _frozen(create_critic_model(path, self.tokenizer, config, **self._model_options()), config)


def _frozen(model, config):
    model.requires_grad_(False)
    engine = initialize(model, config)
    engine.eval()
    return engine


@contextmanager
def _announced(name: str):
    """Prints how long an engine took to build, and what it added to the memory of this rank."""
    start, host, device = time.perf_counter(), _host_memory(), get_accelerator().memory_allocated()
    yield
    seconds, grown = time.perf_counter() - start, _host_memory() - host
    memory = f"{grown / 2**30:+.2f} GiB of host memory"
    if get_accelerator().device_name() != "cpu":
        now = get_accelerator().memory_allocated()
        memory += f", {(now - device) / 2**30:+.2f} GiB on the device ({now / 2**30:.2f} in all)"
    print_rank_0(f"{name} model ready in {seconds:.1f}s: {memory}")


def _host_memory() -> int:
    return psutil.Process().memory_info().rss
