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

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from utils.data import prompt_format
from utils.data.conversation import Conversation, Message, Texts, user
from utils.data.errors import DataError
from utils.data.fingerprints import content_fingerprint, text_fingerprint
from utils.data.row_texts import Row, RowReport, SkipRow, as_path, none_if_skipped, number, text, usable
from utils.data.rows import ListRows, Rows, SubsetRows
from utils.data.split_index import get_raw_dataset_split_index
from utils.data.splits import ALL, EVAL_SPLITS, Splits, open_splits, splits_of_files, splits_of_hub
from utils.demo.world import demo_rows

PROJECT_ROOT = Path(__file__).resolve().parents[2]

# " Human: {} Assistant:" and " {}"; what is filled in stays as it is, blanks included, as in the published rules.
PROMPT_FORM = prompt_format.format_prompt([{"role": "user", "content": "{}"}])
ANSWER_FORM = prompt_format.format_answer("{}")

# A dataset without an eval split of its own is divided by the seeded index rule into these shares.
TRAIN_EVAL_SHARES = "9,1"


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
        split, config: what to read where there are several; None: what the class says.

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
    has_answer = has_rejected = True
    # Whether each row is one question: a model that learned nothing else is then asked each question alone.
    single_questions = False
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
        split: str | None = None,
        config: str | None = None,
    ):
        self.wanted_split, self.wanted_config = split, config
        self.output_path = output_path
        self.seed = seed
        self.local_rank = local_rank
        self.raw_datasets = raw_datasets
        if raw_datasets is None:
            self.raw_datasets = self._find_splits(dataset_name, Path(data_root or PROJECT_ROOT))
            if split:
                self.eval_split = next((name for name in EVAL_SPLITS if name in self.raw_datasets), None)
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
                config = self.wanted_config or (None if place.is_file() else self.hub_config or ALL)
                return open_splits(place, config, self.wanted_split)
        config = self.wanted_config or self.hub_config
        return splits_of_hub(hub_name, config, list(dict.fromkeys(places)), self.wanted_split)

    def _refuse_choice(self) -> None:
        if self.wanted_split or self.wanted_config:
            raise DataError(f"{self.dataset_name}: has nothing to choose from by --dataset_split or --dataset_config")

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
        rules = content_fingerprint([*sources, *sorted(Path(__file__).parent.glob("*.py"))])
        fields = (self.prompt_field, self.chosen_field, self.rejected_field, self.eval_split)
        return text_fingerprint([type(self).__qualname__, repr(fields), rules, self.raw_datasets.fingerprint])

    def describe(self) -> str:
        """One line for the log: which files or splits are read."""
        return f"{self.raw_datasets.label}: {self.raw_datasets.notes}"

    def keep_also(self, names: tuple[str, ...] | str) -> None:
        """Says that rows are to have these columns, too, where the data has them; "all" for all of them."""
        if names and (needed := self._columns()):
            there = self.raw_datasets[self.train_split].column_names
            more = there if names == "all" else [name for name in names if name in there]
            self.raw_datasets.keep_columns(list(dict.fromkeys([*needed, *more])))

    def unused_fields(self) -> dict[str, int]:
        """Fields within rows that nothing was done with since the last call, and how often they were there."""
        return {}

    def recognised(self) -> str:
        """One line for the log: as what the rows are read, and what of them is not."""
        return "a known dataset"

    # Rows

    def rows_of(self, split: str) -> Rows:
        return self.raw_datasets[split]

    def get_train_data(self) -> Rows:
        rows = self.rows_of(self.train_split)
        return rows if self.eval_split else self._share(rows, 0)

    def get_eval_data(self) -> Rows:
        if self.eval_split:
            return self.rows_of(self.eval_split)
        return self._share(self.rows_of(self.train_split), 1)

    def _share(self, rows: Rows, share: int) -> Rows:
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
        return self.prompt_form.format(text(row, *as_path(self.prompt_field)))

    def chosen(self, row: Row) -> str:
        return self.answer_form.format(text(row, *as_path(self.chosen_field)))

    def rejected(self, row: Row) -> str:
        if not self.has_rejected:
            raise SkipRow("the dataset has no rejected answers")
        return self.answer_form.format(text(row, *as_path(self.rejected_field)))

    def prompt_and_chosen(self, row: Row) -> str:
        return self.prompt(row) + self.chosen(row)

    def prompt_and_rejected(self, row: Row) -> str:
        return self.prompt(row) + self.rejected(row)

    def get_prompt(self, sample: Row) -> str | None:
        return none_if_skipped(self.prompt, sample)

    def get_chosen(self, sample: Row) -> str | None:
        return none_if_skipped(self.chosen, sample)

    def get_rejected(self, sample: Row) -> str | None:
        return none_if_skipped(self.rejected, sample)

    def get_prompt_and_chosen(self, sample: Row) -> str | None:
        return none_if_skipped(self.prompt_and_chosen, sample)

    def get_prompt_and_rejected(self, sample: Row) -> str | None:
        return none_if_skipped(self.prompt_and_rejected, sample)

    def turns(self, row: Row) -> tuple[Message, ...] | None:
        """The prompt as messages, where the data has no transcript in it; None: its marks tell the turns."""
        return None

    def examples(self, row: Row, need: Sequence[str]) -> list[Texts | Conversation]:
        """What a row gives to a step that needs ``need`` of prompt, chosen, rejected (see conversation.py).

        Raises:
            SkipRow: one of them cannot be made.
        """
        prompt, answers = self.get_prompt(row), need[1:]
        wholes = [getattr(self, f"get_prompt_and_{name}")(row) for name in answers]
        bare = [getattr(self, f"get_{name}")(row) for name in answers]
        if prompt is None or None in wholes or None in bare:
            raise SkipRow(self.skip_reason(row, need) or "a text is missing")
        return [Texts(prompt, tuple(wholes), tuple(bare), self.turns(row))]

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


class QuestionDataset(PromptRawDataset):
    """Bare questions and answers, which get our text form here."""

    prompt_form = PROMPT_FORM
    answer_form = ANSWER_FORM

    def turns(self, row: Row) -> tuple[Message, ...]:
        return (user(text(row, *as_path(self.prompt_field)).strip()),)


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
        self._refuse_choice()
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
    single_questions = True
    prompt_field, chosen_field, rejected_field = "prompt", "chosen", "rejected"

    def _find_splits(self, dataset_name: str, data_root: Path) -> Splits:
        self._refuse_choice()

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
