"""Packing on any family: the way in which it keeps the rows of a block apart is tried before training.

A model with windows needs a mask for each type of layer, one with alibi builds its mask itself, a recurrent one carries
its state from row to row whatever mask it is given. So nothing is assumed: two rows are scored alone and in one block.
"""

from contextlib import contextmanager

import torch
from transformers import DynamicCache

from utils.data.batching import DataCollatorPacked, DataCollatorSFT
from utils.model.inputs import packing_ways, sft_inputs
from utils.model.losses import LabelLogProbs
from utils.process.console import print_rank_0
from utils.process.errors import UserError
from utils.process.ranks import all_gather_objects

ROW_LENGTHS, WINDOW = (21, 13), 8  # of the check: both rows are longer than the window, which is narrowed to this
WINDOW_NAMES = ("sliding_window", "attention_chunk_size")
# What families raise at packed inputs that they do not take.
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)
ROUNDING = 4  # differences up to this many times what another order of the same sums makes are rounding


def has_state(model) -> bool:
    """Whether layers hand on a state (Mamba, linear attention, convolutions) that no mask keeps within a row.

    Args:
        model: of transformers; on the meta device is enough.
    """
    return getattr(model, "_is_stateful", False) or any(DynamicCache(config=model.config).is_linear)


def refuse_state(model) -> None:
    """UserError for a model that cannot be packed by its kind."""
    if has_state(model):
        raise UserError(
            f"--packing: {type(model).__name__} has layers with a state (recurrent, linear attention or "
            "convolution), which would go on from one row of a block into the next; leave --packing out"
        )


@contextmanager
def _narrow_windows(model):
    """While open, the windows of a model's attention are WINDOW tokens wide, so that short rows meet their ends."""
    parts = [model.config.get_text_config(), *model.modules()]
    saved = [(part, name, vars(part).get(name)) for part in parts for name in WINDOW_NAMES]
    saved = [(part, name, width) for part, name, width in saved if type(width) is int and width > WINDOW]
    try:
        for part, name, _ in saved:
            setattr(part, name, WINDOW)
        yield
    finally:
        for part, name, width in saved:
            setattr(part, name, width)


def _rows(vocabulary: int, start: int = 1) -> list[dict]:
    """Rows of ids without a pattern that a model could know; those of another ``start`` share none with these."""
    ids = torch.arange(start, start + sum(ROW_LENGTHS)) ** 3 * 7 % vocabulary
    return [{"input_ids": row.tolist(), "answer_spans": [], "answers_only": False} for row in ids.split(ROW_LENGTHS)]


def _mean_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().mean().item()


class _Check:
    """Log-probs of two rows alone, against which those in a block are held.

    Two questions, of which the first is the sharper in 16 bit: does the second row's score change with the first row
    (then nothing but its content moves, and all sums have the same order), and do both score as they do alone?
    """

    def __init__(self, label_log_probs: LabelLogProbs):
        self.label_log_probs, self.model = label_log_probs, label_log_probs.model
        vocabulary = min(label_log_probs.rows, self.model.config.get_text_config().vocab_size)
        self.rows, others = _rows(vocabulary), _rows(vocabulary, start=101)
        self.changed_rows = [others[0], self.rows[1]]
        padded = DataCollatorSFT(0, max(ROW_LENGTHS))
        self.alone = torch.cat([self._scores(padded([row])) for row in self.rows])
        # The same rows in another shape: how far rounding alone may move log-probs.
        moved = ROUNDING * _mean_difference(self._scores(padded(self.rows)), self.alone)
        step = torch.finfo(self.model.dtype).eps * self.alone.abs().mean().item()
        self.rounding, self.rounding_in_place = max(moved, ROUNDING * step), max(moved, step / 32)

    def _scores(self, batch: dict, way: str = "") -> torch.Tensor:
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        return self.label_log_probs(sft_inputs(self.model, batch, way), batch["labels"])[0]

    def problem(self, way: str) -> str:
        """What is wrong with a way of packing; "" for nothing."""
        block, second_row = DataCollatorPacked(0), ROW_LENGTHS[0] - 1
        try:
            packed = self._scores(block([self.rows]), way)
            changed = self._scores(block([self.changed_rows]), way)
        except REFUSALS as error:
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        leak = _mean_difference(packed[second_row:], changed[second_row:])
        if not leak <= self.rounding_in_place:
            return f"{leak:.2g} when the row before is another one (rounding: {self.rounding_in_place:.2g})"
        difference = _mean_difference(packed, self.alone)
        return "" if difference <= self.rounding else f"{difference:.2g} (rounding: {self.rounding:.2g})"


@torch.no_grad()
def choose_packing(label_log_probs: LabelLogProbs) -> str:
    """The first of ``packing_ways`` in which rows of a block get the log-probs that they get alone; it is printed.

    Every rank must call this: a forward pass may be a collective. Some passes over 34 tokens.

    Raises:
        UserError: there is none, with the differences.
    """
    model, was_training = label_log_probs.model, label_log_probs.model.training
    refuse_state(model)
    model.eval()
    try:
        with _narrow_windows(model):
            check, problems = _Check(label_log_probs), {}
            for way in packing_ways(model):
                # One answer for all ranks, whose kernels may round differently.
                problems[way] = next(filter(None, all_gather_objects(check.problem(way))), "")
                if not problems[way]:
                    print_rank_0(f"packing: by {way} (rows of a check block score as they do alone)")
                    return way
    finally:
        model.train(was_training)
    found = "; ".join(f"by {way}, {problem}" for way, problem in problems.items())
    raise UserError(
        f"--packing: rows in one block of a {type(model).__name__} do not score as they do alone. Log-probs of their "
        f"tokens differ in the mean: {found}. Leave --packing out"
    )
