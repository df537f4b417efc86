"""Rollouts by a vLLM server of its own, over HTTP.

TRL sends weights to a server over NCCL. With two GPUs that is what happens here. Without, the
server keeps its first weights, on purpose: what a server that fell behind looks like in the log.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from test_trainer import run_and_capture
from transformers import Qwen3ForCausalLM

pytestmark = pytest.mark.vllm

SYNCED = torch.cuda.device_count() > 1
SERVED, MOVED = 0.08, 1.0  # nats per token, as in test_vllm.py


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with the model, and the address of a server that serves it."""
    pytest.importorskip("vllm", reason="run by `make test-vllm`")
    if torch.cuda.device_count() == 1:
        pytest.skip("a server and a trainer cannot share one GPU: NCCL wants two")
    folder = tmp_path_factory.mktemp("server")
    tiny.model(hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; that command itself stumbles over the CPU build's name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256"]
    command += ["--weight-transfer-config", '{"backend": "nccl"}'] if SYNCED else []
    command += ["--logprobs-mode", "processed_logprobs"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if SYNCED:
        environment["CUDA_VISIBLE_DEVICES"] = "1"
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, process, folder / "server.log")
            yield folder, address
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    """Return when the server answers; fail at once when it has died."""
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"the server is not there: {log.read_text()[-2000:]}")


def test_rollouts_come_over_http_and_the_gap_is_the_policys(server, tmp_path, monkeypatch) -> None:
    folder, address = server
    if not SYNCED:
        from trl.generation.vllm_client import VLLMClient

        monkeypatch.setattr(VLLMClient, "init_communicator", lambda *_, **__: None)
        monkeypatch.setattr(VLLMClient, "update_named_params", lambda *_, **__: None)
    trainer = tiny.trainer(
        tmp_path,
        Qwen3ForCausalLM.from_pretrained(folder),
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=address,
        use_cpu=not torch.cuda.is_available(),
        learning_rate=0.05,
    )
    losses = run_and_capture(trainer)
    assert len(losses) == 2 * 3
    for loss in losses:
        mask = loss["completion_mask"].bool()
        assert torch.equal(loss["student"], loss["old_per_token_logps"])
        assert loss["importance_sampling_ratio"].shape == mask.shape
        assert loss["importance_sampling_ratio"].max() <= 3.0
    history = [row for row in trainer.state.log_history if "loss" in row]
    mismatch = [row["sampling/sampling_logp_difference/mean"] for row in history]
    assert mismatch[0] < SERVED
    for later in mismatch[1:]:
        assert later < SERVED if SYNCED else later > MOVED
