"""Flags of step 3."""

import argparse
from dataclasses import dataclass

from deepspeed.accelerator import get_accelerator

from utils.arguments.kinds import (
    above_zero,
    finite,
    non_negative_float,
    not_negative,
    positive,
    probability,
    share,
)
from utils.arguments.model import (
    QUANTIZATIONS,
    add_dtype_argument,
    add_lora_arguments,
    add_num_padding_argument,
    add_schedule_arguments,
    check_config_file,
    check_grad_accum_dtype,
    check_models,
    check_save_lora_adapters,
    working_stage,
)
from utils.generation.vllm_backend import COLDEST, GPU_MEMORY_UTILIZATION, VllmSettings, check_vllm
from utils.process.errors import UserError
from utils.process.world import get_world_size


def add_rlhf_arguments(parser) -> None:
    """Everything of step 3 beside data and run."""
    models = parser.add_argument_group("models")
    add = models.add_argument
    add("--actor_model_name_or_path", required=True, help="the model of step 1: actor and reference start from it")
    add(
        "--critic_model_name_or_path",
        default=None,
        help="the reward model of step 2: reward and critic start from it; only --reward_model_weight 0 does without",
    )
    add(
        "--separate_ref",
        action="store_true",
        help="a reference of its own even under --only_optimize_lora, where the actor without its adapters is one",
    )
    add("--actor_dropout", type=probability, default=None, help="dropout of the actor; None for 0, as PPO wants")
    add("--critic_dropout", type=probability, default=None, help="dropout of the critic; None for 0")
    add_num_padding_argument(models)
    add(
        "--quantize",
        choices=QUANTIZATIONS,
        default=None,
        help="not available in step 3: give it to step 1 and 2, which save whole models",
    )

    group = parser.add_argument_group("batches and optimisation")
    add = group.add_argument
    add("--per_device_generation_batch_size", type=positive, default=16, help="answers sampled at a time per device")
    add(
        "--num_generations_per_prompt",
        type=positive,
        default=1,
        help="answers to each prompt; the generation batch holds this many fewer prompts. rloo and grpo need 2 or more",
    )
    add(
        "--per_device_training_batch_size",
        type=positive,
        default=16,
        help="answers per device and forward pass of an update",
    )
    add("--generation_batches", type=positive, default=1, help="rounds of generation before each update")
    add("--ppo_epochs", type=positive, default=1, help="passes over the answers of an update")
    add(
        "--gradient_accumulation_steps",
        type=positive,
        default=1,
        help="forward passes per optimizer step; more rounds of generation are made where one does not fill them",
    )
    add("--max_prompt_seq_len", type=positive, default=256, help="tokens of a prompt; a longer one loses its beginning")
    add("--max_answer_seq_len", type=positive, default=256, help="tokens of an answer, its EOS included")
    add("--num_train_epochs", type=positive, default=1, help="passes over the prompts")
    add("--actor_learning_rate", type=non_negative_float, default=9.65e-6, help="peak learning rate of the actor")
    add("--critic_learning_rate", type=non_negative_float, default=5e-6, help="peak learning rate of the critic")
    add(
        "--actor_weight_decay",
        type=non_negative_float,
        default=0.0,
        help="AdamW's decay of the actor's matrices; 0 to turn off",
    )
    add(
        "--critic_weight_decay",
        type=non_negative_float,
        default=0.0,
        help="AdamW's decay of the critic's matrices; 0 to turn off",
    )
    add_schedule_arguments(group)
    add = parser.add_argument_group("PPO").add_argument
    on_off = argparse.BooleanOptionalAction
    add(
        "--do_sample",
        action=on_off,
        default=True,
        help="rollouts are samples of the policy; --no-do_sample for greedy ones",
    )
    add("--temperature", type=non_negative_float, default=1.0, help="of sampling, and of all log-probs; 0 for greedy")
    add(
        "--top_p",
        type=probability,
        default=1.0,
        help="sample from the smallest set of tokens with this probability; 1 for all",
    )
    add("--top_k", type=not_negative, default=0, help="sample from this many tokens; 0 for all")
    add("--kl_ctl", type=non_negative_float, default=0.1, help="weight of the KL penalty per token; 0 to turn off")
    add(
        "--kl_estimator",
        choices=["k1", "k3"],
        default="k1",
        help="k1: log p - log q; k3: never negative, less variance",
    )
    add(
        "--kl_target",
        type=above_zero,
        default=None,
        help="nats per answer the KL weight is steered to; None for a fixed weight",
    )
    add("--kl_horizon", type=positive, default=10000, help="answers over which the KL weight adapts")
    add("--clip_reward_value", type=above_zero, default=5.0, help="scores are clipped to plus or minus this")
    add(
        "--normalize_reward",
        action=on_off,
        default=None,
        help="scale scores by the mean and std saved with the reward model; None: where they are saved",
    )
    add(
        "--missing_eos_penalty",
        type=non_negative_float,
        default=1.0,
        help="taken off the score of an answer without EOS, in units of the score (with --normalize_reward: its "
        "standard deviation); 0 for nothing",
    )
    add("--gamma", type=probability, default=1.0, help="discount per token; 1 for none")
    add("--lam", type=probability, default=0.95, help="GAE's lambda: 0 trusts the critic, 1 the rewards")
    add(
        "--advantage_estimator",
        choices=["gae", "rloo", "grpo"],
        default="gae",
        help="gae: PPO with a critic. Without one, an answer against the others to its prompt: rloo, less their mean "
        "reward; grpo, less the group's mean and over its std, the KL penalty (k3) in the loss",
    )
    add(
        "--whiten_advantages",
        action=on_off,
        default=None,
        help="mean 0, std 1 over all ranks; None for on with gae (published scripts: off), off with rloo and grpo",
    )
    add(
        "--scale_group_rewards",
        action=on_off,
        default=None,
        help="grpo: divide by the group's std, so that prompts whose answers hardly differ weigh as much as others; "
        "--no-scale_group_rewards for Dr. GRPO; None for on with grpo, while gae and rloo have no such division",
    )
    add(
        "--drop_groups_without_spread",
        action="store_true",
        help="rloo, grpo: leave prompts out of the update whose answers all got one score (all right, say): they teach "
        "nothing and thin the mean of the loss; groups_without_spread in the metrics counts them; off: keep them",
    )
    add(
        "--loss_mean",
        choices=["token", "answer"],
        default="token",
        help="losses of a step are means over its answer tokens (DAPO; long answers weigh more), or over its answers, "
        "of the mean over the tokens of each (GRPO as published; a token of a long answer weighs less)",
    )
    add("--cliprange", type=above_zero, default=0.2, help="the policy's ratio is clipped to 1 plus or minus this")
    add(
        "--cliprange_high",
        type=above_zero,
        default=None,
        help="upper bound of that clip, 1 plus this: 0.28 beside --cliprange 0.2 lets unlikely tokens grow and keeps "
        "answers varied (DAPO's clip-higher); None for --cliprange",
    )
    add(
        "--cliprange_value",
        type=above_zero,
        default=0.2,
        help="the value is clipped to the old one plus or minus this",
    )
    add(
        "--reward_function",
        nargs="+",
        default=[],
        metavar="FILE.py:NAME[:WEIGHT]",
        help="functions that give each answer a score, added to the reward model's; each gets what its parameters are "
        "called: prompts, answers, columns of the data; none for off",
    )
    add(
        "--reward_model_weight",
        type=finite,
        default=1.0,
        help="how much the reward model's score counts beside --reward_function; 0 to do without the model",
    )
    add("--enable_ema", action="store_true", help="keep an fp32 moving average of the actor and save it too")
    add("--ema_decay", type=probability, default=0.992, help="how much of the average stays at each applied step")

    add = parser.add_argument_group("unsupervised text (PPO-ptx)").add_argument
    add(
        "--unsupervised_dataset_name",
        default=None,
        help="plain text: .txt files, any file or folder of rows with a field text, or a hub dataset; None for off",
    )
    add("--unsupervised_dataset_config_name", default=None, help="configuration of that hub dataset")
    add("--unsup_coef", type=non_negative_float, default=27.8, help="weight of the language-model loss on that text")

    group = parser.add_argument_group("precision and memory")
    add = group.add_argument
    stages = dict(type=int, choices=[0, 1, 2, 3], default=0)
    add("--actor_zero_stage", **stages, help="ZeRO stage of the actor (and, at 3, of the reference and the EMA)")
    add("--critic_zero_stage", **stages, help="ZeRO stage of the critic (and, at 3, of the reward model)")
    add(
        "--offload",
        action="store_true",
        help="keep optimizer states (ZeRO-3: parameters too) of actor and critic on the host",
    )
    add("--offload_reference_model", action="store_true", help="keep the reference's weights in host memory, by ZeRO-3")
    add("--offload_reward_model", action="store_true", help="keep the reward model's weights in host memory, by ZeRO-3")
    add_dtype_argument(group)
    add(
        "--actor_gradient_checkpointing",
        action="store_true",
        help="recompute the actor's activations: less memory, slower",
    )
    add(
        "--critic_gradient_checkpointing",
        action="store_true",
        help="recompute the critic's activations: less memory, slower",
    )
    add("--align_overflow", action="store_true", help="fp16: actor and critic skip overflowing steps together")

    add = parser.add_argument_group("hybrid engine").add_argument
    add(
        "--enable_hybrid_engine",
        action="store_true",
        help="generate fast: ZeRO-3 weights gathered once, LoRA folded in, finished rows leave the batch (off: by "
        "generate() on the training engine as it is, under ZeRO-3 layer by layer for every token)",
    )
    add(
        "--hybrid_engine_backend",
        choices=["auto", "own", "transformers", "deepspeed", "vllm"],
        default="auto",
        help="who generates: own (this project's loop), transformers (its generate()), deepspeed (its kernels, CUDA "
        "only), vllm (an engine of vLLM in each rank, fed with the actor's weights before each phase); auto: own where "
        "its greedy tokens equal those of generate() on a check batch, else transformers",
    )
    add(
        "--vllm_gpu_memory_utilization",
        type=share,
        default=None,
        help="share of a GPU's memory that vLLM has for weights and KV cache while it generates (training gets it "
        f"back); None: {GPU_MEMORY_UTILIZATION}",
    )
    add(
        "--vllm_kv_cache_gib",
        type=above_zero,
        default=None,
        help="size of vLLM's KV cache on each rank; None: what that share leaves beside the weights, on a CPU what the "
        "generation batch needs at full length",
    )
    add(
        "--compile_generation",
        action="store_true",
        help="compile the step that makes one token (torch.compile; CUDA graphs on a GPU), over a cache of the full "
        "length: a minute or more at the start; off: as it is",
    )
    add(
        "--rollout_log_probs",
        action="store_true",
        help="take the log-probs that the sampler noted for those of the policy, a forward pass of the actor less per "
        "round (exact up to rounding: watch rollout_log_prob_gap, measured every --log_interval); off: from a pass of "
        "their own",
    )
    add(
        "--rollout_is_clip",
        type=above_zero,
        default=None,
        help="where kernels of the sampler differ (vLLM, 16 bit): each token's policy loss times its probability in "
        "the actor over that in the sampler, at most this (truncated importance sampling; 2 is usual); None for off",
    )
    add("--unpin_actor_parameters", action="store_true", help="gather layer by layer after all: slower, less memory")
    add("--release_inference_cache", action="store_true", help="give cached memory back after each generation phase")
    add(
        "--inference_tp_size",
        type=positive,
        default=1,
        help="neighbouring ranks that generate as one tensor-parallel engine of vLLM; the other backends: only 1",
    )
    add(
        "--tp_gather_partition_size",
        type=positive,
        default=8,
        help="layers gathered at a time with --inference_tp_size above 1",
    )
    add(
        "--enable_mixed_precision_lora",
        action="store_true",
        help="ZeRO++: quantised gathers of frozen weights (CUDA, ZeRO-3, LoRA)",
    )

    add_lora_arguments(parser, "actor_")
    add_lora_arguments(parser, "critic_")
    add = parser.add_argument_group("inspecting and testing").add_argument
    add("--print_answers", action="store_true", help="print prompts and sampled answers of rank 0")
    add("--print_answers_interval", type=positive, default=1, help="steps between printed answers")
    add(
        "--sample_interval",
        type=not_negative,
        default=10,
        help="steps between tables of sampled answers (prompt, answer, score, KL), also in samples.jsonl; 0 for none",
    )
    add("--samples_shown", type=positive, default=4, help="answers in such a table")
    add("--enable_test_mode", action="store_true", help="stop after --test_stop_step steps and save")
    add("--test_stop_step", type=not_negative, default=0, help="steps of test mode")


@dataclass(frozen=True)
class RLHFBatchSizes:
    """The batch arithmetic of step 3, per device."""

    generation_batch: int  # answers sampled at a time
    rounds: int  # rounds of generation before each update
    micro_batch: int  # answers per forward pass of an update
    accumulation: int  # forward passes per optimizer step
    answers_per_prompt: int = 1

    @classmethod
    def of(cls, args) -> "RLHFBatchSizes":
        """The sizes that the flags ask for.

        Raises:
            UserError: sizes that do not divide, with the arithmetic.
        """
        generation, micro = args.per_device_generation_batch_size, args.per_device_training_batch_size
        accumulation, rounds = args.gradient_accumulation_steps, args.generation_batches
        if (generation * rounds) % micro:
            raise UserError(
                f"--per_device_generation_batch_size {generation} x --generation_batches {rounds} = "
                f"{generation * rounds} answers do not divide into --per_device_training_batch_size {micro}"
            )
        passes = generation * rounds // micro
        if accumulation > passes:
            # The policy does not move before an optimizer step, so more rounds first is the same as accumulating over
            # updates.
            if accumulation % passes:
                raise UserError(
                    f"--gradient_accumulation_steps {accumulation} is no multiple of the {passes} forward passes that "
                    f"{generation} x {rounds} answers in micro-batches of {micro} make"
                )
            rounds *= accumulation // passes
        elif passes % accumulation:
            raise UserError(
                f"{generation} x {rounds} answers in micro-batches of {micro} make {passes} forward passes, "
                f"which do not divide by --gradient_accumulation_steps {accumulation}"
            )
        return cls(generation, rounds, micro, accumulation, args.num_generations_per_prompt)

    @property
    def prompts_per_round(self) -> int:
        return self.generation_batch // self.answers_per_prompt

    @property
    def rows_per_update(self) -> int:
        return self.generation_batch * self.rounds

    @property
    def steps_per_pass(self) -> int:
        """Optimizer steps in one pass over the answers of an update."""
        return self.rows_per_update // (self.micro_batch * self.accumulation)

    def updates(self, prompts: int, ranks: int) -> int:
        """Updates in one pass over so many prompts; rounds of generation that fill no update are dropped.

        Raises:
            UserError: too few prompts for one.
        """
        rows = self.prompts_per_round * ranks
        updates = prompts // rows // self.rounds
        if updates == 0:
            raise UserError(
                f"{prompts} prompts do not fill one update of {self.rounds} x {rows} prompts; lower "
                "--per_device_generation_batch_size or --gradient_accumulation_steps, or give more data"
            )
        return updates

    def explain(self) -> str:
        prompts = f", {self.answers_per_prompt} to each prompt" if self.answers_per_prompt > 1 else ""
        return (
            f"batch per device: {self.rounds} x {self.generation_batch} answers generated{prompts} "
            f"= {self.rows_per_update} per update = {self.steps_per_pass} optimizer steps "
            f"x {self.accumulation} forward passes x {self.micro_batch} answers"
        )


def check_rlhf(args, ranks: int | None = None) -> None:
    """Refuse combinations of step 3 that cannot work; settle the flags that depend on others.

    Args:
        ranks: of another machine that the run is planned for; None: it is to run here, with what is installed here.

    Raises:
        UserError: with the arithmetic or the reason.
    """
    check_models(args, "actor_model_name_or_path", "critic_model_name_or_path")
    RLHFBatchSizes.of(args)
    if args.only_optimize_lora and args.actor_lora_dim == 0 and args.critic_lora_dim == 0:
        raise UserError("--only_optimize_lora trains nothing without --actor_lora_dim or --critic_lora_dim")
    check_save_lora_adapters(args)
    check_grad_accum_dtype(args)
    for flag in ("actor_zero_stage", "critic_zero_stage"):
        setattr(args, flag, working_stage(getattr(args, flag), args, f"--{flag}"))
    if args.offload and args.actor_zero_stage == args.critic_zero_stage == 0:
        raise UserError(
            "--offload moves what ZeRO manages to host memory; it needs --actor_zero_stage or "
            "--critic_zero_stage 1, 2 or 3"
        )
    _check_generation(args)
    if ranks is None:
        _check_machine(args)
    ranks = get_world_size() if ranks is None else ranks
    if ranks % args.inference_tp_size:
        raise UserError(f"--inference_tp_size {args.inference_tp_size} does not divide the {ranks} ranks of this run")
    if args.quantize is not None:
        raise UserError(
            "--quantize is not available in step 3: for generation LoRA is folded into the weights, which packed codes "
            "cannot take. Give it to step 1 and 2, whose models are whole; --actor_lora_dim with --only_optimize_lora "
            "and --actor_zero_stage 3 save memory here"
        )
    _check_precision(args)
    for stage in (args.actor_zero_stage, args.critic_zero_stage):
        check_config_file(args, stage)
    if args.do_sample and args.top_p == 0:
        raise UserError("--top_p 0 leaves no token to sample from; 1 samples from all")
    if args.enable_test_mode and args.test_stop_step < 1:
        raise UserError("--enable_test_mode needs --test_stop_step 1 or more")
    _check_rewards(args)


def _check_generation(args) -> None:
    """The flags of the hybrid engine against each other."""
    if args.unpin_actor_parameters and not args.enable_hybrid_engine:
        raise UserError("--unpin_actor_parameters says how --enable_hybrid_engine gathers; it does nothing without it")
    if args.hybrid_engine_backend != "auto" and not args.enable_hybrid_engine:
        raise UserError(
            f"--hybrid_engine_backend {args.hybrid_engine_backend} says how --enable_hybrid_engine generates; without "
            "it generate() does"
        )
    if args.compile_generation and (
        not args.enable_hybrid_engine
        or args.hybrid_engine_backend in ("transformers", "deepspeed", "vllm")
        or (args.unpin_actor_parameters and args.actor_zero_stage == 3)
    ):
        raise UserError(
            "--compile_generation compiles the loop of --enable_hybrid_engine (backend auto or own), "
            "over whole weights (no --unpin_actor_parameters)"
        )
    _check_rollout_log_probs(args)
    if args.inference_tp_size > 1 and args.hybrid_engine_backend != "vllm":
        raise UserError(
            "--inference_tp_size above 1 needs --hybrid_engine_backend vllm: elsewhere each rank generates with the "
            "whole gathered model"
        )
    _check_vllm(args)


def _check_machine(args) -> None:
    """What the flags need of the machine that this process runs on."""
    on_cuda = get_accelerator().device_name() == "cuda"
    if args.hybrid_engine_backend == "deepspeed" and not on_cuda:
        raise UserError(
            "--hybrid_engine_backend deepspeed: DeepSpeed's generation kernels need CUDA, and this machine computes "
            f"on {get_accelerator().device_name()}; use auto"
        )
    if args.hybrid_engine_backend == "vllm":
        check_vllm("--hybrid_engine_backend vllm")
    if args.enable_mixed_precision_lora and not on_cuda:
        raise UserError("--enable_mixed_precision_lora: ZeRO++'s quantised gathers need CUDA")


def _check_rollout_log_probs(args) -> None:
    """The flags that use the sampler's log-probs against the backend that would have to note them."""
    if args.rollout_log_probs and args.rollout_is_clip is not None:
        raise UserError(
            "--rollout_is_clip weighs by a scoring pass, which --rollout_log_probs leaves out: leave one of them out"
        )
    for flag, value in (("--rollout_log_probs", args.rollout_log_probs), ("--rollout_is_clip", args.rollout_is_clip)):
        if value and (not args.enable_hybrid_engine or args.hybrid_engine_backend in ("transformers", "deepspeed")):
            raise UserError(
                f"{flag} needs the log-probs of the sampler, which generate() does not note: add "
                "--enable_hybrid_engine with --hybrid_engine_backend own or vllm, or leave it out"
            )


def _check_vllm(args) -> None:
    """The flags of vLLM against each other."""
    if args.hybrid_engine_backend != "vllm":
        for flag in ("vllm_kv_cache_gib", "vllm_gpu_memory_utilization"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} needs --hybrid_engine_backend vllm")
        return
    if args.unpin_actor_parameters:
        raise UserError(
            "--unpin_actor_parameters gathers layer by layer for every token; vLLM holds a whole copy of the weights, "
            "which are handed over layer by layer once in a phase: leave it out"
        )
    if 0 < args.temperature < COLDEST and args.do_sample:
        raise UserError(
            f"--temperature {args.temperature}: vLLM samples at {COLDEST} or more; 0 takes the likeliest token"
        )


def vllm_settings(args) -> VllmSettings | None:
    """How step 3's flags set up an engine of vLLM; None where another backend generates."""
    if args.hybrid_engine_backend != "vllm":
        return None
    return VllmSettings(
        max_length=args.max_prompt_seq_len + args.max_answer_seq_len,
        max_rows=args.per_device_generation_batch_size,
        cuts=args.do_sample and (args.top_k > 0 or args.top_p < 1),
        tensor_parallel=args.inference_tp_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization or GPU_MEMORY_UTILIZATION,
        kv_cache_gib=args.vllm_kv_cache_gib,
    )


def _check_precision(args) -> None:
    """Overflow agreement and ZeRO++ against precision and stages."""
    if args.align_overflow and args.dtype == "fp32":
        raise UserError("--align_overflow: fp32 gradients do not overflow, and no step is skipped for it")
    if args.align_overflow and args.dtype == "bf16" and 3 in (args.actor_zero_stage, args.critic_zero_stage):
        raise UserError("--align_overflow: DeepSpeed's ZeRO-3 looks for overflows in fp16 alone, before the step")
    if not args.enable_mixed_precision_lora:
        return
    if args.actor_zero_stage != 3 or args.actor_lora_dim == 0:
        raise UserError("--enable_mixed_precision_lora needs --actor_zero_stage 3 and --actor_lora_dim above 0")
    if args.enable_ema:
        raise UserError(
            "--enable_mixed_precision_lora keeps frozen weights quantised: --enable_ema cannot average them"
        )


def _check_losses(args) -> None:
    """The flags of advantages and of the clip against the estimator and the number of updates."""
    estimator = args.advantage_estimator
    if args.scale_group_rewards is not None and estimator != "grpo":
        raise UserError(
            f"--scale_group_rewards and its --no- say whether grpo divides by the group's std; {estimator} divides by "
            "none: leave it out, or take --advantage_estimator grpo"
        )
    if estimator == "grpo" and args.scale_group_rewards is None:
        args.scale_group_rewards = True
    if args.drop_groups_without_spread and estimator == "gae":
        raise UserError(
            "--drop_groups_without_spread: gae compares an answer with what the critic expects, not with the others to "
            "its prompt, and learns from all of them: leave it out, or take --advantage_estimator rloo or grpo"
        )
    one_step = args.ppo_epochs == 1 and RLHFBatchSizes.of(args).steps_per_pass == 1
    if args.cliprange_high is not None and one_step and not (args.actor_dropout or args.rollout_log_probs):
        raise UserError(
            "--cliprange_high: with --ppo_epochs 1 and one optimizer step per update the policy has not moved when the "
            "loss is taken, its ratio is 1, and nothing is clipped: more passes, or a smaller "
            "--per_device_training_batch_size; or leave it out"
        )


def _check_rewards(args) -> None:
    """What scores an answer, what an advantage is, and which models that takes; settles the flags that depend on it."""
    estimator, answers = args.advantage_estimator, args.num_generations_per_prompt
    if args.per_device_generation_batch_size % answers:
        raise UserError(
            f"--per_device_generation_batch_size {args.per_device_generation_batch_size} answers do not divide into "
            f"--num_generations_per_prompt {answers}"
        )
    if args.whiten_advantages is None:
        args.whiten_advantages = estimator == "gae"
    _check_losses(args)
    if estimator != "gae":
        if answers < 2:
            raise UserError(
                f"--advantage_estimator {estimator} compares the answers to one prompt: --num_generations_per_prompt "
                "must be 2 or more"
            )
        if args.critic_lora_dim or args.align_overflow:
            raise UserError(
                f"--advantage_estimator {estimator} has no critic: leave out --critic_lora_dim, --align_overflow"
            )
    if args.reward_model_weight == 0:
        if not args.reward_function:
            raise UserError("--reward_model_weight 0 leaves nothing that scores: give a --reward_function")
        if args.normalize_reward:
            raise UserError(
                "--normalize_reward scales the reward model's scores, which --reward_model_weight 0 leaves out"
            )
    needs_model = args.reward_model_weight != 0 or estimator == "gae"
    if needs_model and args.critic_model_name_or_path is None:
        raise UserError(
            "--critic_model_name_or_path is needed: the reward model and, with gae, the critic start from it. "
            "--reward_model_weight 0 with --advantage_estimator rloo or grpo does without"
        )
    if not needs_model:
        args.critic_model_name_or_path = None
    if args.reward_model_weight == 0 and args.offload_reward_model:
        raise UserError("--offload_reward_model: --reward_model_weight 0 leaves the reward model out")
    if args.offload and estimator != "gae" and args.actor_zero_stage == 0:
        raise UserError(f"--offload: {estimator} trains the actor alone, and that needs --actor_zero_stage 1, 2 or 3")
    if not (args.only_optimize_lora and args.actor_lora_dim):
        args.separate_ref = True
    elif args.offload_reference_model and not args.separate_ref:
        raise UserError(
            "--offload_reference_model: under --only_optimize_lora the actor without its adapters is the reference; "
            "add --separate_ref for one of its own"
        )
