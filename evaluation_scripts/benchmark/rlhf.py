#!/usr/bin/env python
"""Step 3, measured side by side: ours with each backend of generation, and the plain way of doing the same.

    python evaluation_scripts/benchmark/rlhf.py --models 30m --zero_stages 3 0
    python evaluation_scripts/benchmark/rlhf.py --models opt 30m --backends transformers own
    python evaluation_scripts/benchmark/rlhf.py --model SFT_FOLDER --answer_length 256

The plain way: `module.generate` under the same ZeRO stage, prompts padded to the maximum, logits of every position of
prompt and answer at once in fp32. Models are random but for --model. Answers end where a schedule says, the same for
all ways: rows of "full" never, rows of "varied" at lengths spread evenly from an eighth of the maximum up to it.

Each way runs in processes of its own, so that its peak memory is its own: of the GPU where there is one. Smaller is
faster: --answer_length 32, --varied_batch 0, --repeats 1. With --latency, one process more: the time per token of a
batch of one against the time it takes to read the weights once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from deepspeed.accelerator import get_accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedTokenizerFast

from training.step3_rlhf_finetuning.experience import MicroBatch
from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainer
from training.step3_rlhf_finetuning.rlhf_engine import DeepSpeedRLHFEngine
from utils import arguments
from utils.generation.hybrid_engine import HybridEngine
from utils.model.inputs import model_inputs
from utils.model.model_utils import create_critic_model
from utils.model.tokenizer import load_hf_tokenizer
from utils.perf import matmul_parameters, peak_memory
from utils.precision import default_dtype
from utils.process.launch import COMM_TIMEOUT, init_distributed, run_main
from utils.process.ranks import barrier
from utils.process.seeds import set_random_seed
from utils.process.world import get_rank
from utils.run.results import save_hf_format

MODELS = {
    "opt": dict(hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, num_hidden_layers=4, num_attention_heads=4,
                vocab_size=50272),
    "30m": dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=6,
                num_key_value_heads=6, vocab_size=32000),
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, vocab_size=49152),
}  # fmt: skip
BACKENDS = ("own", "transformers", "vllm")  # of the hybrid engine
EOS, PAD, BOS = 0, 1, 2


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="example: rlhf.py --models 30m --zero_stages 3 --answer_length 32 --skip_step, a minute on two cores",
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["30m"], help="random models: an OPT, llamas of these sizes")
    add("--backends", nargs="+", choices=BACKENDS, default=["own"], help="who generates, in the ways beside the plain")
    add("--model", metavar="FOLDER", help="an actor of your own in their stead (a random value head on it scores)")
    add("--ranks", type=int, default=torch.cuda.device_count() or 2, help="processes; the default is that of all GPUs")
    add("--zero_stages", type=int, nargs="*", choices=range(4), default=[3, 0], help="of actor and critic")
    add("--dtype", choices=["bf16", "fp32", "fp16"], default=default_dtype().dtype, help="of all models")
    add("--batch", type=int, default=4, help="prompts per rank")
    add("--varied_batch", type=int, default=16, help="prompts per rank where answer lengths vary; 0: leave that out")
    add("--prompt_length", type=int, default=128, help="longest prompt in tokens; the shortest is half of it")
    add("--answer_length", type=int, default=128, help="longest answer in tokens")
    add("--repeats", type=int, default=2, help="measurements of each figure, after a warm-up; the fastest counts")
    add("--skip_step", action="store_true", help="generation only, no whole PPO step")
    add("--latency", action="store_true", help="time per token of one prompt, against the memory's speed")
    add("--compiled", action="store_true", help="--latency with --compile_generation too: a minute more")
    add(
        "--cpu_time",
        action="store_true",
        help="processor seconds of rank 0, one thread, in place of the clock's: for a machine shared with others. "
        "With --ranks above 1 waiting counts too",
    )
    add("--timeout", type=int, default=1200, help="seconds for one way of one case")
    for hidden in ("--worker", "--folder", "--way", "--stage"):
        add(hidden, help=argparse.SUPPRESS)
    return parser


# ---------------------------------------------------------------- the parent: one process group per way


def main():
    parser = build_parser()
    args = parser.parse_args()
    if args.cpu_time and torch.cuda.is_available():
        parser.error("--cpu_time counts what the processor does, and here a GPU does the work")
    if args.worker:
        worker = {"case": measure_case, "latency": measure_latency, "make": make_models}[args.worker]
        return run_main(partial(worker, args))
    sources = [args.model] if args.model else args.models
    with tempfile.TemporaryDirectory() as scratch:
        for source in sources:
            folder = Path(scratch) / Path(source).name
            run_worker(args, 1, worker="make", folder=folder, model=source)
            for stage in args.zero_stages:
                figures = {
                    way: run_worker(args, args.ranks, worker="case", folder=folder, way=way, stage=stage)
                    for way in ("plain", *args.backends)
                }
                print(
                    f"\n{source}, ZeRO-{stage}, {args.ranks} ranks, {args.dtype}, batch {args.batch} per rank, prompts "
                    f"{args.prompt_length // 2}-{args.prompt_length}, answers {args.answer_length}"
                )
                print_table(figures)
            if args.latency:
                latency = run_worker(args, 1, worker="latency", folder=folder, stage=0)
                print(f"\n{source}, one prompt, one process: " + ", ".join(f"{k} {v}" for k, v in latency.items()))


def print_table(figures: dict) -> None:
    backends = [way for way in figures if way != "plain"]
    print(f"  {'':44}{'plain':>10}" + "".join(f"{way:>14}     ratio" for way in backends))
    for name, plain in figures["plain"].items():
        ours = "".join(f"{figures[way][name]:14.2f}{plain / figures[way][name]:9.2f}x" for way in backends)
        print(f"  {name:44}{plain:10.2f}{ours}", flush=True)
    for way in backends:
        for name in figures[way].keys() - figures["plain"].keys():
            print(f"  {f'{way}: {name}':44}{figures[way][name]:10.2f}", flush=True)


def run_worker(args, ranks: int, **changed) -> dict:
    """The figures that rank 0 of a worker writes."""
    result = Path(tempfile.mkdtemp()) / "figures.json"
    flags = []
    for name, value in (vars(args) | changed).items():
        if isinstance(value, bool):
            flags += [f"--{name}"] * value
        elif value is not None and not (name == "model" and value in MODELS):
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    flags += ["--models", changed["model"]] if changed.get("model") in MODELS else []
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1" if args.cpu_time else str(max(1, len(os.sched_getaffinity(0)) // ranks))
    }
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *flags],
        env=environment | {"FIGURES": str(result), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=args.timeout,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout[-6000:]}\nthe worker {changed} failed")
    return json.loads(result.read_text()) if result.exists() else {}


def write_figures(figures: dict) -> None:
    if get_rank() == 0:
        Path(os.environ["FIGURES"]).write_text(json.dumps(figures))


# ---------------------------------------------------------------- the workers


def make_models(args) -> None:
    """FOLDER/actor and FOLDER/reward."""
    init_distributed(argparse.Namespace(local_rank=-1, comm_timeout=COMM_TIMEOUT))
    folder = Path(args.folder)
    torch.manual_seed(0)
    if args.model:
        tokenizer = load_hf_tokenizer(args.model)
        actor = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        shape = MODELS[args.models[0]]
        words = {"</s>": EOS, "<pad>": PAD, "<s>": BOS} | {f"w{i}": i for i in range(3, shape["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", bos_token="<s>"
        )
        family = OPTConfig if args.models[0] == "opt" else LlamaConfig
        config = family(
            **shape, max_position_embeddings=4096, tie_word_embeddings=True,
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        )  # fmt: skip
        actor = AutoModelForCausalLM.from_config(config)
    actor.save_pretrained(folder / "actor")
    tokenizer.save_pretrained(folder / "actor")
    critic = create_critic_model(folder / "actor", tokenizer)
    save_hf_format(critic, tokenizer, argparse.Namespace(output_dir=str(folder / "reward")))


def step3_arguments(args, *more):
    """The arguments of step 3 as its main.py settles them."""
    folder, stage = Path(args.folder), str(args.stage)
    flags = [
        "--actor_model_name_or_path", folder / "actor", "--critic_model_name_or_path", folder / "reward",
        "--dtype", args.dtype, "--actor_zero_stage", stage, "--critic_zero_stage", stage,
        "--max_prompt_seq_len", args.prompt_length, "--max_answer_seq_len", args.answer_length,
        "--per_device_generation_batch_size", args.batch, "--per_device_training_batch_size", args.batch, *more,
    ]  # fmt: skip
    parsed = arguments.build_parser(3).parse_args(list(map(str, flags)))
    init_distributed(parsed)
    return arguments.settle(parsed, 3)


class PlainTrainer(DeepSpeedPPOTrainer):
    """Logits of all positions, upcast at once."""

    def _answer_log_probs(self, label_log_probs, input_ids, attention_mask, width, with_entropy=False):
        engine = label_log_probs.engine
        logits = engine(**model_inputs(engine.module, input_ids, attention_mask)).logits[:, :-1]
        log_probs = logits.float().log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)[:, -width:]
        return log_probs, torch.zeros_like(log_probs) if with_entropy else None


def make_trainer(args, step3):
    tokenizer = load_hf_tokenizer(str(Path(args.folder) / "actor"))
    engine = DeepSpeedRLHFEngine(
        step3.actor_model_name_or_path, step3.critic_model_name_or_path, tokenizer, step3, num_total_iters=100
    )
    return (PlainTrainer if args.way == "plain" else DeepSpeedPPOTrainer)(engine, step3)


def make_prompts(args, rows: int, pad_to_max: bool, seed: int, device):
    """[rows, P] ids and mask; lengths spread evenly from half of the longest up to it. The same on every device."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(args.prompt_length // 2, args.prompt_length, rows + 1).long()[:-1]
    lengths = lengths[torch.randperm(rows, generator=generator)]
    width = args.prompt_length if pad_to_max else int(lengths.max())
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    ids = torch.randint(3, 20000, (rows, width), generator=generator).masked_fill(mask == 0, PAD)
    return ids.to(device), mask.to(device)


def ends_at(lengths, trainer):
    """Rows get their EOS at these lengths, and no end token before; longer than the limit: never."""
    eos, lengths = trainer.tokenizer.eos_token_id, lengths.to(trainer.actor_model.device)

    def rewrite(logits, rows, position):
        logits[:, trainer.end_token_ids] = -torch.inf
        logits[:, eos] = torch.where(lengths[rows] == position + 1, 1e4, -torch.inf).to(logits.dtype)
        return logits

    return rewrite


def vllm_ends_at(lengths, trainer):
    """``HybridEngine.generate`` with the ends of ``ends_at``, for vLLM, which hands out no logits: by length limits."""
    generator, eos = trainer.rlhf_engine.generator, trainer.tokenizer.eos_token_id
    engine, limits = generator._vllm, iter(())
    sampling_params = type(engine)._sampling_params

    def limited(decoding, seed):
        decoding = replace(decoding, max_new_tokens=min(next(limits), decoding.max_new_tokens), eos_token_ids=())
        params = sampling_params(engine, decoding, seed)
        params.logit_bias = dict.fromkeys(trainer.end_token_ids, -100.0)
        return params

    def generate(prompts, mask, decoding):
        nonlocal limits
        limits, engine._sampling_params = iter(lengths.tolist()), limited
        rollout = type(generator).generate(generator, prompts, mask, decoding)
        for row, length in enumerate(lengths.tolist()):
            if length <= rollout.width:
                rollout.sequences[row, prompts.shape[1] + length - 1] = eos
        return rollout

    return generate


def schedules(args, rows: int) -> dict:
    spread = torch.linspace(args.answer_length // 8, args.answer_length, rows).long()
    return {
        "full": torch.full((rows,), args.answer_length + 1),
        "varied": spread[torch.randperm(rows, generator=torch.Generator().manual_seed(1))],
    }


def fastest(args, action) -> float:
    """Seconds, ranks starting together; work that is only queued on an accelerator is waited for."""
    clock = time.process_time if args.cpu_time else time.perf_counter

    def together() -> float:
        get_accelerator().synchronize()
        barrier()
        return clock()

    action()
    seconds = []
    for _ in range(args.repeats):
        start = together()
        action()
        seconds.append(together() - start)
    return min(seconds)


def measure_case(args) -> None:
    """Seconds of generation and of whole PPO steps, and the peak memory, of one way at one ZeRO stage."""
    hybrid = [] if args.way == "plain" else ["--enable_hybrid_engine", "--hybrid_engine_backend", args.way]
    trainer = make_trainer(args, step3_arguments(args, *hybrid))
    set_random_seed(1 + get_rank())
    cases = [("full", args.batch)] + [("varied", args.varied_batch)] * (args.varied_batch > 0)
    figures = {}
    for what, measure in [("generation", measure_generation)] + [("PPO step", measure_step)] * (not args.skip_step):
        for lengths, rows in cases:
            ids, mask = make_prompts(args, rows, args.way == "plain", get_rank(), trainer.actor_model.device)
            ends = schedules(args, rows)[lengths]
            generator = trainer.rlhf_engine.generator
            if args.way == "vllm":
                generator.generate = vllm_ends_at(ends, trainer)
            else:
                generator.generate = partial(type(generator).generate, generator, rewrite_logits=ends_at(ends, trainer))
            figures[f"{what}, batch {rows}, {lengths} lengths, s"] = measure(args, trainer, ids, mask)
    if args.way == "vllm":
        figures["weights handed over, s"] = generator.gather_time
    figures["peak memory of rank 0, MB"] = peak_memory() / 2**20
    write_figures(figures)


def measure_generation(args, trainer, ids, mask) -> float:
    return fastest(args, lambda: trainer.rlhf_engine.generator.generate(ids, mask, trainer.decoding()))


def measure_step(args, trainer, ids, mask) -> float:
    def step():
        experience = trainer.generate_experience(ids, mask)
        trainer.compute_rewards(experience)
        trainer.get_advantages_and_returns(experience)
        for start in range(0, len(ids), args.batch):
            trainer.train_rlhf([MicroBatch(experience[start : start + args.batch])])

    return fastest(args, step)


def measure_latency(args) -> None:
    """Time per token of one prompt, and what share of it reading every weight once would take."""
    args.way, args.batch = "own", 1
    trainer = make_trainer(args, step3_arguments(args, "--enable_hybrid_engine"))
    device = trainer.actor_model.device
    ids, mask = make_prompts(args, 1, False, 0, device)
    decoding, block = trainer.decoding(), torch.ones(2**27, device=device)
    bandwidth = block.nbytes / fastest(args, block.sum)
    weights = matmul_parameters(trainer.actor_model) * (4 if args.dtype == "fp32" else 2)
    rewrite = ends_at(schedules(args, 1)["full"], trainer)
    figures = {"read bandwidth": f"{bandwidth / 1e9:.1f} GB/s", "weights": f"{weights / 1e6:.0f} MB"}
    generators = {"plain": HybridEngine(trainer.actor_model, False), "ours": trainer.rlhf_engine.generator}
    if args.compiled:
        length = args.prompt_length + args.answer_length
        generators["compiled"] = HybridEngine(trainer.actor_model, backend="own", compiled_length=length)
    for way, generator in generators.items():
        seconds = fastest(args, lambda g=generator: g.generate(ids, mask, decoding, rewrite_logits=rewrite))
        seconds /= args.answer_length
        figures[way] = f"{seconds * 1e3:.1f} ms per token = {weights / bandwidth / seconds:.0%} of the limit"
    write_figures(figures)


if __name__ == "__main__":
    main()
