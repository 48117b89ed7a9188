"""The user's own files and folders as datasets, one class per shape, and the way from a name or path to its dataset."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from utils.data import prompt_format
from utils.data.raw_datasets import ANSWER_FORM, KNOWN_DATASETS, PromptRawDataset, find_known_dataset
from utils.data.readers import READERS, DataError, Rows
from utils.data.row_texts import Message, Row, SkipRow, expect, none_if_skipped, text
from utils.data.splits import EVAL_SPLITS, Splits, is_hub_name, no_such_columns, open_splits, splits_of_hub

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
CONVERSATION_COLUMNS = ("messages", "conversation")


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
        expect(isinstance(turns, list), (name,), turns, "a list of turns")
        if not turns:
            raise SkipRow(f"field '{name}' is an empty list")
        messages: list[Message] = []
        for turn in turns:
            expect(isinstance(turn, Mapping), (name, "turn"), turn, "an object")
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
        return none_if_skipped(self.messages, sample)

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


def get_raw_dataset(
    dataset_name: str,
    output_path: str,
    seed: int,
    local_rank: int,
    columns: Mapping[str, str] | None = None,
    data_root: str | os.PathLike | None = None,
    *,
    split: str | None = None,
    config: str | None = None,
    shape: str | None = None,
) -> PromptRawDataset:
    """Opens a dataset by its name in KNOWN_DATASETS, by a path, or by its name on the hub.

    A known name is read from a local copy (the path itself, or `{data_root}/data/{name}`), else from the hub. Any other
    path is read as it is: see PathDataset and ConversationDataset.

    Args:
        columns: own column names for such a path, by prompt, chosen, rejected, messages; None or "" as a name: the
            usual one. Known datasets know their columns.
        split, config: what to read where a path or name holds several; see utils.data.splits.
        shape: how the rows are laid out, where their columns shall not decide it.

    Raises:
        DataError: unknown name, no such file, or data that cannot be read.
    """
    columns = {name: column for name, column in (columns or {}).items() if column}
    unknown = set(columns) - {*TEXT_COLUMNS, "messages"}
    if unknown:
        raise DataError(f"columns: expected the keys {', '.join(TEXT_COLUMNS)}, messages; found {sorted(unknown)}")
    cls = find_known_dataset(dataset_name)
    if cls is not None:
        return cls(output_path, seed, local_rank, dataset_name, data_root, **_given(split=split, config=config))
    if os.path.exists(dataset_name):
        splits = open_splits(dataset_name, config, split)
    elif is_hub_name(dataset_name):
        splits = _hub_splits(dataset_name, config, split)
    else:
        raise _unknown_dataset(dataset_name)
    cls = ConversationDataset if _holds_conversations(splits, columns) else PathDataset
    return cls(output_path, seed, local_rank, dataset_name, data_root, columns, splits)


def _holds_conversations(splits: Splits, columns: Mapping[str, str]) -> bool:
    """Where a file has both kinds of columns, prompt and chosen win, unless the caller names the messages column."""
    if "messages" in columns:
        return True
    found = splits["train"].column_names
    has_texts = all(columns.get(name, name) in found for name in ("prompt", "chosen"))
    return not has_texts and "prompt" not in columns and any(name in found for name in CONVERSATION_COLUMNS)


def _given(**options: str | None) -> dict[str, str]:
    """The options that are not None: a class in the published style takes none of them."""
    return {name: value for name, value in options.items() if value is not None}


def _hub_splits(dataset_name: str, config: str | None, split: str | None) -> Splits:
    try:
        return splits_of_hub(dataset_name, config, [Path(dataset_name).absolute()], split)
    except DataError as error:
        raise DataError(f"{error}{_nearest(dataset_name)}") from error


def _nearest(dataset_name: str) -> str:
    close = difflib.get_close_matches(dataset_name, KNOWN_DATASETS, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _unknown_dataset(dataset_name: str) -> DataError:
    return DataError(
        f"unknown dataset {dataset_name!r}{_nearest(dataset_name)}: neither a known name nor an existing path (looked "
        f"for {Path(dataset_name).absolute()}). Known names: {', '.join(KNOWN_DATASETS)}. A path would have to be a "
        f"file that ends in {', '.join(READERS)}, a folder with train and eval (or test, validation, dev) files of "
        "these kinds, or a save_to_disk folder, with the columns prompt, chosen and rejected, or messages, or "
        "conversation"
    )
