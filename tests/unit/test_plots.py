"""Curves of runs: what is read, what is drawn, and what is said of files that hold none."""

import errno
import json
import math
import sys
from functools import partial

import pytest
from helpers import PROJECT

sys.path.insert(0, str(PROJECT / "evaluation_scripts"))

import plot_run
import run_report
import study_report

from utils.process.errors import UserError, run_script


def _run(folder, scale=1.0, end=""):
    folder.mkdir(parents=True)
    rows = [{"step": i, "train/score": scale * i, "train/kl": 0.1, "train/note": "text"} for i in range(5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


def _plot(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, arguments)])
    plot_run.main()


def test_curves_hold_every_number_and_a_line_that_is_being_written_is_left(tmp_path):
    curves = plot_run.read_curves(_run(tmp_path / "a", end='{"step": 5, "train/sc'))
    assert curves == {"train/score": [(i, i) for i in range(5)], "train/kl": [(i, 0.1) for i in range(5)]}


def test_reports_read_a_run_in_progress(tmp_path, monkeypatch, capsys):
    """Its last line may be half-written; a line in the middle that is no row is a fault."""
    for step, name in (("step1", "perplexity"), ("step2", "accuracy")):
        (tmp_path / step).mkdir()
        row = {"step": 0, f"eval/{name}": 0.5, "eval/pairs": 8}
        (tmp_path / step / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 1, "eva')
    ppo = {f"train/{name}": 1.0 for name, *_ in run_report.PPO_FIGURES}
    folder = _run(tmp_path / "step3")
    (folder / "metrics.jsonl").write_text(json.dumps(ppo) + "\n")
    monkeypatch.setattr(sys, "argv", ["run_report.py", "--output_dir", str(tmp_path)])
    run_report.main()
    [line] = [line for line in capsys.readouterr().out.splitlines() if "perplexity" in line]
    assert line.split()[-2:] == ["0.50", "nan"], "nothing is after training yet"
    (folder / "metrics.jsonl").write_text('{"step": 1, "tra\n' + json.dumps(ppo) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: no row of metrics"):
        run_report.main()


def test_a_study_leaves_out_other_folders_and_takes_no_nan_for_a_success(tmp_path, monkeypatch, capsys):
    models = {"SFT": dict(manner=0.5, right=0.7, ended=0.8)}
    models["RLHF"] = dict(manner=0.99, right=0.7, ended=1.0, kl=math.nan, right_change=[-0.1, 0.1])
    for name in ("seed_1", "quickstart"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"models": models}))
    monkeypatch.setattr(sys, "argv", ["study_report.py", str(tmp_path)])
    study_report.main()
    printed = capsys.readouterr().out
    assert "quickstart is no run of the study" in printed and "not reached: KL" in printed


def test_a_folder_of_the_picture_is_made(tmp_path, monkeypatch):
    _plot(monkeypatch, _run(tmp_path / "run"), "--output", tmp_path / "new/curves.png")
    assert (tmp_path / "new/curves.png").exists()


def test_smoothing_has_no_bias_towards_zero_and_weight_zero_changes_nothing():
    curve = [(0, 2.0), (1, 4.0), (2, 1.0)]
    assert plot_run.smooth(curve, 0.0) == curve
    # weights 0.5 and 1 of the first two, then 0.25, 0.5 and 1
    expected = [2.0, (0.5 * 2 + 4) / 1.5, (0.25 * 2 + 0.5 * 4 + 1) / 1.75]
    assert [value for _, value in plot_run.smooth(curve, 0.5)] == pytest.approx(expected)


def test_a_picture_beside_the_run_and_a_page_that_needs_no_other_file(tmp_path, monkeypatch, capsys):
    first, second = _run(tmp_path / "a<b>/step3"), _run(tmp_path / "c/step3", scale=2.0)
    _plot(monkeypatch, first)
    assert (first / "curves.png").read_bytes().startswith(b"\x89PNG")
    _plot(monkeypatch, first, second, "--output", tmp_path / "page.html", "--smooth", "0.5")
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and "a&lt;b&gt;/step3" in page and "<b>" not in page
    score = "<td>{0} at step 4 (mean of the last 5: {1})</td>"  # of 0..4, and of their doubles
    assert f"<td>train/score</td>{score.format(4, 2)}{score.format(8, 4)}" in page
    assert "2 curves of 2 runs" in capsys.readouterr().out


def test_the_last_evaluation_counts_and_only_training_curves_are_smoothed(tmp_path, monkeypatch, capsys):
    rows = [{"step": 0, "eval/perplexity": 1582.71234}, {"step": 40, "eval/perplexity": 1.9187654}]
    rows[1:1] = [{"step": i + 1, "train/loss": 8 / (i + 1)} for i in range(40)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = {}

    def keep(figure, *_, **__):
        for axis in figure.axes:
            drawn[axis.get_title()] = [list(line.get_ydata()) for line in axis.get_lines()]

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    _plot(monkeypatch, tmp_path, "--smooth", "0.9")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert drawn["eval/perplexity: 1.919 at step 40"] == [[1582.71234, 1.9187654]]
    assert drawn["loss"] == [losses, [value for _, value in plot_run.smooth(list(enumerate(losses)), 0.9)]]
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["eval/perplexity"] == f"{rows[-1]['eval/perplexity']:.6g} at step 40"
    assert printed["train/loss"] == f"0.2 at step 40 (mean of the last 10: {sum(losses[-10:]) / 10:.6g})"


def test_a_run_with_one_evaluation_shows_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "eval/accuracy": 0.75, "train/loss": 1}\n')
    _plot(monkeypatch, tmp_path)
    assert "eval/accuracy  0.75 at step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (None, [], "metrics.jsonl cannot be read: .*output/step3"),
        ("", [], "holds no metrics yet"),
        ("no row\n{}\n", [], "line 1: no row of metrics"),
        ('{"step": 1, "train/loss": 2}\n', ["--metrics", "train/los"], "--metrics train/los: .*train/loss"),
        ('{"step": 1, "train/loss": 2}\n', ["--output", "curves.pdf"], "a .png or .html file"),
    ],
)
def test_what_cannot_be_drawn_is_refused(content, arguments, message, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        _plot(monkeypatch, tmp_path, *arguments)


def test_the_study_names_what_a_run_did_not_reach(tmp_path, monkeypatch, capsys):
    import study_report

    before = {"manner": 0.5, "right": 0.7, "ended": 0.8, "kl": 0.0}
    runs = {
        "seed_1": {"manner": 0.95, "right": 0.7, "ended": 1.0, "kl": 10.0, "right_change": [-0.02, 0.01]},
        "lora_1": {"manner": 0.94, "right": 0.69, "ended": 1.0, "kl": 10.1, "right_change": [-0.03, -0.01]},
    }
    for name, after in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"models": {"SFT": before, "RLHF": after}}))
    monkeypatch.setattr(sys, "argv", ["study_report.py", str(tmp_path)])
    study_report.main()
    quickstart, lora = (line for line in capsys.readouterr().out.splitlines() if "->" in line)
    assert "not reached" not in quickstart
    assert lora.endswith("not reached: manner, right, KL")


def test_a_script_ends_with_one_line_for_what_the_user_can_mend_and_a_traceback_for_anything_else():
    def main(error):
        raise error

    for error, line in (
        (UserError("no such run"), "no such run"),
        (OSError(errno.ENOSPC, "", "curves.png"), "curves.png could not be written: No space left on device"),
        (RuntimeError("Timed out waiting"), "another rank did not take part within --comm_timeout seconds; .*"),
    ):
        with pytest.raises(SystemExit, match=f"^\nerror: {line}"):
            run_script(partial(main, error))
    with pytest.raises(KeyError):
        run_script(partial(main, KeyError("ours")))
