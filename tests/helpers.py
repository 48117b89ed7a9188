"""Tiny tokenizers, models and data, made where a test runs; ways to start a step; comparing what runs left behind."""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from utils.model.model_utils import create_critic_model
from utils.model.tokenizer import load_hf_tokenizer
from utils.run.checkpoint import Checkpoints
from utils.run.results import save_hf_format

PROJECT = Path(__file__).resolve().parents[1]
STEPS = {
    1: PROJECT / "training/step1_supervised_finetuning/main.py",
    2: PROJECT / "training/step2_reward_model_finetuning/main.py",
    3: PROJECT / "training/step3_rlhf_finetuning/main.py",
}
SCRIPTS = PROJECT / "tests/launch/scripts"  # what tests start beside the steps themselves
PYTHONPATH = f"{PROJECT}:{PROJECT / 'tests'}"  # and what these need to find the project and this module
BINARIES = Path(sys.executable).parent
WORDS = ["red", "green", "blue", "seven", "eight", "please", "thanks", "cat", "dog", "house"]
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere")
FAMILIES = {
    **{name: dict(SMALL, model_type=name) for name in LLAMA_LIKE},
    "llama for vllm": dict(SMALL, model_type="llama", head_dim=32),  # its kernels for CPUs want heads of 32, 64 ...
    "qwen3": dict(SMALL, model_type="qwen3", head_dim=8),
    "gemma": dict(SMALL, model_type="gemma", head_dim=8),
    # Caps and factors that small random logits feel.
    "gemma2": dict(SMALL, model_type="gemma2", head_dim=8, final_logit_softcapping=0.5, sliding_window=16),
    "gemma3_text": dict(SMALL, model_type="gemma3_text", head_dim=8, sliding_window=16),
    "granite": dict(SMALL, model_type="granite", logits_scaling=0.3),
    "cohere": dict(SMALL, model_type="cohere", logit_scale=2.0),
    "phi": dict(SMALL, model_type="phi", num_key_value_heads=4),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4),
    "gptj": dict(model_type="gptj", n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "gpt_neo": dict(
        model_type="gpt_neo",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    "gpt_neox": dict(
        model_type="gpt_neox", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
    # As OPT-350m: the embeddings are narrower than the blocks.
    "opt": dict(
        model_type="opt", hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16
    ),
    "bloom": dict(model_type="bloom", hidden_size=32, n_layer=2, n_head=4),
}
# Layers of which some or all see no further than 8 tokens.
_ALTERNATING = dict(SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
WINDOWED = {
    **{name: dict(SMALL, model_type=name, sliding_window=8) for name in ("mistral", "mixtral", "phi3", "starcoder2")},
    **{name: dict(_ALTERNATING, model_type=name) for name in ("cohere2", "olmo3", "exaone4")},
    **{name: dict(_ALTERNATING, model_type=name, head_dim=8) for name in ("gemma2", "gemma3_text", "gpt_oss")},
    "qwen2": dict(SMALL, model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "llama4_text": dict(
        SMALL,
        model_type="llama4_text",
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
    ),
}
# What attention reads is in the bias of its scores (ALiBi), not in positions.
ALIBI = {
    "bloom": FAMILIES["bloom"],
    "mpt": dict(model_type="mpt", d_model=32, n_layers=2, n_heads=4, max_seq_len=512),
    "falcon": dict(
        model_type="falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False
    ),
}
_LINEAR = dict(
    SMALL,
    layer_types=["linear_attention", "full_attention"],
    head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
_MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
_ROUTED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
# Layers that hand a state from token to token: linear attention, state spaces, convolutions.
WITH_STATE = {
    "qwen3_next": dict(_LINEAR, model_type="qwen3_next", shared_expert_intermediate_size=16, **_ROUTED),
    "lfm2": dict(SMALL, model_type="lfm2", layer_types=["conv", "full_attention"]),
    "falcon_h1": dict(SMALL, model_type="falcon_h1", head_dim=8, mamba_d_ssm=64, **_MAMBA),
    "granitemoehybrid": dict(
        SMALL,
        model_type="granitemoehybrid",
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        **_MAMBA,
    ),
    "bamba": dict(SMALL, model_type="bamba", attn_layer_indices=[1], **_MAMBA),
    "mamba2": dict(
        model_type="mamba2", hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1
    ),
    "mamba": dict(model_type="mamba", hidden_size=32, num_hidden_layers=2, state_size=8),
    "rwkv": dict(model_type="rwkv", hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
}
# Feed-forward parts of several experts, whose weights transformers keeps in one parameter [experts, .., ..].
WITH_EXPERTS = {
    "mixtral": dict(SMALL, model_type="mixtral", num_local_experts=4),
    "qwen3_moe": dict(SMALL, model_type="qwen3_moe", head_dim=8, **_ROUTED),
    "olmoe": dict(SMALL, model_type="olmoe", num_experts=4, num_experts_per_tok=2),
    "gpt_oss": WINDOWED["gpt_oss"] | dict(num_local_experts=4),
}


def random_model(config: dict, seed: int = 0, scale: float = 3.0, **options):
    """A model of a family in this process alone, with weights large enough that what a token sees matters."""
    own = {} if config["model_type"] == "mpt" else {"max_position_embeddings": 512}
    config = AutoConfig.for_model(**config, vocab_size=320, bos_token_id=1, eos_token_id=0, pad_token_id=2, **own)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(scale)
    return model


def make_tokenizer(folder: Path, pad: str | None = "<pad>", bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred entries; ``pad`` None leaves it without one, "</s>" makes it the EOS token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = list(dict.fromkeys(token for token in ("</s>", bos, pad) if token))
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" Human: {w} Assistant: {w}." for w in WORDS] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token=bos, pad_token=pad)
    wrapped.save_pretrained(folder)
    return wrapped


def make_model(folder: Path, family: str | dict = "llama", pad: str | None = "<pad>", seed: int = 0) -> Path:
    """A seeded random model of a family (or configuration) with its tokenizer, saved; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder, pad)
    size = 8 * (-(-len(tokenizer) // 8)) + 16  # rows the tokenizer knows nothing of, as many models have them
    config = AutoConfig.for_model(
        **(family if isinstance(family, dict) else FAMILIES[family]),
        vocab_size=size,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def add_end_token(folder: Path, token: str = "<|turn|>") -> int:
    """Give a saved model a second token that ends answers, as chat models have it; returns its id.

    It is special but has no role in the tokenizer, and the generation settings name it beside EOS.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(AddedToken(token, special=True, normalized=False))
    tokenizer.save_pretrained(folder)
    new = tokenizer.convert_tokens_to_ids(token)
    GenerationConfig(eos_token_id=[new, tokenizer.eos_token_id]).save_pretrained(folder)
    return new


def write_pairs(path: Path, count: int) -> Path:
    rows = []
    for i in range(count):
        word, other = WORDS[i % len(WORDS)], WORDS[(i * 7 + 3) % len(WORDS)]
        rows.append(
            {
                "prompt": f" Human: say {word} {other} Assistant:",
                "chosen": f" {word} {other}, thanks.",
                "rejected": f" {other} no {i}" + " no" * (i % 4),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_reward_model(folder: Path, base: Path, seed: int = 5) -> Path:
    """The model of ``base`` with a random head, saved as step 2 saves one; returns the folder."""
    tokenizer = load_hf_tokenizer(base)
    torch.manual_seed(seed)
    save_hf_format(create_critic_model(base, tokenizer), tokenizer, SimpleNamespace(output_dir=str(folder)))
    return folder


def flags(text: str = "", **values) -> list[str]:
    """A list of arguments: the words of ``text``, and ``--name value`` for each keyword, which may hold spaces."""
    return [*text.split(), *(part for name, value in values.items() for part in (f"--{name}", str(value)))]


def surroundings(**changes: str) -> dict[str, str]:
    """The environment of a process: one thread, the tests' interpreter first, nothing of a launch around the tests."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    own = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PATH": f"{BINARIES}:{os.environ['PATH']}"}
    return kept | own | changes


def run_command(command, timeout=240, cwd=None, **environment: str) -> tuple[int, str]:
    """Run a program to its end: (exit code, stdout and stderr together)."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=surroundings(**environment),
        timeout=timeout,
        text=True,
        cwd=cwd,
        check=False,
    )
    return done.returncode, done.stdout


def launch_command(script: int | Path, arguments, launcher: str = "python", ranks: int = 1) -> list[str]:
    """The words that start a step (by its number) or a script under one of the three launchers."""
    starts = {
        "python": [sys.executable],
        "torchrun": [BINARIES / "torchrun", "--standalone", f"--nproc_per_node={ranks}"],
        "deepspeed": [
            *(BINARIES / "deepspeed", "--num_gpus", ranks, "--master_port", 20000 + os.getpid() % 20000),
        ],
    }
    return [str(part) for part in (*starts[launcher], STEPS.get(script, script), *arguments)]


def launch(script: int | Path, arguments, launcher="python", ranks=1, timeout=240, cwd=None, **environment: str):
    """Start a step as a user would, or a script of the tests, which finds the project and these helpers."""
    if script not in STEPS:
        environment = {"PYTHONPATH": PYTHONPATH} | environment
    return run_command(launch_command(script, arguments, launcher, ranks), timeout, cwd, **environment)


def run_in_one_launch(runs, folder: Path, ranks: int = 2, launcher: str = "torchrun") -> str:
    """Many runs in one launch: [(step, arguments) or (step, arguments, steps until it is killed)] -> the console."""
    file = folder / f"{ranks}_ranks.json"
    file.write_text(json.dumps([[step, [*map(str, arguments)], *killed] for step, arguments, *killed in runs]))
    code, console = launch(SCRIPTS / "runs_in_one_launch.py", [file], launcher, ranks, timeout=600)
    assert code == 0, console[-6000:]
    return console


def load_main(step: int):
    """The module of a step's main.py, fresh."""
    spec = importlib.util.spec_from_file_location(f"step{step}_main", STEPS[step])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def killed_after(steps: int | None):
    """While open, a run ends after so many optimizer steps without a word to anyone; None for not at all."""

    class Killed(Exception):
        pass

    def end_step(self, *position):
        original(self, *position)
        if self.steps == steps:
            raise Killed

    original, Checkpoints.end_step = Checkpoints.end_step, end_step
    try:
        with contextlib.suppress(Killed):
            yield
    finally:
        Checkpoints.end_step = original


def slow_pair_loss(chosen_values, rejected_values, chosen, rejected, kind, margin, center_coef):
    """The reward model's loss of one pair, token by token in Python numbers: an independent reference.

    *_values: of each answer's own tokens, without padding; chosen, rejected: their ids.
    """
    if chosen == rejected:
        return 0.0
    longest, both = max(len(chosen), len(rejected)), min(len(chosen), len(rejected))
    start = next((i for i in range(both) if chosen[i] != rejected[i]), both)
    terms = []
    for i in range(start, longest):
        chosen_value = chosen_values[min(i, len(chosen) - 1)]  # the shorter answer keeps its end score
        rejected_value = rejected_values[min(i, len(rejected) - 1)]
        terms.append(math.log1p(math.exp(-(chosen_value - rejected_value - margin))))
    if kind == "end_token":
        terms = terms[-1:]  # there both stand at their ends
    return sum(terms) / len(terms) + center_coef * (chosen_values[-1] + rejected_values[-1]) ** 2


def read_metrics(folder: Path, prefix: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any(name.startswith(prefix + "/") for name in row)]


# ---------------------------------------------------------------- small runs of each step, to compare bit for bit

MEASURED = ("seconds", "time", "per_second", "latency", "tflops", "mfu", "gb_per", "memory_gib")  # and so never equal
SMALL_RUN = "--data_split 1,1,1 --dtype fp32 --max_train_samples 16 --max_eval_samples 8"
SUPERVISED = (
    f"{SMALL_RUN} --per_device_train_batch_size 2 --per_device_eval_batch_size 4 --max_seq_len 48 "
    "--num_train_epochs 2 --dropout 0.1"
)
RLHF = (
    f"{SMALL_RUN} --per_device_generation_batch_size 2 --per_device_training_batch_size 1 "
    "--max_prompt_seq_len 32 --max_answer_seq_len 8 --num_warmup_steps 0 --sample_interval 1 --kl_target 0.1 "
    "--actor_learning_rate 1e-3 --critic_learning_rate 1e-3 --actor_dropout 0.1 --kl_horizon 50"
)


def step_arguments(step: int, models: Path, pairs_folder: Path, cache_folder: Path) -> list[str]:
    """What every small run of a step is started with; ``models`` is what the fixture small_models makes."""
    data = dict(data_path=pairs_folder, data_output_path=cache_folder)
    data |= dict(deepspeed_config_overrides=models / "buckets.json")
    if step < 3:
        return flags(SUPERVISED, model_name_or_path=models / "actor", **data)
    paths = dict(actor_model_name_or_path=models / "actor", critic_model_name_or_path=models / "reward")
    return flags(RLHF, **paths, **data)


def zero_stage(step: int, stage: int) -> str:
    """The flags for a ZeRO stage, of both engines in step 3."""
    return f"--zero_stage {stage}" if step < 3 else f"--actor_zero_stage {stage} --critic_zero_stage {stage}"


def _numbers(folder: Path) -> list[dict]:
    """The rows of a metrics file without what a clock or a memory meter said."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not any(m in name for m in MEASURED)} for row in rows]


def assert_same_run(plain: Path, resumed: Path) -> None:
    assert _numbers(plain) == _numbers(resumed)
    samples = [folder / "samples.jsonl" for folder in (plain, resumed)]
    assert samples[0].exists() == samples[1].exists()
    if samples[0].exists():
        assert samples[0].read_text() == samples[1].read_text()
    files = sorted(file.relative_to(plain) for file in plain.rglob("*.safetensors"))
    assert files
    for file in files:
        want, got = load_file(plain / file), load_file(resumed / file)
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want), file
    configs = [next((folder / files[0].parent).glob("*config.json")).read_text() for folder in (plain, resumed)]
    assert json.loads(configs[0]) == json.loads(configs[1])
