"""The check of a machine's GPUs: how it runs its stages, and some of them at toy sizes on a CPU."""

import importlib.util
import json
import sys
import time

import pytest
from helpers import PROJECT, run_command

sys.modules["check"] = check = importlib.util.module_from_spec(
    spec := importlib.util.spec_from_file_location("check", PROJECT / "tests/gpu/check.py")
)
spec.loader.exec_module(check)

PYTHON = [sys.executable, "-S", "-c"]


def run_stages(folder, *stages, seconds=60, **options):
    runner = check.Runner(folder, seconds)
    runner.run(list(stages), **options)
    return runner.results


def test_a_stage_that_takes_too_long_is_ended_with_all_its_processes_and_the_next_one_runs(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(alive)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    slow = check.Stage("slow", 1, [[*PYTHON, parent]])
    fine = check.Stage("fine", 20, [[*PYTHON, "print('figures', '{\"x\": 1.5}')"]], check.measured)
    start = time.monotonic()
    first, second = run_stages(tmp_path, slow, fine)
    assert (first.outcome, second.outcome, second.figures) == ("timed out", "ok", {"x": 1.5})
    time.sleep(max(0, 5 - (time.monotonic() - start)))
    assert not alive.exists()


def test_a_failure_is_told_by_its_error_and_ends_only_its_own_stage(tmp_path):
    commands = [[*PYTHON, "print('one')"], [*PYTHON, "raise SystemExit('\\nerror: no such flag')"], [*PYTHON, "1"]]
    failed, silent, expected, wrong = run_stages(
        tmp_path,
        check.Stage("failed", 20, commands),
        check.Stage("no_figures", 20, [commands[0]], check.measured),
        check.Stage("expected", 20, commands[:2], error="no such flag"),
        check.Stage("wrong", 20, commands[:2], error="another error"),
    )
    assert (failed.outcome, failed.note) == ("failed", "error: no such flag")
    assert silent.outcome == "failed" and "no figures" in silent.note
    assert (expected.outcome, expected.note) == ("ok", "error: no such flag")
    assert wrong.outcome == "failed"
    assert "$" in (tmp_path / "logs/failed.log").read_text() and "one" in (tmp_path / "logs/failed.log").read_text()


def test_a_second_check_begins_each_stage_with_an_empty_folder(tmp_path):
    (tmp_path / "again").mkdir()
    (tmp_path / "demo").mkdir()
    [result] = run_stages(
        tmp_path, check.Stage("again", 20, [[*PYTHON, f"import os; os.mkdir({str(tmp_path / 'again')!r})"]])
    )
    assert result.outcome == "ok" and (tmp_path / "demo").is_dir()


def test_of_a_launcher_s_error_behind_our_own_ours_is_told():
    log = "$ torchrun x\nerror: rank 0: no such flag\ntorch.distributed.elastic.ChildFailedError:\n====\n"
    assert check.last_words(log) == "error: rank 0: no such flag"


def test_what_does_not_fit_the_time_or_the_machine_is_skipped_with_the_reason(tmp_path):
    here, late = run_stages(
        tmp_path,
        check.Stage("here", 20, [], missing="flash_attn is not installed"),
        check.Stage("late", 20, []),
        seconds=5,
    )
    assert (here.outcome, here.note) == ("skipped", "flash_attn is not installed")
    assert late.outcome == "skipped" and late.note.endswith("s of LIMIT were left")


def test_stages_run_side_by_side_but_for_those_that_measure_time(tmp_path):
    def times(log: str) -> dict:
        start, end = map(float, log.split()[-2:])
        return {"start": start, "end": end}

    nap = [*PYTHON, "import time; print(time.time()); time.sleep(2); print(time.time())"]
    stages = [check.Stage(name, 20, [nap], times, alone=name == "alone") for name in ("alone", "one", "other")]
    results = run_stages(tmp_path, *stages, together=2)
    assert [result.name for result in results] == ["alone", "one", "other"]
    alone, one, other = (result.figures for result in results)
    assert max(one["start"], other["start"]) < min(one["end"], other["end"])
    assert alone["start"] >= max(one["end"], other["end"])


def test_an_estimate_leaves_out_what_is_there_before_any_model():
    on_gpu = "  before any model      0.53\n 9. memory  ok  30.25 of 79.18 GiB on the device (backward), 4.0 of 99 GiB"
    on_cpu = "  before any model      0.53\n 9. memory  ok  3.25 GiB per rank at most (backward), 4.0 GiB for"
    assert check.estimate_in(on_gpu) == {"estimated GiB": 29.72}
    assert check.estimate_in(on_cpu) == {"estimated GiB": 3.25}


STAGES = "versions|ceilings|demo_model|bf16_z3_deepspeed|flash_attention|too_many_ranks|bench_models|decode_own|scoring"


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_stages_at_toy_sizes_end_in_one_table(tmp_path):
    environment = dict(TINY="1", ONLY=STAGES, OUT=str(tmp_path), LIMIT="560")
    code, console = run_command(["bash", PROJECT / "tests/gpu/run.sh"], timeout=590, **environment)
    assert code == 0, console
    table = (tmp_path / "results.md").read_text()
    assert table in console
    results = {stage["name"]: stage for stage in json.loads((tmp_path / "results.json").read_text())["stages"]}
    assert set(results) == set(STAGES.split("|"))
    skipped = {name for name, stage in results.items() if stage["outcome"] == "skipped"}
    assert "too_many_ranks" in skipped <= {"too_many_ranks", "flash_attention"}
    assert all(stage["outcome"] == "ok" for name, stage in results.items() if name not in skipped)
    for name, figure in {
        "versions": "transformers",
        "ceilings": "bf16 TFLOPs",
        "bf16_z3_deepspeed": "samples/s",
        "decode_own": "batch 8 of the limit",
        "scoring": "differs from a whole softmax by",
    }.items():
        assert figure in results[name]["figures"] and figure in table


@pytest.mark.nightly
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    code, console = run_command(
        ["bash", PROJECT / "tests/gpu/run.sh", "smoke"], OUT=str(tmp_path), CUDA_VISIBLE_DEVICES=""
    )
    assert code == 1 and "error: torch finds no GPU here. TINY=1" in console
