"""How much memory a run will take, from configurations alone: no weight is read and no large tensor is made.

    config ──> the model on the meta device (shapes without numbers), LoRA and checkpointing as in the run
           ──> a forward and backward pass over it, counting the bytes that are alive   (activations, logits, KV cache)
           ──> what DeepSpeed 0.19.8 keeps of its weights at each ZeRO stage           (states, buffers, copies)
           ──> phases of a step, each with everything that is alive in it; the peak is the largest

All sizes are bytes on one rank. Model states are those of ZeRO (Rajbhandari et al., 2020,
https://arxiv.org/abs/1910.02054, section 3: 16-bit Adam keeps 2 + 2 + 12 bytes per parameter); buffers and copies are
what DeepSpeed's code allocates, named in ``trained_engine``.
"""

from dataclasses import dataclass, field
from functools import cached_property

from utils.ds_utils import get_eval_ds_config, get_train_ds_config, merge_config_file
from utils.model.soft_prompt import make_soft_prompt_model
from utils.planning.engine_memory import Bytes, EngineMemory, Machine, frozen_engine, trained_engine
from utils.planning.meta_model import MetaModel, PassMemory, heap_footprint


@dataclass(frozen=True)
class Phase:
    """A moment of a run.

    Args:
        extra: bytes of one rank beside what is always there. once: bytes of one rank of a node alone.
        passing: of a pass in it, counted in ``extra``.
    """

    name: str
    extra: Bytes
    once: int = 0
    passing: PassMemory = field(default_factory=lambda: PassMemory(0, 0, 0, 0))

    @property
    def mapped(self) -> int:
        """Bytes of ``extra`` in large blocks."""
        return self.extra.device + self.extra.host - self.passing.peak + self.passing.mapped


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

    def at(self, phase: Phase) -> Bytes:
        """All bytes of a rank in a phase."""
        return sum((engine.always for engine in self.engines), self.machine.baseline) + phase.extra

    def needs(self, phase: Phase) -> tuple[int, int]:
        """(bytes of a device, bytes of a node's host memory); on a CPU the first is a rank's share of the second."""
        total = self.at(phase)
        if self.machine.on_cpu:
            rank = total.device + total.host
            return rank, rank * self.machine.ranks_per_node + phase.once
        return total.device, total.host * self.machine.ranks_per_node + phase.once

    @cached_property
    def kept_by_heap(self) -> int:
        """On a CPU: bytes of small blocks that were freed, and of holes between them, while the large ones are at their
        peak: the heap, from which glibc serves blocks below HEAP_BLOCK, hardly ever shrinks."""
        if not self.machine.on_cpu:
            return 0
        states = [size for engine in self.engines for size in engine.small_states]
        heap = heap_footprint([phase.passing.events for phase in self.phases], states)
        if heap is None:
            heap = max(phase.passing.heap for phase in self.phases)
        mapped = max(phase.mapped for phase in self.phases)
        live = max(phase.extra.device + phase.extra.host for phase in self.phases)
        return max(0, heap + mapped - live)

    @property
    def device_peak(self) -> tuple[int, str]:
        """(bytes, name of the phase)."""
        size, name = max((self.needs(phase)[0], phase.name) for phase in self.phases)
        return size + self.kept_by_heap, name

    @property
    def host_peak(self) -> tuple[int, str]:
        size, name = max((self.needs(phase)[1], phase.name) for phase in self.phases)
        return size + self.kept_by_heap * self.machine.ranks_per_node, name

    @property
    def fits(self) -> bool:
        host = self.machine.host is None or self.host_peak[0] <= self.machine.host
        return host and (self.machine.on_cpu or self.device_peak[0] <= self.machine.device)


def _pass_phases(engine: EngineMemory, name: str, passing: PassMemory, more: Bytes) -> list[Phase]:
    """The phases of a training pass: its own, and the reduction of gradients after it. ``more``: there meanwhile."""
    arriving = 0 if engine.collects else engine.arriving
    during = passing.peak + engine.waiting + engine.gather_training + arriving
    return [
        Phase(f"{name}: forward and backward", Bytes(during) + more, passing=passing),
        Phase(f"{name}: gradients reduced", engine.reduced + more),
    ]


def _loading_phase(engines: list[EngineMemory]) -> list[Phase]:
    """Only weights are there yet; the phase takes everything else that is always there off again."""
    files = max((engine.loading.host for engine in engines), default=0)
    if not files:
        return []
    later = sum((size for engine in engines for part, size in engine.resident.items() if part != "parameters"), Bytes())
    return [Phase("loading (the first rank)", Bytes(-later.device, -later.host), files)]


def _config_of_engine(args, stage: int, overrides=True, **options) -> dict:
    offload = args.offload and stage > 0
    config = get_train_ds_config(offload, args.dtype, stage, **options)
    return merge_config_file(config, args.deepspeed_config_overrides) if overrides else config


def _lora_options(args, prefix: str = "") -> dict:
    dim = getattr(args, f"{prefix}lora_dim")
    if dim == 0:
        return {}
    names = {"module_name": "lora_module_name", "scaling": "lora_scaling", "dropout": "lora_dropout"}
    lora = {key: getattr(args, prefix + name) for key, name in names.items()} | {"dim": dim}
    return {"lora": lora, "only_lora": args.only_optimize_lora}


def models_of_step(args, step: int, configs: dict, tokenizer=None) -> dict[str, MetaModel]:
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
    if step < 3:
        common |= {"dropout": args.dropout, "quantize": args.quantize, "double": args.quantize_double}
        kind, keep = ("causal", ()) if step == 1 else ("reward", ("v_head.weight",))
        if getattr(args, "soft_prompt", None) is not None:
            common["wrap"] = lambda model: make_soft_prompt_model(model, tokenizer, args)
        return {
            "model": MetaModel(configs["model"], kind, args.dtype, keep_trainable=keep, **_lora_options(args), **common)
        }
    common["dropout"] = 0.0
    models = {
        "actor": MetaModel(
            configs["actor"], "causal", args.dtype, **_lora_options(args, "actor_"), **common | _dropout(args, "actor")
        )
    }
    if args.separate_ref:
        models["reference"] = MetaModel(configs["actor"], "causal", args.dtype, trains=False, **common)
    if args.enable_ema:
        lora = _lora_options(args, "actor_")
        models["EMA"] = MetaModel(configs["actor"], "causal", "fp32", trains=False, **lora, **common)
    if args.advantage_estimator == "gae":
        lora = _lora_options(args, "critic_")
        options = common | _dropout(args, "critic")
        models["critic"] = MetaModel(
            configs["critic"], "reward", args.dtype, keep_trainable=("v_head.weight",), **lora, **options
        )
    if args.reward_model_weight:
        models["reward"] = MetaModel(configs["critic"], "reward", args.dtype, trains=False, **common)
    return models


def _dropout(args, name: str) -> dict:
    return {"dropout": getattr(args, f"{name}_dropout") or 0.0}


def engines_of_step(args, step: int, models: dict[str, MetaModel], machine: Machine) -> dict[str, EngineMemory]:
    """The engines of a step by name, with what they keep all the time; arguments as for ``estimate``."""
    accumulation = args.gradient_accumulation_steps
    if step < 3:
        config = _config_of_engine(args, args.zero_stage)
        return {"model": trained_engine("model", models["model"], config, machine, accumulation)}
    if args.unsupervised_dataset_name:
        accumulation = max(2, accumulation)  # the ptx pass adds to the gradients of the policy's
    stage = {"actor": args.actor_zero_stage, "critic": args.critic_zero_stage}
    frozen = {
        "reference": (stage["actor"], args.offload_reference_model, args.dtype),
        "EMA": (stage["actor"], False, "fp32"),
        "reward": (stage["critic"], args.offload_reward_model, args.dtype),
    }
    engines = {}
    for name, model in models.items():
        if name in stage:
            config = _config_of_engine(args, stage[name])
            engines[name] = trained_engine(name, model, config, machine, accumulation)
        else:
            of_trained, offload, dtype = frozen[name]
            config = get_eval_ds_config(offload, dtype, 3 if of_trained == 3 or offload else 0)
            engines[name] = frozen_engine(name, model, config, machine)
    return engines


def states_alone(engines: dict[str, EngineMemory], machine: Machine) -> Estimate:
    """What the engines keep all the time: quickly known, and less than a run takes."""
    return Estimate(machine, list(engines.values()), [Phase("weights and states alone", Bytes())])


def estimate(args, step: int, models: dict[str, MetaModel], machine: Machine, both_ways: bool = False) -> Estimate:
    """The memory of a step.

    Args:
        args: the step's arguments, checked. models: of ``models_of_step``.
        both_ways: fill in what passes would keep with checkpointing turned the other way, too.
    """
    engines = engines_of_step(args, step, models, machine)
    result = Estimate(machine, list(engines.values()), _loading_phase(list(engines.values())))
    (_add_supervised if step < 3 else _add_rlhf)(result, engines, args, step, both_ways)
    return result


def _training_pass(result: Estimate, engine: EngineMemory, checkpointing: bool, both_ways: bool, **shape) -> PassMemory:
    """A pass of an engine's model, noted in ``result``."""
    model = engine.model
    passing = model.training(**shape, checkpointing=checkpointing, keep_gradients=engine.collects)
    kept = {checkpointing: passing.kept}
    if both_ways:
        kept[not checkpointing] = model.training(**shape, checkpointing=not checkpointing).kept
    result.activations[engine.name] = (kept.get(False, 0), kept.get(True, 0), checkpointing)
    result.details.setdefault(engine.name, {})["activations, at most"] = passing.peak
    result.details[engine.name]["whole weights (ZeRO-3)"] = engine.gather_training
    return passing


def _add_supervised(result: Estimate, engines: dict[str, EngineMemory], args, step: int, both_ways: bool) -> None:
    engine, length, packed = engines["model"], args.max_seq_len, getattr(args, "packing", False)
    per_row = 1 if step == 1 else 2  # a pair is two rows
    shape = dict(rows=per_row * args.per_device_train_batch_size, length=length, packed=packed)
    passing = _training_pass(result, engine, args.gradient_checkpointing, both_ways, **shape)
    looking = engine.model.looking(per_row * args.per_device_eval_batch_size, length)
    result.phases += [
        Phase("evaluation", Bytes(looking.peak + engine.gather_looking), passing=looking),
        *_pass_phases(engine, "training", passing, Bytes()),
        Phase("optimizer step", engine.step),
    ]


def _add_rlhf(result: Estimate, engines: dict[str, EngineMemory], args, step: int, both_ways: bool) -> None:
    prompt, answer, generated = args.max_prompt_seq_len, args.max_answer_seq_len, args.per_device_generation_batch_size
    length, trained_rows, phases = prompt + answer, args.per_device_training_batch_size, result.phases
    actor = engines["actor"]
    copies = _generation_copies(args, actor, result.machine)
    cache = actor.model.generating(generated, prompt, answer)
    phases.append(Phase("generation", Bytes(cache.peak + sum(copies.values())), passing=cache))
    result.details["actor"] = {"KV cache": cache.kept} | {f"generation: {name}": n for name, n in copies.items()}
    for name, engine in engines.items():
        if name != "EMA":
            looking = engine.model.looking(generated, length, answer if engine.model.kind == "causal" else None)
            seen = Bytes(looking.peak + engine.gather_looking)
            phases.append(Phase(f"{name}: looks at the answers", seen, passing=looking))

    trained = [engines[name] for name in ("actor", "critic") if name in engines]
    left = Bytes()  # gradients of engines whose backward pass has ended
    for engine in trained:
        checkpointing = getattr(args, f"{engine.name}_gradient_checkpointing")
        labels = answer if engine is actor else None
        shape = dict(rows=trained_rows, length=length, labels=labels)
        passing = _training_pass(result, engine, checkpointing, both_ways, **shape)
        if engine is actor and args.unsupervised_dataset_name:
            text = actor.model.training(trained_rows, length, checkpointing)
            passing = max(passing, text, key=lambda memory: memory.peak)
        phases += _pass_phases(engine, engine.name, passing, left)
        left += engine.gradients
    for engine in trained:
        left = Bytes(left.device - engine.gradients.device, left.host - engine.gradients.host)
        phases.append(Phase(f"{engine.name}: optimizer step", engine.step + left))


def _generation_copies(args, actor: EngineMemory, machine: Machine) -> dict[str, int]:
    """Weights that a generation phase has beside the engine's own, by name: bytes."""
    sharded = args.actor_zero_stage == 3
    own_engine = args.enable_hybrid_engine and args.hybrid_engine_backend != "deepspeed"
    whole = own_engine and not args.unpin_actor_parameters
    copies = {"whole weights (ZeRO-3)": actor.gather_whole if whole else actor.gather_looking}
    if own_engine and (whole or not sharded):
        copies["folded LoRA"] = actor.model.folded_bytes
        if machine.on_cpu and args.hybrid_engine_backend in ("auto", "own"):
            copies["fused weights"] = actor.model.fused_bytes()
    return copies
