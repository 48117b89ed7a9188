"""Which datasets a run asks for: by its flags or by a --data_config, with every mistake named before any work."""

import json

import pytest
from helpers import flags, make_tokenizer, write_pairs

from utils import arguments
from utils.data.preparation import check_data_of_step, datasets_of_step
from utils.data.sources import DataSource, sources_of_step
from utils.process.errors import UserError
from utils.run.same_run import flags_of


@pytest.fixture
def settled(tmp_path):
    """The settled arguments of a step, with a folder of pairs ``data`` and one ``more`` beside the cache."""
    for name in ("data", "more"):
        (tmp_path / name).mkdir()
        write_pairs(tmp_path / name / "train.jsonl", 40)
        write_pairs(tmp_path / name / "eval.jsonl", 20)

    def settle(text="", step=1, **more):
        words = flags(text.format(tmp=tmp_path), data_output_path=tmp_path / "cache", dtype="fp32", **more)
        models = {3: flags(actor_model_name_or_path="a", critic_model_name_or_path="b")}
        words = [*models.get(step, flags(model_name_or_path="a")), *words]
        return arguments.settle(arguments.build_parser(step).parse_args(list(map(str, words))), step)

    return settle


@pytest.fixture
def config(settled, tmp_path):
    """Writes a --data_config and gives the settled arguments with it."""

    def write(content, name="data.yaml", text="", step=1):
        content = content.replace("{tmp}", str(tmp_path)) if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(content)
        return settled(text, step, data_config=tmp_path / name)

    return write


# Flags


@pytest.mark.parametrize("shares", ["nan,1,1", "1,1,inf", "1e308,1e308,1", "a,b", "0,0,0", "-1,2,2"])
def test_shares_that_are_no_numbers_are_refused_as_the_flags_are_read(shares, settled):
    with pytest.raises(UserError, match=f"--data_split '{shares}': expected shares of 0 or more"):
        settled(f"--data_split={shares}")


def test_a_path_longer_than_a_name_may_be_is_no_folder(settled, tmp_path):
    args = settled("--data_path {tmp}/" + "x" * 300)
    with pytest.raises(UserError, match="there is no such file or folder of data"):
        check_data_of_step(args, 1)


def test_a_choice_holds_for_all_datasets_or_for_each_its_own(settled, tmp_path):
    both = "--data_path {tmp}/data {tmp}/more"
    named = [str(tmp_path / "data"), str(tmp_path / "more")]
    for text, expected in (
        ("--dataset_split train_a", [("train_a", None), ("train_a", None)]),
        ("--dataset_split train_a - --dataset_config x,y all", [("train_a", "x,y"), (None, "all")]),
        ("", [(None, None), (None, None)]),
    ):
        sources = sources_of_step(settled(f"{both} {text}"))
        assert [(source.split, source.config) for source in sources] == expected
        assert [source.path for source in sources] == named
    with pytest.raises(UserError, match=r"--dataset_split a b c: expected .* each of the 2 .* found 3"):
        settled(f"{both} --dataset_split a b c")
    [first, second] = sources_of_step(settled("--data_path {tmp}/data --sft_only_data_path {tmp}/more"))
    assert (first.data_split, second.data_split) == ("2,4,4", None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("--prompt_column chosen", r"--prompt_column chosen: that column also holds chosen, where .* --chosen_column"),
        ("--chosen_column prompt", r"--chosen_column prompt: that column also holds prompt, where it is looked for"),
        ("--chosen_column a --rejected_column a", r"--chosen_column a: that column also holds rejected$"),
        ("--prompt_column q --messages_column q", r"--prompt_column q: that column also holds messages$"),
    ],
)
def test_two_roles_in_one_column_are_refused(text, message, settled):
    with pytest.raises(UserError, match=message):
        settled(f"--data_path {{tmp}}/data {text}")
    assert settled("--data_path {tmp}/data --prompt_column chosen --chosen_column answer").prompt_column == "chosen"
    assert settled("--data_path {tmp}/data --messages_column prompt").messages_column == "prompt"


def test_what_a_run_writes_may_lie_in_no_dataset_whoever_names_it(settled, config):
    with pytest.raises(UserError, match=r"--output_dir .*more/out lies in --data_path .*more"):
        settled("--data_path {tmp}/data --sft_only_data_path {tmp}/more --output_dir {tmp}/more/out")
    with pytest.raises(UserError, match=r"--output_dir .*more/out lies in the dataset .*more"):
        config("[{path: {tmp}/data}, {path: {tmp}/more}]", text="--output_dir {tmp}/more/out")


# --data_config


def test_an_entry_says_all_that_there_is_to_say(config, tmp_path):
    content = """
datasets:
  - path: {tmp}/data
    split: train_a,test_b
    config: main
    columns: {prompt: question, messages: talk, system: persona, chosen: null}
    format: pairs
    weight: 2.5
    max_rows: 100
    data_split: "6,2,2"
  - {path: {tmp}/more, weight: 1, data_split: null}
  - {path: local/demo, weight: 1}
"""
    args = config(content, text="--data_split 1,1,1 --chosen_column good")
    first, second, third = sources_of_step(args)
    columns = {"chosen": "good", "prompt": "question", "messages": "talk", "system": "persona"}
    assert first == DataSource(f"{tmp_path}/data", "train_a,test_b", "main", columns, "pairs", 2.5, 100, "6,2,2")
    assert (second.data_split, third.data_split) == (None, "1,1,1")
    assert third == DataSource("local/demo", columns={"chosen": "good"}, weight=1, data_split="1,1,1")
    as_json = config([{"path": str(tmp_path / "more")}], "data.json")
    assert sources_of_step(as_json) == (DataSource(str(tmp_path / "more"), data_split="2,4,4"),)


BAD = {
    "a key that is none": (
        "[{path: local/demo, wieght: 1}]",
        r"entry 1, key 'wieght': unknown \(did you mean 'weight'",
    ),
    "no key alike": ("[{path: local/demo, xyz: 1}]", r"entry 1, key 'xyz': unknown; known: path, split, config"),
    "a column that is none": (
        "[{path: local/demo, columns: {promt: q}}]",
        r"entry 1, key 'columns.promt': unknown \(did you mean 'prompt'\?\)",
    ),
    "no path": ("[{path: local/demo}, {split: a}]", r"entry 2: expected the key 'path', found split"),
    "a path to nothing": ("[{path: {tmp}/nowhere}]", r"entry 1, key 'path': .*/nowhere: no such file or folder"),
    "a file that is not there": ("[{path: some/file.jsonl}]", r"entry 1, key 'path': some/file.jsonl: no such file"),
    "a path of another type": ("[{path: [a, b]}]", r"entry 1, key 'path': expected a text, found a list"),
    "a path twice": ("[{path: {tmp}/data}, {path: {tmp}/./data}]", r"entry 2, key 'path': .*data is entry 1 already"),
    "a split of another type": ("[{path: local/demo, split: 3}]", r"entry 1, key 'split': expected a text, found 3"),
    "columns of another type": (
        "[{path: local/demo, columns: a}]",
        r"'columns': expected names of columns, .* found 'a'",
    ),
    "a column of another type": ("[{path: local/demo, columns: {prompt: 1}}]", r"'columns.prompt': expected the name"),
    "two texts in a column": (
        "[{path: local/demo, columns: {prompt: chosen}}]",
        r"entry 1, key 'columns.prompt': chosen: that column also holds chosen",
    ),
    "a weight of nothing": ("[{path: local/demo, weight: 0}]", r"'weight': expected a number above 0, found 0"),
    "a weight that is true": ("[{path: local/demo, weight: true}]", r"'weight': expected a number above 0, found True"),
    "a weight without end": ("[{path: local/demo, weight: .inf}]", r"'weight': expected a number above 0, found inf"),
    "one weight of two": (
        "[{path: local/demo, weight: 1}, {path: {tmp}/data}]",
        r"entry 2, key 'weight': expected one, since other entries have a weight",
    ),
    "rows by halves": (
        "[{path: local/demo, max_rows: 1.5}]",
        r"'max_rows': expected a whole number from 1 on, found 1.5",
    ),
    "a split that is none": (
        "[{path: local/demo, data_split: 'a,b'}]",
        r"'data_split': expected shares .* found 'a,b'",
    ),
    "an entry that is a path": ("[local/demo]", r"entry 1: expected keys and values, .* found a string"),
    "no list": ("path: local/demo", r"expected a list of datasets, or the key 'datasets' with one, and nothing else"),
    "an empty list": ("[]", r"data.yaml: expected a list of datasets, found an empty list"),
    "nothing": ("", r"data.yaml: expected a list of datasets, found null"),
    "a key twice": (
        "- path: local/demo\n  split: a\n  split: b",
        r"data.yaml, line 3: expected YAML, found: the key 'spl",
    ),
    "an alias": ("- &a {path: local/demo}\n- *a", r"data.yaml, line 2: expected YAML, found: an alias"),
    "a Python object": (
        "- !!python/object/apply:os.system [ls]",
        r"data.yaml, line 1: expected YAML, found: could not",
    ),
    "a placeholder that nobody filled": (
        "- path: {{ data }}",
        r"data.yaml, line 1: expected YAML, found: a key that is",
    ),
    "a list as a key": ("- ? [a]\n  : b", r"data.yaml, line 1: expected YAML, found: a key that is no text"),
    **{
        f"no value of its tag: {value}": (f"- path: {value}", r"data.yaml.*: expected YAML, found")
        for value in (
            "!!int ''",
            "!!float ''",
            "!!bool maybe",
            "!!timestamp today",
            "!!set [a]",
            "!!map a",
            "2020-13-45",
        )
    },
    **{
        f"shares of {shares}": (f"[{{path: local/demo, data_split: '{shares}'}}]", r"'data_split': expected shares")
        for shares in ("nan,1,1", "1,nan,1", "inf,1,1", "1e308,1e308,1")
    },
    "no YAML": ("- {path: [", r"data.yaml, line 1: expected YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_names_file_entry_and_key(case, config):
    content, message = BAD[case]
    with pytest.raises(UserError, match=rf"(?s)--data_config .*{message}"):
        config(content)


def test_files_that_are_no_data_config(config, settled, tmp_path):
    for name, content, message in (
        ("data.toml", "a", r"expected a file that ends in .yaml, .yml or .json"),
        ("data.json", "[{", r"data.json: expected valid JSON"),
        ("data.json", '[{"path": "a", "path": "b"}]', r"data.json: expected each key once, found 'path' twice"),
        ("data.yml", "x" * (2 << 20), r"a file of more than 1048576 bytes"),
    ):
        with pytest.raises(UserError, match=message):
            config(content, name)
    with pytest.raises(UserError, match=r"--data_config /nowhere.yaml: cannot be read: No such file"):
        settled(data_config="/nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"- path: \xff\n")
    with pytest.raises(UserError, match=r"latin.yaml.*: expected YAML"):
        settled(data_config=tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "flag", ["--data_path Dahoas/rm-static", "--sft_only_data_path a", "--dataset_split a", "--dataset_config a"]
)
def test_a_data_config_stands_alone(flag, config):
    with pytest.raises(UserError, match=rf"{flag.split()[0]} and --data_config both say which data to read"):
        config("[{path: local/demo}]", text=flag)
    assert sources_of_step(config("[{path: local/demo}]", step=2))[0].path == "local/demo"
    assert sources_of_step(config("[{path: local/demo}]", step=3))[0].path == "local/demo"


def test_a_resumed_run_compares_what_the_file_holds(config, tmp_path):
    first = flags_of(config("[{path: local/demo, weight: 1}]"))
    assert first["data_config"] == [{"path": "local/demo", "weight": 1}]
    assert json.loads(json.dumps(first)) == first
    assert flags_of(config("- path: local/demo\n  weight: 1", "other.yml")) == first
    assert flags_of(config("[{path: local/demo, weight: 2}]")) != first


def test_rows_that_a_run_would_learn_nothing_from_are_dropped_by_its_flag(config, tmp_path, capsys):
    rows = [{"prompt": "cat " * (90 if i % 2 else 1), "chosen": f" dog {i}"} for i in range(20)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = []
    for flag in ("", "--mask_prompt "):
        text = f"{flag}--truncation_side right --max_seq_len 40"
        args = config("[{path: {tmp}/long.jsonl, data_split: null}]", text=text)
        sizes.append(sum(map(len, datasets_of_step(args, make_tokenizer(tmp_path / "t"), 1, 40))))
    assert sizes == [20, 10] and "dropped, no answer being left of them within the length" in capsys.readouterr().out


def test_the_data_of_a_config_is_what_a_step_gets(config, tmp_path, capsys):
    content = "[{path: {tmp}/data, weight: 3, data_split: null}, {path: {tmp}/more, weight: 1, data_split: null}]"
    args = config(content, text="--max_train_samples 20 --max_seq_len 64")
    train, evaluation = datasets_of_step(args, make_tokenizer(tmp_path / "t"), 1, 64)
    assert (len(train), len(evaluation)) == (20, 26)
    told = capsys.readouterr().out
    used = f"15 of {tmp_path}/data, 5 of {tmp_path}/more"
    assert f"a blend of 20 rows, limited to 20, in the proportions of their weights: {used}" in told
    assert f"data: {tmp_path}/data: train: train.jsonl; eval: eval.jsonl" in told
