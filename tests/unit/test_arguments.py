"""What was given and what a run uses: settled in one place, once."""

import argparse

import pytest

from utils import arguments
from utils.process.errors import UserError


@pytest.fixture
def given(tmp_path):
    def parse(step: int, flags: str = "") -> argparse.Namespace:
        models = {3: "--actor_model_name_or_path a --critic_model_name_or_path b"}.get(step, "--model_name_or_path a")
        words = f"{models} --data_path local/demo --data_output_path {tmp_path} --dtype fp32 {flags}".split()
        return arguments.build_parser(step).parse_args(words)

    return parse


@pytest.mark.parametrize("step", [1, 2, 3])
def test_settling_leaves_what_was_given_alone_and_nothing_writes_to_the_result(step, given):
    args = given(step)
    before = dict(vars(args))
    settled = arguments.settle(args, step)
    assert vars(args) == before
    with pytest.raises(AttributeError, match="seed cannot become 5"):
        settled.seed = 5
    assert settled.seed == 1234


@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_settled_attribute_is_a_flag_of_the_step(step, given):
    flags = {action.dest for action in arguments.build_parser(step)._actions}
    assert vars(arguments.settle(given(step), step)).keys() <= flags


def test_a_settled_run_settles_to_itself(given):
    settled = arguments.settle(given(3, "--advantage_estimator rloo --num_generations_per_prompt 2"), 3)
    assert vars(arguments.settle(settled, 3)) == vars(settled)
    assert settled.whiten_advantages is False


def test_the_token_that_ends_answers_is_another_only_where_it_is_asked_for(given):
    assert arguments.end_token(given(1, "--eot_token <x>")) is None
    assert arguments.end_token(given(1, "--eot_token <x> --add_eot_token")) == "<x>"


@pytest.mark.parametrize("greedy", ["--no-do_sample", "--temperature 0"])
@pytest.mark.parametrize("limit", ["--top_p 0.9", "--top_k 5"])
def test_limits_of_sampling_are_refused_where_nothing_is_sampled(given, greedy, limit):
    with pytest.raises(UserError, match=f"do nothing with {greedy}"):
        arguments.settle(given(3, f"{greedy} {limit}"), 3)
    arguments.settle(given(3, greedy), 3)
