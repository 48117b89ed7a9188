"""Saved models behind an engine of vLLM: the answers of generate(), streaming, Ctrl-C, one model after another."""

import json
import signal
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import make_tokenizer, random_model

from evaluation_scripts import prompt_eval
from inference.conversation import AnswerStream
from utils.generation import saved_model
from utils.generation.saved_model import VllmUse, generate_answers, generate_ids, load_language_model
from utils.process.errors import UserError
from utils.process.host_memory import memory_given_back

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46, 47], [12] * 40, [7]]
SAMPLING = dict(do_sample=True, temperature=0.9, top_p=0.95, top_k=40)


def save(folder, seed=0, config=LLAMA, **changes):
    """A model whose greedy answers differ from prompt to prompt."""
    make_tokenizer(folder)
    random_model(config | changes, seed=seed, scale=2.0).save_pretrained(folder)
    return str(folder)


def flags(**changes):
    settings = dict(dtype="auto", device="cpu", prompt_format=None, base_model=None, load_in_4bit=False)
    return SimpleNamespace(**settings | dict(allow_special_tokens=False, trust_remote_code=False) | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(folder):
    return load_language_model(folder, flags())


@pytest.fixture(scope="module")
def served(folder):
    return load_language_model(folder, flags(), vllm=VllmUse(rows=4))


def test_greedy_answers_are_those_of_generate(plain, served):
    assert {weight.device.type for weight in served.model.parameters()} == {"meta"}
    assert served.max_positions == plain.max_positions == 512
    wanted = generate_answers(plain, PROMPTS * 3, batch_size=5, do_sample=False, max_new_tokens=24)
    assert generate_answers(served, PROMPTS * 3, batch_size=5, do_sample=False, max_new_tokens=24) == wanted
    assert len({tuple(answer.text for answer in answers) for answers in wanted}) == len(PROMPTS)


def test_an_answer_ends_with_the_first_of_any_stop_id(plain, served):
    long = generate_ids(plain, PROMPTS, do_sample=False, max_new_tokens=24)
    stops = [long[0][3], long[1][7]]
    plain_ends, served_ends = (saved_model.replace(lm, stop_ids=stops) for lm in (plain, served))
    wanted = generate_ids(plain_ends, PROMPTS, do_sample=False, max_new_tokens=24)
    assert generate_ids(served_ends, PROMPTS, do_sample=False, max_new_tokens=24) == wanted
    assert len(wanted[0]) <= 4


def test_a_seed_repeats_sampled_answers_and_each_answer_has_its_own_numbers(served):
    def sample(seed, **settings):
        torch.manual_seed(seed)
        return generate_answers(served, PROMPTS, 2, max_new_tokens=20, num_return_sequences=3, **SAMPLING | settings)

    one = sample(1)
    assert sample(1) == one and sample(2) != one
    assert [len(answers) for answers in one] == [3] * len(PROMPTS)
    assert len({answer.text for answer in one[1]}) == 3
    likeliest = generate_answers(served, PROMPTS, 2, do_sample=False, max_new_tokens=20)
    assert sample(3, top_k=1) == [answers * 3 for answers in likeliest]


def test_the_answer_grows_token_by_token_and_ends_where_a_criterion_says(served):
    whole = generate_ids(served, PROMPTS[:1], do_sample=False, max_new_tokens=12)[0]
    seen = []

    def until_five(ids, scores):
        seen.append(ids[0, len(PROMPTS[0]) :].tolist())
        return torch.tensor([len(seen) == 5])

    assert generate_ids(served, PROMPTS[:1], do_sample=False, max_new_tokens=12, stopping_criteria=[until_five]) == [
        whole[:5]
    ]
    assert seen == [whole[: length + 1] for length in range(5)]
    assert not served.engine._llm.llm_engine.has_unfinished_requests()
    shown = []
    stream = AnswerStream(served, len(PROMPTS[0]), shown.append)
    generate_ids(served, PROMPTS[:1], do_sample=False, max_new_tokens=12, stopping_criteria=[stream])
    assert stream.close() == "".join(shown) and len(shown) > 2


def test_ctrl_c_within_a_step_ends_the_answer_and_leaves_the_engine_whole(served, monkeypatch):
    wanted = generate_ids(served, PROMPTS, do_sample=False, max_new_tokens=12)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runner = served.engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner
    sample, seen = runner.sample_tokens, []

    def interrupted(*args, **kwargs):
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return sample(*args, **kwargs)

    monkeypatch.setattr(runner, "sample_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        criterion = [lambda ids, scores: torch.tensor([bool(seen.append(ids))])]
        generate_ids(served, PROMPTS[:1], do_sample=False, max_new_tokens=12, stopping_criteria=criterion)
    monkeypatch.undo()
    assert len(seen) == 3
    assert not served.engine._llm.llm_engine.has_unfinished_requests()
    assert generate_ids(served, PROMPTS, do_sample=False, max_new_tokens=12) == wanted


def test_two_models_side_by_side_answer_as_each_alone(served, tmp_path):
    """As in a chat with two paths."""
    other = save(tmp_path / "other", seed=3, hidden_size=96, num_attention_heads=3)
    both = load_language_model(other, flags(), vllm=VllmUse(models=2))
    alone = load_language_model(other, flags())
    before = generate_ids(served, PROMPTS, do_sample=False, max_new_tokens=12)
    assert generate_ids(both, PROMPTS, do_sample=False, max_new_tokens=12) == generate_ids(
        alone, PROMPTS, do_sample=False, max_new_tokens=12
    )
    assert generate_ids(served, PROMPTS, do_sample=False, max_new_tokens=12) == before


def test_a_long_model_takes_what_the_cache_holds_and_says_so(folder, monkeypatch, capsys):
    monkeypatch.setattr(saved_model, "CPU_CACHE_GIB", 160 * 2 * 2 * 32 * 4 / 2**30)  # 160 tokens of this model
    short = load_language_model(folder, flags(), vllm=VllmUse(rows=8))
    assert 64 <= short.max_positions < 160
    assert f"holds 512, and by vLLM takes {short.max_positions} tokens" in capsys.readouterr().err
    (answers,) = generate_answers(short, [[9] * 400], 1, do_sample=False, max_new_tokens=20)
    assert answers[0].num_tokens == 20 or answers[0].ended


def test_a_closed_engine_gives_its_memory_back(tmp_path):
    """As prompt_eval.py needs it, which loads one model after another."""
    wide = save(tmp_path / "wide", hidden_size=1024, intermediate_size=4096, num_attention_heads=8)
    sizes = []
    for _ in range(4):
        with memory_given_back():
            lm = load_language_model(wide, flags(), vllm=VllmUse(rows=4))
            generate_ids(lm, PROMPTS, do_sample=False, max_new_tokens=4)
            lm.close()
            del lm
        sizes.append(psutil.Process().memory_info().rss / 2**20)
    assert sizes[-1] - sizes[1] < 40, sizes  # of about 160 MiB an engine


def test_prompt_eval_compares_models_by_either_backend(folder, tmp_path):
    other, answers = save(tmp_path / "other", seed=4), {}
    (tmp_path / "prompts.txt").write_text("red cat\nseven dogs please\nthe green house\n")
    for backend in ("transformers", "vllm"):
        file = tmp_path / f"{backend}.jsonl"
        prompt_eval.main(
            [
                *("--model_name_or_path_baseline", folder, "--model_name_or_path_finetune", other),
                *("--prompts_file", str(tmp_path / "prompts.txt"), "--jsonl", str(file), "--backend", backend),
                *("--max_new_tokens", "16", "--do_sample", "--top_k", "0", "--num_return_sequences", "2"),
                *("--batch_size", "2"),
            ]
        )
        answers[backend] = {"Greedy": [], "Sampling": []}
        for line in file.read_text().splitlines():
            record = json.loads(line)
            answers[backend][record["mode"]].append((record["title"], record["prompt_number"], record["answers"]))
    assert answers["vllm"]["Greedy"] == answers["transformers"]["Greedy"]
    assert [len(texts) for *_, texts in answers["vllm"]["Sampling"]] == [2] * 6
    assert len({text for *_, texts in answers["vllm"]["Sampling"] for text in texts}) == 12


def test_what_vllm_cannot_serve_is_refused_with_the_flag(tmp_path):
    codegen = save(tmp_path, config=dict(model_type="codegen", n_embd=64, n_layer=2, n_head=2, rotary_dim=16))
    with pytest.raises(UserError, match=r"--backend vllm: vLLM cannot serve .*; use --backend transformers"):
        load_language_model(codegen, flags(), vllm=VllmUse())
