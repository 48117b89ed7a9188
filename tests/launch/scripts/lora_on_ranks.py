"""LoRA on ZeRO-3 in bf16 and fp32, trained, folded, unfolded, saved: torchrun … lora_on_ranks.py MODEL OUTPUT

What each dtype saves is OUTPUT/DTYPE.
"""

import sys
from argparse import Namespace
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM

from utils.ds_utils import TORCH_DTYPES, get_train_ds_config, initialize, with_batch_sizes
from utils.engine.optimizer import get_optimizer_grouped_parameters, make_optimizer
from utils.generation.hybrid_engine import HybridEngine
from utils.model.model_utils import adapt_model, create_hf_model
from utils.model.tokenizer import load_hf_tokenizer
from utils.module.lora import lora_layers
from utils.process.launch import init_distributed, run_main
from utils.process.world import get_rank, get_world_size
from utils.run.results import save_hf_format, save_lora_adapters


def main():
    init_distributed(Namespace(local_rank=-1, comm_timeout=60))
    assert get_world_size() == 2
    for dtype in ("bf16", "fp32"):
        check(sys.argv[1], f"{sys.argv[2]}/{dtype}", dtype)


def check(model_folder: str, output: str, dtype: str) -> None:
    args = Namespace(
        lora_dim=4, lora_module_name="auto", lora_scaling=8.0, lora_dropout=0.0, only_optimize_lora=True,
        output_dir=output, trust_remote_code=False,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = load_hf_tokenizer(model_folder)
    config = with_batch_sizes(get_train_ds_config(False, dtype, 3), 2)
    model = create_hf_model(AutoModelForCausalLM, model_folder, tokenizer, config, dtype=TORCH_DTYPES[dtype])
    adapt_model(model, args, gradient_checkpointing=True)
    groups = get_optimizer_grouped_parameters(model, 0.0, lora_lr=0.02)
    engine = initialize(model, config, make_optimizer(groups, 1e-3, False))
    parameters = [p for p in model.parameters()]

    def weights() -> dict[str, torch.Tensor]:
        with deepspeed.zero.GatheredParameters(parameters):
            return {name: p.detach().clone() for name, p in model.named_parameters()}

    start = weights()
    ids = torch.arange(3, 27).view(2, 12) + 7 * get_rank()
    engine.train()
    for _ in range(4):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    trained = weights()
    for name, value in trained.items():
        assert torch.equal(value, start[name]) != ("lora_" in name), f"{name} moved, or did not"

    engine.eval()
    with torch.no_grad():
        unfolded = engine(input_ids=ids).logits
    with HybridEngine(engine).generation() as module:
        once = {name: layer.weight.detach().clone() for name, layer in lora_layers(module)}
        assert not any(torch.equal(weight, trained[f"{name}.weight"]) for name, weight in once.items())
        for name, layer in lora_layers(module):
            layer.fuse_lora_weight()
            assert torch.equal(layer.weight, once[name])
        folded = module(input_ids=ids).logits
    tolerance = 1e-5 if dtype == "fp32" else 0.03
    torch.testing.assert_close(folded, unfolded, atol=tolerance, rtol=tolerance)
    after = weights()
    assert all(torch.equal(value, after[name]) for name, value in trained.items()), "unfolding lost a bit"
    with torch.no_grad():
        assert torch.equal(engine(input_ids=ids).logits, unfolded)

    save_hf_format(engine, tokenizer, args)
    save_lora_adapters(engine, tokenizer, args, model_folder)
    assert (Path(output) / "adapter/adapter_config.json").is_file()


run_main(main)
