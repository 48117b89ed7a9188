"""Stand-ins for published chat templates: written for these tests, they write what the published ones write."""

from pathlib import Path

FOLDER = Path(__file__).with_name("chat_templates")

_IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_PHI = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}

# The special tokens of the models' tokenizers.
SPECIAL_TOKENS: dict[str, dict[str, str]] = {
    "smollm2": _IM | {"bos_token": "<|im_start|>"},
    "qwen2.5": _IM,
    "qwen3": _IM,
    "qwen3_instruct_2507": _IM,
    "qwen3_thinking_2507": _IM,
    "phi3_mini": _PHI,
    "phi3_small": _PHI | {"bos_token": "<|endoftext|>"},
    "phi3.5": _PHI,
    "mistral_v0.2": _LLAMA,
    "mistral_v0.2_system": _LLAMA,
    "mistral_v0.3": _LLAMA,
    "mistral_nemo": _LLAMA | {"pad_token": "<pad>"},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "llama2": _LLAMA,
    "llama3": _LLAMA3,
    "llama3.1": _LLAMA3,
    "zephyr": _LLAMA,
}
SAMPLES = tuple(SPECIAL_TOKENS)


def sample(name: str) -> str:
    """The Jinja source of a stand-in."""
    source = (FOLDER / f"{name}.jinja").read_text()
    # The macros that write tools, calls and their results as Qwen's templates do.
    return (FOLDER / "hermes_tools.part").read_text() + source if name.startswith("qwen") else source
