"""For a while: a module with another forward, with its outputs recorded, or without its hooks."""

from contextlib import contextmanager

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@contextmanager
def forward_replaced(module, forward):
    """While open, ``module(...)`` runs ``forward``, between the same hooks (ZeRO-3's, say) as ever."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def outputs_recorded(module):
    """Yields a list to which every call of ``module`` adds its output, as its other hooks have left it."""
    outputs = []
    handle = module.register_forward_hook(lambda _module, _arguments, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def hooks_set_aside(module):
    """While open, no module below runs its forward hooks."""
    saved = [(part, name, part.__dict__[name]) for part in module.modules() for name in HOOK_TABLES]
    try:
        for part, name, table in saved:
            part.__dict__[name] = type(table)()
        yield
    finally:
        for part, name, table in saved:
            part.__dict__[name] = table
