"""The tables of flags in the steps' READMEs, made from their parsers so that they cannot differ.

python -m utils.arguments.table            writes them; a test says when that was forgotten
"""

import argparse
import re

from utils.arguments.kinds import cache_folder
from utils.arguments.steps import SCRIPTS, build_parser

BEGIN, END = "<!-- flags: written by python -m utils.arguments.table -->", "<!-- end of flags -->"


def _default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if isinstance(action, argparse._StoreTrueAction):
        return "off"
    value = getattr(action.default, "value", action.default)  # of an enumeration
    if isinstance(action, argparse.BooleanOptionalAction):
        return {True: "on", False: "off", None: "none"}[value]
    if value is None or value == []:
        return "none"
    if value is False:
        return "off"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text.replace(cache_folder(), "~/.cache/three-steps-to-chat/data_files")
    return f"`{_in_a_cell(text)}`"


def _choices(action: argparse.Action) -> str:
    """The values that may be given, in brackets, unless the help names them all."""
    choices = [str(choice) for choice in action.choices or ()]
    named = (re.search(rf"\b{re.escape(choice)}\b", action.help or "") for choice in choices)
    if not choices or action.metavar or all(named):
        return ""
    return f" ({', '.join(choices)})"


def _in_a_cell(text: str) -> str:
    """A bar would end the cell, even in code."""
    return text.replace("|", r"\|")


def table(parser: argparse.ArgumentParser) -> str:
    """Markdown: a heading line and the rows of each group of flags."""
    lines = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.option_strings and action.dest != "help"]
        if not actions or group.title in ("options", "DeepSpeed"):  # DeepSpeed's change with its version
            continue
        lines += ["", f"**{group.title}**", "", "| flag | default | |", "|---|---|---|"]
        for action in actions:
            names = [f"`{name}`" for name in action.option_strings]
            help_text = _in_a_cell((action.help or "").removesuffix(" (default: %(default)s)").replace("%%", "%"))
            lines.append(f"| {' '.join(names)} | {_default(action)} | {help_text}{_choices(action)} |")
    return "\n".join(lines[1:])


def with_table(readme: str, parser: argparse.ArgumentParser) -> str:
    """A README with the table between its two marks made anew."""
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table(parser)}\n\n{END}{after}"


def main() -> None:
    for step, script in SCRIPTS.items():
        readme = script.with_name("README.md")
        readme.write_text(with_table(readme.read_text(), build_parser(step)))


if __name__ == "__main__":
    main()
