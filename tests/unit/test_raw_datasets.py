"""Datasets read from local copies: the rule of each known dataset, readers of any path, bad input."""

import errno
import gzip
import json
import random
import string
import sys
import tracemalloc
import types
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.data import raw_datasets, readers, splits
from utils.data.errors import DataError
from utils.data.fingerprints import content_fingerprint
from utils.data.own_files import PathDataset, get_raw_dataset
from utils.data.raw_datasets import KNOWN_DATASETS, PromptRawDataset, QuestionDataset, find_known_dataset
from utils.data.readers import CsvFile, JsonArrayFile, JsonLinesFile, ParquetFile, open_file
from utils.data.row_texts import text
from utils.data.rows import ConcatRows, ListRows, SubsetRows

SEED = 1234
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def write_rows(path, rows):
    """Writes rows in the format that the ending of `path` names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.name.endswith(".csv"):
        columns = list(rows[0])
        lines = [columns, *([row[name] for name in columns] for row in rows)]
        quoted = [",".join('"' + str(value).replace('"', '""') + '"' for value in line) for line in lines]
        path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def open_at(path, tmp_path, **options):
    return get_raw_dataset(str(path), str(tmp_path / "out"), SEED, 0, **options)


# The rules. Per dataset: splits, rows in its true schema, and (prompt, chosen, rejected) of each.

PASSAGE = {"docid": "1#0", "title": "题", "text": "答案。"}
WRONG = PASSAGE | {"text": "错"}
CONTEXT = {"answer": "徳島", "paragraph_question": "question: q, context: c", "sentence_answer": "<hl>徳島<hl>"}

RULES = {
    "Dahoas/rm-static": (
        ("train", "test"),
        [
            {
                "prompt": "\n\nHuman: hi\n\nAssistant:",
                "response": " Yes.",
                "chosen": " Yes.",
                "rejected": " {no} %s",
            },
            {"prompt": None, "response": "x", "chosen": " a", "rejected": " b"},
            {"prompt": "\n\nHuman: x\n\nAssistant:", "response": "", "chosen": "", "rejected": " b"},
        ],
        [
            ("\n\nHuman: hi\n\nAssistant:", " Yes.", " {no} %s"),
            (None, " a", " b"),
            ("\n\nHuman: x\n\nAssistant:", None, " b"),
        ],
    ),
    "Dahoas/full-hh-rlhf": (
        ("train", "test"),
        [
            {"prompt": "Human: hi Assistant:", "response": "a", "chosen": "a", "rejected": "b"},
            {"prompt": "Human: hi Assistant:", "response": None, "chosen": "a", "rejected": None},
        ],
        [("Human: hi Assistant:", "a", "b"), ("Human: hi Assistant:", "a", None)],
    ),
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        ("train",),
        [{"prompt": "What?", "chosen": "This.", "rejected": "That."}, {"prompt": "", "chosen": "c", "rejected": "r"}],
        [(" Human: What? Assistant:", " This.", " That."), (None, " c", " r")],
    ),
    "openai/webgpt_comparisons": (
        ("train",),
        [
            {
                "question": {"dataset": "eli5", "id": "1", "full_text": "Why?"},
                "score_0": score,
                "score_1": -score,
                "quotes_0": {"title": ["t"], "extract": ["e"]},
                "tokens_0": {"prefix": [1, 2], "completion": [3]},
                "quotes_1": {"title": ["t"], "extract": ["e"]},
                "tokens_1": {"prefix": [1, 2], "completion": [3]},
                "answer_0": "Sky [1] is blue [2, 3].",
                "answer_1": "Air (1, 2) scatters(4)\nlight.",
            }
            for score in (0.5, -0.5, 0.0)
        ]
        + [
            {
                "question": {"dataset": "eli5", "id": "2", "full_text": "Nested"},
                "answer_0": "foo (see (1)) [2]",
                "score_0": 1.0,
                "answer_1": "[1]",
                "score_1": -1.0,
            },
            {
                "question": {"dataset": "eli5", "id": "3", "full_text": "No score"},
                "answer_0": "a",
                "score_0": None,
                "answer_1": "b",
                "score_1": 0.0,
            },
            {
                "question": {"dataset": "eli5", "id": "4", "full_text": None},
                "answer_0": "a",
                "score_0": 1.0,
                "answer_1": None,
                "score_1": -1.0,
            },
        ],
        [
            (" Human: Why? Assistant:", " Sky is blue.", " Air scatters\nlight."),
            (" Human: Why? Assistant:", " Air scatters\nlight.", " Sky is blue."),
            (" Human: Why? Assistant:", " Sky is blue.", " Air scatters\nlight."),
            (" Human: Nested Assistant:", " foo)", None),
            (" Human: No score Assistant:", None, None),
            (None, " a", None),
        ],
    ),
    "stanfordnlp/SHP": (
        ("train", "validation"),
        [
            {
                "post_id": "p",
                "domain": "askacademia_train",
                "history": "H",
                "human_ref_A": "A",
                "human_ref_B": "B",
                "labels": label,
                "score_ratio": 2.0,
            }
            for label in (1, 0, None)
        ],
        [(" Human: H Assistant:", *answers) for answers in ((" A", " B"), (" B", " A"), (None, None))],
    ),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (
        ("train", "test"),
        [
            {"prompt": "USER: hi ASSISTANT: yes USER: and? ASSISTANT:", "label": "Ok."},
            {"prompt": "USER: hi ASSISTANT:", "label": None},
        ],
        [("Human: hi Assistant: yes Human: and? Assistant:", " Ok.", None), ("Human: hi Assistant:", None, None)],
    ),
    "wangrui6/Zhihu-KOL": (
        ("train",),
        [
            {"INSTRUCTION": "怎么说服男朋友？", "RESPONSE": "ＡＢＣ　全角。", "SOURCE": "Zhihu", "METADATA": "{}"},
            {"INSTRUCTION": "问", "RESPONSE": "　", "SOURCE": "Zhihu", "METADATA": None},
        ],
        [(" Human: 怎么说服男朋友？ Assistant:", " ＡＢＣ　全角。", None), (" Human: 问 Assistant:", None, None)],
    ),
    "Cohere/miracl-zh-queries-22-12": (
        ("train", "dev"),
        [
            {"query_id": "1", "query": "问", "positive_passages": [PASSAGE], "negative_passages": [WRONG]},
            {"query_id": "2", "query": "问", "positive_passages": [PASSAGE], "negative_passages": []},
        ],
        [(" Human: 问 Assistant:", " 答案。", " 错"), (" Human: 问 Assistant:", " 答案。", None)],
    ),
    "Hello-SimpleAI/HC3-Chinese": (
        ("train",),
        [
            {"id": "0", "question": "问？", "human_answers": ["答", "二"], "chatgpt_answers": ["机"]},
            {"id": "1", "question": "问？", "human_answers": [], "chatgpt_answers": ["机"]},
        ],
        [(" Human: 问？ Assistant:", " 答", None), (" Human: 问？ Assistant:", None, None)],
    ),
    "mkqa-Chinese": (
        ("train",),
        [
            {
                "example_id": 1,
                "queries": {"zh_cn": "谁？", "ja": "誰？"},
                "answers": {
                    "zh_cn": [{"type": 1, "text": "他", "aliases": []}],
                    "ja": [{"type": 1, "text": "彼", "aliases": []}],
                },
            },
            {
                "example_id": 2,
                "queries": {"zh_cn": "谁？", "ja": "誰？"},
                "answers": {"zh_cn": [{"type": 0, "text": None, "aliases": []}], "ja": []},
            },
        ],
        [(" Human: 谁？ Assistant:", " 他", None), (" Human: 谁？ Assistant:", None, None)],
    ),
    "lmqg/qg_jaquad": (
        ("train", "validation"),
        [{"question": "どこ？", "sentence": "徳島県です。", "paragraph": "p", **CONTEXT}],
        [(" Human: どこ？ Assistant:", " 徳島県です。", None)],
    ),
    "lmqg/qag_jaquad": (
        ("train", "validation"),
        [
            {"questions": ["どこ？", "何？"], "answers": ["a", "b"], "paragraph": "段落。", "questions_answers": "x"},
            {"questions": [None], "answers": ["a"], "paragraph": "段落。", "questions_answers": "x"},
        ],
        [(" Human: どこ？ Assistant:", " 段落。", None), (None, " 段落。", None)],
    ),
}
RULES["Cohere/miracl-ja-queries-22-12"] = RULES["Cohere/miracl-zh-queries-22-12"]
RULES["mkqa-Japanese"] = (
    ("train",),
    RULES["mkqa-Chinese"][1],
    [(" Human: 誰？ Assistant:", " 彼", None), (" Human: 誰？ Assistant:", None, None)],
)

CLASS_NAMES = {
    "Dahoas/rm-static": ("DahoasRmstaticDataset", "Dahoas_rm_static"),
    "Dahoas/full-hh-rlhf": ("DahoasFullhhrlhfDataset", "Dahoas_full_hh_rlhf"),
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        "DahoasSyntheticinstructgptjpairwiseDataset",
        "Dahoas_synthetic_instruct_gptj_pairwise",
    ),
    "yitingxie/rlhf-reward-datasets": ("YitingxieRlhfrewarddatasetsDataset", "yitingxie_rlhf_reward_datasets"),
    "openai/webgpt_comparisons": ("OpenaiWebgptcomparisonsDataset", "openai_webgpt_comparisons"),
    "stanfordnlp/SHP": ("StanfordnlpSHPDataset", "stanfordnlp_SHP"),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (
        "PvduySharegptalpacaoavicunaformatDataset",
        "pvduy_sharegpt_alpaca_oa_vicuna_format",
    ),
    "local/jsonfile": ("LocalJsonFileDataset", "jsonfile"),
    "wangrui6/Zhihu-KOL": ("Wangrui6ZhihuKOLDataset", "wangrui6_Zhihu_KOL"),
    "Cohere/miracl-zh-queries-22-12": ("CohereMiraclzhqueries2212Dataset", "Cohere_miracl_zh_queries_22_12"),
    "Hello-SimpleAI/HC3-Chinese": ("HelloSimpleAIHC3ChineseDataset", "Hello_SimpleAI_HC3_Chinese"),
    "mkqa-Chinese": ("MkqaChineseDataset", "mkqa"),
    "mkqa-Japanese": ("MkqaJapaneseDataset", "mkqa"),
    "Cohere/miracl-ja-queries-22-12": ("CohereMiracljaqueries2212Dataset", "Cohere_miracl_ja_queries_22_12"),
    "lmqg/qg_jaquad": ("LmqgQgjaquadDataset", "lmqg_qg_jaquad"),
    "lmqg/qag_jaquad": ("LmqgQagjaquadDataset", "lmqg_qag_jaquad"),
}


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_published_class_and_file_stem_belong_to_the_name(name):
    class_name, stem = CLASS_NAMES[name]
    assert KNOWN_DATASETS[name] is getattr(raw_datasets, class_name)
    assert (KNOWN_DATASETS[name].dataset_name, KNOWN_DATASETS[name].dataset_name_clean) == (name, stem)
    assert issubclass(KNOWN_DATASETS[name], PromptRawDataset)


def local_copy(root, name, splits, rows, layout):
    folder = root / name
    if layout == "parquet":
        for split in splits:
            write_rows(folder / "data" / f"{split}-00000-of-00001-0a1b2c.parquet", rows)
    elif layout == "jsonl":
        for split in splits:
            write_rows(folder / f"{split}.jsonl", rows)
    else:
        data = datasets.Dataset.from_list(rows)
        datasets.DatasetDict(dict.fromkeys(splits, data)).save_to_disk(str(folder))
    (folder / "README.md").write_text("a card")
    return folder


@pytest.mark.parametrize("layout", ["parquet", "jsonl", "save_to_disk"])
@pytest.mark.parametrize("name", RULES)
def test_rule_of_each_dataset_on_rows_of_a_local_copy(name, layout, tmp_path):
    splits, rows, expected = RULES[name]
    dataset = open_at(local_copy(tmp_path, name, splits, rows, layout), tmp_path)
    assert type(dataset) is KNOWN_DATASETS[name]
    assert dataset.has_rejected == any(rejected for _, _, rejected in expected)

    if len(splits) == 2:
        train = dataset.get_train_data()
        assert len(dataset.get_eval_data()) == len(rows)
    else:
        train = dataset.raw_datasets["train"]
        parts = [dataset.get_train_data(), dataset.get_eval_data()]
        assert sorted(int(i) for part in parts for i in part.indices) == list(range(len(rows)))
    assert len(train) == len(rows)

    for i, (prompt, chosen, rejected) in enumerate(expected):
        row = train[np.int64(i)]
        assert dataset.get_prompt(row) == prompt
        assert dataset.get_chosen(row) == chosen
        assert dataset.get_rejected(row) == rejected
        assert dataset.get_prompt_and_chosen(row) == (prompt + chosen if prompt and chosen else None)
        assert dataset.get_prompt_and_rejected(row) == (prompt + rejected if prompt and rejected else None)
    whole = [i for i, (prompt, chosen, _) in enumerate(expected) if prompt and chosen]
    report = dataset.check_rows(train)
    assert report.kept == whole
    assert report.skipped.total() == len(rows) - len(whole)


def test_yitingxie_answers_begin_after_their_last_assistant_mark(tmp_path):
    rows = [
        {"prompt": "Human: a\n\n", "chosen": "Assistant: x Human: b Assistant: y", "rejected": "Assistant: z"},
        {"prompt": "Human: a\n\n", "chosen": "no mark", "rejected": "Assistant:  "},
    ]
    folder = local_copy(tmp_path, "yitingxie/rlhf-reward-datasets", ("train", "test"), rows, "parquet")
    dataset = open_at(folder, tmp_path)
    first, second = dataset.get_train_data()
    assert dataset.get_prompt(first) == "Human: a\n\nAssistant:"
    assert (dataset.get_chosen(first), dataset.get_rejected(first)) == (" y", " z")
    assert dataset.get_prompt_and_chosen(first) == "Human: a\n\nAssistant: x Human: b Assistant: y"
    assert dataset.get_prompt_and_rejected(first) == "Human: a\n\nAssistant: z"
    assert (dataset.get_chosen(second), dataset.get_rejected(second)) == ("no mark", None)


@pytest.mark.parametrize("as_array", [True, False])
def test_local_jsonfile_reads_the_projects_data_folder(tmp_path, as_array):
    rows = [PAIR, PAIR | {"rejected": None}]
    for split in ("train", "eval"):
        path = write_rows(tmp_path / "data" / f"{split}.json", rows)
        if not as_array:
            path.write_text("\n".join(map(json.dumps, rows)))
    dataset = open_at("local/jsonfile", tmp_path, data_root=tmp_path)
    row = dataset.get_train_data()[0]
    assert [dataset.get_prompt(row), dataset.get_chosen(row), dataset.get_rejected(row)] == [" q", " good", " bad"]
    assert dataset.get_prompt_and_chosen(row) == " q good"
    report = dataset.check_rows(dataset.get_eval_data(), need=("prompt", "chosen", "rejected"))
    assert (report.kept, list(report.skipped)) == ([0], ["field 'rejected' is null"])


def test_local_jsonfile_without_its_files_says_which_are_absent(tmp_path):
    write_rows(tmp_path / "data/train.json", [PAIR])
    with pytest.raises(DataError, match=r"data/train.json and data/eval.json, not found: .*eval\.json"):
        open_at("local/jsonfile", tmp_path, data_root=tmp_path)


def test_local_demo_is_made_by_the_demo_world(tmp_path, monkeypatch):
    world = types.ModuleType("utils.demo.world")
    world.__file__ = str(tmp_path / "world.py")
    Path(world.__file__).write_text("first version")
    exec("def demo_rows(split): return [{'prompt': split, 'chosen': 'c', 'rejected': 'r'}]", vars(world))
    monkeypatch.setitem(sys.modules, "utils.demo.world", world)
    monkeypatch.setattr(raw_datasets, "demo_rows", world.demo_rows)
    dataset = open_at("local/demo", tmp_path)
    assert dataset.get_prompt_and_chosen(dataset.get_train_data()[0]) == "trainc"
    assert dataset.get_prompt(dataset.get_eval_data()[0]) == "eval"
    before = dataset.fingerprint()
    Path(world.__file__).write_text("second version")
    assert open_at("local/demo", tmp_path).fingerprint() != before


# Finding a dataset


def test_path_matches_a_name_only_as_whole_parts(tmp_path):
    known = write_rows(tmp_path / "Dahoas/rm-static/data/train.jsonl", [PAIR])
    other = write_rows(tmp_path / "Dahoas/rm-static-v2/train.jsonl", [PAIR])
    named_file = write_rows(tmp_path / "stanfordnlp/SHP.jsonl", [PAIR])
    demo = write_rows(tmp_path / "local/demo/train.jsonl", [PAIR])
    assert find_known_dataset(str(known)).dataset_name == "Dahoas/rm-static"
    assert find_known_dataset(str(known.parent.parent)).dataset_name == "Dahoas/rm-static"
    assert find_known_dataset(str(named_file)).dataset_name == "stanfordnlp/SHP"
    assert find_known_dataset(str(other)) is None
    assert find_known_dataset(str(demo)) is None


def test_known_name_is_found_under_the_data_root_and_from_the_working_directory(tmp_path, monkeypatch):
    for split in ("train", "test"):
        write_rows(tmp_path / f"data/Dahoas/rm-static/{split}.parquet", [PAIR])
    assert len(open_at("Dahoas/rm-static", tmp_path, data_root=tmp_path).get_eval_data()) == 1
    monkeypatch.chdir(tmp_path / "data")
    assert len(open_at("Dahoas/rm-static", tmp_path, data_root=tmp_path / "none").get_train_data()) == 1


def test_hub_layouts_with_folders_per_split_or_topic_and_numbered_files(tmp_path):
    shp = RULES["stanfordnlp/SHP"][1]
    for topic in ("askacademia", "askbaking"):
        for split in ("train", "validation", "test"):
            write_rows(tmp_path / f"stanfordnlp/SHP/{topic}/{split}.json", shp)
    dataset = open_at(tmp_path / "stanfordnlp/SHP", tmp_path)
    assert len(dataset.get_train_data()) == len(dataset.get_eval_data()) == 2 * len(shp)
    assert "askbaking/train.json" in dataset.get_train_data().where(2 * len(shp) - 1)

    jaquad = RULES["lmqg/qg_jaquad"][1]
    for name in ("train00", "train01", "validation00", "test00"):
        write_rows(tmp_path / f"lmqg/qg_jaquad/data/processed/{name}.jsonl", jaquad)
    assert len(open_at(tmp_path / "lmqg/qg_jaquad", tmp_path).get_train_data()) == 2

    hc3 = RULES["Hello-SimpleAI/HC3-Chinese"][1]
    for name in ("all", "baike", "law"):
        write_rows(tmp_path / f"Hello-SimpleAI/HC3-Chinese/{name}.jsonl", hc3)
    assert len(open_at(tmp_path / "Hello-SimpleAI/HC3-Chinese", tmp_path).raw_datasets["train"]) == len(hc3)

    write_rows(tmp_path / "mkqa-Japanese/mkqa/train/0000.parquet", RULES["mkqa-Japanese"][1])
    assert len(open_at(tmp_path / "mkqa-Japanese", tmp_path).raw_datasets["train"]) == 2

    write_rows(tmp_path / "Cohere/miracl-ja-queries-22-12/train.jsonl.gz", RULES["Cohere/miracl-ja-queries-22-12"][1])
    write_rows(tmp_path / "Cohere/miracl-ja-queries-22-12/dev.jsonl.gz", RULES["Cohere/miracl-ja-queries-22-12"][1])
    assert len(open_at(tmp_path / "Cohere/miracl-ja-queries-22-12", tmp_path).get_eval_data()) == 2


def test_local_copy_without_the_published_eval_split_is_an_error_and_a_single_file_is_divided(tmp_path):
    file = write_rows(tmp_path / "Dahoas/rm-static/train.jsonl", [PAIR] * 20)
    with pytest.raises(DataError, match=r"expected a split 'test', found only: train"):
        open_at(file.parent, tmp_path).get_eval_data()
    alone = open_at(file, tmp_path)
    assert (len(alone.get_train_data()), len(alone.get_eval_data())) == (18, 2)


def test_unknown_name_lists_the_known_ones_and_what_a_path_would_have_to_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an empty folder: "." of the project has files of data in it
    with pytest.raises(DataError) as error:
        open_at("Dahoas_rm-static", tmp_path)
    message = str(error.value)
    assert "unknown dataset 'Dahoas_rm-static' (did you mean 'Dahoas/rm-static'?)" in message
    assert all(name in message for name in CLASS_NAMES) and "save_to_disk folder" in message
    for name in ("", "\0", "x" * 5000, "."):
        with pytest.raises(DataError):
            open_at(name, tmp_path / "nowhere")


def test_hub_failure_says_where_was_looked_and_what_failed(tmp_path, monkeypatch):
    def no_network(*args):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(splits, "trouble_with_hub", lambda *name: None)
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(
        DataError, match=r"not found locally .* could not be downloaded because ConnectionError: no route to"
    ):
        open_at("Dahoas/rm-static", tmp_path, data_root=tmp_path)


def test_hub_dataset_is_asked_for_by_its_hub_name_and_variant(tmp_path, monkeypatch):
    asked = []

    def load(*args):
        asked.append(args)
        name = "mkqa-Chinese" if args[0] == "mkqa" else args[0]
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(RULES[name][1])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    mkqa = open_at("mkqa-Chinese", tmp_path, data_root=tmp_path)
    assert mkqa.get_chosen(mkqa.raw_datasets["train"][0]) == " 他"
    open_at("Hello-SimpleAI/HC3-Chinese", tmp_path, data_root=tmp_path)
    assert asked == [("mkqa", None), ("Hello-SimpleAI/HC3-Chinese", "all")]


def test_dataset_class_in_the_published_style_works_as_it_is(tmp_path):
    class Plain(PromptRawDataset):
        def __init__(self, output_path, seed, local_rank, dataset_name):
            self.dataset_name, self.dataset_name_clean = "me/plain", "me_plain"
            super().__init__(output_path, seed, local_rank, dataset_name)

        def get_train_data(self):
            return self.raw_datasets["train"]

        def get_prompt(self, sample):
            return sample["q"]

        def get_chosen(self, sample):
            return sample["a"] or None

    path = write_rows(tmp_path / "plain.jsonl", [{"q": "1", "a": "x"}, {"q": "2", "a": ""}])
    dataset = Plain(str(tmp_path), SEED, 0, str(path))
    report = dataset.check_rows(dataset.get_train_data())
    assert report.kept == [0] and report.skipped.total() == 1
    assert len(dataset.fingerprint()) == 32


def test_one_small_class_adds_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_datasets, "KNOWN_DATASETS", dict(KNOWN_DATASETS))

    class MyDataset(QuestionDataset):
        dataset_name, dataset_name_clean = "me/my-pairs", "me_my_pairs"
        prompt_field, chosen_field, rejected_field = "question", ("answers", 0), ("answers", 1)

    path = write_rows(tmp_path / "me/my-pairs/rows.parquet", [{"question": "q", "answers": ["good", "bad"]}] * 10)
    dataset = open_at(path.parent, tmp_path)
    row = dataset.get_train_data()[0]
    assert dataset.get_prompt_and_rejected(row) == " Human: q Assistant: bad"


# Any path

ROWS = [{"prompt": f'q{i}, "quoted"\nnew line', "chosen": f"ja {i} ü", "rejected": f"nein {i} 否"} for i in range(20)]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.ndjson", "d.jsonl.gz", "d.json.gz", "d.csv", "d.parquet"])
def test_one_file_of_each_kind_is_divided_nine_to_one(name, tmp_path):
    if name == "d.json.gz":
        path = tmp_path / name
        path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    else:
        path = write_rows(tmp_path / name, ROWS)
    dataset = open_at(path, tmp_path)
    assert type(dataset) is PathDataset and dataset.has_rejected
    parts = [dataset.get_train_data(), dataset.get_eval_data()]
    assert [len(part) for part in parts] == [18, 2]
    shuffled = np.arange(20, dtype=np.uint32)
    np.random.RandomState(SEED).shuffle(shuffled)
    assert [row for part in parts for row in part] == [ROWS[i] for i in shuffled]
    row = parts[0][-1]
    assert dataset.get_prompt_and_chosen(row) == row["prompt"] + row["chosen"]


@pytest.mark.parametrize("eval_name", ["eval", "test", "validation", "dev"])
@pytest.mark.parametrize("ending", [".json", ".csv", ".parquet"])
def test_folder_of_split_files(eval_name, ending, tmp_path):
    write_rows(tmp_path / "set" / f"train{ending}", ROWS)
    write_rows(tmp_path / "set" / f"my_{eval_name}-00000{ending}", ROWS[:3])
    write_rows(tmp_path / "set" / f"leftover{ending}", ROWS[:1])
    dataset = open_at(tmp_path / "set", tmp_path)
    assert (list(dataset.get_train_data()), list(dataset.get_eval_data())) == (ROWS, ROWS[:3])
    assert f"not read, for want of a split in the name: leftover{ending}" in dataset.describe()


def test_folder_of_shards_without_split_names_is_one_train_split(tmp_path):
    for part in range(2):
        write_rows(tmp_path / "set" / f"part{part}.jsonl", ROWS[part * 10 : part * 10 + 10])
    dataset = open_at(tmp_path / "set", tmp_path)
    rows = dataset.raw_datasets["train"]
    assert isinstance(rows, ConcatRows) and list(rows) == ROWS and rows[-1] == ROWS[-1]
    assert rows.where(10).endswith("part1.jsonl, line 1")
    assert (len(dataset.get_train_data()), len(dataset.get_eval_data())) == (18, 2)


def test_save_to_disk_folders_of_one_and_of_several_splits(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "validation": data.select([0])}).save_to_disk(str(tmp_path / "two"))
    one, two = open_at(tmp_path / "one", tmp_path), open_at(tmp_path / "two", tmp_path)
    assert (len(one.get_train_data()), len(one.get_eval_data())) == (18, 2)
    assert (list(two.get_train_data()), list(two.get_eval_data())) == (ROWS, ROWS[:1])
    (tmp_path / "two/train/state.json").write_text("{")
    with pytest.raises(DataError, match=r"two: expected a save_to_disk folder, but it cannot be loaded"):
        open_at(tmp_path / "two", tmp_path)


def test_columns_are_renamed(tmp_path):
    rows = [{"question": "q", "good": "g", "bad": "b", "prompt": "not this one"}] * 10
    path = write_rows(tmp_path / "d.parquet", rows)
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    dataset = open_at(path, tmp_path, columns=names)
    assert dataset.get_prompt_and_rejected(dataset.get_train_data()[0]) == "qb"
    assert "prompt" not in dataset.get_train_data()[0]
    without = open_at(path, tmp_path, columns={"prompt": "question", "chosen": "good", "rejected": None})
    assert not without.has_rejected and without.get_rejected(rows[0]) is None
    with pytest.raises(DataError, match=r"expected the column 'frage', found the columns 'question', 'good'"):
        open_at(path, tmp_path, columns={"prompt": "frage"})
    with pytest.raises(DataError, match=r"expected the keys"):
        open_at(path, tmp_path, columns={"promt": "frage"})


def test_prompts_alone_are_enough_until_answers_are_needed(tmp_path):
    dataset = open_at(write_rows(tmp_path / "d.jsonl", [{"prompt": "q"}] * 10), tmp_path)
    rows = dataset.get_train_data()
    assert len(dataset.check_rows(rows, need=("prompt",)).kept) == 9
    with pytest.raises(DataError, match=r"9 x the dataset has no answers .*found the columns 'prompt'"):
        dataset.check_rows(rows)
    with pytest.raises(DataError, match=r"has none"):
        dataset.check_rows(rows, need=("prompt", "chosen", "rejected"))


def test_files_of_one_name_keep_their_indices_apart(tmp_path):
    first = open_at(write_rows(tmp_path / "a/data.jsonl", ROWS), tmp_path)
    second = open_at(write_rows(tmp_path / "b/data.jsonl", ROWS[:5]), tmp_path)
    copied = open_at(write_rows(tmp_path / "c/data.jsonl", ROWS), tmp_path)
    assert first.dataset_name_clean != second.dataset_name_clean
    assert first.dataset_name_clean == copied.dataset_name_clean


# Conversations

TURNS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


def open_conversations(tmp_path, rows, name="chat.jsonl"):
    dataset = open_at(write_rows(tmp_path / name, rows), tmp_path)
    assert type(dataset) is PathDataset and not dataset.has_rejected
    return dataset


def messages_of(dataset, row, need=("prompt", "chosen")):
    [example] = dataset.examples(row, need)
    return [*example.prompt, *(turn for answer in example.answers for turn in answer)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_messages_and_human_assistant_turns_are_the_same_conversation(ending, tmp_path):
    pairs = [{"human": "q1", "assistant": "a1"}, {"human": "q2", "assistant": "a2"}]
    for column, value in (("messages", TURNS), ("conversation", pairs)):
        dataset = open_conversations(tmp_path, [{column: value}] * 10, f"{column}.{ending}")
        row = dataset.get_train_data()[0]
        assert messages_of(dataset, row) == TURNS
        assert dataset.get_prompt(row) == " Human: q1 Assistant: a1 Human: q2 Assistant:"
        assert dataset.get_chosen(row) == " a2"
        assert dataset.get_prompt_and_chosen(row) == " Human: q1 Assistant: a1 Human: q2 Assistant: a2"


def test_system_message_comes_first_and_an_open_question_is_a_prompt(tmp_path):
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, *TURNS[:3]]}, {"conversation": [{"human": "q"}]}]
    dataset = open_conversations(tmp_path, rows)
    assert dataset.get_prompt(rows[0]) == " Be kind. Human: q1 Assistant: a1 Human: q2 Assistant:"
    # What follows the last answer is nothing to learn.
    assert messages_of(dataset, rows[0]) == rows[0]["messages"][:3]
    assert dataset.get_chosen(rows[0]) == " a1"
    unanswered = {"messages": TURNS[:1]}
    assert dataset.get_prompt(unanswered) == " Human: q1 Assistant:" and dataset.get_chosen(unanswered) is None
    assert dataset.skip_reason(unanswered) == "field 'messages' holds no answer"


@pytest.mark.parametrize(
    "turns, reason",
    [
        (None, "is null"),
        ([], "is an empty list"),
        ("text", "expected a list of turns, found a string"),
        ([3], "expected an object, found a number"),
        ([{"role": "user"}], "'content' is missing"),
        ([{"role": "user", "content": 3}], "expected a string, found a number"),
        ([{"role": "user", "content": " "}], "is empty"),
        ([{"role": "tool", "content": "x"}], "another order"),
        ([{"role": "narrator", "content": "x"}], "expected the role system, developer, user, assistant, tool"),
        ([{"content": "x"}], "expected the role"),
        ([{"role": "system", "content": "x"}], "another order"),
        ([TURNS[1], TURNS[0]], "another order"),
        ([TURNS[0], TURNS[0]], "another order"),
        ([{"human": None, "assistant": "a"}], "'human' is null"),
    ],
)
def test_unusable_conversations_are_skipped_with_the_reason(turns, reason, tmp_path):
    dataset = open_conversations(tmp_path, [{"messages": TURNS}, {"messages": turns}])
    rows = dataset.raw_datasets["train"]
    report = dataset.check_rows(rows)
    assert report.kept == [0]
    (found,) = report.skipped
    assert reason in found and report.examples[found][0].endswith("line 2")


def test_texts_win_over_messages_unless_the_caller_names_the_column(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [PAIR | {"messages": TURNS}])
    assert open_at(path, tmp_path).recognised() == "preference pairs as texts; columns not read: messages"
    named = open_at(path, tmp_path, columns={"messages": "messages"})
    assert named.recognised().startswith("conversations as messages; columns not read: prompt")
    with pytest.raises(DataError, match=r"expected the column 'talk'"):
        open_at(path, tmp_path, columns={"messages": "talk"})


# Bad rows are counted, damaged files are errors


def test_unusable_rows_are_counted_with_reason_and_place(tmp_path):
    lines = [
        '\ufeff{"prompt": "q", "chosen": "c", "rejected": "r"}',
        "",
        '{"chosen": "c", "rejected": "r"}',
        '{"prompt": null, "chosen": "c", "rejected": "r"}\r',
        '{"prompt": "q", "chosen": 5, "rejected": "r"}',
        '{"prompt": "q", "chosen": ["c"], "rejected": "r"}',
        "   ",
        '{"prompt": "q", "chosen": " \\n", "rejected": "r"}',
        '{"prompt": "q", "chosen": "\\ud800", "rejected": "r"}',
        *['{"prompt": "q", "chosen": "c"}'] * 5,
        '{"prompt": "last", "chosen": "c", "rejected": "r"}',
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    dataset = open_at(path, tmp_path)
    rows = dataset.raw_datasets["train"]
    report = dataset.check_rows(rows, need=("prompt", "chosen", "rejected"))
    assert [rows[i]["prompt"] for i in report.kept] == ["q", "last"]
    assert report.total == 13
    assert report.skipped == {
        "field 'prompt' is missing": 1,
        "field 'prompt' is null": 1,
        "field 'chosen': expected a string, found a number": 1,
        "field 'chosen': expected a string, found a list": 1,
        "field 'chosen' is empty": 1,
        "field 'chosen' holds a lone surrogate, which is no character": 1,
        "field 'rejected' is missing": 5,
    }
    assert report.examples["field 'rejected' is missing"] == [f"{path}, line {line}" for line in (10, 11, 12)]
    assert "2 of 13 rows used, 11 skipped: 5 x field 'rejected' is missing" in str(report)
    # A row that is skipped here has no text there either.
    assert dataset.get_prompt_and_chosen(rows[6]) is None


def test_column_that_no_row_has_is_an_error(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"text": "a"}] * 3)
    with pytest.raises(
        DataError, match=r"d.jsonl: expected the column 'prompt' or 'messages' or .*found the columns 'text'"
    ):
        open_at(path, tmp_path)
    folder = local_copy(tmp_path, "Dahoas/rm-static", ("train", "test"), [{"text": "a"}], "parquet")
    with pytest.raises(
        DataError, match=r"rm-static: expected the column 'prompt' or 'chosen' .*found the columns 'text'"
    ):
        open_at(folder, tmp_path).get_train_data()


GOOD_LINE = json.dumps(PAIR).encode()


@pytest.mark.parametrize(
    "bad, message",
    [
        (b"{", r"line 3: expected valid JSON, found: .*column 2"),
        (b'{"prompt": "a" "b"}', r"line 3: expected valid JSON"),
        (b'{"prompt": "\xff\xfe"}', r"line 3: expected UTF-8, found byte 0xff at position 12"),
        (b"[1, 2]", r"line 3: expected one JSON object per line, found a list"),
        (b"null", r"line 3: expected one JSON object per line, found null"),
        (b'{"prompt": "a", "prompt": "b"}', r"line 3: expected each key once, found 'prompt' twice"),
        (b'{"n": ' + b"9" * 5000 + b"}", r"line 3: expected valid JSON, found: Exceeds the limit"),
        (b'{"n": ' + b"[" * 100_000 + b"}", r"line 3: expected valid JSON, found: nested too deeply"),
        (b"\x00" * 40, r"line 3: expected valid JSON"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_damaged_line_is_named(bad, message, late, tmp_path):
    path = tmp_path / "d.jsonl"
    filler = [GOOD_LINE] * 200 if late else []
    path.write_bytes(b"\n".join([GOOD_LINE, b"", bad, *filler]))
    if late:
        path.write_bytes(b"\n".join([*filler, bad, GOOD_LINE]))
        message = message.replace("line 3", "line 201")
    with pytest.raises(DataError, match=f"d.jsonl, {message}"):
        dataset = open_at(path, tmp_path)
        dataset.check_rows(dataset.raw_datasets["train"])


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("d.jsonl", b"", "d.jsonl: expected rows, found an empty file"),
        ("d.jsonl", b"\n \n\xef\xbb", "d.jsonl, line 3: expected UTF-8"),
        ("d.jsonl", b"\xef\xbb\xbf\n\n", "d.jsonl: expected at least one row, found only blank lines"),
        ("d.json", b" [] ", "d.json: expected at least one row, found an empty array"),
        ("d.json", b'[{"prompt": "a"}, 3]', "d.json, row 2: expected a JSON object, found a number"),
        ("d.json", b'[{"prompt":\n"a"},\n]', r"d.json: expected valid JSON, found: .*\(line 3, column 1\)"),
        (
            "d.json",
            b'[{"prompt":\n"\xc3"}]',
            r"d.json: expected UTF-8, found byte 0xc3 at position 13 \(line 2 of it\)",
        ),
        ("d.json", b'{\n"prompt": "a"}', "d.json, line 1: expected valid JSON.*an array of objects, or one object per"),
        ("d.json", b'[{"prompt": 1, "prompt": 2}]', "d.json: expected each key once, found 'prompt' twice"),
        ("d.csv", b"prompt,chosen\n", "d.csv: expected at least one row, found none"),
        ("d.csv", b"prompt,prompt\na,b\n", "d.csv, line 1: expected a header .* found the column 'prompt' twice"),
        ("d.csv", b"\n\n", "d.csv, line 1: expected a header"),
        ("d.csv", b'prompt,chosen\n"a\nb",c\nd,e,f\n', "d.csv, line 4: expected 2 fields, found 3"),
        ("d.csv", b'prompt,chosen\na,b\nc,"d\n', "d.csv, line 3: expected a CSV record"),
        ("d.csv", b"prompt,chosen\na,b\nc,\xff\n", "d.csv, line 3: expected UTF-8"),
        ("d.parquet", b"PAR1 and no more", "d.parquet: expected a parquet file"),
        ("d.jsonl.gz", b"not packed", "d.jsonl.gz: cannot be read"),
        ("d.jsonl.gz", gzip.compress(GOOD_LINE * 100, mtime=0)[:-9], "d.jsonl.gz: cannot be read"),
        ("d.doc", b"text", "d.doc: expected a file that ends in one of .json, .jsonl"),
    ],
)
def test_damaged_file_is_named(name, data, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        dataset = open_at(path, tmp_path)
        dataset.check_rows(dataset.raw_datasets["train"])


def test_damaged_parquet_pages_and_text_name_the_file_and_row(tmp_path):
    path = write_rows(tmp_path / "cut.parquet", [{"prompt": f"{i}" * 50} for i in range(1000)])
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"\xff" * 200 + data[300:])
    with pytest.raises(DataError, match=r"cut.parquet, after row 0"):
        open_file(path)[0]

    raw = pa.array([b"fine"] * 300 + [b"\xff\xfe"], pa.binary())
    text_column = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"prompt": text_column}), tmp_path / "bytes.parquet")
    with pytest.raises(DataError, match=r"bytes.parquet, row 301: expected UTF-8 text"):
        open_file(tmp_path / "bytes.parquet")[0]


def test_parquet_values_that_are_no_text_do_not_become_text(tmp_path):
    table = pa.table({"prompt": pa.array([b"bytes", b"more"], pa.binary()), "chosen": ["a", "b"]})
    pq.write_table(table, tmp_path / "d.parquet")
    dataset = open_at(tmp_path / "d.parquet", tmp_path)
    with pytest.raises(DataError, match=r"field 'prompt': expected a string"):
        dataset.check_rows(dataset.raw_datasets["train"])


def test_folder_without_data_or_with_two_kinds_for_a_split_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: expected data files"):
        open_at(tmp_path / "empty", tmp_path)
    write_rows(tmp_path / "mixed/train.jsonl", ROWS)
    write_rows(tmp_path / "mixed/train.parquet", ROWS)
    with pytest.raises(DataError, match=r"files of one kind for the split 'train', found: train.jsonl, train.parquet"):
        open_at(tmp_path / "mixed", tmp_path)
    write_rows(tmp_path / "tests_only/test.jsonl", ROWS)
    with pytest.raises(DataError, match=r"expected a split 'train', found only: test"):
        open_at(tmp_path / "tests_only", tmp_path)


# Readers


def test_long_lines_and_long_csv_fields_are_read(tmp_path):
    long = "x" * (readers.CHUNK_BYTES * 2 + 7)
    lines = write_rows(tmp_path / "d.jsonl", [{"prompt": long}, {"prompt": "b"}, {"prompt": long}])
    table = write_rows(tmp_path / "d.csv", [{"prompt": long}, {"prompt": "b"}])
    rows = JsonLinesFile(lines)
    assert [len(row["prompt"]) for row in rows] == [len(long), 1, len(long)]
    assert rows.where(2).endswith("line 3")
    assert [len(row["prompt"]) for row in CsvFile(table)] == [len(long), 1]


def test_csv_short_rows_lack_fields_and_places_are_first_lines(tmp_path):
    (tmp_path / "d.csv").write_bytes(b'\xef\xbb\xbfprompt,chosen\r\n"a\nb",c\r\n\r\nd\r\n')
    rows = CsvFile(tmp_path / "d.csv")
    assert list(rows) == [{"prompt": "a\nb", "chosen": "c"}, {"prompt": "d"}]
    assert [rows.where(i).rsplit(", ")[1] for i in range(2)] == ["line 2", "line 5"]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet"])
def test_rows_are_indexed_like_a_list(name, tmp_path):
    rows = open_file(write_rows(tmp_path / name, ROWS))
    assert len(rows) == 20 and rows[np.uint32(3)] == rows[-17] == ROWS[3]
    assert list(rows) == ROWS
    for outside in (20, -21):
        with pytest.raises(IndexError):
            rows[outside]
    with pytest.raises(TypeError):
        rows["prompt"]
    subset = SubsetRows(rows, np.array([5, 2]))
    assert [row["prompt"][:2] for row in subset] == ["q5", "q2"] and subset.where(1) == rows.where(2)


def test_wide_columns_that_no_text_needs_are_left_out(tmp_path):
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r", "tokens": list(range(50))}] * 4
    folder = local_copy(tmp_path, "Dahoas/rm-static", ("train", "test"), rows, "parquet")
    assert set(open_at(folder, tmp_path).get_train_data()[0]) == {"prompt", "chosen", "rejected"}
    saved = local_copy(tmp_path / "saved", "Dahoas/rm-static", ("train", "test"), rows, "save_to_disk")
    assert set(open_at(saved, tmp_path).get_train_data()[0]) == {"prompt", "chosen", "rejected"}


def test_full_temporary_folder_is_named(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    rows = open_file(write_rows(tmp_path / "d.parquet", ROWS))
    monkeypatch.setattr(readers.tempfile, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"d.parquet: no room for a copy of its rows in .*TMPDIR"):
        len(rows)


def test_json_lines_keep_little_in_memory(tmp_path):
    path = tmp_path / "d.jsonl"
    line = json.dumps({"prompt": "x" * 1000}) + "\n"
    path.write_text(line * 20_000)
    rows = JsonLinesFile(path)
    tracemalloc.start()
    for i in random.Random(0).sample(range(20_000), 2000):
        assert len(rows[i]["prompt"]) == 1000
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1 << 20 and peak < 64 << 20


# Fingerprints


def test_fingerprint_follows_content_and_not_place(tmp_path):
    first = write_rows(tmp_path / "a/one.jsonl", ROWS)
    copied = write_rows(tmp_path / "b/two.jsonl", ROWS)
    assert content_fingerprint(first) == content_fingerprint(copied) == content_fingerprint([str(first)])
    assert content_fingerprint([first, copied]) != content_fingerprint(first)
    assert content_fingerprint(tmp_path / "a") != content_fingerprint(tmp_path / "b")
    data = bytearray(copied.read_bytes())
    data[len(data) // 2] ^= 1
    copied.write_bytes(data)
    assert content_fingerprint(first) != content_fingerprint(copied)
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read"):
        content_fingerprint(tmp_path / "none.jsonl")


@pytest.mark.parametrize("layout", ["parquet", "jsonl", "save_to_disk"])
def test_dataset_fingerprint_changes_with_rows_columns_and_class(layout, tmp_path):
    def fingerprint(place, rows, name="set", **options):
        return open_at(
            local_copy(tmp_path / place, name, ("train", "test"), rows, layout), tmp_path, **options
        ).fingerprint()

    rows = [PAIR | {"other": "o"}] * 3
    first = fingerprint("1", rows)
    assert fingerprint("3", rows[:2]) != first
    assert fingerprint("4", rows, columns={"chosen": "other"}) != first
    assert fingerprint("5", rows, name="Dahoas/rm-static") != first
    if layout != "save_to_disk":
        # Its state file holds a random id.
        assert fingerprint("2", rows) == first


# Fuzz

FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800")
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def use_all(path, tmp_path):
    """Reads a path as training would. Returns the kept rows' texts, or None after a DataError that names the file."""
    try:
        dataset = open_at(path, tmp_path)
        rows = dataset.raw_datasets["train"]
        report = dataset.check_rows(rows)
    except DataError as error:
        assert path.name in str(error)
        return None
    assert len(report.kept) + report.skipped.total() == report.total == len(rows)
    texts = [dataset.get_prompt_and_chosen(rows[i]) for i in report.kept]
    assert all(whole.encode() for whole in texts)
    return texts


@FUZZ
@given(data=st.binary(max_size=200), ending=st.sampled_from(["json", "jsonl", "csv", "parquet", "jsonl.gz"]))
def test_random_bytes_end_in_rows_skips_or_a_data_error(data, ending, tmp_path):
    path = tmp_path / f"fuzz.{ending}"
    path.write_bytes(data)
    use_all(path, tmp_path)


@FUZZ
@given(
    noise=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 60),
    ending=st.sampled_from(["json", "jsonl", "csv", "jsonl.gz"]),
)
def test_flipped_and_missing_bytes_end_in_rows_skips_or_a_data_error(noise, cut, ending, tmp_path):
    path = write_rows(tmp_path / f"fuzz.{ending}", ROWS[:5])
    data = bytearray(path.read_bytes())
    for place, byte in noise:
        data[place % len(data)] = byte
    path.write_bytes(data[: len(data) - cut])
    use_all(path, tmp_path)


@FUZZ
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["prompt", "chosen", "messages", "x"]), values), min_size=1, max_size=6
    )
)
def test_random_rows_end_in_rows_skips_or_a_data_error(rows, tmp_path):
    path = tmp_path / "fuzz.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    texts = use_all(path, tmp_path)
    usable = [
        row["prompt"] + row["chosen"] for row in rows if is_text(row.get("prompt")) and is_text(row.get("chosen"))
    ]
    if texts is not None and not any("messages" in row for row in rows):
        assert texts == usable


def is_text(value):
    return isinstance(value, str) and bool(value.strip()) and "\ud800" not in value


@FUZZ
@given(
    row=st.dictionaries(st.sampled_from(string.ascii_lowercase[:3]), values), name=st.sampled_from(list(CLASS_NAMES))
)
def test_any_row_gives_texts_or_none_in_every_rule(row, name):
    rule = KNOWN_DATASETS[name]
    dataset = rule.__new__(rule)
    columns = dataset._columns()
    sample = {columns[ord(key) - ord("a")]: value for key, value in row.items() if ord(key) - ord("a") < len(columns)}
    for get in (dataset.get_prompt, dataset.get_chosen, dataset.get_rejected, dataset.get_prompt_and_chosen):
        found = get(sample)
        assert found is None or found.strip()
    reason = dataset.skip_reason(sample, ("prompt", "chosen"))
    assert (reason is None) == (dataset.get_prompt(sample) is not None and dataset.get_chosen(sample) is not None)


def test_rows_in_memory_and_a_json_array_know_their_columns_and_places(tmp_path):
    rows = ListRows([{"a": 1}, {"b": 2}], "made here")
    assert rows.column_names == ["a", "b"] and rows.where(1) == "made here, row 2"
    array = JsonArrayFile(write_rows(tmp_path / "d.json", [{"a": 1}, {"b": 2}]))
    assert array.column_names == ["a", "b"] and array.where(1).endswith("d.json, row 2")
    assert ParquetFile(write_rows(tmp_path / "d.parquet", [{"a": 1}])).where(0).endswith("row 1")
    assert text({"a": [{"b": "found"}]}, "a", 0, "b") == "found"
