"""Generation from the model's own distribution, whatever settings it was published with.

transformers fills what a caller of `generate` leaves open from `model.generation_config`; what is
measured must not depend on it. These are arguments of `generate`, where alone None is neutral.
"""

from typing import Any

# Read when sampling; a greedy call would warn of them.
WARPERS = {
    "top_k": 0,
    "top_p": 1.0,
    "top_h": None,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
# Read by every call.
PROCESSORS = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "watermarking_config": None,
    # Other ways to search, stop and answer.
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "stop_strings": None,
    "max_time": None,
    "return_dict_in_generate": False,
}


def undistorted(temperature: float) -> dict[str, Any]:
    """Arguments of `generate` that sample at `temperature` and change nothing else; 0 is greedy."""
    if temperature == 0:
        return {**PROCESSORS, "do_sample": False}
    return {**WARPERS, **PROCESSORS, "do_sample": True, "temperature": temperature}
