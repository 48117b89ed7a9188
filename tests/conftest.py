"""Fixtures that tests of several files share: models, data, and a step's main() inside the test process."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two workers that each take both cores for one small matrix wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As in an environment that is active: another ninja than that of the ranks would build DeepSpeed's operators anew.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

import pytest
import torch
from helpers import PROJECT, STEPS, load_main, make_model, make_reward_model, step_arguments, write_pairs
from xdist.scheduler import LoadScopeScheduling


def pytest_configure(config):
    torch.set_num_threads(1)


class LaunchesInOneWorker(LoadScopeScheduling):
    """pytest-xdist: a file's tests share its fixtures in one worker, and one worker alone launches ranks."""

    LAUNCHING = ("tests/launch/", "tests/slow/test_checkpoint_on_ranks.py", "tests/slow/test_invariance.py")

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "launches" if file.startswith(self.LAUNCHING) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return LaunchesInOneWorker(config, log)


@pytest.fixture(autouse=True)
def own_answer_to_signals():
    """A run that ends by an error leaves its answer to signals behind, as its process is to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, answer in before.items():
        signal.signal(number, answer)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.jsonl", 60)
    write_pairs(folder / "eval.jsonl", 20)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run_step(monkeypatch):
    """Run a step's main() inside the test process: run_step(1, [...])."""

    def run(step: int, arguments):
        main = load_main(step).main
        monkeypatch.setattr(sys, "argv", [str(STEPS[step]), *map(str, arguments)])
        main()

    return run


@pytest.fixture
def merge_lora(monkeypatch, tmp_path):
    """Run inference/merge_lora.py inside the test process: merge_lora(adapter, flags...) -> the merged folder."""

    def run(adapter: Path, *flags, output: str = "merged") -> Path:
        sys.path.insert(0, str(PROJECT / "inference"))
        import merge_lora

        arguments = ["--adapter", adapter, "--output_dir", tmp_path / output, *flags]
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", *map(str, arguments)])
        merge_lora.main()
        return tmp_path / output

    return run


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """What the steps start from: the folders ``actor`` and ``reward``, a file of plain text, settings of DeepSpeed."""
    base = tmp_path_factory.mktemp("models")
    make_reward_model(base / "reward", make_model(base / "actor"))
    (base / "text.txt").write_text("".join(f"the house is {color}, thanks.\n" for color in ("red", "blue")) * 20)
    # DeepSpeed reserves 2 GB for each ZeRO-3 engine; many runs in one process could then not fork any more.
    (base / "buckets.json").write_text('{"zero_optimization": {"reduce_bucket_size": 1000000}}')
    return base


@pytest.fixture
def start(small_models, pairs_folder, cache_folder):
    """step -> the arguments every run of it has."""
    return lambda step: step_arguments(step, small_models, pairs_folder, cache_folder)
