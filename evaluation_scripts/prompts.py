"""What the evaluation scripts ask and score: built-in prompts and pairs, and the reading of the user's own."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.data.conversation import Conversation, Message, Texts
from utils.data.errors import DataError
from utils.data.own_files import PathDataset, get_raw_dataset
from utils.data.raw_datasets import PromptRawDataset, find_known_dataset
from utils.data.row_texts import SkipRow
from utils.data.rows import Rows
from utils.data.splits import EVAL_SPLITS, Flags, is_hub_name, open_splits
from utils.model.reward_functions import PROMPT_MESSAGES
from utils.process.errors import UserError

Example = Texts | Conversation

# The same six topics in each language: help with a task, an explanation for a child, a poem, a comparison,
# a piece of history, practical advice.
PROMPTS = {
    "English": [
        "I would like to bake my first loaf of bread. How do I begin?",
        "How does an aeroplane stay up in the air? Please explain it so that a seven-year-old understands.",
        "Write a short poem about a lighthouse in winter.",
        "What are the differences between a violin and a cello?",
        "Why was the printing press so important in European history?",
        "I sleep badly before exams. What could I do about it?",
    ],
    "Chinese": [
        "我想第一次自己动手烤面包，应该从哪里开始？",
        "飞机为什么能停留在空中？请用七岁孩子能听懂的话来解释。",
        "请写一首关于冬天灯塔的短诗。",
        "小提琴和大提琴有哪些区别？",
        "印刷机在欧洲历史上为什么如此重要？",
        "我在考试前总是睡不好，可以怎么办？",
    ],
    "Japanese": [
        "初めて自分でパンを焼いてみたいのですが、何から始めればよいですか？",
        "飛行機はどうして空を飛び続けられるのですか？七歳の子どもにも分かるように説明してください。",
        "冬の灯台についての短い詩を書いてください。",
        "バイオリンとチェロの違いは何ですか？",
        "印刷機はなぜヨーロッパの歴史においてそれほど重要だったのですか？",
        "試験の前になるとよく眠れません。どうすればよいでしょうか？",
    ],
}

# Pairs whose better answer nobody would dispute: helpful against curt, right against wrong, kind against rude.
PAIRS = [
    {
        "prompt": "Could you help me plan a vegetable garden on a small balcony?",
        "chosen": "Gladly. Tomatoes, lettuce and herbs do well in pots. Choose the sunniest corner, use pots with "
        "holes in the bottom, and water in the morning. Shall we work out which plants suit the size of your balcony?",
        "rejected": "Balconies are too small. Forget it.",
    },
    {
        "prompt": "What is the capital of Portugal?",
        "chosen": "The capital of Portugal is Lisbon.",
        "rejected": "The capital of Portugal is Madrid, which lies in the north of Brazil.",
    },
    {
        "prompt": "I failed my driving test today and feel terrible.",
        "chosen": "I am sorry to hear that. Many good drivers needed a second try. If you tell me what went wrong, we "
        "can go through it together so that the next test feels easier.",
        "rejected": "Well, some people are simply too stupid to drive.",
    },
    {
        "prompt": "Why do leaves change their colour in autumn?",
        "chosen": "When the days grow shorter, trees stop making chlorophyll, the green pigment. As it fades, the "
        "yellow and orange pigments that were there all along become visible, and some trees also make red ones.",
        "rejected": "Because because because leaves leaves leaves are are are are colour colour colour.",
    },
    {
        "prompt": "How long should I boil an egg so that the yolk stays soft?",
        "chosen": "About six minutes in boiling water for a medium egg, then a moment under cold water.",
        "rejected": "I like eggs. My neighbour has a dog. What was the question?",
    },
    {
        "prompt": "My neighbour's wireless network has no password. May I use it for my work?",
        "chosen": "It is better to ask first: it is their connection, and they answer for what is done with it. An "
        "open network is also a risk for your own data.",
        "rejected": "Sure, take what you can get, and read their mail while you are at it.",
    },
]


def open_dataset(
    path: str, columns: Mapping[str, str | None] | None = None, config: str | None = None, split: str | None = None
) -> PromptRawDataset:
    """A file, a folder, a known dataset or one of the hub, recognised as the training steps recognise it.

    Args:
        columns: own column names of files by what they hold, as in get_raw_dataset.
        config, split: where there are several; the rows of the split are then those of "train".

    Raises:
        DataError: it cannot be read, or its rows have no shape that is known.
    """
    columns = {name: column for name, column in (columns or {}).items() if column}
    # The folder is for the index files of a dataset that is divided; here splits are read whole.
    place, flags = (tempfile.gettempdir(), 0, -1), Flags("--config", "--split")
    if find_known_dataset(path) is not None or not Path(path).exists():
        if find_known_dataset(path) is None and not is_hub_name(path):
            raise DataError(f"{path}: no such file or folder")
        return get_raw_dataset(path, *place, columns, split=split, config=config)
    splits = open_splits(path, config, split, flags)
    held_out = next((name for name in EVAL_SPLITS if name in splits), None)
    try:
        splits["train"]
    except DataError:
        if split is not None or held_out is None:
            raise
        splits = open_splits(path, config, held_out, flags)  # without rows to train on
    return PathDataset(*place, path, None, columns, splits)


def rows_to_judge(dataset: PromptRawDataset, split: str | None = None) -> Rows:
    """The rows of the split that the dataset was opened with; None: of its evaluation split if it has one, else all."""
    found = (name for name in EVAL_SPLITS if name in dataset.raw_datasets)
    return dataset.rows_of("train" if split else next(found, "train"))


def readable(text: str | Sequence[Message]) -> str:
    """A prompt or an answer for reading: a text or a single turn as it stands, several with their roles."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return text[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)


def prompts_of_lines(lines: Sequence[str]) -> tuple[list[Example], list[dict]]:
    """As read_prompts gives them."""
    prompts = [Texts(line) for line in lines]
    return prompts, [_with_messages({"prompt": prompt.prompt}, prompt) for prompt in prompts]


def _with_messages(row: Mapping, prompt: Example) -> dict:
    """A row with its prompt's turns, under the name by which functions that judge ask for them."""
    turns = prompt.as_conversation() if isinstance(prompt, Texts) else prompt
    return {**row, PROMPT_MESSAGES: turns.prompt}


def read_prompts(path: str) -> tuple[list[Example], list[dict]]:
    """Prompts of a file, and the row of each: of .txt the lines that are not blank; of any data that the steps read,
    its rows' prompts and all their fields.

    Raises:
        UserError: names file, row and field.
    """
    if Path(path).suffix != ".txt":
        return _prompts_of_data(path)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no prompts")
    return prompts_of_lines(lines)


def _prompts_of_data(path: str) -> tuple[list[Example], list[dict]]:
    prompts, rows_of_prompts = [], []
    try:
        dataset = open_dataset(path)
        dataset.keep_also("all")
        rows = rows_to_judge(dataset)
        for position, row in enumerate(rows):
            try:
                found = dataset.examples(row, ("prompt",))
            except SkipRow as reason:
                raise UserError(f"{rows.where(position)}: {reason}") from reason
            prompts += found
            rows_of_prompts += [_with_messages(row, prompt) for prompt in found]
    except DataError as error:
        raise UserError(str(error)) from error
    return prompts, rows_of_prompts
