"""Saving what a run made: whole models in Hugging Face's format, adapters, bare weights."""

from pathlib import Path

from utils.model.adapters import save_lora_adapter
from utils.model.inputs import unwrap
from utils.model.merging import read_adapter, save_merged_model
from utils.model.saving import save_pretrained_model
from utils.model.soft_prompt import save_soft_prompt
from utils.module.lora import lora_layers
from utils.process.console import is_rank_0
from utils.process.ranks import agree
from utils.run.model_card import LORA, SOFT_PROMPT, RunCard


def _readme(
    card: RunCard | None, folder: Path, name: str, base: str, tokenizer, adapter: str | None = None
) -> str | None:
    """The text of the model card of a folder, on the rank that writes it."""
    return card.text_for(folder, name, base, tokenizer, adapter) if card is not None and is_rank_0() else None


def save_hf_format(model, tokenizer, args, sub_folder="", readme: str | None = None) -> None:
    """Save model, configuration and full tokenizer under ``args.output_dir/sub_folder``; every rank must call this.

    LoRA is folded in, ZeRO-3 shards are gathered, files appear atomically. A reward model is saved as a
    sequence-classification model with one label.
    """
    folder = Path(args.output_dir) / sub_folder
    # At ZeRO 3 the last pass may have fetched weights ahead: while they are under way they can be no layer's.
    if hasattr(model, "empty_partition_cache"):
        model.empty_partition_cache()
    # Other people's code calls this with a namespace that has output_dir alone; the steps give --max_shard_size.
    save_pretrained_model(unwrap(model), tokenizer, folder, getattr(args, "max_shard_size", None), readme)


def save_lora_adapters(
    model, tokenizer, args, base_model_name_or_path, sub_folder="", card: RunCard | None = None
) -> None:
    """Save the LoRA factors alone under ``args.output_dir/sub_folder/adapter``; every rank must call this.

    A folder of its own: with an adapter among a model's files, transformers would load the base and put it on top. A
    model without LoRA layers (the critic, say, beside an adapted actor) has none to save.
    """
    module, folder = unwrap(model), Path(args.output_dir) / sub_folder / "adapter"
    if lora_layers(module):
        readme = _readme(card, folder, sub_folder, base_model_name_or_path, tokenizer, LORA)
        save_lora_adapter(module, tokenizer, base_model_name_or_path, folder, args.trust_remote_code, readme)


def save_quantised_model(
    model, tokenizer, args, base_model_name_or_path, sub_folder="", card: RunCard | None = None
) -> None:
    """Save a QLoRA model whole: its adapters, and their update folded into the base's own files; on every rank.

    The packed weights are not saved: they are the base's, rounded.
    """
    save_lora_adapters(model, tokenizer, args, base_model_name_or_path, sub_folder, card)

    def merge() -> None:
        if is_rank_0():
            folder = Path(args.output_dir) / sub_folder
            readme = _readme(card, folder, sub_folder, base_model_name_or_path, tokenizer)
            adapter = read_adapter(folder / "adapter")
            save_merged_model(base_model_name_or_path, adapter, folder, args.max_shard_size, readme)

    agree(merge)


def save_trained_model(
    model, tokenizer, args, base_model_name_or_path, sub_folder="", card: RunCard | None = None
) -> None:
    """Save a model in every form that the flags ask for, each with its model card; every rank must call this."""
    if args.quantize is not None:
        save_quantised_model(model, tokenizer, args, base_model_name_or_path, sub_folder, card)
        return
    readme = _readme(card, Path(args.output_dir) / sub_folder, sub_folder, base_model_name_or_path, tokenizer)
    save_hf_format(model, tokenizer, args, sub_folder, readme)
    if args.save_lora_adapters:
        save_lora_adapters(model, tokenizer, args, base_model_name_or_path, sub_folder, card)


def save_trained_soft_prompt(model, tokenizer, args, sub_folder="", card: RunCard | None = None) -> None:
    """Save the vectors of a soft prompt with their model card; every rank must call this."""
    folder = Path(args.output_dir) / sub_folder
    readme = _readme(card, folder, sub_folder, args.model_name_or_path, tokenizer, SOFT_PROMPT)
    save_soft_prompt(unwrap(model), tokenizer, folder, readme)
