"""`transformers serve` on a saved model, asked by LangChain: the answers are those of our own generation."""

import importlib.util
import socket
import subprocess
import sys
import time

import pytest
from helpers import make_model
from transformers import AutoTokenizer

from inference import chatbot
from utils.data import prompt_format as pf
from utils.generation.saved_model import generate_answers, load_language_model

NEEDED = ("fastapi", "uvicorn", "openai", "langchain_openai")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: see inference/README.md")
TALK = [("user", "say red"), ("assistant", "red"), ("user", "and blue?")]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(model folder, port) of a server; the model was given the template that training gives."""
    folder = make_model(tmp_path_factory.mktemp("served"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pf.remember(tokenizer, pf.HUMAN_ASSISTANT)
    tokenizer.save_pretrained(folder)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", str(folder), "--device", "cpu", "--port", str(port)]
    log = (folder.parent / "serve.log").open("w+")
    server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (folder.parent / "serve.log").read_text()
                time.sleep(0.2)
        yield str(folder), port
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


def test_langchain_gets_the_answers_of_our_own_generation(served):
    from langchain_openai import ChatOpenAI

    folder, port = served
    address, limits = f"http://127.0.0.1:{port}/v1", {"temperature": 0, "max_tokens": 12, "max_retries": 0}
    model = ChatOpenAI(base_url=address, api_key="none", model=folder, **limits)
    lm = load_language_model(folder, chatbot.parse_args(["--path", folder, "--device", "cpu"]))
    for talk in (TALK[:1], TALK):
        turns = [{"role": role, "content": content} for role, content in talk]
        prompt = pf.encode_prompt(pf.format_prompt(turns), lm.tokenizer)
        [[expected]] = generate_answers(lm, [prompt], 1, do_sample=False, max_new_tokens=12)
        answer = model.invoke(talk)
        assert answer.content == expected.text and len(expected.text) > 3
        usage = answer.usage_metadata
        assert (usage["input_tokens"], usage["output_tokens"]) == (len(prompt), expected.num_tokens)
    assert "".join(piece.content for piece in model.stream(TALK)).strip("\ufffd") == expected.text.strip("\ufffd")
