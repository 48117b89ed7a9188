"""How much memory a step will take, from configurations alone: no weight is read and no large tensor is made.

    config ──> model on the meta device, LoRA and checkpointing as in the run                 (meta_model: ModelSpec)
           ──> forward and backward pass over it, counting the bytes that are alive           (meta_model: PassMemory)
           ──> what DeepSpeed keeps of its weights at each ZeRO stage: states, buffers    (engine_memory: EngineMemory)
           ──> phases of the step, each with everything that is alive in it; the largest is the peak   (here: Estimate)

``plan`` asks which settings fit a machine, ``preflight`` is ``--dry_run``. All sizes are bytes on one rank.
"""

from dataclasses import dataclass, field

from utils.arguments import DPO, Step, has_reference_engine, vllm_settings
from utils.ds_utils import TORCH_DTYPES, get_eval_ds_config, get_train_ds_config, merge_config_file
from utils.model.soft_prompt import make_soft_prompt_model
from utils.module.quantize import Packing
from utils.planning.engine_memory import GIB, Bytes, EngineMemory, Machine, frozen_engine, trained_engine
from utils.planning.meta_model import LoRASpec, MetaModel, ModelSpec, PassMemory
from utils.process.errors import UserError

# Added to the bytes alive of a CPU rank, as a part of them: freed blocks that glibc's heap keeps, holes between blocks,
# and what operations allocate out of torch's sight. The baseline (libraries) is measured and gets none. In 12 runs of
# evaluation_scripts/benchmark/memory.py (training_scripts/README.md, "Memory estimates") the peak without the baseline
# was 1.04 to 1.75 times the bytes alive; 0.3 centres the errors: -18 to +18 %, on average -1 %.
CPU_MARGIN = 0.3


@dataclass(frozen=True)
class Phase:
    """A moment of a step.

    Args:
        extra: bytes of one rank beside what is always there. once: bytes of one rank of a node alone.
    """

    name: str
    extra: Bytes
    once: int = 0


@dataclass
class Estimate:
    """What a step will take on one rank of a machine.

    Attributes:
        activations: engine -> (kept without checkpointing, kept with it, whether the run checkpoints); 0: unknown.
        details: engine -> {name: bytes}, parts of phases that a reader wants to see: KV cache, copies, logits.
    """

    machine: Machine
    engines: list[EngineMemory]
    phases: list[Phase]
    activations: dict[str, tuple[int, int, bool]] = field(default_factory=dict)
    details: dict[str, dict[str, int]] = field(default_factory=dict)

    def needs(self, phase: Phase) -> tuple[int, int]:
        """(bytes of a device, bytes of a node's host memory); on a CPU the first is a rank's share of the second."""
        machine, baseline = self.machine, self.machine.baseline
        alive = sum((engine.states for engine in self.engines), phase.extra)
        if machine.on_cpu:
            rank = baseline.device + baseline.host + round((1 + CPU_MARGIN) * (alive.device + alive.host))
            return rank, rank * machine.ranks_per_node + phase.once
        alive += baseline
        return alive.device, alive.host * machine.ranks_per_node + phase.once

    @property
    def device_peak(self) -> tuple[int, str]:
        """(bytes, name of the phase)."""
        return max((self.needs(phase)[0], phase.name) for phase in self.phases)

    @property
    def host_peak(self) -> tuple[int, str]:
        return max((self.needs(phase)[1], phase.name) for phase in self.phases)

    @property
    def fits(self) -> bool:
        host = self.machine.host is None or self.host_peak[0] <= self.machine.host
        return host and (self.machine.on_cpu or self.device_peak[0] <= self.machine.device)


# ---------------------------------------------------------------- the models and engines of a step


def _lora(args, prefix: str = "") -> LoRASpec | None:
    names = ("lora_module_name", "lora_dim", "lora_scaling", "lora_dropout")
    lora = LoRASpec(*(getattr(args, prefix + name) for name in names), args.only_optimize_lora)
    return lora if lora.dim else None


def models_of_step(args, step: Step, configs: dict, tokenizer=None) -> dict[str, MetaModel]:
    """The models of a step, by engine.

    Args:
        args: the step's arguments, checked.
        configs: configurations of transformers, by "model", or "actor" and "critic".
        tokenizer: the embedding grows to hold it, if it is given.

    Raises:
        UserError: a LoRA scope that matches nothing.
    """
    common = dict(
        attn_implementation=args.attn_implementation,
        tokenizer_size=0 if tokenizer is None else len(tokenizer),
        trust_remote_code=args.trust_remote_code,
    )
    if step == 3:
        specs = _rlhf_specs(args, configs, common)
    else:
        specs = {"model": _supervised_spec(args, step, configs["model"], tokenizer, common)}
        if step == DPO and has_reference_engine(args):
            specs["reference"] = _frozen_spec(configs["model"], "causal", args.dtype, common)
    return {name: MetaModel(spec) for name, spec in specs.items()}


def _frozen_spec(config, kind: str, dtype: str, common: dict, **options) -> ModelSpec:
    return ModelSpec(config, kind, dtype, trains=False, dropout=0.0, **options, **common)


def _supervised_spec(args, step: Step, config, tokenizer, common: dict) -> ModelSpec:
    kind, options = "reward" if step == 2 else "causal", {"lora": _lora(args), "dropout": args.dropout}
    if args.quantize is not None:
        compute_dtype = TORCH_DTYPES[args.quantize_compute_dtype]
        options["packing"] = Packing(args.quantize, args.quantize_double, compute_dtype)
    if step == 1 and args.soft_prompt is not None:
        options["wrap"] = lambda model: make_soft_prompt_model(model, tokenizer, args)
    return ModelSpec(config, kind, args.dtype, **options, **common)


def _rlhf_specs(args, configs: dict, common: dict) -> dict[str, ModelSpec]:
    def trained(name: str, kind: str) -> ModelSpec:
        dropout = getattr(args, f"{name}_dropout") or 0.0
        return ModelSpec(configs[name], kind, args.dtype, lora=_lora(args, f"{name}_"), dropout=dropout, **common)

    specs = {"actor": trained("actor", "causal")}
    if args.separate_ref:
        specs["reference"] = _frozen_spec(configs["actor"], "causal", args.dtype, common)
    if args.enable_ema:
        specs["EMA"] = _frozen_spec(configs["actor"], "causal", "fp32", common, lora=_lora(args, "actor_"))
    if args.advantage_estimator == "gae":
        specs["critic"] = trained("critic", "reward")
    if args.reward_model_weight:
        specs["reward"] = _frozen_spec(configs["critic"], "reward", args.dtype, common)
    return specs


def engines_of_step(args, step: Step, models: dict[str, MetaModel], machine: Machine) -> dict[str, EngineMemory]:
    """The engines of a step by name, with what they keep all the time; arguments as for ``estimate``."""
    accumulation = args.gradient_accumulation_steps
    if step == 3 and args.unsupervised_dataset_name:
        accumulation = max(2, accumulation)  # the ptx pass adds to the gradients of the policy's

    def trained(name: str, stage: int) -> EngineMemory:
        config = get_train_ds_config(
            args.offload and stage > 0, args.dtype, stage, grad_accum_dtype=args.grad_accum_dtype
        )
        config = merge_config_file(config, args.deepspeed_config_overrides)
        engine = trained_engine(name, models[name], config, machine, accumulation)
        if args.async_checkpoint:
            engine.resident["copy for a checkpoint"] = Bytes(host=_copied_for_checkpoint(engine, stage))
        return engine

    def frozen(name: str, of_trained: int, offload: bool, dtype: str) -> EngineMemory:
        config = get_eval_ds_config(offload, dtype, 3 if of_trained == 3 or offload else 0)
        engine = frozen_engine(name, models[name], config, machine)
        if args.async_checkpoint and name == "EMA":
            engine.resident["copy for a checkpoint"] = Bytes(host=engine.states.device + engine.states.host)
        return engine

    stage = args.zero_stage if step != 3 else args.actor_zero_stage  # of the policy
    makers = {
        "model": lambda: trained("model", stage),
        "actor": lambda: trained("actor", stage),
        "reference": lambda: frozen("reference", stage, args.offload_reference_model, args.dtype),
        "EMA": lambda: frozen("EMA", stage, False, "fp32"),
        "critic": lambda: trained("critic", args.critic_zero_stage),
        "reward": lambda: frozen("reward", args.critic_zero_stage, args.offload_reward_model, args.dtype),
    }
    return {name: makers[name]() for name in models}


def _copied_for_checkpoint(engine: EngineMemory, stage: int) -> int:
    """Bytes of rank 0's copy with --async_checkpoint: the optimizer's states and, below stage 3, the trained weights
    in the model's precision (DeepSpeed's two files of a rank)."""
    saved = (engine.resident.get(part, Bytes()) for part in ("fp32 weights", "optimizer states"))
    weights = engine.model.sizes.trained * engine.model.itemsize if stage < 3 else 0
    return sum(size.device + size.host for size in saved) + weights


VLLM_ITSELF = 190 * 2**20  # measured with version 0.32 on a CPU around a model of 0.1 MB, when it had answered


# ---------------------------------------------------------------- the phases of a step


def states_alone(engines: dict[str, EngineMemory], machine: Machine) -> Estimate:
    """What the engines keep all the time: quickly known, and less than a run takes."""
    return Estimate(machine, list(engines.values()), [Phase("weights and states alone", Bytes())])


def estimate(args, step: Step, models: dict[str, MetaModel], machine: Machine, both_ways: bool = False) -> Estimate:
    """The memory of a step.

    Args:
        args: the step's arguments, checked. models: of ``models_of_step``.
        both_ways: fill in what passes would keep with checkpointing turned the other way, too.
    """
    engines = engines_of_step(args, step, models, machine)
    if step == 3 and machine.on_cpu:
        engines["actor"].resident |= {name: Bytes(n) for name, n in _vllm(args, engines["actor"], machine).items()}
    result = Estimate(machine, list(engines.values()), _loading_phase(list(engines.values())))
    if step == 3:
        _add_rlhf(result, engines, args, both_ways)
    else:
        _add_supervised(result, engines, args, step, both_ways)
    return result


def _loading_phase(engines: list[EngineMemory]) -> list[Phase]:
    """Only weights are there yet; the phase takes everything else that is always there off again."""
    files = max(engine.loading for engine in engines)
    if not files:
        return []
    later = sum((size for engine in engines for part, size in engine.resident.items() if part != "parameters"), Bytes())
    return [Phase("loading (the first rank)", Bytes() - later, files)]


def _training_pass(result: Estimate, engine: EngineMemory, checkpointing: bool, both_ways: bool, **shape) -> PassMemory:
    """A pass of an engine's model, noted in ``result``."""
    model = engine.model
    memory = model.training(**shape, checkpointing=checkpointing, keep_gradients=engine.keeps_gradients)
    kept = {checkpointing: memory.kept}
    if both_ways:
        kept[not checkpointing] = model.training(**shape, checkpointing=not checkpointing).kept
    result.activations[engine.name] = (kept.get(False, 0), kept.get(True, 0), checkpointing)
    result.details.setdefault(engine.name, {})["activations, at most"] = memory.peak
    result.details[engine.name]["whole weights (ZeRO-3)"] = engine.gathered.training
    return memory


def _training_phases(engine: EngineMemory, name: str, peak: int, others: Bytes) -> list[Phase]:
    """A training pass that takes ``peak``, and the reduction of gradients after it. ``others``: there meanwhile."""
    during = peak + engine.accumulated + engine.gathered.training + (0 if engine.keeps_gradients else engine.buckets)
    return [
        Phase(f"{name}: forward and backward", Bytes(during) + others),
        Phase(f"{name}: gradients reduced", engine.reduction + others),
    ]


def _add_supervised(result: Estimate, engines: dict[str, EngineMemory], args, step: Step, both_ways: bool) -> None:
    engine = engines["model"]
    # A pair is two sequences, a ranked list as many as it has answers, where preflight has looked.
    length, per_row = args.max_seq_len, 1 if step == 1 else getattr(args, "answers_per_row", 2)
    rows, packed = per_row * args.per_device_train_batch_size, step == 1 and args.packing
    training = _training_pass(
        result, engine, args.gradient_checkpointing, both_ways, rows=rows, length=length, packed=packed
    )
    scoring = engine.model.scoring(per_row * args.per_device_eval_batch_size, length)
    result.phases += [
        Phase("evaluation", Bytes(scoring.peak + engine.gathered.scoring)),
        *_reference_phases(engines, max(rows, per_row * args.per_device_eval_batch_size), length),
        *_training_phases(engine, "training", training.peak, Bytes()),
        Phase("optimizer step", engine.step),
    ]


def _reference_phases(engines: dict[str, EngineMemory], rows: int, length: int) -> list[Phase]:
    """Of DPO, where the reference has an engine of its own."""
    if "reference" not in engines:
        return []
    reference = engines["reference"]
    peak = reference.model.scoring(rows, length).peak + reference.gathered.scoring
    return [Phase("reference: scores the answers", Bytes(peak))]


def _add_rlhf(result: Estimate, engines: dict[str, EngineMemory], args, both_ways: bool) -> None:
    prompt, answer, generated = args.max_prompt_seq_len, args.max_answer_seq_len, args.per_device_generation_batch_size
    length, rows, actor = prompt + answer, args.per_device_training_batch_size, engines["actor"]
    copies = _generation_copies(args, actor, result.machine)
    by_vllm = args.hybrid_engine_backend == "vllm"
    generation = PassMemory(0, 0) if by_vllm else actor.model.generating(generated, prompt, answer)
    result.phases.append(Phase("generation", Bytes(generation.peak + sum(copies.values()))))
    result.details["actor"] = {"KV cache": generation.kept} | {f"generation: {name}": n for name, n in copies.items()}
    for name, engine in engines.items():
        if name != "EMA":
            labels = answer if engine.model.spec.kind == "causal" else None
            scoring = engine.model.scoring(generated, length, labels)
            result.phases.append(Phase(f"{name}: scores the answers", Bytes(scoring.peak + engine.gathered.scoring)))

    trained = [engines[name] for name in ("actor", "critic") if name in engines]
    left = Bytes()  # gradients of engines whose backward pass has ended
    for engine in trained:
        checkpointing = getattr(args, f"{engine.name}_gradient_checkpointing")
        shape = dict(rows=rows, length=length, labels=answer if engine is actor else None)
        peak = _training_pass(result, engine, checkpointing, both_ways, **shape).peak
        if engine is actor and args.unsupervised_dataset_name:
            peak = max(peak, actor.model.training(rows, length, checkpointing).peak)
        result.phases += _training_phases(engine, engine.name, peak, left)
        left += engine.gradients
    for engine in trained:
        left -= engine.gradients
        result.phases.append(Phase(f"{engine.name}: optimizer step", engine.step + left))


@dataclass(frozen=True)
class VllmCache:
    """What an engine of vLLM holds on one rank. The ranks of an engine share their caches, each a part of every answer.

    Attributes:
        weights, cache: bytes. row: bytes of the keys and values of one answer with its prompt, at full length.
    """

    weights: int
    cache: int
    row: int

    @property
    def at_once(self) -> int:
        """Answers of a rank that the cache has room for at full length."""
        return self.cache // max(1, self.row)


def vllm_cache(args, actor: MetaModel, device: int | None) -> VllmCache | None:
    """The memory of vLLM's engine on a rank; None where another backend generates.

    Args:
        device: bytes of a device; None where the devices are CPUs.

    Raises:
        UserError: it has no room for a single answer beside the weights.
    """
    settings = vllm_settings(args)
    if settings is None:
        return None
    length, (_, kv_width) = args.max_prompt_seq_len + args.max_answer_seq_len, actor.attention_widths
    row = 2 * actor.spec.config.get_text_config().num_hidden_layers * kv_width * actor.itemsize * length
    weights, share = actor.saved_bytes // settings.tensor_parallel, settings.gpu_memory_utilization
    if settings.kv_cache_gib is not None or device is None:
        cache = settings.kv_cache_bytes(actor.model.config, actor.itemsize)
    else:
        cache = int(share * device) - weights
    if cache < row:
        raise UserError(
            f"--vllm_gpu_memory_utilization {share:g}: beside {weights / GIB:.1f} GiB of weights "
            f"{max(0, cache) / GIB:.2f} GiB are left for keys and values, and one answer of {length} tokens takes "
            f"{row / GIB:.2f} GiB; give a larger share or --inference_tp_size"
        )
    return VllmCache(weights, cache, row)


def _vllm(args, actor: EngineMemory, machine: Machine) -> dict[str, int]:
    """What an engine of vLLM takes of a rank: on a CPU all the time, on a device while it generates. Bytes by name."""
    held = vllm_cache(args, actor.model, None if machine.on_cpu else machine.device)
    if held is None:
        return {}
    if not machine.on_cpu:
        return {"vLLM: weights": held.weights, "vLLM: KV cache": held.cache}
    # A weight is there as it came and as its product wants it while it is packed, and freed memory is kept.
    return {"vLLM": VLLM_ITSELF, "vLLM: weights": 2 * held.weights, "vLLM: KV cache": held.cache}


def _generation_copies(args, actor: EngineMemory, machine: Machine) -> dict[str, int]:
    """Weights that a generation phase has beside the engine's own, by name: bytes."""
    if args.hybrid_engine_backend == "vllm":
        return {"weights on their way": actor.gathered.scoring} | (
            {} if machine.on_cpu else _vllm(args, actor, machine)
        )
    sharded = args.actor_zero_stage == 3
    own_engine = args.enable_hybrid_engine and args.hybrid_engine_backend != "deepspeed"
    whole = own_engine and not args.unpin_actor_parameters
    copies = {"whole weights (ZeRO-3)": actor.gathered.whole if whole else actor.gathered.scoring}
    if own_engine and (whole or not sharded):
        copies["folded LoRA"] = actor.model.folded_bytes
        if machine.on_cpu and args.hybrid_engine_backend in ("auto", "own"):
            copies["fused weights"] = actor.model.fused_bytes()
    return copies
