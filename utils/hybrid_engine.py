"""Fast generation on an engine that is being trained.

Under ZeRO-3 a forward pass gathers and releases every layer's weights; generating A tokens does that A times. Here the
weights are gathered once for the whole generation phase, with the hooks that gather and release taken off, and LoRA
updates are folded into their matrices, so that a token costs plain matrix products. Then everything is put back
exactly: shards were never written to, and a folded matrix's original was only set aside.
"""

from contextlib import ExitStack, contextmanager

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from utils.module.lora import lora_layers

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@contextmanager
def _hooks_set_aside(module):
    """While open, no module below runs its forward hooks."""
    saved = [(part, name, part.__dict__[name]) for part in module.modules() for name in HOOK_TABLES]
    try:
        for part, name, table in saved:
            part.__dict__[name] = type(table)()
        yield
    finally:
        for part, name, table in saved:
            part.__dict__[name] = table


@contextmanager
def _lora_folded(module):
    layers = [layer for _, layer in lora_layers(module)]
    try:
        for layer in layers:
            layer.fuse_lora_weight()
        yield
    finally:
        for layer in layers:
            layer.unfuse_lora_weight()


class HybridEngine:
    """Switches a training engine into generation and back.

    Args:
        engine: a DeepSpeed engine around a Hugging Face causal language model.
        enabled: off generates through the training engine as it is (under ZeRO-3 layer by layer, LoRA apart).
        gather_all: off leaves ZeRO-3 weights sharded and gathers them layer by layer for each token: slower, less
            memory.
        release_cache: give the accelerator's cached memory back after each generation phase.
    """

    def __init__(self, engine, enabled: bool = True, gather_all: bool = True, release_cache: bool = False):
        self.engine, self.enabled, self.release_cache = engine, enabled, release_cache
        self._sharded = [param for param in engine.module.parameters() if hasattr(param, "ds_id")]
        self.gathers = enabled and gather_all and bool(self._sharded)
        self.needs_lockstep = bool(self._sharded) and not self.gathers  # every forward pass is a collective

    @contextmanager
    def generation(self):
        """Yields the module, in eval mode, ready for ``generate``."""
        module, was_training = self.engine.module, self.engine.module.training
        module.eval()
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                if self.gathers:
                    stack.enter_context(deepspeed.zero.GatheredParameters(self._sharded))
                    stack.enter_context(_hooks_set_aside(module))
                if self.enabled and not self.needs_lockstep:
                    stack.enter_context(_lora_folded(module))
                yield module
        finally:
            module.train(was_training)
            if self.release_cache:
                get_accelerator().empty_cache()
