"""The Hugging Face hub: which names it may know, and whether it answers."""

import re
from functools import cache
from typing import Literal

from huggingface_hub import HfApi

HUB_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")  # owner/name
HUB_SECONDS = 5  # for the hub's first answer


@cache
def trouble_with_hub(name: str, kind: Literal["model", "dataset"]) -> Exception | None:
    """What keeps the hub from answering for a model or dataset; one request, as libraries try for minutes.

    RepositoryNotFoundError where it answers, and has none of this name or does not show it.
    """
    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    try:
        ask(name, timeout=HUB_SECONDS)
    except Exception as error:  # each version of the client has network errors of its own
        return error
    return None
