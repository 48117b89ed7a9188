"""The hybrid engine in training on one rank and two."""

import pytest
from helpers import SCRIPTS, launch


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_and_weights_are_those_of_training_without_it_at_every_zero_stage(ranks, tmp_path):
    """ZeRO 0 to 3, LoRA on and off, gathered and layer by layer; see generation_on_ranks.py."""
    code, output = launch(SCRIPTS / "generation_on_ranks.py", [tmp_path], "torchrun", ranks, timeout=600)
    assert code == 0, output[-4000:]
    assert output.count("equal: ") == 10, output[-4000:]
    assert "all ranks fall back" in output, output[-4000:]
