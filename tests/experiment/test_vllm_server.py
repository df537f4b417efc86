"""A vLLM server that answers, answers late, dies, or has no log-probabilities: a fake one, by HTTP.

TRL's own client talks to it, so that its requests and retries are the real ones. Only the weight
sync, which needs NCCL, is left out.
"""

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import tiny
import torch

pytest.importorskip("requests")

from test_workbook_trainer import At, folders
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
    completions = 0
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
        self.server.completions += 1
        if self.server.mood == "late":
            time.sleep(2.0)
        if self.server.mood == "dead":
            return self.connection.close()
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


def trainer(folder: Path, server: Fake, **overrides: Any) -> Any:
    made = tiny.trainer(
        folder,
        kind=WorkbookTrainer,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=server.url,
        **{"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **overrides},
    )
    client = made.vllm_generation.vllm_client
    adapter = client.session.get_adapter(server.url)
    adapter.max_retries = adapter.max_retries.new(backoff_factor=0)  # a test need not wait
    return made


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


@pytest.mark.parametrize("step", [0, 2, 3])
@pytest.mark.parametrize("logp", ["nan", "inf", "-inf"])
def test_log_probabilities_that_are_no_numbers_cost_no_good_checkpoint(
    tmp_path: Path, server: Fake, logp: str, step: int
) -> None:
    """In the first step, one in the middle and the last one."""
    run = trainer(tmp_path, server, max_steps=4, save_total_limit=1)

    def broken() -> None:
        server.logp = float(logp)

    run.add_callback(At(step, broken))
    counts = "32, and infinity for 0" if logp == "nan" else "0, and infinity for 32"
    with pytest.raises(FloatingPointError, match=f"for {counts}, of 32 tokens at step {step}"):
        run.train()
    assert folders(tmp_path) == ([f"checkpoint-{step}"] if step else [])
    server.logp = Fake.logp
    again = trainer(tmp_path, server, max_steps=4)
    again.train(resume_from_checkpoint=True if step else None)
    assert again.state.global_step == 4
    assert all(p.isfinite().all() for p in again.model.parameters())


@pytest.mark.parametrize("mood", ["late", "dead"])
def test_a_server_that_fails_is_named_with_the_step(
    tmp_path: Path, server: Fake, mood: str
) -> None:
    run = trainer(tmp_path, server, ddp_timeout=1)
    once = run._save_checkpoint

    def saved(*args: Any) -> None:
        once(*args)
        server.mood, server.completions = mood, 0

    run._save_checkpoint = saved
    said = f"did not answer POST {server.url}/v1/completions at step 1 .*longest wait 1 s"
    with pytest.raises(ConnectionError, match=said):
        run.train()
    assert server.completions == 1, "a generation was asked for again while the first was under way"
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()


def test_a_server_that_is_gone_is_named_after_the_retries(tmp_path: Path, server: Fake) -> None:
    run = trainer(tmp_path, server)
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=r"did not answer POST .* at step 0 .*refused"):
        run.train()
