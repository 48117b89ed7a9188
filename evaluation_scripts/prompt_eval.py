"""Let a baseline and one or several finetuned models answer the same prompts, and show the answers together.

    python evaluation_scripts/prompt_eval.py --model_name_or_path_baseline BASE --model_name_or_path_finetune output/sft
    ... --model_name_or_path_finetune output/sft output/actor --do_sample --judge_reward_model output/reward \\
        --output comparison.html

Departs from the reference: a file of prompts, several finetuned models, batches, judges, and a report.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation_scripts.judging import (
    comparison_table,
    comparisons,
    free_memory,
    judge_by_function,
    judge_by_reward_model,
)
from evaluation_scripts.prompts import PROMPTS, Example, prompts_of_lines, read_prompts, readable
from evaluation_scripts.report import html_report, markdown_report, shown_answer
from utils.data.prompt_format import cut_at_next_human
from utils.data.row_texts import SkipRow
from utils.data.special_tokens import unmarked
from utils.generation.asking import Prompt
from utils.generation.decoding import contrastive_ids, diverse_beam_ids
from utils.generation.saved_model import (
    LanguageModel,
    VllmUse,
    add_backend_argument,
    add_base_model_argument,
    add_load_in_4bit_argument,
    add_loading_arguments,
    check_backend,
    check_model_folder,
    choosing_settings,
    generate_answers,
    load_language_model,
    room_for_prompt,
    warn,
)
from utils.model.reward_functions import check_columns, load_reward_functions
from utils.process.errors import UserError, run_script
from utils.process.files import check_writable, write_jsonl, write_text
from utils.process.seeds import set_random_seed

PROMPT_END = "====================prompt end============================="


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare the answers of a baseline with those of finetuned models.")
    add_published_arguments(parser)
    add_own_arguments(parser.add_argument_group("beyond the reference"))
    add_base_model_argument(parser)
    add_loading_arguments(parser)
    add_load_in_4bit_argument(parser)
    add_backend_argument(parser)
    return parser


def add_published_arguments(parser) -> None:
    parser.add_argument("--model_name_or_path_baseline", required=True, help="model before the training to judge")
    parser.add_argument(
        "--model_name_or_path_finetune", required=True, nargs="+", help="one or several models after it"
    )
    parser.add_argument(
        "--num_beams",
        type=int,
        default=1,
        help="width of a beam search, shown beside greedy (default 1: no beam search)",
    )
    parser.add_argument(
        "--num_beam_groups",
        type=int,
        default=1,
        help="with --num_beams: also a diverse beam search in so many groups, which divide the beams evenly (1: off)",
    )
    parser.add_argument(
        "--top_k",
        type=int,
        default=4,
        help="with --do_sample and --contrastive_search: the likeliest tokens only (4; 0: all, of sampling)",
    )
    parser.add_argument(
        "--penalty_alpha",
        type=float,
        default=0.6,
        help="with --contrastive_search: weight of the penalty for likeness to the text before, 0 to 1 (0.6; 0: none)",
    )
    parser.add_argument(
        "--num_return_sequences", type=int, default=1, help="answers per prompt of sampling and of beam searches (1)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=100, help="longest answer in tokens (100)")
    parser.add_argument(
        "--language", choices=list(PROMPTS), default="English", help="built-in prompts to ask (English)"
    )
    parser.add_argument(
        "--add_eot_token", action="store_true", help="answers end at <|endoftext|>, as training with this flag taught"
    )


def add_own_arguments(group) -> None:
    group.add_argument(
        "--prompts_file",
        help="own prompts: .txt, one a line, or data in any form that the training steps read, whose prompts are asked",
    )
    group.add_argument("--output", help="write a side-by-side report to this .md or .html file (default: none)")
    group.add_argument(
        "--jsonl", help="write every answer, its length, scores and whether it ended to this file (default: none)"
    )
    group.add_argument(
        "--judge_reward_model", metavar="FOLDER", help="score every answer with this reward model (default: none)"
    )
    group.add_argument(
        "--judge_function",
        metavar="FILE.py:NAME",
        nargs="+",
        default=[],
        help="score every answer with functions of prompts, answers and fields of --prompts_file, as step 3's "
        "--reward_function does (default: none)",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="prompts per batch; --backend vllm answers as many at a time, the next as soon as one is done (8)",
    )
    group.add_argument(
        "--do_sample",
        action="store_true",
        help="show sampled answers too, with --num_beams also those of a sampled beam search (off: no sampling)",
    )
    group.add_argument(
        "--contrastive_search", action="store_true", help="show the answers of contrastive search too (off: do not)"
    )
    group.add_argument(
        "--diversity_penalty",
        type=float,
        default=1.0,
        help="with --num_beam_groups: what a token costs, in nats, per beam of earlier groups that chose it (1)",
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, help="with --do_sample: below 1 tamer, above wilder (1)"
    )
    group.add_argument("--top_p", type=float, default=1.0, help="with --do_sample: tokens of this share only (1: off)")
    group.add_argument("--seed", type=int, default=1234, help="of the sampling, the same for each model (1234)")
    group.add_argument(
        "--cut_at_next_human",
        action="store_true",
        help="cut an answer where the model goes on to write the human's next turn (off: show what it wrote)",
    )


def parse_args(argv=None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_args(args, parser)
    return args


def check_args(args, parser):
    """UserError for what cannot be done; a warning for a flag that would have no effect."""
    for name in ("num_beams", "num_beam_groups", "num_return_sequences", "max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.num_return_sequences > 1 and not args.do_sample and args.num_beams == 1:
        raise UserError("--num_return_sequences above 1: greedy gives one answer; add --do_sample or --num_beams")
    if 1 < args.num_beams < args.num_return_sequences:
        raise UserError(f"--num_return_sequences {args.num_return_sequences}: more than --num_beams {args.num_beams}")
    if args.num_beams % args.num_beam_groups:
        raise UserError(f"--num_beam_groups {args.num_beam_groups}: must divide --num_beams {args.num_beams}")
    if args.diversity_penalty < 0:
        raise UserError(f"--diversity_penalty {args.diversity_penalty}: must not be negative")
    if args.contrastive_search and not (args.top_k >= 1 and 0 <= args.penalty_alpha <= 1):
        raise UserError("--contrastive_search: --top_k must be at least 1 and --penalty_alpha from 0 to 1")
    if args.backend == "vllm" and (args.num_beams > 1 or args.contrastive_search):
        flag = "--num_beams" if args.num_beams > 1 else "--contrastive_search"
        raise UserError(f"{flag}: --backend vllm answers greedily and by sampling; use --backend transformers")
    if args.output and Path(args.output).suffix not in (".md", ".html"):
        raise UserError(f"--output {args.output}: the name must end in .md or .html")

    needs = {
        "penalty_alpha": ("--contrastive_search", args.contrastive_search),
        "diversity_penalty": ("--num_beam_groups", args.num_beam_groups > 1),
        "top_k": ("--do_sample or --contrastive_search", args.do_sample or args.contrastive_search),
        "temperature": ("--do_sample", args.do_sample),
        "top_p": ("--do_sample", args.do_sample),
    }
    for name, (flag, given) in needs.items():
        if not given and getattr(args, name) != parser.get_default(name):
            warn(f"--{name} has no effect without {flag}")
    if args.prompts_file and args.language != parser.get_default("language"):
        warn("--language has no effect with --prompts_file")


def generation_modes(args) -> dict[str, dict]:
    """Settings of generate_answers() for each way of answering, in the order in which they are shown."""
    several = {"num_return_sequences": args.num_return_sequences}
    beams = several | {"num_beams": args.num_beams}
    sampling = choosing_settings(args.do_sample, args.temperature, args.top_p, args.top_k)
    modes = {"Greedy": {"do_sample": False}}
    if args.num_beams > 1:
        modes["Beam"] = {"do_sample": False} | beams
    if args.num_beam_groups > 1:
        groups = {"num_beam_groups": args.num_beam_groups, "diversity_penalty": args.diversity_penalty}
        modes["Diverse beam"] = {"generate": diverse_beam_ids} | beams | groups
    if args.do_sample:
        modes["Sampling"] = sampling | several
    if args.do_sample and args.num_beams > 1:
        modes["Beam sampling"] = sampling | beams
    if args.contrastive_search:
        search = {"top_k": args.top_k, "penalty_alpha": args.penalty_alpha}
        modes["Contrastive"] = {"generate": contrastive_ids} | search
    return {name: settings | {"max_new_tokens": args.max_new_tokens} for name, settings in modes.items()}


def model_titles(args) -> list[tuple[str, str]]:
    """(title, path) of each model: "Baseline", then "finetune", numbered and named if there are several."""
    finetuned = args.model_name_or_path_finetune
    titles = ["finetune"]
    if len(finetuned) > 1:
        titles = [f"finetune {n} ({Path(path).name or path})" for n, path in enumerate(finetuned, start=1)]
    return [("Baseline", args.model_name_or_path_baseline), *zip(titles, finetuned, strict=True)]


def write_prompts(lm: LanguageModel, prompts: list[Example], max_new_tokens: int) -> list[Prompt]:
    """The prompts as this model is asked; UserError for one that its format has no place for."""
    room, written = room_for_prompt(lm, max_new_tokens), []
    for number, prompt in enumerate(prompts, start=1):
        try:
            written.append(lm.prompts.write(prompt, room))
        except SkipRow as reason:
            raise UserError(f"{lm.name}: prompt {number} cannot be asked in {lm.prompt_format}: {reason}") from reason
    too_long = sum(bool(prompt.dropped or prompt.lost) for prompt in written)
    if too_long:
        warn(f"{too_long} prompts are longer than the {room} tokens that fit {lm.name}: they lose their beginning")
    return written


def answer_all(title: str, path: str, prompts: list[Example], modes: dict[str, dict], args) -> list[dict]:
    """One record for each prompt and mode with this model's answers; the model is loaded here and let go again."""
    rows = args.batch_size * max(settings.get("num_return_sequences", 1) for settings in modes.values())
    lm = load_language_model(path, args, args.add_eot_token, vllm=VllmUse(rows) if args.backend == "vllm" else None)
    print(f"{title} ({path}) is asked in {lm.asked.reason}", file=sys.stderr, flush=True)
    written = write_prompts(lm, prompts, args.max_new_tokens)
    ids = [prompt.ids for prompt in written]
    records = []
    for mode, settings in modes.items():
        print(f"{title} ({path}): {mode}, {len(prompts)} prompts", file=sys.stderr, flush=True)
        set_random_seed(args.seed)
        answers_of_prompts = generate_answers(lm, ids, args.batch_size, **settings)
        for number, (prompt, asked, answers) in enumerate(zip(prompts, written, answers_of_prompts, strict=True)):
            texts = [answer.text for answer in answers]
            if args.cut_at_next_human:
                texts = [cut_at_next_human(answer, lm.prompt_format) for answer in texts]
            cut = [len(text) < len(answer.text) for text, answer in zip(texts, answers, strict=True)]
            records.append(
                {
                    "prompt_number": number,
                    "prompt": readable(prompt.prompt),
                    "formatted_prompt": unmarked(asked.text),
                    "title": title,
                    "model": path,
                    "mode": mode,
                    "answers": [answer.strip() for answer in texts],
                    "num_tokens": [answer.num_tokens for answer in answers],
                    "ended": [answer.ended or shorter for answer, shorter in zip(answers, cut, strict=True)],
                }
            )
    lm.close()
    del lm
    free_memory()
    return records


def by_prompt(records: list[dict], modes: dict[str, dict]) -> list[list[dict]]:
    """The records of each prompt, ordered by mode and within it by model."""
    order = list(modes)
    prompts = {}
    for record in records:
        prompts.setdefault(record["prompt_number"], []).append(record)
    # The sort is stable, and the models were asked in their order.
    return [sorted(prompts[number], key=lambda record: order.index(record["mode"])) for number in sorted(prompts)]


def print_answers(records_of_prompts: list[list[dict]]):
    """The published console format: a heading before each answer, and a line that ends the prompt."""
    for records in records_of_prompts:
        print(f"Prompt: {records[0]['prompt'].strip()}\n")
        for record in records:
            print(f"=========={record['title']}: {record['mode']}=========")
            print(shown_answer(record))
            print()
        print(PROMPT_END)
        print("\n", flush=True)


def main(argv=None):
    # 1. Everything that can be wrong with flags and files is found before a model is loaded.
    args = parse_args(argv)
    modes = generation_modes(args)
    models = model_titles(args)
    functions = load_reward_functions(args.judge_function, "--judge_function")
    if args.prompts_file:
        prompts, rows = read_prompts(args.prompts_file)
    else:
        prompts, rows = prompts_of_lines(PROMPTS[args.language])
    check_columns(functions, [name for name in rows[0] if all(name in row for row in rows)])
    for _, path in models:
        check_model_folder(path, allow_soft_prompt=True)
    check_backend(args, [path for _, path in models])
    if args.judge_reward_model:
        check_model_folder(args.judge_reward_model)
    for path in (args.output, args.jsonl):
        check_writable(path)

    # 2. One model after the other, so that only one is in memory.
    records = [record for title, path in models for record in answer_all(title, path, prompts, modes, args)]

    # 3. Judge them.
    if args.judge_reward_model:
        judge_by_reward_model(records, prompts, args.judge_reward_model, args)
    for function in functions:
        judge_by_function(records, function, rows)
    found = comparisons(records)

    # 4. Show the answers prompt by prompt, and what the judges say.
    records_of_prompts = by_prompt(records, modes)
    print_answers(records_of_prompts)
    if found:
        print(comparison_table(found))
    if args.output:
        to_text = markdown_report if args.output.endswith(".md") else html_report
        write_text(args.output, to_text(records_of_prompts, models, found))
    if args.jsonl:
        write_jsonl(args.jsonl, [record for records in records_of_prompts for record in records])


if __name__ == "__main__":
    run_script(main)
