"""Flags of data: which datasets, which columns, how texts become ids."""

import os
from collections.abc import Sequence
from pathlib import Path

from utils.arguments.kinds import cache_folder, not_negative, positive
from utils.data.chat_templates import template_names
from utils.data.prompt_format import CHAT_TEMPLATE, FORMATS
from utils.data.sources import sources_of_step
from utils.data.split_index import DATA_SPLIT, split_boundaries
from utils.process.errors import UserError

DEFAULT_DATA_PATH = ["Dahoas/rm-static"]


def add_data_arguments(parser, step: int) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--data_path",
        nargs="*",
        default=DEFAULT_DATA_PATH,
        help="datasets to blend: names of known datasets, local/jsonfile, local/demo, paths of your own files, or "
        "names (owner/name) of datasets on the hub",
    )
    add(
        "--data_config",
        default=None,
        help="a .yaml or .json file that lists the datasets to blend instead of --data_path, each with its path "
        "and, if need be, its split, config, columns, format, weight, max_rows and data_split",
    )
    add(
        "--dataset_split",
        nargs="*",
        default=None,
        help="which training split to read where a dataset has several, as in train_prefs (test_prefs is then found); "
        "also with its evaluation split, as in train_a,test_b. One value for all datasets, or one for each, with - "
        "where there is nothing to choose",
    )
    add(
        "--dataset_config",
        nargs="*",
        default=None,
        help="which configuration (folder or variant) to read where a dataset has several, as in main; several with "
        "commas between them; all. One value for all datasets, or one for each, with - where there is nothing to "
        "choose",
    )
    add(
        "--data_split",
        default=DATA_SPLIT,
        help="shares of the data for step 1, 2 (or DPO) and 3; only this step's share is read. For a file that is "
        "meant for one step alone: 1,0,0, 0,1,0 or 0,0,1",
    )
    if step == 1:
        add(
            "--sft_only_data_path",
            nargs="*",
            default=[],
            help="further datasets, used whole and in this step only; none to turn off",
        )
    add("--data_output_path", default=cache_folder(), help="where the split indices and the tokenised cache are kept")
    add(
        "--preprocessing_num_workers",
        type=positive,
        default=None,
        help="threads that tokenise, on the first rank of each node; None for all cores",
    )
    for name in ("prompt", "chosen", "rejected", "messages"):
        add(
            f"--{name}_column",
            default=None,
            help=f"column of your own files to read as {name}; None for its usual names",
        )
    add(
        "--prompt_format",
        choices=FORMATS,
        default=None,
        help="how every prompt is written; None for the format that was saved with the model, else texts as the data "
        "has them and conversations as human_assistant. The format is saved with the model; later steps, chat and "
        "evaluation follow it",
    )
    add(
        "--chat_template",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE_or_NAME",
        help="write every prompt by the tokenizer's chat template (as --prompt_format chat_template), or by that of a "
        f"file or of a name: {', '.join(template_names())}",
    )
    add(
        "--show_rows",
        type=not_negative,
        default=0,
        help="print this many training rows as the model sees them, in step 1 with what is learned between double "
        "brackets; 0 for none",
    )
    add(
        "--allow_special_tokens",
        action="store_true",
        help="read spellings of special tokens in the data (<|endoftext|>, </s> ...) as these tokens; off: as plain "
        "text",
    )
    add("--rebuild_cache", action="store_true", help="tokenise again even if this data is in the cache")
    add("--max_train_samples", type=positive, default=None, help="use at most this many training rows; None for all")
    add("--max_eval_samples", type=positive, default=None, help="use at most this many evaluation rows; None for all")
    add(
        "--truncation_side",
        choices=["left", "right"],
        default="left",
        help="what a row that is too long loses: the beginning of its prompt, or its end (the published way)",
    )
    add(
        "--pad_to_max_length",
        action="store_true",
        help="pad every batch to the maximum length instead of its longest row",
    )
    add("--add_eot_token", action="store_true", help="add --eot_token to the tokenizer and end every answer with it")
    add("--eot_token", default="<|endoftext|>", help="the token --add_eot_token adds; it becomes the tokenizer's EOS")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with a model; off for safety")


def add_sequence_length_argument(parser) -> None:
    parser.add_argument(
        "--max_seq_len", type=positive, default=512, help="tokens of a row, prompt and answer and EOS together"
    )


def settle_format(args) -> None:
    """--chat_template asks for one of the formats; any other beside it is refused."""
    if args.chat_template and args.prompt_format not in (None, CHAT_TEMPLATE):
        raise UserError(f"--chat_template and --prompt_format {args.prompt_format} are two formats: give one")
    if args.chat_template:
        args.prompt_format = CHAT_TEMPLATE


def check_data(args) -> None:
    """Refuse flags of data that cannot work together, and a --data_config that cannot be used.

    Raises:
        UserError: with the flag, or the file, entry and key.
    """
    if args.data_config is not None:
        for name in ("data_path", "sft_only_data_path", "dataset_split", "dataset_config"):
            value = getattr(args, name, None)
            if value and value is not DEFAULT_DATA_PATH:
                raise UserError(f"--{name} and --data_config both say which data to read; give one of them")
    split_boundaries(args.data_split, 1)
    refuse_inside_data(args, [source.path for source in sources_of_step(args)])


def refuse_inside_data(args, paths: Sequence[str]) -> None:
    """What a run writes into a folder of data, the next run would read as data."""
    for data in map(Path, filter(os.path.isdir, paths)):  # which is False for a name that no path can have
        for name in ("data_output_path", "output_dir", "checkpoint_dir"):
            written = getattr(args, name)
            if written is not None and Path(written).resolve().is_relative_to(data.resolve()):
                flag = "--data_path" if args.data_config is None else "the dataset"
                raise UserError(f"--{name} {written} lies in {flag} {data}, so it would be read as data; move it")
