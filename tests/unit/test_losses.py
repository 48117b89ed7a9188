"""The loss of labels against the model's own logits: values, gradients, and that the logits never exist whole."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import FAMILIES, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from utils.model import losses
from utils.model.inputs import model_inputs
from utils.model.losses import LabelLogProbs, causal_lm_loss_sum


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(make_model(tmp_path))


def _batch():
    torch.manual_seed(1)
    ids, mask = torch.randint(5, 200, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:], mask[2, :4] = 0, 0
    return ids, mask, torch.where((mask == 1) & (torch.rand(3, 12) < 0.7), ids, -100)


def _plain_loss_sum(model, inputs, labels):
    logits = model(**inputs).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_the_models_own_logits(tmp_path, family, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, family)).eval()
    ids, mask, labels = _batch()
    inputs = model_inputs(model, ids, mask)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 5 * 4 * 336)  # five positions
    label_log_probs = LabelLogProbs(model)
    assert label_log_probs.after_head is not None  # no family here needs its logits whole
    ours, plain = causal_lm_loss_sum(label_log_probs, inputs, labels), _plain_loss_sum(model, inputs, labels)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    mine, own = _gradients(model, ours), _gradients(model, plain)
    assert mine.keys() == own.keys()
    for name in own:
        torch.testing.assert_close(mine[name], own[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert model(**inputs).logits.shape == (*ids.shape, model.config.vocab_size)  # nothing was left behind


def test_a_family_that_does_something_unknown_to_its_logits_is_scored_by_them(model):
    ids, mask, labels = _batch()
    inputs, original = model_inputs(model, ids, mask), model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits.sin() + torch.arange(output.logits.shape[-1]) / 100
        return output

    forward.__signature__ = inspect.signature(original)
    model.forward = forward
    label_log_probs = LabelLogProbs(model)
    assert label_log_probs.after_head is None
    ours, plain = causal_lm_loss_sum(label_log_probs, inputs, labels), _plain_loss_sum(model, inputs, labels)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    mine, own = _gradients(model, ours), _gradients(model, plain)
    assert all(torch.allclose(mine[name], own[name], atol=1e-5) for name in own)


class _LargestLogits(TorchDispatchMode):
    """The most positions that any tensor with a vocabulary's width has had, by dtype."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.positions = vocabulary, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
                positions = tensor.numel() // self.vocabulary
                self.positions[tensor.dtype] = max(positions, self.positions.get(tensor.dtype, 0))
        return result


def test_logits_never_exist_whole_in_any_dtype(model, monkeypatch):
    model.bfloat16()
    ids, mask, _ = _batch()
    vocabulary, width = model.config.vocab_size, model.config.hidden_size
    monkeypatch.setattr(losses, "CHUNK_BYTES", 5 * 4 * vocabulary)
    label_log_probs, inputs = LabelLogProbs(model), model_inputs(model, ids, mask)
    with _LargestLogits(vocabulary) as largest:
        loss = causal_lm_loss_sum(label_log_probs, inputs, ids)
        loss.backward()
    assert loss.dtype == torch.float32
    assert largest.positions[torch.float32] == 5
    assert largest.positions[torch.bfloat16] in (5, width)  # the head's weight, transposed, is [width, vocabulary]


def test_entropy_and_temperature_are_those_of_the_distribution_over_the_given_vocabulary(model):
    ids, mask, labels = _batch()
    log_probs, entropies = LabelLogProbs(model)(
        model_inputs(model, ids, mask), labels, temperature=0.5, vocabulary=300, with_entropy=True
    )
    all_log_probs = (model(**model_inputs(model, ids, mask)).logits[:, :-1, :300] / 0.5).log_softmax(-1)
    wanted = labels[:, 1:] != -100
    torch.testing.assert_close(log_probs, all_log_probs[wanted].gather(1, labels[:, 1:][wanted][:, None])[:, 0])
    torch.testing.assert_close(entropies, -(all_log_probs.exp() * all_log_probs).sum(-1)[wanted])
    assert not entropies.requires_grad


def test_the_backward_pass_recomputes_every_chunk_but_the_last(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 2 * 4 * 7)  # two positions
    hidden, labels, calls = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 6, 2, 3, 1]), []
    head = torch.randn(7, 3)

    def to_logits(part):
        calls.append(len(part))
        return F.linear(part, head)

    scores = losses.score_in_chunks(hidden, labels, to_logits, 7)
    assert calls == [2, 2, 1]
    (gradient,) = torch.autograd.grad(scores.sum(), hidden)
    assert sorted(calls[3:]) == [2, 2]
    whole = F.linear(hidden, head).log_softmax(-1).gather(1, labels.unsqueeze(1))
    torch.testing.assert_close(scores, whole)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole.sum(), hidden)[0])


def test_a_batch_without_labels_has_a_loss_of_zero_and_gradients_of_zero(model):
    ids, mask, labels = _batch()
    loss = causal_lm_loss_sum(LabelLogProbs(model), model_inputs(model, ids, mask), torch.full_like(labels, -100))
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in _gradients(model, loss).values())
