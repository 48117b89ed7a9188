"""The precision that a machine computes in, decided in one place."""

from types import SimpleNamespace

import pytest
import torch
from helpers import flags

from utils import precision
from utils.generation.saved_model import choose_dtype


def machine(monkeypatch, avx512_bf16=False, amx=False, onednn=True, arch="x86_64"):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(precision.platform, "machine", lambda: arch)
    monkeypatch.setattr(precision, "_onednn_has_bf16", lambda: onednn)


@pytest.mark.parametrize(
    ("hardware", "dtype"),
    [
        ({"avx512_bf16": True}, "bf16"),
        ({"amx": True}, "bf16"),
        ({}, "fp32"),  # AVX512 without bf16: oneDNN emulates it
        ({"onednn": False}, "fp32"),  # AVX2
        ({"arch": "aarch64"}, "bf16"),
        ({"arch": "arm64", "onednn": False}, "fp32"),
    ],
)
def test_a_cpu_trains_in_bf16_only_where_it_has_it(monkeypatch, hardware, dtype):
    machine(monkeypatch, **hardware)
    assert precision.default_dtype("cpu").dtype == dtype
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [("Tesla V100", (7, 0), "fp16"), ("Tesla T4", (7, 5), "fp16"), ("A100", (8, 0), "bf16"), ("H100", (9, 0), "bf16")],
)
def test_a_cuda_gpu_by_its_compute_capability(monkeypatch, name, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # it counts emulation
    choice = precision.default_dtype("cuda")
    assert choice.dtype == dtype and name in choice.reason
    device = SimpleNamespace(type="cuda")
    assert choose_dtype("auto", device) == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


def test_a_slow_choice_is_said_with_the_measured_ratio(monkeypatch):
    machine(monkeypatch, onednn=False)
    monkeypatch.setattr(precision, "_products_per_second", lambda dtype: 1.0 if dtype is torch.bfloat16 else 50.0)
    assert "50 times faster in fp32" in precision.warning_of("bf16", "cpu")
    assert precision.warning_of("fp32", "cpu") is None and precision.warning_of("bf16", "cuda") is None
    monkeypatch.setattr(precision, "_products_per_second", lambda dtype: 50.0)
    assert precision.warning_of("bf16", "cpu") is None


def test_products_are_really_measured():
    assert precision.speed_against_fp32("fp32") > 0.1


def test_a_run_says_its_precision_and_why(monkeypatch, run_step, model_folder, pairs_folder, cache_folder, capsys):
    places = dict(model_name_or_path=model_folder, data_path=pairs_folder, data_output_path=cache_folder)
    machine(monkeypatch, onednn=False)
    run_step(1, flags("--dry_run --max_train_samples 8", **places))
    printed = capsys.readouterr().out
    assert "training in fp32: this processor only emulates bf16" in printed
