"""What a run writes down, and where else its numbers go."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest

from utils import perf
from utils.arguments import run as run_arguments
from utils.process import console
from utils.process.errors import UserError
from utils.run.metrics import MetricsWriter, make_writer
from utils.run.metrics_file import read_rows


class _Wandb(ModuleType):
    """The interface of wandb and trackio, keeping what it is given."""

    def __init__(self, name, problem=None):
        super().__init__(name)
        self.calls, self.problem = [], problem

    def init(self, **settings):
        if self.problem:
            raise RuntimeError(self.problem)
        self.calls.append(settings)

    def log(self, values, step):
        self.calls.append((values, step))

    def finish(self):
        self.calls.append("finished")


def _args(folder, *report_to):
    return SimpleNamespace(
        overwrite_output_dir=False,
        output_dir=str(folder),
        report_to=report_to,
        run_name=None,
        tensorboard_path=str(folder / "tb"),
        secret=object(),
    )


def test_numbers_go_to_every_tracker_and_text_stays_in_the_file(tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, _Wandb(name))
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    writer = make_writer(_args(tmp_path / "run", "tensorboard", "wandb", "trackio"))
    writer.write(3, {"loss": 0.5, "note": "text", "ratio": math.inf})
    writer.write(4, {"accuracy": 1.0}, "eval")
    writer.close()
    for name, project in (("wandb", "three-steps-to-chat"), ("trackio", "mine")):
        settings, *logged = sys.modules[name].calls
        assert (settings["project"], settings["name"]) == (project, "run")
        assert settings["config"]["output_dir"] == str(tmp_path / "run") and "secret" not in settings["config"]
        first = {"train/loss": 0.5, "train/ratio": math.inf}
        assert logged == [(first, 3), ({"eval/accuracy": 1.0}, 4), "finished"]
    [row] = read_rows(tmp_path / "run", "train")
    assert row == {"step": 3, "time": row["time"], "loss": 0.5, "note": "text", "ratio": None}
    assert next((tmp_path / "run/tb").glob("events.*")).stat().st_size > 0


def test_a_tracker_that_cannot_start_ends_the_run_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", _Wandb("wandb", "no key is set; see wandb login"))
    with pytest.raises(UserError, match="--report_to wandb: no key is set"):
        make_writer(_args(tmp_path, "wandb"))


def test_rows_are_on_the_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == 2.0


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, model_folder, pairs_folder, run_step):
    find_spec = run_arguments.importlib.util.find_spec
    monkeypatch.setattr(
        run_arguments.importlib.util, "find_spec", lambda name: None if name == "trackio" else find_spec(name)
    )
    flags = ["--model_name_or_path", model_folder, "--data_path", pairs_folder, "--report_to", "trackio"]
    with pytest.raises(UserError, match="--report_to trackio needs the package trackio: pip install trackio"):
        run_step(1, flags)


def test_a_log_gets_lines_with_what_is_left_and_the_last_note(monkeypatch, capsys):
    monkeypatch.setattr(console, "PROGRESS_SECONDS", 0)
    bar = console.progress(range(4), "epoch 1/1")
    for i in bar:
        bar.note(f"{i} tokens/s")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[-1] for line in lines] == ["0 tokens/s", "1 tokens/s", "2 tokens/s"]
    assert lines[1].startswith("epoch 1/1 [###############...............] 2/4, 0:00:00 left")


def test_pace_is_tokens_a_second_and_the_highest_memory(monkeypatch):
    monkeypatch.setattr(perf, "peak_memory", lambda: 3 * 2**29)
    assert perf.pace(10_000, 4.0) == "2,500 tokens/s, 1.5 GiB"
