"""Score answers with a reward model, and say how often the better answer of a pair wins.

    python evaluation_scripts/rw_eval.py --model_name_or_path output/reward                      # built-in pairs
    ... --data_path held_out.jsonl --output scores.jsonl      # whatever step 2 reads; or rows with prompt, answer

Departs from the reference: own rows, batches, an interval around the accuracy; a missing score head is an error.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import fmean, pstdev

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation_scripts.intervals import wilson_interval
from evaluation_scripts.prompts import PAIRS, Example, open_dataset, readable, rows_to_judge
from utils.data.batching import pad_rows
from utils.data.conversation import Conversation, Message, Texts, assistant, user
from utils.data.encoding import REWARD, Pair, RewardRowMaker, TokenRules
from utils.data.errors import DataError
from utils.data.prompt_format import is_formatted
from utils.data.raw_datasets import PromptRawDataset
from utils.data.row_texts import RowReport, SkipRow
from utils.generation.asking import UNNAMED, AskedFormat, choose_format
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

COLUMNS = ("prompt", "chosen", "rejected", "messages", "system", "tools")
SINGLE_COLUMN = "answer"  # beside a prompt: an answer to score on its own


BUILT_IN = (
    f"no --data_path: these are {len(PAIRS)} built-in pairs of a helpful and a poor answer. They show whether scores "
    "come out sensibly, not how good the model is; give held-out pairs of your own for that"
)


@dataclass(frozen=True)
class Record:
    """A prompt with its answers, to be scored.

    Attributes:
        prompt, answers: texts or messages, as the data gives them.
        ranks: of the answers, 1 for the best, which comes first; equal ones are a tie.
        example: the same, as the row maker takes it.
        place: the row it comes from, for messages.
        ended: of each answer, whether it came to its end; empty: all did. Others are scored without an end token.
    """

    prompt: str | list[Message]
    answers: tuple[str | list[Message], ...]
    ranks: tuple[int, ...]
    example: Example
    place: str = ""
    ended: tuple[bool, ...] = ()

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Positions of (better, worse) answers; none of a single answer."""
        order = range(len(self.answers))
        return [(i, j) for i, j in combinations(order, 2) if self.ranks[i] < self.ranks[j]]


def record_of(example: Example, place: str = "", ended: tuple[bool, ...] = ()) -> Record:
    ranks = getattr(example, "ranks", ()) or tuple(range(1, len(example.answers) + 1))
    return Record(example.prompt, example.answers, ranks, example, place, ended)


def question_record(prompt: str, *answers: str) -> Record:
    """A bare question, which the judge's format writes, and its answers, the best one first."""
    example = Conversation([user(prompt)], tuple([assistant(answer)] for answer in answers))
    return Record(prompt, answers, tuple(range(1, len(answers) + 1)), example)


@dataclass
class Judge:
    """A reward model with all that is needed to ask it something."""

    name: str
    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    num_ids: int  # token ids that the checkpoint knows
    max_positions: int | None  # longest prompt + answer in tokens; None: the configuration names no limit
    asked: AskedFormat = UNNAMED


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
        help="file (.jsonl, .csv, .parquet and others), folder or name of a dataset, in any form that step 2 reads, or "
        "with single answers (default: built-in pairs)",
    )
    ours.add_argument("--split", help="split of a folder (default: its evaluation split if it has one, else train)")
    ours.add_argument("--config", help="which of several configurations of a folder, as in main, or all (the only one)")
    for name in COLUMNS:
        ours.add_argument(f"--{name}_column", help=f"column of your own files that holds {name} (its usual name)")
    ours.add_argument(
        "--answer_column",
        help=f"column with the answers to score one by one ({SINGLE_COLUMN}, where there are no pairs)",
    )
    ours.add_argument("--batch_size", type=int, default=8, help="answers per forward pass; no influence on scores (8)")
    ours.add_argument(
        "--max_seq_len", type=int, default=512, help="longest prompt + answer in tokens; the beginning goes first (512)"
    )
    ours.add_argument("--show", type=int, default=20, help="rows in the printed table; 0 for no table (20)")
    ours.add_argument("--output", metavar="JSONL", help="write every row with its scores to this file (default: none)")
    add_loading_arguments(
        parser,
        "where it names none, texts of --data_path as they stand; messages and built-in pairs by its tokenizer's chat "
        "template, and in human_assistant where it has none",
    )
    return parser.parse_args(argv)


# ---------------------------------------------------------------- what is scored


def open_data(args) -> tuple[PromptRawDataset, tuple[str, ...]]:
    """The dataset of --data_path, and what is needed of its rows: pairs, or single answers.

    Raises:
        DataError: it has neither, or cannot be read.
    """
    columns = {name: getattr(args, f"{name}_column") for name in COLUMNS}
    where, single = (args.config, args.split), ("prompt", "chosen")
    if args.answer_column is not None:
        return open_dataset(args.data_path, columns | {"chosen": args.answer_column}, *where), single
    dataset = open_dataset(args.data_path, columns, *where)
    if dataset.has_rejected:
        return dataset, (*single, "rejected")
    prompt, names = columns["prompt"] or "prompt", dataset.raw_datasets["train"].column_names
    if columns["chosen"] is None and {prompt, SINGLE_COLUMN} <= set(names):
        dataset = open_dataset(args.data_path, columns | {"prompt": prompt, "chosen": SINGLE_COLUMN}, *where)
    return dataset, single


def read_records(args) -> list[Record]:
    """What the flags name: pairs, ranked lists or single answers. Rows that cannot be used are counted and told.

    Raises UserError that names the file, and the row and field where there is one.
    """
    if args.data_path is None:
        return [question_record(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in PAIRS]
    try:
        dataset, need = open_data(args)
        rows, records, report = rows_to_judge(dataset, args.split), [], RowReport(args.data_path)
        for position, row in enumerate(rows):
            try:
                place = rows.where(position)
                records += [record_of(example, place) for example in dataset.examples(row, need)]
                report.note(position, None, rows)
            except SkipRow as reason:
                report.note(position, str(reason), rows)
        report.raise_if_none(rows, need)
    except DataError as error:
        raise UserError(str(error)) from error
    unused = "".join(f"; not used: {name} ({count} turns)" for name, count in dataset.unused_fields().items())
    print(f"{args.data_path}: read as {dataset.recognised()}{unused}", file=sys.stderr)
    if report.skipped:
        warn(str(report))
    return records


# ---------------------------------------------------------------- ids


def row_makers(judge: Judge, max_seq_len: int, allow_special_tokens: bool) -> dict[type, RewardRowMaker]:
    """For texts and for conversations: where no format is known, texts stand as they are."""
    texts_format = judge.asked.name if judge.asked.known else None
    return {
        kind: RewardRowMaker(
            None,
            judge.tokenizer,
            TokenRules(REWARD, max_seq_len, prompt_format=style, allow_special_tokens=allow_special_tokens),
        )
        for kind, style in ((Texts, texts_format), (Conversation, judge.asked.name))
    }


def encode_records(
    judge: Judge, records: Sequence[Record], max_seq_len: int, allow_special_tokens: bool = False
) -> tuple[list[Record], list[Pair]]:
    """Records that the judge's format can write, with their ids; the others are counted and told.

    By the rules of training: all answers lose the same beginning of the prompt; what is still too long loses its end.
    """
    makers = row_makers(judge, max_seq_len, allow_special_tokens)
    kept, encoded, places = [], [], {}  # reason -> places of rows
    for record in records:
        try:
            encoded.append(makers[type(record.example)].pair_of(record.example, record.ended))
            kept.append(record)
        except SkipRow as reason:
            places.setdefault(str(reason), []).append(record.place)
    if places:
        reasons = [f"{len(of)} x {reason} ({'; '.join(filter(None, of[:3]))})" for reason, of in places.items()]
        told = f"{len(records) - len(kept)} of {len(records)} rows cannot be written in {judge.asked.name}: "
        if not kept:
            raise UserError(told + ", ".join(reasons))
        warn(told + ", ".join(reasons))
    return kept, encoded


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
    asked = choose_format(path, tokenizer, args.prompt_format)
    model = create_critic_model(
        folder,
        tokenizer,
        rlhf_training=True,
        dtype=choose_dtype(args.dtype, device),
        trust_remote_code=args.trust_remote_code,
    )
    text_config = config.get_text_config()
    max_positions = getattr(text_config, "max_position_embeddings", None)  # not every family has one
    return Judge(path, model.eval().to(device), tokenizer, text_config.vocab_size, max_positions, asked)


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


def score_records(
    judge: Judge, records: Sequence[Record], max_seq_len: int, batch_size: int, allow_special_tokens: bool = False
) -> tuple[list[Record], list[tuple[float, ...]]]:
    """The records that the judge's format can write, and the scores of the answers of each.

    Args:
        max_seq_len: longest prompt + answer in tokens.
    """
    kept, encoded = encode_records(judge, records, max_seq_len, allow_special_tokens)
    rows = [ids for one in encoded for ids in one.rows]
    check_known_ids(judge, rows)
    num_cut = sum(one.was_cut for one in encoded)
    if num_cut:
        warn(f"{num_cut} of {len(kept)} rows are longer than {max_seq_len} tokens: their prompt loses its beginning")
    found = iter(score_rows(judge.model, rows, batch_size))
    scores = [tuple(next(found) for _ in one.rows) for one in encoded]
    for number, of_row in enumerate(scores, start=1):
        for score in of_row:
            if not math.isfinite(score):
                raise UserError(f"row {number} has the score {score}: try --dtype fp32, or the model is broken")
    return kept, scores


def length_limit(judge: Judge, args) -> int:
    limit = judge.max_positions or args.max_seq_len
    if limit < args.max_seq_len:
        warn(f"--max_seq_len {args.max_seq_len}: the model holds {limit} tokens, so {limit} it is")
    return min(limit, args.max_seq_len)


def tell_format(judge: Judge, records: Sequence[Record]) -> None:
    """One line on standard error: in which format the answers are scored."""
    texts = [record.prompt for record in records if isinstance(record.example, Texts)]
    if len(texts) < len(records) or judge.asked.known:
        print(f"{judge.name} is asked in {judge.asked.reason}", file=sys.stderr)
    bare = 0 if judge.asked.known else sum(not is_formatted(text) for text in texts)
    if bare:
        warn(
            f"{bare} of {len(records)} prompts are no ' Human: ... Assistant:' text; they are scored as they stand, "
            "since the model names no format. --prompt_format writes them in one"
        )


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


def mark(record: Record, scores: tuple[float, ...]) -> str:
    """How a record came out, if not as it should: wrong, tie, or how many pairs of a list are right."""
    rights = [right(scores[i], scores[j]) for i, j in record.pairs]
    if len(rights) == 1:
        return {0.0: "wrong", 0.5: "tie", 1.0: ""}[rights[0]]
    return f"{sum(rights):g}/{len(rights)}"


def score_table(records: Sequence[Record], scores: Sequence[tuple[float, ...]], show: int) -> str:
    """A line of at most 100 characters for each of the first `show` records, with a mark where it came out wrong.

    Of a ranked list it shows the best answer and the worst.
    """
    rows = list(zip(records[:show], scores[:show], strict=True))
    if any(record.pairs for record in records):
        lines = [f"{'row':>5}  {'prompt':<53} {'chosen':>9} {'rejected':>9} {'margin':>9}"]
        for number, (record, found) in enumerate(rows, 1):
            cells = f"{found[0]:>9.4f} {found[-1]:>9.4f} {found[0] - found[-1]:>9.4f}  {mark(record, found)}"
            lines.append(f"{number:>5}  {shorten(readable(record.prompt), 53):<53} {cells.rstrip()}")
    else:
        lines = [f"{'row':>5}  {'prompt':<40}  {'answer':<40} {'score':>9}"]
        for number, (record, (score,)) in enumerate(rows, 1):
            prompt, answer = (shorten(readable(text), 40) for text in (record.prompt, record.answers[0]))
            lines.append(f"{number:>5}  {prompt:<40}  {answer:<40} {score:>9.4f}")
    if len(records) > show:
        lines.append(f"  ... and {len(records) - show} more rows (--show)")
    return "\n".join(lines)


def mean_and_std(label: str, values: list[float]) -> str:
    return f"{label:<10} mean {fmean(values):>9.4f}   std {pstdev(values):>9.4f}"


def accuracy_line(records: Sequence[Record], scores: Sequence[tuple[float, ...]]) -> str:
    """How many pairs came out right, with an interval.

    The pairs of a ranked list depend on each other, so that the interval takes a list for one observation: at most too
    wide.
    """
    pairs = [(of_row[i], of_row[j]) for record, of_row in zip(records, scores, strict=True) for i, j in record.pairs]
    correct, total = sum(right(*pair) for pair in pairs), len(pairs)
    ties = sum(better == worse for better, worse in pairs)
    low, high = wilson_interval(correct / total * len(records), len(records))
    lists = f" of {len(records)} rows" if total > len(records) else ""
    return (
        f"accuracy (higher is better): {correct / total:.4f} "
        f"({correct:g} of {total} pairs{lists}, {ties} ties; 95 % interval {low:.4f} to {high:.4f})"
    )


def summary(records: Sequence[Record], scores: Sequence[tuple[float, ...]], config) -> str:
    """Accuracy with its interval where there are pairs; mean and standard deviation of the scores, here and saved."""
    lines = []
    if any(record.pairs for record in records):
        lines.append(accuracy_line(records, scores))
        best, worst = [found[0] for found in scores], [found[-1] for found in scores]
        lines += [mean_and_std("chosen", best), mean_and_std("rejected", worst)]
        lines.append(mean_and_std("margin", [found[0] - found[-1] for found in scores]))
    lines.append(mean_and_std("all scores", [score for found in scores for score in found]))
    if getattr(config, "reward_score_std", None) is not None:
        saved = f"mean {config.reward_score_mean:>9.4f}   std {config.reward_score_std:>9.4f}"
        lines.append(f"{'saved':<10} {saved}   (with the model: its held-out answers in step 2)")
    return "\n".join(lines)


def output_row(record: Record, scores: tuple[float, ...]) -> dict:
    """A row of --output: the texts or messages of a record with its scores, and what share of its pairs is right."""
    if not record.pairs:
        return {"prompt": record.prompt, "answer": record.answers[0], "score": scores[0]}
    correct = fmean(right(scores[i], scores[j]) for i, j in record.pairs)
    if len(record.answers) > 2:
        given = {"prompt": record.prompt, "answers": list(record.answers), "ranks": list(record.ranks)}
        return given | {"scores": list(scores), "correct": correct}
    chosen, rejected = record.answers
    given = {"prompt": record.prompt, "chosen": chosen, "rejected": rejected}
    return given | {"chosen_score": scores[0], "rejected_score": scores[1], "correct": correct}


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
    tell_format(judge, records)
    limit = length_limit(judge, args)
    records, scores = score_records(judge, records, limit, args.batch_size, args.allow_special_tokens)

    if args.data_path is None:
        print(BUILT_IN + "\n")
    if args.show:
        print(score_table(records, scores, args.show))
        print()
    print(summary(records, scores, judge.model.config))
    if args.output:
        write_jsonl(args.output, [output_row(*row) for row in zip(records, scores, strict=True)])


if __name__ == "__main__":
    run_script(main)
