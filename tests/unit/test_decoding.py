"""Diverse beam search and contrastive search: hand-computed values, and what they must equal."""

import pytest
import torch
from helpers import make_model

from inference import chatbot
from utils.generation.decoding import contrastive_ids, contrastive_scores, diverse_beam_ids, hamming_penalty
from utils.generation.saved_model import generate_ids, load_language_model

PROMPTS = [[1, 40, 50, 60], [1, 70], [1, 33, 34, 35, 36, 37, 38]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lm(request, tmp_path_factory):
    """A random model whose logits are far enough apart to be ordered alike however they are computed."""
    folder = str(make_model(tmp_path_factory.mktemp(request.param), request.param))
    lm = load_language_model(folder, chatbot.parse_args(["--path", folder, "--device", "cpu"]))
    head = lm.model.get_output_embeddings()
    torch.manual_seed(3)
    torch.nn.init.normal_(head.weight, std=0.4)
    # Tokens that come up on the way, so that some beams end early.
    rows = generate_ids(lm, PROMPTS, do_sample=False, max_new_tokens=8, num_beams=4, num_return_sequences=4)
    lm.stop_ids = [lm.tokenizer.eos_token_id, rows[3][6], rows[5][4]]
    return lm


def test_a_token_costs_as_often_as_groups_before_have_chosen_it():
    chosen = [torch.tensor([[2, 0], [1, 1]]), torch.tensor([[2, 3], [-1, -1]])]
    assert hamming_penalty(chosen, 4).tolist() == [[1, 0, 2, 1], [0, 2, 0, 0]]


def test_contrastive_scores_by_hand():
    probs = torch.tensor([[0.5, 0.3]])
    context = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]]])
    mask = torch.tensor([[0, 1, 1]])  # the first is padding
    candidates = torch.tensor([[[3.0, 0.0], [3.0, -4.0]]])  # cosines 1 and 0; 0.6 and -0.8
    scores = contrastive_scores(probs, candidates, context, mask, 0.6)
    assert torch.allclose(scores, torch.tensor([[0.4 * 0.5 - 0.6 * 1.0, 0.4 * 0.3 - 0.6 * 0.6]]))


@pytest.mark.parametrize(("num_beams", "returned"), [(3, 1), (4, 4)])
def test_one_group_is_transformers_beam_search(lm, num_beams, returned):
    settings = {"max_new_tokens": 14, "num_beams": num_beams, "num_return_sequences": returned}
    expected = generate_ids(lm, PROMPTS, do_sample=False, **settings)
    ours = diverse_beam_ids(lm, PROMPTS, num_beam_groups=1, diversity_penalty=0.7, **settings)
    assert ours == expected
    assert num_beams < 4 or {len(row) < 14 for row in ours} == {True, False}


def test_groups_without_a_penalty_all_find_what_one_finds(lm):
    one = generate_ids(lm, PROMPTS, do_sample=False, max_new_tokens=10, num_beams=2, num_return_sequences=2)
    settings = {"max_new_tokens": 10, "num_beams": 6, "num_beam_groups": 3, "num_return_sequences": 6}
    found = diverse_beam_ids(lm, PROMPTS, diversity_penalty=0.0, **settings)
    for number in range(len(PROMPTS)):
        rows = found[number * 6 : number * 6 + 6]
        assert rows[::3] == one[number * 2 : number * 2 + 2] and len({tuple(row) for row in rows}) == 2


def test_a_high_penalty_lets_no_two_groups_choose_the_same_token(lm, monkeypatch):
    monkeypatch.setattr(lm, "stop_ids", lm.stop_ids[:1])
    settings = {"max_new_tokens": 6, "num_beams": 4, "num_beam_groups": 4, "num_return_sequences": 4}
    found = diverse_beam_ids(lm, PROMPTS, diversity_penalty=1e3, **settings)
    for number in range(len(PROMPTS)):
        rows = found[number * 4 : number * 4 + 4]
        for place in range(min(map(len, rows))):
            assert len({row[place] for row in rows}) == 4
        [alone] = diverse_beam_ids(lm, [PROMPTS[number]], 6, num_beams=1, num_beam_groups=1, diversity_penalty=0.0)
        assert alone in rows  # the first group's, which pays nothing


@pytest.mark.parametrize(("top_k", "alpha"), [(4, 0.0), (1, 0.9)])
def test_contrastive_search_without_a_choice_is_greedy(lm, top_k, alpha):
    expected = generate_ids(lm, PROMPTS, do_sample=False, max_new_tokens=14)
    assert contrastive_ids(lm, PROMPTS, max_new_tokens=14, top_k=top_k, penalty_alpha=alpha) == expected


def test_contrastive_search_step_by_step_without_cache_and_padding(lm):
    [found] = contrastive_ids(lm, PROMPTS[2:], max_new_tokens=8, top_k=4, penalty_alpha=0.6)
    ids = list(PROMPTS[2])
    for token in found:
        with torch.no_grad():
            output = lm.model(torch.tensor([ids]), output_hidden_states=True)
            context = torch.nn.functional.normalize(output.hidden_states[-1][0], dim=-1)
            probs, candidates = output.logits[0, -1].softmax(-1).topk(4)
            scores = []
            for prob, candidate in zip(probs, candidates, strict=True):
                hidden = lm.model(torch.tensor([[*ids, candidate]]), output_hidden_states=True).hidden_states[-1][0, -1]
                scores.append(float(0.4 * prob - 0.6 * (context @ hidden / hidden.norm()).max()))
        assert token == int(candidates[max(range(4), key=scores.__getitem__)])
        ids.append(token)
    assert found != generate_ids(lm, PROMPTS[2:], do_sample=False, max_new_tokens=8)[0]


def test_neighbours_and_padding_change_nothing(lm):
    beams = {"max_new_tokens": 8, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}
    contrastive = {"max_new_tokens": 8, "top_k": 3, "penalty_alpha": 0.5}
    for generate, settings in ((diverse_beam_ids, beams), (contrastive_ids, contrastive)):
        alone = [row for prompt in PROMPTS for row in generate(lm, [prompt], **settings)]
        assert generate(lm, PROMPTS, **settings) == alone
