"""The models of PPO, each in a DeepSpeed engine of its own: actor, reference, EMA of the actor, critic, reward."""

import time
from contextlib import contextmanager, nullcontext

import psutil
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM

from utils import arguments
from utils.engine import build
from utils.engine.steps import moving_average
from utils.generation.hybrid_engine import HybridEngine
from utils.model.model_utils import add_lora_layers, create_critic_model, create_hf_model
from utils.model.tokenizer import describe_end_tokens, end_token_ids
from utils.module.lora import lora_disabled
from utils.process.console import print_classic, print_rank_0


class DeepSpeedRLHFEngine:
    """Builds the engines and holds them as attributes.

    Attributes:
        actor: the policy, trained. generator: its HybridEngine. end_token_ids: each of them ends an answer.
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
            arguments.vllm_settings(args),
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

    def averages(self) -> dict:
        """Name -> (engine of a moving average, the engine that it follows)."""
        return {"actor_ema": (self.actor_ema, self.actor)} if self.actor_ema is not None else {}

    def _init_actor(self, path):
        args = self.args
        with _announced("actor"):
            config = build.train_config(
                args,
                "actor",
                enable_mixed_precision_lora=args.enable_mixed_precision_lora,
                enable_hybrid_engine=args.hybrid_engine_backend == "deepspeed",
                release_inference_cache=args.release_inference_cache,
                pin_parameters=not args.unpin_actor_parameters,
                max_out_tokens=args.max_prompt_seq_len + args.max_answer_seq_len,
            )
            model = self._causal_lm(path, config, dropout=args.actor_dropout)
            self.end_token_ids = end_token_ids(model, self.tokenizer)
            if len(self.end_token_ids) > 1:
                print_rank_0(f"answers end at {describe_end_tokens(self.end_token_ids, self.tokenizer)}")
            return build.trained_engine(model, args, config, self.num_total_iters, "actor")

    def _init_ref(self, path):
        args = self.args
        with _announced("reference"):
            config = build.frozen_config(args, args.actor_zero_stage, args.offload_reference_model)
            return build.frozen_engine(self._causal_lm(path, config), config)

    def _init_ema(self, path):
        args = self.args
        with _announced("EMA"):
            config = build.frozen_config(args, args.actor_zero_stage, dtype="fp32")
            # A small weight that stays gathered would not follow its shard.
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            model = self._causal_lm(path, config, dtype="fp32")
            add_lora_layers(model, args, "actor_")
            engine = build.frozen_engine(model, config)
            # The same random LoRA factors.
            moving_average(self.actor, engine, beta=0.0, zero_stage=args.actor_zero_stage)
            return engine

    def _init_critic(self, path):
        args = self.args
        with _announced("critic"):
            config = build.train_config(args, "critic")
            model = self._value_model(path, config, dropout=args.critic_dropout)
            return build.trained_engine(
                model, args, config, self.num_total_iters, "critic", keep_trainable=["v_head.weight"]
            )

    def _init_reward(self, path):
        args = self.args
        with _announced("reward"):
            config = build.frozen_config(args, args.critic_zero_stage, args.offload_reward_model)
            return build.frozen_engine(self._value_model(path, config), config)

    def _causal_lm(self, path, config, **options):
        options = build.model_options(self.args, **options)
        return create_hf_model(AutoModelForCausalLM, path, self.tokenizer, config, rlhf_training=True, **options)

    def _value_model(self, path, config, **options):
        options = build.model_options(self.args, **options)
        return create_critic_model(path, self.tokenizer, config, rlhf_training=True, **options)


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
    print_classic(f"{name} model ready in {seconds:.1f}s: {memory}")


def _host_memory() -> int:
    return psutil.Process().memory_info().rss
