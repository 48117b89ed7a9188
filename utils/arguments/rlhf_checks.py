"""Flags of step 3 against each other: what cannot work is refused, with the reason."""

from deepspeed.accelerator import get_accelerator

from utils.arguments.model import (
    check_config_file,
    check_grad_accum_dtype,
    check_models,
    check_save_lora_adapters,
    working_stage,
)
from utils.arguments.rlhf_sizes import RLHFBatchSizes
from utils.generation.vllm_backend import COLDEST, GPU_MEMORY_UTILIZATION, VllmSettings, check_vllm
from utils.process.errors import UserError
from utils.process.world import get_world_size


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
    _check_sampling(args)
    if args.enable_test_mode and args.test_stop_step < 1:
        raise UserError("--enable_test_mode needs --test_stop_step 1 or more")
    _check_rewards(args)
    _check_kl_weight(args, ranks)


def _check_sampling(args) -> None:
    """Greedy decoding against the flags of sampling, and against what needs answers that differ."""
    greedy = "--no-do_sample" if not args.do_sample else "--temperature 0" if args.temperature == 0 else None
    if greedy is not None and (args.top_p != 1 or args.top_k):
        raise UserError(
            f"--top_p and --top_k limit what is sampled from; they do nothing with {greedy}: leave them out"
        )
    if not args.do_sample and args.temperature not in (0, 1):
        raise UserError(
            f"--temperature {args.temperature:g} is of sampling; it does nothing with --no-do_sample: leave it out"
        )
    if args.top_p == 0:
        raise UserError("--top_p 0 leaves no token to sample from; 1 samples from all")
    if greedy is None and args.top_k == 1:
        greedy = "--top_k 1"
    if greedy is not None and args.advantage_estimator != "gae":
        raise UserError(
            f"--advantage_estimator {args.advantage_estimator} compares several answers to a prompt, and with {greedy} "
            "they are all the same: nothing would be learned"
        )


def _check_kl_weight(args, ranks: int) -> None:
    """The adaptive KL weight: it starts above 0, and stays there."""
    if args.kl_target is None:
        return
    if args.kl_ctl == 0:
        raise UserError("--kl_target multiplies the KL weight, and --kl_ctl 0 stays 0: give a --kl_ctl to start from")
    answers = RLHFBatchSizes.of(args).rows_per_update * ranks
    if answers >= 5 * args.kl_horizon:
        raise UserError(
            f"--kl_horizon {args.kl_horizon}: an update of 5 times as many answers or more, and this run's have "
            f"{answers}, could make the KL weight 0 or negative: give a longer horizon"
        )


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
    if estimator != "gae":
        for flag, default, what in (
            ("gamma", 1.0, "discounts rewards token by token"),
            ("lam", 0.95, "weighs what the critic expects against rewards"),
            ("cliprange_value", 0.2, "clips the critic's values"),
        ):
            if getattr(args, flag) != default:
                raise UserError(
                    f"--{flag} {getattr(args, flag):g} {what}; {estimator} compares whole answers, without a critic: "
                    "leave it out"
                )
    one_step = args.ppo_epochs == 1 and RLHFBatchSizes.of(args).steps_per_pass == 1
    moves = args.actor_dropout or args.rollout_log_probs or (args.actor_lora_dim and args.actor_lora_dropout)
    if args.cliprange_high is not None and one_step and not moves:
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
