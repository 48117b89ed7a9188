"""Saves an actor and a reward model with LoRA at ZeRO 0 and 3: torchrun … save_on_ranks.py MODEL OUTPUT

They are OUTPUT/STAGE/actor, whole, and OUTPUT/STAGE/reward, in shards; OUTPUT/STAGE.gatheredRANK tells the largest
share of the actor that was gathered at a time.
"""

import sys
from argparse import Namespace
from pathlib import Path

from transformers import AutoModelForCausalLM

from utils.ds_utils import get_eval_ds_config, initialize, with_batch_sizes
from utils.model import saving
from utils.model.model_utils import create_critic_model, create_hf_model
from utils.model.tokenizer import load_hf_tokenizer
from utils.module.lora import convert_linear_layer_to_lora, lora_layers
from utils.process.launch import init_distributed, run_main
from utils.process.seeds import set_random_seed
from utils.process.world import get_rank
from utils.run.results import save_hf_format
from utils.utils import save_zero_three_model

GATHERED_PARAMETERS = saving.deepspeed.zero.GatheredParameters


def main():
    init_distributed(Namespace(local_rank=-1, comm_timeout=60))
    for stage in (0, 3):
        save(sys.argv[1], Path(sys.argv[2]) / str(stage), stage)


def save(base: str, output: Path, stage: int) -> None:
    tokenizer = load_hf_tokenizer(base)
    config = with_batch_sizes(get_eval_ds_config(False, "fp32", stage), 1)
    for kind, size in (("actor", None), ("reward", 20_000)):
        set_random_seed(1)
        if kind == "reward":
            model = create_critic_model(base, tokenizer, config)
        else:
            model = create_hf_model(AutoModelForCausalLM, base, tokenizer, config)
        convert_linear_layer_to_lora(model, "auto", 2)
        for _, layer in lora_layers(model):
            layer.lora_left_weight.data.normal_()
        engine = initialize(model, config)
        if kind == "actor":
            watch_gathering(engine.module, Path(f"{output}.gathered{get_rank()}"))
        save_hf_format(engine, tokenizer, Namespace(output_dir=output / kind, max_shard_size=size))
        save_zero_three_model(engine, get_rank(), output / kind / "weights", stage)


def watch_gathering(module, record: Path) -> None:
    """Write down the largest share of the weights that are there at a time: a whole model would be seen."""
    shares = [0.0]

    class Watching(GATHERED_PARAMETERS):
        def __enter__(self):
            result = super().__enter__()
            sharded = [p for p in module.parameters() if hasattr(p, "ds_id")]
            full = sum(p.ds_numel for p in sharded if p.ds_status.name == "AVAILABLE")
            shares.append(full / max(sum(p.ds_numel for p in sharded), 1))
            record.write_text(str(max(shares)))
            return result

    saving.deepspeed.zero.GatheredParameters = Watching


run_main(main)
