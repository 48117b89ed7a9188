"""What the READMEs say against what the scripts do."""

import pytest

from utils.arguments import SCRIPTS, build_parser
from utils.arguments.table import with_table


@pytest.mark.parametrize("step", SCRIPTS)
def test_the_table_of_flags_is_that_of_the_parser(step):
    readme = SCRIPTS[step].with_name("README.md").read_text()
    parser = build_parser(step)
    assert with_table(readme, parser) == readme, "run python -m utils.arguments.table"
    flags = [name for action in parser._actions for name in action.option_strings if action.dest != "help"]
    assert sum(f"`{flag}`" in readme for flag in flags) >= len(flags) - 4  # DeepSpeed's own four


@pytest.mark.parametrize("step", SCRIPTS)
def test_help_fits_a_hundred_columns_and_is_grouped(step):
    parser = build_parser(step)
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 100
    ungrouped = [a for a in parser._action_groups[1]._group_actions if a.dest != "help"]
    assert not ungrouped, "every flag belongs to a named group"
    assert all(action.help for action in parser._actions)
