"""A little world of short questions in which "better" has a ground truth, for `--data_path local/demo`.

A question is one of twelve kinds (addition, opposites, capitals, ...), a fact of that kind and one of five phrasings.
An answer is right or wrong, and has a manner: good (courteous, ends), curt, rambling (goes on until it is cut) or rude.
`rank` orders answers by manner first and by rightness within a manner. A preference pair is two answers of different
rank to one question, so the chosen column itself holds good manners (half), curt ones and rambling ones: a policy
finetuned on it does all of them, and PPO has something to improve.
"""

import functools
import itertools
import random
import re
from dataclasses import dataclass
from typing import Literal

DEFAULT_SIZES = {"train": 20_000, "eval": 1_000}

Manner = Literal["good", "curt", "rambling", "rude"]
MANNERS_WORST_FIRST: tuple[Manner, ...] = ("rude", "rambling", "curt", "good")
MAX_RANK = 2 * len(MANNERS_WORST_FIRST) - 1

# A rambling answer has at least this many words: more than any step of the demo keeps of an answer, so that no end of
# a rambling answer is ever learned.
RAMBLING_WORDS = 140


def rank(manner: Manner, right: bool) -> int:
    """The ground truth, 0 (rude, wrong) to MAX_RANK (good, right): manner first, then rightness."""
    return 2 * MANNERS_WORST_FIRST.index(manner) + int(right)


# Questions


@dataclass(frozen=True)
class Kind:
    """One kind of question: its phrasings (with {x} and {y}), its facts and the words that count as an answer."""

    name: str
    phrasings: tuple[str, ...]
    facts: tuple[tuple[dict[str, str], str], ...]
    answer_words: frozenset[str]


@dataclass(frozen=True)
class Question:
    """One fact in one phrasing."""

    kind: Kind
    prompt: str
    answer: str
    wrong_answers: tuple[str, ...]
    held_out: bool


_NUMBERS_UP_TO_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
NUMBERS = tuple(_NUMBERS_UP_TO_TWENTY.split())
_NUMBERS_IN_DIGITS = {str(i): number for i, number in enumerate(NUMBERS)}
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# A and I are words of their own, so no answer may be one of them.
ANSWER_LETTERS = "BCDEFGHJKLMNOPQRST"


def words_of(text: str) -> list[str]:
    """Lower-case words of `text`; a number in digits reads as its word."""
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())
    return [_NUMBERS_IN_DIGITS.get(word, word) for word in words]


def _kind(name: str, facts, phrasings: tuple[str, ...], answer_words=()) -> Kind:
    """`facts` yields (x, answer) or ((x, y), answer); every word of an answer counts as an answer word."""
    pairs = [(dict(zip("xy", (x,) if isinstance(x, str) else x, strict=False)), answer) for x, answer in facts]
    counted = [word for _, answer in pairs for word in words_of(answer)] + [word.lower() for word in answer_words]
    return Kind(name, phrasings, tuple(pairs), frozenset(counted))


def _word_pairs(text: str) -> list[tuple[str, str]]:
    return [tuple(pair.split(":")) for pair in text.split()]


def _build_kinds() -> tuple[Kind, ...]:
    opposites = _word_pairs(
        "hot:cold big:small tall:short fast:slow light:dark rich:poor hard:soft full:empty wet:dry strong:weak "
        "early:late clean:dirty"
    )
    plurals = _word_pairs(
        "mouse:mice child:children foot:feet tooth:teeth goose:geese man:men woman:women leaf:leaves knife:knives "
        "wolf:wolves box:boxes city:cities baby:babies dish:dishes hero:heroes potato:potatoes tree:trees book:books"
    )
    capitals = _word_pairs(
        "France:Paris Italy:Rome Spain:Madrid Japan:Tokyo Germany:Berlin Egypt:Cairo Greece:Athens Norway:Oslo "
        "Poland:Warsaw Russia:Moscow China:Beijing Cuba:Havana Peru:Lima Kenya:Nairobi Austria:Vienna Portugal:Lisbon "
        "Ireland:Dublin Sweden:Stockholm"
    )
    young = _word_pairs(
        "dog:puppy cat:kitten cow:calf horse:foal sheep:lamb goat:kid pig:piglet hen:chick duck:duckling lion:cub "
        "frog:tadpole deer:fawn kangaroo:joey"
    )
    colours = {
        "grass": "green",
        "a frog": "green",
        "a cucumber": "green",
        "snow": "white",
        "milk": "white",
        "salt": "white",
        "coal": "black",
        "tar": "black",
        "a raven": "black",
        "blood": "red",
        "a tomato": "red",
        "a strawberry": "red",
        "a lemon": "yellow",
        "a banana": "yellow",
        "chocolate": "brown",
        "a walnut": "brown",
        "a carrot": "orange",
        "a pumpkin": "orange",
        "a clear sky": "blue",
        "a sapphire": "blue",
    }
    short_words = (
        "cat sun hat pen cup fox map bed car key jam leg milk fish bird tree lamp moon rain wind gold ship bell cake"
    )
    return (
        _kind(
            "addition",
            [((NUMBERS[a], NUMBERS[b]), NUMBERS[a + b]) for a in range(1, 7) for b in range(1, 7)],
            (
                "What is {x} plus {y}?",
                "Add {x} and {y}.",
                "How much is {x} and {y} together?",
                "Please work out {x} plus {y}.",
                "Can you tell me the sum of {x} and {y}?",
            ),
            NUMBERS,
        ),
        _kind(
            "subtraction",
            [((NUMBERS[a], NUMBERS[b]), NUMBERS[a - b]) for a in range(2, 8) for b in range(1, a)],
            (
                "What is {x} minus {y}?",
                "Start at {x} and take away {y}.",
                "How much is left of {x} without {y}?",
                "Please work out {x} minus {y}.",
                "I had {x} apples and ate {y}. How many are left?",
            ),
            NUMBERS,
        ),
        _kind(
            "counting",
            [
                ((NUMBERS[a], NUMBERS[a + span]), ", ".join(NUMBERS[a : a + span + 1]))
                for span in (2, 3)
                for a in range(1, 7)
            ],
            (
                "Count from {x} to {y}.",
                "Please count up from {x} to {y}.",
                "Can you count from {x} until {y}?",
                "Which numbers run from {x} to {y}?",
                "List the numbers between {x} and {y}, both included.",
            ),
            NUMBERS,
        ),
        _kind(
            "reversal",
            [(word, word[::-1]) for word in short_words.split()],
            (
                "Spell {x} backwards.",
                "What is {x} backwards?",
                "Please reverse the word {x}.",
                "How do you write {x} from back to front?",
                "Turn the word {x} around.",
            ),
        ),
        _kind(
            "next day",
            [(day, WEEKDAYS[(i + 1) % 7]) for i, day in enumerate(WEEKDAYS)],
            (
                "Which day comes after {x}?",
                "What is the day after {x}?",
                "Today is {x}. What day is tomorrow?",
                "If today is {x}, which day is next?",
                "Name the day that follows {x}.",
            ),
        ),
        _kind(
            "previous day",
            [(day, WEEKDAYS[i - 1]) for i, day in enumerate(WEEKDAYS)],
            (
                "Which day comes before {x}?",
                "What is the day before {x}?",
                "Today is {x}. What day was yesterday?",
                "If today is {x}, which day was it last?",
                "Name the day just before {x}.",
            ),
        ),
        _kind(
            "opposite",
            opposites + [(b, a) for a, b in opposites],
            (
                "What is the opposite of {x}?",
                "Give me the opposite of {x}.",
                "Which word means the contrary of {x}?",
                "If it is not {x}, what is it?",
                "Please name the opposite of the word {x}.",
            ),
        ),
        _kind(
            "plural",
            plurals,
            (
                "What is the plural of {x}?",
                "Give me the plural of {x}.",
                "How do you say {x} when there are many?",
                "Please write the word {x} in the plural.",
                "I see a {x} here and another there. What do I see?",
            ),
        ),
        _kind(
            "next letter",
            [(chr(ord(letter) - 1), letter) for letter in ANSWER_LETTERS],
            (
                "Which letter comes after {x}?",
                "What is the next letter after {x}?",
                "Name the letter that follows {x}.",
                "In the alphabet, what comes after {x}?",
                "Please tell me the letter right behind {x}.",
            ),
        ),
        _kind(
            "capital",
            capitals,
            (
                "What is the capital of {x}?",
                "Name the capital of {x}.",
                "Which city is the capital of {x}?",
                "Can you tell me the capital of {x}?",
                "I am going to {x}. What is its capital?",
            ),
        ),
        _kind(
            "colour",
            colours.items(),
            (
                "What colour is {x}?",
                "Which colour does {x} have?",
                "Name the colour of {x}.",
                "Can you tell me the colour of {x}?",
                "I want to paint {x}. Which colour do I need?",
            ),
        ),
        _kind(
            "young animal",
            young,
            (
                "What do you call a young {x}?",
                "What is the young of a {x} called?",
                "Name the baby of a {x}.",
                "Which word means a young {x}?",
                "A {x} has a little baby. What is it called?",
            ),
        ),
    )


KINDS = _build_kinds()


@functools.cache
def questions() -> tuple[Question, ...]:
    """Every question of the world. One phrasing of each fact is held out; the others tell the fact to the learner."""
    found = []
    for kind in KINDS:
        all_answers = sorted({answer for _, answer in kind.facts})
        for i, (fields, answer) in enumerate(kind.facts):
            wrong_answers = tuple(other for other in all_answers if other != answer)
            for j, phrasing in enumerate(kind.phrasings):
                prompt = f" Human: {phrasing.format(**fields)} Assistant:"
                found.append(Question(kind, prompt, answer, wrong_answers, held_out=j == i % len(kind.phrasings)))
    return tuple(found)


@functools.cache
def _questions_by_prompt() -> dict[str, Question]:
    return {question.prompt.strip(): question for question in questions()}


def find_question(prompt: str) -> Question:
    """The question behind `prompt` (blanks around it do not matter).

    Raises:
        ValueError: `prompt` is not one of the demo world.
    """
    question = _questions_by_prompt().get(prompt.strip())
    if question is None:
        raise ValueError(f"not a prompt of the demo world: {prompt!r}")
    return question


def held_out_prompts(n: int) -> list[str]:
    """`n` different prompts, all kinds mixed, that no train row has; always the same ones.

    Raises:
        ValueError: the world holds out fewer than `n` prompts.
    """
    prompts = [question.prompt for question in questions() if question.held_out]
    if not 0 <= n <= len(prompts):
        raise ValueError(f"the demo world holds out {len(prompts)} prompts, {n} asked for")
    random.Random("held-out prompts").shuffle(prompts)
    return prompts[:n]


# Answers. No wording below contains an answer word of any kind (a test holds this).

OPENINGS = ("Of course:", "Sure:", "Certainly:", "With pleasure:", "Good question:")
CLOSINGS = ("Happy to help!", "Glad to help!", "You are welcome!", "Have a nice evening!")
GOOD_FORMS = (
    "{opening} {answer}. {closing}",
    "{opening} {answer}. {closing}",
    "{opening} {answer}.",
    "{answer}. {closing}",
)
CURT_FORMS = ("{answer}.", "It is {answer}.", "Just {answer}.")
RUDE_FORMS = (
    "{answer}, obviously. Stop asking.",
    "What a silly question: {answer}.",
    "Leave me alone. {answer}, whatever.",
    "Ugh, {answer}. Are you stupid?",
)
COURTEOUS_WORDINGS = tuple(" ".join(words_of(wording)) for wording in OPENINGS + CLOSINGS)
RUDE_WORDINGS = ("obviously", "stop asking", "silly", "leave me alone", "whatever", "ugh", "stupid")

RAMBLING_LINKS = ("and then", "and anyway", "and besides")
RAMBLING_PEOPLE = ("my uncle", "the neighbour", "our teacher", "the baker")
RAMBLING_DEEDS = ("talked about", "went looking for", "wrote to us about", "kept thinking of")
RAMBLING_THINGS = ("the weather", "an umbrella", "the garden", "a train", "the soup")


def make_answer(question: Question, manner: Manner, right: bool, rng: random.Random) -> str:
    """An answer text of that manner, beginning with one blank."""
    answer = question.answer if right else rng.choice(question.wrong_answers)
    if manner == "rambling":
        return _rambling_answer(answer, rng)
    forms = {"good": GOOD_FORMS, "curt": CURT_FORMS, "rude": RUDE_FORMS}[manner]
    form = rng.choice(forms)
    return " " + form.format(answer=answer, opening=rng.choice(OPENINGS), closing=rng.choice(CLOSINGS))


def _rambling_answer(answer: str, rng: random.Random) -> str:
    """Starts with the answer and stops in the middle of a sentence."""
    words = [answer + ",", "well,"]
    while len(words) < RAMBLING_WORDS:
        clause = (RAMBLING_PEOPLE, RAMBLING_DEEDS, RAMBLING_THINGS, RAMBLING_LINKS)
        words += " ".join(rng.choice(part) for part in clause).split()
    return " " + " ".join(words)


# Preference pairs

# (chosen manner, rejected manner) -> share of the pairs. Half of the chosen answers are good. Few pairs differ in
# rightness alone: they show the reward model that it counts, and leave manner to decide nearly every pair.
PAIR_SHARES: dict[tuple[Manner, Manner], float] = {
    ("good", "good"): 0.05,
    ("good", "curt"): 0.15,
    ("good", "rambling"): 0.15,
    ("good", "rude"): 0.15,
    ("curt", "rambling"): 0.13,
    ("curt", "rude"): 0.12,
    ("rambling", "rude"): 0.25,
}
# How often a rejected answer of lower manner is right; a chosen answer always is.
REJECTED_RIGHT_SHARE: dict[Manner, float] = {"curt": 0.5, "rambling": 0.5, "rude": 0.2}


def demo_rows(split: Literal["train", "eval"], size: int | None = None, seed: int = 1234) -> list[dict[str, str]]:
    """`size` rows {prompt, chosen, rejected} (DEFAULT_SIZES if None); chosen is of strictly higher rank than rejected.

    The eval split asks held-out prompts only, the train split the others only, whatever the seed.

    Raises:
        ValueError: unknown split or negative size.
    """
    if split not in DEFAULT_SIZES:
        raise ValueError(f"split must be one of {', '.join(DEFAULT_SIZES)}, not {split!r}")
    size = DEFAULT_SIZES[split] if size is None else size
    if size < 0:
        raise ValueError(f"size must not be negative: {size}")
    rng = random.Random(f"demo world, {split}, {seed}")
    asked = [question for question in questions() if question.held_out == (split == "eval")]
    cumulative_weights = list(itertools.accumulate(_weights(asked)))
    rows = []
    for _ in range(size):
        question = rng.choices(asked, cum_weights=cumulative_weights)[0]
        chosen_manner, rejected_manner = rng.choices(list(PAIR_SHARES), weights=list(PAIR_SHARES.values()))[0]
        rejected_right = chosen_manner != rejected_manner and rng.random() < REJECTED_RIGHT_SHARE[rejected_manner]
        rows.append(
            {
                "prompt": question.prompt,
                "chosen": make_answer(question, chosen_manner, True, rng),
                "rejected": make_answer(question, rejected_manner, rejected_right, rng),
            }
        )
    return rows


def _weights(asked: list[Question]) -> list[float]:
    """Every fact counts alike, but kinds of few facts (weekdays) are asked as often as one of twenty.

    Facts of two numbers count half as much again: they are the hardest to learn.
    """
    return [
        max(1.0, 20 / len(question.kind.facts)) * (1.5 if len(question.kind.facts[0][0]) == 2 else 1.0)
        for question in asked
    ]
