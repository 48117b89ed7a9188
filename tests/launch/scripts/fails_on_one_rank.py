"""Rank 1 ends by an error of its own while the others wait for nothing: torchrun … fails_on_one_rank.py"""

import time
from argparse import Namespace

from utils.process.errors import UserError
from utils.process.launch import init_distributed, run_main
from utils.process.world import get_rank


def main():
    init_distributed(Namespace(local_rank=-1, comm_timeout=60))
    if get_rank() == 1:
        raise UserError("only here")
    time.sleep(15)


run_main(main)
