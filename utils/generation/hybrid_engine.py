"""Fast generation on an engine that is being trained.

Under ZeRO-3 a forward pass gathers and releases every layer's weights; generating A tokens does that A times. Here the
weights are gathered once for the whole generation phase, with the hooks that gather and release taken off, and LoRA
updates are folded into their matrices, so that a token costs plain matrix products. Then everything is restored
exactly: shards were never written to, and a folded matrix's original was only set aside.

Answers come from the loop in sampling.py, or by choice from vLLM, which takes a copy of the weights before each phase,
once a check at the start has shown that their greedy tokens are those of ``generate()`` on this model.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from utils.generation.sampling import CompiledStep, Decoding, Rollout, generate_by_transformers, sample_answers
from utils.generation.vllm_backend import VllmEngine, VllmSettings
from utils.model.inputs import model_inputs
from utils.model.saving import published_weights
from utils.module.fused_linear import find_shared_inputs, fused_is_faster, fused_linears
from utils.module.hooks import hooks_set_aside
from utils.module.lora import lora_folded
from utils.process.console import print_classic, print_rank_0
from utils.process.errors import UserError
from utils.process.ranks import all_gather_objects, all_reduce_sum
from utils.process.world import get_world_size


def _all_ranks_fuse(engine) -> bool:
    """One answer for all ranks, whose processors are measured at the same time."""
    return all(all_gather_objects(fused_is_faster(engine.module)))


def first_difference(rollout: Rollout, plain, logits, eos_token_ids: Sequence[int], tolerance: float) -> str | None:
    """What sets greedy answers of a rollout apart from ``generate()``'s, or None.

    A row is compared up to its end token, or up to a place where both tokens are equally good: which of them comes
    there is a matter of rounding.

    Args:
        plain: [B, A] greedy answers that went on after the end token; logits: [B, A, V] that gave them.
        tolerance: differences of logits and log-probs up to this are rounding.
    """
    log_probs = logits.log_softmax(dim=-1)
    answers = rollout.sequences[:, rollout.sequences.shape[1] - rollout.width :].tolist()
    for row, (own, wanted) in enumerate(zip(answers, plain.tolist(), strict=True)):
        for position, token in enumerate(wanted):
            place = f"in row {row}, token {position} of the check batch"
            if position == len(own):
                return f"the answer ends early {place}"
            likely = log_probs[row, position]
            if (likely[own[position]] - likely[token]).abs() > tolerance:
                return f"generate() gives {token}, not {own[position]}, {place}"
            if own[position] != token:
                break
            if rollout.log_probs is not None and (rollout.log_probs[row, position] - likely[token]).abs() > tolerance:
                return f"the log-prob is {rollout.log_probs[row, position]:.5f}, not {likely[token]:.5f}, {place}"
            if token in eos_token_ids:
                break
    return None


class HybridEngine:
    """Switches a training engine into generation and back, and answers prompts with it.

    Args:
        engine: a DeepSpeed engine around a Hugging Face causal language model.
        enabled: off generates through the training engine as it is: by ``generate()``, under ZeRO-3 layer by layer,
            LoRA apart.
        gather_all: off leaves ZeRO-3 weights sharded and gathers them layer by layer for each token: slower, less
            memory.
        release_cache: give the accelerator's cached memory back after each generation phase.
        compiled_length: compile the own loop's step for this many tokens of prompt and answer; None: do not.
        backend: own, the loop of sampling.py; transformers, its generate(); deepspeed, the kernels of DeepSpeed's
            hybrid engine; vllm, an engine of vLLM beside the model; auto, own where it gives generate()'s tokens, else
            transformers.
        vllm: how that engine is set up.

    Attributes:
        backend: the one in use. needs_lockstep: every forward pass is a collective, so that all ranks make as many.
        gather_time: seconds of the last generation phase in which weights were gathered, or handed to vLLM.

    Raises:
        UserError: the backend that was asked for does not give the tokens of ``generate()``.
    """

    def __init__(
        self,
        engine,
        enabled: bool = True,
        gather_all: bool = True,
        release_cache: bool = False,
        backend: str = "auto",
        compiled_length: int | None = None,
        vllm: VllmSettings | None = None,
    ):
        self.engine, self.enabled, self.release_cache = engine, enabled, release_cache
        self._sharded = [param for param in engine.module.parameters() if hasattr(param, "ds_id")]
        # DeepSpeed's engine gathers for itself; vLLM has whole weights of its own.
        self.gathers = enabled and gather_all and bool(self._sharded) and backend not in ("deepspeed", "vllm")
        self.needs_lockstep = bool(self._sharded) and not self.gathers and backend != "vllm"
        self.gather_time = 0.0
        self._fuses = enabled and compiled_length is None and backend in ("own", "auto") and _all_ranks_fuse(engine)
        self._groups: list[list[str]] | None = None  # linear layers that can run as one, once they are known
        self._compiled = None if compiled_length is None else CompiledStep(engine.module, compiled_length)
        self._vllm = VllmEngine(engine.module, vllm) if backend == "vllm" else None
        self.backend = self._choose_backend(backend) if enabled else "transformers"

    @contextmanager
    def generation(self):
        """Yields the module, in eval mode, ready for forward passes with a cache."""
        module, was_training = self.engine.module, self.engine.module.training
        module.eval()
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                if self.gathers:
                    start = time.perf_counter()
                    stack.enter_context(deepspeed.zero.GatheredParameters(self._sharded))
                    self.gather_time = time.perf_counter() - start
                    stack.enter_context(hooks_set_aside(module))
                if self.enabled and not self.needs_lockstep and self.backend != "deepspeed":
                    stack.enter_context(lora_folded(module))
                    if self.backend == "own" and self._fuses:
                        if self._groups is None:
                            self._groups = find_shared_inputs(module)
                        stack.enter_context(fused_linears(module, self._groups))
                yield module
        finally:
            module.train(was_training)
            if self.release_cache:
                if self._compiled is not None:
                    self._compiled.release()
                get_accelerator().empty_cache()

    def generate(self, prompts, mask, decoding: Decoding, rewrite_logits: Callable | None = None) -> Rollout:
        """Answer each prompt; see ``sample_answers``.

        Raises:
            FloatingPointError: when logits were not finite.
        """
        if self.backend == "vllm":
            if rewrite_logits is not None:
                raise ValueError("vLLM hands out no logits to rewrite: take another --hybrid_engine_backend")
            start = time.perf_counter()
            self._vllm.take_weights(published_weights(self.engine.module))
            self.gather_time = time.perf_counter() - start
            return self._vllm.generate(prompts, mask, decoding)
        ranks_wait = self.needs_lockstep and get_world_size() > 1
        if self.backend == "deepspeed":
            self.engine.eval()  # puts its kernels in place
            return generate_by_transformers(self.engine, prompts, mask, decoding, ranks_wait, rewrite_logits)
        with self.generation() as model:
            if self.backend == "transformers":
                return generate_by_transformers(model, prompts, mask, decoding, ranks_wait, rewrite_logits)
            return sample_answers(
                model, prompts, mask, decoding, all_reduce_sum if ranks_wait else None, rewrite_logits, self._compiled
            )

    def records_log_probs(self, decoding: Decoding) -> bool:
        """Whether rollouts come with the log-probs of their tokens."""
        return self.backend == "own" or (self.backend == "vllm" and self._vllm.records_log_probs(decoding))

    # ------------------------------------------------------------ the check at the start

    def _choose_backend(self, wanted: str) -> str:
        """The backend to use, printed, after a check batch has been generated with it."""
        if wanted == "transformers":
            return wanted
        self.backend = "own" if wanted == "auto" else wanted
        if wanted == "deepspeed" and not getattr(self.engine, "_inference_containers", None):
            raise UserError(
                "--hybrid_engine_backend deepspeed: DeepSpeed has no kernels for "
                f"{type(self.engine.module).__name__}; use auto"
            )
        # One answer for all ranks: they would wait for each other in different loops.
        problem = next(filter(None, all_gather_objects(self._difference_from_generate())), None)
        if problem is not None and wanted != "auto":
            raise UserError(f"--hybrid_engine_backend {wanted}: {problem}; use auto")
        if problem is not None:
            print_rank_0(f"generation: by transformers' generate(), because of the own loop: {problem}")
            return "transformers"
        how = ", compiled" if self._compiled is not None else ", weights fused and packed" if self._fuses else ""
        print_classic(f"generation: {self.backend}{how} (its greedy tokens equal those of generate() on a check batch)")
        return self.backend

    def _difference_from_generate(self) -> str | None:
        """None if greedy answers to a small left-padded batch, rows of which end early, are those of ``generate()``."""
        module, device = self.engine.module, get_accelerator().current_device_name()
        vocabulary = module.config.get_text_config().vocab_size
        widths = torch.tensor([[2], [5], [3]])
        mask = (torch.arange(5) >= 5 - widths).long().to(device)
        prompts = torch.arange(15, device=device).view(3, 5) * 7 % vocabulary
        decoding = Decoding(8, eos_token_ids=(), pad_token_id=0, vocabulary=vocabulary, temperature=0)
        was_training = module.training
        self.engine.train()  # DeepSpeed's kernels, if there are any, out of the way
        module.eval()
        try:
            with torch.no_grad():
                plain = generate_by_transformers(module, prompts, mask, decoding, bool(self._sharded)).sequences
                inputs = model_inputs(module, plain, torch.cat([mask, mask.new_ones(3, 8)], dim=1))
                logits = module(**inputs).logits[:, 4:-1].float()
            decoding = replace(decoding, eos_token_ids=(int(plain[0, 7]),))
            if self._vllm is not None:  # what generate() sends must replace every one of these
                self._vllm.take_weights((name, weight * 0.5) for name, weight in published_weights(module))
            rollout = self.generate(prompts, mask, decoding)
        except (FloatingPointError, TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self.engine.train(was_training)
        # vLLM's kernels sum in an order of their own.
        roundings = 8 if self._vllm is None else 64
        # A log-prob is rounded at the size of its own and of the sum over the vocabulary, however small the logits are.
        size = max(math.log(vocabulary), logits.abs().max().item())
        tolerance = roundings * torch.finfo(module.dtype).eps * max(1.0, size)
        return first_difference(rollout, plain[:, 5:], logits, decoding.eos_token_ids, tolerance)
