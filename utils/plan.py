"""``python -m utils.plan``: see planning/plan.py."""

import sys

from utils.planning.plan import main
from utils.process.errors import run_script

if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
