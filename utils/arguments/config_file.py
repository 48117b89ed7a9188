"""``--config``: the flags of a run in a file, and the file that each run writes of its own.

A file holds flags by their names, without dashes. They are read as if they stood on the command line, before what does
stand there, so that the same checks hold and the command line wins:

model_name_or_path: facebook/opt-1.3b
data_path: [Dahoas/rm-static, my/pairs.jsonl]
learning_rate: 9.65e-6
gradient_checkpointing: true
"""

import argparse
import copy
import difflib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml

from utils.arguments.kinds import Parser, size, size_text
from utils.data.errors import DataError
from utils.data.parsing import parse_json
from utils.process.console import now
from utils.process.errors import UserError
from utils.process.files import write_text
from utils.process.ranks import agree
from utils.process.versions import versions
from utils.process.world import is_rank_0

RUN_CONFIG_FILE = "run_config.yaml"
MOST_BYTES = 1 << 20
# Given anew for each run, or by the launcher: a file that repeats a run must not hold them.
NOT_IN_A_FILE = ("help", "config", "local_rank", "dry_run", "overwrite_output_dir")
_YAML = "tag:yaml.org,2002:"
_TEXTS = {_YAML + kind for kind in ("str", "int", "float", "timestamp")}  # taken as they are written


@dataclass(frozen=True)
class Setting:
    """A value of a file: a text as it would stand on the command line, several of them, on or off, or None for null.

    Attributes:
        place: begins what is said of it: the file, the line if it is known, and the key.
    """

    place: str
    name: str
    value: str | list[str] | bool | None

    def refuse(self, expected: str):
        """Raises: UserError."""
        kinds = {bool: "true" if self.value else "false", list: "a list", type(None): "null"}
        found = kinds.get(type(self.value), repr(self.value))
        raise UserError(f"{self.place}: expected {expected}, found {found}")


# ---------------------------------------------------------------- reading a file


def read_settings(file: str) -> list[Setting]:
    """The settings of a YAML or JSON file, in its order.

    Raises:
        UserError: a file that cannot be read, or holds anything but single values and lists of them by unique keys.
    """
    place = f"--config {file}"
    kind = Path(file).suffix.lower()
    if kind not in (".yaml", ".yml", ".json"):
        raise UserError(f"{place}: expected a file that ends in .yaml, .yml or .json")
    try:
        with open(file, "rb") as opened:
            data = opened.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UserError(f"{place}: expected flags and their values, found a file of more than {MOST_BYTES} bytes")
        settings = list(_of_json(data, place) if kind == ".json" else _of_yaml(data.decode(), place))
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror or error}") from error
    except DataError as error:
        raise UserError(str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{place}{line}: expected YAML, found: {getattr(error, 'problem', None) or error}") from error
    if not settings:
        raise UserError(f"{place}: expected flags and their values, as in learning_rate: 1e-5; found nothing")
    return settings


def _of_yaml(text: str, place: str) -> Iterator[Setting]:
    """Numbers stay as they are written: YAML 1.1 would read 1e-5 as a text, and 010 as 8."""
    root = yaml.compose(text, yaml.SafeLoader)
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{place}: expected flags and their values, as in learning_rate: 1e-5; found no keys")

    def read(node: yaml.Node, where: str, in_list: bool = False):
        if isinstance(node, yaml.SequenceNode) and not in_list:
            return [read(part, where, in_list=True) for part in node.value]
        tag = node.tag if isinstance(node, yaml.ScalarNode) else None
        if tag in _TEXTS or (in_list and tag == _YAML + "bool"):
            return node.value
        if tag == _YAML + "bool":
            return node.value.lower() in ("true", "yes", "on")
        if tag == _YAML + "null" and not in_list:
            return None
        raise UserError(f"{where}: expected a value{'' if in_list else ' or a list of values'}, found {_name_of(node)}")

    seen = set()
    for key, node in root.value:
        where = f"{place}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}: expected the name of a flag, found {_name_of(key)}")
        if key.value in seen:
            raise UserError(f"{where}: the key {key.value!r} stands there twice")
        seen.add(key.value)
        where += f", key {key.value!r}"
        yield Setting(where, key.value, read(node, where))


def _name_of(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "null" if node.tag == _YAML + "null" else f"{node.tag.removeprefix(_YAML)} {node.value!r}"


def _of_json(data: bytes, place: str) -> Iterator[Setting]:
    content = parse_json(data, lambda: place)
    if not isinstance(content, dict):
        raise UserError(f'{place}: expected flags and their values, as in {{"learning_rate": 1e-5}}')
    for name, value in content.items():
        where = f"{place}, key {name!r}"
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, dict | list) or (isinstance(value, list) and part is None) for part in parts):
            raise UserError(f"{where}: expected a value or a list of values, found {json.dumps(value)[:60]}")
        texts = [part if isinstance(part, str) else json.dumps(part) for part in parts]
        if not isinstance(value, list):
            texts = value if value is None or isinstance(value, bool) else texts[0]
        yield Setting(where, name, texts)


# ---------------------------------------------------------------- from settings to a command line


def _is_switch(action: argparse.Action) -> bool:
    """A flag that is given alone to turn something on; --chat_template may have a value beside."""
    return isinstance(action, argparse._StoreTrueAction) or (action.nargs == "?" and action.const is True)


def _words(action: argparse.Action, setting: Setting) -> list[str]:
    """What would stand on the command line.

    Raises:
        UserError: a value that the flag does not take.
    """
    flag, value = f"--{setting.name}", setting.value
    on_off = isinstance(action, argparse.BooleanOptionalAction)
    if value is None:
        if action.default is not None:
            setting.refuse(f"a value (without this line it is {_as_written(action, action.default)})")
        return []
    if isinstance(value, bool):
        if on_off:
            return [flag if value else f"--no-{setting.name}"]
        if not _is_switch(action):
            setting.refuse("a value (a text that says true or no stands in quotes)")
        return [flag] if value else []
    if on_off or action.nargs == 0:
        setting.refuse("true or false")
    if isinstance(value, list):
        if action.nargs not in ("*", "+"):
            setting.refuse("one value")
        if any(part.startswith("-") and part != "-" for part in value):
            setting.refuse("values that do not begin with a dash")
        return [flag, *value]
    return [f"{flag}={value}"]


def _check(action: argparse.Action, setting: Setting, words: list[str]) -> None:
    """Let the flag itself read its value, so that the error can name the file."""
    probe = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    probe._add_action(copy.copy(action))
    try:
        probe.parse_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{setting.place}: {error.message}") from error


class ConfigParser(Parser):
    """A parser whose flags may also come from the file of ``--config``.

    The namespace holds no ``config``: a run with a file is the same as one with the flags that the file holds.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        self.add_argument_group("settings in a file").add_argument(
            "--config",
            action="append",
            metavar="FILE",
            help="a .yaml or .json file that holds flags by their names without dashes: lists as lists, flags without "
            "a value as true or false. The command line wins over it (--no-NAME for a flag that the file turns on). "
            f"Each run writes such a file, {RUN_CONFIG_FILE}, to its --output_dir",
        )

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        looking = argparse.ArgumentParser(add_help=False, exit_on_error=False)
        looking.add_argument("--config", action="append", default=[])
        try:
            files = looking.parse_known_args(words)[0].config
        except argparse.ArgumentError:  # without its file: an error below
            files = []
        if len(files) > 1:
            raise UserError(f"--config is given {len(files)} times ({', '.join(files)}); give one file")
        if files:
            words = self._with_file(files[0], words)
        parsed, unknown = super().parse_known_args(words, namespace)
        del parsed.config
        return parsed, unknown

    def flags(self) -> dict[str, argparse.Action]:
        """What a file may hold: name -> flag."""
        return {action.dest: action for action in self._actions if action.dest not in NOT_IN_A_FILE}

    def _with_file(self, file: str, words: list[str]) -> list[str]:
        """The command line with the file's flags before its own."""
        flags, of_file = self.flags(), []
        turned_off = {word for name, flag in flags.items() if _is_switch(flag) and (word := f"--no-{name}") in words}
        for setting in read_settings(file):
            flag = flags.get(setting.name)
            if flag is None:
                self._refuse_unknown(setting)
            own = _words(flag, setting)
            if own:
                _check(flag, setting, own)
            if f"--no-{setting.name}" not in turned_off:
                of_file += own
        # --config stands between both: a stray word at the start is no further value of the file's last flag.
        return [*of_file, f"--config={file}", *(word for word in words if word not in turned_off)]

    def _refuse_unknown(self, setting: Setting):
        name = setting.name.lstrip("-").replace("-", "_")
        if name in NOT_IN_A_FILE:
            raise UserError(f"{setting.place}: --{name} is given on the command line, not in a file")
        near = difflib.get_close_matches(name, self.flags(), n=1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists them"
        raise UserError(f"{setting.place}: there is no such flag{hint}")


# ---------------------------------------------------------------- the file that a run writes


def _as_written(action: argparse.Action, value):
    """A flag's value as a file holds it."""
    if isinstance(value, Enum):
        return value.value
    return size_text(value) if action.type is size and isinstance(value, int) else value


def given_flags(parser: ConfigParser, args: argparse.Namespace) -> dict:
    """The flags of a parsed command line that differ from their defaults, as a file of ``--config`` holds them."""
    given = {}
    for name, action in parser.flags().items():
        value, default = getattr(args, name), action.default
        if isinstance(default, str) and action.type is not None:
            default = action.type(default)
        if value != default:
            given[name] = _as_written(action, value)
    return given


def run_config_text(flags: dict, command: list[str]) -> str:
    """The content of a run's file: how it was started, in comments, and its flags."""
    head = [
        "The flags of this run that differ from their defaults; --config reads them back.",
        f"started {now()}",
        f"in {os.getcwd()}, which relative paths start from",
        f"command: {shlex.join(command)}",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    comments = "".join(f"# {ascii(line)[1:-1] if not line.isprintable() else line}\n" for line in head)
    return comments + (yaml.safe_dump(flags, sort_keys=False, allow_unicode=True, width=1000) if flags else "")


def write_run_config(parser: ConfigParser, args: argparse.Namespace, resumed: bool = False) -> None:
    """Write a run's flags to its output folder, for ``--config``; every rank must call this.

    Args:
        args: as parsed, before they are settled: what was left open stays open.
        resumed: the run goes on from a checkpoint; the file of its first start stays.
    """

    def write() -> None:
        if args.output_dir is None or not is_rank_0():
            return
        file = Path(args.output_dir) / RUN_CONFIG_FILE
        if resumed and file.exists():
            return
        try:
            write_text(file, run_config_text(given_flags(parser, args), sys.argv))
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror or error}") from error

    agree(write)
