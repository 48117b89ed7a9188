"""What the policy is compared with: the model as it was at the start, in one of four forms.

    --reference_free             none: log-probs of 0
    --precompute_ref_log_probs   a table of log-probs, made by the policy before its first step
    --only_optimize_lora         the policy without its adapters
    otherwise                    a frozen engine (--offload_reference_model: in host memory)

Each is a function from a batch to the log-probs of its answers, [answers] fp64; every rank must call it.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from training.step2_dpo_finetuning.dpo_math import answer_log_probs
from utils.arguments import has_reference_engine
from utils.data import batching
from utils.engine import build
from utils.model.inputs import model_inputs
from utils.model.loading import find_checkpoint
from utils.model.losses import LabelLogProbs
from utils.model.model_utils import create_hf_model
from utils.module.lora import lora_disabled
from utils.process.console import print_rank_0, progress
from utils.process.errors import UserError
from utils.process.files import name_if_new, scratch_beside
from utils.process.ranks import agree, all_gather_objects, all_reduce_sum
from utils.process.world import get_local_rank
from utils.run.same_run import model_fingerprint, rows_fingerprint

Reference = Callable[[dict], torch.Tensor]


def batch_log_probs(label_log_probs: LabelLogProbs, batch: dict) -> torch.Tensor:
    """[answers] fp64 of a batch of DataCollatorDPO."""
    inputs = model_inputs(label_log_probs.model, batch["input_ids"], batch["attention_mask"])
    return answer_log_probs(label_log_probs, inputs, batch["labels"])


def make_reference(args, label_log_probs: LabelLogProbs, tokenizer, datasets, device) -> Reference:
    """The reference that the flags ask for; call it before the policy has changed or was resumed.

    Args:
        label_log_probs: of the policy's engine. datasets: NumberedRows that training and evaluation read.

    Raises:
        UserError: the table of --precompute_ref_log_probs cannot be kept.
    """
    if args.reference_free:
        return lambda batch: torch.zeros(len(batch["labels"]), dtype=torch.float64, device=device)
    if args.precompute_ref_log_probs:
        table = _table(args, _without_adapters(label_log_probs), tokenizer, datasets, device)
        return lambda batch: table[batch["numbers"]]
    if not has_reference_engine(args):
        return _without_adapters(label_log_probs)
    config = build.frozen_config(args, args.zero_stage, args.offload_reference_model)
    options = build.model_options(args, dropout=0.0)
    model = create_hf_model(AutoModelForCausalLM, args.model_name_or_path, tokenizer, config, **options)
    frozen = LabelLogProbs(build.frozen_engine(model, config))

    @torch.no_grad()
    def of_frozen_engine(batch: dict) -> torch.Tensor:
        return batch_log_probs(frozen, batch)

    return of_frozen_engine


def _without_adapters(label_log_probs: LabelLogProbs) -> Reference:
    """The policy's own engine with LoRA switched off, in evaluation mode: no dropout, nothing recomputed."""
    engine = label_log_probs.engine

    @torch.no_grad()
    def of_the_policy(batch: dict) -> torch.Tensor:
        was_training = engine.module.training
        engine.eval()
        with lora_disabled(engine.module):
            log_probs = batch_log_probs(label_log_probs, batch)
        engine.train(was_training)
        return log_probs

    return of_the_policy


# ---------------------------------------------------------------- --precompute_ref_log_probs


def _table(args, reference: Reference, tokenizer, datasets, device) -> torch.Tensor:
    """[numbers + 1] fp64, on the device: log-probs by the numbers of answers, and 0 for fillers at the end.

    It is kept on each node, named by all that it depends on, so that a resumed run compares with the very same numbers.
    """
    file = _file(args, tokenizer, datasets)
    if all(all_gather_objects(file.exists())):
        print_rank_0(f"reference: the log-probs of an earlier run with this model and these rows ({file})")
        return load_file(file)["log_probs"].to(device)
    size = sum(len(dataset) * dataset.width for dataset in datasets)
    table = torch.zeros(size + 1, dtype=torch.float64, device=device)
    collator = batching.DataCollatorDPO(tokenizer.pad_token_id, args.max_seq_len, args.pad_to_max_length)
    for dataset in datasets:
        loader = batching.make_eval_loader(dataset, collator, args.per_device_eval_batch_size)
        for batch in progress(loader, "reference", len(loader)):
            batch = batching.to_device(batch, device)
            table[batch["numbers"]] = reference(batch)
    table = all_reduce_sum(table)  # each answer was another rank's or this one's

    def keep() -> None:
        if get_local_rank() > 0:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with scratch_beside(file) as scratch:
                save_file({"log_probs": table.cpu()}, scratch)
                name_if_new(scratch, file)
        except OSError as error:
            raise UserError(f"--data_output_path: {file} could not be written: {error.strerror or error}") from error

    agree(keep)
    print_rank_0(f"reference: log-probs of {sum(map(len, datasets)):,} rows, kept in {file}")
    return table


def _file(args, tokenizer, datasets) -> Path:
    """Of the table in --data_output_path. Batches decide the last digits alone, and are no part of the name."""
    weights = find_checkpoint(args.model_name_or_path).files[0].parent  # a name on the hub has a folder in its cache
    rows = [rows_fingerprint(dataset, sampled=len(dataset)) for dataset in datasets]
    model = args.dtype, args.attn_implementation, args.quantize, args.quantize_double, len(tokenizer)
    key = hashlib.sha256(json.dumps([model_fingerprint(weights, whole=True), rows, model]).encode()).hexdigest()[:24]
    return Path(args.data_output_path) / "reference" / f"{key}.safetensors"
