"""Two PPO updates with and without the hybrid engine must be bit-equal: torchrun … generation_on_ranks.py FOLDER

For each ZeRO stage, with LoRA and without: greedy answers of all batches, then all weights and optimizer states.
FOLDER vllm N: by vLLM, of which N ranks form an engine; a process has engines of one size.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from helpers import flags, make_model, make_reward_model, zero_stage
from transformers import AutoModelForCausalLM

from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainer, MicroBatch
from training.step3_rlhf_finetuning.rlhf_engine import DeepSpeedRLHFEngine
from utils import arguments
from utils.data.batching import pad_rows
from utils.generation.hybrid_engine import HybridEngine
from utils.generation.sampling import Decoding, sample_answers
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.console import print_rank_0
from utils.process.launch import init_distributed, run_main
from utils.process.seeds import set_random_seed
from utils.process.world import get_rank

PROMPTS = [[[10, 11, 12], [13], [14, 15, 16, 17, 18], [19, 20]], [[30], [31, 32, 33, 34], [35, 36], [37]]]
PAD = 2  # of make_tokenizer
KEPT = []  # an engine of vLLM that goes takes the process groups of the others along


def tensors_of(value) -> list:
    """All tensors in nested dictionaries and lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def train(folder: Path, more: str) -> tuple[list, list]:
    """Two updates: the answers of this rank, and everything the engines hold afterwards."""
    models = dict(actor_model_name_or_path=folder / "actor", critic_model_name_or_path=folder / "reward")
    text = f"""
        --dtype fp32 --max_answer_seq_len 8 --max_prompt_seq_len 16 --per_device_generation_batch_size 4
        --per_device_training_batch_size 4 --no-do_sample --num_warmup_steps 0 --actor_learning_rate 1e-2 {more}
    """
    args = arguments.build_parser(3).parse_args(flags(text, **models))
    init_distributed(args)
    args = arguments.settle(args, 3)
    set_random_seed(3)
    tokenizer = load_hf_tokenizer(folder / "actor")
    trainer = DeepSpeedPPOTrainer(
        DeepSpeedRLHFEngine(str(folder / "actor"), str(folder / "reward"), tokenizer, args, num_total_iters=10), args
    )
    KEPT.append(trainer.rlhf_engine.generator._vllm)
    ids, mask = pad_rows(PROMPTS[get_rank()], tokenizer.pad_token_id, side="left")
    answers = []
    for step in range(3):
        experience = trainer.generate_experience(ids, mask, step)
        answers.append(experience.input_ids)
        if step < 2:
            trainer.compute_rewards(experience)
            trainer.get_advantages_and_returns(experience)
            trainer.train_rlhf([MicroBatch(experience)])
    state = []
    for engine in (trainer.actor_model, trainer.critic_model):
        state += [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]
        state += tensors_of(engine.optimizer.state_dict())
    return answers, state


def make_actor(folder: Path, family: str) -> None:
    """A random model whose greedy answers differ, and of which some end early."""
    make_model(folder, family)
    tokenizer, model = load_hf_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids, mask = pad_rows(PROMPTS[0], tokenizer.pad_token_id, side="left")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(6)
        decoding = Decoding(8, (tokenizer.eos_token_id,), tokenizer.pad_token_id, len(tokenizer), temperature=0)
        ending = int(sample_answers(model.eval(), ids, mask, decoding).sequences[0, ids.shape[1] + 2])
        rows = model.get_output_embeddings().weight
        rows[[ending, tokenizer.eos_token_id]] = rows[[tokenizer.eos_token_id, ending]]
    model.save_pretrained(folder)


def main():
    folder, backend = Path(sys.argv[1]), "vllm" if len(sys.argv) > 2 else "own"
    more_of_backend = f"--hybrid_engine_backend {backend} --inference_tp_size {' '.join(sys.argv[3:]) or 1}"
    init_distributed(SimpleNamespace(local_rank=-1, comm_timeout=60))
    if get_rank() == 0:
        make_actor(folder / "actor", "llama" if backend == "own" else "llama for vllm")
    dist.barrier()
    make_reward_model(folder / "reward", folder / "actor")
    dist.barrier()
    for stage in range(4):
        for lora in ("", "--actor_lora_dim 2"):
            more = f"{zero_stage(3, stage)} {lora}"
            plain = train(folder, more)
            lengths = [int((row != PAD).sum()) for answers in plain[0] for row in answers[:, 8:]]
            assert len(set(lengths)) > 1 or get_rank() > 0, "some rows should end early"
            for way in ["", "--unpin_actor_parameters"] if stage == 3 and backend == "own" else [""]:
                fast = train(folder, f"{more} --enable_hybrid_engine {more_of_backend} {way}")
                for ours, theirs in zip(fast, plain, strict=True):
                    assert len(ours) == len(theirs) > 2
                    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), (more, way)
                print_rank_0(f"equal: {more} {way}, {len(plain[1])} tensors, lengths {lengths}")
    if backend == "own":
        check_that_ranks_agree(folder / "actor")


def check_that_ranks_agree(actor: Path) -> None:
    """What the start-up check finds on the last rank alone decides for all."""
    if get_rank() == dist.get_world_size() - 1:
        HybridEngine._difference_from_generate = lambda self: "a fault of this rank"
    engine = SimpleNamespace(module=AutoModelForCausalLM.from_pretrained(actor), train=lambda mode=True: None)
    backends = [None] * dist.get_world_size()
    dist.all_gather_object(backends, HybridEngine(engine).backend)
    assert set(backends) == {"transformers"}, backends
    print_rank_0("all ranks fall back")


run_main(main)
