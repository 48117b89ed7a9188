"""Generation of rollouts: choosing tokens, the sampling loop against generate(), the hybrid engine around it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import FAMILIES, WITH_STATE, random_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from utils.generation.hybrid_engine import HybridEngine, first_difference
from utils.generation.sampling import (
    CompiledStep,
    Decoding,
    PreallocatedLayer,
    Rollout,
    choose,
    draw,
    generate_by_transformers,
    keep_top_k,
    keep_top_p,
    sample_answers,
)
from utils.model.inputs import cache_argument
from utils.module import fused_linear
from utils.module.fused_linear import can_pack, find_shared_inputs, fused_linears
from utils.module.lora import convert_linear_layer_to_lora, lora_layers

VOCABULARY, EOS, PAD = 96, 2, 1
WIDTHS = [3, 9, 1, 6, 2]  # of prompts


def _model(family: str, seed: int = 0):
    """A random model whose answers vary: its matrices are larger than an untrained model's."""
    config = AutoConfig.for_model(
        **FAMILIES[family],
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(6)
    return model


def _prompts(widths=WIDTHS, seed=1):
    torch.manual_seed(seed)
    longest = max(widths)
    mask = (torch.arange(longest) >= longest - torch.tensor(widths)[:, None]).long()
    return torch.randint(3, VOCABULARY, mask.shape).masked_fill(mask == 0, PAD), mask


def _decoding(limit=12, eos=(EOS,), vocabulary=VOCABULARY, **settings):
    return Decoding(limit, eos, PAD, vocabulary, **settings)


def _chi_square(seen, probabilities) -> float:
    """Pearson's statistic of counts against probabilities; both over the outcomes that are possible."""
    wanted = probabilities / probabilities.sum() * seen.sum()
    return ((seen - wanted) ** 2 / wanted).sum().item()


# Values that chance exceeds once in a thousand times, by degrees of freedom: one less than there are outcomes.
CHI_SQUARE_LIMIT = {3: 16.27, 11: 31.26}


@pytest.fixture(scope="module")
def llama():
    return _model("llama")


# ---------------------------------------------------------------- choosing tokens


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.9, 7, 0.5)]
)
def test_scores_equal_those_of_transformers_processors(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(50, 40) * 3
    wanted = TemperatureLogitsWarper(temperature)(None, logits)
    wanted = TopKLogitsWarper(top_k)(None, wanted) if top_k else wanted
    wanted = TopPLogitsWarper(top_p)(None, wanted) if top_p < 1 else wanted
    scores = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    assert torch.equal(scores, wanted)
    assert (torch.isinf(scores).any()) == (top_k > 0 or top_p < 1)


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.05, 0.25])
    torch.manual_seed(0)
    count = 20000
    tokens = draw(probabilities.log().expand(count, -1), torch.rand(count, dtype=torch.float64))
    seen = torch.bincount(tokens, minlength=5)
    assert seen[1] == 0
    possible = probabilities > 0
    assert _chi_square(seen[possible], probabilities[possible]) < CHI_SQUARE_LIMIT[3]
    assert _chi_square(seen[possible], torch.tensor([0.48, 0.21, 0.06, 0.25])) > 2 * CHI_SQUARE_LIMIT[3]


def test_a_random_number_at_the_border_belongs_to_the_next_token():
    scores = torch.tensor([[0.25, 0.0, 0.75]]).log().expand(4, -1)
    tokens = draw(scores, torch.tensor([0.0, 0.2499999, 0.25, 1 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [0, 0, 2, 2]


def test_a_token_of_probability_one_in_a_hundred_million_can_be_drawn():
    scores = torch.tensor([[0.0, -18.5]])  # p = 9.2e-9, which a sum in fp32 loses
    assert draw(scores, torch.tensor([1 - 1e-9], dtype=torch.float64)).item() == 1


def test_log_probs_are_tempered_and_see_all_tokens_that_top_k_cuts():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    tokens, log_probs = choose(logits, _decoding(temperature=2.0, top_k=1), torch.tensor([0.5], dtype=torch.float64))
    assert tokens.item() == 0
    e = torch.e
    assert log_probs.item() == pytest.approx(torch.log(torch.tensor(e / (e + e**0.5 + 1))).item(), abs=1e-6)
    greedy = choose(logits, _decoding(temperature=0.0), torch.zeros(1, dtype=torch.float64))
    assert greedy[0].item() == 0
    assert greedy[1].item() == pytest.approx(logits.log_softmax(-1)[0, 0].item(), abs=1e-6)


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_generate_on_a_left_padded_batch(family):
    model = _model(family)
    prompts, mask = _prompts()
    endless = generate_by_transformers(model, prompts, mask, _decoding(eos=(), temperature=0.0)).sequences
    # The ends are tokens that rows come to at different times, some of them perhaps never.
    ends = endless[0, prompts.shape[1] + 3].item(), endless[1, prompts.shape[1] + 5].item()
    for settings in (dict(eos=ends[:1]), dict(eos=ends), dict(eos=(), vocabulary=80)):
        decoding = _decoding(temperature=0.0, **settings)
        plain = generate_by_transformers(model, prompts, mask, decoding).sequences
        assert torch.equal(sample_answers(model, prompts, mask, decoding).sequences, plain)
        with fused_linears(model, find_shared_inputs(model)):
            assert torch.equal(sample_answers(model, prompts, mask, decoding).sequences, plain)


@pytest.mark.parametrize("family", sorted(WITH_STATE.keys() - {"rwkv"}))
def test_rows_leave_a_model_with_a_state_and_take_it_along(family):
    """And RWKV, whose cache is none of transformers', falls back to generate(): see the check at the start."""
    model = random_model(WITH_STATE[family], scale=2.0)
    prompts, mask = _prompts()
    decoding = _decoding(temperature=0.0, eos=(), vocabulary=320)
    endless = generate_by_transformers(model, prompts, mask, decoding).sequences
    ends = endless[0, prompts.shape[1] + 2].item(), endless[1, prompts.shape[1] + 4].item()
    decoding, batches = replace(decoding, eos_token_ids=ends), []
    plain = generate_by_transformers(model, prompts, mask, decoding).sequences
    handle = model.register_forward_pre_hook(
        lambda _, __, given: batches.append(len(given["input_ids"])), with_kwargs=True
    )
    assert torch.equal(sample_answers(model, prompts, mask, decoding).sequences, plain)
    handle.remove()
    assert batches[0] == len(prompts) > batches[-1]
    engine = HybridEngine(_Engine(model))
    assert engine.backend == "own"


def test_a_cache_of_another_kind_falls_back_to_generate(capsys):
    assert HybridEngine(_Engine(random_model(WITH_STATE["rwkv"]))).backend == "transformers"
    assert "by transformers' generate(), because of the own loop" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_log_probs_are_those_of_a_forward_pass_over_the_whole_answer(family):
    model = _model(family)
    prompts, mask = _prompts()
    torch.manual_seed(0)
    decoding = _decoding(temperature=1.5, top_p=0.9)
    rollout = sample_answers(model, prompts, mask, decoding, rewrite_logits=_ends_at([3, 12, 1, 7, 5]))
    for row, length in enumerate([3, 12, 1, 7, 5]):
        ids = rollout.sequences[row, prompts.shape[1] - WIDTHS[row] : prompts.shape[1] + length]
        with torch.no_grad():
            logits = model(ids[None]).logits[0, WIDTHS[row] - 1 : -1] / 1.5
        logits[:, EOS] = -torch.inf  # as rewritten
        wanted = logits.log_softmax(-1).gather(1, ids[WIDTHS[row] :, None]).squeeze(1)
        # The last is the forced EOS.
        torch.testing.assert_close(rollout.log_probs[row, : length - 1], wanted[:-1], atol=2e-5, rtol=1e-5)
        assert (rollout.log_probs[row, length:] == 0).all()
        assert (rollout.sequences[row, prompts.shape[1] + length :] == PAD).all()


def _ends_at(lengths, tokens=EOS):
    """Rows get their end token (one for all, or one each) at these lengths and not before."""
    lengths = torch.tensor(lengths)
    tokens = torch.as_tensor(tokens).expand(len(lengths))

    def rewrite(logits, rows, position):
        logits = logits.clone()
        logits[:, tokens.unique()] = -torch.inf
        places = torch.arange(len(rows)), tokens[rows]
        logits[places] = torch.where(lengths[rows] == position + 1, 1e4, -torch.inf)
        return logits

    return rewrite


@pytest.mark.parametrize("answer", ["own loop", "compiled", "generate()"])
def test_each_end_token_ends_an_answer(llama, answer):
    prompts, mask = _prompts()
    lengths, tokens = [3, 7, 1, 5, 20], [EOS, 40, 40, 50, EOS]  # the last row never ends
    settings = dict(rewrite_logits=_ends_at(lengths, tokens))
    if answer == "compiled":
        settings["compiled"] = CompiledStep(llama, 32, backend="eager")
    generate = generate_by_transformers if answer == "generate()" else sample_answers
    for ends, wanted in (
        ((EOS, 40, 50), [3, 7, 1, 5, 12]),
        ((40, EOS), [3, 7, 1, 12, 12]),
        ((40,), [12, 7, 1, 12, 12]),
    ):
        rollout = generate(llama, prompts, mask, _decoding(eos=ends), **settings)
        answers = rollout.sequences[:, prompts.shape[1] :]
        for row, length in enumerate(wanted):
            assert not torch.isin(answers[row, : length - 1], torch.tensor(ends)).any()
            assert (answers[row, length:] == PAD).all()
            if length < 12:
                assert answers[row, length - 1] == tokens[row]
                assert rollout.log_probs is None or (rollout.log_probs[row, length:] == 0).all()
            else:
                assert answers.shape[1] == 12


def test_finished_rows_leave_the_batch_and_shared_pads_the_cache(llama):
    prompts, mask = _prompts()
    seen = []

    def note(_module, _arguments, inputs):
        cache = inputs[cache_argument(llama)]
        columns = cache.layers[0].get_seq_length()
        assert inputs["attention_mask"].shape == (len(inputs["input_ids"]), columns + inputs["input_ids"].shape[1])
        seen.append((len(inputs["input_ids"]), columns))

    handle = llama.register_forward_pre_hook(note, with_kwargs=True)
    sample_answers(llama, prompts, mask, _decoding(), rewrite_logits=_ends_at([2, 3, 4, 5, 5]))
    handle.remove()
    # One row of five is less than a quarter and stays; when the second ends, both leave, and with them the longest
    # prompt: three columns are pads of all that remain. Then one of three leaves.
    assert seen == [(5, 0), (5, 9), (5, 10), (3, 11 - 3), (2, 12 - 3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_padded_goes_without_a_mask_and_gives_the_same_answers(family):
    model = _model(family)
    prompts, mask = _prompts(widths=[4, 4, 4])
    seen = []
    handle = model.register_forward_pre_hook(lambda _m, _a, inputs: seen.append(inputs), with_kwargs=True)
    decoding = _decoding(eos=(), temperature=0.0)
    answers = sample_answers(model, prompts, mask, decoding).sequences
    handle.remove()
    plain = [type(layer) is PreallocatedLayer for layer in seen[0][cache_argument(model)].layers]
    if all(plain) and "position_ids" in seen[0]:
        assert all(inputs["attention_mask"] is None for inputs in seen)
    assert torch.equal(answers, generate_by_transformers(model, prompts, mask, decoding).sequences)


def test_a_mask_is_left_out_once_the_padded_rows_have_gone(llama):
    prompts, mask = _prompts(widths=[6, 3, 6])
    seen = []
    handle = llama.register_forward_pre_hook(
        lambda _m, _a, inputs: seen.append(inputs["attention_mask"] is None), with_kwargs=True
    )
    sample_answers(llama, prompts, mask, _decoding(), rewrite_logits=_ends_at([5, 2, 5]))
    handle.remove()
    assert seen == [False, False, True, True, True]


def test_looking_late_whether_rows_are_left_changes_no_token_and_costs_one_pass(llama):
    prompts, mask = _prompts()
    for ends in ([2, 3, 4, 5, 5], [3, 3, 3, 3, 3], [1, 12, 1, 12, 1], [12, 12, 12, 12, 12]):
        runs, passes = [], []
        for late in (False, True):
            count = []
            handle = llama.register_forward_pre_hook(lambda *_, count=count: count.append(1))
            torch.manual_seed(2)
            rewrite = _ends_at(ends)
            runs.append(sample_answers(llama, prompts, mask, _decoding(), rewrite_logits=rewrite, looks_late=late))
            handle.remove()
            passes.append(len(count))
        assert torch.equal(runs[0].sequences, runs[1].sequences) and runs[0].width == max(ends)
        torch.testing.assert_close(runs[0].log_probs, runs[1].log_probs, atol=1e-5, rtol=1e-5)
        assert passes == [max(ends), min(max(ends) + 1, 12)]


def test_ranks_that_wait_for_each_other_make_as_many_passes_when_they_look_late(llama):
    """This rank ends first; the other one's count comes from the sum."""
    prompts, mask = _prompts()
    for late, passes in ((False, 7), (True, 8)):
        others, count = iter([3, 3, 3, 2, 1, 1, 0, 0, 0, 0]), []
        handle = llama.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        run = sample_answers(
            llama,
            prompts,
            mask,
            _decoding(),
            lambda left, others=others: left + next(others),
            _ends_at([2, 2, 3, 3, 1]),
            looks_late=late,
        )
        handle.remove()
        assert (len(count), run.width) == (passes, 3)


def test_rows_do_not_influence_each_other(llama):
    prompts, mask = _prompts()
    runs = []
    for others, lengths in ((0, [12, 12, 12, 12, 12]), (1, [12, 1, 2, 3, 4]), (2, [12, 12, 1, 1, 1])):
        other_prompts = (prompts + others) % VOCABULARY
        other_prompts[0] = prompts[0]
        torch.manual_seed(7)
        runs.append(sample_answers(llama, other_prompts, mask, _decoding(), rewrite_logits=_ends_at(lengths)))
    for run in runs[1:]:
        assert torch.equal(run.sequences[0], runs[0].sequences[0])
        torch.testing.assert_close(run.log_probs[0], runs[0].log_probs[0], atol=1e-5, rtol=1e-5)
    assert not torch.equal(runs[0].sequences[1], runs[2].sequences[1])


def test_a_seed_fixes_the_tokens(llama):
    prompts, mask = _prompts()
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(sample_answers(llama, prompts, mask, _decoding(eos=())).sequences)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_first_tokens_follow_the_models_probabilities(llama):
    prompts, mask = _prompts([4])
    count = 4000
    with torch.no_grad():
        wanted = keep_top_k(llama(prompts).logits[0, -1:].float() / 2, 12).softmax(-1)[0]
    torch.manual_seed(0)
    decoding = _decoding(limit=1, temperature=2.0, top_k=12)
    rollout = sample_answers(llama, prompts.expand(count, -1), mask.expand(count, -1), decoding)
    seen = torch.bincount(rollout.sequences[:, -1], minlength=VOCABULARY)
    assert seen[wanted == 0].sum() == 0
    assert _chi_square(seen[wanted > 0], wanted[wanted > 0]) < CHI_SQUARE_LIMIT[11]


def test_all_rows_end_at_once_at_the_limit_or_alone(llama):
    prompts, mask = _prompts()
    together = sample_answers(llama, prompts, mask, _decoding(), rewrite_logits=_ends_at([1] * 5))
    assert together.sequences[:, prompts.shape[1] :].tolist() == [[EOS]] * 5
    limit = sample_answers(llama, prompts, mask, _decoding(limit=4), rewrite_logits=_ends_at([9] * 5))
    assert limit.width == 4
    assert not (limit.sequences[:, prompts.shape[1] :] == EOS).any()
    alone = _decoding(temperature=0.0)
    single = sample_answers(llama, prompts[1:2], mask[1:2], alone)
    assert torch.equal(single.sequences, generate_by_transformers(llama, prompts[1:2], mask[1:2], alone).sequences)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("answer", [sample_answers, generate_by_transformers])
def test_logits_that_are_not_finite_are_an_error_after_the_last_token(llama, temperature, answer):
    prompts, mask = _prompts()

    def spoil(logits, rows, position):
        return torch.where((rows == 3)[:, None] & (position == 2), torch.nan, logits)

    forwards = []
    handle = llama.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(FloatingPointError, match=r"\[3\]"):
        answer(llama, prompts, mask, _decoding(eos=(), limit=6, temperature=temperature), rewrite_logits=spoil)
    handle.remove()
    assert len(forwards) == 6


def test_a_rank_that_is_done_goes_along_until_all_are(llama):
    prompts, mask = _prompts()
    counts, forwards = [], []

    def rows_left_anywhere(here):
        counts.append(here)
        return here + (len(counts) < 7)  # another rank has a row for seven tokens

    handle = llama.register_forward_hook(lambda *_: forwards.append(1))
    rollout = sample_answers(
        llama, prompts, mask, _decoding(), rows_left_anywhere, rewrite_logits=_ends_at([1, 2, 3, 2, 1])
    )
    handle.remove()
    assert len(forwards) == len(counts) == 7
    assert counts[2:] == [0] * 5
    assert rollout.width == 3
    assert (rollout.sequences[:, -1] == EOS).tolist() == [False, False, True, False, False]
    assert (rollout.sequences[:, -1] == PAD).tolist() == [True, True, False, True, True]


def test_the_preallocated_cache_holds_what_transformers_own_holds():
    torch.manual_seed(0)
    layer, parts = PreallocatedLayer(7), [torch.randn(3, 2, n, 4) for n in (3, 1, 1)]
    for part in parts:
        keys, values = layer.update(part, -part)
    whole = torch.cat(parts, dim=2)
    assert torch.equal(keys, whole) and torch.equal(values, -whole)
    layer.batch_select_indices(torch.tensor([2, 0]))
    layer.drop_columns(2)
    keys, _ = layer.update(parts[1][[2, 0]], parts[1][[2, 0]])
    assert torch.equal(keys, torch.cat([whole[[2, 0], :, 2:], parts[1][[2, 0]]], dim=2))
    assert layer.get_seq_length() == 4


# ---------------------------------------------------------------- fused linear layers


def test_layers_that_read_one_tensor_are_found_and_run_as_one_product(monkeypatch):
    monkeypatch.setattr(fused_linear, "can_pack", lambda _: False)
    model = _model("llama")
    groups = find_shared_inputs(model)
    assert [[name.rpartition(".")[2] for name in group] for group in groups[:4]] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]
    ]  # fmt: skip
    assert [name for group in groups for name in group][-1] == "lm_head"
    products = []
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        plain = model(ids).logits
        with fused_linears(model, groups), _counted_linears(products):
            torch.testing.assert_close(model(ids).logits, plain, atol=1e-4, rtol=1e-4)
        fused, products[:] = len(products), []
        with _counted_linears(products):
            assert torch.equal(model(ids).logits, plain)  # put back
    assert (fused, len(products)) == (2 * 4 + 1, 2 * 7 + 1)
    assert not any("forward" in module.__dict__ for module in model.modules())


class _counted_linears(torch.overrides.TorchFunctionMode):
    def __init__(self, products):
        super().__init__()
        self.products = products

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            self.products.append(1)
        return function(*args, **(kwargs or {}))


def test_siblings_with_inputs_of_their_own_are_never_fused():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

        device = torch.device("cpu")

        def forward(self, input_ids, use_cache):
            x = torch.ones(1, 4)
            return self.q(x + 1), self.k(x), self.v(x)

    assert find_shared_inputs(Cross()) == [["q"], ["k"], ["v"]]  # k has a bias, v has none


def test_packing_is_measured_once_and_its_gain_decides(monkeypatch, capsys):
    model, gains = _model("llama"), iter([3.0, 0.9, 1.0])
    monkeypatch.setattr(fused_linear, "_packing_gain", lambda dtype: next(gains))
    for fused in (True, False):
        engine = HybridEngine(_Engine(model))
        assert ("own, weights fused and packed" in capsys.readouterr().out) == fused
        with engine.generation():
            assert any("forward" in module.__dict__ for module in model.modules()) == fused
    monkeypatch.undo()
    assert fused_linear._packing_gain(torch.float32) > 0
    assert fused_linear._packing_gain.cache_info().currsize


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_packed_products_in_fp32_differ_from_plain_ones_by_rounding_only(family):
    model = _model(family)
    prompts, mask = _prompts()
    with torch.no_grad():
        plain = model(prompts, attention_mask=mask).logits
        with fused_linears(model, find_shared_inputs(model)):
            packed = model(prompts, attention_mask=mask).logits
    torch.testing.assert_close(packed * mask.unsqueeze(-1), plain * mask.unsqueeze(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not can_pack(torch.zeros(2, 2, dtype=torch.bfloat16)), reason="oneDNN has no bf16 on this CPU")
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_packed_products_differ_from_plain_ones_by_rounding_only(family):
    model = _model(family).bfloat16()
    prompts, mask = _prompts()
    with torch.no_grad():
        exact = model.float()(prompts, attention_mask=mask).logits
        model.bfloat16()
        plain = model(prompts, attention_mask=mask).logits
        with fused_linears(model, find_shared_inputs(model)):
            packed = model(prompts, attention_mask=mask).logits
    errors = [((logits - exact) * mask.unsqueeze(-1)).abs().mean() for logits in (plain, packed)]
    assert errors[1] < 1.5 * errors[0]


# ---------------------------------------------------------------- the hybrid engine


class _Engine(nn.Module):
    """What HybridEngine needs of an engine."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_the_start_up_check_accepts_a_model_and_says_so(capsys):
    engine = HybridEngine(_Engine(_model("gpt2")))
    assert engine.backend == "own"
    assert "generation: own" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["positions", "cache", "raises"])
def test_a_model_that_the_loop_gets_wrong_falls_back_aloud_or_is_refused(fault, capsys):
    from utils.process.errors import UserError

    model = _model("gpt2")
    original = model.forward

    def forward(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **others):
        own_loop = past_key_values is not None and any(
            type(layer) is PreallocatedLayer for layer in past_key_values.layers
        )
        if own_loop and fault == "positions":
            position_ids = torch.zeros_like(position_ids)
        if own_loop and fault == "cache" and input_ids.shape[1] == 1:
            past_key_values = attention_mask = None
        if own_loop and fault == "raises":
            raise NotImplementedError("no such cache")
        return original(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **others,
        )

    model.forward = forward
    engine = HybridEngine(_Engine(model))
    assert engine.backend == "transformers"
    assert "by transformers' generate(), because" in capsys.readouterr().out
    prompts, mask = _prompts()
    assert engine.generate(prompts, mask, _decoding(temperature=0.0)).log_probs is None
    with pytest.raises(UserError, match="--hybrid_engine_backend own"):
        HybridEngine(_Engine(model), backend="own")


def test_near_ties_are_no_difference_and_clear_ones_are():
    logits = torch.tensor([[[3.0, 2.999, 0.0], [0.0, 4.0, 0.0]]])
    plain = torch.tensor([[0, 1]])

    def rollout(tokens, log_probs=None):
        return Rollout(torch.tensor([[9, *tokens]]), log_probs, len(tokens))

    assert first_difference(rollout([0, 1]), plain, logits, (7,), 0.01) is None
    assert first_difference(rollout([1, 2]), plain, logits, (7,), 0.01) is None  # after a tie anything may come
    assert "gives 0, not 1" in first_difference(rollout([1, 1]), plain, logits, (7,), 1e-4)
    assert "gives 1, not 2" in first_difference(rollout([0, 2]), plain, logits, (7,), 0.01)
    assert "ends early" in first_difference(rollout([0]), plain, logits, (7,), 0.01)
    assert first_difference(rollout([0]), plain, logits, (0,), 0.01) is None
    assert first_difference(rollout([0]), plain, logits, (7, 0), 0.01) is None
    right = logits.log_softmax(-1)[0, torch.arange(2), plain[0]][None]
    assert first_difference(rollout([0, 1], right), plain, logits, (7,), 0.01) is None
    assert "log-prob" in first_difference(rollout([0, 1], right - 0.5), plain, logits, (7,), 0.01)


def test_lora_is_folded_for_the_phase_fused_with_its_neighbours_and_put_back(llama):
    model = convert_linear_layer_to_lora(_model("llama"), "auto", 4)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_left_weight, std=0.5)
    engine = HybridEngine(_Engine(model))
    prompts, mask = _prompts()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    decoding = _decoding(temperature=0.0)
    answers = engine.generate(prompts, mask, decoding).sequences
    assert any(len(group) == 3 for group in engine._groups)
    assert torch.equal(answers, generate_by_transformers(model, prompts, mask, decoding).sequences)
    assert not torch.equal(answers, generate_by_transformers(llama, prompts, mask, decoding).sequences)
    for name, (parameter, value) in before.items():
        assert model.state_dict(keep_vars=True)[name] is parameter and torch.equal(parameter, value)


def test_the_compiled_step_is_one_graph_for_all_widths_and_gives_the_same_rollouts(llama):
    """torch.compile with a backend that runs the captured graph as it is: what is tested is the capture."""
    counter = CompileCounterWithBackend("eager")
    compiled = CompiledStep(llama, 32, backend=counter)
    for width in (4, 9, 9):
        mask = (torch.arange(width) >= torch.tensor([[width - 2], [0], [width - 4]])).long()
        prompts = torch.arange(5, 5 + 3 * width).view(3, width)
        for temperature in (0.0, 1.0):
            rollouts = []
            for step in (None, compiled):
                torch.manual_seed(width)
                rollouts.append(sample_answers(llama, prompts, mask, _decoding(temperature=temperature), compiled=step))
            assert torch.equal(rollouts[0].sequences, rollouts[1].sequences)
            torch.testing.assert_close(rollouts[0].log_probs, rollouts[1].log_probs)
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="do not fit a cache of 32"):
        sample_answers(llama, prompts.repeat(1, 4), mask.repeat(1, 4), _decoding(), compiled=compiled)


def test_the_compiled_step_follows_weights_that_change_and_folded_lora(monkeypatch):
    monkeypatch.setattr("utils.generation.hybrid_engine.CompiledStep", partial(CompiledStep, backend="eager"))
    model = convert_linear_layer_to_lora(_model("llama"), "auto", 4)
    engine = HybridEngine(_Engine(model), compiled_length=32)
    prompts, mask = _prompts()
    decoding = _decoding(temperature=0.0)
    for _ in range(2):
        answers = engine.generate(prompts, mask, decoding).sequences
        assert torch.equal(answers, generate_by_transformers(model, prompts, mask, decoding).sequences)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_left_weight, std=0.5)
    engine.release_cache = True
    engine.generate(prompts, mask, decoding)
    assert not engine._compiled._caches
