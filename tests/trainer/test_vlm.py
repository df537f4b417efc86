"""Images (trap 16): the teacher sees the student's, in the same places, and reads more text."""

import pytest
import tiny
import tiny_vlm
import torch
from peft import LoraConfig, get_peft_model
from test_trainer import run_and_capture
from trl.data_utils import prepare_multimodal_messages

from rlsd_lib import RLSDTrainer
from rlsd_lib.prompts import check_contexts
from rlsd_lib.trainer.checks import check_images
from rlsd_lib.trainer.states import IMAGE_FIELDS, TYPE_ID_FIELDS
from rlsd_lib.trainer.upstream import drop_empty_images

ONE = [1] * 8
SEVERAL = [1, 2, 3, 1, 2, 1, 1, 2]
# Taken in order, two rows a step: the second step has no image at all.
TEXT_STEP = [1, 2, 0, 0]
MIXED = [1, 0, 2, 0, 3, 1, 0, 1]
# One row in a micro-batch, so that some have no image while their batch has.
ALONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_generations": 4}
NULL = {"privileged_template": "{prompt}{privileged_context}"}


@pytest.mark.parametrize("family", tiny_vlm.FAMILIES)
def test_every_part_of_the_model_learns(tmp_path, family):
    """Two steps over rows with one image, several and none; vision, projector and language move."""
    data = tiny_vlm.dataset(MIXED)
    trainer = tiny_vlm.trainer(tmp_path, data, family=family, max_steps=2, learning_rate=0.1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    stuck = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
    assert not stuck
    assert len(before) > 50
    assert trainer.state.log_history[0]["rlsd/gap_abs_mean"] > 0.1


def reference_scores(trainer: RLSDTrainer, data, micro: dict, row: int) -> tuple:
    """log P_T of one rollout, alone: family's processor, plain forward, no padding, no fused head."""
    tokenizer = trainer._tokenizer
    prompt = tokenizer.decode(micro["prompt_ids"][row], skip_special_tokens=True).strip()
    source = data[int(prompt.removesuffix("?"))]
    turn = f"{source['prompt'][0]['content']}|{source['privileged_context']}"
    message = prepare_multimodal_messages(
        [{"role": "user", "content": turn}], images=source["images"]
    )
    inputs = trainer.processing_class.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = int(micro["completion_mask"][row].sum())
    completion = micro["completion_ids"][row, :length][None]
    types = {
        name: torch.cat([inputs[name], torch.zeros_like(completion)], dim=1)
        for name in TYPE_ID_FIELDS
        if name in inputs
    }
    logits = trainer.teacher.model(
        **{k: v for k, v in inputs.items() if k in IMAGE_FIELDS},
        **types,
        input_ids=torch.cat([inputs["input_ids"], completion], dim=1),
    ).logits[0, -length - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, completion[0][:, None])[:, 0]
    return wanted, micro["teacher_per_token_logps"][row, :length]


SCORED = {
    "one": ("qwen3-vl", ONE, {}),
    "several": ("qwen3-vl", SEVERAL, {}),
    "text step": ("qwen3-vl", TEXT_STEP, {}),
    "mixed, Qwen3-VL": ("qwen3-vl", MIXED, ALONE),
    "mixed, Qwen2.5-VL": ("qwen2.5-vl", MIXED, ALONE),
    "mixed, Gemma 3": ("gemma3", MIXED, ALONE),
}


@pytest.mark.parametrize("case", SCORED)
def test_trap_16_every_rollout_is_scored_with_its_own_images(tmp_path, case):
    """After TRL's shuffle and split, against the model's plain forward on one row at a time."""
    family, counts, settings = SCORED[case]
    data = tiny_vlm.dataset(counts)
    settings = {"max_steps": 2, "teacher_model_kind": "base", "shuffle_dataset": False, **settings}
    trainer = tiny_vlm.trainer(tmp_path, data, family=family, **settings)
    seen = run_and_capture(trainer)
    if counts == MIXED:
        assert {micro["pixel_values"].size(0) == 0 for micro in seen} == {True, False}
    else:
        assert ["pixel_values" in micro for micro in seen] == [True] * 2 + [counts[2] > 0] * 2
    for micro in seen:
        for row in range(len(micro["prompt_ids"])):
            with torch.no_grad():
                wanted, scored = reference_scores(trainer, data, micro, row)
            torch.testing.assert_close(scored, wanted, rtol=1e-4, atol=1e-4)


OF_FAMILY = {  # fields of the images, and of the type ids
    "qwen3-vl": (["pixel_values", "image_grid_thw", "num_images"], "mm_token_type_ids"),
    "qwen2.5-vl": (["pixel_values", "image_grid_thw", "num_images"], "mm_token_type_ids"),
    "gemma3": (["pixel_values", "num_images"], "token_type_ids"),
}


@pytest.mark.parametrize("family", tiny_vlm.FAMILIES)
def test_trap_16_same_pixels_and_type_ids_of_the_longer_prompt(tmp_path, family):
    data = tiny_vlm.dataset(SEVERAL)
    trainer = tiny_vlm.trainer(tmp_path, data, family=family, max_steps=1, teacher_pass="plain")
    outputs, calls = [], []
    score, forward = trainer.teacher_scores, trainer._get_per_token_logps_and_entropies

    def score_spy(prompts, contexts, output, **kwargs):
        outputs.append(output)
        return score(prompts, contexts, output, **kwargs)

    def forward_spy(model, ids, *args, **kwargs):
        if model is trainer.teacher.model:
            calls.append((ids, kwargs))
        return forward(model, ids, *args, **kwargs)

    trainer.teacher_scores = score_spy
    trainer._get_per_token_logps_and_entropies = forward_spy
    trainer.train()
    (output,), ((ids, seen),) = outputs, calls
    fields, types = OF_FAMILY[family]
    assert [name for name in IMAGE_FIELDS if name in output] == fields
    assert all(seen[name] is output[name] for name in fields)
    # The prompt grew by the reference, and the image tokens moved with it.
    length = output["completion_ids"].size(1)
    assert ids.size(1) - length > output["prompt_ids"].size(1)
    image_token = trainer.model.config.image_token_id
    assert (seen[types].bool() | (ids != image_token))[:, :-length].all()
    assert (seen[types].sum(1) == output[types].sum(1)).all()
    assert seen[types].sum() > 0


def test_trap_16_type_ids_of_images_that_tools_sent_are_kept(tmp_path):
    """TRL marks images inside completions, and unmarks all where it had to drop them."""
    trainer = tiny_vlm.trainer(tmp_path, tiny_vlm.dataset(ONE), max_steps=1)
    outputs, prompts = [], []
    score = trainer.teacher_scores

    def spy(given, contexts, output, **kwargs):
        outputs.append(output)
        prompts.append(given)
        return score(given, contexts, output, **kwargs)

    trainer.teacher_scores = spy
    trainer.train()
    output, given = outputs[0], prompts[0]
    length = output["completion_ids"].size(1)
    marked = output["mm_token_type_ids"].clone()
    marked[:, -2] = 1
    output = {**output, "mm_token_type_ids": marked}
    kept = trainer.teacher_prompts(given, ["hint"] * len(given), output).type_ids
    assert torch.equal(kept["mm_token_type_ids"][:, -length:], marked[:, -length:])
    assert (kept["mm_token_type_ids"][:, :-length].sum(1) > 0).all()
    output["mm_token_type_ids"] = torch.zeros_like(marked)
    del output["pixel_values"]
    dropped = trainer.teacher_prompts(given, ["hint"] * len(given), output).type_ids
    assert dropped["mm_token_type_ids"].sum() == 0


def lora_student():
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "qkv", "down_proj"])
    return get_peft_model(tiny_vlm.model(), config)


CASES = {
    "mixed, Qwen3-VL": (MIXED, ALONE),
    "mixed, Qwen2.5-VL": (MIXED, {"family": "qwen2.5-vl", **ALONE}),
    "mixed, Gemma 3": (MIXED, {"family": "gemma3", **ALONE}),
    "one image": (ONE, {}),
    "several images": (SEVERAL, {}),
    "text step": (TEXT_STEP, {"shuffle_dataset": False, "max_steps": 2, "learning_rate": 0.0}),
    "live": (SEVERAL, {"teacher_model_kind": "live"}),
    "lora": (SEVERAL, {}),
    "reused rollouts": (SEVERAL, {"num_iterations": 2}),
    "large generation batch": (SEVERAL, {"steps_per_generation": 4}),
    "padded widths": (SEVERAL, {"pad_to_multiple_of": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_null_gap_is_exactly_zero_with_images(tmp_path, case):
    counts, settings = CASES[case]
    data = tiny_vlm.dataset(counts, privileged_context=[""] * len(counts))
    student = lora_student() if case == "lora" else None
    trainer = tiny_vlm.trainer(tmp_path, data, student, **{"max_steps": 1, **NULL, **settings})
    seen = run_and_capture(trainer)
    gaps = [m["teacher_per_token_logps"] - m["student"] for m in seen]
    masks = [m["completion_mask"].bool() for m in seen]
    assert sum(mask.sum() for mask in masks) > 0
    assert all((gap[mask] == 0).all() for gap, mask in zip(gaps, masks, strict=True))


def test_full_vocabulary_divergence_with_images(tmp_path):
    """Null: no divergence between equal models; with a reference there is one, and it trains."""
    for context, apart in (("", False), ("the answer is seven", True)):
        data = tiny_vlm.dataset(SEVERAL, privileged_context=[context] * 8)
        trainer = tiny_vlm.trainer(tmp_path, data, method="opsd", max_steps=1, **NULL)
        trainer.train()
        logged = trainer.state.log_history[0]["rlsd/divergence"]
        assert logged > 0.01 if apart else abs(logged) < 1e-6


def test_another_model_teaches_on_rows_with_and_without_images(tmp_path):
    settings = {"method": "opd", "max_steps": 1, "shuffle_dataset": False, **ALONE}
    more = {"teacher_model": tiny_vlm.model(seed=1)}
    trainer = tiny_vlm.trainer(tmp_path, tiny_vlm.dataset(MIXED), more=more, **settings)
    seen = run_and_capture(trainer)
    assert {micro["pixel_values"].size(0) == 0 for micro in seen} == {True, False}
    assert trainer.state.log_history[0]["rlsd/divergence"] > 0.01


def test_trap_16_a_placeholder_in_the_reference_is_refused(tmp_path):
    contexts = ["fine"] * 7 + ["see <|image_pad|>"]
    with pytest.raises(ValueError, match=r"image placeholder in privileged_context \(rows 7\)"):
        tiny_vlm.trainer(
            tmp_path, tiny_vlm.dataset(ONE, privileged_context=contexts), "no/such-model"
        )


def test_trap_16_the_placeholders_of_every_family_are_known():
    """Whatever a family's processor would replace by an image or a video, in its own words."""
    for family in tiny_vlm.FAMILIES:
        made = tiny_vlm.processor(family)
        tokens = {getattr(made, f"{kind}_token", None) for kind in ("image", "video", "boi")}
        tokens.add(made.tokenizer.convert_ids_to_tokens(made.image_token_id))
        assert len(tokens - {None}) >= 1, family
        for token in tokens - {None}:
            with pytest.raises(ValueError, match="image placeholder"):
                check_contexts([f"see {token}"], "{prompt}|{privileged_context}")


def test_mixed_rows_are_refused_where_parameters_are_sharded(tmp_path):
    class Sharded:
        distributed_type = "FSDP"
        is_fsdp2 = True
        state = type("State", (), {"deepspeed_plugin": None})

    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    text = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=r"1 of 2 prompts in a batch have no image.*wait"):
        check_images([image, text], Sharded)
    check_images([image, image], Sharded)
    check_images([text, text], Sharded)


def test_videos_are_refused_before_the_model_is_loaded(tmp_path):
    parts = [{"type": "video", "text": None}, {"type": "text", "text": "What happens?"}]
    turn = [[{"role": "user", "content": parts}]] * 8
    data = tiny_vlm.dataset([0] * 8, prompt=turn)
    with pytest.raises(ValueError, match=r"8 dataset rows hold a video \(rows 0, 1"):
        tiny_vlm.trainer(tmp_path, data, "no/such-model")
    data = tiny_vlm.dataset(ONE, videos=[[]] * 7 + [["clip.mp4"]])
    with pytest.raises(ValueError, match=r"1 dataset rows hold a video \(rows 7\)"):
        tiny_vlm.trainer(tmp_path, data, "no/such-model", method="grpo")
    tiny_vlm.trainer(tmp_path, tiny_vlm.dataset(ONE, videos=[[]] * 8))


def test_only_empty_pixels_are_dropped():
    class Model(torch.nn.Module):
        def forward(self, **given):
            return given

    model = Model()
    drop_empty_images(model)
    full = {"pixel_values": torch.ones(2, 3), "image_grid_thw": torch.ones(1, 3), "input_ids": 1}
    assert set(model(**full)) == set(full)
    assert set(model(**{**full, "pixel_values": torch.ones(0, 3)})) == {"input_ids"}


def test_trap_13_a_processor_that_pads_right_is_refused(tmp_path):
    def build(side, **overrides):
        return RLSDTrainer(
            tiny_vlm.model(),
            tiny.reward,
            tiny.config(tmp_path, **overrides),
            tiny_vlm.dataset(ONE),
            processing_class=tiny_vlm.processor(padding_side=side),
        )

    with pytest.raises(ValueError, match=r"processor pads 'right'.*padding_side='left'"):
        build("right")
    build("left")
    # Without a teacher it is TRL's own affair.
    build("right", method="grpo")


def test_trap_15_the_limit_counts_image_tokens_and_cuts_text_only(tmp_path):
    data = tiny_vlm.dataset(SEVERAL, privileged_context=["x" * 60] * 8)
    trainer = tiny_vlm.trainer(tmp_path, data, max_steps=2, max_teacher_prompt_length=40)
    widths, types = [], []
    prompts_of = trainer.teacher_prompts

    def spy(*args):
        seen = prompts_of(*args)
        widths.append(seen.ids.size(1))
        types.append((seen.type_ids["mm_token_type_ids"] == 1).sum())
        return seen

    trainer.teacher_prompts = spy
    trainer.train()
    assert max(widths) == 40
    assert trainer.state.log_history[0]["rlsd/context_shortened_frac"] == 1.0
    assert all(count > 0 for count in types)
