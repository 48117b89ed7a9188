"""Tiny tokenizers, models and data made in the test process; nothing is downloaded and nothing needs a GPU."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PROJECT = Path(__file__).resolve().parents[1]
STEPS = {
    1: PROJECT / "training/step1_supervised_finetuning/main.py",
    2: PROJECT / "training/step2_reward_model_finetuning/main.py",
    3: PROJECT / "training/step3_rlhf_finetuning/main.py",
}
WORDS = ["red", "green", "blue", "seven", "eight", "please", "thanks", "cat", "dog", "house"]
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere")
FAMILIES = {
    **{name: dict(SMALL, model_type=name) for name in LLAMA_LIKE},
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


def pytest_configure(config):
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_answer_to_sigterm():
    """A run that ends by an error leaves its answer to SIGTERM behind, as its process is to end."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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


def make_model(folder: Path, family: str = "llama", pad: str | None = "<pad>", seed: int = 0) -> Path:
    """A seeded random model of a family with its tokenizer, saved; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder, pad)
    size = 8 * (-(-len(tokenizer) // 8)) + 16  # rows the tokenizer knows nothing of, as many models have them
    config = AutoConfig.for_model(
        **FAMILIES[family],
        vocab_size=size,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.jsonl", 60)
    write_pairs(folder / "eval.jsonl", 20)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run_command(command, timeout=240, cwd=None, **environment):
    """Run a program to its end: (exit code, stdout and stderr together)."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        timeout=timeout,
        text=True,
        cwd=cwd,
        check=False,
    )
    return done.returncode, done.stdout


def launch(step: int, arguments, launcher: str = "python", ranks: int = 1, cwd=None):
    """Start a step as a user would, under one of the three launchers."""
    binaries = Path(sys.executable).parent
    command = {
        "python": [sys.executable],
        "torchrun": [binaries / "torchrun", "--standalone", f"--nproc_per_node={ranks}"],
        "deepspeed": [
            binaries / "deepspeed",
            "--num_gpus",
            str(ranks),
            "--master_port",
            str(20000 + os.getpid() % 20000),
        ],
    }[launcher]
    path = f"{binaries}:{os.environ['PATH']}"
    return run_command([*command, STEPS[step], *map(str, arguments)], cwd=cwd, PATH=path)


@pytest.fixture
def run_step(monkeypatch):
    """Run a step's main() inside the test process: run_step(1, [...])."""

    def run(step: int, arguments):
        import importlib.util

        spec = importlib.util.spec_from_file_location(f"step{step}_main", STEPS[step])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [str(STEPS[step]), *map(str, arguments)])
        module.main()

    return run


@contextlib.contextmanager
def killed_after(steps: int | None):
    """While open, a run ends after so many optimizer steps without a word to anyone; None for not at all."""
    from utils.run.checkpoint import Checkpoints

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


@pytest.fixture
def merge_lora(monkeypatch, tmp_path):
    """Run inference/merge_lora.py inside the test process: merge_lora(adapter, flags...) -> the merged folder."""

    def run(adapter: Path, *flags, output: str = "merged") -> Path:
        sys.path.insert(0, str(PROJECT / "inference"))
        import merge_lora

        arguments = ["--adapter", adapter, "--output_dir", tmp_path / output, *flags]
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", *map(str, arguments)])
        merge_lora.main()
        return tmp_path / output

    return run


def read_metrics(folder: Path, prefix: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any(name.startswith(prefix + "/") for name in row)]


# ---------------------------------------------------------------- small runs of each step, to compare bit for bit

MEASURED = ("seconds", "time", "per_second", "latency", "tflops", "gb_per", "memory_gib")  # and so never equal
SMALL_RUN = ["--data_split", "1,1,1", "--dtype", "fp32", "--max_train_samples", 16, "--max_eval_samples", 8]
SUPERVISED = [*SMALL_RUN, "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 4, "--max_seq_len", 48]
SUPERVISED += ["--num_train_epochs", 2, "--dropout", 0.1]
RLHF = [*SMALL_RUN, "--per_device_generation_batch_size", 2, "--per_device_training_batch_size", 1]
RLHF += ["--max_prompt_seq_len", 32, "--max_answer_seq_len", 8, "--num_warmup_steps", 0, "--sample_interval", 1]
RLHF += ["--actor_learning_rate", 1e-3, "--critic_learning_rate", 1e-3, "--actor_dropout", 0.1, "--kl_target", 0.1]
RLHF += ["--kl_horizon", 50]


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """What the steps start from; and a file of plain text."""
    from types import SimpleNamespace

    from utils.model.model_utils import create_critic_model
    from utils.model.tokenizer import load_hf_tokenizer
    from utils.run.results import save_hf_format

    base = tmp_path_factory.mktemp("models")
    actor = make_model(base / "actor")
    tokenizer = load_hf_tokenizer(actor)
    torch.manual_seed(5)
    save_hf_format(create_critic_model(actor, tokenizer), tokenizer, SimpleNamespace(output_dir=str(base / "reward")))
    (base / "text.txt").write_text("".join(f"the house is {color}, thanks.\n" for color in ("red", "blue")) * 20)
    # DeepSpeed reserves 2 GB for each ZeRO-3 engine; many runs in one process could then not fork any more.
    (base / "buckets.json").write_text('{"zero_optimization": {"reduce_bucket_size": 1000000}}')
    return base


def step_arguments(step: int, models, pairs_folder, cache_folder) -> list:
    data = ["--data_path", pairs_folder, "--data_output_path", cache_folder]
    data += ["--deepspeed_config_overrides", models / "buckets.json"]
    if step < 3:
        return [*data, *SUPERVISED, "--model_name_or_path", models / "actor"]
    paths = ["--actor_model_name_or_path", models / "actor", "--critic_model_name_or_path", models / "reward"]
    return [*data, *RLHF, *paths]


@pytest.fixture
def start(small_models, pairs_folder, cache_folder):
    """step -> the arguments every run of it has."""
    return lambda step: step_arguments(step, small_models, pairs_folder, cache_folder)


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
