"""The versions of the packages that decide what a run computes."""

import importlib.metadata


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
