"""Evaluation of step 3: answers of the current policy to prompts that are not trained on."""

from torch.utils.data import Subset

from training.step3_rlhf_finetuning.experience import Experience
from training.step3_rlhf_finetuning.reporting import sample_rows
from utils.data import batching
from utils.process.console import progress
from utils.process.seeds import set_random_seed
from utils.process.world import get_rank

LEFT_OUT = ("kl_ctl",)  # of the figures of an experience: what is the training's and not the answers'


class HeldOutPrompts:
    """The first --eval_prompts prompts of the eval split, and what the policy answers to them.

    The answers are sampled as in training, one to each prompt, from the same random numbers at each evaluation.

    Args:
        prompts: the eval split.
        reporter: shows the figures and a few answers.
    """

    def __init__(self, prompts, args, trainer, reporter, device):
        self.args, self._trainer, self._reporter, self._device = args, trainer, reporter, device
        tokenizer, count = trainer.tokenizer, min(args.eval_prompts, len(prompts))
        self._samples: list[dict] = []
        padding = dict(pad_token_id=tokenizer.pad_token_id, pad_to_max_length=args.pad_to_max_length)
        self._collator = batching.DataCollatorRLHF(args.max_prompt_seq_len, **padding)
        self._filler = prompts[0]
        at_a_time = args.per_device_generation_batch_size
        sampler = batching.StepBatchSampler(prompts.lengths[:count], at_a_time, shuffle=False)
        self._loader = batching.make_loader(Subset(prompts, range(count)), sampler, self._collate)

    def __len__(self) -> int:
        """Batches of each rank."""
        return len(self._loader)

    def _collate(self, rows) -> tuple[dict, list[int]]:
        """A batch, and the places of its real rows: ranks whose rows run out answer a filler, as all must take part."""
        real = [place for place, row in enumerate(rows) if row is not None]
        return self._collator([self._filler if row is None else row for row in rows]), real

    def measure(self, batches: int = 0) -> dict[str, float]:
        """Score, KL to the reference, share of answers that end, length: means over all ranks' answers.

        Args:
            batches: of each rank; 0 for all.
        """
        trainer, tokenizer = self._trainer, self._trainer.tokenizer
        set_random_seed(self.args.seed + 1000 * get_rank())
        rounds: list[Experience] = []
        for number, (batch, real) in enumerate(progress(self._loader, "evaluating")):
            if batches and number == batches:
                break
            batch = batching.to_device(batch, self._device)
            prompt, mask = batch["prompt"], batch["prompt_att_mask"]
            rounds.append(trainer.generate_experience(prompt, mask, None, columns=batch.get("columns"))[real])
        experience = Experience.concat(rounds, tokenizer.pad_token_id)
        experience.values = None  # of no use here
        figures = trainer.experience_metrics(trainer.compute_rewards(experience))
        self._samples = sample_rows(experience, tokenizer, self.args.samples_shown)
        return {name: value for name, value in figures.items() if name not in LEFT_OUT}

    def evaluating(self, steps: int, epoch: int) -> None:
        self._reporter.evaluating(steps, epoch)

    def evaluated(self, steps: int, epoch: int, figures: dict) -> None:
        self._reporter.evaluated(steps, epoch, figures, self._samples)
