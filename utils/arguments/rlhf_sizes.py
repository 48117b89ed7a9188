"""The batch arithmetic of step 3."""

from dataclasses import dataclass

from utils.process.errors import UserError


@dataclass(frozen=True)
class RLHFBatchSizes:
    """The batch arithmetic of step 3, per device."""

    generation_batch: int  # answers sampled at a time
    rounds: int  # rounds of generation before each update
    micro_batch: int  # answers per forward pass of an update
    accumulation: int  # forward passes per optimizer step
    answers_per_prompt: int = 1

    @classmethod
    def of(cls, args) -> "RLHFBatchSizes":
        """The sizes that the flags ask for.

        Raises:
            UserError: sizes that do not divide, with the arithmetic.
        """
        generation, micro = args.per_device_generation_batch_size, args.per_device_training_batch_size
        accumulation, rounds = args.gradient_accumulation_steps, args.generation_batches
        if (generation * rounds) % micro:
            raise UserError(
                f"--per_device_generation_batch_size {generation} x --generation_batches {rounds} = "
                f"{generation * rounds} answers do not divide into --per_device_training_batch_size {micro}"
            )
        passes = generation * rounds // micro
        if accumulation > passes:
            # The policy does not move before an optimizer step, so more rounds first is the same as accumulating over
            # updates.
            if accumulation % passes:
                raise UserError(
                    f"--gradient_accumulation_steps {accumulation} is no multiple of the {passes} forward passes that "
                    f"{generation} x {rounds} answers in micro-batches of {micro} make"
                )
            rounds *= accumulation // passes
        elif passes % accumulation:
            raise UserError(
                f"{generation} x {rounds} answers in micro-batches of {micro} make {passes} forward passes, "
                f"which do not divide by --gradient_accumulation_steps {accumulation}"
            )
        return cls(generation, rounds, micro, accumulation, args.num_generations_per_prompt)

    @property
    def prompts_per_round(self) -> int:
        return self.generation_batch // self.answers_per_prompt

    @property
    def rows_per_update(self) -> int:
        return self.generation_batch * self.rounds

    @property
    def steps_per_pass(self) -> int:
        """Optimizer steps in one pass over the answers of an update."""
        return self.rows_per_update // (self.micro_batch * self.accumulation)

    def updates(self, prompts: int, ranks: int) -> int:
        """Updates in one pass over so many prompts; rounds of generation that fill no update are dropped.

        Raises:
            UserError: too few prompts for one.
        """
        rows = self.prompts_per_round * ranks
        updates = prompts // rows // self.rounds
        if updates == 0:
            raise UserError(
                f"{prompts} prompts do not fill one update of {self.rounds} x {rows} prompts; lower "
                "--per_device_generation_batch_size or --gradient_accumulation_steps, or give more data"
            )
        return updates

    def explain(self) -> str:
        prompts = f", {self.answers_per_prompt} to each prompt" if self.answers_per_prompt > 1 else ""
        return (
            f"batch per device: {self.rounds} x {self.generation_batch} answers generated{prompts} "
            f"= {self.rows_per_update} per update = {self.steps_per_pass} optimizer steps "
            f"x {self.accumulation} forward passes x {self.micro_batch} answers"
        )
