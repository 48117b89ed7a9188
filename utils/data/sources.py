"""What a step asks of its data, dataset by dataset."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataSource:
    """One dataset of a step, and what is to be read of it.

    Attributes:
        path: a known name, a path, or the name of a dataset on the hub.
        split: which split trains, where there are several; also the one that evaluates, after a comma.
        config: which of several variants; several with commas between them, or all.
        columns: own column names of files, by the text they hold ({"prompt": "question"}).
        shape: how its rows are laid out, where their columns shall not decide it.
        weight: its part of the blend, relative to the other weights; None: its rows decide.
        max_rows: of its rows that are used in training at most, and in evaluation; None for all.
        data_split: shares of the steps, as in "2,4,4"; None: the step gets all rows.
    """

    path: str
    split: str | None = None
    config: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    shape: str | None = None
    weight: float | None = None
    max_rows: int | None = None
    data_split: str | None = None


def sources_of_step(args) -> tuple[DataSource, ...]:
    """The datasets that a step's flags name: those of --data_path by shares, those of --sft_only_data_path whole."""
    columns = {name: getattr(args, f"{name}_column") for name in ("prompt", "chosen", "rejected", "messages")}
    columns = {name: column for name, column in columns.items() if column}
    named = [(path, args.data_split) for path in args.data_path]
    named += [(path, None) for path in getattr(args, "sft_only_data_path", ())]
    return tuple(DataSource(path, columns=columns, data_split=data_split) for path, data_split in named)
