"""Rollouts by vLLM: those of generate() on every layout, weights that change, sampling, resuming."""

import contextlib
import json
import math
import os
import signal
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    PROJECT,
    STEPS,
    assert_same_run,
    flags,
    launch,
    launch_command,
    make_model,
    random_model,
    read_metrics,
    surroundings,
)

from utils.generation.hybrid_engine import HybridEngine
from utils.generation.sampling import Decoding
from utils.generation.vllm_backend import VllmEngine, VllmSettings
from utils.model.saving import published_weights
from utils.module.lora import convert_linear_layer_to_lora, lora_layers
from utils.process.errors import UserError
from utils.run.checkpoint_files import newest_checkpoint

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

GREEDY = Decoding(8, (), 0, vocabulary=320, temperature=0)
SAMPLED = replace(GREEDY, temperature=1.0, max_new_tokens=40)
VLLM = "--enable_hybrid_engine --hybrid_engine_backend vllm"
SHAPE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
GQA = SHAPE | dict(intermediate_size=96, num_key_value_heads=1)
# head sizes that vLLM's kernels for CPUs have: multiples of 32
KINDS = {
    "llama": dict(GQA, model_type="llama"),
    "llama tied": dict(GQA, model_type="llama", tie_word_embeddings=True),
    "qwen3 tied": dict(GQA, model_type="qwen3", head_dim=32, tie_word_embeddings=True),
    "opt tied": dict(SHAPE, model_type="opt", ffn_dim=96, word_embed_proj_dim=64),
    "gpt2 tied": dict(model_type="gpt2", n_embd=64, n_layer=2, n_head=2),
    "mixtral": dict(GQA, model_type="mixtral", num_local_experts=2),
}


def prompts():
    widths = torch.tensor([[2], [5], [3]])
    mask = (torch.arange(5) >= 5 - widths).long()
    return torch.arange(15).view(3, 5) * 7 % 320, mask


def engine_around(model, **settings) -> HybridEngine:
    vllm = VllmSettings(**dict(max_length=64, max_rows=4) | settings)
    return HybridEngine(SimpleNamespace(module=model, train=lambda mode=True: None), backend="vllm", vllm=vllm)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_the_weights_of_the_trained_model(kind):
    """The check at the start has compared greedy answers with those of generate() already."""
    model = random_model(KINDS[kind], scale=2.0)
    generator, (ids, mask) = engine_around(model), prompts()
    before = generator.generate(ids, mask, GREEDY)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    after = generator.generate(ids, mask, GREEDY)
    assert not torch.equal(before.sequences, after.sequences)
    assert generator._difference_from_generate() is None
    assert generator.gather_time > 0


def test_lora_updates_are_folded_in_on_the_way():
    model = convert_linear_layer_to_lora(random_model(KINDS["llama"], scale=2.0), "auto", 4)
    generator, (ids, mask) = engine_around(model), prompts()
    before = generator.generate(ids, mask, GREEDY).sequences
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_left_weight, std=0.5)
    assert not torch.equal(before, generator.generate(ids, mask, GREEDY).sequences)
    assert generator._difference_from_generate() is None


def test_sampling_is_that_of_the_flags_and_a_seed_repeats_it():
    model = random_model(KINDS["llama"], scale=2.0)
    generator, (ids, mask) = engine_around(model), prompts()

    def sample(decoding, seed=1):
        torch.manual_seed(seed)
        return generator.generate(ids, mask, decoding)

    one, again, other = sample(SAMPLED), sample(SAMPLED), sample(SAMPLED, seed=2)
    assert torch.equal(one.sequences, again.sequences) and torch.equal(one.log_probs, again.log_probs)
    assert not torch.equal(one.sequences, other.sequences)
    assert len({tuple(row) for row in one.sequences[:, 5:].tolist()}) == 3  # each row has a seed of its own
    # An answer ends with the first of any end token; none lies beyond the vocabulary.
    ends = (int(one.sequences[0, 8]), int(one.sequences[1, 7]))
    ended = sample(replace(SAMPLED, eos_token_ids=ends, pad_token_id=319))
    for row, whole in zip(ended.sequences[:, 5:].tolist(), one.sequences[:, 5:].tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(whole) if token in ends), len(whole))
        assert row == whole[:length] + [319] * (len(row) - length)
    assert sample(replace(SAMPLED, vocabulary=9)).sequences[:, 5:].max() < 9
    likeliest = sample(replace(SAMPLED, top_k=1, max_new_tokens=8)).sequences
    assert torch.equal(likeliest, generator.generate(ids, mask, GREEDY).sequences)


@pytest.mark.parametrize("temperature, vocabulary", [(1.0, 320), (0.7, 320), (1.0, 40)])
def test_log_probs_are_those_of_a_scoring_pass(temperature, vocabulary):
    model = random_model(KINDS["llama"], scale=2.0)
    generator, (ids, mask) = engine_around(model), prompts()
    rollout = generator.generate(ids, mask, replace(SAMPLED, temperature=temperature, vocabulary=vocabulary))
    for row, real, answer in zip(ids, mask, rollout.sequences[:, 5:], strict=True):
        prompt = row[real.bool()]
        with torch.no_grad():
            logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1, :vocabulary]
        wanted = (logits / temperature).log_softmax(-1).gather(1, answer[:, None]).squeeze(1)
        torch.testing.assert_close(rollout.log_probs[ids.tolist().index(row.tolist())], wanted, atol=2e-5, rtol=0)


def test_what_top_p_leaves_is_not_taken_for_the_policys_distribution():
    model = random_model(KINDS["llama"], scale=2.0)
    engine, (ids, mask) = VllmEngine(model, VllmSettings(64, 4, cuts=True)), prompts()
    engine.take_weights(published_weights(model))
    cut = replace(SAMPLED, top_p=0.5)
    logged = engine.generate(ids, mask, cut).log_probs
    with torch.no_grad():
        answer = engine.generate(ids, mask, replace(cut, temperature=0)).sequences[1]
        first = model(ids[1:2]).logits[0, -1].log_softmax(-1)
    assert logged.min() < math.log(0.5) and first[answer[5]] <= 0
    assert engine.generate(ids, mask, replace(cut, temperature=0.7)).log_probs is None


def test_a_model_whose_numbers_are_not_finite_is_told():
    model = random_model(KINDS["llama"], scale=2.0)
    generator, (ids, mask) = engine_around(model), prompts()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        generator.generate(ids, mask, GREEDY)


def test_the_process_is_as_it_was_but_for_the_engine():
    torch.manual_seed(5)
    state, set_num_threads, threads = torch.get_rng_state(), torch.set_num_threads, torch.get_num_threads()
    VllmEngine(random_model(KINDS["llama"]), VllmSettings(64, 4))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.set_num_threads is set_num_threads and torch.get_num_threads() == threads


@pytest.mark.parametrize("ranks_of_an_engine", [1, 2])
def test_two_ranks_take_the_same_updates_as_with_generate_at_every_stage(ranks_of_an_engine, tmp_path):
    script = PROJECT / "tests/launch/scripts/generation_on_ranks.py"
    code, console = launch(script, [tmp_path, "vllm", ranks_of_an_engine], "torchrun", ranks=2, timeout=280)
    assert code == 0, console[-3000:]
    assert console.count("equal: ") == 8, console[-3000:]


def test_a_run_resumes_bit_equal(start, tmp_path):
    """The engine is built anew and takes the weights of the checkpoint."""
    make_model(tmp_path / "actor", "llama for vllm")
    runs = flags(f"{VLLM} --num_train_epochs 2 --checkpoint_steps 1", actor_model_name_or_path=tmp_path / "actor")
    for folder, more in (
        ("plain", ""),
        ("resumed", "--enable_test_mode --test_stop_step 2"),
        ("resumed", "--resume auto"),
    ):
        code, console = launch(3, [*start(3), *runs, *flags(more, output_dir=tmp_path / folder)])
        assert code == 0, console[-3000:]
    assert_same_run(tmp_path / "plain", tmp_path / "resumed")
    assert all("train/gather_seconds" in row for row in read_metrics(tmp_path / "plain"))


def test_groups_of_answers_are_judged_by_a_function_and_the_adapters_learn_from_them(start, tmp_path):
    """GRPO with a reward of the user's own: each prompt comes once, and its four answers differ."""
    make_model(tmp_path / "actor", "llama for vllm")
    (tmp_path / "judge.py").write_text(
        "def distinct(prompts, answers):\n    return [float(len(set(answer))) for answer in answers]\n"
    )
    run = f"{VLLM} --per_device_generation_batch_size 4 --num_generations_per_prompt 4 --advantage_estimator grpo"
    run += " --missing_eos_penalty 0 --sample_interval 1 --num_train_epochs 2"
    run += " --actor_lora_dim 4 --actor_learning_rate 1e-2"
    files = dict(reward_function=f"{tmp_path / 'judge.py'}:distinct", output_dir=tmp_path / "run")
    given = [*start(3), *flags(run, actor_model_name_or_path=tmp_path / "actor", **files)]
    code, console = launch(3, given)
    assert code == 0, console[-3000:]
    rows = read_metrics(tmp_path / "run")
    assert len(rows) > 1 and all(row["train/rollout_log_prob_gap"] < 1e-4 for row in rows[1:])
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        assert row["train/score/distinct"] > 1
        total = row["train/score/distinct"] + row["train/score/reward_model"]
        assert math.isclose(row["train/score"], total, rel_tol=1e-5)
    assert len({sample["answer"] for sample in samples[:4]}) > 1 and len({s["prompt"] for s in samples[:4]}) == 1


def test_sigterm_stops_two_ranks_and_leaves_no_process(start, tmp_path):
    make_model(tmp_path / "actor", "llama for vllm")
    run = flags(f"{VLLM} --num_train_epochs 2000 --checkpoint_steps 1000 --resume auto")
    files = flags(actor_model_name_or_path=tmp_path / "actor", output_dir=tmp_path / "run")
    command, metrics = (
        launch_command(STEPS[3], [*start(3), *run, *files], "torchrun", 2),
        tmp_path / "run/metrics.jsonl",
    )
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, env=surroundings(), start_new_session=True)
    try:
        end = time.monotonic() + 240
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            assert run.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        run.wait(60)
        left = subprocess.run(["ps", "-o", "args=", "--sid", str(run.pid)], capture_output=True, text=True, check=False)
        assert not left.stdout, left.stdout
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert (tmp_path / "log").read_text().count("stopped by SIGTERM") == 1
    assert newest_checkpoint(tmp_path / "run/checkpoints") is not None


def test_a_family_that_vllm_does_not_have_is_refused_in_one_line(tmp_path):
    model = random_model(dict(model_type="codegen", n_embd=64, n_layer=2, n_head=2, rotary_dim=16))
    with pytest.raises(UserError, match=r"vLLM cannot serve this CodeGenForCausalLM: .*; use auto"):
        VllmEngine(model, VllmSettings(64, 4))
