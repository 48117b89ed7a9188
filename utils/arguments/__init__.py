"""Every command-line flag of the steps, each defined once, and what a run makes of what was given."""

from utils.arguments.config_file import given_flags, write_run_config
from utils.arguments.dpo import has_reference_engine
from utils.arguments.model import QUANTIZATIONS
from utils.arguments.rlhf_checks import vllm_settings
from utils.arguments.rlhf_sizes import RLHFBatchSizes
from utils.arguments.run import MAY_CHANGE_AT_RESUME, nothing_saved
from utils.arguments.step_names import DPO, NAMES, TITLES, Step, step_of
from utils.arguments.steps import (
    PROJECT,
    SCRIPTS,
    TRAIN_PHASES,
    Settled,
    build_parser,
    check_step,
    end_token,
    settle,
    warmup_note,
    warmup_steps,
)
