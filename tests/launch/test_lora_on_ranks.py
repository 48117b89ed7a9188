"""LoRA on two ranks of ZeRO-3: folding and unfolding are exact, and the saved adapter is what trained."""

import pytest
import torch
from helpers import SCRIPTS, launch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def on_two_ranks(model_folder, tmp_path_factory):
    """The folder of what lora_on_ranks.py saved; it asserts most itself."""
    folder = tmp_path_factory.mktemp("lora")
    code, console = launch(SCRIPTS / "lora_on_ranks.py", [model_folder, folder], "torchrun", ranks=2)
    assert code == 0, console
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_on_two_ranks_of_zero_3_folding_after_training_is_exact(model_folder, on_two_ranks, merge_lora, dtype):
    """The merged adapter is compared with the saved model here."""
    saved = load_file(on_two_ranks / dtype / "model.safetensors")
    merged = load_file(merge_lora(on_two_ranks / dtype / "adapter") / "model.safetensors")
    base = load_file(model_folder / "model.safetensors")
    assert saved.keys() == merged.keys() == base.keys()
    for name, value in saved.items():
        moved = not torch.equal(value, base[name].to(value.dtype))
        assert moved == ("_proj" in name), name
        if dtype == "fp32":
            assert torch.equal(value, merged[name]), name
