"""Toy models of many families: the null gap is exactly 0, and shared prompts change nothing."""

from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlsd_lib.trainer import shared_prompts

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
# By model type, what its configuration needs beside `SIZES`.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "mixtral": MOE,
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 8},
    "gemma": {},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "bloom": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "stablelm": {},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "granite": {},
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "smollm3": {},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32},
    "qwen3_moe": MOE,
    "glm": {},
    "helium": {},
    "exaone4": {"sliding_window": 8},
    "gpt_bigcode": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
# Experts take their tokens of a whole batch together, and a product rounds by how many there are.
ROUNDED = {"mixtral": 1e-6}
QUICK = 3  # of them, in `make test`


def toy(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    words = len(tiny.tokenizer())
    config = AutoConfig.for_model(family, **SIZES, vocab_size=words, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] * (i >= QUICK)) for i, f in enumerate(FAMILIES)],
)
def test_a_family_has_no_gap_of_its_own(tmp_path, family: str) -> None:
    """Without a reference the teacher is the student, to the bit; with one, both passes agree."""
    settings = {"max_steps": 1, "teacher_model_kind": "live"}
    settings |= {"privileged_template": "{prompt}{privileged_context}"}
    null = tiny.trainer(
        tmp_path, toy(family), tiny.dataset(privileged_context=[""] * 32), **settings
    )
    null.train()
    assert null.state.log_history[0]["rlsd/gap_abs_mean"] <= ROUNDED.get(family, 0.0)
    found: dict[str, torch.Tensor] = {}
    for teacher_pass in ("plain", "shared"):
        settings |= {"privileged_template": "{prompt}|{privileged_context}"}
        trainer = tiny.trainer(tmp_path, toy(family), **settings, teacher_pass="plain")
        if teacher_pass == "shared":
            if shared_prompts.why_not(trainer.model, trainer.accelerator) is not None:
                return  # refused by name, and "auto" takes the plain pass
            trainer.args.teacher_pass = "shared"
        score = trainer.teacher_scores

        def scored(*given, score=score, name=teacher_pass):
            result = score(*given)
            found[name] = result.logps
            return result

        trainer.teacher_scores = scored
        trainer.train()
    torch.testing.assert_close(found["shared"], found["plain"], atol=1e-4, rtol=0)
