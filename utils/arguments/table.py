"""The tables of flags in the steps' READMEs, made from their parsers so that they cannot differ.

python -m utils.arguments.table       writes them; a test says when that was forgotten
"""

import argparse
import importlib.util
from pathlib import Path

from utils.arguments.kinds import cache_folder

PROJECT = Path(__file__).resolve().parents[2]


STEPS = sorted((PROJECT / "training").glob("step*/main.py"))


BEGIN, END = "<!-- flags: written by python -m utils.arguments.table -->", "<!-- end of flags -->"


def parser_of(script: Path) -> argparse.ArgumentParser:
    spec = importlib.util.spec_from_file_location(script.parent.name, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_parser()


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
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"`{text.replace(cache_folder(), '~/.cache/three-steps-to-chat/data_files')}`"


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
            choices = f" ({', '.join(str(c) for c in action.choices)})" if action.choices and not action.metavar else ""
            help_text = (
                (action.help or "").removesuffix(" (default: %(default)s)").replace("%%", "%").replace("|", r"\|")
            )
            lines.append(f"| {' '.join(names)} | {_default(action)} | {help_text}{choices} |")
    return "\n".join(lines[1:])


def with_table(readme: str, parser: argparse.ArgumentParser) -> str:
    """A README with the table between its two marks made anew."""
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table(parser)}\n\n{END}{after}"


def main() -> None:
    for script in STEPS:
        readme = script.with_name("README.md")
        readme.write_text(with_table(readme.read_text(), parser_of(script)))


if __name__ == "__main__":
    main()
