"""Joins the process group and prints how many threads it has, and what it has compiled."""

import os
import sys
from argparse import Namespace
from pathlib import Path

import torch

from utils.process.launch import init_distributed, run_main


def main():
    init_distributed(Namespace(local_rank=-1, comm_timeout=60))
    compiled = sorted(file.name for file in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("*.so"))
    print(f"threads {torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}, compiled {compiled}", flush=True)


sys.argv = sys.argv[:1]  # deepspeed adds --local_rank
run_main(main)
