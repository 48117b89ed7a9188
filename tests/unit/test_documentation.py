"""What the pages say against what is there."""

import re
from pathlib import Path

import pytest
from helpers import PROJECT
from pages import PAGES, PARTS

from utils.arguments import SCRIPTS, build_parser
from utils.arguments.table import with_table

TESTS = sorted((PROJECT / "tests").rglob("test_*.py"))


def name_of(page: Path) -> str:
    return str(page.relative_to(PROJECT))


def text_of(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)


def anchors_of(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them: lower case, without punctuation, blanks as hyphens."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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


def test_the_first_page_is_short():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files_and_headings_that_exist(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        exists = re.match(r"https?:", target) or file.exists()
        if not exists or (anchor and file.suffix == ".md" and anchor not in anchors_of(file)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_tests_that_a_page_names_exist(page):
    text = page.read_text()
    paths = set(re.findall(rf"(?<![\w./])(?:{'|'.join(PARTS)})/[\w./-]+\.(?:py|sh|md|png)\b", text))
    wrong = [path for path in paths if not (PROJECT / path).exists() and not re.search(r"\b[A-Z]{2,}", path)]
    known = {file.name for file in TESTS}
    known |= {name for file in TESTS for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    wrong += [name for name in re.findall(r"`(test_\w+(?:\.py)?)`", text) if name not in known]
    assert wrong == []


def test_the_map_of_utils_has_a_line_for_every_module():
    lines = (PROJECT / "utils/README.md").read_text().partition("## At the top")[2]
    folder, named = "utils", set()
    for line in lines.splitlines():
        if heading := re.match(r"## `(\w+)/` \(layer \d\)", line):
            folder = f"utils/{heading[1]}"
        elif row := re.match(r"\| `(\w+\.py)` \|", line):
            named.add(f"{folder}/{row[1]}")
    assert named == {name_of(file) for file in (PROJECT / "utils").rglob("*.py") if file.name != "__init__.py"}
