#!/usr/bin/env python
"""A smaller model out of the first layers of a larger one, with its embedding and head: a start for a reward model.

python evaluation_scripts/real_language/first_layers.py --model_name_or_path BASE --layers 12 --output_dir SMALLER
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from utils.process.errors import UserError, run_script


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="the larger model, a folder or a hub name")
    parser.add_argument("--layers", type=int, required=True, help="layers to keep; 0 for all")
    parser.add_argument("--output_dir", required=True, help="where the smaller model goes")
    args = parser.parse_args(argv)
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    if not 0 <= args.layers <= config.num_hidden_layers:
        raise UserError(f"--layers {args.layers}: {args.model_name_or_path} has {config.num_hidden_layers}")
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    # Weights of layers that the configuration does not name are not read.
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, config=config, dtype="auto")
    model.save_pretrained(args.output_dir)
    AutoTokenizer.from_pretrained(args.model_name_or_path).save_pretrained(args.output_dir)


if __name__ == "__main__":
    run_script(main)
