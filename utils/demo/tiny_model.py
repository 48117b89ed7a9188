"""Create the demo's model from scratch: a small Llama with random weights and a tokenizer of the demo's own texts.

python -m utils.demo.tiny_model --output DIR [--seed 1234]
"""

import argparse
import os
import tempfile

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from utils.demo.world import demo_rows, questions

PAD_TOKEN, EOS_TOKEN = "<|pad|>", "<|end|>"
MAX_POSITIONS = 512


def train_demo_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that any text can be encoded, trained on the demo's own texts. It has no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [question.prompt for question in questions()]
    texts += [row[side] for row in demo_rows("train", 4_000, seed) for side in ("chosen", "rejected")]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def create_demo_model(
    folder: str | os.PathLike,
    seed: int = 1234,
    hidden_size: int = 192,
    num_layers: int = 3,
    vocab_size: int = 1024,
) -> str:
    """Create model and tokenizer in `folder`, in Hugging Face format; the same arguments give the same bytes.

    A model that is there already is replaced, once the new one is complete. Returns the folder's path.

    Raises:
        FileExistsError: `folder` holds something that is not a model.
    """
    folder = os.path.abspath(folder)
    if os.path.exists(folder) and not _is_replaceable(folder):
        raise FileExistsError(f"{folder} exists and is not a model folder; remove it or choose another")
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(folder), prefix=".demo_model_") as workspace:
        fresh = os.path.join(workspace, "fresh")
        tokenizer = train_demo_tokenizer(vocab_size, seed)
        tokenizer.save_pretrained(fresh)
        _random_llama(tokenizer, seed, hidden_size, num_layers).save_pretrained(fresh)
        if os.path.exists(folder):
            os.rename(folder, os.path.join(workspace, "replaced"))
        os.rename(fresh, folder)
    return folder


def _is_replaceable(folder: str) -> bool:
    return os.path.isdir(folder) and (not os.listdir(folder) or os.path.exists(os.path.join(folder, "config.json")))


def _random_llama(tokenizer: PreTrainedTokenizerFast, seed: int, hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=hidden_size,
        # 8/3 of the hidden size, as Llama has it, as a multiple of 32.
        intermediate_size=-(-hidden_size * 8 // 3 // 32) * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 64),
        max_position_embeddings=MAX_POSITIONS,
        # At the usual 0.02, right for wide models, one this narrow needs about twice as many steps.
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to create the model in")
    parser.add_argument(
        "--seed", type=int, default=1234, help="seed of the random weights and of the tokenizer's texts"
    )
    arguments = parser.parse_args()
    folder = create_demo_model(arguments.output, arguments.seed)
    print(f"created the demo model in {folder}")


if __name__ == "__main__":
    main()
