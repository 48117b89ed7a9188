"""Which files and splits of a folder, a saved dataset or the hub are read, and when the user has to choose."""

import gzip
import json
import time

import datasets
import pytest
from datasets import Dataset, DatasetDict

from utils.data import splits
from utils.data.errors import DataError
from utils.data.own_files import get_raw_dataset
from utils.data.splits import choose_splits, open_splits

PREFS = ["train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen"]


def rows_of(name, count=1):
    return [{"prompt": name, "chosen": f"{name} {i}", "rejected": "no"} for i in range(count)]


def write(folder, *names):
    """Files whose rows hold the name of their file."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)))
    return folder


def read(opened, split="train"):
    return [row["prompt"] for row in opened[split]]


def test_training_splits_side_by_side_are_not_merged(tmp_path):
    folder = write(tmp_path, *(f"data/{name}-00000-of-00001-0a1b2c3d4e5f6a7b.jsonl" for name in PREFS))
    with pytest.raises(DataError, match=r"several splits of one kind, train_gen, train_prefs, train_sft; choose with "):
        open_splits(folder)["train"]
    chosen = open_splits(folder, split="train_sft")
    assert read(chosen) == ["data/train_sft-00000-of-00001-0a1b2c3d4e5f6a7b.jsonl"]
    assert read(chosen, "test") == ["data/test_sft-00000-of-00001-0a1b2c3d4e5f6a7b.jsonl"]
    assert "not read: data/test_prefs" in chosen.notes
    assert "test" not in open_splits(folder, split="train_gen")
    both = open_splits(folder, split="train_prefs,train_sft,test_sft")
    assert len(read(both)) == 2 and len(read(both, "test")) == 1
    assert len(read(open_splits(folder, split="all"))) == 3
    with pytest.raises(DataError, match=r"--dataset_split train_x: no such split; there are test_prefs, test_sft"):
        open_splits(folder, split="train_x")
    fingerprints = {open_splits(folder, split=name).fingerprint for name in ("train_prefs", "train_sft", "all")}
    assert len(fingerprints) == 3


@pytest.mark.parametrize("saved", [True, False])
def test_a_saved_dataset_and_the_hub_follow_the_same_rule(tmp_path, monkeypatch, saved):
    data = DatasetDict({name: Dataset.from_list(rows_of(name)) for name in PREFS})
    data.save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setattr(splits, "trouble_with_hub", lambda *name: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: data)

    def opened(**choice):
        return get_raw_dataset(str(tmp_path / "saved") if saved else "some/one", str(tmp_path), 1, 0, **choice)

    with pytest.raises(DataError, match=r"several splits .* choose with --dataset_split train_prefs"):
        opened()
    chosen = opened(split="train_prefs")
    assert [row["prompt"] for row in chosen.get_train_data()] == ["train_prefs"]
    assert [row["prompt"] for row in chosen.get_eval_data()] == ["test_prefs"]
    assert chosen.fingerprint() != opened(split="train_sft").fingerprint()
    assert chosen.dataset_name_clean != opened(split="train_sft").dataset_name_clean


def test_a_plain_name_wins_and_names_without_a_word_have_to_be_chosen():
    flags = splits.Flags()
    assert choose_splits("x", ["train", "train_small", "test"], None, flags) == {"train": ["train"], "test": ["test"]}
    found = choose_splits("x", ["train_b", "test", "test_a"], None, flags)
    assert found == {"train": ["train_b"], "test": ["test"]}
    assert isinstance(choose_splits("x", ["train", "test_a", "test_b"], None, flags)["test"], DataError)
    assert "choose with --dataset_split ja" in str(choose_splits("x", ["ja", "en"], None, flags)["train"])
    assert choose_splits("x", ["ja", "en", "test"], "ja", flags) == {"train": ["ja"], "test": ["test"]}
    assert choose_splits("x", ["validation", "test"], "validation", flags) == {"train": ["validation"]}


def test_configurations_side_by_side_are_not_merged(tmp_path):
    names = [f"{config}/{split}-00000-of-00001.jsonl" for config in ("main", "socratic") for split in ("train", "test")]
    write(tmp_path, *names)
    with pytest.raises(DataError, match=r"several configurations, main, socratic; choose with --dataset_config main"):
        open_splits(tmp_path)
    chosen = open_splits(tmp_path, "socratic")
    assert (read(chosen), read(chosen, "test")) == ([names[2]], [names[3]])
    for several in ("main,socratic", "all"):
        chosen = open_splits(tmp_path, several)
        assert (read(chosen), read(chosen, "test")) == (names[::2], names[1::2])
    with pytest.raises(DataError, match=r"--dataset_config mian: no such configuration; there are main, socratic"):
        open_splits(tmp_path, "mian")


def test_the_layout_of_hh_rlhf(tmp_path):
    names = [f"{config}/{split}.jsonl" for config in ("harmless-base", "helpful-base") for split in ("test", "train")]
    write(tmp_path, *names, "red-team-attempts/red_team_attempts.jsonl")
    with pytest.raises(DataError, match=r"several configurations, harmless-base, helpful-base; "):
        open_splits(tmp_path)
    assert read(open_splits(tmp_path, "helpful-base")) == ["helpful-base/train.jsonl"]
    assert len(read(open_splits(tmp_path, "helpful-base, harmless-base"))) == 2
    assert read(open_splits(tmp_path, "red-team-attempts")) == ["red-team-attempts/red_team_attempts.jsonl"]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00004.jsonl", "train-00001-of-00004.jsonl", "test.jsonl"],
        ["data/train/0000.jsonl", "data/train/0001.jsonl", "data/test/0000.jsonl"],
        ["default/train/part-0/0.jsonl", "default/train/part-1/0.jsonl", "default/test/0.jsonl"],
        ["my_train_0.jsonl", "my_train_1.jsonl", "held_out_test.jsonl"],
        ["train00.jsonl", "train01.jsonl", "test00.jsonl"],
        ["set/train.part1.jsonl", "set/train.part2.jsonl", "other/test.jsonl"],
    ],
)
def test_pieces_of_one_split_belong_together(tmp_path, names):
    opened = open_splits(write(tmp_path, *names))
    assert (read(opened), read(opened, "test")) == (names[:2], names[2:])


def test_a_file_beside_its_packed_copy_is_refused(tmp_path):
    for name, other in (("train.jsonl", "train.jsonl.gz"), ("data/train-1.csv.gz", "data/train-1.csv.zst")):
        folder = write(tmp_path / name[0], name, other)
        with pytest.raises(DataError, match=rf"expected each file once, .*found: {name} and {other}; move one of"):
            open_splits(folder)
    pieces = write(tmp_path / "pieces", "train-0.jsonl", "test.jsonl", "a/train-0.jsonl")
    (pieces / "train-1.jsonl.gz").write_bytes(gzip.compress((pieces / "train-0.jsonl").read_bytes()))
    assert len(read(open_splits(pieces, "all"))) == 3


def test_a_known_dataset_can_be_chosen_from_too(tmp_path):
    folder = write(tmp_path / "Dahoas/rm-static", "train.jsonl", "test.jsonl", "train_x.jsonl", "validation_x.jsonl")
    plain = get_raw_dataset(str(folder), str(tmp_path), 1, 0)
    assert [row["prompt"] for row in plain.get_train_data()] == ["train.jsonl"]
    chosen = get_raw_dataset(str(folder), str(tmp_path), 1, 0, split="train_x")
    assert [row["prompt"] for row in chosen.get_train_data()] == ["train_x.jsonl"]
    assert [row["prompt"] for row in chosen.get_eval_data()] == ["validation_x.jsonl"]
    with pytest.raises(DataError, match=r"local/demo: has nothing to choose from"):
        get_raw_dataset("local/demo", str(tmp_path), 1, 0, split="train")
    with pytest.raises(DataError, match=r"train.jsonl: --dataset_config main: a single file has nothing to choose"):
        open_splits(folder / "train.jsonl", "main")


# The hub


def test_a_hub_that_does_not_answer_is_told_at_once_with_the_way_to_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "trouble_with_hub", lambda *name: OSError("no route to host"))
    begin = time.monotonic()
    with pytest.raises(DataError) as error:
        get_raw_dataset("some/nobody-has-this", str(tmp_path), 1, 0)
    assert time.monotonic() - begin < 10
    first, second = str(error.value).splitlines()
    assert "could not be downloaded because OSError: no route to host" in first
    copy = "data/some/nobody-has-this"
    command = f"hf download --repo-type dataset some/nobody-has-this --local-dir {copy}; then --data_path {copy}"
    assert second == f"Where there is a network: {command}"


def test_an_earlier_download_is_read_without_the_hub_and_said(tmp_path, monkeypatch, capsys):
    offline = []

    def load(name, config):
        offline.append(datasets.config.HF_HUB_OFFLINE)
        return DatasetDict({"train": Dataset.from_list(rows_of(str(config), 10))})

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(splits, "trouble_with_hub", lambda *name: OSError("no route to host"))
    opened = splits.splits_of_hub("some/one", "en, ja", [tmp_path])
    assert read(opened) == ["en"] * 10 + ["ja"] * 10
    assert offline == [True, True] and not datasets.config.HF_HUB_OFFLINE
    assert "some/one: read from an earlier download, since the hub does not answer" in capsys.readouterr().out


def test_configurations_of_the_hub_are_asked_for(tmp_path, monkeypatch):
    def load(name, config):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr(splits, "trouble_with_hub", lambda *name: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"'some/one': choose with --dataset_config: .*\['main', 'socratic'\]"):
        get_raw_dataset("some/one", str(tmp_path), 1, 0)


@pytest.mark.parametrize("name", ["some/file.jsonl", "one", "a/b/c", "../x/y", "/abs/olute"])
def test_what_is_no_hub_name_is_not_asked_of_the_hub(tmp_path, name, monkeypatch):
    monkeypatch.setattr(splits, "trouble_with_hub", lambda *name: pytest.fail("asked"))
    with pytest.raises(DataError, match=r"unknown dataset|no such file or folder"):
        get_raw_dataset(name, str(tmp_path), 1, 0)


@pytest.mark.parametrize("config", ("config.json", "adapter_config.json"))
@pytest.mark.parametrize("inner", (".", "actor"))
def test_a_model_given_as_data_is_told_as_that(tmp_path, config, inner):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # a data file by its kind
    model = tmp_path / inner
    model.mkdir(exist_ok=True)
    (model / config).write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=f"{tmp_path} is a model folder .*{config} beside model.safetensors"):
        get_raw_dataset(str(tmp_path), str(tmp_path), 1, -1)
