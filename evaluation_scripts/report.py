"""The answers of several models side by side, as one file: Markdown, or an HTML page that needs nothing else."""

import html

from evaluation_scripts.judging import COLUMNS, INTERVALS, Comparison, cells

Records = list[list[dict]]  # of each prompt the records of all modes and models, by mode


def shown_answer(record: dict) -> str:
    """The answer; of several, all of them, numbered."""
    if len(record["answers"]) == 1:
        return record["answers"][0]
    return "\n\n".join(f"[{number}] {answer}" for number, answer in enumerate(record["answers"], start=1))


def remarks(record: dict, number: int) -> str:
    """What is to be said of one answer: its length, whether it was cut off, its scores."""
    tokens = record["num_tokens"][number]
    parts = [f"{tokens} token" + ("s" if tokens != 1 else "")]
    if not record["ended"][number]:
        parts.append("cut off")
    parts += [f"{judge} {scores[number]:.3f}" for judge, scores in record.get("scores", {}).items()]
    return ", ".join(parts)


# ---------------------------------------------------------------- Markdown


def markdown_report(records_of_prompts: Records, models: list[tuple[str, str]], found: list[Comparison]) -> str:
    """A table with a row for each prompt and a column for each model and mode, and one of the comparisons."""

    def cell(text):
        # Markdown passes HTML through, so answers must not bring their own.
        return html.escape(text.strip(), quote=False).replace("|", "\\|").replace("\r", "").replace("\n", "<br>")

    def table(rows):
        lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
        return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:], ""]

    num_modes = len({record["mode"] for record in records_of_prompts[0]})
    names = [f"{r['title']}: {r['mode']}" if num_modes > 1 else r["title"] for r in records_of_prompts[0]]
    rows = [[records[0]["prompt"], *map(shown_answer, records)] for records in records_of_prompts]
    lines = ["# Answers side by side", "", *(f"- {cell(title)}: {cell(path)}" for title, path in models), ""]
    if found:
        lines += [*table([list(COLUMNS), *map(cells, found)]), cell(INTERVALS), ""]
    return "\n".join(lines + table([["Prompt", *names], *rows]))


# ---------------------------------------------------------------- HTML

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1.5rem; color: #1d2330;
       background: #f6f7f9; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1rem; margin: 1rem 0 .4rem; color: #5a6474; font-weight: 600; }
ul { margin: 0 0 1rem; padding-left: 1.2rem; }
section { background: #fff; border: 1px solid #dde1e8; border-radius: 8px; padding: 1rem 1.2rem; margin: 1.2rem 0; }
.prompt { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); }
.answer { border: 1px solid #dde1e8; border-radius: 6px; padding: .6rem .8rem; min-width: 0; }
.answer.best { border-color: #2d8a4e; box-shadow: inset 3px 0 #2d8a4e; }
.model { color: #5a6474; font-size: .85rem; font-weight: 600; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .3rem; }
.remarks { color: #7a8494; font-size: .8rem; margin-bottom: .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #e6e9ee; white-space: nowrap; }
.note { color: #7a8494; font-size: .85rem; margin: .5rem 0 0; }
"""


def _tag(name: str, content: str, css: str = "") -> str:
    """An element around content that is HTML already."""
    attribute = f' class="{css}"' if css else ""
    return f"<{name}{attribute}>{content}</{name}>"


def _best_titles(records: list[dict]) -> set[str]:
    """Models whose answers in one mode score highest on average by the first judge; none if all score alike."""
    means = {r["title"]: sum(s) / len(s) for r in records for s in list(r.get("scores", {}).values())[:1]}
    if len(set(means.values())) < 2:
        return set()
    return {title for title, mean in means.items() if mean == max(means.values())}


def _answer(record: dict, is_best: bool) -> str:
    parts = [_tag("div", html.escape(record["title"]), "model")]
    for number, answer in enumerate(record["answers"]):
        parts.append(_tag("div", html.escape(answer) or "<i>(empty)</i>", "text"))
        parts.append(_tag("div", html.escape(remarks(record, number)), "remarks"))
    return _tag("div", "".join(parts), "answer best" if is_best else "answer")


def _prompt(records: list[dict]) -> str:
    parts = [_tag("div", html.escape(records[0]["prompt"].strip()), "prompt")]
    for mode in dict.fromkeys(record["mode"] for record in records):
        of_mode = [record for record in records if record["mode"] == mode]
        best = _best_titles(of_mode)
        parts.append(_tag("h2", html.escape(mode)))
        parts.append(_tag("div", "".join(_answer(record, record["title"] in best) for record in of_mode), "answers"))
    return _tag("section", "".join(parts))


def _comparisons(found: list[Comparison]) -> str:
    head = "".join(_tag("th", html.escape(name)) for name in COLUMNS)
    rows = [_tag("tr", "".join(_tag("td", html.escape(text)) for text in cells(one))) for one in found]
    table = _tag("div", _tag("table", _tag("tr", head) + "".join(rows)), "wide")
    first = html.escape(found[0].judge)
    note = f"{html.escape(INTERVALS)}. Green: the best answers to a prompt, by {first}."
    return _tag("section", table + _tag("p", note, "note"))


def html_report(records_of_prompts: Records, models: list[tuple[str, str]], found: list[Comparison]) -> str:
    """A page without outside parts, with all text escaped: the judges' findings, and a section for each prompt."""
    listed = "".join(_tag("li", html.escape(f"{title}: {path}")) for title, path in models)
    parts = [_tag("h1", "Answers side by side"), _tag("ul", listed)]
    parts += [_comparisons(found)] if found else []
    parts += map(_prompt, records_of_prompts)
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # nothing of an answer is ever run or fetched
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Answers side by side</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
