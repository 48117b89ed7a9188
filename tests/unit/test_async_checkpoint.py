"""--async_checkpoint: the files, and what becomes of them, are those of checkpoints that training waits for."""

import errno
import io
import os
import signal
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers import assert_same_run, flags, killed_after
from transformers import AutoConfig

from utils import arguments
from utils.planning.engine_memory import GIB, Bytes, Machine
from utils.planning.estimate import engines_of_step, models_of_step
from utils.process.errors import EndOfRun, UserError
from utils.run import async_write, engine_state
from utils.run.async_write import WritesBeside, host_copy
from utils.run.checkpoint import Checkpoints
from utils.run.checkpoint_files import complete_checkpoints, newest_checkpoint


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_a_copy_is_saved_as_the_same_file_and_shares_no_memory_with_the_original():
    flat, group = torch.arange(12.0), [torch.ones(3)]
    state = OrderedDict(
        flat=flat,
        view=flat[2:8].view(2, 3).t(),
        twice=(group, group),
        weight=torch.nn.Parameter(torch.zeros(2)),
        master=flat.clone().requires_grad_() * 2,
        numbers={0: None, 1: torch.tensor(5)},
        half=torch.ones(2, dtype=torch.bfloat16),
        empty=torch.empty(0),
    )
    state["flat"].ds_id = 3
    before, copied = saved(state), host_copy(state)
    assert saved(copied) == before
    assert copied["view"].untyped_storage().data_ptr() == copied["flat"].untyped_storage().data_ptr()
    with torch.no_grad():
        for tensor in (flat, *group, state["weight"], state["master"], state["numbers"][1], state["half"]):
            tensor.fill_(7)
    assert saved(copied) == before and saved(state) != before


@pytest.fixture
def slow_disk(monkeypatch):
    """Files come to the disk when the next checkpoint is due, or the end: training has long changed its weights."""
    write, wait, waited_for = WritesBeside._write_all, WritesBeside.wait, {}

    def wait_first(self):
        assert waited_for.setdefault(id(self), threading.Event()).wait(60)
        write(self)

    def let_it_write(self):
        waited_for.setdefault(id(self), threading.Event()).set()
        wait(self)

    monkeypatch.setattr(WritesBeside, "_write_all", wait_first)
    monkeypatch.setattr(WritesBeside, "wait", let_it_write)
    yield
    for event in waited_for.values():
        event.set()


RLHF = "--enable_ema --actor_zero_stage 3 --critic_zero_stage 2"


@pytest.mark.parametrize(
    "step, more", [(1, "--zero_stage 2"), (2, "--zero_stage 0"), ("dpo", "--dtype bf16"), (3, RLHF)]
)
def test_its_files_are_those_that_would_have_been_written_when_it_was_due(
    run_step, start, tmp_path, slow_disk, monkeypatch, capsys, step, more
):
    put, due, folder = WritesBeside.put, tmp_path / "due", tmp_path / "beside/checkpoints"

    def put_and_write(self, write, content, path):
        put(self, write, content, path)
        file = due / Path(path).relative_to(folder).as_posix().lstrip(".")
        file.parent.mkdir(parents=True, exist_ok=True)
        write(content, file)

    monkeypatch.setattr(WritesBeside, "put", put_and_write)
    saving = flags(f"{more} --num_train_epochs 1 --checkpoint_steps 3 --keep_checkpoints 9 --async_checkpoint")
    run_step(step, [*start(step), *saving, "--output_dir", tmp_path / "beside"])
    count = len(complete_checkpoints(folder))
    assert capsys.readouterr().out.count("s for copies") == count > 0
    files = [file.relative_to(due) for file in due.rglob("*") if file.is_file()]
    assert len(files) >= 2 * count
    assert [name for name in files if (due / name).read_bytes() != (folder / name).read_bytes()] == []


def test_a_run_that_dies_while_one_is_written_goes_on_from_the_one_before(run_step, start, tmp_path, slow_disk):
    arguments = [*start(1), *flags("--checkpoint_steps 2 --async_checkpoint")]
    run_step(1, [*arguments, "--output_dir", tmp_path / "plain"])
    resumed = [*arguments, "--output_dir", tmp_path / "resumed", "--resume", "auto"]
    with killed_after(5):
        run_step(1, resumed)
    folder = tmp_path / "resumed/checkpoints"
    assert newest_checkpoint(folder).state["steps"] == 2 and (folder / ".step-00000004").exists()
    run_step(1, resumed)
    assert not list(folder.glob(".step*")) and (folder / "latest").read_text() == "step-00000016\n"
    assert_same_run(tmp_path / "plain", tmp_path / "resumed")


def test_it_counts_at_the_end_of_the_first_step_by_which_it_is_on_the_disk(run_step, start, tmp_path, monkeypatch):
    end_step, folder, known = Checkpoints.end_step, tmp_path / "checkpoints", {}

    def watched(self, *position):
        if self._writer._pending is not None:
            assert self._writer._pending.steps == 2 and not (folder / "step-00000002").exists()
            self._writer._pending.files._written.result()
        end_step(self, *position)
        known[self.steps] = (folder / "latest").exists()

    monkeypatch.setattr(Checkpoints, "end_step", watched)
    with killed_after(3):
        run_step(1, [*start(1), *flags("--checkpoint_steps 2 --async_checkpoint", output_dir=tmp_path)])
    assert known == {1: False, 2: False, 3: True}


def test_a_file_that_cannot_be_written_ends_the_run_with_its_reason(run_step, start, tmp_path, monkeypatch):
    def refuse(content, path):
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        async_write.write_tensors(content, path)

    monkeypatch.setattr(engine_state, "write_tensors", refuse)
    message = (
        r"step 4 could not be written to .*checkpoints, where .* No space left .*model_states.pt'; the last .*00002"
    )
    with pytest.raises(UserError, match=message):
        run_step(1, [*start(1), *flags("--checkpoint_steps 2 --async_checkpoint", output_dir=tmp_path)])
    assert not list((tmp_path / "checkpoints").glob(".step*"))


def test_a_test_run_and_a_stopped_one_wait_for_theirs(run_step, start, tmp_path, slow_disk, monkeypatch):
    saving = "--checkpoint_steps 2 --async_checkpoint"
    stop = flags(f"{saving} --enable_test_mode --test_stop_step 2", output_dir=tmp_path / "test")
    run_step(3, [*start(3), *stop])
    assert newest_checkpoint(tmp_path / "test/checkpoints").state["steps"] == 2
    end_step = Checkpoints.end_step

    def signalled(self, *position):
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        end_step(self, *position)

    monkeypatch.setattr(Checkpoints, "end_step", signalled)
    with pytest.raises(EndOfRun, match="stopped by SIGTERM after 3 steps"):
        run_step(1, [*start(1), *flags(saving, output_dir=tmp_path / "stopped")])
    found = complete_checkpoints(tmp_path / "stopped/checkpoints")
    assert [checkpoint.state["steps"] for checkpoint in found] == [2, 3]


def test_it_is_refused_where_no_checkpoint_would_be_due(run_step, start, tmp_path):
    with pytest.raises(UserError, match="--async_checkpoint needs regular checkpoints: --checkpoint_steps N"):
        run_step(1, [*start(1), *flags("--async_checkpoint", output_dir=tmp_path)])


@pytest.mark.parametrize("step, more", [(1, "--zero_stage 2"), (2, "--zero_stage 0"), (1, "--zero_stage 3"), (3, RLHF)])
def test_the_copies_that_a_dry_run_counts_are_as_large_as_the_files(run_step, start, tmp_path, step, more):
    given = [*start(step), *flags(f"{more} --checkpoint_steps 4 --keep_checkpoints 1 --async_checkpoint")]
    given += ["--num_train_epochs", "1", "--output_dir", tmp_path]
    args = arguments.settle(arguments.build_parser(step).parse_args([str(word) for word in given]), step)
    names = {"actor": "actor_model_name_or_path", "critic": "critic_model_name_or_path"}
    names = names if step == 3 else {"model": "model_name_or_path"}
    configs = {name: AutoConfig.from_pretrained(getattr(args, flag)) for name, flag in names.items()}
    models = models_of_step(args, step, configs)
    engines = engines_of_step(args, step, models, Machine(1, 1, True, GIB, GIB, Bytes()))
    copied = sum(engine.resident.get("copy for a checkpoint", Bytes()).host for engine in engines.values())
    run_step(step, given)
    files = [file for file in (tmp_path / "checkpoints").rglob("*") if file.suffix in (".pt", ".safetensors")]
    assert copied == pytest.approx(sum(file.stat().st_size for file in files), rel=0.1)
