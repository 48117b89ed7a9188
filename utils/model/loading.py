"""Loading: weights are found, opened and compared with the model before any of them is read into memory.

Read are safetensors and pytorch_model.bin (tensors only: nothing in a file is ever executed), whole or in shards, from
a folder or a hub name, under the names of transformers or of the published reward checkpoints.
"""

import json
import pickle
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import deepspeed
import huggingface_hub
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from utils.process.errors import UserError
from utils.process.hub import trouble_with_hub
from utils.process.world import get_rank

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HEAD_NAMES = ("score.weight", "v_head.weight")
PUBLISHED_PREFIX = r"^(rwtransformer|rwtranrsformer)\."  # the second is how the published code spells it
# Masks and tables that old checkpoints hold although the model makes them itself.
STALE_BUFFERS = re.compile(r"(\.masked_bias|\.inv_freq|\battn\.bias|\battention\.bias)$")
HUB_MODEL = re.compile(r"\w[\w.-]{0,95}(/[\w.-]{1,96})?")  # owner/name; the oldest models have no owner
LISTED_WEIGHTS = 8  # of those that an error names


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a model and what they hold."""

    name: str
    files: tuple[Path, ...]

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """{name: meta tensor} of all files, from their headers."""
        return {name: tensor for file in self.files for name, tensor in _read(file, "meta").items()}

    def read(self, name: str) -> torch.Tensor:
        """One weight, in host memory."""
        return _read_one(next(file for file in self.files if name in _read(file, "meta")), name)

    def read_all(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight, file by file, one at a time in host memory."""
        for file in self.files:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as weights:
                    for name in weights.keys():  # noqa: SIM118 - safe_open is no dict
                        yield name, weights.get_tensor(name)
            else:
                yield from _read(file, "cpu").items()

    @property
    def is_published_reward(self) -> bool:
        return any(re.match(PUBLISHED_PREFIX, name) for name in self.tensors)

    def renaming(self, skeleton) -> dict[str, str] | None:
        """transformers' ``key_mapping`` from the published names to those of the skeleton's class."""
        if not self.is_published_reward:
            return None
        is_decoder = not hasattr(skeleton, "score") and skeleton.base_model is skeleton
        return {
            PUBLISHED_PREFIX: "" if is_decoder else f"{skeleton.base_model_prefix}.",
            r"^v_head\.": "v_head." if is_decoder else "score.",
        }

    def value_head(self) -> torch.Tensor | None:
        """The trained head [1, hidden] of a reward model; None if there is none."""
        found = [(file, name) for file in self.files for name in HEAD_NAMES if name in _read(file, "meta")]
        return _read_one(*found[0]) if found else None


def check_there(model_name_or_path) -> None:
    """Refuse, within seconds, what is neither a folder nor a model of the hub or of an earlier download.

    Where the hub does not answer and there is an earlier download, that is taken, and the libraries stop asking.

    Raises:
        UserError: with where it was looked for, and why the hub did not help.
    """
    name = str(model_name_or_path)
    if Path(name).is_dir():
        _refuse_checkpoints(name)
        return
    absent = f"no model could be loaded from {name!r}: there is no such folder (looked for {Path(name).absolute()})"
    if Path(name).exists() or not HUB_MODEL.fullmatch(name):
        raise UserError(f"{absent}; give the folder that holds its config.json, or its name on the hub, as owner/name")
    trouble = trouble_with_hub(name, "model")
    if isinstance(trouble, RepositoryNotFoundError):
        raise UserError(
            f"{absent}, and the hub has none of this name, or it is private: log in with `hf auth login`"
        ) from trouble
    if trouble is None:
        return
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        reason = str(trouble).strip().partition("\n")[0]
        raise UserError(
            f"{absent}, no earlier download of it, and the hub does not answer: {reason}. Where there is a network: "
            f"hf download {name} --local-dir models/{name}; then give models/{name}"
        ) from trouble
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        _note_once(f"note: {name}: read from an earlier download, since the hub does not answer")


def load_config(model_name_or_path, trust_remote_code: bool = False):
    """The configuration of a folder or hub name; UserError if there is none, it is broken or it asks for code."""
    name = str(model_name_or_path)
    check_there(name)
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
        text_config = config.get_text_config()
    except Exception as error:  # strangers' files: the library raises whatever its parsers and families raise
        raise UserError(f"no model could be loaded from {name!r}: {_message(error)}") from error
    kernels = [kernel for kernel in _attention_kernels(config) if "/" in str(kernel)]
    if kernels and not trust_remote_code:
        raise UserError(
            f"config.json of {name!r} asks for the attention kernel {kernels[0]}, compiled code from the hub: that "
            "needs --trust_remote_code, or take _attn_implementation out of the file"
        )
    layers, classes = getattr(text_config, "num_hidden_layers", 1), config.architectures or []
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"config.json of {name!r}: num_hidden_layers {layers!r} is not a number above 0")
    if not isinstance(classes, list) or not all(isinstance(kind, str) for kind in classes):
        raise UserError(f"config.json of {name!r}: architectures {classes!r} is no list of names")
    _refuse_encoders(config, name)
    return config


def _refuse_checkpoints(name: str) -> None:
    """UserError for a checkpoint of a run, or a folder of them, with the command that makes a model of it."""
    folder = Path(name)
    whole = (folder / "state.json").is_file() or any(folder.glob("step-*/state.json"))
    if whole and not (folder / "config.json").is_file():
        raise UserError(
            f"{name!r} is a checkpoint of a run, and no model; this writes its model to a folder: "
            f"python inference/export_checkpoint.py {name} exported"
        )


def _refuse_encoders(config, name: str) -> None:
    """UserError for what writes no text from left to right: answers and their scores would mean nothing."""
    if config.is_encoder_decoder:
        kind = "an encoder-decoder model, which reads the prompt apart from the answer"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        kind = "an encoder, in which every token sees those after it"
    else:
        return
    raise UserError(
        f"{name!r} ({config.model_type}) is {kind}; a decoder is needed here, a causal language model as Llama, Qwen "
        "or OPT"
    )


def _attention_kernels(config) -> list:
    parts = [config, *(getattr(config, part, None) for part in config.sub_configs)]
    chosen = [getattr(part, "_attn_implementation", None) for part in parts]
    return [kernel for value in chosen for kernel in (value.values() if isinstance(value, dict) else [value])]


def _message(error: Exception) -> str:
    """The text of an exception, with its kind where the text alone says little."""
    return str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"


def check_generation_config(model_name_or_path) -> None:
    """UserError if a model's generation settings, where it has any, cannot be read: they name what ends answers."""
    file = _fetch(str(model_name_or_path), "generation_config.json")
    if file is None:
        return
    try:
        settings = json.loads(file.read_text())
        ids = settings.get("eos_token_id")
        readable = all(isinstance(i, int | None) for i in (ids if isinstance(ids, list) else [ids]))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is no table of generation settings: {_message(error)}") from error
    if not readable:
        raise UserError(f"{file}: eos_token_id {ids!r} is neither a token id nor a list of them")


def find_checkpoint(model_name_or_path) -> Checkpoint:
    """The weight files that from_pretrained would take; shards are listed by their index.

    Raises:
        UserError: no weights, an index that is broken or names an absent file, a file outside the model's folder.
    """
    name = str(model_name_or_path)
    for wanted in WEIGHT_FILES:
        file = _fetch(name, wanted)
        if file is not None:
            shards = _shards_of(name, file) if wanted.endswith(".json") else [file]
            return Checkpoint(name, tuple(_inside(file.parent, shard) for shard in shards))
    raise UserError(f"{name!r} holds no weights: there is none of {', '.join(WEIGHT_FILES)}")


def _fetch(model_name_or_path: str, file: str) -> Path | None:
    """The file in the folder, or in the cache of the hub (downloaded if need be); None if there is none."""
    check_there(model_name_or_path)
    try:
        found = cached_file(model_name_or_path, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{model_name_or_path!r}: {error}") from error
    return None if found is None else Path(found)


def _shards_of(name: str, index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of weights ({type(error).__name__}: {error})") from error
    files = []
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise UserError(f"{index} names {shard!r}: only files beside the index are read")
        file = _fetch(name, shard)
        if file is None:
            raise UserError(f"{index} names {shard}, which is not there")
        files.append(file)
    return files


def _inside(folder: Path, file: Path) -> Path:
    """The file, if it lies in its model's folder; a hub's cache keeps contents beside its snapshots."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not file.resolve().is_relative_to(root):
        raise UserError(f"{file} is a link out of its folder, to {file.resolve()}; put the file itself there")
    return file


def _read(file: Path, device: str) -> dict[str, torch.Tensor]:
    try:
        tensors = load_state_dict(file, map_location=device)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds more than tensors and is not opened: its pickle could run code. "
            "Convert it to safetensors where you trust it"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file} cannot be read; it may be truncated: {str(error).splitlines()[0]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{file} is not a plain table of weights, as a model's state dict is")
    return tensors


def _read_one(file: Path, name: str) -> torch.Tensor:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as weights:
            return weights.get_tensor(name)
    return _read(file, "cpu")[name].clone()


@cache
def _note_once(message: str) -> None:
    """One model is loaded several times, as actor and reference, say."""
    if get_rank() == 0:
        print(message, file=sys.stderr)


def _listed(keys) -> str:
    keys = sorted(map(str, keys))
    more = f" and {len(keys) - LISTED_WEIGHTS} more" if len(keys) > LISTED_WEIGHTS else ""
    return ", ".join(keys[:LISTED_WEIGHTS]) + more


def _describe_problems(problems: dict) -> list[str]:
    """One text for each kind of problem that some weights have."""
    return [f"{kind}: {_listed(keys)}" for kind, keys in problems.items() if keys]


def _block_lists(names, prefix: str) -> set[str]:
    """Where a model keeps its numbered blocks: "layers.", "decoder.layers.", without the base model's prefix."""
    found = (re.match(r"(.*?)\d+\.", name.removeprefix(f"{prefix}.")) for name in names)
    return {match[1] for match in found if match}


def _match_names(checkpoint: Checkpoint, model_class, config, trust_remote_code: bool):
    """Let transformers match the weights of the files with those of a model, on the meta device.

    Returns:
        (the model without weights, ``key_mapping`` for the files, transformers' loading info)
    """
    try:
        with torch.device("meta"):
            skeleton = model_class.from_config(config, trust_remote_code=trust_remote_code)
        renaming = checkpoint.renaming(skeleton)
        _, info = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=dict(checkpoint.tensors),
            device_map="meta",
            key_mapping=renaming,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # a family's own code meets numbers of a stranger's file: anything may come of it
        raise UserError(f"no model could be loaded from {checkpoint.name!r}: {_message(error)}") from error
    return skeleton, renaming, info


def check_checkpoint(checkpoint: Checkpoint, model_class, config, trust_remote_code: bool = False) -> dict:
    """Compare names and shapes in the files with the model's, by transformers' own rules, before anything is read.

    What the model has no place for is an error inside its blocks (a layer or a bias too many: the configuration is of
    another model), and counted and printed elsewhere (the head of a language model around a decoder, say).

    Returns:
        options that ``from_pretrained`` needs for these files.

    Raises:
        UserError: naming the missing, misshapen or surplus weights.
    """
    name = checkpoint.name
    layers, weights = getattr(config.get_text_config(), "num_hidden_layers", 0), len(checkpoint.tensors)
    if layers > weights:  # before the model is laid out: a billion layers would take for ever
        raise UserError(f"config.json of {name!r} has {layers} layers, and its files hold only {weights} weights")
    skeleton, renaming, info = _match_names(checkpoint, model_class, config, trust_remote_code)
    unexpected = {key for key in info["unexpected_keys"] if not STALE_BUFFERS.search(key)}
    lora_factors = {key for key in unexpected if "lora_" in key}
    if lora_factors:
        raise UserError(
            f"{name!r} holds LoRA factors beside its weights: {_listed(lora_factors)}; fold them in first, with "
            "inference/merge_lora.py"
        )
    if model_class is AutoModel:  # a decoder alone: the heads of a language or reward model are left out on purpose
        unexpected = {
            key for key in unexpected if key not in HEAD_NAMES and "head" not in key and "embed_out" not in key
        }
    elif unexpected & set(HEAD_NAMES):
        raise UserError(f"{name!r} is a reward model; a language model is needed here, as step 1 saves it")
    prefix = skeleton.base_model_prefix
    blocks = _block_lists(skeleton.state_dict(), prefix)
    surplus = {key for key in unexpected if _block_lists([key], prefix) & blocks}
    shapes = [f"{key} {tuple(found)} in place of {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]]
    problems = _describe_problems(
        {"missing": info["missing_keys"], "of another shape": shapes, "without a place": surplus}
    )
    if problems:
        if info["missing_keys"] and unexpected - surplus:
            problems.append(f"there instead: {_listed(unexpected - surplus)}")
        raise UserError(f"the weights in {name!r} do not fit a {type(skeleton).__name__}; " + "; ".join(problems))
    if unexpected:
        _note_once(
            f"note: {name}: {len(unexpected)} weights have no place in the model and are left: {_listed(unexpected)}"
        )
    return {} if renaming is None else {"key_mapping": renaming}


def load_state_dict_into_model(model_to_load=None, state_dict=None, start_prefix="", zero_stage=0) -> list[str]:
    """Copy a state dict into a model, also one that ZeRO-3 has partitioned.

    Returns:
        what went wrong, as published callers look at it: nothing, since all that can go wrong is raised.

    Raises:
        UserError: naming the keys that are missing, unexpected, or of another shape. Nothing is loaded then.
    """
    state_dict = {name.removeprefix(start_prefix): value for name, value in state_dict.items()}
    targets = dict(model_to_load.named_parameters(remove_duplicate=False)) | dict(model_to_load.named_buffers())
    wanted = set(model_to_load.state_dict().keys())
    tied = set(getattr(model_to_load, "all_tied_weights_keys", None) or {})
    common = wanted & set(state_dict)
    shape_of = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in targets.items()}
    problems = {
        "missing": wanted - set(state_dict) - tied,
        "unexpected": set(state_dict) - wanted,
        "of another shape": {name for name in common if shape_of[name] != tuple(state_dict[name].shape)},
    }
    if any(problems.values()):
        raise UserError("the checkpoint does not fit the model; " + "; ".join(_describe_problems(problems)))

    with torch.no_grad():
        for name in sorted(common):  # on all ranks in one order, since they gather together
            target = targets[name]
            if hasattr(target, "ds_id"):
                with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
                    if get_rank() == 0:
                        target.copy_(state_dict[name])
            else:
                target.copy_(state_dict[name])
    return []
