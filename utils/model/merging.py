"""Merging: a LoRA adapter folded into its base model, without that model ever being built.

Weights go from the base's files to the new ones one at a time, so that the memory needed is the adapter and the largest
weight. Adapters are those that training saves with --save_lora_adapters, and PEFT's own.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.pytorch_utils import Conv1D

from utils.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHANGED_CONFIG, KEY_PREFIX
from utils.model.loading import Checkpoint, find_checkpoint, load_config
from utils.model.reward_model import SCORE_SCALE
from utils.model.saving import atomic_folder, write_readme
from utils.model.shards import open_shards
from utils.model.tokenizer import keep_end_tokens
from utils.module.lora import fold
from utils.process.errors import UserError

# What a setting in adapter_config.json may say without changing how the factors are folded, beside those read below.
# Any other setting that is on is refused: also one that a later PEFT invents.
UNDERSTOOD = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision"),
    *("auto_mapping", "inference_mode", "peft_version"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("init_lora_weights", "ensure_weight_tying", "eva_config", "loftq_config", "runtime_config"),
    *("megatron_core", "qalora_group_size"),  # never empty, and without effect by themselves
}
# The others (PiSSA, OLoRA, LoftQ, ...) change the base weights before training.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(\.weight)?")


@dataclass
class Adapter:
    """An adapter as its folder holds it.

    Attributes:
        factors: module -> {"A": [r, in], "B": [out, r]}; of an embedding A is [r, rows] and B [width, r].
        whole: weight -> a tensor that takes its place.
        changed_config: what training set in the model's configuration.
    """

    folder: Path
    config: dict
    factors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    changed_config: dict = field(default_factory=dict)

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) by rsLoRA (https://arxiv.org/abs/2312.03732); alpha may differ by module."""
        patterns = self.config.get("alpha_pattern") or {}
        matching = (value for part, value in patterns.items() if re.fullmatch(rf"(.*\.)?({part})", module))
        alpha, rank = next(matching, self.config["lora_alpha"]), self.factors[module]["A"].shape[0]
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_pattern(pattern: str, file: Path) -> None:
    """Refuse what is no regular expression, and one whose search among names of layers could take for ever."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{file}: alpha_pattern {pattern!r} is no regular expression: {error}") from error
    if re.search(r"[)\]][*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
        raise UserError(
            f"{file}: alpha_pattern {pattern!r} has repeats within repeats, or many; it is not searched for"
        )


def _check_adapter_config(config: dict, file: Path) -> None:
    """UserError, with the setting's name, for what is not a plain LoRA."""
    if not isinstance(config, dict):
        raise UserError(f"{file} is no table of settings")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: only LoRA can be folded, not {config.get('peft_type')}")
    if config.get("use_dora"):
        raise UserError(f"{file}: DoRA (use_dora) rescales the base weights and is not folded here")
    if config.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        raise UserError(
            f"{file}: init_lora_weights {config['init_lora_weights']!r} changed the base weights before training; "
            "save the adapter again with peft's path_initial_model_for_weight_conversion"
        )
    unknown = sorted(name for name, value in config.items() if value and name not in UNDERSTOOD)
    if unknown:
        raise UserError(f"{file} sets {', '.join(unknown)}, which cannot be folded here")
    if not _is_number(config.get("lora_alpha")):
        raise UserError(f"{file} has no lora_alpha")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise UserError(f"{file}: base_model_name_or_path {config['base_model_name_or_path']!r} is no path")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
        raise UserError(f"{file}: alpha_pattern is no table of patterns and numbers")
    for pattern in patterns:
        _check_pattern(pattern, file)


def _read_changed_config(text: str, file: Path) -> dict:
    """What training set in the model's configuration: a few numbers, and nothing else is taken from an adapter."""
    try:
        changed = json.loads(text)
        known = all(key in SCORE_SCALE or key.endswith("_token_id") for key in changed)
        if known and all(_is_number(value) for value in changed.values()):
            return changed
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{file}: {CHANGED_CONFIG} in its metadata is no table of token ids and scales of scores")


def _weights_file(folder: Path) -> Path:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        file = file.with_suffix(".bin")  # PEFT before safetensors
    if not file.is_file():
        raise UserError(f"--adapter {folder} has neither {ADAPTER_WEIGHTS} nor {file.name}")
    return file


def read_adapter(folder: Path) -> Adapter:
    """An adapter in PEFT's format; UserError for what is missing, broken or no plain LoRA."""
    file = folder / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--adapter {folder} holds no LoRA adapter: {file}: {error}") from error
    _check_adapter_config(config, file)
    adapter = Adapter(folder, config)
    weights = _weights_file(folder)
    stored = Checkpoint(str(folder), (weights,))
    if stored.tensors and weights.suffix == ".safetensors":
        with safe_open(weights, framework="pt") as opened:
            text = (opened.metadata() or {}).get(CHANGED_CONFIG, "{}")
        adapter.changed_config = _read_changed_config(text, weights)
    for key, tensor in stored.read_all():
        name, factor = key.removeprefix(KEY_PREFIX), FACTOR.fullmatch(key.removeprefix(KEY_PREFIX))
        if factor and not (tensor.ndim == 2 and tensor.numel() and tensor.is_floating_point()):
            raise UserError(f"{weights}: {key}, {tensor.dtype} {tuple(tensor.shape)}, is no factor of an update")
        if factor:
            adapter.factors.setdefault(factor["module"], {})[factor["which"]] = tensor
        elif "lora_" in name or not key.startswith(KEY_PREFIX):
            raise UserError(f"{weights}: {key} is not a weight of a plain LoRA")
        else:
            adapter.whole[name.replace(".base_layer.", ".")] = tensor
    if config.get("ensure_weight_tying") and any("lora_embedding_" in key for key in stored.tensors):
        # PEFT's own merge of such an adapter does not give the logits of its unmerged model (0.21).
        raise UserError(f"{file}: ensure_weight_tying with LoRA on the embedding cannot be folded")
    halves = sorted(module for module, pair in adapter.factors.items() if len(pair) < 2)
    if halves or not adapter.factors:
        raise UserError(
            f"{weights} lacks a lora_A or lora_B weight" + (f" of {', '.join(halves[:8])}" if halves else "")
        )
    return adapter


class Merge:
    """A base model with an adapter folded in, made weight by weight.

    Attributes:
        skeleton: the merged model without weights, on the meta device: names, shapes and kinds of layers.
        stored: name in the new files -> a meta tensor.
    """

    def __init__(self, base_model: str, adapter: Adapter):
        self.adapter, self.checkpoint, self.config = adapter, find_checkpoint(base_model), load_config(base_model)
        if getattr(self.config, "quantization_config", None):
            raise UserError(f"{base_model} is quantised; fold the adapter into the full-precision model it came from")
        self.skeleton = self._make_skeleton()
        self._prefix = f"{self.skeleton.base_model_prefix}."
        self._weights = dict(self.skeleton.named_parameters(remove_duplicate=False))
        self._tied = dict(self.skeleton.all_tied_weights_keys)  # weight -> the one it shares
        # Weights of the skeleton by their name in the base's files, and back.
        self._base_name = {name: self._name_among(name, self.checkpoint.tensors) for name in self._weights}
        self._skeleton_name = {base: name for name, base in self._base_name.items() if base}
        self._factors, self._whole = self._match_with_skeleton()
        dtypes = (tensor.dtype for tensor in self.checkpoint.tensors.values())
        self._float_dtype = next(dtype for dtype in dtypes if dtype.is_floating_point)
        self._untie()
        self.stored = self._plan()

    def _make_skeleton(self):
        """Set class, labels and rows of the embedding in the configuration, and build the model without weights."""
        config, whole = self.config, self.adapter.whole
        is_classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification")
        self._drops_head = self.adapter.config.get("task_type") == "SEQ_CLS" and not is_classifier
        if self._drops_head:
            heads = [tensor for name, tensor in whole.items() if name.rpartition(".")[0] in ("score", "classifier")]
            if not heads:
                raise UserError("the adapter is of a reward model, and neither it nor the base holds a score.weight")
            config.num_labels = heads[0].shape[0]
        auto = AutoModelForSequenceClassification if is_classifier or self._drops_head else AutoModelForCausalLM
        with torch.device("meta"):
            skeleton = auto.from_config(config)
            embedding = skeleton.get_input_embeddings()
            name = next(name for name, part in skeleton.named_modules() if part is embedding)
            grown = [tensor for part, tensor in whole.items() if f".{name}.weight".endswith(f".{part}")]
            if grown:
                config.get_text_config().vocab_size = grown[0].shape[0]
            for key, value in self.adapter.changed_config.items():
                setattr(config, key, value)
            skeleton = auto.from_config(config)
        config.architectures = [type(skeleton).__name__]
        return skeleton

    def _name_among(self, name: str, among) -> str | None:
        """A name as ``among`` has it: with or without the decoder's prefix, since a file may be of a bare decoder."""
        forms = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((form for form in forms if form in among), None)

    def _match_with_skeleton(self):
        """The adapter's modules and weights by the skeleton's names; UserError for those that match nothing.

        Returns:
            ({weight: (right [in, r], left [r, out], scaling, transposed)}, {weight: tensor that takes its place})
        """
        modules, factors, whole, unmatched = dict(self.skeleton.named_modules()), {}, {}, []
        for name, tensor in self.adapter.whole.items():
            found = self._name_among(name, self._weights)
            unmatched += [name] if found is None else []
            whole[found] = tensor
        for module, pair in self.adapter.factors.items():
            found = self._name_among(module, modules)
            weight = f"{found}.weight"
            if found is None or self._base_value_name(weight) is None:
                unmatched.append(module)
                continue
            transposed = isinstance(modules[found], Conv1D | nn.Embedding)  # [in, out], or [rows, width]
            if not (transposed or isinstance(modules[found], nn.Linear)):
                raise UserError(f"{found} is a {type(modules[found]).__name__}: no update of it can be folded")
            right, left = pair["A"].T.contiguous(), pair["B"].T.contiguous()
            shape = (right.shape[0], left.shape[1]) if transposed else (left.shape[1], right.shape[0])
            if right.shape[1] != left.shape[0] or shape != tuple(self._weights[weight].shape):
                raise UserError(
                    f"the factors of {module}, lora_A {tuple(pair['A'].shape)} and lora_B {tuple(pair['B'].shape)}, do "
                    f"not fit its weight {tuple(self._weights[weight].shape)}"
                )
            factors[weight] = right, left, self.adapter.scaling(module), transposed
        if unmatched:
            raise UserError(
                f"the adapter changes {len(unmatched)} parts that {self.checkpoint.name} "
                f"({type(self.skeleton).__name__}) has not: {', '.join(sorted(unmatched)[:8])}"
            )
        return factors, whole

    def _base_value_name(self, name: str) -> str | None:
        """Where the base's files hold a weight of the skeleton, under its own name or that of the one it shares."""
        return self._base_name.get(name) or self._base_name.get(self._tied.get(name))

    def _untie(self) -> None:
        """A tied pair of which the adapter changes one alone, or both unlike, becomes two weights, as in PEFT."""
        self._untied = set()
        for name, source in self._tied.items():
            if not {name, source} & (self._factors.keys() | self._whole.keys()):
                continue
            base = self.checkpoint.read(self._base_value_name(source))
            if not torch.equal(self.merged(name, base), self.merged(source, base)):
                self._untied.add(name)
                self.config.tie_word_embeddings = False

    def merged(self, name: str | None, base: torch.Tensor | None) -> torch.Tensor:
        """A weight of the merged model from that of the base, in the base's dtype."""
        if name not in self._factors and name not in self._whole:
            return base
        dtype = self._float_dtype if base is None else base.dtype
        value = self._whole.get(name, base).to(dtype)
        if name in self._factors:
            if not dtype.is_floating_point:
                raise UserError(f"{name} of the base is {dtype}: fold the adapter into the full-precision model")
            value = fold(value, *self._factors[name])
        if not value.isfinite().all():
            raise UserError(f"{name} is not finite once the adapter is in it")
        return value

    def _plan(self) -> dict[str, torch.Tensor]:
        """Names, shapes and dtypes of the new files; UserError for shapes that do not fit the model."""
        base = self.checkpoint.tensors
        has_prefix = any(name.startswith(self._prefix) for name in base)
        kept = [n for n in base if not (self._drops_head and has_prefix and not n.startswith(self._prefix))]
        # Weights that the base's files do not have: a new head, or one that is tied no more.
        self._added = [
            name
            for name, base_name in self._base_name.items()
            if not base_name and (name in self._untied or (name in self._whole and name not in self._tied))
        ]
        stored, unfit = {}, []
        for base_name, name in [(n, self._skeleton_name.get(n)) for n in kept] + [(None, n) for n in self._added]:
            value = self._whole.get(name, base.get(base_name or self._base_value_name(name)))
            if name is not None and value.shape != self._weights[name].shape:
                unfit.append(f"{name} {tuple(value.shape)} in place of {tuple(self._weights[name].shape)}")
            dtype = base[base_name].dtype if base_name else self._float_dtype
            stored[base_name or name] = torch.empty(value.shape, dtype=dtype, device="meta")
        if unfit:
            raise UserError(f"with the adapter, weights do not fit the model: {', '.join(unfit[:8])}")
        return stored

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight of the new files, one at a time."""
        for base_name, value in self.checkpoint.read_all():
            if base_name in self.stored:
                yield base_name, self.merged(self._skeleton_name.get(base_name), value)
        for name in self._added:
            base_name = self._base_value_name(name)
            yield name, self.merged(name, self.checkpoint.read(base_name) if base_name else None)

    def __str__(self) -> str:
        changes = [f"{len(self._factors)} layers folded"]
        changes += [f"taken whole: {', '.join(sorted(self._whole))}"] if self._whole else []
        changes += [f"no longer tied: {', '.join(sorted(self._untied))}"] if self._untied else []
        return "; ".join(changes)


def _write_settings(merge: Merge, base_model: str, folder: Path) -> None:
    """Configuration, generation configuration and tokenizer (the adapter's, where it has one)."""
    merge.config.save_pretrained(folder)
    has_tokenizer = (merge.adapter.folder / "tokenizer_config.json").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(merge.adapter.folder if has_tokenizer else base_model)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer could be loaded from {base_model}: {error}") from error
    tokenizer.save_pretrained(folder)
    if merge.skeleton.can_generate():
        try:
            generation_config = GenerationConfig.from_pretrained(base_model)
        except OSError:  # the base has none
            generation_config = GenerationConfig.from_model_config(merge.config)
        for key, value in merge.adapter.changed_config.items():
            if key.endswith("_token_id") and key != "eos_token_id":  # of which there may be several
                setattr(generation_config, key, value)
        merge.skeleton.generation_config = generation_config
        keep_end_tokens(merge.skeleton, tokenizer)
        generation_config.save_pretrained(folder)


def save_merged_model(
    base_model: str, adapter: Adapter, folder: Path, max_shard_size, readme: str | None = None
) -> None:
    """Fold an adapter into its base model and write the merged model to ``folder``.

    Args:
        max_shard_size: bytes, or text as in "5GB", of the largest file.
        readme: the text of README.md; None for none.
    """
    merge = Merge(base_model, adapter)
    print(f"{merge.checkpoint.name} + {adapter.folder}: {merge}", flush=True)
    with atomic_folder(folder, "merged model") as scratch:
        with open_shards(scratch, merge.stored, max_shard_size) as write:
            for name, value in merge.weights():
                write(name, value)
        _write_settings(merge, base_model, scratch)
        write_readme(scratch, readme)
