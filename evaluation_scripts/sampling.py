"""Sampled answers of a saved model with their ids and log-probs, by the sampling loop of step 3 or by vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from utils.generation.sampling import Decoding, sample_answers
from utils.generation.saved_model import LanguageModel, decode_answer, left_padded, up_to_stop
from utils.model.inputs import embedding_rows
from utils.process.console import progress


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        ids: up to and with the stop id, if there is one.
        ended: by a stop id; otherwise cut off at the limit.
        log_prob: sum over the ids, under softmax(logits / temperature).
    """

    ids: list[int]
    text: str
    ended: bool
    log_prob: float


@torch.no_grad()
def sample(
    lm: LanguageModel,
    prompts: Sequence[list[int]],
    copies: int,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[list[Sample]]:
    """For each prompt ``copies`` answers.

    Args:
        prompts: ids; batch_size: answers at a time. An engine of vLLM is given all, and takes them in as others end.
    """
    decoding = Decoding(
        *(max_new_tokens, tuple(lm.stop_ids), lm.pad_id, embedding_rows(lm.model), temperature, top_k, top_p)
    )
    rows = [ids for ids in prompts for _ in range(copies)]
    if lm.engine is not None:
        found = lm.engine.complete(rows, torch.randint(2**31, (len(rows),)).tolist(), decoding)
        found = [(ids, sum(log_probs)) for ids, log_probs in found]
    else:
        found, longest_first = [None] * len(rows), sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        for start in progress(range(0, len(rows), batch_size), "sampling"):  # prompts of like length: less padding
            numbers = longest_first[start : start + batch_size]
            ids, mask = left_padded(lm, [rows[number] for number in numbers])
            rollout = sample_answers(lm.model, ids, mask, decoding)
            answers = rollout.sequences[:, ids.shape[1] :].tolist()
            sums = rollout.log_probs.sum(dim=1).tolist()
            for number, answer, log_prob in zip(numbers, answers, sums, strict=True):
                found[number] = (up_to_stop(answer, lm.stop_ids), log_prob)
    samples = iter(
        Sample(ids, decode_answer(ids, lm.tokenizer), bool(ids) and ids[-1] in lm.stop_ids, log_prob)
        for ids, log_prob in found
    )
    return [list(islice(samples, copies)) for _ in prompts]
