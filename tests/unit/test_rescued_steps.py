"""A run that ends by an error keeps what it has done, where its ranks can still agree on it: --resume auto goes on."""

import pytest
from helpers import assert_same_run, flags

from utils.process import launch
from utils.process.errors import SharedError, UserError
from utils.run import results
from utils.run.checkpoint import Checkpoints
from utils.run.checkpoint_files import newest_checkpoint
from utils.run.checkpoint_writer import CheckpointWriter

JUDGE = """
from pathlib import Path
calls, away = [], Path(__file__).with_name("away")

def judge(answers):
    calls.extend([1] * away.exists())
    if away.exists() and len(calls) == int(away.read_text()):
        raise ConnectionError("nobody listens")
    return [len(answer) / 10 for answer in answers]
"""


@pytest.fixture
def ended_by(run_step, capsys):
    """Run a step as a process that ends by an error does: ended_by(step, arguments) -> (the error, the console)."""

    def run(step, arguments) -> tuple[Exception, str]:
        try:
            run_step(step, arguments)
        except Exception as error:
            launch._try_to_rescue(error)
            return error, "".join(capsys.readouterr())
        raise AssertionError("it did not fail")

    return run


@pytest.fixture
def judged(start, tmp_path):
    """folder -> the arguments of a run of step 3 whose judge fails in its third step where the file "away" says 3."""
    (tmp_path / "judge.py").write_text(JUDGE)
    more = flags(f"--reward_function {tmp_path}/judge.py:judge --reward_model_weight 0")
    return lambda folder: [*start(3), *more, "--output_dir", tmp_path / folder]


def test_a_judge_that_fails_costs_no_step(run_step, ended_by, judged, tmp_path):
    run_step(3, judged("plain"))
    (tmp_path / "away").write_text("3")
    arguments = [*judged("resumed"), *flags("--checkpoint_steps 50 --resume auto")]
    error, told = ended_by(3, arguments)
    assert f"judge raised ConnectionError at {tmp_path}/judge.py:8: nobody listens" in str(error)
    assert newest_checkpoint(tmp_path / "resumed/checkpoints").state["steps"] == 2
    assert "step-00000002; the same command with --resume auto goes on from there" in told
    (tmp_path / "away").unlink()
    run_step(3, arguments)
    assert_same_run(tmp_path / "plain", tmp_path / "resumed")


def test_nothing_is_written_where_nothing_was_done_or_no_checkpoints_are_kept(ended_by, judged, tmp_path):
    (tmp_path / "away").write_text("1")
    _, told = ended_by(3, [*judged("first"), *flags("--checkpoint_steps 50")])
    assert newest_checkpoint(tmp_path / "first/checkpoints") is None and "--resume" not in told
    (tmp_path / "away").write_text("3")  # the second call of this run
    _, told = ended_by(3, judged("none"))
    assert not (tmp_path / "none/checkpoints").exists() and "--resume" not in told


def test_a_model_that_cannot_be_saved_at_the_end_is_not_lost(run_step, ended_by, start, tmp_path, monkeypatch):
    """The evaluation at the end is on the disk already, and made again: the metrics hold it once."""
    run_step(1, [*start(1), "--output_dir", tmp_path / "plain"])
    arguments = [*start(1), *flags("--checkpoint_steps 50 --resume auto"), "--output_dir", tmp_path / "resumed"]

    def refuse(*_):
        raise SharedError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(results, "save_trained_model", refuse)
        error, told = ended_by(1, arguments)
    assert str(error) == "no space left" and "--resume auto goes on from there" in told
    run_step(1, arguments)
    assert_same_run(tmp_path / "plain", tmp_path / "resumed")


@pytest.mark.parametrize(
    "error, ranks, kept", [(RuntimeError, 1, True), (RuntimeError, 2, False), (SharedError, 2, True)]
)
def test_one_that_is_written_beside_training_is_completed(ended_by, start, tmp_path, monkeypatch, error, ranks, kept):
    end_step = Checkpoints.end_step

    def fail(self, *position):
        if self.steps == 4:
            self._updates = None  # the update of step 5 is made, so that step 4 cannot be saved again
            monkeypatch.setattr("utils.run.checkpoint.get_world_size", lambda: ranks)
            raise error("in step 5")
        if self.steps == 3:
            monkeypatch.setattr(self, "_told_by_ranks", lambda: (None, False))
        end_step(self, *position)

    monkeypatch.setattr(Checkpoints, "end_step", fail)
    found, told = ended_by(1, [*start(1), *flags("--checkpoint_steps 4 --async_checkpoint", output_dir=tmp_path)])
    assert isinstance(found, error)
    assert (newest_checkpoint(tmp_path / "checkpoints") is not None) == kept == ("goes on from there" in told)


def test_a_checkpoint_that_could_not_be_written_is_not_tried_again(ended_by, start, tmp_path, monkeypatch):
    tried = []

    def refuse(self, run, *_):
        tried.append(run.steps)
        raise SharedError("the disk is full")

    monkeypatch.setattr(CheckpointWriter, "_write", refuse)
    error, told = ended_by(1, [*start(1), *flags("--checkpoint_steps 4", output_dir=tmp_path)])
    assert str(error) == "the disk is full" and tried == [4] and "--resume" not in told


def test_what_goes_wrong_in_it_does_not_hide_the_error(ended_by, judged, tmp_path, monkeypatch):
    (tmp_path / "away").write_text("3")
    monkeypatch.setattr(Checkpoints, "save_before_step", lambda self: 1 / 0)
    error, told = ended_by(3, [*judged("out"), *flags("--checkpoint_steps 50")])
    assert isinstance(error, UserError) and "nobody listens" in str(error)
    assert "nothing could be saved after the error: division by zero" in told
