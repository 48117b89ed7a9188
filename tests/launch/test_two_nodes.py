"""The multi_node recipes on two nodes that share nothing they need not share; see two_nodes.py.

Where the rights to make such nodes are missing, all of it is skipped with the reason.
"""

import json
import re
import shlex
import time
from pathlib import Path

import psutil
import pytest
import torch
import two_nodes
from helpers import (
    BINARIES,
    PROJECT,
    STEPS,
    flags,
    make_model,
    make_reward_model,
    read_metrics,
    run_command,
    run_in_one_launch,
    write_pairs,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from two_nodes import TwoNodes

REASON = two_nodes.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"two nodes cannot be made: {REASON}")
RECIPE = "training_scripts/step{}_{}_finetuning/qwen3/multi_node/run_8b.sh"
SFT, PPO = PROJECT / RECIPE.format(1, "supervised"), PROJECT / RECIPE.format(3, "rlhf")
PATIENCE = 240  # seconds for one launch
EPOCHS = "--num_train_epochs 30 --max_eval_samples 4"  # of three steps each


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What both nodes find at the same place: models and pairs."""
    folder = tmp_path_factory.mktemp("shared")
    make_reward_model(folder / "reward", make_model(folder / "actor"))
    config = json.loads((folder / "reward/config.json").read_text())
    scale = {"reward_score_mean": 0.1, "reward_score_std": 0.5}  # as step 2 leaves them
    (folder / "reward/config.json").write_text(json.dumps(config | scale))
    (folder / "pairs").mkdir()
    write_pairs(folder / "pairs/train.jsonl", 60)
    write_pairs(folder / "pairs/eval.jsonl", 20)
    return folder


def sft(shared, output, cache, more=""):
    """Arguments of the recipe of step 1: output folder and stage, then flags."""
    text = f"""
        --dtype fp32 --max_seq_len 48 --per_device_train_batch_size 2 --learning_rate 1e-3
        --lr_scheduler_type constant --num_warmup_steps 0 --log_interval 1000000 {more}
    """
    places = dict(model_name_or_path=shared / "actor", data_path=shared / "pairs", data_output_path=cache)
    return [output, 3, *flags(text, **places)]


def ppo(shared, output, cache):
    """Arguments of the recipe of step 3: both models, both stages and the output folder, then flags."""
    text = """
        --dtype fp32 --max_prompt_seq_len 24 --max_answer_seq_len 8 --num_warmup_steps 0
        --per_device_generation_batch_size 2 --actor_learning_rate 1e-3 --critic_learning_rate 1e-3
        --enable_ema --enable_test_mode --test_stop_step 2
    """
    recipe = [shared / "actor", shared / "reward", 3, 3, output]
    return [*recipe, *flags(text, data_path=shared / "pairs", data_output_path=cache)]


@pytest.fixture(scope="module")
def one_node(shared, tmp_path_factory):
    """The same flags on two ranks of one node: the folder with ``sft`` and ``ppo``."""
    folder = tmp_path_factory.mktemp("one_node")
    runs = []
    for step, recipe, arguments in (
        (1, SFT, sft(shared, folder / "sft", folder / "cache", EPOCHS)),
        (3, PPO, ppo(shared, folder / "ppo", folder / "cache")),
    ):
        code, printed = run_command(["bash", recipe, *arguments], DRY_RUN="1")
        assert code == 0, printed
        words = shlex.split(printed)
        main = next(i for i, word in enumerate(words) if word.endswith("/main.py"))
        runs.append((step, words[main + 1 :]))
    run_in_one_launch(runs, folder)
    return folder


@pytest.fixture
def nodes(tmp_path):
    with TwoNodes(tmp_path) as both:
        yield both


def logs(nodes) -> str:
    return "".join(f"\n===== {node.name}\n{node.log.read_text()}" for node in nodes)


def assert_same_figures(rows, expected, names):
    """Equal to the last bit: a sum over two ranks has one order only."""
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        for name in names:
            assert row[f"train/{name}"] == other[f"train/{name}"], name


def prepared(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("tokenised/*")}


@pytest.mark.nightly
def test_ppo_on_two_nodes_is_ppo_on_two_ranks_and_the_first_node_has_the_whole_model(nodes, one_node, shared):
    nodes.start_recipe(PPO, ppo(shared, nodes.local / "out", nodes.local / "cache"))
    assert nodes.wait(PATIENCE) == [0, 0], logs(nodes)
    first, second = nodes
    names = ("actor_loss", "critic_loss", "kl", "score", "answer_length")
    assert_same_figures(read_metrics(first.disk / "out"), read_metrics(one_node / "ppo"), names)
    for model in ("actor", "critic", "actor_ema"):
        weights = load_file(first.disk / "out" / model / "model.safetensors")
        expected = load_file(one_node / "ppo" / model / "model.safetensors")
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            assert torch.equal(value, expected[name]), name
    assert AutoModelForCausalLM.from_pretrained(first.disk / "out/actor")
    # The second saved nothing but its console, and prepared its own data.
    assert [file.name for file in (second.disk / "out").iterdir()] == ["training.node1.log"]
    assert prepared(first.disk / "cache") == prepared(second.disk / "cache") == prepared_by_step_3(one_node / "cache")
    assert [node.left_running for node in nodes] == ["", ""]


def prepared_by_step_3(folder: Path) -> set[str]:
    return {name for name in prepared(folder) if "_step3_" in name}


def test_a_node_that_dies_ends_the_other_and_both_go_on_from_checkpoints_on_storage_that_they_share(
    nodes, one_node, shared
):
    first, second = nodes
    cache = nodes.folder / "cache"  # both see this one, and prepare the same file at once
    text = f"{EPOCHS} --checkpoint_steps 5 --resume auto --checkpoint_dir {nodes.folder / 'checkpoints'}"
    saving = sft(shared, nodes.local / "out", cache, text)
    nodes.start_recipe(SFT, saving)
    expected, rows = read_metrics(one_node / "sft"), []
    end = time.monotonic() + PATIENCE
    while len(rows) < 12:
        assert first.process.poll() is None and time.monotonic() < end, logs(nodes)
        time.sleep(0.05)
        if (first.disk / "out/metrics.jsonl").exists():
            rows = read_metrics(first.disk / "out")
    second.kill()
    assert first.process.wait(PATIENCE) not in (0, None)
    assert "error: rank 0: the connection to another rank is lost" in first.log.read_text(), logs(nodes)
    assert first.left_running == ""
    assert not list((first.disk / "out").glob("*.safetensors"))
    assert len(prepared(cache)) == 4 and not list(cache.rglob(".*"))

    nodes.start_recipe(SFT, saving)
    assert nodes.wait(PATIENCE) == [0, 0], logs(nodes)
    resumed = re.search(r"step-(\d+): \d+ steps are done", first.log.read_text())
    assert resumed and 0 < int(resumed[1]) < len(expected) == 90, logs(nodes)
    assert_same_figures(read_metrics(first.disk / "out"), expected, ("loss", "grad_norm"))
    weights, others = (load_file(f / "model.safetensors") for f in (first.disk / "out", one_node / "sft"))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert not [file for file in (nodes.folder / "checkpoints").iterdir() if file.name.startswith(".node-")]


def test_a_folder_of_checkpoints_that_each_node_has_for_itself_is_refused_at_the_start(nodes, shared):
    arguments = sft(shared, nodes.local / "out", nodes.local / "cache", f"{EPOCHS} --checkpoint_steps 5")
    nodes.start_recipe(SFT, arguments)
    assert 0 not in nodes.wait(PATIENCE), logs(nodes)
    told = r"error: --checkpoint_dir .*: on node1: .*; checkpoints of several nodes belong on storage that all of them"
    assert re.search(told, nodes[0].log.read_text()), logs(nodes)
    assert not list(nodes.folder.glob("disk-*/cache/*/*")) and not list(nodes.folder.rglob(".node-*"))


@pytest.mark.nightly
def test_torchrun_on_two_nodes_starts_all_ranks_again_when_a_node_is_gone_and_back(nodes, one_node):
    """Elastic restart; of a rank alone see test_checkpoint.py."""
    first, second = nodes
    elastic = f"""
        --nnodes 2 --nproc_per_node 1 --max-restarts 3
        --rdzv_backend c10d --rdzv_endpoint {first.name}:29400 --rdzv_id run
    """
    (_, arguments), _ = json.loads((one_node / "2_ranks.json").read_text())  # as the recipe gives them
    places = dict(output_dir=nodes.local / "out", data_output_path=nodes.local / "cache")
    places |= dict(checkpoint_dir=nodes.folder / "checkpoints")
    arguments += flags("--checkpoint_steps 5 --resume auto", **places)
    torchrun = [BINARIES / "torchrun", *flags(elastic), STEPS[1], *arguments]
    surroundings = two_nodes.surroundings() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for node in nodes:
        node.start(torchrun, **surroundings)
    end, latest = time.monotonic() + PATIENCE, nodes.folder / "checkpoints/latest"
    while not latest.exists():
        assert first.process.poll() is None and time.monotonic() < end, logs(nodes)
        time.sleep(0.05)
    second.kill()
    second.start(torchrun, **surroundings)
    assert nodes.wait(PATIENCE) == [0, 0], logs(nodes)
    told = "".join(node.log.read_text() for node in nodes)
    assert re.search(r"step-\d+: \d+ steps are done", told), logs(nodes)
    outputs = [node.disk / "out" for node in nodes if (node.disk / "out/model.safetensors").exists()]
    assert len(outputs) == 1  # of whichever has rank 0 by then
    weights, others = (load_file(folder / "model.safetensors") for folder in (outputs[0], one_node / "sft"))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert [node.left_running for node in nodes] == ["", ""]


@pytest.mark.nightly
def test_torchrun_goes_on_with_one_node_when_the_other_is_gone_and_with_two_when_it_is_back(nodes, one_node):
    """Elastic sizes, 1:2: each time from the last checkpoint, on other ranks; the rows of a step stay."""
    first, second = nodes
    elastic = f"""
        --nnodes 1:2 --nproc_per_node 1 --max-restarts 9 --rdzv_conf last_call_timeout=5
        --rdzv_backend c10d --rdzv_endpoint {first.name}:29400 --rdzv_id run
    """
    (_, arguments), _ = json.loads((one_node / "2_ranks.json").read_text())
    places = dict(output_dir=nodes.local / "out", data_output_path=nodes.local / "cache")
    arguments += flags("--checkpoint_steps 5 --resume auto", **places, checkpoint_dir=nodes.folder / "checkpoints")
    torchrun = [BINARIES / "torchrun", *flags(elastic), STEPS[1], *arguments]
    surroundings = two_nodes.surroundings() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "LOGLEVEL": "INFO"}
    for node in nodes:
        node.start(torchrun, **surroundings)

    def wait_for(condition) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert first.process.poll() is None and time.monotonic() < end, logs(nodes)
            time.sleep(0.02)

    wait_for((nodes.folder / "checkpoints/latest").exists)
    second.kill()
    wait_for(
        lambda: "/step-" in first.log.read_text().partition("1 rank instead of 2")[2].partition("steps are done")[2]
    )
    # So short a run would be over before the other node is back: its rank stands still until then.
    descendants = psutil.Process(first.process.pid).children(recursive=True)
    [rank] = [child for child in descendants if child.cmdline()[1:3] == ["-u", str(STEPS[1])]]
    rank.suspend()
    second.start(torchrun, **surroundings)
    wait_for(lambda: "new nodes from group_rank" in first.log.read_text())
    rank.resume()
    assert nodes.wait(PATIENCE) == [0, 0], logs(nodes)
    told = first.log.read_text()
    assert "2 ranks instead of 1" in told.partition("SIGTERM: finishing the step")[2], logs(nodes)
    expected, rows = read_metrics(one_node / "sft"), read_metrics(first.disk / "out")
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    largest = max(row["train/loss"] for row in expected)
    differences = [abs(row["train/loss"] - other["train/loss"]) for row, other in zip(rows, expected, strict=True)]
    print(f"{max(differences) / largest:.1e}; {re.findall('resumed from .*', told)}")
    assert max(differences) < 1e-4 * largest
    assert (first.disk / "out/model.safetensors").exists()
    assert [node.left_running for node in nodes] == ["", ""]
