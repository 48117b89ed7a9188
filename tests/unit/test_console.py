"""What a run prints: the published lines under --console classic, and a readable console under --console brief."""

import re
from pathlib import Path

import pytest
from helpers import flags, read_metrics

from training.step3_rlhf_finetuning import reporting
from utils.run.console_lines import TimeLeft, duration, rounded

NUMBER = r"-?[\d.]+(e-?\d+)?"
# As DeepSpeed-Chat prints them, each a whole line.
PUBLISHED = {
    1: (
        r"\*\*\*\*\* Running training \*\*\*\*\*",
        r"\*\*\*\*\* Evaluating perplexity, Epoch 0/2 \*\*\*\*\*",
        rf"ppl: {NUMBER}, loss: {NUMBER}",
        r"Beginning of Epoch 1/2, Total Micro Batches 8",
        r"Time: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, Epoch: 0, Step: 0, Rank: 0, loss = [\d.]+",
        r"Model Parameters: [\d.]+ B, Latency: [\d.]+s, TFLOPs: [\d.]+, Samples/sec: [\d.]+, Time/seq [\d.]+s, "
        r"Batch Size: 2, Sequence Length: \d+",
        r"saving the final model \.\.\.",
    ),
    2: (
        r"\*\*\*\*\* Running training \*\*\*\*\*",
        r"\*\*\*\*\* Evaluating reward, Epoch 1/2 \*\*\*\*\*",
        rf"chosen_last_scores \(higher is better\) : {NUMBER}, rejected_last_scores \(lower is better\) : {NUMBER}, "
        rf"acc \(higher is better\) : {NUMBER}",
        rf"Epoch 1/2 with loss {NUMBER}",
        r"saving model \.\.\.",
    ),
    3: (
        r"\*\*\*\*\* Running training \(total iterations = 8\) \*\*\*\*\*",
        r"Beginning of Epoch 1/1, Total Generation Batches 8",
        r"\|E2E latency=[\d.]+s \|Gather latency=0.00s \(0.00%\) \|Generate time=[\d.]+s \([\d.]+%\) "
        r"\|Training time=[\d.]+s \([\d.]+%\) \|Others=[\d.]+ \([\d.]+%\)\|CurSamplesPerSec=[\d.]+ "
        r"\|AvgSamplesPerSec=[\d.]+",
        rf"Epoch: 0 \| Step: 7 \| PPO Epoch: 1 \| Actor Loss: {NUMBER} \| Critic Loss: {NUMBER} \| "
        r"Unsupervised Loss: 0.0",
        r"End-to-End => Latency: [\d.]+s, TFLOPs: [\d.]+, Samples/sec: [\d.]+, Time/seq [\d.]+s, Batch Size: 2, "
        r"Total Seq. Length: 40",
        r"Generation => Latency: [\d.]+s, Per-token Latency [\d.]+ ms, TFLOPs: [\d.]+, BW: [\d.]+ GB/sec, "
        r"Answer Seq. Length: 8",
        r"Training   => Latency: [\d.]+s, TFLOPs: [\d.]+",
        r"Actor Model Parameters => [\d.]+ B, Critic Model Parameters => [\d.]+ B",
        rf"Average reward score: {NUMBER} \| EMA reward score: {NUMBER}",
        "-" * 85,
        r"saving model \.\.\.",
    ),
}
LEARNING_RATE = {
    1: r"Step: 3/16, Loss: [\d.]+, Learning Rate: [\d.e-]+",
    2: r"Step: 3/16, Loss: [\d.]+, Learning Rate: [\d.e-]+",
    3: r"Actor Learning Rate: [\d.e-]+ \| Critic Learning Rate: [\d.e-]+",
}
BRIEF_STEP = {
    1: r"step (\d+)/16  loss ([\d.]+)  lr [\d.]+e[+-]\d\d  [\d,]+ tokens/s  left 0:\d\d:\d\d",
    2: r"step (\d+)/16  loss ([\d.]+)  accuracy [\d.]+  lr [\d.]+e[+-]\d\d  [\d,]+ tokens/s  left 0:\d\d:\d\d",
    3: r"step (\d+)/8  score (-?[\d.]+)  kl -?[\d.]+  eos [\d.]+  length [\d.]+  critic [\d.]+  [\d.]+ s  left "
    r"0:\d\d:\d\d",
}


def _lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def _found(pattern: str, lines: list[str]) -> list[re.Match]:
    return [match for line in lines if (match := re.fullmatch(pattern, line))]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_classic_is_the_default_and_has_the_published_lines(run_step, start, tmp_path, capsys, step):
    run_step(step, [*start(step), *(["--print_loss"] if step == 1 else []), "--output_dir", tmp_path])
    lines = _lines(capsys)
    for pattern in (*PUBLISHED[step], LEARNING_RATE[step]):
        assert _found(pattern, lines), pattern
    assert not _found(BRIEF_STEP[step], lines)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_brief_has_a_line_for_each_log_interval_with_the_figures_of_the_metrics(
    run_step, start, tmp_path, capsys, step
):
    text = "--console brief --log_interval 4" + (" --sample_interval 0 --eval_interval 8" if step == 3 else "")
    run_step(step, [*start(step), *flags(text, output_dir=tmp_path / "out")])
    lines = _lines(capsys)
    for pattern in (*PUBLISHED[step], LEARNING_RATE[step]):
        assert not _found(pattern, lines), pattern
    shown = _found(BRIEF_STEP[step], lines)
    assert [int(match[1]) for match in shown] == list(range(4, 17 if step < 3 else 9, 4))
    rows, name = read_metrics(tmp_path / "out"), "train/loss" if step < 3 else "train/score"
    for match in shown:
        assert float(match[2]) == pytest.approx(rows[int(match[1]) - 1][name], abs=0.006)
    assert len([line for line in lines if line.startswith("evaluation ")]) == (3 if step < 3 else 2)
    assert lines[-1].startswith("    python ") and str(tmp_path / "out") in lines[-1]
    what, where = {1: ("supervised", "the model is in"), 2: ("reward model", "the reward model is in")}.get(
        step, ("reinforcement", "the model is in")
    )
    assert any(line.startswith(f"step {step}, {what}") for line in lines)
    assert any(line.startswith(where) for line in lines)
    assert max(map(len, lines)) < 400 and len(lines) < 32


def test_the_programs_that_brief_names_are_there(run_step, start, tmp_path, capsys):
    for step in (1, 2, 3):
        run_step(step, [*start(step), *flags("--console brief", output_dir=tmp_path / "a folder" / str(step))])
        command = _lines(capsys)[-1].split()
        assert Path(command[1]).is_file() and "'" in command[3], "ready for a shell"


def test_figures_are_rounded_for_reading():
    assert [rounded(value) for value in (0.71234, 12.345, 1582.68, -0.5)] == ["0.712", "12.3", "1,583", "-0.500"]
    assert rounded(None) == "none" and duration(79.6) == "0:01:20"
    left = TimeLeft()
    assert left.text(10) == "0:00:00"
    for seconds in (1.0, 3.0):
        left.step(seconds)
    assert left.text(40) == "0:01:20"


@pytest.mark.parametrize("limit, told", [(-1.0, 1), (1.0, 0)])
def test_a_sampler_whose_log_probs_lie_far_off_is_told_once(limit, told, run_step, start, monkeypatch, capsys):
    monkeypatch.setattr(reporting, "LARGE_GAP", limit)
    run_step(3, [*start(3), "--enable_hybrid_engine"])
    assert capsys.readouterr().out.count("--rollout_is_clip 2 weighs tokens by it") == told
