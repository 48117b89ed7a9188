"""An optimizer step out of micro-batches: boundaries, weights, what is reported, and steps that are left out."""

import math

import pytest
import torch

from utils.engine import update as update_module
from utils.engine.update import Update
from utils.process.errors import SharedError


class Engine:
    """As much of a DeepSpeed engine as an update touches; keeps what it was told."""

    def __init__(self, norm: float = 2.0):
        self.calls, self.norm, self.boundary = [], norm, None

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundary = is_boundary

    def backward(self, loss, scale_wrt_gas: bool) -> None:
        assert scale_wrt_gas is False
        self.calls.append(("backward", loss.item(), self.boundary))

    def step(self) -> None:
        self.calls.append("count")

    def get_lr(self) -> list[float]:
        return [0.0 if "step" in self.calls else 0.5]


@pytest.fixture
def dropped(monkeypatch):
    """Engines whose gradients were dropped, in a world of two ranks of which the other has losses of the same size."""
    engines = []
    monkeypatch.setattr(update_module, "get_world_size", lambda: 2)
    monkeypatch.setattr(update_module, "all_reduce_sum", lambda values: 2 * values)
    monkeypatch.setattr(update_module, "drop_gradients", engines.append)
    monkeypatch.setattr(update_module, "take_step", lambda engine: engine.calls.append("step") or engine.norm)
    return engines


def test_losses_of_all_micro_batches_and_ranks_add_up_and_only_the_last_is_the_boundary(dropped):
    engine = Engine()
    update = Update({"model": engine})
    for batch in update.micro_batches([1.0, 2.0, 4.0]):
        update.backward(torch.tensor(batch))
        update.record(accuracy=torch.tensor(batch / 8))
    assert update.step() == {"loss": 14.0, "accuracy": 1.75, "grad_norm": 2.0, "lr": 0.5}
    assert engine.calls == [
        *(("backward", 2.0, False), "count", ("backward", 4.0, False), "count"),
        *(("backward", 8.0, True), "step"),
    ]
    assert (dropped, update.dropped) == ([], False)


def test_a_second_backward_pass_of_a_micro_batch_is_the_boundary_and_its_weight_is_not_reported(dropped):
    actor, critic = Engine(1.0), Engine(None)
    update = Update({"actor": actor, "critic": critic})
    for _ in update.micro_batches([None]):
        update.backward(torch.tensor(3.0), "actor_loss", "actor", more=True)
        update.backward(torch.tensor(5.0), "unsupervised_loss", "actor", weight=10.0)
        update.backward(torch.tensor(7.0), "critic_loss", "critic")
    assert update.step() == {
        **{"actor_loss": 6.0, "unsupervised_loss": 10.0, "critic_loss": 14.0},
        **{"actor_grad_norm": 1.0, "critic_grad_norm": None},
        **{"actor_lr": 0.5, "critic_lr": 0.5},
    }
    assert actor.calls == [("backward", 6.0, False), ("backward", 100.0, True), "step"]
    assert critic.calls == [("backward", 14.0, True), "step"]


def test_figures_begin_anew_with_each_step(dropped):
    update = Update({"model": Engine()})
    for _ in range(2):
        for batch in update.micro_batches([1.0]):
            update.backward(torch.tensor(batch))
        assert update.step()["loss"] == 2.0


def test_a_loss_that_is_not_finite_drops_the_gradients_of_every_engine_before_their_steps(dropped):
    engines = {"actor": Engine(), "critic": Engine()}
    update, asked = Update(engines), []
    for _ in update.micro_batches([None]):
        update.backward(torch.tensor(math.nan), "actor_loss", "actor")
        update.backward(torch.tensor(1.0), "critic_loss", "critic")

    def is_dropped(figures) -> bool:
        asked.append(figures)
        return True

    figures = update.step(is_dropped)
    assert dropped == list(engines.values()) and update.dropped
    assert math.isnan(figures["actor_loss"])
    assert [list(figures) for figures in asked] == [["actor", "critic"]]  # the norms are not asked about any more
    assert math.isnan(asked[0]["actor"]["actor_loss"]) and asked[0]["critic"] == {"critic_loss": 2.0}


def test_a_norm_that_is_not_finite_is_refused_by_name(dropped):
    update = Update({"model": Engine(math.inf)})
    for _ in update.micro_batches([None]):
        update.backward(torch.tensor(1.0))
    with pytest.raises(SharedError, match="the gradient norm of the engine 'model' is inf"):
        update.step()
