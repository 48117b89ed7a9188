"""How long a step will take, from its arguments and the shapes of its models: what ``step_time`` is given."""

import argparse
from dataclasses import dataclass

from utils.arguments import DPO, RLHFBatchSizes, Step, has_reference_engine, vllm_settings
from utils.perf import matmul_parameters
from utils.planning.machines import GRAPH_LAUNCH, Cluster
from utils.planning.meta_model import MetaModel
from utils.planning.step_time import Rollouts, Shape, Sharding, StepTime, Updates, rlhf_step, supervised_step
from utils.process.errors import UserError


def shape_of(meta: MetaModel) -> Shape:
    """A model's costs. Of a mixture of experts the chosen ones count; windows of attention are taken for whole."""
    model, sizes = meta.model, meta.sizes
    text = model.config.get_text_config() if hasattr(model, "config") else meta.spec.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0
    hidden = text.hidden_size
    head_dim = (getattr(text, "head_dim", None) or hidden // heads) if heads else 0
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return Shape(
        total=sizes.total,
        trained=sizes.trained,
        active=matmul_parameters(model) - _idle_experts(meta, text),
        layers=text.num_hidden_layers,
        width=heads * head_dim,
        kv_width=kv_heads * head_dim,
        hidden=hidden,
        itemsize=meta.itemsize,
    )


def _idle_experts(meta: MetaModel, text) -> int:
    """Weights of experts that a token does not go to."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(text, name, None))), 0)
    chosen = getattr(text, "num_experts_per_tok", None) or experts
    if not experts:
        return 0
    weights = sum(p.numel() for name, p in meta.model.named_parameters() if ".experts." in name)
    return round(weights * (1 - chosen / experts))


def time_of_step(args: argparse.Namespace, step: Step, models: dict[str, MetaModel], cluster: Cluster) -> StepTime:
    """The time of an optimizer step (step 3: of an update). Rows are as long as the arguments let them be.

    Args:
        args: the step's arguments, checked. models: of ``models_of_step``.
    """
    shapes = {name: shape_of(model) for name, model in models.items()}
    if step == 3:
        return _rlhf(args, shapes, models, cluster)
    way = Sharding(args.zero_stage, args.offload, args.gradient_checkpointing)
    reference = None
    if step == DPO and not (args.reference_free or args.precompute_ref_log_probs):
        # Without an engine of its own the model, its adapters left out, is the reference.
        reference = (shapes["reference" if has_reference_engine(args) else "model"], Sharding(way.stage))
    sequences = 1 if step == 1 else getattr(args, "answers_per_row", 2)
    sizes = args.per_device_train_batch_size, args.max_seq_len, args.gradient_accumulation_steps
    return supervised_step(shapes["model"], way, *sizes, cluster, args.dtype, sequences, reference)


def _rlhf(args, shapes: dict[str, Shape], models: dict[str, MetaModel], cluster: Cluster) -> StepTime:
    batch = RLHFBatchSizes.of(args)
    policy = Sharding(args.actor_zero_stage, args.offload, args.actor_gradient_checkpointing)
    critic = Sharding(args.critic_zero_stage, args.offload, args.critic_gradient_checkpointing)
    ways = {
        "actor": policy,
        "critic": critic,
        "EMA": policy,
        "reference": _frozen(policy, args.offload_reference_model),
        "reward": _frozen(critic, args.offload_reward_model),
    }
    scored_by = [] if args.rollout_log_probs else ["actor"]
    scored_by += ["reference" if "reference" in shapes else "actor"]
    scored_by += [name for name in ("critic", "reward") if name in shapes]
    updates = Updates(batch.micro_batch, args.ppo_epochs, batch.accumulation)
    rollouts = _rollouts(args, batch, models["actor"], cluster)
    return rlhf_step(shapes, ways, rollouts, updates, cluster, args.dtype, tuple(scored_by))


def _frozen(of_trained: Sharding, offload: bool) -> Sharding:
    """As get_eval_ds_config has it: whole, or sharded with the engine that trains or where it is on the host."""
    return Sharding(3 if of_trained.stage == 3 or offload else 0, offload)


def _rollouts(args, batch: RLHFBatchSizes, actor: MetaModel, cluster: Cluster) -> Rollouts:
    layer_by_layer = not args.enable_hybrid_engine or args.unpin_actor_parameters
    vllm = vllm_cache(args, actor, cluster)
    graphs = (vllm is not None or args.compile_generation) and not cluster.on_cpu
    return Rollouts(
        rows=batch.generation_batch,
        rounds=batch.rounds,
        prompt=args.max_prompt_seq_len,
        answer=args.max_answer_seq_len,
        vllm=vllm is not None,
        gathers=args.max_answer_seq_len if layer_by_layer else 1,
        tensor_parallel=args.inference_tp_size,
        at_once=None if vllm is None else vllm.at_once,
        launch=GRAPH_LAUNCH if graphs else None,
        answers_per_prompt=batch.answers_per_prompt,
    )


@dataclass(frozen=True)
class VllmCache:
    """What an engine of vLLM holds on one rank.

    Attributes:
        weights, cache: bytes. row: bytes of one answer's keys and values at full length.
    """

    weights: int
    cache: int
    row: int

    @property
    def at_once(self) -> int:
        """Answers at full length that the cache has room for."""
        return self.cache // max(1, self.row)


def vllm_cache(args, actor: MetaModel, cluster: Cluster) -> VllmCache | None:
    """The memory of vLLM's engine on a rank; None where another backend generates.

    Raises:
        UserError: it has no room for a single answer beside the weights.
    """
    settings = vllm_settings(args)
    if settings is None:
        return None
    shape, length = shape_of(actor), args.max_prompt_seq_len + args.max_answer_seq_len
    weights, row = actor.saved_bytes // settings.tensor_parallel, round(shape.cache(1, length))
    if settings.kv_cache_gib is not None or cluster.on_cpu:
        cache = settings.kv_cache_bytes(actor.model.config, actor.itemsize)
    else:
        cache = int(settings.gpu_memory_utilization * cluster.device.memory * 2**30) - weights
    found = VllmCache(weights, cache, row)
    # The rows of all ranks of an engine share its cache, and each rank holds its share of every row.
    if found.at_once < 1:
        raise UserError(
            f"--vllm_gpu_memory_utilization {settings.gpu_memory_utilization:g}: {weights / 2**30:.1f} GiB of weights "
            f"leave {max(0, cache) / 2**30:.1f} GiB for keys and values, and one answer of {length} tokens takes "
            f"{row / 2**30:.2f} GiB; a larger share, or --inference_tp_size"
        )
    return found
