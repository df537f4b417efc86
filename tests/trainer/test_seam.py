"""The seam to TRL: what is overridden, called and read, so that a new TRL fails here, in one place."""

import inspect
import itertools
import re
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import tiny
from packaging.version import Version
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from rlsd_lib import RLSDTrainer
from rlsd_lib.experiment import workbook_trainer
from rlsd_lib.trainer import sharded, upstream

HOMES = (upstream, sharded, workbook_trainer)  # of the workarounds

# What our own classes define between RLSDTrainer and TRL's.
BEFORE_TRL = itertools.takewhile(lambda cls: cls is not GRPOTrainer, RLSDTrainer.__mro__)
OVERRIDDEN = {name for cls in BEFORE_TRL for name in vars(cls)}
# Methods of the parent that we override (o) or call (c), with the names of their arguments.
METHODS = {
    "o training_step": "model, inputs, num_items_in_batch",
    "o train": "resume_from_checkpoint, trial, ignore_keys_for_eval",
    "o _generate": "prompts",
    "o _calculate_rewards": "inputs, prompts, completions, completion_ids_list",
    "o _generate_and_score_completions": "inputs",
    "o _compute_loss": "model, inputs",
    "o _get_per_token_logps_and_entropies": (
        "model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, "
        "compute_aux_loss, pixel_values, image_grid_thw, num_images, pixel_attention_mask, "
        "spatial_shapes, num_tiles, image_sizes, token_type_ids, mm_token_type_ids, "
        "image_position_ids"
    ),
    "o _get_train_sampler": "dataset",
    "o _run_epoch": (
        "model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, "
        "steps_trained_in_current_epoch"
    ),
    "o _get_grad_norm": "model, grad_norm",
    "o _save_checkpoint": "model, trial",
    "o _save": "output_dir, state_dict",
    "o _push_from_checkpoint": "checkpoint_folder",
    "o _load_from_checkpoint": "resume_from_checkpoint, model",
    "c _tokenize_prompts": "prompts",
    "c _get_output_dir": "trial",
    "o create_model_card": "model_name, dataset_name, tags",
    "c add_callback": "callback",
}
# The last statement of methods whose result we take apart.
RETURNS = {
    "_generate": (
        "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, "
        "images, tool_images"
    ),
    "_tokenize_prompts": "return prompt_ids, images, multimodal_fields",
    "_get_per_token_logps_and_entropies": "return logps, entropies, aux_loss",
    "_calculate_rewards": "return rewards_per_func",
}
# Keys of the dictionary of a generation batch: TRL's that we read, and ours, which TRL may not take.
READ = [
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "advantages",
    "num_items_in_batch",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "tool_mask",
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "image_position_ids",
    "token_type_ids",
    "mm_token_type_ids",
]
OURS = ["teacher_per_token_logps", "teacher_hidden", "has_demonstration", "rewards", "entropy"]
OURS += ["wrong_logps", "weight"]
# Attributes that the parent sets.
ATTRIBUTES = [
    "_buffered_inputs",
    "_step",
    "_metrics",
    "_tokenizer",
    "_is_vlm",
    "num_iterations",
    "num_generations",
    "temperature",
    "use_vllm",
    "vllm_mode",
    "vllm_generation",
    "environment_factories",
    "reward_weights",
    "reward_func_names",
    "pad_to_multiple_of",
    "vllm_importance_sampling_correction",
]


def test_methods_have_the_signatures_that_we_override_and_call() -> None:
    found = {}
    for name in METHODS:
        method = getattr(GRPOTrainer, name[2:])
        found[name] = ", ".join(list(inspect.signature(method).parameters)[1:])
        assert (name[2:] in OVERRIDDEN) == (name[0] == "o"), name
    assert found == METHODS


def test_nothing_else_of_the_parent_is_overridden() -> None:
    overridden = {name for name in OVERRIDDEN if callable(getattr(GRPOTrainer, name, None))}
    stated = {name[2:] for name in METHODS if name[0] == "o"}
    assert {name for name in overridden if not name.startswith("__")} == stated


def test_results_that_we_take_apart_have_their_parts() -> None:
    for name, last in RETURNS.items():
        source = inspect.getsource(getattr(GRPOTrainer, name)).rstrip().splitlines()
        assert source[-1].strip() == last, name


def test_the_dictionary_has_the_keys_that_we_read_and_none_of_ours() -> None:
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    output = source[source.index("        output = {") :]
    written = set(re.findall(r'output\["(\w+)"\]|^            "(\w+)": ', output, re.MULTILINE))
    keys = {first or second for first, second in written}
    assert set(READ) <= keys
    assert not keys & set(OURS)


def test_the_parent_sets_the_attributes_that_we_read() -> None:
    source = inspect.getsource(grpo_trainer)
    assert [name for name in ATTRIBUTES if f"self.{name} = " not in source] == []


def test_the_constructor_is_grpos_with_three_keywords_more(tmp_path, monkeypatch) -> None:
    theirs = inspect.signature(GRPOTrainer.__init__)
    ours = inspect.signature(RLSDTrainer.__init__).parameters
    assert list(ours) == [*theirs.parameters, "teacher_model", "credit", "signals"]
    for name, parameter in theirs.parameters.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
    for name in ("teacher_model", "credit", "signals"):
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY and ours[name].default is None

    def given_to_grpo(*given, **keywords):
        raise KeyError(theirs.bind(*given, **keywords).arguments)

    monkeypatch.setattr(GRPOTrainer, "__init__", given_to_grpo)
    values = {name: name for name in theirs.parameters if name != "self"}
    values |= {"args": tiny.config(tmp_path, method="grpo"), "train_dataset": tiny.dataset()}
    for count in (1, 4, 5, len(values)):  # given by position, the others by keyword
        by_position, by_keyword = list(values.values())[:count], list(values.items())[count:]
        with pytest.raises(KeyError) as reached:
            RLSDTrainer(*by_position, **dict(by_keyword))
        arguments = reached.value.args[0]
        assert isinstance(arguments.pop("self"), RLSDTrainer)
        assert arguments == values


def outdated(installed: dict[str, str]) -> list[upstream.Note]:
    """Workarounds whose library is newer than their note."""
    return [
        note
        for note in upstream.NOTES
        if note.library in installed
        and Version(installed[note.library]).release > Version(note.version).release
    ]


def test_every_workaround_was_looked_at_for_the_installed_version() -> None:
    libraries = {note.library for note in upstream.NOTES}
    assert libraries == {"trl", "transformers", "accelerate", "torch", "deepspeed"}
    here = libraries if find_spec("deepspeed") else libraries - {"deepspeed"}
    installed = {name: version(name) for name in here}
    assert outdated(installed) == [], "read the place that the note names, then renew or delete it"
    assert len(outdated({**installed, "trl": "1.17.0"})) >= 5


def test_a_workaround_says_what_it_mends() -> None:
    for note in upstream.NOTES:
        assert re.match(r"https://github.com/.+/\d+$|[\w/]+\.py, \w+", note.where), note
        (home,) = (module for module in HOMES if hasattr(module, note.workaround))
        assert getattr(home, note.workaround).__doc__, note


@pytest.mark.parametrize("name", ["_generate", "_tokenize_prompts"])
def test_the_seam_fails_where_trl_changes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The table is not vacuous: a changed method is found."""

    def changed(self, prompts, more):
        return prompts, more

    monkeypatch.setattr(GRPOTrainer, name, changed)
    with pytest.raises(AssertionError):
        test_methods_have_the_signatures_that_we_override_and_call()
    with pytest.raises(AssertionError):
        test_results_that_we_take_apart_have_their_parts()
