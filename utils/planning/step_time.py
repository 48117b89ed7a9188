"""How long an optimizer step takes, from the shapes of its models and a machine's data sheet: an estimate.

Each pass takes as long as the slowest of what it needs (the roofline of Williams et al. 2009,
https://doi.org/10.1145/1498765.1498785): operations, bytes of memory, or the start of its kernels. Beside it stand what
ZeRO sends between ranks, as far as the computation does not hide it, and what crosses the link to the host. A CPU does
one thing after another: there the start of kernels adds to the operations, nothing hides behind them, and attention and
the softmax over the vocabulary have speeds of their own.

    forward     2 operations per weight and token, and 4 * layers * width * length / 2 per token for causal attention
                (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, table 1)
    backward    as many for the inputs' gradients, as many for those of weights that train
    checkpointing   one forward pass more (Chen et al. 2016, https://arxiv.org/abs/1604.06174)
    decode      one token of every row: all weights and the rows' keys and values are read once
    ZeRO        stage 0 all-reduces gradients before a step; 1 and 2 do too (2 after each micro-batch), then all-gather
                the new weights; 3 all-gathers weights for each pass and reduce-scatters gradients after each
                micro-batch (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 7)

All sizes are those of one rank; seconds are of the whole step, which all ranks take together.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from utils.planning.machines import HOST_BANDWIDTH, Cluster

COMPUTE, MEMORY, NETWORK, HOST, LAUNCH = "compute", "HBM", "network", "PCIe", "batch too small"
ADAM_BYTES = 30  # per weight: fp32 weight, two moments read and written, gradient read, 16-bit weight written


@dataclass(frozen=True)
class Shape:
    """What a model costs.

    Attributes:
        total, trained: weights. active: those that take part in a product for each token (of a mixture of experts the
            chosen ones), looked-up embeddings left out. layers: blocks.
        width, kv_width: numbers that a token's queries, and its keys, have in a layer; 0 without attention.
        hidden: numbers of a token between layers. itemsize: bytes of a weight.
        vocabulary: logits of a token; 0 without such a head.
    """

    total: int
    trained: int
    active: int
    layers: int
    width: int
    kv_width: int
    hidden: int
    itemsize: int
    vocabulary: int = 0

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return self.total * self.itemsize

    @property
    def trained_share(self) -> float:
        return self.trained / self.total

    def products(self, rows: float, length: float) -> float:
        """Operations of a forward pass over [rows, length] tokens in products with weights."""
        return rows * length * 2 * self.active

    def attention(self, rows: float, length: float) -> float:
        """Those in attention, where a token looks at half of the row on average."""
        return rows * length * 4 * self.layers * self.width * length / 2

    def forward(self, rows: float, length: float) -> float:
        """All operations of a forward pass over [rows, length] tokens."""
        return self.products(rows, length) + self.attention(rows, length)

    def cache(self, rows: float, length: float) -> float:
        """Bytes of keys and values of [rows, length] tokens."""
        return 2 * self.layers * self.kv_width * self.itemsize * rows * length


@dataclass(frozen=True)
class Piece:
    """A part of a step: its seconds, and what it waits for (COMPUTE, MEMORY, NETWORK, HOST, LAUNCH)."""

    name: str
    seconds: float
    limit: str


@dataclass(frozen=True)
class StepTime:
    """An optimizer step (step 3: an update with its rounds of generation).

    Attributes:
        pieces: what it is made of, in order; pieces of one name belong together.
        operations: that training and scoring need on one rank, without recomputation. rows, tokens: of all ranks.
        peak: operations per second of one device.
    """

    pieces: tuple[Piece, ...]
    operations: float
    rows: int
    tokens: int
    peak: float

    @property
    def seconds(self) -> float:
        return sum(piece.seconds for piece in self.pieces)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B)."""
        return self.operations / (self.seconds * self.peak)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def by(self, attribute: str) -> dict[str, float]:
        """Seconds by ``name`` or by ``limit``, without those that take none."""
        sums: dict[str, float] = {}
        for piece in self.pieces:
            key = getattr(piece, attribute)
            sums[key] = sums.get(key, 0.0) + piece.seconds
        return {key: seconds for key, seconds in sums.items() if seconds}

    @property
    def limit(self) -> str:
        """What most of the time is waited for."""
        by_limit = self.by("limit")
        return max(by_limit, key=by_limit.get)


def hours(step: StepTime, rows: float) -> float:
    """For so many rows (step 3: answers)."""
    return rows / step.rows * step.seconds / 3600


# ---------------------------------------------------------------- passes


@dataclass(frozen=True)
class Sharding:
    """How an engine keeps its model: the ZeRO stage, and whether optimizer and (stage 3) weights are on the host."""

    stage: int = 0
    offload: bool = False
    checkpointing: bool = False


def _slowest(name: str, **needs: float) -> Piece:
    limits = {"compute": COMPUTE, "memory": MEMORY, "launch": LAUNCH}
    limit = max(needs, key=needs.get)
    return Piece(name, needs[limit], limits[limit])


def forward(name: str, shape: Shape, rows: float, length: float, cluster: Cluster, dtype: str, passes: float = 1):
    """A pass (or several at once, backward ones counted as forward ones) over [rows, length] tokens."""
    launch = passes * shape.layers * cluster.efficiency.launch
    compute = cluster.computing(passes * shape.products(rows, length), dtype)
    compute += cluster.attending(passes * shape.attention(rows, length), dtype)
    compute += cluster.scoring(passes * rows * length * shape.vocabulary)
    return _slowest(
        name,
        compute=compute + launch * cluster.on_cpu,
        memory=cluster.reading(passes * shape.active * shape.itemsize),
        launch=launch,
    )


def gather(name: str, shape: Shape, sharding: Sharding, cluster: Cluster, hidden_by: float = 0.0) -> list[Piece]:
    """Weights that ZeRO-3 gathers for a pass, less the seconds of computation that they hide behind.

    A shard on the host comes over its link first.
    """
    if sharding.stage < 3:
        return []
    seconds = max(0.0, cluster.gathering(shape.size, shape.layers) - hidden_by * (not cluster.on_cpu))
    pieces = [Piece(name, seconds, NETWORK)]
    if sharding.offload and not cluster.on_cpu:
        from_host = cluster.host_link(shape.size / cluster.ranks)
        pieces.append(Piece(name, max(0.0, from_host - hidden_by), HOST))
    return pieces


def decode(name: str, shape: Shape, rows: float, prompt: int, answer: int, cluster: Cluster, dtype: str, *,
           tensor_parallel: int = 1, launch: float | None = None) -> list[Piece]:  # fmt: skip
    """``answer`` tokens for each of the rows that a rank has at a time, one after the other.

    A token takes the longer of reading weights and caches once and of its operations; its kernels are so short that
    the time to start them adds to that.

    Args:
        rows: of one rank; of an engine over several ranks each counts its own share.
        tensor_parallel: ranks that hold a share of each weight, and all-reduce twice in a layer.
        launch: seconds of a layer at least; None for the efficiency's.
    """
    launch = cluster.efficiency.launch if launch is None else launch
    length = prompt + answer / 2  # on average
    token = _slowest(
        name,
        compute=cluster.computing(rows * (2 * shape.active + 4 * shape.layers * shape.width * length), dtype),
        memory=cluster.reading(shape.active * shape.itemsize / tensor_parallel + shape.cache(rows, length)),
    )
    sent = 2 * shape.layers * rows * tensor_parallel * shape.hidden * shape.itemsize
    shared = 2 * cluster.gathering(sent, 2 * shape.layers, tensor_parallel)  # an all-reduce: both halves
    return [
        replace(token, seconds=answer * token.seconds),
        Piece(name, answer * shape.layers * launch, LAUNCH),
        Piece(name, answer * shared, NETWORK),
    ]


def train(name: str, shape: Shape, rows: float, length: float, micro: int, sharding: Sharding, cluster: Cluster,
          dtype: str, accumulation: int) -> list[Piece]:  # fmt: skip
    """``micro`` forward and backward passes over [rows, length] tokens, with what ZeRO sends meanwhile.

    Args:
        accumulation: micro-batches of an optimizer step.
    """
    one = (shape, rows, length, cluster, dtype)
    passes = [forward(f"{name}: forward", *one), forward(f"{name}: backward", *one, 1 + shape.trained_share)]
    if sharding.checkpointing:
        passes.append(forward(f"{name}: recomputation", *one))
    pieces = [replace(piece, seconds=micro * piece.seconds) for piece in passes]
    ahead, back = passes[0].seconds, sum(piece.seconds for piece in passes[1:])
    sends = f"{name}: ZeRO"
    for hidden_by in (ahead, back):
        gathered = gather(sends, shape, sharding, cluster, hidden_by)
        pieces += [replace(piece, seconds=micro * piece.seconds) for piece in gathered]
    reductions = micro if sharding.stage >= 2 else micro / accumulation
    halves = 1 if sharding.stage == 3 else 2  # a reduce-scatter, or an all-reduce
    reduced = halves * cluster.gathering(shape.trained * shape.itemsize, shape.layers)
    hidden = back if sharding.stage and not cluster.on_cpu else 0.0  # overlap_comm
    return [*pieces, Piece(sends, reductions * max(0.0, reduced - hidden), NETWORK)]


def optimizer_step(name: str, shape: Shape, sharding: Sharding, cluster: Cluster) -> list[Piece]:
    """Adam on a rank's share; at stages 1 and 2 the new weights are gathered after it.

    With --offload gradients and new weights cross the link to the host, whose memory all ranks of a node share.
    """
    share = shape.trained / (cluster.ranks if sharding.stage else 1)
    title = f"{name}: optimizer"
    if sharding.offload and not cluster.on_cpu:
        on_host = ADAM_BYTES * share * cluster.per_node / (HOST_BANDWIDTH * 1e9)
        pieces = [Piece(title, on_host + cluster.host_link(2 * share * shape.itemsize), HOST)]
    else:
        pieces = [Piece(title, cluster.reading(ADAM_BYTES * share), MEMORY)]
    if sharding.stage in (1, 2):
        pieces.append(Piece(f"{name}: ZeRO", cluster.gathering(shape.trained * shape.itemsize), NETWORK))
    return pieces


def times(count: float, pieces: Iterable[Piece]) -> list[Piece]:
    return [replace(piece, seconds=count * piece.seconds) for piece in pieces]


# ---------------------------------------------------------------- steps


@dataclass(frozen=True)
class Rollouts:
    """How step 3 makes answers.

    Attributes:
        rows: answers at a time on one rank. rounds: of them before an update. prompt, answer: tokens.
        vllm: an engine of vLLM does it, after the weights are handed over; else a loop over whole weights.
        gathers: times that ZeRO-3 gathers the weights in a round.
        tensor_parallel: ranks of an engine. at_once: answers of one rank that its cache holds; None: all.
        launch: seconds of a layer and token at least; None for the efficiency's.
        answers_per_prompt: of which vLLM reads each prompt once.
    """

    rows: int
    rounds: int
    prompt: int
    answer: int
    vllm: bool = False
    gathers: int = 1
    tensor_parallel: int = 1
    at_once: int | None = None
    launch: float | None = None
    answers_per_prompt: int = 1


@dataclass(frozen=True)
class Updates:
    """What step 3 does with the answers of an update: ``epochs`` times over them in micro-batches of ``rows``, with an
    optimizer step after every ``accumulation``."""

    rows: int
    epochs: int = 1
    accumulation: int = 1


def generation(actor: Shape, sharding: Sharding, rollouts: Rollouts, cluster: Cluster, dtype: str) -> list[Piece]:
    """A round of answers, every one as long as it may be."""
    pieces = times(rollouts.gathers, gather("generation: weights", actor, sharding, cluster))
    if rollouts.vllm:
        copied = cluster.reading(2 * actor.size / rollouts.tensor_parallel)
        pieces.append(Piece("generation: weights", copied, MEMORY))
    rows, at_once = rollouts.rows, min(rollouts.rows, rollouts.at_once or rollouts.rows)
    read = rows / (rollouts.answers_per_prompt if rollouts.vllm else 1)
    pieces.append(forward("generation: prefill", actor, read, rollouts.prompt, cluster, dtype))
    lengths = rollouts.prompt, rollouts.answer
    how = {"tensor_parallel": rollouts.tensor_parallel, "launch": rollouts.launch}
    # A row begins where another ends, so that the engine is full but for the last ones.
    return pieces + times(rows / at_once, decode("generation: decode", actor, at_once, *lengths, cluster, dtype, **how))


def rlhf_step(
    shapes: dict[str, Shape],
    ways: dict[str, Sharding],
    rollouts: Rollouts,
    updates: Updates,
    cluster: Cluster,
    dtype: str,
    scored_by: tuple[str, ...] = ("actor", "reference", "critic", "reward"),
) -> StepTime:
    """An update of step 3 with its rounds of generation.

    Args:
        shapes, ways: of the engines that there are: actor, reference, critic, reward, EMA.
        scored_by: whose passes score the answers; the actor is the reference, too, where that has no engine.
    """
    length, rows = rollouts.prompt + rollouts.answer, rollouts.rows
    pieces, operations = generation(shapes["actor"], ways["actor"], rollouts, cluster, dtype), 0.0
    for name in scored_by:
        one = forward("scoring", shapes[name], rows, length, cluster, dtype)
        pieces += [one, *gather("scoring: ZeRO", shapes[name], ways[name], cluster, one.seconds)]
        operations += rollouts.rounds * shapes[name].forward(rows, length)
    pieces = times(rollouts.rounds, pieces)
    operations += rollouts.rounds * shapes["actor"].forward(rows, length)  # of generation
    micro = updates.epochs * rows * rollouts.rounds // updates.rows
    for name in ("actor", "critic"):
        if name in shapes:
            shape, how = shapes[name], (ways[name], cluster, dtype, updates.accumulation)
            pieces += train(name, shape, updates.rows, length, micro, *how)
            pieces += times(micro / updates.accumulation, optimizer_step(name, shape, ways[name], cluster))
            operations += micro * (2 + shape.trained_share) * shape.forward(updates.rows, length)
    if "EMA" in shapes:  # reads the weight, reads and writes the fp32 average
        share = shapes["actor"].trained / (cluster.ranks if ways["actor"].stage == 3 else 1)
        pieces.append(Piece("EMA", micro / updates.accumulation * cluster.reading(10 * share), MEMORY))
    all_rows = rows * rollouts.rounds * cluster.ranks
    return StepTime(tuple(pieces), operations, all_rows, all_rows * length, cluster.device.peak(dtype))


def supervised_step(
    shape: Shape,
    way: Sharding,
    rows: int,
    length: int,
    accumulation: int,
    cluster: Cluster,
    dtype: str,
    sequences: int = 1,
    reference: tuple[Shape, Sharding] | None = None,
) -> StepTime:
    """An optimizer step of step 1, 2 or DPO: ``accumulation`` micro-batches of ``rows`` rows on a rank.

    Args:
        length: tokens of a sequence. sequences: of a row (a pair: 2).
        reference: of DPO, which scores every sequence once; None: no pass for it.
    """
    shown = rows * sequences
    pieces = train("model", shape, shown, length, accumulation, way, cluster, dtype, accumulation)
    operations = accumulation * (2 + shape.trained_share) * shape.forward(shown, length)
    if reference is not None:
        one = forward("reference", reference[0], shown, length, cluster, dtype)
        pieces += times(accumulation, [one, *gather("reference: ZeRO", *reference, cluster, one.seconds)])
        operations += accumulation * reference[0].forward(shown, length)
    pieces += optimizer_step("model", shape, way, cluster)
    all_rows = rows * accumulation * cluster.ranks
    tokens = all_rows * sequences * length
    return StepTime(tuple(pieces), operations, all_rows, tokens, cluster.device.peak(dtype))
