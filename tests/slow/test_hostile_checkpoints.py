"""A table of checkpoints that were made, or happen, to do harm.

Each is refused with the file before a step is trained; nothing of it is executed, and the run's own files stay.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import killed_after
from safetensors.torch import load_file, save_file

from utils.process.errors import UserError
from utils.run.checkpoint_files import newest_checkpoint, read_checkpoint

NAME, STATE, RANK = "step-00000002", "state.json", "rank00000.json"
WEIGHTS, OPTIMIZER = "actor/mp_rank_00_model_states.pt", "actor/zero_pp_rank_0_mp_rank_00_optim_states.pt"
EMA = "actor_ema-rank00000.safetensors"
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def resume(run_step, start, saved, tmp_path):
    """resume(damage, flags...): take up a damaged copy of a checkpoint of step 3, ZeRO-2 with EMA, made once."""
    arguments = [*start(3), "--actor_zero_stage", 2, "--enable_ema", "--checkpoint_steps", 2]
    if not (saved / "checkpoints").exists():
        with killed_after(2):
            run_step(3, [*arguments, "--output_dir", saved])
    folder = Path(shutil.copytree(saved / "checkpoints" / NAME, tmp_path / "elsewhere" / NAME))

    def run(damage=None, *more):
        if damage is not None:
            damage(folder)
        run_step(3, [*arguments, *more, "--output_dir", tmp_path / "out", "--resume", folder])

    return run


# ---------------------------------------------------------------- ways to damage a checkpoint


def _sized(folder: Path, *names: str) -> None:
    """Let the state file agree with the sizes of these files, as whoever means harm would."""
    state = json.loads((folder / STATE).read_text())
    state["files"] |= {name: (folder / name).stat().st_size for name in names}
    (folder / STATE).write_text(json.dumps(state))


def text(name, content):
    def damage(folder):
        (folder / name).write_bytes(content) if isinstance(content, bytes) else (folder / name).write_text(content)
        if name != STATE:
            _sized(folder, name)

    return damage


def state(**changes):
    def damage(folder):
        content = json.loads((folder / STATE).read_text()) | changes
        (folder / STATE).write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return damage


def files(change):
    return lambda folder: state(files=change(json.loads((folder / STATE).read_text())["files"]))(folder)


def rank(edit):
    def damage(folder):
        content = json.loads((folder / RANK).read_text())
        edit(content)
        text(RANK, json.dumps(content))(folder)

    return damage


def tracked(name, value):
    return rank(lambda content: content["tracked"].update({name: value}))


def as_pipe(name):
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def as_link(name, target):
    return lambda folder: ((folder / name).unlink(), (folder / name).symlink_to(target))


def moved_out(folder):
    (folder / "actor").rename(folder.parent / "actor")
    (folder / "actor").symlink_to(folder.parent / "actor")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(name, make):
    def damage(folder):
        torch.save(make(folder), folder / name)
        _sized(folder, name)

    return damage


def loaded(name, edit):
    def damage(folder):
        content = torch.load(folder / name, weights_only=False)
        edit(content)
        torch.save(content, folder / name)
        _sized(folder, name)

    return damage


def ema(edit):
    def damage(folder):
        content = load_file(folder / EMA)
        edit(content)
        save_file(content, folder / EMA)
        _sized(folder, EMA)

    return damage


def _first(content: dict) -> str:
    return next(iter(content))


NOT_ONE, NOT_WHOLE, UNREADABLE, OTHER = "is no checkpoint", "not a whole", "could not be read", "does not hold"
CASES = {
    "state: nothing": (text(STATE, ""), NOT_ONE),
    "state: a list": (text(STATE, "[]"), NOT_ONE),
    "state: nested too deeply": (text(STATE, DEEP), NOT_ONE),
    "state: not UTF-8": (text(STATE, b"\xff\xfe"), NOT_ONE),
    "state: a pipe": (as_pipe(STATE), NOT_ONE),
    "state: an endless device": (as_link(STATE, "/dev/zero"), NOT_ONE),
    "state: a loop of links": (as_link(STATE, STATE), NOT_ONE),
    "state: 65 MiB": (text(STATE, " " * (65 * 2**20)), NOT_ONE),
    "state: no files": (state(files=...), NOT_ONE),
    "state: files in a list": (state(files=[1]), NOT_ONE),
    "state: a size in words": (files(lambda files: files | {RANK: "large"}), NOT_ONE),
    "state: a negative size": (files(lambda files: files | {RANK: -1}), NOT_ONE),
    "state: a file above": (files(lambda files: files | {"../../../../etc/passwd": 1}), "outside of it"),
    "state: a file anywhere": (files(lambda files: files | {"/etc/passwd": 1}), "outside of it"),
    "state: a file too many": (files(lambda files: files | {"more": 1}), NOT_WHOLE),
    "state: a position in words": (state(position=["one", 2]), NOT_ONE),
    "state: a position of three": (state(position=[0, 1, 2]), NOT_ONE),
    "state: a negative step": (state(steps=-5), NOT_ONE),
    "state: ranks in words": (state(world_size="1"), NOT_ONE),
    "state: no flags": (state(flags=...), NOT_ONE),
    "state: metrics without files": (state(metrics={}), NOT_ONE),
    "state: metrics of negative size": (state(metrics={"seconds": 1, "files": {"metrics.jsonl": [-5, 0]}}), NOT_ONE),
    "state: metrics in words": (state(metrics={"seconds": "x", "files": {}}), NOT_ONE),
    "state: other rows": (state(rows="0123"), "its training rows were other ones"),
    "a shard cut short": (lambda f: os.truncate(f / WEIGHTS, 1000), NOT_WHOLE),
    "a shard cut short, and its size with it": (
        lambda f: (os.truncate(f / WEIGHTS, 1000), _sized(f, WEIGHTS)),
        UNREADABLE,
    ),
    "a shard that is empty": (text(WEIGHTS, b""), UNREADABLE),
    "a shard missing": (lambda f: (f / OPTIMIZER).unlink(), NOT_WHOLE),
    "a folder of shards that lies elsewhere": (moved_out, "outside of it"),
    "a pickle bomb for weights": (pickled(WEIGHTS, lambda f: {"module": Bomb(f / "RAN")}), UNREADABLE),
    "a pickle bomb for the optimizer": (pickled(OPTIMIZER, lambda f: [Bomb(f / "RAN")]), UNREADABLE),
    "a bare pickle": (text(WEIGHTS, b"cos\nmkdir\n(S'RAN'\ntR."), UNREADABLE),
    "weights that are a list": (pickled(WEIGHTS, lambda f: [1, 2]), OTHER),
    "weights without one of them": (
        loaded(WEIGHTS, lambda content: content["module"].pop(_first(content["module"]))),
        OTHER,
    ),
    "weights of another shape": (
        loaded(WEIGHTS, lambda c: c["module"].update({_first(c["module"]): torch.zeros(3)})),
        OTHER,
    ),
    "no weights": (pickled(WEIGHTS, lambda f: {}), OTHER),
    "an optimizer of nothing": (pickled(OPTIMIZER, lambda f: {}), OTHER),
    "an average that is no safetensors": (text(EMA, b"\xff" * 100), OTHER),
    "an average with a header without end": (text(EMA, b"\xff" * 7 + b"\x7f" + b"{}"), OTHER),
    "an average without a weight": (ema(lambda content: content.pop(_first(content))), OTHER),
    "an average of another shape": (ema(lambda c: c.update({_first(c): torch.zeros(3)})), OTHER),
    "rank: nothing": (text(RANK, ""), RANK),
    "rank: a list": (text(RANK, "[]"), OTHER),
    "rank: nested too deeply": (text(RANK, DEEP), RANK),
    "rank: no random states": (rank(lambda content: content.pop("random")), OTHER),
    "rank: numbers that torch has not": (rank(lambda content: content["random"].update(torch=[1, 2])), OTHER),
    "rank: numbers beyond bytes": (rank(lambda content: content["random"].update(torch=[10**9] * 5056)), OTHER),
    "rank: a generator of another kind": (tracked("shuffler", {"bit_generator": "MT19937"}), OTHER),
    "rank: nothing tracked": (rank(lambda content: content.update(tracked={})), OTHER),
    "rank: a method for a number": (tracked("nonfinite", {"skipped": 0, "found": 1}), OTHER),
    "rank: words for a number": (tracked("nonfinite", {"skipped": "none"}), OTHER),
    "rank: a KL weight in words": (tracked("trainer", {"kl_ctl": "much", "skipped_updates": 0}), OTHER),
}


OF_ENGINES = [case for case in CASES if "weight" in case or "optimizer" in case or "average" in case]


@pytest.mark.parametrize(
    ("case", "more"),
    [
        *((case, "") for case in CASES),
        # Read weight by weight, for another layout.
        *(pytest.param(case, "--actor_zero_stage 3", marks=pytest.mark.nightly) for case in OF_ENGINES),
        ("a pickle bomb for the optimizer", "--actor_zero_stage 3"),
        ("weights of another shape", "--actor_zero_stage 1"),
        ("an average of another shape", "--actor_zero_stage 3"),
    ],
)
def test_what_is_refused(case, more, resume, tmp_path, capsys, monkeypatch):
    damage, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match=message) as refusal:
        resume(damage, *more.split())
    assert "elsewhere" in str(refusal.value)
    assert "Epoch: 0 | Step" not in capsys.readouterr().out
    assert not list(tmp_path.rglob("RAN*"))
    assert (tmp_path / "out/mine.txt").read_text() == "mine" and not list(tmp_path.glob("out/*/*.safetensors"))


@pytest.mark.parametrize("more", ["", "--actor_zero_stage 3"])
def test_the_same_copy_without_damage_is_taken_up(resume, capsys, more):
    resume(None, *more.split())
    assert f"{NAME}: 2 steps are done" in capsys.readouterr().out


def test_names_that_lead_elsewhere_are_not_followed(resume, saved, tmp_path):
    """``latest`` names a folder beside itself, whatever it says; what is no file is passed over."""
    folder = Path(shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints"))
    outside = Path(shutil.copytree(folder / NAME, tmp_path / "step-00000009"))
    (folder / "latest").write_text(f"../{outside.name}\n")
    assert newest_checkpoint(folder).folder == folder / NAME
    (folder / "latest").unlink()
    os.mkfifo(folder / "latest")
    assert newest_checkpoint(folder).folder == folder / NAME
    assert read_checkpoint(outside).state["steps"] == 2
