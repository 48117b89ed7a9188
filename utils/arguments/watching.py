"""Flags of what a person sees and keeps while a run trains: the console, evaluations, the best model."""

import math
from dataclasses import dataclass

from utils.arguments.kinds import not_negative, positive
from utils.arguments.step_names import DPO, Step
from utils.process.errors import UserError

# What an evaluation of each step may be judged by; the first is the default. Lower is better of LOWER_IS_BETTER.
METRICS = {
    1: ("perplexity", "loss"),
    2: ("accuracy", "loss"),
    DPO: ("accuracy", "loss", "margin"),
    3: ("score", "reward"),
}
LOWER_IS_BETTER = {"perplexity", "loss"}


@dataclass(frozen=True)
class Worse:
    """A figure of an evaluation that should not be worse at the end of a run than at its start.

    Attributes:
        metric: its name. tolerance: a difference up to this is not spoken of: rounding, or which rows were looked at.
        advice: what to turn.
    """

    metric: str
    tolerance: float
    advice: str


_FASTER_THAN_LEARNT = "lower {rate}, or train on more rows; --save_best keeps the best model on the way"
WORSE = {
    1: (Worse("loss", 0.001, _FASTER_THAN_LEARNT),),
    2: (Worse("accuracy", 0.0, _FASTER_THAN_LEARNT),),
    DPO: (Worse("accuracy", 0.0, _FASTER_THAN_LEARNT),),
    3: (
        Worse("score", 0.0, "lower {rate}, or give more steps; --save_best keeps the best model on the way"),
        Worse("eos_rate", 0.05, "raise --missing_eos_penalty or --kl_ctl, or --max_answer_seq_len if answers need it"),
    ),
}


def add_watching_arguments(parser, step: Step) -> None:
    add = parser.add_argument_group("console, evaluation and the best model").add_argument
    add(
        "--console",
        choices=["classic", "brief"],
        default="classic",
        help="classic: the lines of DeepSpeed-Chat, which programs read; brief: for people, one line per "
        "--log_interval, what the step does, and what to do with its result",
    )
    if step != 3:
        add(
            "--eval_interval",
            type=not_negative,
            default=0,
            help="optimizer steps between evaluations; 0 for before training and after each epoch only",
        )
        add(
            "--eval_iters",
            type=not_negative,
            default=0 if step == 1 else 100,
            help="batches that each rank reads in an evaluation; 0 for the whole split. The last evaluation of a run "
            "always reads the whole split",
        )
    else:
        add(
            "--eval_interval",
            type=not_negative,
            default=0,
            help="updates between evaluations on prompts that are not trained on, with one before training and one at "
            "the end; 0 for none",
        )
        add("--eval_prompts", type=positive, default=64, help="prompts that an evaluation answers, on all ranks")
    add(
        "--skip_initial_evaluation",
        action="store_true",
        help="do not evaluate before training; off: evaluate, so that the end of the run can say if the model got "
        "worse",
    )
    add(
        "--save_best",
        nargs="?",
        choices=METRICS[step],
        const=METRICS[step][0],
        default=None,
        help="also keep the model of the best evaluation (the one before training does not count) in the folder best "
        f"of --output_dir; judged by this metric, without a value by {METRICS[step][0]}; None for off",
    )
    add(
        "--early_stopping_patience",
        type=positive,
        default=None,
        help=f"end the run after this many evaluations without a better value of the metric of --save_best (by itself "
        f"{METRICS[step][0]}); None for off",
    )
    add(
        "--save_interval",
        type=positive,
        default=None,
        help="optimizer steps (step 3: updates) between models saved to folders such as step-000500 of --output_dir, "
        "to load and try; no run can resume from them (--checkpoint_steps is for that); None for off",
    )
    add(
        "--save_total_limit",
        type=positive,
        default=None,
        help="how many of the newest folders of --save_interval are kept; None for all",
    )


def watched_metric(args, step: Step) -> str | None:
    """What the run's evaluations are judged by; None where no flag asks for that."""
    return args.save_best or (METRICS[step][0] if args.early_stopping_patience else None)


def check_watching(args, step: Step) -> None:
    """Refuse what would do nothing.

    Raises:
        UserError: naming the flags, with the reason.
    """
    for flag, value in (("--save_best", args.save_best), ("--save_interval", args.save_interval)):
        if value and args.output_dir is None:
            raise UserError(f"{flag} saves models under --output_dir, which is not given")
    if args.save_total_limit and not args.save_interval:
        raise UserError("--save_total_limit keeps the newest models of --save_interval, which is not given")
    if step == 3 and args.skip_initial_evaluation and not args.eval_interval:
        raise UserError("--skip_initial_evaluation: step 3 evaluates nothing without --eval_interval")
    watching = "--early_stopping_patience" if args.early_stopping_patience else "--save_best"
    if watched_metric(args, step) is None or args.eval_interval:
        return
    if step == 3:
        raise UserError(f"{watching} compares evaluations, and step 3 makes none without --eval_interval")
    if args.num_train_epochs == 1:
        raise UserError(
            f"{watching} compares evaluations, and a run of one epoch makes one, at its end: give --eval_interval, or "
            "--num_train_epochs 2 or more"
        )


def learning_rate_flag(args, step: Step) -> str:
    """The flag of the learning rate that moves a run's model."""
    role = "actor_" if step == 3 else ""
    if getattr(args, "soft_prompt", None):
        return "--soft_prompt_learning_rate"
    return f"--{role}lora_learning_rate" if getattr(args, f"{role}lora_dim") else f"--{role}learning_rate"


def worse_than_at_start(args, step: Step, start: dict[str, float], end: dict[str, float]) -> list[str]:
    """A line for each figure that is worse after a run than before it, with the flag to turn.

    Args:
        start, end: figures of two evaluations; none of ``start`` where there was no evaluation before training.
    """
    lines = []
    for worse in WORSE[step]:
        if worse.metric not in start or worse.metric not in end:
            continue
        was, is_now = start[worse.metric], end[worse.metric]
        loss = is_now - was if worse.metric in LOWER_IS_BETTER else was - is_now
        if not loss <= worse.tolerance and math.isfinite(was):  # written so that what is not a number is worse, too
            advice = worse.advice.format(rate=learning_rate_flag(args, step))
            lines.append(
                f"the evaluation ended worse than it began: {worse.metric} {was:.4g} before training, {is_now:.4g} "
                f"now; {advice}"
            )
    return lines
