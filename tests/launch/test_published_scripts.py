"""Training scripts of the published manner, from the published names alone, train, evaluate and save on two ranks."""

import re

import pytest
import torch
from helpers import SCRIPTS, flags, launch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

CLASSES = {1: AutoModelForCausalLM, 2: AutoModelForSequenceClassification}


def run_script(step: int, model, data, folder, **values) -> tuple[str, torch.nn.Module]:
    """The console of a script and the model that it saved, as plain transformers loads it."""
    places = dict(
        model_name_or_path=model, data_path=data, data_output_path=folder / "cache", output_dir=folder / "out"
    )
    arguments = flags("--data_split 1,1,1", **places, **values)
    code, console = launch(SCRIPTS / f"published_step{step}.py", arguments, "deepspeed", ranks=2)
    assert code == 0, console[-4000:]
    loaded, info = CLASSES[step].from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert AutoTokenizer.from_pretrained(folder / "out").eos_token == "</s>"
    return console, loaded.eval()


@pytest.mark.parametrize("lora_dim", [0, pytest.param(4, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_published_script_trains_evaluates_and_saves_the_same_at_zero_0_and_3(
    step, lora_dim, model_folder, pairs_folder, tmp_path
):
    models, figures = [], []
    for stage in (0, 3):
        values = dict(zero_stage=stage, lora_dim=lora_dim, num_train_epochs=4)
        console, model = run_script(step, model_folder, pairs_folder, tmp_path / str(stage), **values)
        models.append(model)
        pattern = r"ppl: ([\d.]+)" if step == 1 else r"mean loss: ([\d.]+)"
        figures.append([float(value) for value in re.findall(pattern, console)])
    assert figures[0][-1] < 0.95 * figures[0][0]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
    ids = torch.tensor([[5, 9, 60, 70, 80, 90]])
    with torch.no_grad():
        whole, sharded = (model(ids, attention_mask=torch.ones_like(ids)).logits for model in models)
    torch.testing.assert_close(sharded, whole, atol=1e-2, rtol=1e-2)
