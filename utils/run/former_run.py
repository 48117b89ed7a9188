"""What an earlier run left in an output folder, and its removal for --overwrite_output_dir.

By place and by name: a folder that a run saves models to, if it holds one, and in it the files that saving writes;
checkpoints; metrics. Whatever else lies there, in these folders too, is the user's and stays.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from utils.process.console import print_rank_0
from utils.process.errors import UserError
from utils.process.files import holds_model, model_folders
from utils.run.checkpoint_files import FINISHED_FILE, LATEST_FILE, PREFIX, STATE_FILE, remove_checkpoint
from utils.run.evaluation import BEST_RECORD
from utils.run.metrics_file import FILES
from utils.run.model_card import CARD_FILE, is_own

# In the order in which they go. The weights and the configuration, by which a model is known, are the last: what a kill
# leaves of them is found again.
BESIDE_A_MODEL = (
    *(BEST_RECORD, "generation_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
MODEL = (
    *("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "model*.index.json", "pytorch_model*.index.json"),
    *("adapter_config.json", "config.json"),
)


def former_checkpoints(folder: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, in a folder of them."""
    return sorted(entry for entry in folder.glob(f"{PREFIX}*") if (entry / STATE_FILE).is_file())


def remove_former_run(output_dir: str | Path) -> None:
    """Remove what an earlier run left in its output folder, and say what; on one rank.

    Raises:
        UserError: a file that cannot be removed.
    """
    output = Path(output_dir)
    try:
        removed = [*_remove_models(output), *_remove_checkpoints(output / "checkpoints"), *_remove_metrics(output)]
    except OSError as error:
        raise UserError(f"--overwrite_output_dir: {error.filename} could not be removed: {error.strerror}") from error
    if removed:
        print_rank_0(f"--overwrite_output_dir: removed what an earlier run left in {output}: {', '.join(removed)}")


def _remove_models(output: Path) -> Iterator[str]:
    for folder in filter(holds_model, model_folders(output)):
        if is_own(folder / CARD_FILE):
            (folder / CARD_FILE).unlink()
        for file in itertools.chain.from_iterable(folder.glob(pattern) for pattern in BESIDE_A_MODEL + MODEL):
            file.unlink()
        yield "a model" if folder == output else f"{folder.relative_to(output)}/"
        for emptied in (folder / "additional_chat_templates", folder, folder.parent):
            if emptied.is_relative_to(output) and emptied != output and emptied.is_dir() and not any(emptied.iterdir()):
                emptied.rmdir()


def _remove_checkpoints(folder: Path) -> Iterator[str]:
    checkpoints = former_checkpoints(folder)
    for name in (FINISHED_FILE, LATEST_FILE):  # first: what a kill leaves is no finished run
        (folder / name).unlink(missing_ok=True)
    for checkpoint in checkpoints:
        remove_checkpoint(checkpoint)
    if checkpoints:
        yield f"{len(checkpoints)} checkpoint(s)"


def _remove_metrics(output: Path) -> Iterator[str]:
    for file in (output / name for name in FILES):
        if file.is_file():
            empty = file.stat().st_size == 0
            file.unlink()
            if not empty:
                yield file.name
