"""Flags of DPO: its loss, and the reference that it compares with."""

from utils.arguments.kinds import above_zero, non_negative_float, probability
from utils.process.errors import UserError

LOSSES = ("sigmoid", "ipo", "hinge", "apo_zero")
WITHOUT_REFERENCE = ("sigmoid", "hinge")  # those that can compare the policy's own log-probs


def add_dpo_arguments(group) -> None:
    add = group.add_argument
    add(
        "--beta",
        type=above_zero,
        default=0.1,
        help="how strongly the policy is kept near the reference: a reward is beta x log-ratio. Usual: 0.01 to 0.5; "
        "2 to 2.5 with --reference_free, whose log-probs are means",
    )
    add(
        "--dpo_loss",
        choices=LOSSES,
        default="sigmoid",
        help="sigmoid: DPO; ipo: a squared distance to a margin of 1 / (2 beta), which does not grow without bound; "
        "hinge: no more gradient once beta x margin is 1; apo_zero: raises the chosen and lowers the rejected answer, "
        "each on its own",
    )
    add(
        "--label_smoothing",
        type=probability,
        default=0.0,
        help="share of pairs whose order is taken to be wrong, below 0.5 (sigmoid loss); 0 to trust all",
    )
    add(
        "--rpo_alpha",
        type=non_negative_float,
        default=0.0,
        help="weight of the chosen answer's mean negative log-prob in the loss: an SFT term, so that its probability "
        "does not fall along with the rejected answer's; 1 in the source; 0 for off",
    )
    add(
        "--reference_free",
        action="store_true",
        help="compare mean log-probs per token, without a reference (SimPO): less memory and time, and only a low "
        "learning rate keeps the policy near its start",
    )
    add(
        "--simpo_gamma",
        type=non_negative_float,
        default=0.0,
        help="with --reference_free: margin by which beta x difference should exceed 0, as in 1 (SimPO: from half of "
        "beta to beta); 0 for off",
    )
    add(
        "--precompute_ref_log_probs",
        action="store_true",
        help="compute the reference's log-probs of all answers once, before training, and keep them in "
        "--data_output_path for later runs, so that no second model is in memory",
    )
    add(
        "--separate_ref",
        action="store_true",
        help="keep a separate copy as the reference even with --only_optimize_lora, where the model without its "
        "adapters could serve",
    )
    add("--offload_reference_model", action="store_true", help="keep the reference's weights in host memory, by ZeRO-3")
    add("--print_loss", action="store_true", help="print the loss of every step on every rank")


def has_reference_engine(args) -> bool:
    """Whether the reference is a model of its own, beside the policy."""
    if args.reference_free or args.precompute_ref_log_probs:
        return False
    return args.separate_ref or not _trains_adapters_alone(args)


def _trains_adapters_alone(args) -> bool:
    return args.only_optimize_lora and args.lora_dim > 0


def check_dpo(args) -> None:
    """Refuse combinations that cannot work, and flags that would do nothing.

    Raises:
        UserError: naming the flags, with the reason.
    """
    if args.label_smoothing >= 0.5:
        raise UserError(
            f"--label_smoothing {args.label_smoothing:g}: from 0.5 on the rejected answer would be the preferred one; "
            "give a share below"
        )
    if args.label_smoothing and args.dpo_loss != "sigmoid":
        raise UserError(f"--label_smoothing is a part of --dpo_loss sigmoid; leave it out with {args.dpo_loss}")
    if args.simpo_gamma and not args.reference_free:
        raise UserError("--simpo_gamma is a margin of --reference_free, which is not given")
    if args.reference_free and args.dpo_loss not in WITHOUT_REFERENCE:
        raise UserError(
            f"--reference_free with --dpo_loss {args.dpo_loss}: that loss measures distances to a reference; "
            f"--reference_free goes with {' or '.join(WITHOUT_REFERENCE)}"
        )
    wanted = [name for name in ("separate_ref", "offload_reference_model") if getattr(args, name)]
    wanted = ", ".join(f"--{name}" for name in wanted)
    if args.reference_free and (wanted or args.precompute_ref_log_probs):
        raise UserError(f"--reference_free has no reference: leave out {wanted or '--precompute_ref_log_probs'}")
    if args.precompute_ref_log_probs and wanted:
        raise UserError(f"--precompute_ref_log_probs needs no model of the reference: leave out {wanted}")
    if args.offload_reference_model and not has_reference_engine(args):
        raise UserError(
            "--offload_reference_model: under --only_optimize_lora the model without its adapters is the reference; "
            "add --separate_ref for one of its own"
        )
