"""A vLLM server that answers with or without log-probabilities: a fake one, by HTTP.

TRL's own client talks to it, so that its requests are the real ones. Only the weight sync, which
needs NCCL, is left out.
"""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import tiny
import torch

pytest.importorskip("requests")

from trl.generation import vllm_client, vllm_generation
from trl.generation.vllm_client import VLLMClient

from rlsd_lib.experiment.workbook_trainer import WorkbookTrainer

CONFIG = {
    "weight_transfer_config": {"backend": "nccl"},
    "model_config": {"logprobs_mode": "processed_logprobs"},
}


class Fake(ThreadingHTTPServer):
    """Answers as `vllm serve` does; `mood` decides how it behaves from now on."""

    daemon_threads = True
    mood = "well"
    logp = -1.5

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        models = {"data": [{"id": "tiny"}]}
        self.say({"/v1/models": models, "/health": {}}.get(self.path, {"vllm_config": CONFIG}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        if self.path != "/v1/completions":
            return self.say({})
        rows = [prompt for prompt in body["prompt"] for _ in range(body["n"])]
        return self.say({"choices": [self.choice(i, row) for i, row in enumerate(rows)]})

    def choice(self, index: int, prompt: list[int]) -> dict[str, Any]:
        """Four tokens, the first different for each completion of a prompt."""
        ids = [40 + index, 41, 42, 1]
        logps = [self.server.logp] * len(ids)
        if self.server.mood == "some missing":
            logps[0] = float("nan")
        tokens = [f"token_id:{token}" for token in ids]
        spoken = {"tokens": tokens, "token_logprobs": logps, "top_logprobs": [{}] * len(ids)}
        return {"token_ids": ids, "prompt_token_ids": prompt, "logprobs": spoken}

    def say(self, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    for module in (vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda *_, **__: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", lambda *_: None)
    with Fake(("127.0.0.1", 0), Handler) as fake:
        Thread(target=fake.serve_forever, daemon=True).start()
        yield fake
        fake.shutdown()


def trainer(folder: Path, server: Fake) -> Any:
    vllm = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
    return tiny.trainer(folder, kind=WorkbookTrainer, max_steps=2, **vllm)


def test_a_server_that_answers_is_trained_on(tmp_path: Path, server: Fake) -> None:
    run = trainer(tmp_path, server)
    before = [p.detach().clone() for p in run.model.parameters()]
    server.mood = "some missing"
    run.train()
    first = run.state.log_history[0]
    # One token of four has no log-probability: it is trained without correction, and counted.
    assert first["sampling/missing_logp_frac"] == 0.25
    assert all(torch.tensor(row["loss"]).isfinite() for row in run.state.log_history[:2])
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert any((p != q).any() for p, q in zip(run.model.parameters(), before, strict=True))


def test_a_server_without_any_log_probability_stops_the_run(tmp_path: Path, server: Fake) -> None:
    server.logp = float("nan")
    with pytest.raises(FloatingPointError, match=r"\(NaN\) for any of 32 tokens at step 0"):
        trainer(tmp_path, server).train()
