"""--config: flags from a file, what a file may not hold, and the file that a run writes of its own."""

import json
from types import SimpleNamespace

import pytest
from helpers import flags

from utils import arguments
from utils.arguments.config_file import RUN_CONFIG_FILE, given_flags, run_config_text, write_run_config
from utils.process.errors import UserError

MODELS = {1: "--model_name_or_path m", 2: "--model_name_or_path m"}
MODELS["dpo"] = "--model_name_or_path m"
MODELS[3] = "--actor_model_name_or_path a --critic_model_name_or_path c"
# Every kind of flag: numbers, choices, enumerations, sizes, lists with and without values, on and off, texts that YAML
# takes for something else.
GIVEN = {
    1: "--learning_rate 9.65e-6 --lr_scheduler_type linear --max_shard_size 1.5GB --no-group_by_length --mask_prompt "
    "--data_path a.jsonl local/demo --sft_only_data_path --dataset_split - x --chat_template --run_name 010",
    2: "--rm_margin 1 --offload --chat_template chatml --report_to tensorboard --run_name on --max_shard_size 1234567B",
    "dpo": "--beta 1e-2 --dpo_loss ipo --rpo_alpha 1 --precompute_ref_log_probs --dropout 0.1 --save_best margin",
    3: "--no-do_sample --no-whiten_advantages --enable_ema --temperature 1e-2 --data_split 1,1,8 --output_dir null "
    "--deepspeed --resume auto --run_name=-x",
}


def written(tmp_path, content, name="run.yaml"):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def parse(step, *words):
    return arguments.build_parser(step).parse_args([*words])


@pytest.mark.parametrize("step", GIVEN)
def test_the_file_of_a_run_reads_back_to_the_same_arguments(step, tmp_path):
    parser = arguments.build_parser(step)
    args = parser.parse_args([*flags(MODELS[step]), *flags(GIVEN[step]), "--eot_token", "a: #'\n\"ö"])
    text = run_config_text(given_flags(parser, args), ["main.py", "--eot_token", "a\nseed: 7"])
    assert parse(step, "--config", written(tmp_path, text)) == args
    assert "seed" not in given_flags(parser, args)  # its default
    assert parse(step, "--config", written(tmp_path, given_flags(parser, args), "run.json")) == args


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    file = written(
        tmp_path,
        "model_name_or_path: m\nseed: 5\noffload: true\nmask_prompt: true\nchat_template: chatml\n"
        "data_path: [a, b]\nlearning_rate: 1e-5\ndropout: null\n",
    )
    args = parse(1, "--seed", "6", "--config", file, "--data_path", "c", "--no-offload", "--no-chat_template")
    assert (args.seed, args.data_path, args.offload, args.chat_template) == (6, ["c"], False, False)
    assert (args.learning_rate, args.mask_prompt, args.model_name_or_path) == (1e-5, True, "m")
    assert not hasattr(args, "config")
    assert parse(1, f"--config={file}").data_path == ["a", "b"]


def test_a_word_without_a_flag_is_no_further_value_of_the_file(tmp_path, capsys):
    file = written(tmp_path, "model_name_or_path: m\ndata_path: [a]\n")
    with pytest.raises(SystemExit):
        parse(1, "stray", "--config", file)
    assert "stray" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("seed: 1\nlearning_rat: 1", "line 2, key 'learning_rat': there is no such flag; did you mean learning_rate"),
        ("learning-rate: 1", "did you mean learning_rate"),
        ("seed: 1\nseed: 2", "line 2: the key 'seed' stands there twice"),
        ("seed: x", "line 1, key 'seed': invalid .* value: 'x'"),
        ("dropout: 2", "line 1, key 'dropout': 2.0 is not between 0 and 1"),
        ("zero_stage: 9", "key 'zero_stage': invalid choice: 9"),
        ("seed: [1]", "key 'seed': expected one value, found a list"),
        ("seed: true", "key 'seed': expected a value .*, found true"),
        ("seed: null", "key 'seed': expected a value .*1234.*, found null"),
        ("offload: 1", "key 'offload': expected true or false, found '1'"),
        ("group_by_length: 'no'", "key 'group_by_length': expected true or false, found 'no'"),
        ("report_to: [tensorbord]", "key 'report_to': invalid choice"),
        ("data_path: [--seed]", "key 'data_path': expected values that do not begin with a dash"),
        ("data_path: [[a]]", "key 'data_path': expected a value, found a list"),
        ("seed: {a: 1}", "expected a value or a list of values, found keys and values"),
        ("seed: !!python/object/apply:os.getpid []", "expected|found"),
        ("config: other.yaml", "--config is given on the command line"),
        ("- seed", "expected flags and their values"),
        ("", "found nothing"),
        ("seed: {", "line 1: expected YAML"),
    ],
)
def test_what_a_file_may_not_hold_is_told_with_its_place(content, message, tmp_path):
    file = written(tmp_path, content)
    with pytest.raises(UserError, match=f"--config {file}.*({message})"):
        parse(1, "--model_name_or_path", "m", "--config", file)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"seed": 1, "seed": 2}', "found 'seed' twice"),
        ('{"seed": true}', "key 'seed': expected a value"),
        ('{"seed": [null]}', "key 'seed': expected a value or a list"),
        ('{"offload": 1}', "key 'offload': expected true or false"),
        ("[1]", "expected flags and their values"),
        ('{"seed": ', "expected valid JSON"),
    ],
)
def test_a_json_file_is_checked_alike(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        parse(1, "--model_name_or_path", "m", "--config", written(tmp_path, content, "run.json"))


def test_one_file_that_can_be_read(tmp_path):
    file = written(tmp_path, "seed: 1")
    for words, message in (
        (["--config", file, "--config", file], "given 2 times"),
        (["--config", str(tmp_path / "none.yaml")], "none.yaml: cannot be read: No such file"),
        (["--config", str(tmp_path)], "ends in .yaml, .yml or .json"),
    ):
        with pytest.raises(UserError, match=message):
            parse(1, "--model_name_or_path", "m", *words)


def test_a_run_writes_its_file_at_the_start_and_a_resumed_one_keeps_it(tmp_path):
    parser = arguments.build_parser(1)
    args = parser.parse_args(flags("--model_name_or_path m --seed 3", output_dir=tmp_path))
    write_run_config(parser, args, resumed=True)
    first = (tmp_path / RUN_CONFIG_FILE).read_text()  # a folder without one gets it
    resumed = parser.parse_args(flags("--model_name_or_path m --seed 3 --resume auto", output_dir=tmp_path))
    write_run_config(parser, resumed, resumed=True)
    assert (tmp_path / RUN_CONFIG_FILE).read_text() == first
    write_run_config(parser, resumed)
    assert "resume: auto" in (tmp_path / RUN_CONFIG_FILE).read_text()
    write_run_config(parser, SimpleNamespace(output_dir=None))  # nothing is saved
    assert [file.name for file in tmp_path.iterdir()] == [RUN_CONFIG_FILE]
