"""The pages of this project, for the tests that read them."""

from utils.arguments import PROJECT

PARTS = ("training", "training_scripts", "inference", "evaluation_scripts", "utils", "tests")
PAGES = sorted([*PROJECT.glob("*.md"), *PROJECT.glob(".github/*.md")])
PAGES += sorted(page for part in PARTS for page in (PROJECT / part).rglob("*.md"))
