"""Every command that a page prints is run, on models and data of the smallest size."""

import importlib.util
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pages
import pytest
import torch
from helpers import PROJECT, STEPS, make_model, run_command, write_pairs

from utils.model.model_utils import create_critic_model
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import EndOfRun
from utils.run.results import save_hf_format

PROGRAMS = ("python", "bash", "deepspeed", "torchrun", "transformers")
VARIABLE = r"[A-Z_]+=(?:\"[^\"]*\"|\S+) "
COMMAND = rf"(?:{VARIABLE})*(?:{'|'.join(PROGRAMS)}) "
# What else a block of bash may hold: it sets something up.
SET_UP = ("source .venv/bin/activate", "pip install ", "pre-commit install", "#")

# Commands, by how they begin, that are not run here, and why.
ELSEWHERE = {
    "bash tests/gpu/": "needs a GPU; test_gpu_check.py runs it in its small form",
    "TINY=1 bash tests/gpu/": "test_gpu_check.py",
    "LIMIT=": "needs a GPU",
    "bash training_scripts/quickstart.sh": "run below, at a small size",
    "bash tests/run.sh": "what runs this",
    "UPDATE_REFERENCE=1 bash tests/run.sh": "would write the reference curves",
    "bash training_scripts/study.sh": "hours; run by hand for the figures",
    'RANKS=1 ANSWERS=4 SEEDS="1 2 1234" VARIANTS=right bash training_scripts/study.sh': "an hour; run by hand",
    "torchrun --nnodes 1:2": "the name of a mode in a text; test_two_nodes.py runs it",
    "bash training_scripts/real_language.sh": "needs a model of 135 M parameters from a package; run by hand",
    "bash training_scripts/real_model.sh": "needs a model of 135 M parameters from a package; run by hand",
    "python inference/export_checkpoint.py": "needs a run's checkpoint; test_export_checkpoint.py makes some",
    "python evaluation_scripts/make_pairs.py": "needs a model whose answers come to an end; test_make_pairs.py has one",
    "python tests/slow/soak.py": "half an hour, run by hand; test_soak.py is a short one",
    "python evaluation_scripts/benchmark/": "minutes; each is run by hand for the figures",
    "python -m utils.plan": "test_preflight.py plans each step, for a configuration it makes",
    "python -m utils.arguments.table": "test_documentation.py compares the tables that it writes",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 1:2": "needs two nodes; test_two_nodes.py makes them",
    "python inference/serve.py": "test_web_page.py opens it in a browser",
    "transformers serve": "needs a server's packages; test_openai_endpoint.py runs it where they are",
    "python -m pytest tests/launch/test_openai_endpoint.py": "a test of its own",
}
# What stands for a name in the pages.
NAMES = {
    "Dahoas/rm-static": "pairs",
    "SFT_FOLDER": "output/sft",
    "REWARD_FOLDER": "output/reward",
    "FILE_OR_FOLDER": "pairs",
    "FOLDER": "output/sft",
    "BASELINE": "output/sft",
    "FINETUNED": "output/quickstart/step3/actor",
    "OUTPUT_DIR/adapter": "output/lora/adapter",
}
BATCH = "--dtype fp32 --max_train_samples 8 --max_eval_samples 4 --per_device_train_batch_size 4 --max_seq_len 48"
SMALL = {
    1: f"{BATCH} --learning_rate 1e-4",
    2: f"{BATCH} --learning_rate 1e-4",
    3: "--dtype fp32 --max_train_samples 8 --max_prompt_seq_len 32 --max_answer_seq_len 8 "
    "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 --num_warmup_steps 0",
}
# What a step needs and "..." leaves out.
LEFT_OUT = {
    "1": "--model_name_or_path facebook/opt-125m",
    "3": "--actor_model_name_or_path output/sft --critic_model_name_or_path output/reward --output_dir output/rlhf",
}
LORA = "--model_name_or_path output/sft --output_dir output/lora --lora_dim 2 --only_optimize_lora --save_lora_adapters"


def lines_of_bash(page: Path) -> list[str]:
    """The lines of a page's blocks of bash, without comments; a command that is continued or fed by a pipe is one."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", page.read_text(), re.M | re.S)
    lines = "".join(re.sub(r" \\\n\s*", " ", block) for block in blocks).splitlines()
    return [re.sub(r"\s+# .*", "", line).strip().rpartition(" | ")[2] for line in lines if line.strip()]


def commands_of(page: Path) -> list[str]:
    """Those in blocks of bash, and those in the running text."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    inline = [command.replace("\n", " ") for command in re.findall(rf"`({COMMAND}[^`]*)`", text)]
    return inline + [line for line in lines_of_bash(page) if re.match(COMMAND, line)]


COMMANDS = sorted(
    {(page.parent.relative_to(PROJECT), command) for page in pages.PAGES for command in commands_of(page)}
)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory, model_folder):
    """A folder that looks like the project after its pages were followed: tiny models under the names they use."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("training", "inference", "evaluation_scripts", "training_scripts", "utils"):
        (folder / name).symlink_to(PROJECT / name)
    for name in ("opt-1.3b", "opt-350m", "opt-125m"):
        make_model(folder / "facebook" / name, "opt")
    models = folder / "output"
    for name in ("sft", "quickstart/step1", "quickstart/step3/actor", "quickstart/step3/actor_ema"):
        make_model(models / name)
    tokenizer = load_hf_tokenizer(models / "sft")
    torch.manual_seed(5)
    for name in ("reward", "rm", "quickstart/step2"):
        reward = create_critic_model(models / "sft", tokenizer)
        save_hf_format(reward, tokenizer, SimpleNamespace(output_dir=str(models / name)))
    rows = "".join(json.dumps({"step": i, "train/score": i / 2, "train/kl": 0.1}) + "\n" for i in range(3))
    for name in ("quickstart/step3", "a/step3", "b/step3"):
        (models / name).mkdir(parents=True, exist_ok=True)
        (models / name / "metrics.jsonl").write_text(rows)
    (folder / "pairs").mkdir()
    write_pairs(folder / "pairs/train.jsonl", 60)
    write_pairs(folder / "pairs/eval.jsonl", 20)
    write_pairs(models / "votes.jsonl", 30)
    (folder / "run.yaml").write_text("model_name_or_path: facebook/opt-125m\ndata_path: [pairs]\n")
    (folder / "questions.txt").write_text("say red\nsay blue\n")
    (folder / "rewards.py").write_text(
        "def polite(prompts, answers):\n    return [float('please' in answer) for answer in answers]\n\n\n"
        "def short(prompts, answers):\n    return [-float(len(answer)) for answer in answers]\n"
    )
    (folder / "exact.py").write_text(
        "def exact(completions, answer, **columns):\n    return [float(a in c) for c, a in zip(completions, answer)]\n"
    )
    sums = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(20)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return folder


def _words(command: str) -> list[str]:
    return [NAMES.get(word, re.sub(r"^(OUT|MERGED|OUTPUT_DIR)\b", "output/new", word)) for word in shlex.split(command)]


def _run_python(script: Path, arguments: list[str], monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # dataclasses look for the module of their class
    try:
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        module.main()
    except EndOfRun:
        pass  # a command before this one has finished the run that this one resumes
    except SystemExit as ended:
        assert ended.code in (None, 0), ended.code
    finally:
        del sys.modules[script.stem]


@pytest.mark.parametrize("page, command", COMMANDS, ids=[command[:70] for _, command in COMMANDS])
def test_a_command_of_the_pages_works_as_printed(page, command, sandbox, cache_folder, monkeypatch):
    for start, reason in ELSEWHERE.items():
        if command.startswith(start):
            pytest.skip(reason)
    monkeypatch.chdir(sandbox)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))  # a chat ends at once
    words = _words(command)
    environment = {}
    while re.match(VARIABLE, f"{words[0]} "):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if words[0] == "torchrun":  # its own flags end where the script is named
        del words[1 : next(place for place, word in enumerate(words) if word.endswith(".py"))]
    program, script, *arguments = words
    if program == "bash":
        script = str(next(PROJECT.glob(script.replace("...", "training_scripts/step1_*/*")), script))
        binaries = Path(sys.executable).parent
        if "training_scripts" in script:
            environment["DRY_RUN"] = "1"
        code, console = run_command(
            ["bash", script, *arguments], cwd=sandbox, PATH=f"{binaries}:{os.environ['PATH']}", **environment
        )
        assert code == 0, console
        return
    script = next(base / script for base in (sandbox, PROJECT / page) if (base / script).exists())
    step = re.search(r"step(\d)|$", str(script.resolve()))[1]  # None for other scripts
    if step and "..." in arguments and "--data_path" not in arguments:
        place = arguments.index("...")
        arguments[place : place + 1] = LEFT_OUT[step].split()
    arguments = ["pairs" if argument == "..." else argument for argument in arguments]
    data = f"--data_path pairs --data_output_path {cache_folder}"
    if NAMES["OUTPUT_DIR/adapter"] in arguments:
        _run_python(STEPS[1], f"{LORA} {data} {SMALL[1]} --overwrite_output_dir".split(), monkeypatch)
    if step and "--help" not in arguments:  # of a flag that is given twice the last one counts
        # Several pages name the same folders; whoever runs two of their commands gives this flag, too.
        arguments = [*data.split(), *arguments, *SMALL[int(step)].split(), "--overwrite_output_dir"]
    _run_python(script, arguments, monkeypatch)


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_a_block_of_bash_holds_commands_that_are_run_here_and_little_else(page):
    assert [line for line in lines_of_bash(page) if not re.match(COMMAND, line) and not line.startswith(SET_UP)] == []


def test_the_quickstart_runs_whole_at_a_small_size(tmp_path):
    binaries = Path(sys.executable).parent
    code, console = run_command(
        ["bash", PROJECT / "training_scripts/quickstart.sh", tmp_path],
        timeout=400,
        PATH=f"{binaries}:{os.environ['PATH']}",
        VENV=str(binaries.parent),
        RANKS="1",
        SFT_ROWS="64",
        PAIRS="64",
        PROMPTS="128",
        ANSWERS="1",
    )
    assert code == 0, console[-4000:]
    assert "200 held-out prompts, 1 sampled answers to each" in console
    # In full size there are 40 lines more: at most 150.
    assert len(console.splitlines()) <= 90 and "Warning" not in console, console
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["models"]) == ["base", "SFT", "RLHF", "EMA"]
    assert summary["models"]["SFT"]["kl"] == pytest.approx(0, abs=1e-3) and len(summary["ppo"]["score"]) == 2
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
