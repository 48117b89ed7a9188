"""Every command-line flag of the three steps, each defined once; a main.py composes the groups it needs."""

from utils.arguments.data import add_data_arguments, add_sequence_length_argument
from utils.arguments.kinds import cache_folder, new_parser, non_negative_float
from utils.arguments.model import (
    QUANTIZATIONS,
    add_dtype_argument,
    add_lora_arguments,
    add_num_padding_argument,
    add_quantize_arguments,
    add_soft_prompt_arguments,
    add_supervised_arguments,
    check_soft_prompt,
    check_supervised,
    warn_num_padding,
)
from utils.arguments.rlhf import RLHFBatchSizes, add_rlhf_arguments, check_rlhf
from utils.arguments.run import MAY_CHANGE_AT_RESUME, add_run_arguments, resolve_common
from utils.process.files import check_output_dir
