"""The README.md of a saved model, in the hub's format: what it is, from what, with which figures, and how to ask it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from utils.arguments import DPO, TITLES, Step
from utils.data.prompt_format import BARE, CHAT_TEMPLATE, end_of_turn_id, format_answer, format_prompt, remembered
from utils.data.sources import sources_of_step
from utils.data.special_tokens import unmarked
from utils.data.splits import is_hub_name
from utils.process.console import print_rank_0
from utils.process.versions import versions
from utils.run.metrics_file import METRICS_FILE

CARD_FILE = "README.md"
LORA, SOFT_PROMPT = "LoRA adapter", "soft prompt"  # what a folder may hold instead of a whole model
OWN_TAG = "three-steps-to-chat"  # by which a card is known to be one of these


@dataclass(frozen=True)
class Kind:
    """What a step saves. ``figures``: of metrics.jsonl, in the order in which a card shows them."""

    title: str
    tag: str
    says: str
    figures: tuple[str, ...]
    scores: bool = False


_PPO = tuple(f"{where}/{name}" for where in ("eval", "train") for name in ("score", "kl", "eos_rate", "answer_length"))
KINDS = {
    "sft": Kind(
        "Language model after supervised finetuning",
        "sft",
        "It was taught to answer from prompts and good answers (step 1, SFT).",
        ("eval/perplexity", "eval/loss", "train/loss"),
    ),
    "reward": Kind(
        "Reward model",
        "reward-model",
        "It gives an answer to a prompt one score; of two answers the better one should have the higher score. It was "
        "trained on pairs of a chosen and a rejected answer (step 2).",
        ("eval/accuracy", "eval/chosen_score", "eval/rejected_score", "eval/score_mean", "eval/score_std", "eval/loss"),
        scores=True,
    ),
    "dpo": Kind(
        "Language model after DPO",
        "dpo",
        "It was trained on pairs of a chosen and a rejected answer to give the first kind rather than the second, and "
        "to stay near the model it began from (DPO).",
        ("eval/accuracy", "eval/margin", "eval/rewards/chosen", "eval/rewards/rejected", "eval/kl", "eval/loss"),
    ),
    "actor": Kind(
        "Language model after RLHF (actor)",
        "ppo",
        "It was trained with PPO to answer so that a reward gets high, and to stay near the model it began from "
        "(step 3).",
        _PPO,
    ),
    "actor_ema": Kind(
        "Language model after RLHF (moving average of the actor)",
        "ppo",
        "Its weights are the moving average of those that a language model had while PPO trained it (step 3).",
        _PPO,
    ),
    "critic": Kind(
        "Critic of RLHF",
        "critic",
        "It estimates, at each token, the reward that an answer will get. PPO trained it beside the actor (step 3); it "
        "began as the reward model and is no longer one.",
        ("train/critic_loss", "train/explained_variance"),
        scores=True,
    ),
}
OF_STEP = {1: "sft", 2: "reward", DPO: "dpo"}
QUESTION, ANSWER = "What is the capital of Italy?", "Rome."


def last_figures(folder: Path, names: Sequence[str]) -> dict[str, tuple[int, float]]:
    """name -> (step, value) in the last row of metrics.jsonl that has it."""
    file, found = folder / METRICS_FILE, {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # not of the writer; a model is not lost for it
            continue
        found |= {name: (row["step"], row[name]) for name in names if isinstance(row.get(name), int | float)}
    return {name: found[name] for name in names if name in found}


def is_own(file: Path) -> bool:
    """Whether a README.md is a card that was written here, and may be replaced."""
    data = _header(file)
    return data is not None and OWN_TAG in (data.tags or [])


def _header(file: Path) -> ModelCardData | None:
    try:
        return ModelCard.load(file).data if file.is_file() else None
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # another's page: its header is not ours to judge
        return None


def hub_name_of_base(base: str) -> str | None:
    """The model on the hub that a model comes from: itself, or what the card of its folder names; None for neither."""
    if not Path(base).exists():
        return base
    data = _header(Path(base) / CARD_FILE)
    return data.base_model if data is not None and isinstance(data.base_model, str) else None


@dataclass(frozen=True)
class RunCard:
    """What the cards of a run's models have in common.

    Attributes:
        output_dir: holds the metrics file.
        flags: those that differ from their defaults, as run_config.yaml holds them.
        datasets: what was trained on, as the flags name it.
        rows: what became of the rows of each dataset.
    """

    step: Step
    output_dir: str | None
    flags: dict
    datasets: Sequence[str]
    rows: Sequence[str]

    @classmethod
    def of(cls, step: Step, args, flags: dict, dataset) -> "RunCard":
        """Of a run with these settled arguments, as soon as its training rows are there."""
        paths = [source.path for source in sources_of_step(args)]
        return cls(step, args.output_dir, flags, paths, dataset.counts)

    def text_for(self, folder: Path, name: str, base: str, tokenizer, adapter: str | None = None) -> str | None:
        """The README.md of a model that is about to be saved to ``folder``; None where another's page is kept.

        Args:
            name: its folder under the run's: in step 3 the last part says which model (actor, critic, actor_ema).
            base: what the model was made from.
            adapter: LORA or SOFT_PROMPT; None for a whole model.
        """
        if (folder / CARD_FILE).exists() and not is_own(folder / CARD_FILE):
            print_rank_0(f"{folder / CARD_FILE} was not written by a run and stays as it is; no model card is saved")
            return None
        kind = KINDS[OF_STEP.get(self.step, Path(name).name)]
        parts = [
            f"# {kind.title}{f': {adapter}' if adapter else ''}",
            f"{kind.says} {self._origin(base, adapter)}",
            *self._prompts(kind, folder, tokenizer, adapter, base),
            *self._figures(kind),
            "## Data",
            "\n".join(f"- {rows or path}" for path, rows in zip(self.datasets, self.rows, strict=True)),
            "## Flags",
            f"Those that differ from the defaults of {TITLES[self.step]}:",
            _indented(yaml.safe_dump(self.flags, sort_keys=False, allow_unicode=True, width=1000)),
            "## Versions",
            ", ".join(f"{package} {version}" for package, version in versions().items()),
        ]
        return f"---\n{self._data(kind, base, adapter).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"

    def _data(self, kind: Kind, base: str, adapter: str | None) -> ModelCardData:
        on_hub = [path for path in self.datasets if is_hub_name(path) and not path.startswith("local/")]
        return ModelCardData(
            library_name="peft" if adapter else "transformers",
            base_model=hub_name_of_base(base),
            pipeline_tag="text-classification" if kind.scores else "text-generation",
            tags=[OWN_TAG, kind.tag],
            datasets=list(dict.fromkeys(path for path in on_hub if not Path(path).exists())) or None,
        )

    def _origin(self, base: str, adapter: str | None) -> str:
        name = hub_name_of_base(base)
        comes = f", which comes from {name}" if name not in (None, base) else ""
        belongs = f" This folder holds the {adapter} alone; it needs that model." if adapter else ""
        return f"It began as `{base}`{comes}.{belongs}"

    def _figures(self, kind: Kind) -> list[str]:
        figures = last_figures(Path(self.output_dir), kind.figures)
        if not figures:
            return []
        rows = [f"| {name} | {value:.6g} | {step} |" for name, (step, value) in figures.items()]
        table = "\n".join(["| figure | value | step |", "|---|---:|---:|", *rows])
        return ["## Figures", f"The last of each that the run wrote to its `{METRICS_FILE}`:", table]

    def _prompts(self, kind: Kind, folder: Path, tokenizer, adapter: str | None, base: str) -> list[str]:
        style = remembered(tokenizer)
        if style is None:
            return []
        parts = ["## How to ask it", f"Prompt format: `{style}`. {_FORMATS.get(style, '')}".strip()]
        try:
            written = format_prompt([{"role": "user", "content": QUESTION}], style, tokenizer)
            parts += ["A prompt as the model was trained on it:", _indented(repr(unmarked(written)))]
        except ValueError:  # a template that asks for more than one question
            return parts
        if adapter is None:
            end = end_of_turn_id(tokenizer) if style == CHAT_TEMPLATE else None
            end = tokenizer.eos_token if end is None else tokenizer.convert_ids_to_tokens(end)
            parts.append(_snippet(kind, folder, format_answer(ANSWER, style) + end))
        elif adapter == LORA:
            parts.append(f"`inference/merge_lora.py --adapter {folder}` folds it into its model; PEFT loads it too.")
        else:
            parts.append(f"`inference/chatbot.py --path {folder}` talks to it; PEFT loads it too.")
        return parts


_FORMATS = {
    BARE: "Prompts are texts as they stand, without marks of who speaks.",
    CHAT_TEMPLATE: "The chat template of the tokenizer writes prompts.",
}


def _indented(text: str) -> str:
    """A block of code that no content can end."""
    return "\n".join(f"    {line}" for line in text.rstrip("\n").split("\n"))


def _snippet(kind: Kind, folder: Path, answer: str) -> str:
    """Python that loads the model and asks it, for people who have transformers and nothing of this project.

    Args:
        answer: with its end, as a reward model reads it.
    """
    model_class = "AutoModelForSequenceClassification" if kind.scores else "AutoModelForCausalLM"
    lines = [
        f"from transformers import {model_class}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(str(folder))})",
        f"model = {model_class}.from_pretrained({json.dumps(str(folder))})",
        f'messages = [{{"role": "user", "content": "{QUESTION}"}}]',
    ]
    if not kind.scores:
        lines += [
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
            "ids = model.generate(**inputs, max_new_tokens=100)[0]",
            'print(tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    else:
        lines += [
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)",
            f'inputs = tokenizer(prompt + {json.dumps(answer)}, add_special_tokens=False, return_tensors="pt")',
            "print(model(**inputs).logits[0, 0].item())",
        ]
    return "```python\n" + "\n".join(lines) + "\n```"
