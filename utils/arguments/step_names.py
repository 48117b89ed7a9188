"""What the steps are called: 1, 2 and 3, and DPO, which stands in the place of steps 2 and 3."""

DPO = "dpo"
Step = int | str
NAMES = {1: "step1", 2: "step2", DPO: "dpo", 3: "step3"}  # as parts of names of files and folders
TITLES = {1: "step 1", 2: "step 2", DPO: "DPO", 3: "step 3"}  # in sentences


def step_of(text: str) -> Step:
    """The step that a word of a command line names."""
    return int(text) if text.isdigit() else text
