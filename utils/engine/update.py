"""One optimizer step out of micro-batches, of one engine or of several that step together.

    update = Update({"model": engine})
    for step, window in ...:
        for batch in update.micro_batches(window):
            loss_sum = ...
            update.backward(loss_sum / learned_tokens)
        figures = update.step()

Losses are sums over this rank's rows divided by a count over all ranks, so that they add up to the global mean: over
the micro-batches here, over the ranks in ``step``.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from utils.engine.nonfinite import Figures, refuse_nonfinite
from utils.engine.steps import drop_gradients, override_next_call, take_step
from utils.process.ranks import all_reduce_sum
from utils.process.world import get_world_size


def align_overflow(*engines) -> None:
    """fp16: when the gradients of one engine overflowed, the coming step of every one is skipped, its loss scale
    lowered alike, so that actor and critic have always taken the same number of steps. Collective."""
    overflowed = any([engine.optimizer.has_overflow() for engine in engines])  # a list: each is a collective
    for engine in engines:
        override_next_call(engine.optimizer, "has_overflow", overflowed)


class Update:
    """Gathers gradients and figures over the micro-batches of an optimizer step, then makes it, or leaves it out.

    Args:
        engines: name -> DeepSpeed engine; messages and figures use the names. "model" is the only one of its step.
        align_overflow: fp16: the engines skip overflowing steps together.

    Attributes:
        dropped: whether the last step made no update, its loss or gradient being non-finite.
    """

    def __init__(self, engines: dict, align_overflow: bool = False):
        self.engines, self.align_overflow, self.dropped = engines, align_overflow, False
        self._losses: dict[str, dict[str, torch.Tensor]] = {}
        self._figures: dict[str, torch.Tensor] = {}
        self._is_last = False

    def micro_batches(self, window: Iterable) -> Iterator:
        """The micro-batches of one step, one after another; the caller runs forward and ``backward`` on each."""
        window = list(window)
        self._losses, self._figures = {name: {} for name in self.engines}, {}
        for i, batch in enumerate(window):
            self._is_last = i == len(window) - 1
            yield batch
            if not self._is_last:
                for engine in self.engines.values():
                    engine.step()  # no boundary: it only counts the micro-batch

    def backward(
        self, loss: torch.Tensor, name: str = "loss", engine: str = "model", weight: float = 1.0, more: bool = False
    ) -> None:
        """Add the gradient of a micro-batch's loss.

        Args:
            loss: scalar, this rank's share of the global mean. It is also recorded, as ``name``.
            engine: whose gradient.
            weight: factor of the loss in the gradient, not in what is recorded.
            more: another backward pass of this engine follows in the same micro-batch.
        """
        target = self.engines[engine]
        target.set_gradient_accumulation_boundary(self._is_last and not more)
        # DeepSpeed takes the mean of the ranks' gradients; the loss is already a share of the global mean.
        target.backward(weight * loss * get_world_size(), scale_wrt_gas=False)
        _add(self._losses[engine], {name: loss})

    def record(self, **figures: torch.Tensor) -> None:
        """Scalars of a micro-batch, summed as losses are: over micro-batches and ranks. All ranks give the same."""
        _add(self._figures, figures)

    def step(self, is_dropped: Callable[[Figures], bool] = refuse_nonfinite) -> dict[str, float | None]:
        """The optimizer step of every engine; every rank must call this.

        Args:
            is_dropped: from {engine: {name: value}}, whether the step makes no update; first asked with the losses,
                then with the norms of the gradients. It may raise.

        Returns:
            losses and recorded figures, summed over all ranks; ``grad_norm`` and ``lr`` of the engine "model",
            ``NAME_grad_norm`` and ``NAME_lr`` of any other: the norm before clipping, None where fp16 had an overflow;
            the learning rate of this step (of the first parameter group).
        """
        sums = {name: value for losses in self._losses.values() for name, value in losses.items()} | self._figures
        figures = dict(zip(sums, all_reduce_sum(torch.stack(list(sums.values()))).tolist(), strict=True))
        losses = {engine: {name: figures[name] for name in names} for engine, names in self._losses.items()}
        self.dropped = is_dropped(losses)
        if self.dropped:
            for engine in self.engines.values():
                drop_gradients(engine)
        if self.align_overflow:
            align_overflow(*self.engines.values())
        rates = {name: engine.get_lr()[0] for name, engine in self.engines.items()}  # the schedule goes on in the step
        norms = {name: take_step(engine) for name, engine in self.engines.items()}
        if not self.dropped:
            self.dropped = is_dropped({name: {"gradient norm": norm} for name, norm in norms.items()})
        for name in self.engines:
            prefix = "" if name == "model" else f"{name}_"
            figures |= {f"{prefix}grad_norm": norms[name], f"{prefix}lr": rates[name]}
        return figures


def _add(sums: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        value = value.detach().float()
        sums[name] = sums[name] + value if name in sums else value
