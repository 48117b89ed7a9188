"""Flags of step 3."""

import argparse

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
)
from utils.generation.vllm_backend import GPU_MEMORY_UTILIZATION


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
        help="keep a separate copy as the reference even with --only_optimize_lora, where the actor without its "
        "adapters could serve",
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
    add("--top_k", type=not_negative, default=0, help="sample from this many of the most probable tokens; 0 for all")
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
        help="KL in nats per answer that an adaptive KL weight steers to; None for a fixed weight",
    )
    add("--kl_horizon", type=positive, default=10000, help="with --kl_target: answers over which the KL weight adapts")
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
        help="subtracted from the score of an answer without EOS, in units of the score; with --normalize_reward those "
        "are standard deviations, and the reward model's score of such an answer counts as its mean at most; 0 for "
        "neither",
    )
    add("--gamma", type=probability, default=1.0, help="discount per token; 1 for none")
    add("--lam", type=probability, default=0.95, help="GAE's lambda: 0 trusts the critic, 1 the rewards")
    add(
        "--advantage_estimator",
        choices=["gae", "rloo", "grpo"],
        default="gae",
        help="gae: PPO with a critic. Without a critic an answer is compared with the others to its prompt: rloo "
        "subtracts their mean reward; grpo subtracts the group's mean and divides by its std, with the KL penalty "
        "(k3) in the loss",
    )
    add(
        "--whiten_advantages",
        action=on_off,
        default=None,
        help="normalise advantages to mean 0 and std 1 over all ranks; None for on with gae (published scripts: off), "
        "off with rloo and grpo",
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
        help="rloo, grpo: leave out of the update the prompts whose answers all got the same score: they teach "
        "nothing and dilute the mean of the loss; groups_without_spread in the metrics counts them; off: keep them",
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
        help="functions that score each answer, added to the reward model's score; the names of a function's "
        "parameters say what it gets: prompts, answers, columns of the data; none for off",
    )
    add(
        "--reward_model_weight",
        type=finite,
        default=1.0,
        help="weight of the reward model's score beside --reward_function; 0 to do without the reward model",
    )
    add("--enable_ema", action="store_true", help="keep an fp32 moving average of the actor and save it too")
    add(
        "--ema_decay",
        type=probability,
        default=0.992,
        help="decay of the moving average: the share of it that stays at each applied step",
    )

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
        help="what generates: own (this project's loop), transformers (its generate()), deepspeed (its kernels, CUDA "
        "only), vllm (an engine of vLLM in each rank, which gets the actor's weights before each round); auto: own "
        "where its greedy tokens equal those of generate() on a check batch, else transformers",
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
        help="compile the decoding step (torch.compile; CUDA graphs on a GPU), over a KV cache of the full length: "
        "takes a minute or more at the start; off: not compiled",
    )
    add(
        "--rollout_log_probs",
        action="store_true",
        help="use the log-probs that were noted while sampling as the old policy's, which saves a forward pass of the "
        "actor per round (exact up to rounding: watch rollout_log_prob_gap, measured every --log_interval); off: "
        "compute them in a pass of their own",
    )
    add(
        "--rollout_is_clip",
        type=above_zero,
        default=None,
        help="truncated importance sampling, where the sampler computes otherwise than training does (vLLM, 16 bit): "
        "each token's policy loss is multiplied by its probability in the actor over that in the sampler, at most "
        "this; 2 is usual; None for off",
    )
    add(
        "--unpin_actor_parameters",
        action="store_true",
        help="gather ZeRO-3 weights layer by layer while generating: slower, less memory",
    )
    add(
        "--release_inference_cache",
        action="store_true",
        help="give the GPU's cached memory back after each round of generation",
    )
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
        help="accepted for old command lines and ignored: weights are gathered once per round of generation",
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
