"""The flags of each step put together: its parser, and the one place where what was given becomes what a run uses."""

import argparse
from pathlib import Path

from transformers import SchedulerType

from utils.arguments.config_file import ConfigParser
from utils.arguments.data import add_data_arguments
from utils.arguments.dpo import add_dpo_arguments, check_dpo
from utils.arguments.kinds import new_parser, non_negative_float
from utils.arguments.model import (
    WARMUP_RATIO,
    add_num_padding_argument,
    add_soft_prompt_arguments,
    add_supervised_arguments,
    check_soft_prompt,
    check_supervised,
    warn_num_padding,
)
from utils.arguments.rlhf import add_rlhf_arguments
from utils.arguments.rlhf_checks import check_rlhf
from utils.arguments.run import add_run_arguments, check_output, nothing_saved, settle_common
from utils.arguments.step_names import DPO, Step
from utils.arguments.watching import add_watching_arguments, check_watching
from utils.data.encoding import REWARD, RLHF, SFT
from utils.process.console import print_rank_0
from utils.process.files import check_output_dir
from utils.process.ranks import agree
from utils.process.world import is_rank_0

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    1: PROJECT / "training/step1_supervised_finetuning/main.py",
    2: PROJECT / "training/step2_reward_model_finetuning/main.py",
    DPO: PROJECT / "training/step2_dpo_finetuning/main.py",
    3: PROJECT / "training/step3_rlhf_finetuning/main.py",
}
DESCRIPTIONS = {
    1: "Step 1: supervised finetuning of a causal language model on prompts and answers.",
    2: "Step 2: a reward model from pairs of a chosen and a rejected answer.",
    DPO: "DPO: a language model from pairs of a chosen and a rejected answer, without a reward model.",
    3: "Step 3: PPO with an actor, a reference, a critic and a reward model.",
}
TRAIN_PHASES = {1: SFT, 2: REWARD, DPO: REWARD, 3: RLHF}  # whose rows, and whose share of --data_split


def build_parser(step: Step) -> ConfigParser:
    """Every flag of a step, to be given on the command line or in a file (--config)."""
    parser = new_parser(DESCRIPTIONS[step], ConfigParser)
    add_data_arguments(parser, step)
    if step == 1:
        add_supervised_arguments(parser, 2e-5, "for whole models that are trained already; from scratch 1e-3")
        add_soft_prompt_arguments(parser)
    elif step == 2:
        add_supervised_arguments(parser, 5e-5, "for whole models up to a billion weights, 9e-6 for larger ones")
    elif step == DPO:
        hint = "for whole models; the smaller the model, the more it takes"
        add_supervised_arguments(parser, 1e-6, hint, dropout=0.0)  # log-probs of equal weights shall be equal
    else:
        add_rlhf_arguments(parser)
    add_run_arguments(parser, step)
    add_watching_arguments(parser, step)
    if step == 1:
        _add_sft_arguments(parser.add_argument_group("step 1"))
    elif step == 2:
        _add_reward_arguments(parser.add_argument_group("step 2"))
    elif step == DPO:
        group = parser.add_argument_group("DPO")
        add_dpo_arguments(group)
        add_num_padding_argument(group)
    return parser


def _add_sft_arguments(group) -> None:
    add = group.add_argument
    add("--mask_prompt", action="store_true", help="learn the answers only; off: prompts too, as published")
    add(
        "--packing",
        action="store_true",
        help="fill blocks of --max_seq_len with whole rows that do not see each other; a batch then counts blocks",
    )
    add("--print_loss", action="store_true", help="print the loss of every step on every rank")


def _add_reward_arguments(group) -> None:
    add_num_padding_argument(group)
    add = group.add_argument
    add(
        "--rm_loss",
        choices=["per_token", "end_token"],
        default="end_token",
        help="compare the pair at its ends (InstructGPT), or at every token that differs (per_token, published)",
    )
    add(
        "--rm_margin",
        type=non_negative_float,
        default=0.0,
        help="margin subtracted from chosen - rejected inside the sigmoid, in units of the score (Llama 2); 0 for off",
    )
    add(
        "--rm_center_coef",
        type=non_negative_float,
        default=0.0,
        help="weight of (chosen + rejected end score)^2 in the loss, which keeps the scores around 0, as in 0.01; "
        "0 for off",
    )


class Settled(argparse.Namespace):
    """The arguments of a run as it uses them. Nothing writes to them any more."""

    def __init__(self, **values):
        vars(self).update(values)

    def __setattr__(self, name: str, value) -> None:
        raise AttributeError(f"arguments are settled once, by settle(): {name} cannot become {value!r}")


def settle(args: argparse.Namespace, step: Step) -> Settled:
    """What was given -> what the run uses; every rank must call this, before anything is loaded.

    Flags left open take the value that fits the machine and the other flags; combinations that cannot work are refused.

    Raises:
        UserError: naming the flags, with the reason.
    """
    settling = argparse.Namespace(**vars(args))
    settle_common(settling)
    check_step(settling, step)
    if step != 1:
        warn_num_padding(settling)

    def check_output_folder() -> None:
        check_output(settling)
        if not settling.dry_run:
            check_output_dir(settling.output_dir)

    agree(check_output_folder if is_rank_0() else lambda: None)
    if note := nothing_saved(settling):
        print_rank_0(note)
    return Settled(**vars(settling))


def check_step(args: argparse.Namespace, step: Step, ranks: int | None = None) -> None:
    """The part of ``settle`` that is about a step's flags alone: it writes nothing to a disk and asks no other rank.

    Args:
        ranks: of another machine that the run is planned for; None: it is to run on this one.

    Raises:
        UserError: a combination that cannot work.
    """
    args.deepspeed_config_overrides = args.deepspeed_config_overrides or args.deepspeed_config
    if args.num_warmup_steps is not None:
        args.warmup_ratio = None
    check_watching(args, step)
    if step == 3:
        check_rlhf(args, ranks)
        return
    check_supervised(args)
    if step == 1:
        check_soft_prompt(args)
    elif step == DPO:
        check_dpo(args)


def warmup_steps(args: argparse.Namespace, total_steps: int) -> int:
    """Optimizer steps of rising learning rate in a run of so many."""
    return round(args.warmup_ratio * total_steps) if args.num_warmup_steps is None else args.num_warmup_steps


def warmup_note(args: argparse.Namespace, total_steps: int) -> str | None:
    """What to say of a warmup that the run does not get to the end of; None where all is in order."""
    warmup = warmup_steps(args, total_steps)
    if warmup < total_steps or warmup == 0 or args.lr_scheduler_type == SchedulerType.CONSTANT:
        return None
    by_steps = args.num_warmup_steps is not None
    flag = f"--num_warmup_steps {warmup}" if by_steps else f"--warmup_ratio {args.warmup_ratio:g}"
    return (
        f"{flag}: the learning rate still rises when the run ends after {total_steps} optimizer steps, at "
        f"{100 * (total_steps - 1) / warmup:.0f} % of its peak; --warmup_ratio {WARMUP_RATIO:g} fits any length"
    )


def end_token(args: argparse.Namespace) -> str | None:
    """The token that ends every answer instead of the tokenizer's own EOS, where the flags ask for one."""
    return args.eot_token if args.add_eot_token else None
