"""What is other on an accelerator, as far as a machine without one can tell: peaks, MFU, free memory, loaders."""

import argparse
import math
from types import SimpleNamespace

import pytest
import torch
from deepspeed.ops.op_builder.builder import CUDAMismatchException
from helpers import WITH_EXPERTS, make_model
from transformers import AutoModelForCausalLM

from utils import accelerators, perf
from utils.arguments.model import check_grad_accum_dtype
from utils.data import batching
from utils.data.batching import DataCollatorSFT, StepBatchSampler, make_loader
from utils.planning import preflight
from utils.process import operators
from utils.process.errors import UserError, meaning_of

CUDA = SimpleNamespace(device_name=lambda: "cuda")


@pytest.mark.parametrize(
    "name, dtype, tera",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989),
        ("NVIDIA H20", "bf16", 148),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA RTX A6000", "bf16", 154.8),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla V100-SXM2-32GB", "bf16", None),  # emulated
        ("Tesla T4", "fp16", 65),
        ("AMD Instinct MI300X", "bf16", 1307),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA GeForce GTX 1080", "fp32", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name, dtype, tera):
    found = accelerators.peak_of(name, dtype)
    assert found is None if tera is None else math.isclose(found, tera * 1e12)


def test_no_peak_is_claimed_where_tf32_may_be_used_or_on_a_cpu(monkeypatch):
    assert accelerators.device_peak("bf16") is None
    monkeypatch.setattr(accelerators, "get_accelerator", lambda: CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert accelerators.device_peak("fp32") == 67e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert accelerators.device_peak("fp32") is None and accelerators.device_peak("bf16") == 989e12


def test_mfu_counts_the_model_once_and_nothing_for_frozen_weights(tmp_path, monkeypatch, capsys):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path))
    monkeypatch.setattr(perf, "device_peak", lambda dtype: 1e9)
    forward = 2 * perf.matmul_parameters(model) + 4 * 2 * 32 * 50 / 2  # operations per token, in rows of 50

    def mfu(checkpointing: bool) -> float:
        args = SimpleNamespace(gradient_checkpointing=checkpointing, dtype="bf16")
        return perf.print_throughput(model, args, 2.0, tokens=100, rows=2)["mfu"]

    assert mfu(False) == mfu(True) == pytest.approx(3 * 100 * forward / 2.0 / 1e9)
    model.requires_grad_(False)
    assert mfu(True) == pytest.approx(2 * 100 * forward / 2.0 / 1e9)
    assert capsys.readouterr().out.count("MFU") == 3


def test_experts_that_a_token_does_not_go_to_are_no_operations(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, WITH_EXPERTS["mixtral"]))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    text = model.config.get_text_config()
    assert text.num_experts_per_tok < text.num_local_experts
    idle = experts * (1 - text.num_experts_per_tok / text.num_local_experts)
    looked_up = model.get_input_embeddings().weight.numel()
    assert perf.matmul_parameters(model) == sum(p.numel() for p in model.parameters()) - looked_up - idle


def test_no_mfu_is_printed_where_no_peak_is_known(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path))
    args = SimpleNamespace(gradient_checkpointing=False, dtype="fp32")
    assert "mfu" not in perf.print_throughput(model, args, 2.0, tokens=100, rows=2)
    assert "MFU" not in capsys.readouterr().out


def test_what_other_programs_hold_on_a_gpu_is_not_free(monkeypatch):
    monkeypatch.setattr(preflight, "get_accelerator", lambda: CUDA)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * 2**30, 80 * 2**30))
    machine = preflight.this_machine()
    assert (machine.on_cpu, machine.device, machine.baseline.device) == (False, 80 * 2**30, 20 * 2**30)


LENGTHS = [3 + i % 5 for i in range(13)]


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        return {"input_ids": [index] * LENGTHS[index], "answer_spans": [], "answers_only": False}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_batches_that_another_process_makes_are_the_same(monkeypatch):
    def epochs() -> list[dict]:
        sampler = StepBatchSampler(LENGTHS, 2, accumulation=2, group_by_length=True)
        loader, batches = make_loader(_Rows(), sampler, DataCollatorSFT(0, 8)), []
        for epoch, first_step in ((0, 1), (1, 0)):
            sampler.set_epoch(epoch, first_step)
            batches += list(loader)
        return batches

    here = epochs()
    state = torch.random.get_rng_state()
    monkeypatch.setattr(batching, "get_accelerator", lambda: CUDA)
    there = epochs()
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(here) == len(there) == 12
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loader_works_ahead_on_an_accelerator_alone(monkeypatch):
    def workers() -> int:
        return make_loader(_Rows(), StepBatchSampler(LENGTHS, 2), DataCollatorSFT(0, 8)).num_workers

    assert workers() == 0
    monkeypatch.setattr(batching, "get_accelerator", lambda: CUDA)
    assert workers() == 1


@pytest.mark.parametrize("dtype, sums", [("fp32", "bf16"), ("fp32", "fp16"), ("fp16", "fp32"), ("bf16", "fp16")])
def test_sums_of_gradients_that_lose_or_hide_something_are_refused(dtype, sums):
    with pytest.raises(UserError, match=f"--grad_accum_dtype {sums} with --dtype {dtype}"):
        check_grad_accum_dtype(argparse.Namespace(dtype=dtype, grad_accum_dtype=sums))


@pytest.mark.parametrize(
    "message, meaning",
    [
        (
            "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error (run with NCCL_DEBUG=INFO for details), "
            "NCCL version 2.27.3\nncclSystemError: System call (e.g. socket, malloc) or external library call failed",
            "NCCL_SOCKET_IFNAME",
        ),
        (
            "NCCL error in: NCCLUtils.cpp:88, unhandled system error (run with NCCL_DEBUG=INFO for details)\n"
            "Last error:\nError while creating shared memory segment /dev/shm/nccl-XqVLMK (size 9637888)",
            "--shm-size",
        ),
        (
            "NCCL error in: NCCLUtils.cpp:88, invalid usage (run with NCCL_DEBUG=WARN for details)\nLast error:\n"
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
            "two ranks compute on one GPU",
        ),
        (
            "NCCL communicator was aborted on rank 0.\nncclRemoteError: A call failed possibly due to a network error",
            "its process or its node has ended",
        ),
    ],
)
def test_what_nccl_says_is_told_in_words(message, meaning):
    assert meaning in meaning_of(torch.distributed.DistBackendError(message))


@pytest.mark.parametrize(
    "message, meaning",
    [
        (
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be",
            "was built for) (CUDA error: no kernel image is available for execution on the device)",
        ),
        (
            "Unexpected error from cudaGetDeviceCount(). Error 35: CUDA driver version is insufficient for the runtime",
            "a newer driver",
        ),
        ("CUDA error: uncorrectable ECC error encountered", "take another one"),
        ("NCCL error in: NCCLUtils.cpp:88, unhandled cuda error (run with NCCL_DEBUG=INFO for details)", "NCCL_DEBUG"),
    ],
)
def test_what_cuda_says_of_the_machine_is_told_in_words(message, meaning):
    assert meaning in meaning_of(RuntimeError(message))


def test_what_may_be_a_fault_of_the_code_keeps_its_traceback():
    for message in ("CUDA error: device-side assert triggered", "no kernel image", "mat1 and mat2 shapes"):
        assert meaning_of(RuntimeError(message)) is None


def test_a_full_gpu_is_told_with_what_helps():
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB."
    )
    assert meaning_of(error).startswith("CUDA out of memory. Tried to allocate 2.00 GiB. Fewer rows per device")


class _Operator:
    """A stand-in for DeepSpeed's builder."""

    NAME, error_log = "cpu_adam", "no compiler at all"

    def __init__(self, error):
        self.error = error

    def load(self):
        raise self.error


@pytest.mark.parametrize(
    "error, cure",
    [
        (
            CUDAMismatchException("Installed CUDA version 12.1 does not match the version torch was compiled with"),
            "nvcc",
        ),
        (
            OSError("CUDA_HOME environment variable is not set. Please set it to your CUDA install root."),
            "let CUDA_HOME",
        ),
        (RuntimeError("Error building extension 'cpu_adam': [1/3] c++ ..."), "own words stand above"),
        (ImportError("cpu_adam.so: undefined symbol: _ZN3c10"), "another torch or Python, delete"),
    ],
)
def test_an_operator_that_cannot_be_built_is_a_readable_error(monkeypatch, tmp_path, error, cure):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    accelerator = SimpleNamespace(create_op_builder=lambda name: _Operator(error))
    monkeypatch.setattr(operators, "get_accelerator", lambda: accelerator)
    monkeypatch.setitem(operators.deepspeed.ops.__compatible_ops__, "cpu_adam", True)
    with pytest.raises(UserError, match=f"cpu_adam cannot be built or loaded here: .*{cure}"):
        operators.load_operator("CPUAdamBuilder", "--offload")
    monkeypatch.setitem(operators.deepspeed.ops.__compatible_ops__, "cpu_adam", False)
    with pytest.raises(UserError, match=r"--offload needs DeepSpeed's CPUAdamBuilder.*: no compiler at all"):
        operators.load_operator("CPUAdamBuilder", "--offload")
    operators.load_operator("CPUAdamBuilder")  # a run that can do without
