"""What step 3 says of a run that goes wrong, from its figures alone."""

import json
from types import SimpleNamespace

import pytest

from training.step3_rlhf_finetuning.diagnostics import WINDOW, Answers, Diagnostics, findings

ARGS = SimpleNamespace(
    missing_eos_penalty=1.0, kl_ctl=0.1, kl_target=None, max_answer_seq_len=48, reward_model_weight=1.0
)
FIGURES = {"used_answers": 64, "eos_rate": 0.6, "kl": 0.1, "score": 0.0, "score_std": 1.0}


def _run(diagnostics, steps: int, **figures) -> list[str]:
    return [line for _ in range(steps) for line in diagnostics.update(FIGURES | figures)]


def _told(args=ARGS, **figures) -> dict[str, str]:
    return findings(Answers.of(FIGURES), Answers.of(FIGURES | figures), args)


def test_a_run_that_goes_well_is_not_spoken_of():
    better = {"eos_rate": 0.9, "kl": 4.0, "score": 2.0}
    assert _told() == _told(**better) == {}
    diagnostics = Diagnostics(ARGS)
    assert _run(diagnostics, WINDOW) + _run(diagnostics, 50, **better) == []


def test_each_thing_is_told_once_with_its_flag():
    diagnostics = Diagnostics(ARGS)
    assert _run(diagnostics, WINDOW) == []
    worse = dict(eos_rate=0.1, kl=12.0, score=1.0)
    assert _run(diagnostics, WINDOW - 1, **worse) == [], "too few answers to tell"
    lines = _run(diagnostics, 20, **worse)
    assert len(lines) == 3
    eos, kl, length = lines
    assert "10 % of the answers end by themselves, 60 % did" in eos and "--missing_eos_penalty 2 (now 1)" in eos
    assert "12.0 nats per answer" in kl and "--kl_ctl 0.2 (now 0.1)" in kl
    assert "the reward model is no judge" in kl
    no_reward_model = SimpleNamespace(**vars(ARGS) | {"reward_model_weight": 0.0})
    assert "reward model" not in _told(no_reward_model, **worse)["kl"]
    assert "from 0.00 to 1.00 while 90 % of the answers are cut at --max_answer_seq_len 48" in length


@pytest.mark.parametrize(("answers", "told"), [(12, False), (640, True)])
def test_a_fall_of_the_eos_rate_that_chance_makes_is_not_told(answers, told):
    """15 points: less than three standard errors of twelve answers, more than those of 640."""
    first, now = (Answers.of(FIGURES | {"used_answers": answers, "eos_rate": rate}) for rate in (0.6, 0.45))
    assert ("eos" in findings(first, now, ARGS)) == told


@pytest.mark.parametrize(
    ("figures", "flags", "names"),
    [
        ({"kl": 9.9}, {}, set()),
        ({"kl": 10.1}, {}, {"kl"}),
        ({"kl": 20}, {"kl_target": 15.0}, set()),  # wanted so
        ({"kl": 23}, {"kl_target": 15.0}, {"kl"}),
        ({"score": 3.0, "eos_rate": 0.45}, {}, {"length"}),
        ({"score": 0.1, "eos_rate": 0.45}, {}, set()),  # within chance
        ({"score": 3.0, "eos_rate": 0.55}, {}, set()),  # most answers end
        ({"eos_rate": 0.55, "used_answers": 1e6}, {}, set()),  # 5 points
    ],
)
def test_thresholds(figures, flags, names):
    assert _told(SimpleNamespace(**vars(ARGS) | flags), **figures).keys() == names


def test_advice_follows_the_flags_of_the_run():
    off = SimpleNamespace(**vars(ARGS) | {"missing_eos_penalty": 0.0, "kl_ctl": 0.0})
    told = _told(off, eos_rate=0.0, kl=50.0)
    assert "--missing_eos_penalty 1 (now 0)" in told["eos"] and "--kl_ctl 0.05 (now 0)" in told["kl"]


def test_steps_without_a_usable_answer_count_for_nothing():
    diagnostics = Diagnostics(ARGS)
    assert _run(diagnostics, 3 * WINDOW, used_answers=0, eos_rate=0.0) == []
    _run(diagnostics, WINDOW)
    assert len(_run(diagnostics, WINDOW, eos_rate=0.0, score=2.0)) == 2


def test_pooled_answers_weigh_by_their_number():
    pooled = Answers.pooled([Answers(1, 0.0, 2.0, 1.0, 0.0), Answers(3, 1.0, 6.0, 5.0, 2.0)])
    assert (pooled.count, pooled.eos_rate, pooled.kl, pooled.score) == (4, 0.75, 5.0, 4.0)
    assert pooled.score_std == pytest.approx(3**0.5)


def test_a_resumed_run_tells_what_the_whole_one_would():
    whole, first = Diagnostics(ARGS), Diagnostics(ARGS)
    for diagnostics in (whole, first):
        _run(diagnostics, WINDOW)
        _run(diagnostics, 3, eos_rate=0.1)
    resumed = Diagnostics(ARGS)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    lines = _run(whole, 4, eos_rate=0.1)
    assert len(lines) == 1 and _run(resumed, 4, eos_rate=0.1) == lines
    again = Diagnostics(ARGS)
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert _run(again, 9, eos_rate=0.1) == [], "told already"
