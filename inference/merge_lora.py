"""Fold a LoRA adapter into its base model, on the CPU, and save a model that stands alone.

    python inference/merge_lora.py --base_model facebook/opt-1.3b --adapter output/sft/adapter --output_dir merged

Adapters are those that training saves with --save_lora_adapters, and PEFT's own. The model is never built: its weights
go from the base's files to the new ones one at a time, so that the memory needed is the adapter and the largest weight.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.model.adapters import ADAPTER_CONFIG
from utils.model.merging import read_adapter, save_merged_model
from utils.model.shards import MAX_SHARD_SIZE
from utils.process.errors import UserError
from utils.process.files import check_output_dir
from utils.process.launch import run_main


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fold a LoRA adapter into its base model, on the CPU.")
    add = parser.add_argument
    add("--adapter", required=True, help="folder with adapter_config.json and the adapter's weights")
    add(
        "--base_model",
        default=None,
        help="folder or hub name of the unquantised model the adapter was trained on; None for the one it names",
    )
    add("--output_dir", required=True, help="folder for the merged model, another one than the two above")
    add("--max_shard_size", default=MAX_SHARD_SIZE, help=f"largest file of weights ({MAX_SHARD_SIZE})")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    adapter_folder, output_dir = Path(args.adapter), Path(args.output_dir)
    adapter = read_adapter(adapter_folder)
    base_model = args.base_model or adapter.config.get("base_model_name_or_path")
    if not base_model:
        raise UserError(f"{adapter_folder / ADAPTER_CONFIG} names no base model; give --base_model")
    for flag, folder in (("--base_model", Path(base_model)), ("--adapter", adapter_folder)):
        if folder.is_dir() and folder.resolve() == output_dir.resolve():
            raise UserError(f"--output_dir {output_dir} is the {flag} folder; the merged model needs one of its own")
    check_output_dir(args.output_dir)
    save_merged_model(base_model, adapter, output_dir, args.max_shard_size)
    print(f"saved {output_dir}")


if __name__ == "__main__":
    run_main(main)
