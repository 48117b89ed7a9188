"""What cannot work is refused before any training, with a reason, by every rank, and without a traceback."""

import pytest
from helpers import SCRIPTS, flags, launch


@pytest.fixture
def good(model_folder, pairs_folder, cache_folder, tmp_path):
    """Arguments of step 1 that work; of a flag that is given again, the second counts."""
    places = dict(data_path=pairs_folder, data_output_path=cache_folder, output_dir=tmp_path / "out")
    text = "--data_split 1,1,1 --dtype fp32 --max_train_samples 8"
    return flags(text, model_name_or_path=model_folder, **places)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_process_ends_with_one_readable_line_and_code_1_on_all_ranks(good, tmp_path, ranks):
    arguments = [*good, *flags(data_path=tmp_path / "nowhere.jsonl")]
    code, console = launch(1, arguments, launcher="torchrun" if ranks == 2 else "python", ranks=ranks)
    assert code != 0
    assert console.count("error: ") >= 1
    assert "nowhere.jsonl" in console
    assert "Traceback" not in console.split("error: ")[0]


def test_an_unwritable_output_folder_is_refused_by_two_ranks_without_a_hang(good, tmp_path):
    (tmp_path / "file").write_text("")
    code, console = launch(1, [*good, *flags(output_dir=tmp_path / "file/out")], launcher="deepspeed", ranks=2)
    assert code != 0
    assert "cannot be written" in console


def test_an_error_of_one_rank_alone_is_told():
    code, console = launch(SCRIPTS / "fails_on_one_rank.py", [], launcher="torchrun", ranks=2)
    assert code != 0
    assert "error: rank 1: only here" in console


@pytest.mark.parametrize("usable", [True, False])
def test_a_failure_of_the_rank_that_reads_the_rows_reaches_the_other(good, tmp_path, usable):
    """It meets the damage while it prepares the data, or before: where no row can be used it looks at them all."""
    file, chosen = tmp_path / "late.csv", "yes" if usable else ""
    lines = ["prompt,chosen,rejected", *(f" Human: {i} Assistant:,{chosen},no" for i in range(300))]
    lines[250] += ",more"  # found only when the whole file is read, by the first rank alone
    file.write_text("\n".join(lines) + "\n")
    arguments = [*good, *flags("--data_split 1,0,0 --max_train_samples 300", data_path=file)]
    code, console = launch(1, arguments, launcher="torchrun", ranks=2)
    assert code != 0
    assert "late.csv" in console
    assert "line 251" in console
    assert "Traceback" not in console.split("error: ")[0]
