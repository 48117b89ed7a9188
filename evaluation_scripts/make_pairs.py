"""Preference pairs from a model's own answers: it answers each prompt several times, and judges rank the answers.

    python evaluation_scripts/make_pairs.py --model_name_or_path output/sft --prompts_file prompts.jsonl \\
        --judge_reward_model output/reward --output pairs/train.jsonl
    ... --judge_function rewards.py:polite rewards.py:short:0.5 --pairs all --best_of_n best/train.jsonl

Step 2 and DPO read the pairs, step 1 the best answers. An answer is worth the weighted sum of all judges' scores.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation_scripts.judging import REWARD_MODEL, answered, free_memory, judge_by_function, judge_by_reward_model
from evaluation_scripts.prompt_eval import write_prompts
from evaluation_scripts.prompts import Example, read_prompts, readable
from evaluation_scripts.sampling import sample
from utils.data.conversation import Conversation, Texts
from utils.data.special_tokens import unmarked
from utils.generation.saved_model import (
    VllmUse,
    add_backend_argument,
    add_loading_arguments,
    check_backend,
    check_model_folder,
    choosing_settings,
    load_language_model,
    warn,
)
from utils.model.reward_functions import check_columns, load_reward_functions
from utils.process.errors import UserError, run_script
from utils.process.files import check_writable, write_jsonl
from utils.process.seeds import set_random_seed

BEST_WORST, FINISHED, ALL = "best_worst", "finished", "all"


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="the model that answers")
    parser.add_argument(
        "--prompts_file",
        required=True,
        help=".txt with a prompt per line, or data in any form that the training steps read, whose prompts are asked",
    )
    parser.add_argument("--output", required=True, metavar="JSONL", help="where the pairs go")
    parser.add_argument(
        "--judge_reward_model",
        metavar="FOLDER[:WEIGHT]",
        nargs="+",
        default=[],
        help="reward models whose scores rank the answers, each times its weight (1)",
    )
    parser.add_argument(
        "--judge_function",
        metavar="FILE.py:NAME[:WEIGHT]",
        nargs="+",
        default=[],
        help="functions whose scores do, as step 3's --reward_function; columns are the fields of --prompts_file",
    )
    parser.add_argument(
        "--num_generations_per_prompt",
        type=int,
        default=4,
        help="sampled answers to each prompt; more of them make best and worst lie further apart (4)",
    )
    parser.add_argument(
        "--pairs",
        choices=(BEST_WORST, FINISHED, ALL),
        nargs="+",
        default=[BEST_WORST],
        help="of each prompt: best_worst, the best answer against the worst; finished, the same among answers that "
        "came to an end, so that what they say decides and not only that they end; all pairs of its answers, which "
        f"depend on each other. Several give the pairs of each, none of them twice ({BEST_WORST})",
    )
    parser.add_argument(
        "--min_margin", type=float, default=0.0, help="scores that differ by no more than this are a tie (0)"
    )
    parser.add_argument(
        "--best_of_n", metavar="JSONL", help="also write each prompt's best answer, for step 1 (default: do not)"
    )
    parser.add_argument(
        "--answers", metavar="JSONL", help="also write every answer with the score of each judge (default: do not)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer in tokens (128)")
    parser.add_argument("--batch_size", type=int, default=32, help="answers at a time, sampled or scored (32)")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 answers differ less, above more (1)")
    parser.add_argument("--top_k", type=int, default=0, help="sample from so many tokens; 0 for all (0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from tokens of this share; 1 for all (1)")
    parser.add_argument("--seed", type=int, default=1234, help="of the sampling (1234)")
    add_loading_arguments(parser)
    add_backend_argument(parser)
    args = parser.parse_args(argv)
    if args.num_generations_per_prompt < 2:
        raise UserError(f"--num_generations_per_prompt {args.num_generations_per_prompt}: a pair needs 2 answers")
    if not args.judge_reward_model and not args.judge_function:
        raise UserError("nothing ranks the answers: give --judge_reward_model or --judge_function")
    if not args.min_margin >= 0:
        raise UserError(f"--min_margin {args.min_margin}: must not be negative")
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    args.load_in_4bit, args.base_model, args.add_eot_token = False, None, False  # what loading also knows
    return args


def reward_models(given: list[str]) -> list[tuple[str, str, float]]:
    """(name, folder, weight) of each FOLDER[:WEIGHT]; a folder whose name holds a colon may stand without a weight."""
    found = []
    for number, text in enumerate(given, start=1):
        folder, weight = text, 1.0
        if not Path(text).exists() and ":" in text:
            folder, _, number_text = text.rpartition(":")
            try:
                weight = float(number_text)
            except ValueError as error:
                raise UserError(f"--judge_reward_model {text}: the weight {number_text!r} is no number") from error
        check_model_folder(folder)
        found.append((REWARD_MODEL if number == 1 else f"{REWARD_MODEL}_{number}", folder, weight))
    return found


# ---------------------------------------------------------------- answers and their scores


def answer_all(prompts: list[Example], args) -> list[dict]:
    """A record for each prompt with the model's answers; the model is loaded here and let go again."""
    vllm = VllmUse(args.batch_size) if args.backend == "vllm" else None
    lm = load_language_model(args.model_name_or_path, args, vllm=vllm)
    print(f"{args.model_name_or_path} is asked in {lm.asked.reason}", file=sys.stderr, flush=True)
    written = write_prompts(lm, prompts, args.max_new_tokens)
    set_random_seed(args.seed)
    samples = sample(
        lm,
        [prompt.ids for prompt in written],
        args.num_generations_per_prompt,
        args.batch_size,
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
    )
    lm.close()
    del lm
    free_memory()
    return [
        {
            "prompt_number": number,
            "prompt": readable(prompt.prompt),
            "formatted_prompt": unmarked(asked.text),
            "answers": [answer.text.strip() for answer in answers],
            "num_tokens": [len(answer.ids) for answer in answers],
            "ended": [answer.ended for answer in answers],
        }
        for number, (prompt, asked, answers) in enumerate(zip(prompts, written, samples, strict=True))
    ]


def judge(records: list[dict], prompts: list[Example], rows: list[dict], models, functions, args) -> None:
    """Give each record "scores", those of each judge, and "worth", their weighted sum: a number for each answer."""
    for name, folder, _ in models:
        judge_by_reward_model(records, prompts, folder, args, name)
    for function in functions:
        judge_by_function(records, function, rows)
    weights = {name: weight for name, _, weight in models} | {one.name: one.weight for one in functions}
    for record in records:
        weighed = [(name, scores) for name, scores in record["scores"].items() if weights[name]]  # 0 only watches
        of_judges = [[weights[name] * score for score in scores] for name, scores in weighed]
        record["worth"] = [sum(scores) for scores in zip(*of_judges, strict=True)]


# ---------------------------------------------------------------- pairs


def ranked(record: dict, counts: Counter) -> list[int]:
    """Positions of the answers that can be compared, the best one first: without empty ones, repetitions, and those
    that a judge gave no finite score."""
    answers, worth = record["answers"], record["worth"]
    first = {text: number for number, text in reversed(list(enumerate(answers))) if text}
    scored = [number for number in first.values() if math.isfinite(worth[number])]
    counts["empty answers"] += answers.count("")
    counts["repeated answers"] += len(answers) - answers.count("") - len(first)
    counts["answers without a finite score"] += len(first) - len(scored)
    return sorted(scored, key=lambda number: (-worth[number], number))


def pairs_of(record: dict, kinds: Sequence[str], min_margin: float, counts: Counter) -> list[tuple[int, int]]:
    """(better, worse) positions of a record's answers; ``counts`` gets what was left out, by its reason.

    An answer that was cut off at the limit never wins: training would teach that the end comes there.
    """
    order = ranked(record, counts)
    if len(order) < 2:
        counts["prompts with a single answer"] += 1
        return []
    ended = [number for number in order if record["ended"][number]]
    found = []
    if BEST_WORST in kinds:
        found += extremes(
            ended[:1], order, counts, "prompts whose best finished answer is the worst, or that have none"
        )
    if FINISHED in kinds:
        found += extremes(ended[:1], ended, counts, "prompts with fewer than two finished answers")
    if ALL in kinds:
        every = list(combinations(order, 2))
        counts["pairs won by an answer that was cut off"] += sum(not record["ended"][better] for better, _ in every)
        found += [pair for pair in every if record["ended"][pair[0]]]
    found = list(dict.fromkeys(found))
    apart = [(i, j) for i, j in found if record["worth"][i] - record["worth"][j] > min_margin]
    counts["ties"] += len(found) - len(apart)
    return apart


def extremes(best: list[int], order: list[int], counts: Counter, reason: str) -> list[tuple[int, int]]:
    """``best``, an answer or none, against the last of ``order``; nothing, counted, where they are one."""
    if not best or best[0] == order[-1]:
        counts[reason] += 1
        return []
    return [(best[0], order[-1])]


def written(prompt: Example, answer: str) -> tuple[object, object]:
    """Prompt and answer as a row of data holds them: messages, or texts with the marks of turns in them."""
    example = answered(prompt, answer)
    if isinstance(example, Texts):
        return example.prompt, example.wholes[0].removeprefix(example.prompt)
    return example.prompt, example.answers[0]


def pair_row(prompt: Example, record: dict, better: int, worse: int) -> dict:
    """A row of step 2 and DPO: prompt, chosen, rejected, and what the judges found."""
    (asked, chosen), (_, rejected) = (written(prompt, record["answers"][number]) for number in (better, worse))
    row = {"prompt": asked, "chosen": chosen, "rejected": rejected}
    if isinstance(prompt, Conversation) and prompt.tools:
        row["tools"] = prompt.tools
    return row | {"chosen_score": record["worth"][better], "rejected_score": record["worth"][worse]}


def best_rows(records: list[dict], prompts: list[Example]) -> list[dict]:
    """Rows of step 1: each prompt's best answer of those that ended; none for a prompt without one."""
    rows = []
    for record in records:
        best = next((number for number in ranked(record, Counter()) if record["ended"][number]), None)
        if best is None:
            continue
        prompt = prompts[record["prompt_number"]]
        asked, answer = written(prompt, record["answers"][best])
        row = {"prompt": asked, "chosen": answer} if isinstance(asked, str) else {"messages": [*asked, *answer]}
        if isinstance(prompt, Conversation) and prompt.tools:
            row["tools"] = prompt.tools
        rows.append(row | {"score": record["worth"][best]})
    return rows


def check_one_kind(prompts: list[Example]) -> None:
    """UserError for texts with the marks of turns beside prompts without: a file of pairs holds rows of one shape."""
    kinds = [isinstance(answered(prompt, "?"), Texts) for prompt in prompts]
    if len(set(kinds)) > 1:
        odd = kinds.index(not kinds[0])
        raise UserError(
            f"--prompts_file: prompt 1 {'is a text with' if kinds[0] else 'has no'} ' Human: ... Assistant:' marks and "
            f"prompt {odd + 1} {'has none' if kinds[0] else 'has'}; divide them into two files"
        )


def tell(records: list[dict], rows: list[dict], counts: Counter) -> None:
    """What was made of the answers, and what was not used."""
    answers = sum(len(record["answers"]) for record in records)
    ended = sum(sum(record["ended"]) for record in records)
    print(f"{answers} answers to {len(records)} prompts, of which {ended / answers:.1%} came to an end", end="; ")
    margin = sum(row["chosen_score"] - row["rejected_score"] for row in rows) / max(1, len(rows))
    print(f"{len(rows)} pairs, chosen {margin:.3f} above rejected on average")
    left_out = [f"{count} {reason}" for reason, count in counts.items() if count]
    if left_out:
        print("left out: " + "; ".join(left_out))


def main(argv=None) -> None:
    args = parse_args(argv)
    choosing_settings(True, args.temperature, args.top_p, args.top_k)  # refuses values without meaning
    models, functions = (
        reward_models(args.judge_reward_model),
        load_reward_functions(args.judge_function, "--judge_function"),
    )
    if not any([*(weight for _, _, weight in models), *(function.weight for function in functions)]):
        raise UserError("every judge has the weight 0: nothing says which answer is better")
    prompts, rows_of_prompts = read_prompts(args.prompts_file)
    check_one_kind(prompts)
    check_columns(functions, [name for name in rows_of_prompts[0] if all(name in row for row in rows_of_prompts)])
    check_model_folder(args.model_name_or_path)
    check_backend(args, [args.model_name_or_path])
    for path in (args.output, args.best_of_n, args.answers):
        check_writable(path)

    records = answer_all(prompts, args)
    judge(records, prompts, rows_of_prompts, models, functions, args)
    counts, rows, with_pairs = Counter(), [], 0
    for record in records:
        pairs = pairs_of(record, args.pairs, args.min_margin, counts)
        rows += [pair_row(prompts[record["prompt_number"]], record, *pair) for pair in pairs]
        with_pairs += bool(pairs)
    if args.answers:
        write_jsonl(args.answers, records)
    if args.best_of_n:
        best = best_rows(records, prompts)
        write_jsonl(args.best_of_n, best)
        print(f"{len(best)} best answers, of {len(records)} prompts")
    tell(records, rows, counts)
    if not rows:
        raise UserError("no pair is left: the judges find the answers to each prompt alike, or no answer ended")
    if with_pairs < len(prompts) / 2:
        warn(
            "fewer than half of the prompts gave a pair; try a larger --max_new_tokens or --num_generations_per_prompt"
        )
    write_jsonl(args.output, rows)


if __name__ == "__main__":
    run_script(main)
