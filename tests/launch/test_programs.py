"""Scripts as programs: chat and comparison say what they say in this process, reports start without torch."""

import io
import subprocess
import sys

import pytest
from helpers import PROJECT, flags, make_model, surroundings
from transformers import AutoModelForCausalLM

from evaluation_scripts import prompt_eval
from inference import chatbot

CHATBOT = PROJECT / "inference/chatbot.py"


def run_script(command, typed=""):
    """(exit code, stdout, stderr) of a program that is run from the root folder."""
    done = subprocess.run(
        [*map(str, command)], input=typed, capture_output=True, text=True, timeout=120, cwd="/", env=surroundings(),
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_chat_in_a_pipe(model_folder, monkeypatch, capsys):
    typed = "say red\n\nclear\nsay blue\nquit\nsay green\n"
    arguments = flags("--greedy --device cpu --max_new_tokens 12", path=model_folder)
    code, printed, errors = run_script([sys.executable, CHATBOT, *arguments], typed)
    assert code == 0, errors
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **kwargs: None, raising=False)
    chatbot.main(arguments)
    assert printed == capsys.readouterr().out
    assert printed.count("Assistant: ") == 2


def test_a_path_without_a_model_is_an_error_and_no_traceback(tmp_path):
    code, _, errors = run_script([sys.executable, CHATBOT, "--path", tmp_path / "none"])
    assert code != 0
    assert "error: no such model folder" in errors
    assert "Traceback" not in errors


def test_run_prompt_compares_from_any_folder(model_folder, tmp_path, capsys):
    prompts, other = tmp_path / "prompts.txt", make_model(tmp_path / "other", seed=1)
    prompts.write_text("say red\n\nsay blue\n")
    more = flags("--max_new_tokens 12 --device cpu", prompts_file=prompts)
    script = PROJECT / "evaluation_scripts/run_prompt.sh"
    code, printed, errors = run_script(["bash", script, model_folder, other, *more])
    assert code == 0, errors
    models = dict(model_name_or_path_baseline=model_folder, model_name_or_path_finetune=other)
    prompt_eval.main([*flags(**models), *more])
    assert printed == capsys.readouterr().out
    assert printed.count("==========finetune: Greedy=========") == 2


@pytest.mark.parametrize("script", ["run_prompt.sh", "run_rw_eval.sh"])
def test_shell_scripts_say_how_they_are_used(script):
    code, _, errors = run_script(["bash", PROJECT / "evaluation_scripts" / script])
    assert code == 2
    assert "usage:" in errors


def test_an_adapter_is_folded_by_a_program(tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "base"))
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    command = [sys.executable, PROJECT / "inference/merge_lora.py", "--adapter", tmp_path / "adapter"]
    code, printed, errors = run_script([*command, "--output_dir", tmp_path / "merged"])
    assert code == 0, errors
    assert "2 layers folded" in printed
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


LIBRARIES_OF_TRAINING = {"torch", "transformers", "deepspeed", "datasets", "matplotlib"}


def imported_by(*arguments) -> tuple[set[str], str]:
    """(modules that a Python process imports, what it prints)."""
    code, printed, errors = run_script([sys.executable, "-X", "importtime", *arguments])
    assert code == 0, errors
    return {line.rpartition("|")[2].strip() for line in errors.splitlines() if line.startswith("import time:")}, printed


@pytest.mark.parametrize("script", ["plot_run.py", "run_report.py", "sweep_report.py", "study_report.py"])
def test_scripts_that_only_read_metrics_start_without_the_libraries_of_training(script):
    """Their --help answers at once: importing torch, transformers or deepspeed takes seconds."""
    imported, printed = imported_by(PROJECT / "evaluation_scripts" / script, "--help")
    assert "usage:" in printed and "argparse" in imported
    assert imported.isdisjoint(LIBRARIES_OF_TRAINING)


@pytest.mark.parametrize("module", ["process.errors", "process.console", "process.world", "run.metrics_file"])
def test_errors_and_console_need_none_of_the_libraries_of_training(module):
    code = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); import utils.{module}"
    imported, _ = imported_by("-c", code)
    assert f"utils.{module}" in imported and imported.isdisjoint(LIBRARIES_OF_TRAINING)
