"""No run writes over what another one left, or over what it starts from; a run that saves nothing says so."""

import shutil
from pathlib import Path

import pytest
from helpers import flags, read_metrics

from utils.process.errors import UserError

DRY = "--dry_run"


@pytest.fixture
def run(run_step, start, tmp_path):
    """run(step, flags..., output=folder) with the folder tmp_path/out."""

    def run(step, text="", output=None):
        run_step(step, [*start(step), *flags(text, output_dir=output or tmp_path / "out")])

    return run


def test_a_second_run_into_a_folder_is_refused_until_it_is_asked_for(run, tmp_path):
    run(1)
    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    for text in ("", DRY):
        with pytest.raises(UserError) as refused:
            run(1, text)
        if text == "":
            for part in ("a model (", "a run's metrics (", "--overwrite_output_dir", "--resume"):
                assert part in str(refused.value)
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before
    run(1, "--overwrite_output_dir --learning_rate 0.01")
    assert max(row["train/lr"] for row in read_metrics(tmp_path / "out")) == 0.01
    run(1, "--resume auto --checkpoint_steps 100")  # a start that may be the second of its run is no other run


@pytest.mark.parametrize("part", ["actor", "critic", "actor_ema"])
def test_a_model_of_step_3_is_found_too(run, tmp_path, part, small_models):
    shutil.copytree(small_models / "actor", tmp_path / "out" / part)
    with pytest.raises(UserError, match=rf"holds a model \(.*out/{part}\)"):
        run(1)


@pytest.mark.parametrize("kept", ["notes.txt", "checkpoints/x", "metrics.jsonl"])
def test_what_is_no_result_is_in_nobody_s_way(run, tmp_path, kept):
    (tmp_path / "out" / kept).parent.mkdir(parents=True)
    (tmp_path / "out" / kept).touch()  # metrics without a row are of a run that failed before its first step
    run(1)


@pytest.mark.parametrize("more", ["", DRY, "--overwrite_output_dir", "--resume auto --checkpoint_steps 5"])
@pytest.mark.parametrize("place", ["", "below"])
def test_the_model_that_a_run_starts_from_is_never_written_over(
    run_step, start, tmp_path, small_models, more, place, capsys
):
    model = Path(shutil.copytree(small_models / "actor", tmp_path / "model"))
    arguments = [*start(1), *flags(more, model_name_or_path=model, output_dir=model / place)]
    with pytest.raises(UserError) as refused:
        run_step(1, arguments)
    said = str(refused.value) + capsys.readouterr().out
    assert f"would write into {model}, the model of --model_name_or_path that the run starts from" in said
    assert not (model / "below").exists() and not (model / "metrics.jsonl").exists()


def test_step_3_may_stand_above_its_models_but_not_on_them(run, tmp_path, small_models):
    actor = Path(shutil.copytree(small_models / "actor", tmp_path / "out/actor"))
    with pytest.raises(UserError, match=r"would write into .*out/actor, the model of --actor_model_name_or_path"):
        run(3, f"--overwrite_output_dir --actor_model_name_or_path {actor}")
    beside = Path(shutil.move(actor, tmp_path / "out/sft"))
    run(3, f"{DRY} --actor_model_name_or_path {beside}")


def _left_by_a_run(output: Path) -> set[str]:
    return {str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()}


EVERYTHING = "--save_best --eval_interval 4 --save_interval 8 --checkpoint_steps 8"


def test_what_an_earlier_run_left_goes_at_the_first_row_and_nothing_else_does(run, tmp_path, capsys):
    out = tmp_path / "out"
    run(1, EVERYTHING)
    for user_file in ("notes.txt", "best/notes.txt", "step-000008/README.md", "actor/vocab.json", "step-8/config.json"):
        (out / user_file).parent.mkdir(exist_ok=True)
        (out / user_file).write_text("mine")
    earlier = _left_by_a_run(out)
    assert {"best/best.json", "step-000016/model.safetensors", "checkpoints/finished.json"} < earlier
    with pytest.raises(UserError):  # seen after the folder was
        run(1, "--overwrite_output_dir --max_seq_len 4000")
    assert _left_by_a_run(out) == earlier

    capsys.readouterr()
    run(1, "--overwrite_output_dir")
    said = [line for line in capsys.readouterr().out.splitlines() if "--overwrite_output_dir: removed" in line]
    parts = "best/, step-000008/, step-000016/, a model, 2 checkpoint(s), metrics.jsonl"
    assert said == [f"--overwrite_output_dir: removed what an earlier run left in {out}: {parts}"]
    mine = {file for file in _left_by_a_run(out) if (out / file).read_bytes() == b"mine"}
    assert len(mine) == 5
    new = {"metrics.jsonl", "run_config.yaml", "config.json", "model.safetensors", "README.md"}
    assert new < _left_by_a_run(out) - mine
    assert not [file for file in _left_by_a_run(out) - mine if "/" in file and file != "checkpoints/.lock"]


def test_a_resumed_run_removes_nothing(run, tmp_path, capsys):
    out = tmp_path / "out"
    run(1, f"{EVERYTHING} --keep_checkpoints 1")
    (out / "checkpoints/finished.json").unlink()
    earlier = _left_by_a_run(out)
    run(1, f"{EVERYTHING} --overwrite_output_dir --resume auto --keep_checkpoints 1")
    assert "resumed from" in (printed := capsys.readouterr().out) and "removed what" not in printed
    assert earlier <= _left_by_a_run(out)


def test_checkpoints_of_an_earlier_run_are_replaced_where_they_lie_in_the_output_folder(run, tmp_path):
    run(1, "--checkpoint_steps 8")
    run(1, "--checkpoint_steps 5 --overwrite_output_dir")
    assert sorted(entry.name[-2:] for entry in (tmp_path / "out/checkpoints").glob("step-*")) == ["10", "15"]
    elsewhere = f"--checkpoint_steps 8 --overwrite_output_dir --checkpoint_dir {tmp_path / 'elsewhere'}"
    run(1, elsewhere)  # a folder of their own is another matter
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        run(1, elsewhere)


@pytest.mark.parametrize("part", ["best", "step-000008"])
def test_a_kept_model_of_the_run_before_is_no_start_of_one_that_would_remove_it(run, tmp_path, part):
    run(1, EVERYTHING)
    with pytest.raises(UserError, match=rf"would write into .*out/{part}, the model of"):
        run(1, f"--overwrite_output_dir --model_name_or_path {tmp_path / 'out' / part}")


def test_models_behind_links_are_not_the_folder_s_own(run, tmp_path, small_models):
    elsewhere = Path(shutil.copytree(small_models / "actor", tmp_path / "elsewhere"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/best").symlink_to(elsewhere)
    run(1, "--overwrite_output_dir")
    assert (elsewhere / "config.json").is_file() and (elsewhere / "model.safetensors").is_file()


def test_step_3_without_a_moving_average_leaves_none_of_the_run_before(run, tmp_path):
    run(3, "--enable_ema")
    assert (tmp_path / "out/actor_ema/config.json").is_file()
    run(3, "--overwrite_output_dir")
    assert not (tmp_path / "out/actor_ema").exists() and (tmp_path / "out/actor/config.json").is_file()


def test_a_run_that_saves_nothing_says_so_first_and_last(run_step, start, capsys, tmp_path):
    run_step(1, start(1))
    printed = capsys.readouterr().out
    first, last = (i for i, line in enumerate(printed.splitlines()) if "nothing is saved: no --output_dir" in line)
    assert first < printed[: printed.index("***** Running")].count("\n") and last == printed.count("\n") - 1
    with pytest.raises(UserError):
        run_step(1, [*start(1), DRY, "--max_seq_len", "4000"])
    assert "nothing is saved: no --output_dir" in capsys.readouterr().out
    run_step(1, [*start(1), "--checkpoint_dir", tmp_path / "checkpoints"])
    assert capsys.readouterr().out.count("nothing but checkpoints is saved: no --output_dir") == 2
    run_step(1, [*start(1), "--output_dir", tmp_path / "out"])
    assert "is saved" not in capsys.readouterr().out
