"""A table of files and flags that were made, or happen, to do harm.

Each ends in an error that names the file, the field or the flag, before a model is loaded or a row is prepared; nothing
of it is executed and nothing is written. Damaged weights, indices, rows and adapters that are not in this table are in
test_saving.py (BREAK and the pickles), test_raw_datasets.py (damaged lines and files), test_merge_lora.py (REFUSED),
test_bad_input.py (BAD, STEP_3_BAD) and test_data_faults.py.
"""

import argparse
import gzip
import importlib.util
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers
from helpers import make_model, write_pairs
from packaging import version
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from evaluation_scripts import prompt_eval
from evaluation_scripts.prompts import read_prompts
from utils import arguments
from utils.arguments.run import settle_common
from utils.data import chat_template_guard
from utils.data.encoding import SFT
from utils.data.errors import DataError
from utils.data.preparation import create_prompt_dataset
from utils.ds_utils import get_train_ds_config, merge_config_file
from utils.generation.saved_model import choosing_settings, load_language_model
from utils.model.convert_gguf import convert
from utils.model.merging import read_adapter
from utils.model.model_utils import check_model
from utils.model.reward_functions import load_reward_functions
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError
from utils.process.files import check_output_dir
from utils.process.seeds import set_random_seed

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DEEP, LONG_NUMBER = "[" * 100_000, "9" * 5000


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path, monkeypatch):
    """Code in the files of this table would make files named RAN; the working directory must stay empty."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield
    assert not list(tmp_path.rglob("RAN*"))
    assert not list((tmp_path / "cwd").iterdir())


def _refused(action, message: str):
    with pytest.raises((UserError, DataError), match=message) as caught:
        action()
    assert str(caught.value).strip()


def _files(folder: Path) -> dict:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


# ---------------------------------------------------------------- ways to damage a model's folder


def replace(name, content):
    def damage(folder):
        file = folder / name
        file.unlink(missing_ok=True)
        file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)

    return damage


def change(name, **settings):
    def damage(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return damage


def config(**settings):
    return change("config.json", **settings)


def tokenizer(edit):
    def damage(folder):
        state = json.loads((folder / "tokenizer.json").read_text())
        edit(state)
        (folder / "tokenizer.json").write_text(json.dumps(state))

    return damage


def as_fifo(name):
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def as_loop(name):
    return lambda folder: ((folder / name).unlink(), (folder / name).symlink_to(folder / name))


def as_folder(name):
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def safetensors(header, data=b"\0" * 64, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return replace(WEIGHTS, struct.pack("<Q", len(header) if length is None else length) + header + data)


def index(content):
    def damage(folder):
        (folder / WEIGHTS).rename(folder / "one.safetensors")
        (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps({"weight_map": content}))

    return damage


def own_code(name, **settings):
    """A setting that asks for Python code beside the model."""

    def damage(folder):
        (folder / "evil.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\n")
        change(name, **settings)(folder)

    return damage


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(name, protocol):
    def damage(folder):
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps({"a": Bomb(folder / "RAN")}, protocol))

    return damage


# ---------------------------------------------------------------- weights and configurations

TENSOR = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
UNREADABLE, NO_WEIGHTS, NO_MODEL = r"model\.safetensors cannot be read", "holds no weights", "no model could be loaded"
MODELS = {
    "a header longer than its file": (safetensors({"a": TENSOR}, length=1 << 40), UNREADABLE),
    "a header of 2**63 bytes": (safetensors({"a": TENSOR}, length=1 << 63), UNREADABLE),
    "a header of 101 MB": (safetensors(b'{"__metadata__":{"a":"' + b"x" * 101_000_000 + b'"}}'), UNREADABLE),
    "a header that is not JSON": (safetensors(b'{"a": '), UNREADABLE),
    "a header that is a list": (safetensors([1]), UNREADABLE),
    "a header that nests too deeply": (safetensors(DEEP.encode()), UNREADABLE),
    "a header that is not UTF-8": (safetensors(b"\xff\xfe{}"), UNREADABLE),
    "overlapping offsets": (safetensors({"a": TENSOR, "b": TENSOR}), UNREADABLE),
    "offsets beyond the file": (
        safetensors({"a": TENSOR | {"shape": [400, 4], "data_offsets": [0, 6400]}}),
        UNREADABLE,
    ),
    "reversed offsets": (safetensors({"a": TENSOR | {"data_offsets": [64, 0]}}), UNREADABLE),
    "a hole in the data": (safetensors({"a": TENSOR | {"shape": [2, 2], "data_offsets": [48, 64]}}), UNREADABLE),
    "a negative shape": (safetensors({"a": TENSOR | {"shape": [-4, -4]}}), UNREADABLE),
    "a shape that overflows": (safetensors({"a": TENSOR | {"shape": [2**62, 2**62]}}), UNREADABLE),
    "an unknown dtype": (safetensors({"a": TENSOR | {"dtype": "PICKLE"}}), UNREADABLE),
    "an empty weight file": (replace(WEIGHTS, b""), UNREADABLE),
    "weights in a loop of links": (as_loop(WEIGHTS), NO_WEIGHTS),
    "a folder for weights": (as_folder(WEIGHTS), NO_WEIGHTS),
    "a pipe for weights": (as_fifo(WEIGHTS), NO_WEIGHTS),
    "a pickle that calls itself safetensors": (
        lambda f: (pickled("p.safetensors", 2)(f), (f / INDEX).write_text('{"weight_map": {"a": "p.safetensors"}}')),
        r"p\.safetensors cannot be read",
    ),
    "a pickle bomb of protocol 0": (pickled("pytorch_model.bin", 0), r"pytorch_model\.bin (holds more|cannot be read)"),
    "a pickle bomb of protocol 5": (pickled("pytorch_model.bin", 5), r"pytorch_model\.bin (holds more|cannot be read)"),
    "a zip that is none": (
        lambda f: ((f / WEIGHTS).unlink(), (f / "pytorch_model.bin").write_bytes(b"PK\3\4" + b"\0" * 100)),
        r"pytorch_model\.bin cannot be read",
    ),
    "a shard that is a number": (index({"a": 3}), "names 3: only files beside"),
    "a shard with a zero byte": (index({"a": "x\0.safetensors"}), "which is not there"),
    "a shard that is the folder above": (index({"a": ".."}), "which is not there"),
    "a shard with a name without end": (index({"a": "x" * 5000}), "not there|File name too long|names x"),
    "an index that names itself": (index({"a": INDEX}), r"index\.json holds more than tensors"),
    "an index that nests too deeply": (index(DEEP), "is not an index of weights"),
    "an index of no weight": (index({}), "2 layers, and its files hold only 0 weights"),
    "config: nothing": (replace("config.json", ""), r"config\.json"),
    "config: null": (replace("config.json", "null"), NO_MODEL),
    "config: a text": (replace("config.json", '"llama"'), NO_MODEL),
    "config: zero bytes": (replace("config.json", b"\0" * 50), NO_MODEL),
    "config: nested too deeply": (replace("config.json", DEEP), NO_MODEL),
    "config: a number of 5000 digits": (
        replace("config.json", '{"model_type": "llama", "hidden_size": ' + LONG_NUMBER + "}"),
        NO_MODEL,
    ),
    "config: a pipe": (as_fifo("config.json"), NO_MODEL),
    "config: no model_type": (replace("config.json", '{"hidden_size": 32}'), "model_type"),
    "config: a model_type nobody knows": (config(model_type="nope"), "nope"),
    "config: a list of model_types": (config(model_type=["llama"]), NO_MODEL),
    "config: a negative width": (config(hidden_size=-32), "negative dimension"),
    "config: no heads": (config(num_attention_heads=0), "ZeroDivision"),
    "config: heads that do not divide": (config(num_attention_heads=5, head_dim=None), NO_MODEL),
    "config: layers in words": (config(num_hidden_layers="two"), "num_hidden_layers"),
    "config: negative layers": (config(num_hidden_layers=-2), "num_hidden_layers -2"),
    "config: a billion layers": (config(num_hidden_layers=10**9), "has 1000000000 layers"),
    "config: a negative vocabulary": (config(vocab_size=-5), NO_MODEL),
    "config: 10**15 tokens": (config(vocab_size=10**15), "of another shape"),
    "config: a width of 10**18": (config(hidden_size=10**18), NO_MODEL),
    "config: rotary positions nobody knows": (config(rope_parameters={"rope_type": "nope"}), NO_MODEL),
    "config: an activation nobody knows": (config(hidden_act="os.system"), "os.system"),
    "config: a dtype nobody knows": (config(dtype="nonsense"), "nonsense"),
    "config: architectures that are no names": (config(architectures=[3]), "architectures"),
    "config: a pad id outside": (config(pad_token_id=10**9), NO_MODEL),
    "config: an attention kernel from the hub": (config(_attn_implementation="evil/kernel"), "trust_remote_code"),
    "config: code of its own": (
        own_code("config.json", model_type="zzz", auto_map={"AutoConfig": "evil.X"}),
        "trust_remote_code|custom code",
    ),
    "generation settings that are no JSON": (replace("generation_config.json", "["), r"generation_config\.json"),
    "generation settings in a list": (replace("generation_config.json", "[1]"), r"generation_config\.json"),
    "an end of answers that is no id": (
        replace("generation_config.json", '{"eos_token_id": {"a": 1}}'),
        r"generation_config\.json.*eos_token_id",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case, folder):
    damage, message = MODELS[case]
    damage(folder)
    before = _files(folder)
    _refused(lambda: check_model(AutoModelForCausalLM, folder), message)
    assert _files(folder) == before


def test_code_beside_a_known_model_is_not_run(folder):
    own_code("config.json", auto_map={"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.Y"})(folder)
    config_and_options = check_model(AutoModelForCausalLM, folder)
    assert type(config_and_options[0]).__name__ == "LlamaConfig"  # transformers' own class


# ---------------------------------------------------------------- tokenizers and chat templates

NO_TOKENIZER = "no tokenizer could be loaded"
TOKENIZERS = {
    "not JSON": (replace("tokenizer.json", "{"), NO_TOKENIZER),
    "a list": (replace("tokenizer.json", "[1]"), NO_TOKENIZER),
    "empty": (replace("tokenizer.json", ""), NO_TOKENIZER),
    "nested too deeply": (replace("tokenizer.json", DEEP), NO_TOKENIZER),
    "not UTF-8": (replace("tokenizer.json", b"\xff"), NO_TOKENIZER),
    "absent": (
        lambda f: [file.unlink() for file in f.glob("*token*")],
        NO_TOKENIZER,
    ),
    "a pipe": (as_fifo("tokenizer.json"), NO_TOKENIZER),
    "no model": (tokenizer(lambda t: t.pop("model")), NO_TOKENIZER),
    "a model nobody knows": (tokenizer(lambda t: t["model"].update(type="Nope")), NO_TOKENIZER),
    "a vocabulary in a list": (tokenizer(lambda t: t["model"].update(vocab=[1])), NO_TOKENIZER),
    "a negative id": (tokenizer(lambda t: t["model"]["vocab"].update(a=-1)), NO_TOKENIZER),
    "merges of unknown tokens": (tokenizer(lambda t: t["model"].update(merges=[["zz", "qq"]])), "zz"),
    "missing ids": (tokenizer(lambda t: t["model"]["vocab"].update(zzzz=5000)), "id 5000, outside the .* rows"),
    "an id of 2**31": (tokenizer(lambda t: t["model"]["vocab"].update(zzzz=2**31)), "id 2147483648, outside"),
    "a broken expression": (
        tokenizer(
            lambda t: t.update(
                pre_tokenizer={
                    "type": "Split",
                    "pattern": {"Regex": "("},
                    "behavior": "Isolated",
                    "invert": False,
                }
            )
        ),
        NO_TOKENIZER,
    ),
    "a BOS that is not there": (
        tokenizer(
            lambda t: t.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            )
        ),
        NO_TOKENIZER,
    ),
    "settings that are no JSON": (replace("tokenizer_config.json", "{"), NO_TOKENIZER),
    "settings in a list": (replace("tokenizer_config.json", "[1]"), NO_TOKENIZER),
    "a class that is a number": (change("tokenizer_config.json", tokenizer_class=3), NO_TOKENIZER),
    "no EOS": (change("tokenizer_config.json", eos_token=None), "no EOS token"),
    "an EOS that is a number": (change("tokenizer_config.json", eos_token=3), NO_TOKENIZER),
    "an EOS of no letters": (change("tokenizer_config.json", eos_token=""), "no EOS token"),
    "code of its own": (
        own_code("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}),
        "trust_remote_code|custom code",
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(case, folder):
    damage, message = TOKENIZERS[case]
    damage(folder)
    _refused(lambda: load_hf_tokenizer(folder), f"(?s){message}.*" if "tokenizer" not in message else message)


NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "a loop without end": (NESTED, "does not come to an end"),
    "a number of ten billion digits": ("{{ 10**(10**10) }}", "does not come to an end|memory"),
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "a text of ten billion letters": ('{{ "a" * 10**10 }}', "memory"),
    "padding of a billion letters": ('{{ "a".ljust(10**10) }}', "memory"),
    "an output of ten million letters": ('{{ "a" * 10**7 }}', "10,000,000 characters"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "Python's classes": ('{{ "".__class__.__mro__[1].__subclasses__() }}', "unsafe"),
    "Python's modules": ("{{ cycler.__init__.__globals__.os.mkdir('RAN') }}", "unsafe"),
    "a format that reaches in": ('{{ "{0.__class__.__mro__}".format(1) }}', "unsafe"),
    "a namespace that remembers": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "refuses"),
    "another file": ('{% include "/etc/passwd" %}', "refuses the conversation"),
    "an import": ('{% import "os" as os %}', "refuses the conversation"),
    "a division by zero": ("{{ 1/0 }}", "ZeroDivisionError"),
    "no template at all": ("{% for", "refuses the conversation"),
}


@pytest.fixture
def ask():
    """Load a folder for answers, with its chat template, as the scripts do."""
    models = ["--model_name_or_path_baseline", "x", "--model_name_or_path_finetune", "x"]
    args = prompt_eval.parse_args([*models, "--prompt_style", "chat_template", "--device", "cpu"])
    return lambda folder: load_language_model(str(folder), args)


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_templates(case, folder, ask, monkeypatch):
    template, message = TEMPLATES[case]
    if case == "a namespace that remembers" and version.parse(transformers.__version__) < version.parse("5.22"):
        pytest.skip("before 5.22 such a name is stored in a dict like any other, and read by nobody")
    monkeypatch.setattr(chat_template_guard, "CPU_SECONDS", 1)
    (folder / "chat_template.jinja").write_text(template)
    _refused(lambda: ask(folder), rf"model: the tokenizer's chat template .*({message})")


def test_a_chat_template_is_tried_before_data_is_prepared(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template_guard, "CPU_SECONDS", 1)
    tokenizer = load_hf_tokenizer(folder)
    tokenizer.chat_template = NESTED + "{# of data #}"
    file = write_pairs(tmp_path / "pairs.jsonl", 20)
    with pytest.raises(UserError, match=r"--chat_template: .*does not come to an end"):
        create_prompt_dataset(
            0, [str(file)], "1,1,1", str(tmp_path / "cache"), SFT, 1, tokenizer, 32, chat_template=True
        )


# ---------------------------------------------------------------- data


def _packed(file, beginning):
    with gzip.open(file, "wb") as out:
        out.write(beginning)
        for _ in range(12):
            out.write(b"a" * (4 << 20))


def _dataset_folder(name, content):
    return lambda place: (place.mkdir(), (place / name).write_text(content))


ROW = '{"prompt": " Human: a Assistant:", "chosen": " b"}\n'
DATA = {
    "a packed line that fills memory": ("x.jsonl.gz", lambda p: _packed(p, b'{"prompt": "'), "unpacks to more than"),
    "a packed array that fills memory": ("x.json.gz", lambda p: _packed(p, b'[{"prompt": "'), "unpacks to more than"),
    "a packed table that fills memory": ("x.csv.gz", lambda p: _packed(p, b"prompt,chosen\n"), "unpacks to more than"),
    "a folder with the name of a file": ("x.jsonl", Path.mkdir, "expected data files"),
    "a pipe": ("x.jsonl", os.mkfifo, "expected data files"),
    "an endless device": ("x.jsonl", lambda p: p.symlink_to("/dev/zero"), "expected data files"),
    "a link to itself": (
        "x.jsonl",
        lambda p: p.symlink_to(p),
        "there is no such file or folder of data; looked for \\S+$",
    ),
    "a folder that holds itself": ("x", lambda p: (p.mkdir(), (p / "x").symlink_to(p)), "expected data files"),
    "a loading script": ("x", _dataset_folder("x.py", "open('RAN', 'w')"), "expected data files"),
    "a saved dataset that points elsewhere": (
        "x",
        _dataset_folder("state.json", '{"_data_files": [{"filename": "../../../../etc/passwd"}]}'),
        "expected a save_to_disk folder",
    ),
    "a zip archive": ("x.jsonl.zip", lambda p: p.write_bytes(b"PK\3\4"), "expected a file that ends in"),
    "half of a character": ("x.jsonl", lambda p: p.write_text(ROW.replace(" b", "\\ud800") * 20), "lone surrogate"),
    "a number beyond numbers": ("x.jsonl", lambda p: p.write_text(ROW.replace('" b"', "1e999999") * 20), "a number"),
    "any bytes": ("x.jsonl", lambda p: p.write_bytes(bytes(range(256))), r"x\.jsonl, line 1"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, sound, tmp_path):
    name, make, message = DATA[case]
    make(tmp_path / name)
    tokenizer = load_hf_tokenizer(sound)
    _refused(
        lambda: create_prompt_dataset(
            0, [str(tmp_path / name)], "1,1,1", str(tmp_path / "cache"), SFT, 1, tokenizer, 32
        ),
        message,
    )
    assert not list((tmp_path / "cache").rglob("*.arrow"))


PROMPTS = {
    "not UTF-8": ("p.txt", lambda p: p.write_bytes(b"\xff\xfe"), "cannot be read"),
    "a folder": ("p.txt", Path.mkdir, "cannot be read"),
    "absent": ("p.jsonl", lambda p: None, r"p\.jsonl"),
    "no field": ("p.jsonl", lambda p: p.write_text('{"x": 1}\n'), "expected the column 'prompt'"),
    "no text": ("p.jsonl", lambda p: p.write_text('{"prompt": [1]}\n'), "line 1: field 'prompt'"),
    "only blanks": ("p.txt", lambda p: p.write_text("\n\n"), "holds no prompts"),
    "another kind": ("p.exe", lambda p: p.write_text("x"), "ends in one of"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_files_of_prompts(case, tmp_path):
    name, make, message = PROMPTS[case]
    make(tmp_path / name)
    _refused(lambda: read_prompts(str(tmp_path / name)), message)


# ---------------------------------------------------------------- adapters, soft prompts, GGUF

FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
PAIR = {FACTOR: torch.zeros(2, 32), FACTOR.replace("lora_A", "lora_B"): torch.zeros(32, 2)}
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4}


def adapter(settings=None, text=None, tensors=None, **metadata):
    def make(place):
        place.mkdir()
        (place / "adapter_config.json").write_text(text or json.dumps(ADAPTER | (settings or {})))
        save_file(tensors or PAIR, place / "adapter_model.safetensors", metadata={"format": "pt"} | metadata)

    return make


ADAPTERS = {
    "a list": (adapter(text="[1]"), "no table of settings"),
    "nested too deeply": (adapter(text=DEEP), "holds no LoRA adapter"),
    "a base that is a number": (adapter({"base_model_name_or_path": 3}), "base_model_name_or_path 3"),
    "an alpha that is no number": (adapter({"lora_alpha": float("nan")}), "lora_alpha"),
    "an alpha that is true": (adapter({"lora_alpha": True}), "lora_alpha"),
    "a broken expression": (adapter({"alpha_pattern": {"(": 4}}), r"alpha_pattern '\('"),
    "an expression that takes for ever": (adapter({"alpha_pattern": {"(a+)+$": 4}}), "repeats within repeats"),
    "an expression of many repeats": (adapter({"alpha_pattern": {".*.*.*.*x": 4}}), "repeats within repeats"),
    "expressions in a list": (adapter({"alpha_pattern": [1]}), "alpha_pattern is no table"),
    "an alpha in words": (adapter({"alpha_pattern": {"a": "x"}}), "alpha_pattern is no table"),
    "factors of rank 0": (adapter(tensors={FACTOR: torch.zeros(0, 32)}), "is no factor"),
    "a factor in one dimension": (adapter(tensors={FACTOR: torch.zeros(32)}), "is no factor"),
    "a factor of integers": (adapter(tensors={FACTOR: torch.zeros(2, 32, dtype=torch.int64)}), "is no factor"),
    "settings of the model that are no JSON": (adapter(changed_config="{"), "changed_config"),
    "settings of the model in a list": (adapter(changed_config="[1]"), "changed_config"),
    "code for the merged model": (adapter(changed_config='{"auto_map": {"AutoConfig": "evil.X"}}'), "changed_config"),
    "a kernel for the merged model": (adapter(changed_config='{"_attn_implementation": "evil/k"}'), "changed_config"),
    "a pad token in words": (adapter(changed_config='{"pad_token_id": "x"}'), "changed_config"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case, tmp_path):
    make, message = ADAPTERS[case]
    make(tmp_path / "adapter")
    _refused(lambda: read_adapter(tmp_path / "adapter"), message)


SOFT_PROMPT = '{"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "BASE", "task_type": "CAUSAL_LM"}'
SOFT_PROMPTS = {
    "nested too deeply": (DEEP, None, r"adapter_config\.json is not JSON"),
    "a list": ("[1]", None, "names no peft_type"),
    "a base that is a number": (SOFT_PROMPT.replace('"BASE"', "3"), None, "give --base_model"),
    "no vectors": (SOFT_PROMPT, {"prompt_embeddings": torch.zeros(0, 32)}, "holds no soft prompt"),
    "vectors that are not finite": (
        SOFT_PROMPT,
        {"prompt_embeddings": torch.full((2, 32), float("nan"))},
        "holds no soft prompt",
    ),
    "vectors of integers": (
        SOFT_PROMPT,
        {"prompt_embeddings": torch.zeros(2, 32, dtype=torch.int32)},
        "holds no soft prompt",
    ),
}


@pytest.mark.parametrize("case", SOFT_PROMPTS)
def test_soft_prompts(case, sound, tmp_path, ask):
    text, tensors, message = SOFT_PROMPTS[case]
    (tmp_path / "soft").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sound / name, tmp_path / "soft")
    (tmp_path / "soft/chat_template.jinja").write_text("{{ messages[-1].content }}")
    (tmp_path / "soft/adapter_config.json").write_text(text.replace("BASE", str(sound)))
    if tensors is not None:
        save_file(tensors, tmp_path / "soft/adapter_model.safetensors")
    _refused(lambda: ask(tmp_path / "soft"), message)


GGUFS = {
    "a text": b"hello",
    "nothing": b"",
    "the first four bytes": b"GGUF",
    "2**60 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60),
    "version 99": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "a key of 2**62 bytes": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"abc",
    "a value of no kind": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 3) + b"abc" + struct.pack("<I", 77),
    "no settings": b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + b"\0" * 64,
}


@pytest.mark.parametrize("case", GGUFS)
def test_gguf_files(case, tmp_path, monkeypatch):
    if importlib.util.find_spec("gguf") is None:  # transformers' reader sees the file first
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (tmp_path / "x.gguf").write_bytes(GGUFS[case])
    _refused(lambda: convert(tmp_path / "x.gguf", tmp_path / "out"), r"x\.gguf cannot be read as a GGUF model")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- reward functions

REWARDS = {
    "no Python": ("def (", "r.py:f", "cannot be run: SyntaxError"),
    "a zero byte": ("f = 1\0", "r.py:f", "cannot be run"),
    "an error at its beginning": ("raise RuntimeError('no')", "r.py:f", "cannot be run: RuntimeError"),
    "an exit at its beginning": ("import sys; sys.exit(0)", "r.py:f", "cannot be run: SystemExit"),
    "no such function": ("def g(p, a): pass", "r.py:f", "has no function f, only g"),
    "a number for a function": ("f = 1", "r.py:f", "has no function f"),
    "no such file": ("", "nowhere.py:f", "there is no file"),
    "a weight without bounds": ("def f(prompts, answers): return [1]", "r.py:f:1e999", "is no number"),
    "an error in its work": (
        "def f(prompts, answers): raise ValueError('no')",
        "r.py:f",
        "ValueError at .*r.py:1: no",
    ),
    "an exit in its work": ("import sys\ndef f(**columns): sys.exit(0)", "r.py:f", "raised SystemExit"),
    "other arguments": (
        "def f(p, a): return []",
        "r.py:f",
        "f asks for p, a .* there is no p, a. There are: ",
    ),
    "arguments without names": ("def f(prompts, /): return []", "r.py:f", "prompts can only be passed by position"),
    "a signature that is hidden": ("f = min", "r.py:f", "its parameters cannot be read"),
    "no arguments": ("def f(): return []", "r.py:f", "gave 0 scores for 1"),
    "no scores": ("def f(answers): return None", "r.py:f", "raised TypeError"),
    "scores in words": ("def f(answers): return ['high']", "r.py:f", "gave 'high'"),
    "a score that is missing": ("def f(answers): return [None]", "r.py:f", "gave None"),
    "a score too many": ("def f(answers): return [1, 2]", "r.py:f", "gave 2 scores for 1"),
}


@pytest.mark.parametrize("case", REWARDS)
def test_reward_functions(case, tmp_path):
    source, spec, message = REWARDS[case]
    (tmp_path / "r.py").write_text(source)
    _refused(lambda: [score(["p"], ["a"]) for score in load_reward_functions([f"{tmp_path}/{spec}"])], message)


# ---------------------------------------------------------------- flags

FLAGS = {
    1: [
        ("--learning_rate", "nan"),
        ("--learning_rate", "-1"),
        ("--learning_rate", "inf"),
        ("--weight_decay", "-0.1"),
        ("--lora_learning_rate", "nan"),
        ("--soft_prompt_learning_rate", "nan"),
        ("--lora_dim", "-1"),
        ("--lora_scaling", "nan"),
        ("--dropout", "1.5"),
        ("--per_device_train_batch_size", "0"),
        ("--per_device_train_batch_size", "many"),
        ("--gradient_accumulation_steps", "-2"),
        ("--num_train_epochs", "1" + "0" * 30),
        ("--num_warmup_steps", "-1"),
        ("--max_seq_len", "0"),
        ("--max_shard_size", "-5GB"),
        ("--preprocessing_num_workers", "0"),
        ("--seed", "-1"),
        ("--seed", str(2**40)),
        ("--comm_timeout", "0"),
        ("--zero_stage", "4"),
        ("--dtype", "int8"),
    ],
    2: [("--rm_margin", "nan"), ("--rm_center_coef", "-1"), ("--learning_rate", "nan")],
    3: [
        ("--actor_learning_rate", "nan"),
        ("--critic_learning_rate", "-1"),
        ("--actor_weight_decay", "inf"),
        ("--temperature", "nan"),
        ("--temperature", "-1"),
        ("--kl_ctl", "-0.1"),
        ("--kl_target", "0"),
        ("--cliprange", "0"),
        ("--cliprange_value", "nan"),
        ("--clip_reward_value", "-5"),
        ("--missing_eos_penalty", "nan"),
        ("--reward_model_weight", "inf"),
        ("--unsup_coef", "nan"),
        ("--gamma", "1.1"),
        ("--ema_decay", "nan"),
    ],
}


@pytest.mark.parametrize(("step", "flag", "value"), [(step, *pair) for step in FLAGS for pair in FLAGS[step]])
def test_flags_out_of_range(step, flag, value, capsys):
    names = ["--model_name_or_path"] if step < 3 else ["--actor_model_name_or_path"]
    parser = arguments.build_parser(step)
    parser.parse_args([*names, "x"])
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([*names, "x", flag, value])
    assert ended.value.code == 2
    assert f"error: {flag}" in capsys.readouterr().err


def _common(**changes):
    args = dict(data_path=[], add_eot_token=False, eot_token="<e>", data_output_path="/nowhere", data_split="1,1,1")
    args |= dict(chat_template=False, prompt_format=None, data_config=None, dataset_split=None, dataset_config=None)
    return lambda: settle_common(argparse.Namespace(**args | changes))


MORE_FLAGS = {
    "a cache that cannot be": (_common(data_output_path="/proc/nowhere"), "--data_output_path /proc/nowhere: cannot"),
    "a zero byte in a path": (lambda: check_output_dir("a\0b"), "--output_dir .*: cannot be written"),
    "a path without end": (lambda: check_output_dir("x" * 5000), "--output_dir .*: cannot be written"),
    "a blank end of answers": (
        lambda: _common(add_eot_token=True, eot_token=" ", data_output_path=None)(),
        "--eot_token: ",
    ),
    "a seed beyond NumPy's": (lambda: set_random_seed(2**40), "--seed"),
    "a temperature that is no number": (lambda: choosing_settings(True, float("nan"), 1.0, 0), "--temperature nan"),
    "a share that is no number": (lambda: choosing_settings(True, 1.0, float("nan"), 0), "--top_p nan"),
}


@pytest.mark.parametrize("case", MORE_FLAGS)
def test_flags_with_impossible_values(case):
    action, message = MORE_FLAGS[case]
    _refused(action, message)


OVERRIDES = {
    "a list": ("[1]", "expected a JSON object"),
    "nested too deeply": (DEEP, "is not JSON"),
    "not UTF-8": (b"\xff", "is not JSON"),
    "a number of 5000 digits": ('{"steps_per_print": ' + LONG_NUMBER + "}", "is not JSON"),
    "a slip in a name": ('{"zero_optimisation": {}}', "zero_optimisation is no .* did you mean zero_optimization"),
    "a setting nobody knows": ('{"zero_optimization": {"stage3_nonsense": 1}}', "stage3_nonsense"),
    "a size in words": ('{"zero_optimization": {"reduce_bucket_size": "big"}}', "reduce_bucket_size"),
    "a stage in quotes": ('{"zero_optimization": {"stage": "0"}}', "zero_optimization.stage: expected a number"),
    "a section that is null": ('{"zero_optimization": null}', "zero_optimization must be an object"),
    "a section that is a number": ('{"activation_checkpointing": 3}', "DeepSpeed refuses it"),
    "a precision in a list": ('{"fp16": [1]}', "fp16 must be an object"),
    "clipping at no number": ('{"gradient_clipping": NaN}', "gradient_clipping: expected a number"),
    "a negative interval": ('{"steps_per_print": -1}', "steps_per_print: expected a number"),
    "perhaps": ('{"hybrid_engine": {"enabled": "maybe"}}', "hybrid_engine.enabled: expected true or false"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_deepspeed_overrides(case, tmp_path):
    content, message = OVERRIDES[case]
    file = tmp_path / "overrides.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    _refused(
        lambda: merge_config_file(get_train_ds_config(False, "fp32", 0), str(file)),
        rf"--deepspeed_config_overrides .*overrides\.json: .*{message}",
    )
