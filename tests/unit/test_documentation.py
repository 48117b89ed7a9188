"""What the READMEs say against what the scripts do."""

import pytest

from utils.arguments.table import STEPS, parser_of, with_table


@pytest.mark.parametrize("script", STEPS, ids=[script.parent.name for script in STEPS])
def test_the_table_of_flags_is_that_of_the_parser(script):
    readme = script.with_name("README.md").read_text()
    parser = parser_of(script)
    assert with_table(readme, parser) == readme, "run python -m utils.flag_table"
    flags = [name for action in parser._actions for name in action.option_strings if action.dest != "help"]
    assert sum(f"`{flag}`" in readme for flag in flags) >= len(flags) - 4  # DeepSpeed's own four


@pytest.mark.parametrize("script", STEPS, ids=[script.parent.name for script in STEPS])
def test_help_fits_a_hundred_columns_and_is_grouped(script):
    parser = parser_of(script)
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 100
    ungrouped = [a for a in parser._action_groups[1]._group_actions if a.dest != "help"]
    assert not ungrouped, "every flag belongs to a named group"
    assert all(action.help for action in parser._actions)
