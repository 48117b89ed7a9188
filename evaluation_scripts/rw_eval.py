"""Score answers with a reward model, and say how often the better answer of a pair wins.

    python evaluation_scripts/rw_eval.py --model_name_or_path output/reward                      # built-in pairs
    ... --data_path held_out.jsonl --output scores.jsonl      # rows with prompt, chosen, rejected; or prompt, answer

Departs from the reference: own rows, batches, an interval around the accuracy; a missing score head is an error.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation_scripts.intervals import wilson_interval
from evaluation_scripts.prompts import PAIRS
from utils.data.batching import pad_rows
from utils.data.encoding import REWARD, RewardRowMaker, TokenRules
from utils.data.prompt_format import CHAT_TEMPLATE, PLAIN, format_answer, is_formatted, prompt_from_text
from utils.data.readers import DataError, Rows
from utils.data.row_texts import RowReport, SkipRow, text
from utils.data.splits import EVAL_SPLITS, Flags, no_such_columns, open_splits
from utils.generation.saved_model import (
    END_OF_TEXT,
    add_loading_arguments,
    check_model_folder,
    choose_device,
    choose_dtype,
    warn,
)
from utils.model.model_utils import create_critic_model
from utils.model.reward_model import RewardModel
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.console import progress
from utils.process.errors import UserError, run_script
from utils.process.files import check_writable, write_jsonl

PAIR = ("chosen", "rejected")
SINGLE = ("answer",)
Record = dict[str, str]  # prompt, and chosen and rejected, or answer


@dataclass
class Judge:
    """A reward model with all that is needed to ask it something."""

    name: str
    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    num_ids: int  # token ids that the checkpoint knows
    max_positions: int | None  # longest prompt + answer in tokens; None: the configuration names no limit


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score pairs of answers, or single answers, with a reward model.")
    parser.add_argument("--model_name_or_path", required=True, help="folder of a reward model, as step 2 saves it")
    parser.add_argument(
        "--num_padding_at_beginning",
        type=int,
        default=None,
        help="no effect: scores are read at each row's own last token, wherever the padding is",
    )
    parser.add_argument(
        "--add_eot_token", action="store_true", help="answers end with <|endoftext|>, as training with this flag taught"
    )
    ours = parser.add_argument_group("beyond the reference")
    ours.add_argument(
        "--data_path",
        "--pairs_file",
        help="file (.jsonl, .csv, .parquet and others) or folder with the columns prompt, chosen, rejected, or prompt, "
        "answer (default: built-in pairs)",
    )
    ours.add_argument("--split", help="split of a folder (default: its evaluation split if it has one, else train)")
    ours.add_argument("--config", help="which of several configurations of a folder, as in main, or all (the only one)")
    for name in ("prompt", *PAIR):
        ours.add_argument(f"--{name}_column", default=name, help=f"column that holds {name} ({name})")
    ours.add_argument(
        "--answer_column", help="column with the answers to score one by one (answer, where there are no pairs)"
    )
    ours.add_argument("--batch_size", type=int, default=8, help="answers per forward pass; no influence on scores (8)")
    ours.add_argument(
        "--max_seq_len", type=int, default=512, help="longest prompt + answer in tokens; the beginning goes first (512)"
    )
    ours.add_argument("--show", type=int, default=20, help="rows in the printed table; 0 for no table (20)")
    ours.add_argument("--output", metavar="JSONL", help="write every row with its scores to this file (default: none)")
    add_loading_arguments(
        parser, None, "default: rows of --data_path as they stand, as step 2 trains on them, and built-in pairs plain"
    )
    return parser.parse_args(argv)


# ---------------------------------------------------------------- what is scored


def open_rows(path: str, split: str | None, config: str | None = None) -> Rows:
    """Rows of a file, or of one split of a folder."""
    if not Path(path).exists():
        raise UserError(f"--data_path {path}: no such file or folder")
    splits = open_splits(path, config, flags=Flags("--config", "--split"))
    return splits[split or next((name for name in EVAL_SPLITS if name in splits), "train")]


def read_records(args) -> list[Record]:
    """The pairs or single answers that the flags name; rows without a usable text are counted and told.

    Raises UserError that names the file, and the row and field where there is one.
    """
    if args.data_path is None:
        return PAIRS
    try:
        rows = open_rows(args.data_path, args.split, args.config)
        is_pairs = args.answer_column is None and {args.chosen_column, args.rejected_column} & set(rows.column_names)
        columns = {
            name: getattr(args, f"{name}_column") or name for name in ("prompt", *(PAIR if is_pairs else SINGLE))
        }
        if any(column not in rows.column_names for column in columns.values()):
            raise no_such_columns(args.data_path, list(columns.values()), rows)
        records, report = [], RowReport(args.data_path)
        for position, row in enumerate(rows):
            try:
                records.append({name: text(row, column) for name, column in columns.items()})
                report.note(position, None, rows)
            except SkipRow as reason:
                report.note(position, str(reason), rows)
        report.raise_if_none(rows, list(columns.values()))
    except DataError as error:
        raise UserError(str(error)) from error
    if report.skipped:
        warn(str(report))
    bare = sum(not is_formatted(record["prompt"]) for record in records)
    if bare and args.prompt_style is None:
        warn(
            f"{bare} of {len(records)} prompts are no ' Human: ... Assistant:' text; they are scored as they stand, as "
            "step 2 trains on them. --prompt_style plain, hh or chat_template writes them in a form"
        )
    return records


def answers_of(record: Record) -> tuple[str, ...]:
    """The names of a record's answers."""
    return PAIR if "chosen" in record else SINGLE


def record_texts(record: Record, tokenizer, style: str | None) -> tuple[str, list[str]]:
    """The prompt, and the prompt with each of its answers; style None leaves both as they stand."""
    prompt, answers = record["prompt"], [record[name] for name in answers_of(record)]
    if style is not None:
        prompt = prompt_from_text(prompt, style, tokenizer)
        # A row in the form of the datasets was trained on as it stands, blanks at the end included.
        as_trained = prompt == record["prompt"] and all(answer.startswith(" ") for answer in answers)
        if not as_trained:
            answers = [format_answer(answer, style, tokenizer) for answer in answers]
    return prompt, [prompt + answer for answer in answers]


def encode_record(record: Record, rows: RewardRowMaker, style: str | None) -> tuple[list[list[int]], bool]:
    """Token ids of the prompt with each of its answers, each with one EOS at its end, and whether they were cut.

    By the rules of training: both lose the same beginning of the prompt; what is still too long loses its end.
    """
    prompt, texts = record_texts(record, rows.tokenizer, style)
    encoded = rows.encoder.encode(texts)
    pair = rows.pair(prompt, encoded if len(encoded) == 2 else encoded * 2)  # a single answer is cut as if twice there
    return [pair.chosen, pair.rejected][: len(answers_of(record))], pair.was_cut


# ---------------------------------------------------------------- scoring


def load_judge(path: str, args) -> Judge:
    """The reward model of a folder or of the hub; UserError that names what is missing if it has no trained head."""
    check_model_folder(path)
    device = choose_device(args.device)
    transformers_logging.set_verbosity_error()  # what loading missed is checked and raised by the model code
    transformers_logging.disable_progress_bar()
    try:
        folder = path if Path(path).is_dir() else snapshot_download(path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"the model {path} cannot be loaded: {error}") from error
    tokenizer = load_hf_tokenizer(
        folder,
        add_special_tokens=END_OF_TEXT if args.add_eot_token else None,
        trust_remote_code=args.trust_remote_code,
    )
    model = create_critic_model(
        folder,
        tokenizer,
        rlhf_training=True,
        dtype=choose_dtype(args.dtype, device),
        trust_remote_code=args.trust_remote_code,
    )
    text_config = config.get_text_config()
    max_positions = getattr(text_config, "max_position_embeddings", None)  # not every family has one
    return Judge(path, model.eval().to(device), tokenizer, text_config.vocab_size, max_positions)


@torch.no_grad()
def score_rows(model: RewardModel, rows: list[list[int]], batch_size: int) -> list[float]:
    """Score of each row of ids: the head's value at the row's last token. Neighbours and padding do not matter."""
    scores = [math.nan] * len(rows)
    device = model.v_head.weight.device
    # Rows of like length share a batch: less padding to compute.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in progress(range(0, len(rows), batch_size), "scoring"):
        numbers = order[start : start + batch_size]
        ids, mask = pad_rows([rows[number] for number in numbers], model.PAD_ID)
        values = model.forward_value(ids.to(device), mask.to(device))["chosen_end_scores"]
        for number, value in zip(numbers, values.tolist(), strict=True):
            scores[number] = value
    return scores


def score_records(judge: Judge, records: list[Record], args) -> list[tuple[float, ...]]:
    """The scores of each record's answers, as the flags ask for them."""
    limit = judge.max_positions or args.max_seq_len
    if limit < args.max_seq_len:
        warn(f"--max_seq_len {args.max_seq_len}: the model holds {limit} tokens, so {limit} it is")
    style = args.prompt_style or (PLAIN if args.data_path is None else None)
    max_seq_len = min(limit, args.max_seq_len)
    return score_answers(judge, records, style, max_seq_len, args.batch_size, args.allow_special_tokens)


def score_answers(
    judge: Judge,
    records: list[Record],
    style: str | None,
    max_seq_len: int,
    batch_size: int,
    allow_special_tokens: bool = False,
) -> list[tuple[float, ...]]:
    """The scores of each record's answers: (chosen, rejected), or (answer,).

    Args:
        style: in which prompts and answers are written; None leaves them as they stand.
        max_seq_len: longest prompt + answer in tokens.
    """
    rules = TokenRules(
        REWARD, max_seq_len, chat_template=style == CHAT_TEMPLATE, allow_special_tokens=allow_special_tokens
    )
    row_maker = RewardRowMaker(None, judge.tokenizer, rules)
    try:
        encoded = [encode_record(record, row_maker, style) for record in records]
    except ValueError as error:
        raise UserError(f"a prompt cannot be written in the style {style}: {error}") from error
    rows = [ids for answers, _ in encoded for ids in answers]
    check_known_ids(judge, rows)
    num_cut = sum(was_cut for _, was_cut in encoded)
    if num_cut:
        warn(f"{num_cut} of {len(records)} rows are longer than {max_seq_len} tokens: their prompt loses its beginning")
    scores = score_rows(judge.model, rows, batch_size)
    answers_each = len(answers_of(records[0]))
    for number, score in enumerate(scores):
        if not math.isfinite(score):
            raise UserError(
                f"row {number // answers_each + 1} has the score {score}: try --dtype fp32, or the model is broken"
            )
    return list(zip(*[iter(scores)] * answers_each, strict=True))


def check_known_ids(judge: Judge, rows: list[list[int]]):
    """UserError for an id that the checkpoint was not trained with: loading gives it the mean embedding, no more."""
    highest = max(max(row) for row in rows)
    if highest >= judge.num_ids:
        raise UserError(
            f"the tokenizer of {judge.name} gives id {highest}, but its model knows only {judge.num_ids} ids: "
            "they do not belong together, or a token was added that the model was not trained with"
        )


# ---------------------------------------------------------------- what is told


def right(chosen: float, rejected: float) -> float:
    """1 if the chosen answer scores higher, 0 if lower, one half for a tie, as in training's accuracy."""
    return 0.5 if chosen == rejected else float(chosen > rejected)


def shorten(line: str, width: int) -> str:
    """One line of at most `width` characters."""
    line = " ".join(line.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def score_table(records: list[Record], scores: list[tuple[float, ...]], show: int) -> str:
    """A line of at most 100 characters for each of the first `show` records; of a pair, a mark if it came out wrong."""
    if answers_of(records[0]) == PAIR:
        lines = [f"{'row':>5}  {'prompt':<53} {'chosen':>9} {'rejected':>9} {'margin':>9}"]
        marks = {0.0: "  wrong", 0.5: "  tie", 1.0: ""}
        for number, (record, pair) in enumerate(zip(records[:show], scores[:show], strict=True), 1):
            cells = f"{pair[0]:>9.4f} {pair[1]:>9.4f} {pair[0] - pair[1]:>9.4f}{marks[right(*pair)]}"
            lines.append(f"{number:>5}  {shorten(record['prompt'], 53):<53} {cells}")
    else:
        lines = [f"{'row':>5}  {'prompt':<40}  {'answer':<40} {'score':>9}"]
        for number, (record, (score,)) in enumerate(zip(records[:show], scores[:show], strict=True), 1):
            prompt, answer = shorten(record["prompt"], 40), shorten(record["answer"], 40)
            lines.append(f"{number:>5}  {prompt:<40}  {answer:<40} {score:>9.4f}")
    if len(records) > show:
        lines.append(f"  ... and {len(records) - show} more rows (--show)")
    return "\n".join(lines)


def mean_and_std(label: str, values: list[float]) -> str:
    return f"{label:<10} mean {fmean(values):>9.4f}   std {pstdev(values):>9.4f}"


def summary(scores: list[tuple[float, ...]], config) -> str:
    """Accuracy with its interval where there are pairs; mean and standard deviation of the scores, here and saved."""
    lines = []
    everything = [score for row in scores for score in row]
    if len(scores[0]) == 2:
        correct, total = sum(right(*pair) for pair in scores), len(scores)
        low, high = wilson_interval(correct, total)
        ties = sum(chosen == rejected for chosen, rejected in scores)
        lines.append(
            f"accuracy (higher is better): {correct / total:.4f} "
            f"({correct:g} of {total} pairs, {ties} ties; 95 % interval {low:.4f} to {high:.4f})"
        )
        for name, values in zip(PAIR, zip(*scores, strict=True), strict=True):
            lines.append(mean_and_std(name, list(values)))
        lines.append(mean_and_std("margin", [chosen - rejected for chosen, rejected in scores]))
    lines.append(mean_and_std("all scores", everything))
    if getattr(config, "reward_score_std", None) is not None:
        saved = f"mean {config.reward_score_mean:>9.4f}   std {config.reward_score_std:>9.4f}"
        lines.append(f"{'saved':<10} {saved}   (with the model: its held-out answers in step 2)")
    return "\n".join(lines)


def output_rows(records: list[Record], scores: list[tuple[float, ...]]) -> list[dict]:
    """What --output holds: the texts, `chosen_score`, `rejected_score` and `correct` (0, 0.5, 1), or `score`."""
    if answers_of(records[0]) == SINGLE:
        return [record | {"score": score} for record, (score,) in zip(records, scores, strict=True)]
    return [
        record | {"chosen_score": pair[0], "rejected_score": pair[1], "correct": right(*pair)}
        for record, pair in zip(records, scores, strict=True)
    ]


def main(argv=None):
    args = parse_args(argv)
    if args.batch_size < 1 or args.max_seq_len < 2 or args.show < 0:
        raise UserError("--batch_size must be at least 1, --max_seq_len at least 2 and --show not negative")
    for name in ("split", "config"):
        if getattr(args, name) and args.data_path is None:
            raise UserError(f"--{name} names a {name} of --data_path, which is not given")
    if args.num_padding_at_beginning is not None:
        warn("--num_padding_at_beginning has no effect: scores are read at each row's own last token")
    records = read_records(args)
    check_writable(args.output)

    judge = load_judge(args.model_name_or_path, args)
    scores = score_records(judge, records, args)

    if args.show:
        print(score_table(records, scores, args.show))
        print()
    print(summary(scores, judge.model.config))
    if args.output:
        write_jsonl(args.output, output_rows(records, scores))


if __name__ == "__main__":
    run_script(main)
