"""Score pairs of answers with a reward model that step 2 saved, and say how often the better answer wins.

    python evaluation_scripts/rw_eval.py --model_name_or_path output/reward
    ... --pairs_file held_out.jsonl --output scores.jsonl      # rows with prompt, chosen, rejected

Departs from the reference: own pairs, batches, an interval around the accuracy; a missing score head is an error.
"""

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation_scripts.prompts import PAIRS, check_writable, read_rows, write_jsonl
from utils.data.encoding import REWARD, RewardRows, TokenRules
from utils.data.prompt_format import CHAT_TEMPLATE, format_answer, prompt_from_text
from utils.distributed import UserError, run_main
from utils.generation import (
    END_OF_TEXT,
    add_loading_arguments,
    check_ids,
    check_model_folder,
    load_pretrained,
    pad_rows,
    warn,
)
from utils.utils import load_hf_tokenizer, progress


@dataclass
class PairScore:
    chosen: float
    rejected: float

    @property
    def correct(self) -> bool:
        """A tie counts against the model: it prefers neither answer."""
        return self.chosen > self.rejected


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score chosen and rejected answers with a reward model.")
    parser.add_argument("--model_name_or_path", required=True, help="folder of a reward model that step 2 saved")
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
        "--pairs_file",
        help="own pairs: .json, .jsonl ... with the fields prompt, chosen, rejected (default: built-in ones)",
    )
    ours.add_argument("--batch_size", type=int, default=8, help="answers per forward pass; no influence on scores (8)")
    ours.add_argument(
        "--max_seq_len", type=int, default=512, help="longest prompt + answer in tokens; the beginning goes first (512)"
    )
    ours.add_argument("--output", metavar="JSONL", help="write every pair with its scores to this file (default: none)")
    add_loading_arguments(parser)
    return parser.parse_args(argv)


def pair_texts(pair: dict, tokenizer, style: str) -> tuple[str, str, str]:
    """The prompt, and the prompt with each of its answers, as training writes them."""
    prompt = prompt_from_text(pair["prompt"], style, tokenizer)
    answers = [pair["chosen"], pair["rejected"]]
    # A row in the form of the datasets was trained on as it stands, blanks at the end included.
    as_trained = prompt == pair["prompt"] and all(answer.startswith(" ") for answer in answers)
    if not as_trained:
        answers = [format_answer(answer, style) for answer in answers]
    return prompt, prompt + answers[0], prompt + answers[1]


def encode_pair(pair: dict, rows: RewardRows, style: str) -> tuple[list[list[int]], bool]:
    """Token ids of prompt + chosen and prompt + rejected, each with one EOS at its end, and whether they were cut.

    By the rules of training: both lose the same beginning of the prompt; what is still too long loses its end.
    """
    prompt, *texts = pair_texts(pair, rows.tokenizer, style)
    pair_ids = rows.pair(prompt, rows.encoder.encode(texts))
    return [pair_ids.chosen, pair_ids.rejected], pair_ids.was_cut


@torch.no_grad()
def score_rows(model, rows: list[list[int]], batch_size: int, pad_id: int = 0) -> list[float]:
    """Score of each row of ids: the head's value at the row's last token. Neighbours and padding do not matter."""
    scores = [math.nan] * len(rows)
    # Rows of like length share a batch: less padding to compute.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in progress(range(0, len(rows), batch_size), "scoring"):
        numbers = order[start : start + batch_size]
        batch = [rows[number] for number in numbers]
        input_ids, attention_mask = pad_rows(batch, pad_id, "right", model.device)
        # The model's own forward looks for the last token by comparing ids with the pad id; here the length says it.
        hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = torch.tensor([len(row) - 1 for row in batch], device=hidden.device)
        values = model.score(hidden[torch.arange(len(batch), device=hidden.device), last].float())
        for number, value in zip(numbers, values.squeeze(-1).tolist(), strict=True):
            scores[number] = value
    return scores


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which stays within 0 and 1 for few pairs too."""
    share = correct / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def load_reward_model(path: str, args):
    """Tokenizer and model of a reward folder; UserError that names what is missing if it has no trained head."""
    check_model_folder(path)
    tokenizer = load_hf_tokenizer(
        path,
        add_special_tokens=END_OF_TEXT if args.add_eot_token else None,
        trust_remote_code=args.trust_remote_code,
    )
    model = load_pretrained(AutoModelForSequenceClassification, path, args)
    if model.config.num_labels != 1:
        raise UserError(f"{path} is a classifier of {model.config.num_labels} classes, not a reward model")
    model.score.float()  # as in training, the head computes in fp32 whatever the precision of the decoder
    return tokenizer, model


def score_pairs(model, tokenizer, pairs: list[dict], args) -> list[PairScore]:
    """Scores of each pair's two answers."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or args.max_seq_len
    if limit < args.max_seq_len:
        warn(f"--max_seq_len {args.max_seq_len}: the model holds {limit} tokens, so {limit} it is")
    max_seq_len = min(limit, args.max_seq_len)
    rules = TokenRules(REWARD, max_seq_len, chat_template=args.prompt_style == CHAT_TEMPLATE)
    row_maker = RewardRows(None, tokenizer, rules)
    try:
        encoded = [encode_pair(pair, row_maker, args.prompt_style) for pair in pairs]
    except ValueError as error:
        raise UserError(f"a prompt cannot be written in the style {args.prompt_style}: {error}") from error
    rows = [ids for both, _ in encoded for ids in both]
    check_ids(rows, model, args.model_name_or_path)
    num_cut = sum(was_cut for _, was_cut in encoded)
    if num_cut:
        warn(f"{num_cut} of {len(pairs)} pairs are longer than {max_seq_len} tokens: their prompt loses its beginning")
    scores = score_rows(model, rows, args.batch_size)
    for number, score in enumerate(scores):
        if not math.isfinite(score):
            raise UserError(f"pair {number // 2 + 1} has the score {score}: try --dtype fp32, or the model is broken")
    return [PairScore(chosen, rejected) for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]


def shorten(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def score_table(pairs: list[dict], scores: list[PairScore], width: int = 60) -> str:
    """A line for each pair; the mark shows which answer won."""
    lines = [f"{'prompt':<{width}}  {'chosen':>9}  {'rejected':>9}"]
    for pair, score in zip(pairs, scores, strict=True):
        mark = "" if score.correct else "   <- rejected answer not below"
        lines.append(f"{shorten(pair['prompt'], width):<{width}}  {score.chosen:>9.4f}  {score.rejected:>9.4f}{mark}")
    return "\n".join(lines)


def summary(scores: list[PairScore]) -> str:
    """Accuracy with its interval, mean and standard deviation of the scores."""
    correct = sum(score.correct for score in scores)
    low, high = wilson_interval(correct, len(scores))
    interval = f"95 % interval {low:.4f} to {high:.4f}"
    accuracy = correct / len(scores)
    lines = [f"accuracy (higher is better): {accuracy:.4f} ({correct} of {len(scores)} pairs; {interval})"]
    for side in ("chosen", "rejected"):
        values = [getattr(score, side) for score in scores]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append(f"{side} scores: mean {statistics.fmean(values):.4f}, std {spread:.4f}")
    return "\n".join(lines)


def main(argv=None):
    args = parse_args(argv)
    if args.batch_size < 1 or args.max_seq_len < 2:
        raise UserError("--batch_size must be at least 1 and --max_seq_len at least 2")
    if args.num_padding_at_beginning is not None:
        warn("--num_padding_at_beginning has no effect: scores are read at each row's own last token")
    pairs = read_rows(args.pairs_file, ("prompt", "chosen", "rejected")) if args.pairs_file else PAIRS
    check_writable(args.output)

    tokenizer, model = load_reward_model(args.model_name_or_path, args)
    scores = score_pairs(model, tokenizer, pairs, args)

    print(score_table(pairs, scores))
    print()
    print(summary(scores))
    if args.output:
        fields = ("prompt", "chosen", "rejected")
        write_jsonl(
            args.output,
            [
                {field: pair[field] for field in fields}
                | {"chosen_score": score.chosen, "rejected_score": score.rejected, "correct": score.correct}
                for pair, score in zip(pairs, scores, strict=True)
            ],
        )


if __name__ == "__main__":
    run_main(main)
