"""DPO: its losses against loops over tokens in fp64, what counts of an answer, its references, its runs."""

import json
import math

import pytest
import torch
from helpers import assert_same_run, flags, make_model, read_metrics
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from training.step2_dpo_finetuning.dpo_math import PreferenceLoss, Side, answer_log_probs
from training.step2_dpo_finetuning.main import compare
from training.step2_dpo_finetuning.reference import batch_log_probs
from utils import arguments
from utils.data.batching import DataCollatorDPO, NumberedRows
from utils.data.preparation import create_prompt_dataset
from utils.model.inputs import model_inputs
from utils.model.losses import LabelLogProbs
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError

PAD, EOS = 2, 0


def row(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict:
    starts = [len(prompt)] * 2
    return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "answer_starts": starts} | UNRANKED


def ranked(prompt: list[int], answers: list[list[int]], ranks: list[int]) -> dict:
    ids = [prompt + answer for answer in answers]
    best_and_worst = {"chosen_ids": ids[0], "rejected_ids": ids[-1]}
    return best_and_worst | {"answer_starts": [len(prompt)] * len(ids), "ranked_ids": ids, "ranks": ranks}


UNRANKED = {"ranked_ids": [], "ranks": []}
# An answer holds the pad token, and ends twice; one that was cut has no end; one is its end alone.
ROWS = [
    row([1, 30, 31], [40, PAD, 41, EOS], [50, EOS]),
    row([1, 32], [60, 61, 62, 63, 64, 65], [66, 67, EOS, EOS]),
    row([1, 33, 34, 35, 36], [EOS], [70, 71, 72, EOS]),
]
LOSSES = {
    "sigmoid": PreferenceLoss(beta=0.3),
    "sigmoid, smoothed": PreferenceLoss(beta=0.3, label_smoothing=0.2),
    "ipo": PreferenceLoss("ipo", beta=0.4),
    "hinge": PreferenceLoss("hinge", beta=0.2),
    "apo_zero": PreferenceLoss("apo_zero", beta=0.3),
    "rpo": PreferenceLoss(beta=0.3, rpo_alpha=0.7),
    "simpo": PreferenceLoss(beta=2.0, reference_free=True, simpo_gamma=1.3),
    "hinge without a reference": PreferenceLoss("hinge", beta=2.0, reference_free=True, simpo_gamma=0.5),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a reference that differ, in fp64."""
    folder = tmp_path_factory.mktemp("dpo")
    return [
        AutoModelForCausalLM.from_pretrained(make_model(folder / str(seed), seed=seed), dtype=torch.float64).eval()
        for seed in (1, 2)
    ]


@pytest.fixture
def compared(models, monkeypatch):
    """compared(loss, batch) as a run does it, in fp64 throughout, to look closely."""
    to_float = torch.Tensor.float  # ids still become numbers: positions in a rotary embedding
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.is_floating_point() else to_float(x))
    policy, reference = (LabelLogProbs(model) for model in models)

    @torch.no_grad()
    def of_reference(batch):
        return batch_log_probs(reference, batch)

    def none(batch):
        return torch.zeros(len(batch["labels"]), dtype=torch.float64)

    return lambda loss, batch: compare(policy, none if loss.reference_free else of_reference, loss, batch)


def slow_log_probs(model, ids: list[int], start: int) -> list[torch.Tensor]:
    """log p of each token of an answer, from the row alone, without padding."""
    log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [log_probs[i - 1, ids[i]] for i in range(start, len(ids))]


def slow_loss(models, loss: PreferenceLoss, chosen, rejected, starts) -> torch.Tensor:
    """The loss of a pair, token by token, from the formulas of the papers."""
    terms = []
    for ids, start in zip((chosen, rejected), starts, strict=True):
        own = slow_log_probs(models[0], ids, start)
        theirs = [0.0] * len(own) if loss.reference_free else [x.item() for x in slow_log_probs(models[1], ids, start)]
        total = torch.zeros((), dtype=torch.float64)
        for mine, other in zip(own, theirs, strict=True):
            total = total + mine - other
        terms.append(total / len(own) if loss.kind == "ipo" or loss.reference_free else total)
        if ids is chosen:
            sft = -sum(own) / len(own)
    c, r = terms
    margin = loss.beta * (c - r) - loss.simpo_gamma

    def prefers(x):  # -log of the logistic function
        return torch.log(1 + torch.exp(-x))

    value = {
        "sigmoid": lambda: (1 - loss.label_smoothing) * prefers(margin) + loss.label_smoothing * prefers(-margin),
        "ipo": lambda: (c - r - 0.5 / loss.beta) ** 2,
        "hinge": lambda: torch.clamp(1 - margin, min=0),
        "apo_zero": lambda: 1 - 1 / (1 + torch.exp(-loss.beta * c)) + 1 / (1 + torch.exp(-loss.beta * r)),
    }[loss.kind]()
    return value + loss.rpo_alpha * sft


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_a_loop_over_tokens(models, compared, name):
    loss, batch = LOSSES[name], DataCollatorDPO(PAD, 24)(ROWS)
    ours, figures = compared(loss, batch)
    slow = [slow_loss(models, loss, r["chosen_ids"], r["rejected_ids"], r["answer_starts"]) for r in ROWS]
    torch.testing.assert_close(ours, torch.stack(slow), rtol=1e-10, atol=1e-10)
    mine, theirs = gradients(models[0], ours.sum()), gradients(models[0], sum(slow))
    assert any(weight.abs().max() > 1e-3 for weight in theirs.values())
    for key in theirs:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
    assert ("kl" in figures) == (not loss.reference_free)


def test_reported_figures_by_hand():
    chosen = Side(torch.tensor([-4.0, -10.0]), torch.tensor([-6.0, -9.0]), torch.tensor([2, 5]))
    rejected = Side(torch.tensor([-8.0, -3.0]), torch.tensor([-5.0, -4.0]), torch.tensor([4, 3]))
    figures = {name: value.tolist() for name, value in PreferenceLoss(beta=0.5).figures(chosen, rejected).items()}
    assert figures == {
        "accuracy": [1.0, 0.0],
        "margin": [2.5, -1.0],
        "rewards/chosen": [1.0, -0.5],
        "rewards/rejected": [-1.5, 0.5],
        "log_probs/chosen": [-4.0, -10.0],
        "log_probs/rejected": [-8.0, -3.0],
        "kl": [0.5, 0.0],
    }
    free = PreferenceLoss(beta=0.5, reference_free=True)
    no_reference = [Side(side.log_probs, torch.zeros(2), side.lengths) for side in (chosen, rejected)]
    assert free.figures(*no_reference)["rewards/chosen"].tolist() == [-1.0, -1.0]


def test_label_smoothing_by_hand():
    sides = [Side(torch.tensor([x]), torch.zeros(1), torch.ones(1)) for x in (3.0, 1.0)]
    smoothed = PreferenceLoss(beta=0.5, label_smoothing=0.1)(*sides)
    assert smoothed.item() == pytest.approx(0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1)))
    far = [Side(torch.tensor([x], requires_grad=True), torch.zeros(1), torch.ones(1)) for x in (100.0, -100.0)]
    PreferenceLoss(beta=1.0, label_smoothing=0.1)(*far).sum().backward()
    assert far[0].log_probs.grad.item() == pytest.approx(0.1), "a pair that is far apart is drawn together again"


def test_before_training_every_loss_has_its_known_value_and_no_pair_is_right():
    same = Side(torch.tensor([-7.0]), torch.tensor([-7.0]), torch.tensor([3]))
    values = {"sigmoid": math.log(2), "ipo": 25.0, "hinge": 1.0, "apo_zero": 1.0}
    for kind, value in values.items():
        assert PreferenceLoss(kind, beta=0.1)(same, same).item() == pytest.approx(value, rel=1e-6)
        assert PreferenceLoss(kind).figures(same, same)["accuracy"].item() == 0.5


# ---------------------------------------------------------------- what counts of an answer


def test_labels_are_the_answers_whole_and_alone_whatever_their_ids():
    batch = DataCollatorDPO(PAD, 24)([*ROWS, None])
    assert len(batch["labels"]) == 8 and batch["pair_weights"].tolist() == [1, 1, 1, 0]
    for i, example in enumerate(ROWS):
        for place, name in enumerate(("chosen_ids", "rejected_ids")):
            ids, start = example[name], example["answer_starts"][place]
            rest = batch["labels"].shape[1] - len(ids)
            assert batch["labels"][2 * i + place].tolist() == [-100] * start + ids[start:] + [-100] * rest
    assert (batch["labels"][6:] == -100).all()
    assert batch["numbers"].tolist() == [-1] * 8


@pytest.mark.parametrize("name", LOSSES)
def test_neither_padding_nor_order_nor_company_changes_a_pair(compared, name):
    loss = LOSSES[name]
    together, figures = compared(loss, DataCollatorDPO(PAD, 24)(ROWS))
    padded, more = compared(loss, DataCollatorDPO(PAD, 40, pad_to_max_length=True)([None, *ROWS[::-1]]))
    assert padded[0].isfinite()
    torch.testing.assert_close(padded.flip(0)[:3], together, rtol=1e-9, atol=1e-9)
    for key in figures:
        torch.testing.assert_close(more[key].flip(0)[:3], figures[key], rtol=1e-9, atol=1e-9)
    for i, example in enumerate(ROWS):
        alone, _ = compared(loss, DataCollatorDPO(PAD, 24)([example]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-9)


def test_a_filler_has_no_gradient_and_spoils_none(models, compared):
    loss, rows = LOSSES["ipo"], [ROWS[0], None]
    batch = DataCollatorDPO(PAD, 24)(rows)
    losses, _ = compared(loss, batch)
    mine = gradients(models[0], (losses * batch["pair_weights"]).sum())
    alone = gradients(models[0], compared(loss, DataCollatorDPO(PAD, 24)(rows[:1]))[0].sum())
    for key in alone:
        torch.testing.assert_close(mine[key], alone[key], rtol=1e-8, atol=1e-10)


def test_ranked_answers_go_through_the_model_once_and_their_pairs_weigh_one_together(models, compared):
    answers = [[40, EOS], [50, 51, EOS], [60, EOS], [70, 71, 72, EOS]]
    example = ranked([1, 30], answers, [1, 2, 2, 3])
    batch = DataCollatorDPO(PAD, 24)([example, ROWS[0]])
    assert len(batch["input_ids"]) == 6 and batch["pair_weights"][:5].tolist() == pytest.approx([0.2] * 5)
    losses, _ = compared(LOSSES["sigmoid"], batch)
    places = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert batch["pairs"][:5].tolist() == [list(pair) for pair in places]
    ids = example["ranked_ids"]
    slow = [slow_loss(models, LOSSES["sigmoid"], ids[i], ids[j], (2, 2)) for i, j in places]
    torch.testing.assert_close(losses[:5], torch.stack(slow), rtol=1e-9, atol=1e-9)


def test_numbers_name_answers_over_both_datasets():
    rows = [ranked([1, 30], [[40], [50], [60]], [1, 2, 3]), ROWS[0]]
    data = type("Data", (list,), {"lengths": [5, 5]})(rows)
    train, evaluation = NumberedRows(data, 0, 3), NumberedRows(data, 6, 3)
    batch = DataCollatorDPO(PAD, 24)([train[0], train[1], evaluation[1], None])
    assert batch["numbers"].tolist() == [0, 1, 2, 3, 4, 9, 10, -1, -1]


def test_answers_begin_where_their_own_tokens_do(tmp_path, model_folder):
    """A prompt whose last token depends on the answer behind it: each answer has its own beginning."""
    text = {"prompt": " Human: ca", "chosen": "t.", "rejected": " no"}
    for split in ("train", "eval"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(text) + "\n")
    tokenizer = load_hf_tokenizer(model_folder)
    train, _ = create_prompt_dataset(0, [str(tmp_path)], "0,1,0", tmp_path / "cache", 2, 1, tokenizer, 64)
    example = train[0]
    assert example["answer_starts"][0] < example["answer_starts"][1], "the first one's beginning is a part of ' cat'"
    for name, start in zip(("chosen", "rejected"), example["answer_starts"], strict=True):
        ids = example[f"{name}_ids"]
        answer = tokenizer.decode(ids[start:-1], clean_up_tokenization_spaces=False)
        assert answer.endswith(text[name]) and len(tokenizer.decode(ids[start + 1 : -1])) < len(text[name])
        assert ids[-1] == tokenizer.eos_token_id


def test_log_probs_of_answers_are_sums_in_fp64(models):
    batch = DataCollatorDPO(PAD, 24)(ROWS)
    label_log_probs = LabelLogProbs(models[0].float())
    sums = answer_log_probs(
        label_log_probs, model_inputs(models[0], batch["input_ids"], batch["attention_mask"]), batch["labels"]
    )
    models[0].double()
    assert sums.dtype == torch.float64 and sums.shape == (6,)


# ---------------------------------------------------------------- runs

LORA = "--lora_dim 4 --only_optimize_lora --lora_learning_rate 1e-2 --learning_rate 1e-2"


def losses_of(folder, name="loss", prefix="train") -> list[float]:
    return [line[f"{prefix}/{name}"] for line in read_metrics(folder, prefix)]


@pytest.fixture
def dpo(run_step, start, tmp_path):
    """dpo(flags, output="out") -> the folder of a small run."""

    def run(text: str = "", output: str = "out", **values):
        folder = tmp_path / output
        run_step("dpo", [*start("dpo"), *flags(f"--learning_rate 1e-3 {text}", output_dir=folder, **values)])
        return folder

    return run


def test_a_run_learns_prints_the_published_lines_and_saves_a_language_model(dpo, capsys):
    folder = dpo("--dropout 0 --print_loss")
    printed = capsys.readouterr().out
    for line in (
        "***** Running training *****",
        "***** Evaluating rewards, Epoch 0/2 *****",
        "chosen: 0.0, rejected: 0.0, loss: 0.693147",
        "***** Evaluating rewards, Epoch 2/2 *****",
        "saving the final model ...",
        ", Rank: 0, loss = ",
    ):
        assert line in printed, line
    first, *_, last = read_metrics(folder, "eval")
    assert first["eval/accuracy"] == 0.5 and first["eval/kl"] == 0 and first["eval/loss"] == pytest.approx(math.log(2))
    assert last["eval/accuracy"] > 0.9 and last["eval/rewards/chosen"] > last["eval/rewards/rejected"]
    assert last["eval/margin"] == pytest.approx(last["eval/rewards/chosen"] - last["eval/rewards/rejected"], abs=1e-6)
    assert losses_of(folder)[0] == pytest.approx(math.log(2), abs=1e-5)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    card = (folder / "README.md").read_text()
    assert "# Language model after DPO" in card and "eval/margin" in card and "text-generation" in card


def test_the_brief_console_shows_what_matters(dpo, capsys):
    folder = dpo("--console brief --log_interval 4")
    printed = capsys.readouterr().out
    assert "DPO, " in printed and "to give the answers that people prefer, in 16 steps (2 epochs)" in printed
    assert "evaluation before training: 50.0 % of 7 pairs right, margin 0.000, loss 0.693" in printed
    assert "accuracy " in printed and "  kl " in printed and "Evaluating" not in printed
    assert f"--path {folder}" in printed


def test_the_policy_without_its_adapters_is_the_reference(dpo):
    shared, separate = dpo(LORA, "shared"), dpo(f"{LORA} --separate_ref", "separate")
    assert losses_of(shared)[-1] < 0.6
    assert losses_of(shared) == pytest.approx(losses_of(separate), rel=1e-5)
    assert losses_of(shared, "kl") == pytest.approx(losses_of(separate, "kl"), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("more", ["", LORA, "--dpo_loss ipo --rpo_alpha 0.5"])
def test_a_precomputed_reference_is_the_live_one(dpo, more):
    live, table = dpo(more, "live"), dpo(f"{more} --precompute_ref_log_probs", "table")
    assert losses_of(live) == pytest.approx(losses_of(table), rel=1e-5)
    assert losses_of(live, prefix="eval") == pytest.approx(losses_of(table, prefix="eval"), rel=1e-5)


def test_precomputed_log_probs_are_kept_and_made_anew_for_another_model_or_other_rows(dpo, capsys, tmp_path):
    (tmp_path / "cache").mkdir()
    kept = dict(data_output_path=tmp_path / "cache")

    def files():
        return sorted((tmp_path / "cache/reference").iterdir())

    dpo("--precompute_ref_log_probs", "one", **kept)
    [file] = files()
    table = load_file(file)["log_probs"]
    assert table[-1] == 0 and (table[:-1] < 0).all() and len(table) == 2 * (16 + 7) + 1
    capsys.readouterr()
    dpo("--precompute_ref_log_probs", "two", **kept)
    assert f"of an earlier run with this model and these rows ({file})" in capsys.readouterr().out
    assert_same_run(tmp_path / "one", tmp_path / "two")
    dpo("--precompute_ref_log_probs --max_train_samples 14", "three", **kept)
    dpo("--precompute_ref_log_probs", "four", model_name_or_path=tmp_path / "one", **kept)
    assert len(files()) == 3
    assert losses_of(tmp_path / "four", prefix="eval")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_chat_template_writes_the_rows_and_the_reference_grows_with_the_vocabulary(dpo):
    folder = dpo("--chat_template chatml --max_seq_len 96 --dropout 0")
    assert losses_of(folder, prefix="eval")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses_of(folder)[-1] < 0.6


def test_the_best_model_is_kept_by_margin(dpo):
    folder = dpo("--save_best margin --eval_interval 4 --eval_iters 1")
    record = json.loads((folder / "best/best.json").read_text())
    assert record["metric"] == "margin" and record["value"] == max(losses_of(folder, "margin", "eval")[1:-1])


def test_qlora_saves_a_whole_model(dpo):
    folder = dpo(f"{LORA} --quantize int8")
    assert (folder / "model.safetensors").is_file() and (folder / "adapter").is_dir()
    assert losses_of(folder, prefix="eval")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses_of(folder)[-1] < 0.68


@pytest.mark.parametrize(
    "more, message",
    [
        ("--label_smoothing 0.5", "would be the preferred one"),
        ("--label_smoothing 0.1 --dpo_loss ipo", "a part of --dpo_loss sigmoid"),
        ("--simpo_gamma 1", "a margin of --reference_free"),
        ("--reference_free --dpo_loss apo_zero", "goes with sigmoid or hinge"),
        ("--reference_free --precompute_ref_log_probs", "leave out --precompute_ref_log_probs"),
        ("--reference_free --offload_reference_model", "leave out --offload_reference_model"),
        ("--precompute_ref_log_probs --separate_ref", "leave out --separate_ref"),
        ("--offload_reference_model --lora_dim 2 --only_optimize_lora", "add --separate_ref"),
    ],
)
def test_senseless_combinations_are_refused(dpo, more, message):
    with pytest.raises(UserError, match=message):
        dpo(more)


@pytest.mark.parametrize(
    "text, has",
    [
        ("", True),
        ("--lora_dim 2", True),  # norms and embeddings train, too
        ("--lora_dim 2 --only_optimize_lora", False),
        ("--lora_dim 2 --only_optimize_lora --separate_ref", True),
        ("--precompute_ref_log_probs", False),
        ("--reference_free", False),
    ],
)
def test_when_the_reference_is_a_model_of_its_own(text, has):
    args = arguments.build_parser("dpo").parse_args(flags(f"--model_name_or_path x {text}"))
    assert arguments.has_reference_engine(args) == has


def test_a_loss_that_is_not_finite_ends_the_run_with_its_rows(dpo, monkeypatch):
    monkeypatch.setattr(PreferenceLoss, "comparison", lambda self, chosen, rejected: chosen.log_probs * math.nan)
    with pytest.raises(UserError, match=r"the loss of the engine 'model' is nan in epoch 0, step 0 .training rows"):
        dpo()
