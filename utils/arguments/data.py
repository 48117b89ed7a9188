"""Flags of data: which datasets, which columns, how texts become ids."""

from collections.abc import Sequence
from pathlib import Path

from utils.arguments.kinds import cache_folder, not_negative, positive
from utils.data.chat_templates import template_names
from utils.data.prompt_format import CHAT_TEMPLATE, FORMATS
from utils.data.sources import sources_of_step
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
        help="where a dataset has several training splits: which one, as in train_prefs (test_prefs is then found); "
        "also with its evaluation split, as in train_a,test_b. One value for all datasets, or one for each, - for none",
    )
    add(
        "--dataset_config",
        nargs="*",
        default=None,
        help="where a dataset has several configurations (folders or variants): which one, as in main; several with "
        "commas between them; all. One value for all datasets, or one for each, - for none",
    )
    add(
        "--data_split",
        default="2,4,4",
        help="shares of the data for step 1, 2 and 3, as in 6,2,2; only this step's share is read",
    )
    if step == 1:
        add(
            "--sft_only_data_path",
            nargs="*",
            default=[],
            help="datasets used whole, in this step only; none to turn off",
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
            help=f"column of your own files that holds {name}; None for its usual name",
        )
    add(
        "--prompt_format",
        choices=FORMATS,
        default=None,
        help="how every prompt is written; None for the format that the model remembers from its training, else texts "
        "as the data has them and conversations as human_assistant. It is saved with the model, and what reads the "
        "model later follows it",
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
        help="print so many training rows as the model sees them, what is learned between brackets; 0 for none",
    )
    add(
        "--allow_special_tokens",
        action="store_true",
        help="texts of the data that spell a special token (<|endoftext|>, </s> ...) mean it; off: they are plain text",
    )
    add("--rebuild_cache", action="store_true", help="tokenise again even if the cache has this very data")
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
    refuse_inside_data(args, [source.path for source in sources_of_step(args)])


def refuse_inside_data(args, paths: Sequence[str]) -> None:
    """What a run writes into a folder of data, the next run would read as data."""
    for data in (Path(path) for path in paths if Path(path).is_dir()):
        for name in ("data_output_path", "output_dir", "checkpoint_dir"):
            written = getattr(args, name)
            if written is not None and Path(written).resolve().is_relative_to(data.resolve()):
                flag = "--data_path" if args.data_config is None else "the dataset"
                raise UserError(f"--{name} {written} lies in {flag} {data}, so it would be read as data; move it")
