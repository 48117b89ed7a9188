"""The known datasets: from a row to the texts (prompt, chosen, rejected), one small class each.

To add a dataset, write one class here: its name, its file stem, its splits, and the fields its texts come from. Naming
`dataset_name` in the class body enters it in KNOWN_DATASETS. Where a format string around a field is not enough, the
class defines prompt(row), chosen(row) or rejected(row) instead, with text() to reach into the row.

    class MyDataset(QuestionDataset):
        dataset_name, dataset_name_clean = "me/my-pairs", "me_my_pairs"
        prompt_field, chosen_field, rejected_field = "question", "good", "bad"

A row whose texts cannot be made (missing, null, empty, wrong type) is no error: get_prompt and its sisters return None,
check_rows() counts it with the reason. A dataset of which no row can be used is an error.
"""

import difflib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from utils.data import prompt_format, readers
from utils.data.readers import (
    READERS,
    DataError,
    ListRows,
    Rows,
    Splits,
    SubsetRows,
    columns_text,
    content_fingerprint,
    kind_of,
    no_such_columns,
    open_splits,
    splits_of_files,
    splits_of_hub,
    text_fingerprint,
)

Row = Mapping[str, Any]
Message = dict[str, str]

PROJECT_ROOT = Path(__file__).resolve().parents[2]
# " Human: {} Assistant:" and " {}"; what is filled in stays as it is, blanks included, as in the published rules.
PROMPT_FORM = prompt_format.format_prompt([{"role": "user", "content": "{}"}])
ANSWER_FORM = prompt_format.format_answer("{}")
# A dataset without an eval split of its own is divided by the seeded index rule into these shares.
TRAIN_EVAL_SHARES = "9,1"
EVAL_SPLITS = ("eval", "validation", "valid", "val", "dev", "test")
TEXT_COLUMNS = ("prompt", "chosen", "rejected")
CONVERSATION_COLUMNS = ("messages", "conversation")
EXAMPLES_PER_REASON = 3


# ---------------------------------------------------------------------------------------------------------------------
# Reaching into a row


class SkipRow(Exception):
    """A row without a usable text. The reason names the field and holds no value, so that reasons can be counted."""


def text(row: Row, *path: str | int) -> str:
    """The string at `path` in a row: text(row, "answers", 0, "text").

    Raises:
        SkipRow: something on the path is missing, null or empty, or what it leads to is not a usable string.
    """
    value: Any = row
    for depth, key in enumerate(path):
        if isinstance(key, int):
            _expect(isinstance(value, list), path[:depth], value, "a list")
            if key >= len(value):
                raise SkipRow(f"field {_dotted(path[:depth])} is an empty list")
        else:
            _expect(isinstance(value, Mapping), path[:depth], value, "an object")
            if key not in value:
                raise SkipRow(f"field {_dotted(path[: depth + 1])} is missing")
        value = value[key]
    _expect(isinstance(value, str), path, value, "a string")
    if value and value.isascii() and not value.isspace():  # nearly all: their field's name need not be spelled out
        return value
    return usable(value, _dotted(path))


def usable(value: str, name: str) -> str:
    """The string itself if it holds text that can be tokenised, else SkipRow."""
    if not value or value.isspace():
        raise SkipRow(f"field {name} is empty")
    if not value.isascii():
        # JSON can spell half of a surrogate pair; tokenizers fail on it.
        try:
            value.encode()
        except UnicodeEncodeError:
            raise SkipRow(f"field {name} holds a lone surrogate, which is no character") from None
    return value


def number(row: Row, name: str) -> float:
    """The number in a field, also where a CSV file gives it as text. Raises SkipRow."""
    value = row.get(name)
    if value is None:
        raise SkipRow(f"field {_dotted((name,))} is {'null' if name in row else 'missing'}")
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise SkipRow(f"field {_dotted((name,))}: expected a number, found {kind_of(value)}") from None
    if result != result:
        raise SkipRow(f"field {_dotted((name,))} is not a number (NaN)")
    return result


def _expect(holds: bool, path: Sequence[str | int], value: Any, expected: str) -> None:
    if not holds:
        name = f"field {_dotted(path)}" if path else "the row"
        raise SkipRow(f"{name} is null" if value is None else f"{name}: expected {expected}, found {kind_of(value)}")


def _dotted(path: Sequence[str | int]) -> str:
    joined = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return f"'{joined.removeprefix('.')}'"


# ---------------------------------------------------------------------------------------------------------------------
# The classes


@dataclass
class RowReport:
    """Which rows of a split can be used, and why the others cannot."""

    label: str
    kept: list[int] = field(default_factory=list)  # positions in the split, in the order they were read
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first places

    @property
    def total(self) -> int:
        return len(self.kept) + self.skipped.total()

    def note(self, position: int, reason: str | None, rows: Rows) -> None:
        """Count a row: as kept where there is no reason against it, else as skipped, with its place."""
        if reason is None:
            self.kept.append(position)
            return
        self.skipped[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(rows.where(position))

    def raise_if_none(self, rows: Rows, need: Sequence[str]) -> None:
        if self.skipped and not self.kept:
            raise DataError(f"{self}; expected rows with {', '.join(need)}, found {columns_text(rows)}")

    def __str__(self) -> str:
        head = f"{self.label}: {len(self.kept)} of {self.total} rows used"
        reasons = [
            f"{count} x {reason} ({'; '.join(self.examples[reason])})" for reason, count in self.skipped.most_common()
        ]
        return f"{head}, {self.skipped.total()} skipped: {', '.join(reasons)}" if reasons else head


class PromptRawDataset:
    """A dataset as rows and the texts of a row.

    Args:
        output_path: folder where the index files of a dataset that has to be divided are kept.
        seed: seed of that division.
        local_rank: rank on this node, handed to the index rule.
        dataset_name: a name from KNOWN_DATASETS, or the path of a local copy.
        data_root: folder with a `data/` folder of the user's own files in it; None: the project's root.
        columns: own column names, {"prompt": "question"}; for a dataset of the table it has no meaning.
        raw_datasets: the splits, where the caller has opened them already.

    Raises:
        DataError: nothing usable there. The message names file, line, field, what was expected and found.
    """

    dataset_name: str
    dataset_name_clean: str
    # The name on the hub where it is another one, and which of several variants to take there.
    hub_name: ClassVar[str | None] = None
    hub_config: ClassVar[str | None] = None
    train_split = "train"
    # None: the train split is divided.
    eval_split: str | None = None
    has_rejected = True
    # Whether a path that contains the name means this dataset.
    may_be_in_path = True

    # A field is a column name or a path of keys and positions into it.
    prompt_field: str | tuple[str | int, ...] = ()
    chosen_field: str | tuple[str | int, ...] = ()
    rejected_field: str | tuple[str | int, ...] = ()
    prompt_form = "{}"
    answer_form = "{}"
    # Columns that prompt(), chosen() and rejected() read beyond the fields above.
    more_columns: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "dataset_name" in cls.__dict__:
            KNOWN_DATASETS[cls.dataset_name] = cls

    def __init__(
        self,
        output_path: str,
        seed: int,
        local_rank: int,
        dataset_name: str,
        data_root: str | os.PathLike | None = None,
        columns: Mapping[str, str] | None = None,
        raw_datasets: Splits | None = None,
    ):
        self.output_path = output_path
        self.seed = seed
        self.local_rank = local_rank
        self.raw_datasets = raw_datasets
        if raw_datasets is None:
            self.raw_datasets = self._find_splits(dataset_name, Path(data_root or PROJECT_ROOT))
        self._settle(dataset_name, columns or {})
        if needed := self._columns():
            self.raw_datasets.keep_columns(needed)

    def _settle(self, dataset_name: str, columns: Mapping[str, str]) -> None:
        """Where a class cannot know its names and fields beforehand, it settles them here from the open data."""

    def _find_splits(self, dataset_name: str, data_root: Path) -> Splits:
        hub_name = self.hub_name or self.dataset_name
        places = [Path(dataset_name), data_root / "data" / self.dataset_name, data_root / "data" / hub_name]
        for place in places:
            if place.exists():
                if place.is_file():
                    # One file has no eval split, whatever the dataset has on the hub.
                    self.eval_split = None
                return open_splits(place, self.hub_config)
        return splits_of_hub(hub_name, self.hub_config, list(dict.fromkeys(places)))

    def _columns(self) -> list[str]:
        """The columns the texts are made of, so that the others need not be decoded; empty: not known."""
        fields = [self.prompt_field, self.chosen_field, self.rejected_field]
        first = [name if isinstance(name, str) else name[0] for name in fields if name]
        return list(dict.fromkeys([*first, *self.more_columns]))

    def fingerprint(self) -> str:
        """A cache key over all that decides the rows and their texts but for the seed: the data and these rules."""
        modules = [sys.modules[cls.__module__] for cls in type(self).__mro__ if issubclass(cls, PromptRawDataset)]
        # A class typed into an interpreter has no file.
        sources = dict.fromkeys(vars(module).get("__file__") or __file__ for module in modules)
        rules = content_fingerprint([*sources, readers.__file__, prompt_format.__file__])
        fields = (self.prompt_field, self.chosen_field, self.rejected_field, self.eval_split)
        return text_fingerprint([type(self).__qualname__, repr(fields), rules, self.raw_datasets.fingerprint])

    def describe(self) -> str:
        """One line for the log: which files or splits are read."""
        return f"{self.raw_datasets.label}: {self.raw_datasets.notes}"

    # Rows

    def get_train_data(self) -> Rows:
        rows = self.raw_datasets[self.train_split]
        return rows if self.eval_split else self._share(rows, 0)

    def get_eval_data(self) -> Rows:
        if self.eval_split:
            return self.raw_datasets[self.eval_split]
        return self._share(self.raw_datasets[self.train_split], 1)

    def _share(self, rows: Rows, share: int) -> Rows:
        from utils.data.data_utils import get_raw_dataset_split_index

        index = get_raw_dataset_split_index(
            self.local_rank,
            self.output_path,
            self.dataset_name_clean,
            self.seed,
            "train_eval",
            TRAIN_EVAL_SHARES,
            share,
            len(rows),
        )
        return SubsetRows(rows, index)

    # Texts of a row; these raise SkipRow, get_* below return None instead.

    def prompt(self, row: Row) -> str:
        return self.prompt_form.format(text(row, *_path(self.prompt_field)))

    def chosen(self, row: Row) -> str:
        return self.answer_form.format(text(row, *_path(self.chosen_field)))

    def rejected(self, row: Row) -> str:
        if not self.has_rejected:
            raise SkipRow("the dataset has no rejected answers")
        return self.answer_form.format(text(row, *_path(self.rejected_field)))

    def prompt_and_chosen(self, row: Row) -> str:
        return self.prompt(row) + self.chosen(row)

    def prompt_and_rejected(self, row: Row) -> str:
        return self.prompt(row) + self.rejected(row)

    def get_prompt(self, sample: Row) -> str | None:
        return _or_none(self.prompt, sample)

    def get_chosen(self, sample: Row) -> str | None:
        return _or_none(self.chosen, sample)

    def get_rejected(self, sample: Row) -> str | None:
        return _or_none(self.rejected, sample)

    def get_prompt_and_chosen(self, sample: Row) -> str | None:
        return _or_none(self.prompt_and_chosen, sample)

    def get_prompt_and_rejected(self, sample: Row) -> str | None:
        return _or_none(self.prompt_and_rejected, sample)

    # Checking

    def skip_reason(self, sample: Row, need: Sequence[str] = ("prompt", "chosen")) -> str | None:
        """Why one of the texts in `need` cannot be made from the row, or None if all can."""
        for name in need:
            if getattr(self, f"get_{name}")(sample) is None:
                try:
                    getattr(self, name)(sample)
                except SkipRow as reason:
                    return str(reason)
                # A class with a get_* method of its own gives no reason.
                return f"the {name} is missing"
        return None

    def check_rows(self, rows: Rows, need: Sequence[str] = ("prompt", "chosen"), label: str | None = None) -> RowReport:
        """Reads every row once and tells which can be used.

        Args:
            rows: what get_train_data or get_eval_data returned.
            need: of "prompt", "chosen", "rejected", what the step uses.
            label: begins the report; None: the dataset's name.

        Raises:
            DataError: a damaged file, rejected answers needed of a dataset that has none, or no usable row at all.
        """
        label = label or self.dataset_name
        if "rejected" in need and not self.has_rejected:
            raise DataError(
                f"{label}: this step needs rejected answers, and this dataset has none "
                f"({self.raw_datasets.label}). Use it in steps 1 and 3, or give a dataset with a column of them"
            )
        report = RowReport(label)
        for position in range(len(rows)):
            report.note(position, self.skip_reason(rows[position], need), rows)
        report.raise_if_none(rows, need)
        return report


KNOWN_DATASETS: dict[str, type[PromptRawDataset]] = {}


def _path(name: str | tuple[str | int, ...]) -> tuple[str | int, ...]:
    return (name,) if isinstance(name, str) else name


def _or_none(make: Callable[[Row], str], row: Row) -> str | None:
    try:
        return make(row)
    except SkipRow:
        return None


class QuestionDataset(PromptRawDataset):
    """Bare questions and answers, which get our text form here."""

    prompt_form = PROMPT_FORM
    answer_form = ANSWER_FORM


# English


class DahoasRmstaticDataset(PromptRawDataset):
    dataset_name, dataset_name_clean, eval_split = "Dahoas/rm-static", "Dahoas_rm_static", "test"
    prompt_field, chosen_field, rejected_field = "prompt", "chosen", "rejected"


class DahoasFullhhrlhfDataset(PromptRawDataset):
    dataset_name, dataset_name_clean, eval_split = "Dahoas/full-hh-rlhf", "Dahoas_full_hh_rlhf", "test"
    prompt_field, chosen_field, rejected_field = "prompt", "chosen", "rejected"


class DahoasSyntheticinstructgptjpairwiseDataset(QuestionDataset):
    dataset_name = "Dahoas/synthetic-instruct-gptj-pairwise"
    dataset_name_clean = "Dahoas_synthetic_instruct_gptj_pairwise"
    prompt_field, chosen_field, rejected_field = "prompt", "chosen", "rejected"


class YitingxieRlhfrewarddatasetsDataset(PromptRawDataset):
    dataset_name, dataset_name_clean = "yitingxie/rlhf-reward-datasets", "yitingxie_rlhf_reward_datasets"
    eval_split = "test"
    prompt_field, chosen_field, rejected_field = "prompt", "chosen", "rejected"
    prompt_form = "{}Assistant:"

    def chosen(self, row: Row) -> str:
        return self._last_part(row, "chosen")

    def rejected(self, row: Row) -> str:
        return self._last_part(row, "rejected")

    # The answers carry their own "Assistant:", so the whole is not prompt plus answer as given above.
    def prompt_and_chosen(self, row: Row) -> str:
        return text(row, "prompt") + text(row, "chosen")

    def prompt_and_rejected(self, row: Row) -> str:
        return text(row, "prompt") + text(row, "rejected")

    @staticmethod
    def _last_part(row: Row, name: str) -> str:
        return usable(text(row, name).rpartition("Assistant:")[2], f"'{name}' after its last 'Assistant:'")


class OpenaiWebgptcomparisonsDataset(QuestionDataset):
    dataset_name, dataset_name_clean = "openai/webgpt_comparisons", "openai_webgpt_comparisons"
    prompt_field = ("question", "full_text")
    more_columns = ("answer_0", "answer_1", "score_0", "score_1")

    def chosen(self, row: Row) -> str:
        return self._answer(row, 0 if self._first_is_chosen(row) else 1)

    def rejected(self, row: Row) -> str:
        return self._answer(row, 1 if self._first_is_chosen(row) else 0)

    @staticmethod
    def _first_is_chosen(row: Row) -> bool:
        return number(row, "score_0") >= number(row, "score_1")

    def _answer(self, row: Row, which: int) -> str:
        # The model cannot look up what a citation points to, so it shall not learn to write them. Those with a blank
        # before them go first: the published rule in two passes, which differs from one pass where brackets nest.
        answer = text(row, f"answer_{which}")
        for citation in (r" [(\[].*?[)\]]", r"[(\[].*?[)\]]"):
            answer = re.sub(citation, "", answer)
        return self.answer_form.format(usable(answer, f"'answer_{which}' without its citations"))


class StanfordnlpSHPDataset(QuestionDataset):
    dataset_name, dataset_name_clean, eval_split = "stanfordnlp/SHP", "stanfordnlp_SHP", "validation"
    prompt_field = "history"
    more_columns = ("human_ref_A", "human_ref_B", "labels")

    def chosen(self, row: Row) -> str:
        return self.answer_form.format(text(row, "human_ref_A" if number(row, "labels") == 1 else "human_ref_B"))

    def rejected(self, row: Row) -> str:
        return self.answer_form.format(text(row, "human_ref_B" if number(row, "labels") == 1 else "human_ref_A"))


class PvduySharegptalpacaoavicunaformatDataset(PromptRawDataset):
    dataset_name = "pvduy/sharegpt_alpaca_oa_vicuna_format"
    dataset_name_clean = "pvduy_sharegpt_alpaca_oa_vicuna_format"
    eval_split, has_rejected = "test", False
    prompt_field, chosen_field = "prompt", "label"
    answer_form = ANSWER_FORM

    def prompt(self, row: Row) -> str:
        return text(row, "prompt").replace("USER", "Human").replace("ASSISTANT", "Assistant")


class LocalJsonFileDataset(PromptRawDataset):
    """The user's own data/train.json and data/eval.json, as an array or as JSON lines."""

    dataset_name, dataset_name_clean, eval_split = "local/jsonfile", "jsonfile", "eval"
    prompt_field, chosen_field, rejected_field = "prompt", "chosen", "rejected"
    prompt_form = answer_form = ANSWER_FORM

    def _find_splits(self, dataset_name: str, data_root: Path) -> Splits:
        if dataset_name != self.dataset_name:
            return super()._find_splits(dataset_name, data_root)
        folder = data_root / "data"
        files = {split: [folder / f"{split}.json"] for split in ("train", "eval")}
        absent = [str(parts[0]) for parts in files.values() if not parts[0].is_file()]
        if absent:
            raise DataError(
                f"{dataset_name}: expected data/train.json and data/eval.json, not found: {', '.join(absent)}"
            )
        return splits_of_files(folder, files, [])


class DemoDataset(PromptRawDataset):
    """Pairs made by a program that ships with the project, for a first run without any download."""

    dataset_name, dataset_name_clean, eval_split = "local/demo", "demo", "eval"
    may_be_in_path = False
    prompt_field, chosen_field, rejected_field = "prompt", "chosen", "rejected"

    def _find_splits(self, dataset_name: str, data_root: Path) -> Splits:
        from utils.demo.world import demo_rows

        def opener(split: str) -> Callable[[], Rows]:
            return lambda: ListRows(demo_rows(split), f"{self.dataset_name}, split {split}")

        source = sys.modules[demo_rows.__module__].__file__
        openers = {split: opener(split) for split in ("train", "eval")}
        return Splits(self.dataset_name, openers, lambda: content_fingerprint(source), "made by utils/demo")


# Chinese and Japanese


class Wangrui6ZhihuKOLDataset(QuestionDataset):
    dataset_name, dataset_name_clean, has_rejected = "wangrui6/Zhihu-KOL", "wangrui6_Zhihu_KOL", False
    prompt_field, chosen_field = "INSTRUCTION", "RESPONSE"


class MiraclDataset(QuestionDataset):
    """Queries of MIRACL with passages that answer them and passages that do not."""

    eval_split = "dev"
    prompt_field = "query"
    chosen_field = ("positive_passages", 0, "text")
    rejected_field = ("negative_passages", 0, "text")


class CohereMiraclzhqueries2212Dataset(MiraclDataset):
    dataset_name, dataset_name_clean = "Cohere/miracl-zh-queries-22-12", "Cohere_miracl_zh_queries_22_12"


class CohereMiracljaqueries2212Dataset(MiraclDataset):
    dataset_name, dataset_name_clean = "Cohere/miracl-ja-queries-22-12", "Cohere_miracl_ja_queries_22_12"


class HelloSimpleAIHC3ChineseDataset(QuestionDataset):
    dataset_name, dataset_name_clean = "Hello-SimpleAI/HC3-Chinese", "Hello_SimpleAI_HC3_Chinese"
    # The hub also has a file per source beside the one with all of them.
    hub_config, has_rejected = "all", False
    prompt_field, chosen_field = "question", ("human_answers", 0)


class MkqaChineseDataset(QuestionDataset):
    dataset_name, dataset_name_clean, hub_name, has_rejected = "mkqa-Chinese", "mkqa", "mkqa", False
    prompt_field, chosen_field = ("queries", "zh_cn"), ("answers", "zh_cn", 0, "text")


class MkqaJapaneseDataset(QuestionDataset):
    dataset_name, dataset_name_clean, hub_name, has_rejected = "mkqa-Japanese", "mkqa", "mkqa", False
    prompt_field, chosen_field = ("queries", "ja"), ("answers", "ja", 0, "text")


class LmqgQgjaquadDataset(QuestionDataset):
    dataset_name, dataset_name_clean, has_rejected = "lmqg/qg_jaquad", "lmqg_qg_jaquad", False
    eval_split = "validation"
    prompt_field, chosen_field = "question", "sentence"


class LmqgQagjaquadDataset(QuestionDataset):
    dataset_name, dataset_name_clean, has_rejected = "lmqg/qag_jaquad", "lmqg_qag_jaquad", False
    eval_split = "validation"
    prompt_field, chosen_field = ("questions", 0), "paragraph"


# The user's own files


class PathDataset(PromptRawDataset):
    """Any file or folder with the columns prompt, chosen, rejected (or others that `columns` names), text as it is."""

    def _find_splits(self, dataset_name: str, data_root: Path) -> Splits:
        return open_splits(dataset_name)

    def _settle(self, dataset_name: str, columns: Mapping[str, str]) -> None:
        splits = self.raw_datasets
        self.dataset_name = dataset_name
        # Content in the name keeps the index files of two files of one name apart, and is the same on every machine.
        self.dataset_name_clean = f"{re.sub('[^0-9A-Za-z]+', '_', Path(dataset_name).stem)}_{splits.fingerprint[:8]}"
        self.eval_split = next((split for split in EVAL_SPLITS if split in splits), None)
        self._choose_fields(columns, splits["train"])

    def _choose_fields(self, columns: Mapping[str, str], rows: Rows) -> None:
        self.prompt_field, self.chosen_field, self.rejected_field = (columns.get(name, name) for name in TEXT_COLUMNS)
        if self.prompt_field not in rows.column_names:
            expected = [self.prompt_field, *(CONVERSATION_COLUMNS if "prompt" not in columns else ())]
            raise no_such_columns(self.dataset_name, expected, rows)
        self.has_rejected = self.rejected_field in rows.column_names


class ConversationDataset(PathDataset):
    """Conversations of one or more turns, in a column `messages` or `conversation`.

    messages: [{"role": "system" | "user" | "assistant", "content": text} ...]; conversation: [{"human": text,
    "assistant": text} ...]. A system message may come first, then user and assistant take turns, the user first.
    """

    has_rejected = False

    def _choose_fields(self, columns: Mapping[str, str], rows: Rows) -> None:
        names = [columns["messages"]] if "messages" in columns else CONVERSATION_COLUMNS
        self.prompt_field = next((name for name in names if name in rows.column_names), "")
        if not self.prompt_field:
            raise no_such_columns(self.dataset_name, names, rows)

    def messages(self, row: Row) -> list[Message]:
        """The turns as [{"role", "content"} ...]. Raises SkipRow."""
        name = self.prompt_field
        turns = row.get(name)
        _expect(isinstance(turns, list), (name,), turns, "a list of turns")
        if not turns:
            raise SkipRow(f"field '{name}' is an empty list")
        messages: list[Message] = []
        for turn in turns:
            _expect(isinstance(turn, Mapping), (name, "turn"), turn, "an object")
            messages += self._human_assistant(turn) if "human" in turn else [self._role_content(turn)]
        roles = [message["role"] for message in messages]
        spoken = roles[1:] if roles[0] == "system" else roles
        if not spoken or spoken != (["user", "assistant"] * len(spoken))[: len(spoken)]:
            raise SkipRow(f"field '{name}': expected user and assistant in turns, the user first, found another order")
        return messages

    def _human_assistant(self, turn: Row) -> list[Message]:
        question = {"role": "user", "content": text(turn, "human")}
        if turn.get("assistant") is None:
            return [question]
        return [question, {"role": "assistant", "content": text(turn, "assistant")}]

    def _role_content(self, turn: Row) -> Message:
        if turn.get("role") not in ("system", "user", "assistant"):
            raise SkipRow(
                f"field '{self.prompt_field}': expected the role system, user or assistant, found another or none"
            )
        return {"role": turn["role"], "content": text(turn, "content")}

    def get_messages(self, sample: Row) -> list[Message] | None:
        """The turns as [{"role", "content"} ...], or None where the row's conversation is not usable."""
        return _or_none(self.messages, sample)

    def prompt(self, row: Row) -> str:
        """The text up to the last answer; a system message stands before the first question."""
        messages = self.messages(row)
        system = ANSWER_FORM.format(messages.pop(0)["content"]) if messages[0]["role"] == "system" else ""
        if messages[-1]["role"] == "assistant":
            messages.pop()
        return system + prompt_format.format_prompt(messages)

    def chosen(self, row: Row) -> str:
        last = self.messages(row)[-1]
        if last["role"] != "assistant":
            raise SkipRow(f"field '{self.prompt_field}' ends without an answer")
        return prompt_format.format_answer(last["content"])


# ---------------------------------------------------------------------------------------------------------------------
# From a name or a path to its dataset


def find_known_dataset(dataset_name: str) -> type[PromptRawDataset] | None:
    """The class for a known name, or for a path that contains one as whole folder or file names; else None."""
    if dataset_name in KNOWN_DATASETS:
        return KNOWN_DATASETS[dataset_name]
    if not os.path.exists(dataset_name):
        return None
    path = Path(dataset_name).absolute()
    name = path.name.split(".")[0] if path.is_file() else path.name
    parts = "/".join(["", *path.parts[1:-1], name, ""])
    names = (known for known, cls in KNOWN_DATASETS.items() if cls.may_be_in_path and f"/{known}/" in parts)
    return KNOWN_DATASETS.get(next(names, ""))


def open_raw_dataset(
    dataset_name: str,
    output_path: str,
    seed: int,
    local_rank: int,
    columns: Mapping[str, str] | None = None,
    data_root: str | os.PathLike | None = None,
) -> PromptRawDataset:
    """Opens a dataset by its name in KNOWN_DATASETS or by a path.

    A known name is read from a local copy (the path itself, or `{data_root}/data/{name}`), else from the hub. Any other
    path is read as it is: see PathDataset and ConversationDataset.

    Args:
        columns: own column names for such a path, by prompt, chosen, rejected, messages; None or "" as a name: the
            usual one. Known datasets know their columns.

    Raises:
        DataError: unknown name, no such file, or data that cannot be read.
    """
    columns = {name: column for name, column in (columns or {}).items() if column}
    unknown = set(columns) - {*TEXT_COLUMNS, "messages"}
    if unknown:
        raise DataError(f"columns: expected the keys {', '.join(TEXT_COLUMNS)}, messages; found {sorted(unknown)}")
    cls = find_known_dataset(dataset_name)
    if cls is not None:
        return cls(output_path, seed, local_rank, dataset_name, data_root)
    if not os.path.exists(dataset_name):
        raise _unknown_dataset(dataset_name)
    splits = open_splits(dataset_name)
    cls = ConversationDataset if _holds_conversations(splits, columns) else PathDataset
    return cls(output_path, seed, local_rank, dataset_name, data_root, columns, splits)


def _holds_conversations(splits: Splits, columns: Mapping[str, str]) -> bool:
    """Where a file has both kinds of columns, prompt and chosen win, unless the caller names the messages column."""
    if "messages" in columns:
        return True
    found = splits["train"].column_names
    has_texts = all(columns.get(name, name) in found for name in ("prompt", "chosen"))
    return not has_texts and "prompt" not in columns and any(name in found for name in CONVERSATION_COLUMNS)


def _unknown_dataset(dataset_name: str) -> DataError:
    close = difflib.get_close_matches(dataset_name, KNOWN_DATASETS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return DataError(
        f"unknown dataset {dataset_name!r}{hint}: neither a known name nor an existing path (looked for "
        f"{Path(dataset_name).absolute()}). Known names: {', '.join(KNOWN_DATASETS)}. A path would have to be a file "
        f"that ends in {', '.join(READERS)}, a folder with train and eval (or test, validation, dev) files of these "
        "kinds, or a save_to_disk folder, with the columns prompt, chosen and rejected, or messages, or conversation"
    )
