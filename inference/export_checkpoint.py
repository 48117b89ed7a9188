"""Write the model in a checkpoint of a run to a folder of its own, on the CPU, as the run would have saved it there.

    python inference/export_checkpoint.py output/sft/checkpoints/step-00000500 exported

Any step, ZeRO stage and number of ranks; LoRA is folded in, into the unquantised base after --quantize, and of a soft
prompt the vectors are written. The model is never built: its weights go from the files of the checkpoint to the new
ones layer by layer. What the run did not train comes from the model that it started from, which must still be there,
for its configuration and tokenizer too. Nothing but tensors and numbers is ever unpickled.
"""

import argparse
import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM

from utils.arguments.kinds import size
from utils.data import prompt_format
from utils.engine.build import load_tokenizer, model_options
from utils.model.adapters import save_lora_adapter
from utils.model.loading import Checkpoint, find_checkpoint
from utils.model.merging import read_adapter, save_merged_model
from utils.model.model_utils import add_lora_layers, create_critic_model, create_hf_model
from utils.model.reward_model import SCORE_SCALE
from utils.model.saving import save_pretrained_model
from utils.model.shards import MAX_SHARD_SIZE
from utils.model.soft_prompt import make_soft_prompt_model, save_soft_prompt
from utils.module.lora import lora_layers, only_optimize_lora_parameters
from utils.process.errors import UserError
from utils.process.files import check_output_dir
from utils.process.launch import run_main
from utils.run.checkpoint_files import (
    STATE_FILE,
    SavedCheckpoint,
    newest_checkpoint,
    rank_file,
    read_checkpoint,
    read_small_file,
)
from utils.run.engine_state import refused_content
from utils.run.same_run import same_model
from utils.run.saved_average import SavedAverage
from utils.run.saved_engine import SavedEngine

AVERAGE = "actor_ema"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write the model in a checkpoint of a run to a folder of its own.")
    add = parser.add_argument
    add("checkpoint", help="folder of a checkpoint (step-00000500), or of a run's checkpoints for the newest")
    add("output_dir", help="folder for the model")
    add(
        "--engine",
        choices=["actor", "critic", AVERAGE],
        default=None,
        help="which model of step 3 (default actor); the other steps have one",
    )
    add(
        "--model",
        default=None,
        help="where the model lies that the run started from (for --engine critic: the reward model); None for where "
        "it lay then",
    )
    add(
        "--prompt_format",
        choices=prompt_format.FORMATS,
        default=None,
        help="of the training rows, for checkpoints of earlier versions; None for what the checkpoint notes",
    )
    add(
        "--save_lora_adapters",
        action="store_true",
        help="save the LoRA factors too, to OUT/adapter, as the flag of the run does; after --quantize always",
    )
    add("--max_shard_size", type=size, default=MAX_SHARD_SIZE, help=f"largest file of weights ({MAX_SHARD_SIZE})")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model; off: refuse such models")
    return parser


def choose_checkpoint(folder: Path) -> SavedCheckpoint:
    """The checkpoint in a folder, or the newest of those in it."""
    newest = None if (folder / STATE_FILE).exists() else newest_checkpoint(folder)
    return read_checkpoint(folder) if newest is None else newest


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint: which, and how the flags of its run name what belongs to it."""

    name: str  # of its files in the checkpoint
    prefix: str  # of its flags
    start: str  # the flag of the model it started from

    @classmethod
    def of(cls, checkpoint: SavedCheckpoint, engine: str | None) -> "Part":
        """Raises UserError: the checkpoint has no such model."""
        files = {Path(file).parts[0].partition("-rank")[0] for file in checkpoint.state["files"]}
        present = files & {"model", "actor", "critic", AVERAGE}
        name = engine or ("model" if "model" in present else "actor")
        if name not in present:
            raise UserError(
                f"{checkpoint.folder} holds no {name}; it holds {', '.join(sorted(present)) or 'no model'}"
                + (": leave --engine out" if present == {"model"} else "")
            )
        role = "" if name == "model" else name.removesuffix("_ema")
        return cls(name, f"{role}_" if role else "", f"{role}_model_name_or_path" if role else "model_name_or_path")


def check_start(checkpoint: SavedCheckpoint, start: str, path: str) -> None:
    """Refuse another model than the one that the run started from: what was frozen is in that one alone."""
    then = checkpoint.state["models"].get(start)
    if then is not None and not same_model(path, then):
        raise UserError(
            f"{path} does not hold the weights that the run of {checkpoint.folder} started from (--{start}); where "
            "they lie now is said by --model"
        )


def make_skeleton(args, tokenizer, part: Part, path: str, is_reward: bool):
    """The model that the run built by its flags, with shapes but no weights."""
    step_3, dtype = part.name != "model", "fp32" if part.name == AVERAGE else None
    dropout = None if part.name == AVERAGE else getattr(args, f"{part.prefix}dropout")
    options = model_options(args, dropout, dtype) | dict(on_meta=True, rlhf_training=step_3)
    if is_reward:
        model = create_critic_model(path, tokenizer, **options)
    else:
        model = create_hf_model(AutoModelForCausalLM, path, tokenizer, **options)
    if getattr(args, "soft_prompt", None) is not None:
        return make_soft_prompt_model(model, tokenizer, args, start=False)
    model = add_lora_layers(model, args, part.prefix)
    if getattr(args, "only_optimize_lora", False) and lora_layers(model):
        only_optimize_lora_parameters(model, ["v_head.weight"] if is_reward else ())
    return model


def empty_weights(module) -> None:
    """Let each weight and buffer be empty on the CPU and know its shape, as a shard of ZeRO-3 does."""
    made = {}

    def emptied(tensor):
        empty = torch.empty(0, dtype=tensor.dtype)
        if isinstance(tensor, torch.nn.Parameter):
            empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
        empty.ds_shape = tensor.shape
        return made.setdefault(id(tensor), empty)

    for layer in module.modules():
        for tensors in (layer._parameters, layer._buffers):
            tensors.update({name: emptied(tensor) for name, tensor in tensors.items() if tensor is not None})


class Weights:
    """The weights of an emptied module, from a checkpoint or from the model that its run started from.

    Args:
        saved: what the checkpoint holds; has ``in`` and ``weight(name)``.

    Raises:
        UserError: a weight that neither holds, or one of another shape.
    """

    def __init__(self, module, saved: SavedEngine | SavedAverage, start: Checkpoint):
        self.saved, self.start = saved, start
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        kept = module.state_dict().keys()
        self._source: dict[int, str] = {}  # of each tensor: its name in the checkpoint, or in the files of the start
        unknown: dict[int, str] = {}
        for name, tensor in named:
            if name in kept and id(tensor) not in self._source:
                source = name if name in saved else self._in_start(name, getattr(module, "rwtransformer", module))
                found = saved.shape(name) if name in saved else source and start.tensors[source].shape
                if source is None:
                    unknown.setdefault(id(tensor), name)
                elif found != tensor.ds_shape:
                    raise UserError(
                        f"{name} is {list(found)} in {saved.folder if name in saved else start.name}, and "
                        f"{list(tensor.ds_shape)} in the model of these flags"
                    )
                else:
                    self._source[id(tensor)] = source
        missing = [name for key, name in unknown.items() if key not in self._source]
        if missing:
            raise UserError(
                f"{saved.folder} does not hold {missing[0]} (nor {len(missing) - 1} other weights), which was not "
                f"trained, and neither does {start.name} under a name that is known here"
            )
        has_place = {name for name, _ in named}
        if left := sorted(name for name in saved.names() if name not in has_place):
            raise UserError(f"{saved.folder} holds {left[0]}, for which the model of its flags has no place")

    def _in_start(self, name: str, module) -> str | None:
        """Where the files of the start hold a weight: with the prefix of a family's models or without it."""
        own, prefix = name.removeprefix("rwtransformer."), f"{module.base_model_prefix}."
        names = (own, prefix + own, own.removeprefix(prefix))
        return next((known for known in names if known in self.start.tensors), None)

    @contextmanager
    def gathered(self, tensors):
        """While open, these tensors are whole."""
        tensors = list(dict.fromkeys(tensors))
        for tensor in tensors:
            source = self._source[id(tensor)]
            value = self.saved.weight(source) if source in self.saved else self.start.read(source)
            tensor.data = value.to(tensor.dtype)
        try:
            yield
        finally:
            for tensor in tensors:
                tensor.data = torch.empty(0, dtype=tensor.dtype)


def load_prompt_encoder(model, saved: SavedEngine) -> None:
    """Give a soft prompt the vectors, or the network that makes them, of a checkpoint. Raises UserError: not there."""
    for name, weight in model.prompt_encoder.named_parameters(prefix="prompt_encoder"):
        if name not in saved or saved.shape(name) != weight.shape:
            raise UserError(f"{saved.folder} holds no {name} of {list(weight.shape)}, which these flags ask for")
        weight.data.copy_(saved.weight(name))


def remember_format(tokenizer, checkpoint: SavedCheckpoint, given: str | None) -> None:
    """Note the prompt format of the training rows in the tokenizer, as the run does when it has read them."""
    noted = checkpoint.state.get("prompt_format")
    style = given or (noted and noted["style"]) or checkpoint.state["flags"].get("prompt_format")
    if style is None:
        print(
            "note: this checkpoint, of an earlier version, does not tell the prompt format of its rows; name it with "
            "--prompt_format, else chat and evaluation take their default"
        )
        return
    prompt_format.remember(tokenizer, style, bool(noted and noted["single_questions"]))


def add_score_scale(config, checkpoint: SavedCheckpoint) -> None:
    """Mean and std of a reward model's scores in its configuration, where the run had measured them at this step."""
    file = checkpoint.folder / rank_file(0)
    with refused_content(file):
        evaluations = json.loads(read_small_file(file))["tracked"].get("evaluations", {})
        scale = [evaluations.get("figures", {}).get(name) for name in ("score_mean", "score_std")]
        if None in scale or evaluations.get("steps") != checkpoint.state["steps"]:
            print(f"note: no evaluation at this step, so the model has no {' and '.join(SCORE_SCALE)}")
            return
        config.reward_score_mean, config.reward_score_std = map(float, scale)


def save(module, tokenizer, args, path: str, saved: SavedEngine | SavedAverage, options) -> None:
    """Every form of the model that the run would save."""
    folder = Path(options.output_dir)
    if options.save_lora_adapters and not (getattr(args, "only_optimize_lora", False) and lora_layers(module)):
        raise UserError(
            "--save_lora_adapters: the run did not train LoRA layers alone (--only_optimize_lora), so that an adapter "
            "would not hold all of it"
        )
    if getattr(args, "soft_prompt", None) is not None:
        load_prompt_encoder(module, saved)
        save_soft_prompt(module, tokenizer, folder)
        return
    empty_weights(module)
    gather = Weights(module, saved, find_checkpoint(path)).gathered
    quantised = getattr(args, "quantize", None) is not None
    if not quantised:
        save_pretrained_model(module, tokenizer, folder, options.max_shard_size, alone=True, gather=gather)
    if quantised or options.save_lora_adapters:
        save_lora_adapter(module, tokenizer, path, folder / "adapter", args.trust_remote_code, gather=gather)
    if quantised:
        save_merged_model(path, read_adapter(folder / "adapter"), folder, options.max_shard_size)


def export(options, checkpoint: SavedCheckpoint) -> None:
    part = Part.of(checkpoint, options.engine)
    with refused_content(checkpoint.folder / STATE_FILE):
        # Whether code may run is said by who calls this, never by a file; a kernel for attention need not be here.
        own = {"trust_remote_code": options.trust_remote_code, "attn_implementation": None}
        flags = checkpoint.state["flags"]
        args = SimpleNamespace(**flags | own)
        path, first = options.model or flags[part.start], flags.get("actor_model_name_or_path")
        setattr(args, part.start, path)
        check_start(checkpoint, part.start, path)
        tokenizer = load_tokenizer(args, first if part.name == "critic" else path)
        remember_format(tokenizer, checkpoint, options.prompt_format)
        if part.name == AVERAGE:
            saved = SavedAverage(checkpoint.folder, part.name, SavedEngine(checkpoint.folder / "actor").shapes)
        else:
            saved = SavedEngine(checkpoint.folder / part.name)
        module = make_skeleton(args, tokenizer, part, path, is_reward="v_head.weight" in saved)
    if "rm_loss" in flags:
        add_score_scale(module.config, checkpoint)
    save(module, tokenizer, args, path, saved, options)
    print(f"saved the {part.name} after {checkpoint.state['steps']} steps to {options.output_dir}")


def main() -> None:
    options = build_parser().parse_args()
    checkpoint = choose_checkpoint(Path(options.checkpoint))
    if Path(options.output_dir).resolve().is_relative_to(checkpoint.folder.resolve()):
        raise UserError(f"{options.output_dir} is the checkpoint itself: the model needs a folder of its own")
    check_output_dir(options.output_dir, "OUT")
    export(options, checkpoint)


if __name__ == "__main__":
    run_main(main)
