"""The tokenizer of a model: loaded, with an EOS token and a pad token of its own; and the tokens that end an answer."""

from transformers import AutoTokenizer
from transformers.utils import cached_file

from utils.data import prompt_format
from utils.data.chat_templates import missing_tokens, named_template
from utils.data.errors import DataError
from utils.data.special_tokens import special_token_ids
from utils.model.loading import check_there, load_config
from utils.process.console import print_rank_0
from utils.process.errors import UserError


def load_hf_tokenizer(model_name_or_path, fast_tokenizer=True, add_special_tokens=None, trust_remote_code=False):
    """The tokenizer of a model, with an EOS token and a pad token that differs from it.

    Decided from the tokenizer alone, never from the model's name.

    Args:
        add_special_tokens: an end-of-turn token, as with ``--add_eot_token``: it is added if the vocabulary lacks it
            and becomes the EOS token, so that data, generation, chat and the saved tokenizer agree on where answers
            end.

    Raises:
        UserError: no tokenizer, one that cannot be read, one without an EOS token, with ids beyond the embedding, or
            without a free id for a token that must be added.
    """
    name = str(model_name_or_path)
    check_there(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=fast_tokenizer, trust_remote_code=trust_remote_code)
        tokenizer("a")
        vocabulary = tokenizer.get_vocab()
        highest = max(vocabulary.values())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # strangers' files: anything may come of them, a panic of Rust too
        raise UserError(f"no tokenizer could be loaded from {name!r}: {type(error).__name__}: {error}") from error
    if highest >= len(tokenizer):
        _check_highest_id(name, highest, trust_remote_code)
    if add_special_tokens is not None:
        if isinstance(add_special_tokens, list):
            [add_special_tokens] = add_special_tokens
        _add_special_token(tokenizer, "eos_token", add_special_tokens, vocabulary)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name!r} has no EOS token; --add_eot_token adds one")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        _add_special_token(tokenizer, "pad_token", "[PAD]", vocabulary)
    tokenizer.padding_side = "right"
    return tokenizer


def _add_special_token(tokenizer, role: str, token: str, vocabulary: dict[str, int]) -> None:
    """Give a role to a token, which is added if the vocabulary lacks it.

    An added token gets the number of tokens as its id; where ids are missing below, a word may have that one.
    """
    tokenizer.add_special_tokens({role: token})
    new = tokenizer.convert_tokens_to_ids(token)
    if token not in vocabulary and new in vocabulary.values():
        word = next(word for word, word_id in vocabulary.items() if word_id == new)
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no free id for the {role} {token!r}: ids are missing in "
            f"its vocabulary, and {new} is that of {word!r}. Name one of its own tokens as {role} in "
            "tokenizer_config.json"
        )


def _check_highest_id(model_name_or_path: str, highest: int, trust_remote_code: bool) -> None:
    """A vocabulary with holes in it: embeddings grow to the number of tokens, which leaves such an id outside."""
    if cached_file(model_name_or_path, "config.json", _raise_exceptions_for_missing_entries=False) is None:
        return  # an adapter: its model is checked when it is used
    rows = load_config(model_name_or_path, trust_remote_code).get_text_config().vocab_size
    if highest >= rows:
        raise UserError(
            f"the tokenizer of {model_name_or_path!r} has a token of id {highest}, outside the {rows} rows of the "
            "model's embedding, and ids are missing below it: the two do not belong together"
        )


def use_template(tokenizer, template: str | None = None) -> None:
    """Let a tokenizer write prompts by a chat template.

    Tokens that it writes and the vocabulary lacks are added: a turn that ends in several ordinary tokens could not be
    told from text.

    Args:
        template: a name or a file, as ``named_template`` takes it; None for the one that the model came with.

    Raises:
        UserError: no such template, or none of the model's own.
    """
    if template is not None:
        try:
            tokenizer.chat_template = named_template(template)
        except DataError as error:
            raise UserError(str(error)) from error
        if missing := missing_tokens(tokenizer.chat_template, tokenizer):
            tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
            print_rank_0(f"--chat_template {template}: added to the vocabulary: {', '.join(missing)}")
        return
    own = prompt_format.own_template(tokenizer)
    if own is None:
        raise UserError(
            "--chat_template: the tokenizer has none of its own; name one, as in --chat_template chatml, or a file"
        )
    tokenizer.chat_template = own


def vocabulary_size(tokenizer) -> int:
    """One more than the highest id: the number of tokens, or above it where ids are missing."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def end_token_ids(model, tokenizer) -> list[int]:
    """The ids, in order, that each end an answer, wherever answers are sampled, trained, scored or shown.

    They are the tokenizer's EOS, what closes an assistant's turn in the chat template that came with it, and the
    special tokens among those that the model's generation settings name: Llama 3, Qwen and Gemma name two or three.

    Args:
        model: one of transformers; a decoder without a language-model head has no such settings.

    Raises:
        ValueError: a chat template that cannot be used.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list | tuple) else [named]
    # A default of some configuration class (2, say) may be an ordinary word of this tokenizer.
    ids = {tokenizer.eos_token_id, prompt_format.end_of_turn_id(tokenizer)} | (
        set(named) & special_token_ids(tokenizer)
    )
    return sorted(ids - {None})


def keep_end_tokens(model, tokenizer) -> None:
    """Write the model's ``end_token_ids`` into its generation settings, where ``generate()`` looks for them.

    Raises:
        UserError: a chat template that cannot be used.
    """
    try:
        ids = end_token_ids(model, tokenizer)
    except ValueError as error:
        raise UserError(
            f"{tokenizer.name_or_path}: what ends an answer cannot be told, because {error}. Correct the template, or "
            "take it out of the tokenizer's files"
        ) from error
    if ids:
        model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]


def describe_end_tokens(ids: list[int], tokenizer) -> str:
    """The tokens as a person reads them, the tokenizer's EOS first: "'<|im_end|>' (5), '<|endoftext|>' (3)"."""
    ids = sorted(ids, key=lambda token_id: token_id != tokenizer.eos_token_id)
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token_id)!r} ({token_id})" for token_id in ids)


def check_same_tokenizer(
    tokenizer,
    actor_name_or_path,
    critic_name_or_path,
    add_special_tokens=None,
    trust_remote_code=False,
    asked_format=None,
) -> None:
    """UserError unless the critic reads ids as the actor writes them; another prompt format is said.

    Args:
        tokenizer: the actor's, loaded with the same ``add_special_tokens``.
        asked_format: in which the run writes prompts, where its flags say so; None: as the actor's tokenizer remembers.
    """
    critic = load_hf_tokenizer(
        critic_name_or_path, add_special_tokens=add_special_tokens, trust_remote_code=trust_remote_code
    )
    if critic.get_vocab() != tokenizer.get_vocab() or critic.eos_token_id != tokenizer.eos_token_id:
        raise UserError(
            f"the tokenizers differ: actor {actor_name_or_path} has {len(tokenizer)} tokens and EOS "
            f"{tokenizer.eos_token!r}, critic {critic_name_or_path} has {len(critic)} and {critic.eos_token!r}. "
            "Train the reward model from a model with the actor's tokenizer"
        )
    written, judged = asked_format or prompt_format.remembered(tokenizer), prompt_format.remembered(critic)
    if None not in (written, judged) and written != judged:
        print_rank_0(
            f"WARNING: prompts are written as {written}, and the reward model {critic_name_or_path} was trained on "
            f"{judged}: its scores say little about them; train it in this format, or give --prompt_format {judged}"
        )
