"""Soft prompts: a few trained vectors that a frozen model reads before every row.

Prompt tuning (Lester et al., 2021, https://arxiv.org/abs/2104.08691) trains the vectors themselves; p-tuning (Liu et
al., 2021, https://arxiv.org/abs/2103.10385) trains a small network that makes them. Modules and files are those of the
package ``peft``; the forward pass is ours, because that of ``peft`` drops the position ids: a row padded on the left
would stand further from its prompt than the same row alone.

    position   0 … n-1    n  n+1 …
    row        virtual    real tokens (pads on either side are masked)
"""

from pathlib import Path

import deepspeed
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from utils.model.adapters import ADAPTER_WEIGHTS, adapter_config, base_model_reference
from utils.model.inputs import embedding_width, forward_accepts, position_ids_from_mask
from utils.model.saving import save_on_rank_0, write_readme
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError

PEFT_TYPES = ("PROMPT_TUNING", "P_TUNING")
# What a whole model saved earlier in the same folder would leave, and a loader would take first.
WHOLE_MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json")


class SoftPromptModel(nn.Module):
    """A causal language model behind ``num_virtual_tokens`` vectors; its logits are those of the real tokens alone.

    Args:
        base_model: a Hugging Face causal language model; it is frozen here.
        prompt_encoder: a module that makes vectors [n, embedding width] of the ids 0 … n-1.
        num_virtual_tokens: n.
        prompt_config: the configuration of ``peft`` that is saved with the vectors; None for a loaded prompt.
    """

    def __init__(self, base_model, prompt_encoder: nn.Module, num_virtual_tokens: int, prompt_config=None):
        super().__init__()
        self.base_model = base_model.requires_grad_(False)
        self.prompt_encoder = prompt_encoder
        self.num_virtual_tokens = num_virtual_tokens
        self.prompt_config = prompt_config

    @property
    def config(self):
        return self.base_model.config

    @property
    def dtype(self):
        return self.base_model.dtype

    @property
    def device(self):
        return self.base_model.device

    def get_input_embeddings(self):
        return self.base_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.base_model.get_output_embeddings()

    def gradient_checkpointing_enable(self, **options):
        self.base_model.gradient_checkpointing_enable(**options)

    def virtual_tokens(self) -> torch.Tensor:
        """The vectors, [n, embedding width]."""
        device = next(self.prompt_encoder.parameters()).device
        return self.prompt_encoder(torch.arange(self.num_virtual_tokens, device=device))

    def _with_prompt(self, input_ids, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [batch, n + length, width] and their mask [batch, n + length]."""
        embeddings = self.get_input_embeddings()(input_ids)
        prompt = self.virtual_tokens().to(embeddings.dtype).expand(len(input_ids), -1, -1)
        mask = nn.functional.pad(attention_mask, (self.num_virtual_tokens, 0), value=1)
        return torch.cat([prompt, embeddings], dim=1), mask

    def forward(self, input_ids, attention_mask, position_ids=None, use_cache=False, **kwargs):
        """As the base model's forward on whole rows; ``position_ids`` are always taken from the mask.

        Args:
            input_ids, attention_mask: [batch, length], with pads on either side.

        Returns:
            the base model's output with logits [batch, length, vocabulary].
        """
        embeddings, mask = self._with_prompt(input_ids, attention_mask)
        if forward_accepts(self.base_model, "position_ids"):
            kwargs["position_ids"] = position_ids_from_mask(mask)
        output = self.base_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=use_cache, **kwargs)
        output.logits = output.logits[:, self.num_virtual_tokens :]
        return output

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, **settings) -> torch.Tensor:
        """As the base model's generate: the given ids and what follows them, without the virtual tokens."""
        embeddings, mask = self._with_prompt(input_ids, attention_mask)
        return self.base_model.generate(input_ids=input_ids, inputs_embeds=embeddings, attention_mask=mask, **settings)


def _initial_rows(base_model, tokenizer, args) -> torch.Tensor:
    """Embedding rows [n, width] to start from: of the given text, over and over, or of random tokens."""
    count = args.num_virtual_tokens
    if args.soft_prompt_init_text is None:
        ids = torch.randint(len(tokenizer), (count,))
    else:
        of_text = tokenizer(args.soft_prompt_init_text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor((of_text * -(-count // len(of_text)))[:count])
    weight = base_model.get_input_embeddings().weight
    with torch.no_grad(), deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
        return weight[ids.to(weight.device)].float().clone()


def check_soft_prompt_inputs(args, tokenizer) -> None:
    """UserError for what a frozen model or its room cannot do; before any data is prepared."""
    if args.add_eot_token:
        known = load_hf_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code).get_vocab()
        if args.eot_token not in known:
            raise UserError(
                f"--add_eot_token with --soft_prompt: {args.eot_token!r} is new to {args.model_name_or_path}, whose "
                "embedding stays frozen, so it could never learn to end an answer with it; leave the flag out"
            )
    if (
        args.soft_prompt_init_text is not None
        and not tokenizer(args.soft_prompt_init_text, add_special_tokens=False)["input_ids"]
    ):
        raise UserError("--soft_prompt_init_text holds no token; leave it out to start from random tokens")


def make_soft_prompt_model(base_model, tokenizer, args, start: bool = True) -> SoftPromptModel:
    """Put a fresh soft prompt of the kind ``args.soft_prompt`` before a language model.

    Args:
        start: read the vectors of prompt tuning out of the embedding; off: leave them to be loaded.
    """
    from peft import PromptEmbedding, PromptEncoder, PromptEncoderConfig, PromptTuningConfig

    shared = dict(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_reference(args.model_name_or_path),
        num_virtual_tokens=args.num_virtual_tokens,
        token_dim=embedding_width(base_model),
        num_transformer_submodules=1,
    )
    if args.soft_prompt == "p_tuning":
        config = PromptEncoderConfig(**shared, encoder_hidden_size=args.soft_prompt_hidden_size or shared["token_dim"])
        encoder = PromptEncoder(config)
    else:
        text = args.soft_prompt_init_text
        source = {"prompt_tuning_init": "RANDOM"}
        if text is not None:
            source = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
            source["tokenizer_name_or_path"] = shared["base_model_name_or_path"]
        # In inference mode peft leaves the vectors alone: its own start would read rows that ZeRO-3 has sharded.
        config = PromptTuningConfig(**shared, **source, inference_mode=True)
        encoder = PromptEmbedding(config, None)
        if start:
            encoder.embedding.weight.data.copy_(_initial_rows(base_model, tokenizer, args))
    # A loader must not make the encoder's network anew: the files hold what it made.
    config.inference_mode = True
    return SoftPromptModel(base_model, encoder.to(base_model.dtype), args.num_virtual_tokens, config)


def save_soft_prompt(model: SoftPromptModel, tokenizer, folder: Path, readme: str | None = None) -> None:
    """Write the vectors and their configuration in ``peft``'s format, and the tokenizer; every rank must call this.

    The base model is not copied: the configuration names its folder.
    """
    with torch.no_grad():
        vectors = model.virtual_tokens().float().cpu().contiguous()

    def write(scratch: Path) -> None:
        save_file({"prompt_embeddings": vectors}, scratch / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        model.prompt_config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        write_readme(scratch, readme)

    save_on_rank_0(folder, "soft prompt", write, replaces=WHOLE_MODEL_FILES)


def soft_prompt_config(path) -> dict | None:
    """The configuration of a folder that holds a soft prompt, ours or of ``peft``; None for whole models and names.

    Raises:
        UserError: for adapters of another kind, which cannot be used as they are.
    """
    config = adapter_config(path)
    if config is None or config["peft_type"] in PEFT_TYPES:
        return config
    if config["peft_type"] == "LORA":
        raise UserError(f"{path} holds a LoRA adapter only: fold it into its base with inference/merge_lora.py first")
    raise UserError(
        f"{path} holds an adapter of the kind {config['peft_type']}; known are LORA, {', '.join(PEFT_TYPES)}"
    )


def check_whole_model(path, flag: str) -> None:
    """UserError for a path that training cannot start from because it holds an adapter without its model."""
    if soft_prompt_config(path) is not None:
        raise UserError(
            f"{flag} {path} holds a soft prompt, which cannot be folded into a model's weights: "
            "chat and evaluation take it, training starts from a whole model"
        )


def base_of_soft_prompt(path, config: dict, base_model: str | None) -> str:
    """Where the base model of a soft prompt is: ``base_model`` if the user says so, else what its folder names."""
    base = base_model or config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{path} holds a soft prompt that does not name its base model; give --base_model FOLDER")
    if base_model is None and Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{path} holds a soft prompt for {base}, which is not there; give --base_model FOLDER")
    return base


def load_soft_prompt(base_model, path) -> SoftPromptModel:
    """A loaded language model behind the soft prompt of a folder, ready to generate."""
    file = Path(path) / ADAPTER_WEIGHTS
    try:
        vectors = load_file(file)["prompt_embeddings"]
    except (OSError, SafetensorError) as error:
        raise UserError(f"the soft prompt in {file} cannot be read: {error}") from error
    except KeyError:
        raise UserError(f"{file} holds no soft prompt: there is no prompt_embeddings in it") from None
    width = embedding_width(base_model)
    if not vectors.is_floating_point() or not len(vectors) or not vectors.isfinite().all():
        raise UserError(
            f"{file} holds no soft prompt: its prompt_embeddings are empty, non-finite or not floating-point"
        )
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise UserError(f"{file} holds vectors of {tuple(vectors.shape)}; the base model's embedding is {width} wide")
    encoder = nn.Embedding.from_pretrained(vectors).to(base_model.device)
    return SoftPromptModel(base_model, encoder, len(vectors)).eval()
