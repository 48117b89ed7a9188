"""Our mathematics against TRL's, on random masked tensors. Not run by default; in an environment that has TRL:

    python -m pytest -m trl

TRL 1.10.0 is its last release with PPO. Its trainer has no functions to call for most of this, so the statements
themselves are taken out of its installed source and run.
"""

import ast
import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch

from training.step3_rlhf_finetuning import ppo_math

pytestmark = pytest.mark.trl
ARGS = SimpleNamespace(gamma=0.97, lam=0.9, cliprange=0.2, cliprange_value=0.2, kl_coef=0.1, kl_estimator="k1")


@pytest.fixture
def trl_ppo():
    return pytest.importorskip("trl.experimental.ppo.ppo_trainer")


def run_statements(function, first: str, last: str, values: dict) -> dict:
    """Run the statements of a function from the one that assigns ``first`` to the next that assigns ``last``.

    Args:
        values: the names they read. Returns those they bind, too.
    """

    def binds(statement, name):
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        return any(isinstance(target, ast.Name) and target.id == name for target in targets)

    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        starts = [i for i, part in enumerate(body) if binds(part, first)] if isinstance(body, list) else []
        if starts:
            ends = [i for i, part in enumerate(body) if i >= starts[0] and binds(part, last)]
            module = ast.Module(body[starts[0] : ends[0] + 1], type_ignores=[])
            names = {"torch": torch, "args": ARGS} | values
            exec(compile(module, "trl", "exec"), names)
            return names
    raise AssertionError(f"no statement assigns {first}: another version of TRL?")


def random_answers(rows=7, width=11):
    """Masked tensors [B, A] as PPO meets them; lengths from 1 to the full width."""
    generator = torch.Generator().manual_seed(0)

    def normal(scale=1.0):
        return torch.randn(rows, width, generator=generator) * scale

    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0], lengths[1] = 1, width
    mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
    log_probs = -normal().abs()
    return SimpleNamespace(
        mask=mask,
        pads=mask == 0,
        log_probs=log_probs,
        ref_log_probs=log_probs + normal(0.3),
        new_log_probs=log_probs + normal(0.3),
        values=normal() * mask,
        new_values=normal() * mask,
        rewards=normal() * mask,
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators(trl_ppo, estimator, monkeypatch):
    x = random_answers()
    monkeypatch.setattr(ARGS, "kl_estimator", estimator)
    names = {"logprobs": x.log_probs, "ref_logprobs": x.ref_log_probs}
    theirs = run_statements(trl_ppo.PPOTrainer.train, "logr", "kl", names)["kl"]
    torch.testing.assert_close(
        ppo_math.kl_per_token(x.log_probs, x.ref_log_probs, estimator), theirs, rtol=0, atol=1e-6
    )


def test_gae_and_whitening(trl_ppo):
    x = random_answers()
    names = {"responses": x.mask, "rewards": x.rewards, "values": x.values}
    theirs = run_statements(trl_ppo.PPOTrainer.train, "lastgaelam", "returns", names)
    advantages, returns = ppo_math.get_advantages_and_returns(x.values, x.rewards, x.mask, ARGS.gamma, ARGS.lam)
    torch.testing.assert_close(advantages, theirs["advantages"] * x.mask, rtol=0, atol=1e-6)
    torch.testing.assert_close(returns, theirs["returns"] * x.mask, rtol=0, atol=1e-6)
    whitened = trl_ppo.masked_whiten(advantages, ~x.pads).masked_fill(x.pads, 0)
    torch.testing.assert_close(ppo_math.masked_whiten(advantages, x.mask), whitened, rtol=0, atol=1e-6)


def test_policy_loss_and_its_gradient(trl_ppo):
    x = random_answers()
    rows, tokens = torch.arange(len(x.mask)), x.mask.sum()
    ours_in, theirs_in = (x.new_log_probs.clone().requires_grad_() for _ in range(2))
    names = {"mb_logprobs": x.log_probs, "new_logprobs": theirs_in, "mb_advantage": x.rewards, "micro_batch_inds": rows}
    names |= {"padding_mask": x.pads, "masked_mean": trl_ppo.masked_mean}
    theirs = run_statements(trl_ppo.PPOTrainer.train, "logprobs_diff", "pg_loss", names)
    ours = ppo_math.policy_loss_sum(ours_in, x.log_probs, x.rewards, x.mask, ARGS.cliprange)
    torch.testing.assert_close(ours.loss / tokens, theirs["pg_loss"], rtol=0, atol=1e-6)
    (ours.loss / tokens).backward()
    theirs["pg_loss"].backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=0, atol=1e-6)
    stopped = trl_ppo.masked_mean((theirs["pg_losses2"] > theirs["pg_losses"]).float(), ~x.pads)
    torch.testing.assert_close(ours.clipped / tokens, stopped, rtol=0, atol=1e-6)
    assert 0 < stopped < 1


def test_value_loss_and_its_gradient(trl_ppo):
    x = random_answers()
    rows, tokens = torch.arange(len(x.mask)), x.mask.sum()
    ours_in, theirs_in = (x.new_values.clone().requires_grad_() for _ in range(2))
    names = {"mb_values": x.values, "vpred": theirs_in, "mb_return": x.rewards, "micro_batch_inds": rows}
    names |= {"padding_mask_p1": x.pads, "masked_mean": trl_ppo.masked_mean}
    theirs = run_statements(trl_ppo.PPOTrainer.train, "vpredclipped", "vf_clipfrac", names)
    ours = ppo_math.value_loss_sum(ours_in, x.values, x.rewards, x.mask, ARGS.cliprange_value)
    torch.testing.assert_close(ours.loss / tokens, theirs["vf_loss"], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.clipped / tokens, theirs["vf_clipfrac"], rtol=0, atol=1e-6)
    (ours.loss / tokens).backward()
    theirs["vf_loss"].backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=0, atol=1e-6)


def test_log_probs_of_tempered_logits(trl_ppo):
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(3, 5, 17, generator=generator), torch.randint(0, 17, (3, 5), generator=generator)
    theirs = trl_ppo.selective_log_softmax(logits / 0.7, labels)
    torch.testing.assert_close(ppo_math.gather_log_probs(logits, labels, 0.7), theirs, rtol=0, atol=1e-6)
