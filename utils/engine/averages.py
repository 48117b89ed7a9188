"""Averages of what a run reports, with their state in its checkpoints."""


class PlainState:
    """Something whose attributes are numbers, and its whole state in a checkpoint."""

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError: other names than ``state_dict`` gives, or what is no number."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"{', '.join(sorted(state))} instead of {', '.join(sorted(self.state_dict()))}")
        for name, value in state.items():
            if not (value is None or isinstance(value, int | float)):
                raise ValueError(f"{name} is no number")
        vars(self).update(state)


class MovingAverage(PlainState):
    """The mean of all numbers so far."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.count = 0
        self.total = 0.0
        self.mean = 0.0

    def update(self, num):
        self.total += num
        self.count += 1
        self.mean = self.total / self.count
        return self.mean


class ExponentialMovingAverage(PlainState):
    """The exponential moving average of a number: the first value as it is, then alpha of the old and the rest new."""

    def __init__(self, alpha=0.9):
        self.alpha = alpha
        self.ema = None

    def update(self, num):
        self.ema = num if self.ema is None else self.alpha * self.ema + (1 - self.alpha) * num
        return self.ema

    def get(self):
        return self.ema if self.ema is not None else 0.0
