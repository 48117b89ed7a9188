"""Sampling answers for a batch of left-padded prompts, with a KV cache, from any causal language model of transformers.

``generate()`` serves every use there is, this loop one: each row stops at an end token, finished rows leave the batch,
pads that no remaining row needs leave the cache, and each token's log-prob is recorded. A row's tokens depend on its
own prompt and random numbers alone, not on when its neighbours end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StaticCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from utils.model.inputs import cache_argument, embedding_rows, forward_accepts, position_ids_from_mask, unwrap

LEAVE_SHARE = 0.25  # finished rows leave the batch when they are at least this share of it


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and when an answer ends."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]  # an answer ends with the first of any of these; (): with none
    pad_token_id: int
    vocabulary: int  # ids from here on are never chosen
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off


@dataclass
class Rollout:
    sequences: torch.Tensor  # [B, P + A] prompts and answers; pads after a row's end token; A is the longest answer
    log_probs: torch.Tensor | None  # [B, A] fp32, of all of softmax(logits / temperature); 0 after its end token
    width: int  # A


# ---------------------------------------------------------------- choosing tokens


def keep_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """[b, V]: -inf for all but the ``top_k`` highest of a row, and what equals the lowest of them; 0 keeps all."""
    if top_k <= 0 or top_k >= scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)


def keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """[b, V]: -inf for the unlikeliest tokens that hold 1 - ``top_p`` of the probability or less; one always stays.

    Nucleus sampling, Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    """
    if top_p >= 1:
        return scores
    ascending, order = scores.sort(dim=-1)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    dropped[:, -1] = False
    return scores.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)


def draw(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One token per row of softmax(scores), where its cumulative sum passes the row's random number.

    Args:
        scores: [b, V] fp32; uniforms: [b] fp64 in [0, 1).

    Returns:
        [b] ids. The sum is taken in fp64: fp32 would never reach tokens less likely than 1e-7.
    """
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, uniforms.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)
    return tokens.clamp(max=scores.shape[-1] - 1)  # only NaN scores lead past the end


def choose(logits: torch.Tensor, decoding: Decoding, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row and its log-prob.

    Args:
        logits: [b, V] in any dtype; uniforms: [b] random numbers, unused when greedy.

    Returns:
        ids [b]; fp32 log-probs [b] under softmax(logits / temperature) (temperature 1 when greedy), before top-k and
        top-p cut it.
    """
    logits = logits.float()
    if decoding.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        logits = logits if decoding.temperature == 1 else logits / decoding.temperature
        tokens = draw(keep_top_p(keep_top_k(logits, decoding.top_k), decoding.top_p), uniforms)
    chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens, chosen - logits.logsumexp(dim=-1)


# ---------------------------------------------------------------- rows and their cache


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one attention layer in buffers of their final length: a token is written, nothing is copied.

    transformers' own layer makes a copy of all it holds for every token.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def update(self, key_states, value_states, *args, **kwargs):
        """[b, heads, new, head_dim] each -> views of all keys and values so far, [b, heads, length, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_buffer, self.value_buffer = (self._empty(states) for states in (key_states, value_states))
            self.start = self.length = 0
        new_length = self.length + key_states.shape[-2]
        self.key_buffer[:, :, self.length : new_length] = key_states
        self.value_buffer[:, :, self.length : new_length] = value_states
        self.length = new_length
        self._set_views()
        return self.keys, self.values

    def drop_columns(self, count: int) -> None:
        """Forget the oldest ``count`` positions."""
        if self.is_initialized:
            self.start += count
            self._set_views()

    def batch_select_indices(self, indices):
        if not self.is_initialized:  # a layer that reads another one's keys and values
            return
        self.key_buffer, self.value_buffer = self.key_buffer[indices], self.value_buffer[indices]
        self._set_views()

    def _empty(self, states):
        return states.new_empty(*states.shape[:2], self.capacity, states.shape[-1])

    def _set_views(self):
        self.keys = self.key_buffer[:, :, self.start : self.length]
        self.values = self.value_buffer[:, :, self.start : self.length]


def select_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Keep these rows of a cache, of which any may come several times.

    A layer with a state (linear attention, a state space, a convolution) moves it in ``reorder_cache`` alone; its
    ``batch_select_indices``, where it has one from attention beside, forgets the state.
    """
    for layer in cache.layers:
        move = layer.reorder_cache if isinstance(layer, LinearAttentionLayer) else layer.batch_select_indices
        move(rows)


def make_cache(model, capacity: int) -> DynamicCache:
    """An empty cache; layers of full attention hold ``capacity`` positions, others are transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class CompiledStep:
    """The forward pass of one token per row, compiled by torch, over a cache of fixed size.

    Shapes and addresses stay as they are from token to token and from round to round, so that a GPU replays one CUDA
    graph instead of launching hundreds of kernels. The price: attention reads the whole cache, rows do not leave the
    batch, and each batch size is compiled once.

    Args:
        capacity: positions of the cache, prompt and answer together.
        backend: of ``torch.compile``.
    """

    def __init__(self, model, capacity: int, backend: str = "inductor"):
        on_gpu = next(model.parameters()).device.type == "cuda"
        mode = "reduce-overhead" if on_gpu and backend == "inductor" else None
        self.capacity, self._config, self._caches = capacity, model.config, {}
        self._forward = torch.compile(model.forward, backend=backend, mode=mode, dynamic=False)

    def cache(self, batch: int) -> StaticCache:
        """An empty cache for this many rows; the same one each time."""
        if batch not in self._caches:
            self._caches[batch] = StaticCache(config=self._config, max_cache_len=self.capacity)
        else:
            self._caches[batch].reset()
        return self._caches[batch]

    def release(self) -> None:
        self._caches.clear()

    def __call__(self, **inputs):
        torch.compiler.cudagraph_mark_step_begin()
        return self._forward(**inputs)


class CachedRows:
    """Rows of a batch that share a cache: forward passes over the tokens that are not in it yet.

    Args:
        prompts, mask: [b, P], left-padded: what the first pass reads.
        cache: an empty one; capacity: how many positions prompt and answer may take.
        compiled: makes the passes after the first; it always reads the whole cache.

    Attributes:
        width: columns of the cache after the next forward pass.
    """

    def __init__(self, model, prompts, mask, cache, capacity: int, compiled: CompiledStep | None = None):
        self.cache, self.width = cache, prompts.shape[1]
        self.tokens, self.positions = prompts, position_ids_from_mask(mask)
        self._mask = torch.cat([mask, mask.new_ones(len(mask), capacity - self.width)], dim=1)
        self._forward, self._compiled = model, compiled
        self._takes_positions = forward_accepts(model, "position_ids")
        self._options = {cache_argument(model): cache, "use_cache": True}
        self._options |= {"logits_to_keep": 1} if forward_accepts(model, "logits_to_keep") else {}
        # Positions say all where nothing is padded; a mask of ones costs each pass a look, on a GPU a wait for it.
        self._may_go_unmasked = compiled is None and self._takes_positions and self._has_plain_layers
        self._is_padded = not self._may_go_unmasked or bool((mask == 0).any())
        self._is_recurrent = all(type(layer) is LinearAttentionLayer for layer in getattr(cache, "layers", [None]))

    @property
    def mask(self) -> torch.Tensor:
        """[b, width]: 0 at the prompts' pads."""
        return self._mask[:, : self.width]

    @property
    def _has_plain_layers(self) -> bool:
        return all(type(layer) is PreallocatedLayer for layer in getattr(self.cache, "layers", [None]))

    def forward(self, **options):
        """The model's output for the new tokens; of logits perhaps the last alone."""
        if self._takes_positions:
            options["position_ids"] = self.positions
        mask = self.mask if self._compiled is None else self._mask  # causality hides what is yet to come
        if not self._is_padded or (self._is_recurrent and self.tokens.shape[1] == 1):
            mask = None  # such a model's mask is that of the new tokens alone (Mamba)
        return self._forward(
            input_ids=self.tokens,
            attention_mask=mask,
            **self._options,
            **options,
        )

    def append(self, tokens: torch.Tensor) -> None:
        """A token [b] for each row, which the next forward pass reads."""
        self.tokens, self.positions, self.width = tokens.unsqueeze(1), self.positions[:, -1:] + 1, self.width + 1
        self._forward = self._compiled or self._forward

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows, of which any may come several times."""
        self.tokens, self.positions, self._mask = self.tokens[rows], self.positions[rows], self._mask[rows]
        select_rows(self.cache, rows)

    def drop_shared_pads(self) -> None:
        """Take the left pads that all rows share out of the cache, where its layers can do that."""
        if not self._has_plain_layers:
            return
        shared = int(self._mask.argmax(dim=1).min())  # a row's first real token
        for layer in self.cache.layers if shared else ():
            layer.drop_columns(shared)
        self._mask, self.width = self._mask[:, shared:], self.width - shared
        self._is_padded = not self._may_go_unmasked or bool((self._mask == 0).any())


# ---------------------------------------------------------------- the loops


@torch.no_grad()
def sample_answers(
    model,
    prompts: torch.Tensor,
    mask: torch.Tensor,
    decoding: Decoding,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rewrite_logits: Callable | None = None,
    compiled: CompiledStep | None = None,
    looks_late: bool | None = None,
) -> Rollout:
    """Answer each prompt.

    The random numbers come from torch's generator in one draw of [B, max_new_tokens]: number t of row i decides token t
    of answer i, whatever the other rows do.

    Args:
        prompts, mask: [B, P], left-padded.
        sum_over_ranks: given where a forward pass is a collective (ZeRO-3 weights gathered layer by layer): turns
            this rank's count of unfinished rows, a tensor, into that of all ranks. A rank that is done goes along
            until all are.
        rewrite_logits: called as (logits [b, V], rows [b], position in the answer) -> logits [b, V], before choosing.
        compiled: makes the passes after the prompt's.
        looks_late: whether rows are left is read when the next pass is under way already, so that an accelerator does
            not stand still for each token; the last pass of all is then for nothing. None: everywhere but on a CPU.

    Raises:
        FloatingPointError: when logits were not finite.
        ValueError: when prompt and answer do not fit the compiled step's cache.
    """
    batch, prompt_width = prompts.shape
    limit, device = decoding.max_new_tokens, prompts.device
    capacity = prompt_width + limit if compiled is None else compiled.capacity
    if prompt_width + limit > capacity:
        raise ValueError(f"{prompt_width} prompt and {limit} answer tokens do not fit a cache of {capacity}")
    answers = torch.full((batch, limit), decoding.pad_token_id, dtype=prompts.dtype, device=device)
    log_probs = torch.zeros(batch, limit, device=device)
    lengths = torch.zeros(batch, dtype=torch.long, device=device)
    uniforms = torch.rand(batch, limit, dtype=torch.float64, device=device)

    cache = make_cache(model, capacity) if compiled is None else compiled.cache(batch)
    cached = CachedRows(model, prompts, mask, cache, capacity, compiled)
    rows = torch.arange(batch, device=device)  # that are still in the batch
    end_tokens = torch.tensor(decoding.eos_token_ids, dtype=prompts.dtype, device=device)
    unfinished = torch.ones(batch, dtype=torch.bool, device=device)  # of these
    looks_late = device.type != "cpu" if looks_late is None else looks_late
    left = None  # rows of this rank and of all ranks that were unfinished after the token before
    for step in range(limit):
        logits = cached.forward().logits[:, -1, : decoding.vocabulary]
        if rewrite_logits is not None:
            logits = rewrite_logits(logits, rows, step)
        chosen, chosen_log_probs = choose(logits, decoding, uniforms[rows, step])
        answers[rows, step] = torch.where(unfinished, chosen, decoding.pad_token_id)
        log_probs[rows, step] = torch.where(unfinished, chosen_log_probs, 0.0)
        lengths[rows] += unfinished
        unfinished = unfinished & ~torch.isin(chosen, end_tokens)
        before, left = left, unfinished.sum()
        left = torch.stack([left, left if sum_over_ranks is None else sum_over_ranks(left)])
        known = before if looks_late else left
        own, all_ranks = (len(rows), 1) if known is None else known.tolist()
        if all_ranks == 0:
            break
        cached.append(chosen)
        if compiled is None and own and own <= (1 - LEAVE_SHARE) * len(rows):
            stay = unfinished.nonzero().squeeze(1)
            if len(stay):  # the others may have ended since
                rows, unfinished = rows[stay], unfinished[stay]
                cached.select(stay)
                cached.drop_shared_pads()

    width = int(lengths.max())
    answers, log_probs = answers[:, :width], log_probs[:, :width]
    _refuse_nonfinite(~torch.isfinite(log_probs).all(dim=1))
    return Rollout(torch.cat([prompts, answers], dim=1), log_probs, width)


def _refuse_nonfinite(nonfinite: torch.Tensor) -> None:
    """FloatingPointError with the rows where ``nonfinite`` [batch] is true."""
    if nonfinite.any():
        rows = nonfinite.nonzero().flatten().tolist()
        raise FloatingPointError(f"logits of rows {rows} of the batch are not finite")


def generate_by_transformers(
    model, prompts, mask, decoding: Decoding, synced_gpus: bool = False, rewrite_logits: Callable | None = None
) -> Rollout:
    """As ``sample_answers``, by ``generate()``: without log-probs, and with random numbers drawn in another order.

    Args:
        model: a model of transformers, or DeepSpeed's engine with kernels around one.
        synced_gpus: ranks go along until all are done.

    Raises:
        FloatingPointError: when logits were not finite; after the last token, since other ranks may come along to it.
    """
    samples = decoding.temperature > 0
    sampling = dict(temperature=decoding.temperature, top_p=decoding.top_p, top_k=decoding.top_k) if samples else {}
    config = GenerationConfig(
        do_sample=samples,
        max_new_tokens=decoding.max_new_tokens,
        pad_token_id=decoding.pad_token_id,
        eos_token_id=list(decoding.eos_token_ids) or None,
        use_cache=True,
        # Rows of the embedding beyond the tokenizer mean nothing, and the critic may not have them.
        suppress_tokens=list(range(decoding.vocabulary, embedding_rows(unwrap(model)))) or None,
        **sampling,
    )
    rows = torch.arange(len(prompts), device=prompts.device)
    nonfinite = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)

    def note_nonfinite(_ids, logits):
        now = ~(logits.amax(dim=1).isfinite())  # amax of a row with a NaN is NaN
        nonfinite.logical_or_(now)
        return logits.masked_fill(now.unsqueeze(1), 0.0)

    processors = LogitsProcessorList()
    if rewrite_logits is not None:
        processors.append(lambda ids, logits: rewrite_logits(logits, rows, ids.shape[1] - prompts.shape[1]))
    processors.append(note_nonfinite)
    # The model's own settings (a repetition penalty, say) must not shape rollouts that PPO scores without them.
    module = unwrap(model)
    own_config, module.generation_config = module.generation_config, config
    try:
        sequences = model.generate(
            prompts,
            attention_mask=mask,
            generation_config=config,
            synced_gpus=synced_gpus,
            logits_processor=processors,
        )
    finally:
        module.generation_config = own_config
    _refuse_nonfinite(nonfinite)
    return Rollout(sequences, None, sequences.shape[1] - prompts.shape[1])
