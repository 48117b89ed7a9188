"""The estimate of memory against hand-computed bytes, and its passes against a run of the real modules."""

import pytest
import torch
from helpers import FAMILIES
from torch import nn
from transformers import AutoConfig, LlamaConfig

from utils.ds_utils import get_eval_ds_config, get_train_ds_config
from utils.module.quantize import Packing, packed_size
from utils.planning import meta_model
from utils.planning.engine_memory import GIB, Bytes, Machine, frozen_engine, trained_engine
from utils.planning.estimate import CPU_MARGIN, Estimate, Phase
from utils.planning.meta_model import LiveBytes, LoRASpec, MetaModel, ModelSpec
from utils.process.errors import UserError

HIDDEN, INNER, LAYERS, VOCABULARY = 32, 48, 2, 320
# Llama, two heads for four queries: q and o [32, 32], k and v [16, 32], gate, up and down [48, 32], two norms.
BLOCK = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
WEIGHTS = LAYERS * BLOCK + VOCABULARY * HIDDEN + HIDDEN  # and the tied embedding, and the last norm
BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size


def llama(**options):
    sizes = dict(hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaConfig(**sizes | heads | options)


def meta_llama(kind="causal", dtype="bf16", **options):
    return MetaModel(ModelSpec(llama(), kind, dtype, **options))


def machine(ranks=1, on_cpu=False):
    return Machine(ranks, ranks, on_cpu, 80 * GIB, None, Bytes())


def engine(stage, dtype="bf16", ranks=1, offload=False, on_cpu=False, accumulation=1):
    model = meta_llama(dtype=dtype)
    config = get_train_ds_config(offload, dtype, stage)
    return trained_engine("model", model, config, machine(ranks, on_cpu), accumulation)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 4])
def test_sums_of_gradients_in_fp32_take_two_bytes_more_for_each_trained_weight_of_a_rank(stage, ranks):
    def kept(sums: str | None) -> int:
        config = get_train_ds_config(False, "bf16", stage, grad_accum_dtype=sums)
        memory = trained_engine("model", meta_llama(dtype="bf16"), config, machine(ranks, False), accumulation=4)
        return memory.accumulated + memory.resident.get("gradients", Bytes()).device

    assert kept("fp32") - kept(None) == 2 * -(-WEIGHTS // ranks)


def test_weights_are_counted_as_by_hand():
    sizes = meta_llama().sizes
    assert (sizes.trained, sizes.frozen, sizes.packed) == (WEIGHTS, 0, 0)
    assert sizes.largest_trained == sizes.largest_layer == VOCABULARY * HIDDEN
    # A value head in place of the tied head; the tokenizer's 325 entries make 328 rows.
    reward = meta_llama("reward", tokenizer_size=325).sizes
    assert reward.trained == WEIGHTS + HIDDEN + 8 * HIDDEN


def test_lora_and_packed_weights_are_counted_as_by_hand():
    lora = LoRASpec("auto", dim=4, scaling=1.0, dropout=0.0, freezes_rest=True)
    sizes = meta_llama(lora=lora).sizes
    per_block = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert (sizes.trained, sizes.frozen) == (LAYERS * per_block, WEIGHTS)
    packed = meta_llama(lora=lora, packing=Packing("int8", False, torch.bfloat16)).sizes
    linear = BLOCK - 2 * 32
    rows = 2 * 32 + 2 * 16 + 2 * 48 + 32
    assert packed.packed == LAYERS * linear and packed.packed_bytes == LAYERS * (linear + 4 * rows)
    assert packed.trained == sizes.trained and packed.total == sizes.total
    assert packed_size(Packing("nf4", False, torch.bfloat16), 64, 1000) == 32 * 1000 + 4 * 1000
    assert packed_size(Packing("nf4", True, torch.bfloat16), 64, 1024) == 32 * 1024 + 1024 + 4 * 4


def test_states_at_each_stage_equal_hand_values():
    n = WEIGHTS
    plain = engine(0, "fp32")
    assert plain.states == Bytes(4 * n + 8 * n) and plain.gradients == Bytes(4 * n)
    for stage in (1, 2):
        whole, halved = engine(stage), engine(stage, ranks=2)
        assert whole.states == Bytes(2 * n + 4 * n + 8 * n)
        assert halved.states == Bytes(2 * n + 2 * n + 4 * n)
        assert (whole.gradients, halved.gradients) == (Bytes(2 * n), Bytes(n))
        assert whole.buckets == halved.buckets == 2 * BUCKET * 2  # two buckets of 16 bits, whatever the model's size
        # What left the bucket, a flat copy and an fp32 one.
        assert whole.step == Bytes(max(2 * n + 2 * n + 4 * n, 2 * n + 8 * VOCABULARY * HIDDEN))
    # fp32 weights have an fp32 copy too.
    assert engine(2, "fp32").states == Bytes(4 * n + 4 * n + 8 * n)
    # Accumulated gradients: whole at stage 1, shared out at stage 2.
    assert (
        engine(1, ranks=2, accumulation=4).accumulated == 2 * n and engine(2, ranks=2, accumulation=4).accumulated == n
    )
    sharded = engine(3, ranks=2)
    # Weights, fp32 weights, two moments, 16-bit gradients: a half of 2 + 4 + 8 + 2; and the bucket.
    assert sharded.states == Bytes(8 * n + 2 * BUCKET)
    assert sharded.gathered.training == sharded.gathered.whole == 2 * n
    assert engine(3).gathered.whole == 0  # alone, the shard is the weight


def test_offloading_moves_states_to_the_host():
    n, largest = WEIGHTS, VOCABULARY * HIDDEN
    states = engine(2, ranks=2, offload=True)
    # Host: half of fp32 weights, moments, fp32 gradients and 16-bit weights, and the largest weight once.
    assert states.states == Bytes(2 * n + 2 * largest, (4 + 8 + 4 + 2) * n // 2 + 2 * largest)
    sharded = engine(3, ranks=2, offload=True)
    assert sharded.states == Bytes(2 * BUCKET, (2 + 4 + 8 + 2 + 4) * n // 2)


def test_on_a_cpu_a_bucket_takes_what_is_written_to_it():
    assert engine(2, on_cpu=True).buckets == 2 * WEIGHTS
    assert engine(3, on_cpu=True).resident["buffers"] == Bytes(2 * WEIGHTS)


def test_frozen_engines_hold_weights_alone():
    model = meta_llama(trains=False)
    assert model.sizes.trained == 0
    assert frozen_engine("ref", model, get_eval_ds_config(False, "bf16", 0), machine(2)).states == Bytes(2 * WEIGHTS)
    assert frozen_engine("ref", model, get_eval_ds_config(False, "bf16", 3), machine(2)).states == Bytes(WEIGHTS)
    on_host = frozen_engine("ref", model, get_eval_ds_config(True, "bf16", 3), machine(2))
    assert on_host.states == Bytes(host=WEIGHTS) and on_host.gathered.scoring == 2 * WEIGHTS


def test_a_packed_pass_is_counted_in_the_dearest_way_that_the_family_takes(monkeypatch):
    """By positions a mask of booleans becomes one of numbers in each layer, where one mask for all is made once."""
    rows, length = 4, 64
    model = meta_llama()
    by_way = {}
    for way in ("positions", "one mask"):
        monkeypatch.setattr(meta_model, "packing_ways", lambda model, way=way: [way])
        by_way[way] = meta_llama().training(rows, length, False, packed=True)
    monkeypatch.undo()
    mask = rows * length * length
    assert by_way["positions"].kept - by_way["one mask"].kept == LAYERS * 2 * mask - 2 * mask
    assert model.training(rows, length, False, packed=True) == by_way["positions"]
    bloom = MetaModel(
        ModelSpec(AutoConfig.for_model("bloom", vocab_size=320, hidden_size=32, n_layer=2, n_head=4), "causal", "bf16")
    )
    assert bloom.training(rows, length, False, packed=True).kept > 0  # one of its two ways raises
    monkeypatch.setattr(meta_model, "packing_ways", lambda model: ["one mask"])
    bloom._passes.clear()
    with pytest.raises(UserError, match="BloomForCausalLM takes no packed rows"):
        bloom.training(rows, length, False, packed=True)


def test_live_bytes_follow_what_is_made_and_freed():
    weight = torch.empty(100, 100, device="meta")
    with LiveBytes([weight]) as live:
        first = weight @ weight
        assert live.live == 40_000
        view = first[:50]
        del first
        assert live.live == 40_000  # the view keeps it
        second = view + 1
        del view
        assert (live.live, live.peak) == (20_000, 60_000)
        del second
    assert (live.live, live.peak) == (0, 60_000)


def test_what_a_pass_keeps_is_what_autograd_saves_on_a_cpu():
    """The same model with numbers: unique storages that autograd saves, weights apart."""
    config = llama(attn_implementation="eager")
    meta = MetaModel(ModelSpec(config, "reward", "fp32", attn_implementation="eager"))
    kept = meta.training(2, 16, checkpointing=False).kept
    torch.manual_seed(0)
    with torch.device("cpu"):
        real = type(meta.model.rwtransformer)(config)
        head = nn.Linear(HIDDEN, 1, bias=False)
    known = {p.untyped_storage().data_ptr() for p in [*real.parameters(), *real.buffers(), head.weight]}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, 16, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = real(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        values = head(hidden)
    total = sum(saved.values())
    assert values.requires_grad and total > 0
    # Beside what autograd saves, the pass holds its inputs and its output.
    assert total <= kept <= 1.05 * total + 8 * ids.nbytes


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "opt", "bloom"])
def test_every_family_can_be_measured_without_numbers(family):
    config = AutoConfig.for_model(**FAMILIES[family], vocab_size=400, max_position_embeddings=128)
    causal = MetaModel(ModelSpec(config, "causal", "bf16", dropout=0.0))
    plain = causal.training(2, 64, checkpointing=False)
    checkpointed = causal.training(2, 64, checkpointing=True)
    again = causal.training(2, 64, checkpointing=False, keep_gradients=True)
    assert 0 < checkpointed.kept < plain.kept <= plain.peak <= again.peak
    assert causal.scoring(2, 64).peak < plain.peak
    doubled = causal.training(4, 64, checkpointing=False).kept
    assert 1.7 * plain.kept < doubled <= 2 * plain.kept
    assert causal.generating(2, 32, 32).kept > 0
    assert causal.fused_bytes() >= 0
    assert MetaModel(ModelSpec(config, "reward", "bf16")).training(2, 64, checkpointing=False).kept > 0
    assert all(p.grad is None and p.is_meta for p in causal.model.parameters())


def test_a_cache_has_its_keys_and_values_for_prompt_and_answer():
    cache = meta_llama().generating(3, 20, 12).kept
    assert cache == LAYERS * 2 * 3 * 2 * (20 + 12) * 8 * 2  # layers, k and v, rows, heads, tokens, width, bytes


def test_a_cpu_rank_gets_a_margin_on_all_but_its_libraries_and_a_gpu_gets_none():
    model = meta_llama(trains=False)
    states = frozen_engine("ref", model, get_eval_ds_config(False, "bf16", 0), machine())
    phase = Phase("pass", Bytes(1000), once=77)
    for on_cpu, device, host in ((True, 500, 0), (False, 500, 40)):
        baseline = Bytes(device, host)
        result = Estimate(Machine(2, 2, on_cpu, GIB, None, baseline), [states], [phase])
        alive = 2 * WEIGHTS + 1000
        rank = 500 + (round((1 + CPU_MARGIN) * alive) if on_cpu else alive)
        assert result.needs(phase) == (rank, 2 * (rank if on_cpu else 40) + 77)
        assert result.device_peak == (rank, "pass")
