"""Let a baseline and one or several finetuned models answer the same prompts, and show the answers together.

    python evaluation_scripts/prompt_eval.py --model_name_or_path_baseline BASE --model_name_or_path_finetune output/sft
    ... --model_name_or_path_finetune output/sft output/actor --do_sample --output comparison.html

Departs from the reference: a file of prompts, several finetuned models, batches, and tables. Contrastive search and
beam groups, which transformers no longer has, are not available yet.
"""

import argparse
import gc
import html
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation_scripts.prompts import PROMPTS, read_prompts
from utils.data.prompt_format import cut_at_next_human, encode_prompt, prompt_from_text
from utils.data.special_tokens import unmarked
from utils.distributed import UserError, run_main
from utils.files import check_writable, write_jsonl, write_text
from utils.generation import (
    add_base_model_argument,
    add_load_in_4bit_argument,
    add_loading_arguments,
    check_model_folder,
    choosing_settings,
    generate_answers,
    load_language_model,
    warn,
)
from utils.utils import set_random_seed

PROMPT_END = "====================prompt end============================="


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Compare the answers of a baseline with those of finetuned models.")
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
        help="diverse beam search; not available yet, only 1 (off) is accepted",
    )
    parser.add_argument("--top_k", type=int, default=4, help="with --do_sample: the likeliest tokens only (4; 0: all)")
    parser.add_argument(
        "--penalty_alpha", type=float, default=0.6, help="for contrastive search, which is not available yet: no effect"
    )
    parser.add_argument(
        "--num_return_sequences", type=int, default=1, help="answers per prompt of sampling and of beam search (1)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=100, help="longest answer in tokens (100)")
    parser.add_argument(
        "--language", choices=list(PROMPTS), default="English", help="built-in prompts to ask (English)"
    )
    parser.add_argument(
        "--add_eot_token", action="store_true", help="answers end at <|endoftext|>, as training with this flag taught"
    )

    ours = parser.add_argument_group("beyond the reference")
    ours.add_argument(
        "--prompts_file",
        help="own prompts: .txt, one a line, or .jsonl with the field 'prompt'; '... Assistant:' stays as it is",
    )
    ours.add_argument("--output", help="write a side-by-side table to this .md or .html file (default: none)")
    ours.add_argument(
        "--jsonl", help="write every answer, its length and whether it ended to this file (default: none)"
    )
    ours.add_argument("--batch_size", type=int, default=8, help="prompts per batch (8)")
    ours.add_argument("--do_sample", action="store_true", help="show sampled answers too (off: greedy ones only)")
    ours.add_argument(
        "--temperature", type=float, default=1.0, help="with --do_sample: below 1 tamer, above wilder (1)"
    )
    ours.add_argument("--top_p", type=float, default=1.0, help="with --do_sample: tokens of this share only (1: off)")
    ours.add_argument("--seed", type=int, default=1234, help="of the sampling, the same for each model (1234)")
    ours.add_argument(
        "--cut_at_next_human",
        action="store_true",
        help="cut an answer where the model goes on to write the human's next turn (off: show what it wrote)",
    )
    add_base_model_argument(parser)
    add_loading_arguments(parser)
    add_load_in_4bit_argument(parser)
    args = parser.parse_args(argv)
    check_args(args, parser)
    return args


def check_args(args, parser):
    """UserError for what cannot be done; a warning for a flag that would have no effect."""
    if args.num_beam_groups > 1:
        raise UserError("--num_beam_groups above 1: diverse beam search is not available yet")
    for name in ("num_beams", "num_beam_groups", "num_return_sequences", "max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.num_return_sequences > 1 and not args.do_sample and args.num_beams == 1:
        raise UserError("--num_return_sequences above 1: greedy gives one answer; add --do_sample or --num_beams")
    if 1 < args.num_beams < args.num_return_sequences:
        raise UserError(f"--num_return_sequences {args.num_return_sequences}: more than --num_beams {args.num_beams}")
    if args.output and Path(args.output).suffix not in (".md", ".html"):
        raise UserError(f"--output {args.output}: the name must end in .md or .html")

    if args.penalty_alpha != parser.get_default("penalty_alpha"):
        warn("--penalty_alpha has no effect: contrastive search is not available yet")
    for name in ("top_k", "temperature", "top_p"):
        if not args.do_sample and getattr(args, name) != parser.get_default(name):
            warn(f"--{name} has no effect without --do_sample")
    if args.prompts_file and args.language != parser.get_default("language"):
        warn("--language has no effect with --prompts_file")


def generation_modes(args) -> dict[str, dict]:
    """Settings of generate() for each way of answering, in the order in which they are shown."""
    modes = {"Greedy": choosing_settings(False, args.temperature, args.top_p, args.top_k)}
    if args.num_beams > 1:
        modes["Beam"] = {
            "do_sample": False,
            "num_beams": args.num_beams,
            "num_return_sequences": args.num_return_sequences,
        }
    if args.do_sample:
        modes["Sampling"] = choosing_settings(True, args.temperature, args.top_p, args.top_k)
        modes["Sampling"]["num_return_sequences"] = args.num_return_sequences
    return {name: settings | {"max_new_tokens": args.max_new_tokens} for name, settings in modes.items()}


def model_titles(args) -> list[tuple[str, str]]:
    """(title, path) of each model: "Baseline", then "finetune", numbered and named if there are several."""
    finetuned = args.model_name_or_path_finetune
    titles = ["finetune"]
    if len(finetuned) > 1:
        titles = [f"finetune {n} ({Path(path).name or path})" for n, path in enumerate(finetuned, start=1)]
    return [("Baseline", args.model_name_or_path_baseline), *zip(titles, finetuned, strict=True)]


def answer_all(title: str, path: str, prompts: list[str], modes: dict[str, dict], args) -> list[dict]:
    """One record for each prompt and mode with this model's answers; the model is loaded here and let go again."""
    lm = load_language_model(path, args, args.add_eot_token)
    try:
        texts = [prompt_from_text(prompt, args.prompt_style, lm.tokenizer) for prompt in prompts]
    except ValueError as error:
        raise UserError(f"a prompt cannot be written in the style {args.prompt_style}: {error}") from error
    ids = [encode_prompt(text, lm.tokenizer, args.prompt_style, args.allow_special_tokens) for text in texts]
    records = []
    for mode, settings in modes.items():
        print(f"{title} ({path}): {mode}, {len(prompts)} prompts", file=sys.stderr, flush=True)
        set_random_seed(args.seed)
        answers_of_prompts = generate_answers(lm, ids, args.batch_size, **settings)
        for number, (prompt, text, answers) in enumerate(zip(prompts, texts, answers_of_prompts, strict=True)):
            written = [answer.text for answer in answers]
            if args.cut_at_next_human:
                written = [cut_at_next_human(answer, args.prompt_style) for answer in written]
            records.append(
                {
                    "prompt_number": number,
                    "prompt": prompt,
                    "formatted_prompt": unmarked(text),
                    "title": title,
                    "model": path,
                    "mode": mode,
                    "answers": [answer.strip() for answer in written],
                    "num_tokens": [answer.num_tokens for answer in answers],
                    "ended": [answer.ended for answer in answers],
                }
            )
    del lm
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()  # the next model needs the room
    return records


def shown_answer(record: dict) -> str:
    """The answer; of several, all of them, numbered."""
    if len(record["answers"]) == 1:
        return record["answers"][0]
    return "\n\n".join(f"[{number}] {answer}" for number, answer in enumerate(record["answers"], start=1))


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


def column_name(record: dict, num_modes: int) -> str:
    return f"{record['title']}: {record['mode']}" if num_modes > 1 else record["title"]


def markdown_table(records_of_prompts: list[list[dict]], models: list[tuple[str, str]], num_modes: int) -> str:
    """A table with a row for each prompt and a column for each model and mode."""

    def cell(text):
        # Markdown passes HTML through, so answers must not bring their own.
        return html.escape(text.strip(), quote=False).replace("|", "\\|").replace("\r", "").replace("\n", "<br>")

    columns = ["Prompt"] + [column_name(record, num_modes) for record in records_of_prompts[0]]
    rows = [[records[0]["prompt"]] + [shown_answer(record) for record in records] for records in records_of_prompts]
    lines = ["# Answers side by side", ""]
    lines += [f"- {cell(title)}: {cell(path)}" for title, path in models] + [""]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in [columns, *rows]]
    lines.insert(len(lines) - len(rows), "|" + " --- |" * len(columns))
    return "\n".join(lines) + "\n"


HTML_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Answers side by side</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1d2330; background: #fff; }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed; }}
th, td {{ border: 1px solid #ccd2dc; padding: .6rem; vertical-align: top; text-align: left; }}
td {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
thead th {{ background: #eef1f6; position: sticky; top: 0; }}
</style>
</head>
<body>
<h1>Answers side by side</h1>
<ul>
{models}
</ul>
<table>
<thead>
<tr>{columns}</tr>
</thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""


def html_page(records_of_prompts: list[list[dict]], models: list[tuple[str, str]], num_modes: int) -> str:
    """A page without outside parts: a row for each prompt, a column for each model and mode, all text escaped."""
    columns = ["Prompt"] + [column_name(record, num_modes) for record in records_of_prompts[0]]
    rows = [[records[0]["prompt"].strip()] + [shown_answer(r) for r in records] for records in records_of_prompts]
    return HTML_PAGE.format(
        models="\n".join(f"<li>{html.escape(title)}: {html.escape(path)}</li>" for title, path in models),
        columns="".join(f"<th>{html.escape(name)}</th>" for name in columns),
        rows="\n".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows),
    )


def main(argv=None):
    # 1. Everything that can be wrong with flags and files is found before a model is loaded.
    args = parse_args(argv)
    modes = generation_modes(args)
    models = model_titles(args)
    prompts = read_prompts(args.prompts_file) if args.prompts_file else PROMPTS[args.language]
    for _, path in models:
        check_model_folder(path, allow_soft_prompt=True)
    for path in (args.output, args.jsonl):
        check_writable(path)

    # 2. One model after the other, so that only one is in memory.
    records = [record for title, path in models for record in answer_all(title, path, prompts, modes, args)]

    # 3. Show the answers prompt by prompt.
    records_of_prompts = by_prompt(records, modes)
    print_answers(records_of_prompts)
    if args.output:
        to_text = markdown_table if args.output.endswith(".md") else html_page
        write_text(args.output, to_text(records_of_prompts, models, len(modes)))
    if args.jsonl:
        write_jsonl(args.jsonl, [record for records in records_of_prompts for record in records])


if __name__ == "__main__":
    run_main(main)
