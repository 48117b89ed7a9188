"""Several nodes: what may differ between them, what may not, and that files which others read are left in place."""

import pytest
from helpers import flags

from utils.arguments.run import OF_A_NODE
from utils.process import ranks
from utils.process.errors import UserError
from utils.process.files import name_if_new, scratch_beside


@pytest.fixture
def two_hosts(monkeypatch):
    """Whatever this rank says, another on host b says with a change: two_hosts["--flag"] = value there."""
    changes = {}

    def gather(mine):
        if not isinstance(mine, tuple) or not isinstance(mine[0], dict):
            return [mine]  # not what is compared here
        return [mine, (mine[0] | {name: changes[name] for name in mine[0].keys() & changes.keys()}, "b")]

    monkeypatch.setattr(ranks, "all_gather_objects", gather)
    monkeypatch.setattr(ranks.socket, "gethostname", lambda: "a")
    return changes


def test_a_flag_or_data_that_differs_between_nodes_is_named_with_both_hosts(
    two_hosts, run_step, model_folder, pairs_folder, tmp_path
):
    places = dict(data_path=pairs_folder, data_output_path=tmp_path / "cache", output_dir=tmp_path / "out")
    arguments = flags("--dtype fp32", model_name_or_path=model_folder, **places)
    two_hosts["--learning_rate"] = "0.5"
    message = r"--learning_rate must be the same on every node: it is 2e-05 on a, the first, and 0\.5 on b"
    with pytest.raises(UserError, match=message):
        run_step(1, arguments)
    two_hosts.clear()
    two_hosts["the checksum of data and tokenizer"] = "0123"
    with pytest.raises(UserError, match=r"the checksum of data .* must be the same on every node: .* 0123 on b"):
        run_step(1, arguments)
    assert not (tmp_path / "out/metrics.jsonl").exists() and not list(tmp_path.glob("cache/*"))


def test_places_may_differ_between_nodes_and_what_shapes_the_training_may_not():
    for name in ("output_dir", "data_path", "data_output_path", "actor_model_name_or_path", "local_rank", "resume"):
        assert OF_A_NODE.search(name), name
    for name in ("learning_rate", "data_split", "dtype", "seed", "offload_reward_model", "actor_zero_stage", "top_p"):
        assert not OF_A_NODE.search(name), name


def test_a_file_that_others_may_have_mapped_is_not_replaced(tmp_path):
    path, inodes = tmp_path / "rows.arrow", []
    for content in ("first", "second"):
        with scratch_beside(path) as scratch:
            scratch.write_text(content)
            name_if_new(scratch, path)
        inodes.append(path.stat().st_ino)
    assert path.read_text() == "first" and inodes[0] == inodes[1]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.arrow"]
