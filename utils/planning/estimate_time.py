"""How long a step will take, from its arguments and the shapes of its models: what ``step_time`` is given."""

import argparse
import functools

from utils.arguments import DPO, RLHFBatchSizes, Step, has_reference_engine
from utils.perf import matmul_parameters
from utils.planning.estimate import vllm_cache
from utils.planning.machines import GRAPH_LAUNCH, Cluster
from utils.planning.meta_model import MetaModel
from utils.planning.step_time import Rollouts, Shape, Sharding, StepTime, Updates, rlhf_step, supervised_step


@functools.lru_cache
def shape_of(meta: MetaModel) -> Shape:
    """A model's costs. Of a mixture of experts the chosen ones count; windows of attention are taken for whole."""
    sizes, (width, kv_width) = meta.sizes, meta.attention_widths
    text = meta.spec.config.get_text_config()
    return Shape(
        total=sizes.total,
        trained=sizes.trained,
        active=matmul_parameters(meta.model),
        layers=text.num_hidden_layers,
        width=width,
        kv_width=kv_width,
        hidden=text.hidden_size,
        itemsize=meta.itemsize,
        vocabulary=text.vocab_size if meta.spec.kind == "causal" else 0,
    )


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
        reference = (
            shapes["reference" if has_reference_engine(args) else "model"],
            _frozen(way, args.offload_reference_model),
        )
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
    vllm = vllm_cache(args, actor, None if cluster.on_cpu else int(cluster.device.memory * 2**30))
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
