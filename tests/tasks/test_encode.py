"""Models that see images outside of the trainer: encoding, evaluation, the lens, loading."""

import json
from dataclasses import asdict, replace

import pytest
import tiny
import tiny_vlm
import torch

from rlsd_lib.measure import rollouts as lens
from rlsd_lib.measure.evaluate import evaluate, sample
from rlsd_lib.prompts import with_images
from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.encode import encode, messages_of
from rlsd_lib.tasks.models import load_model


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSD_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        return load_task("colours", train_size=12, test_size=12, seed=0, reward="weighted")


@pytest.mark.parametrize("family", tiny_vlm.FAMILIES)
def test_a_batch_says_the_same_as_its_rows_alone(task, family):
    """Left padding, several images and none in one batch: the same last logits."""
    model, processor = tiny_vlm.model(family).eval(), tiny_vlm.processor(family)
    prompts = [messages_of(row) for row in task.train]
    assert len({len(row["images"]) for row in task.train}) == 3
    with torch.no_grad():
        together = model(**encode(processor, prompts)).logits[:, -1]
        alone = [model(**encode(processor, [prompt])).logits[0, -1] for prompt in prompts]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-3, atol=1e-4)


def test_a_row_with_too_few_images_is_named(task):
    row = next(row for row in task.train if len(row["images"]) == 2)
    with pytest.raises(ValueError, match=rf"row {row['key']}.*\(1\).*\(2\).*Write one part"):
        messages_of({**row, "images": row["images"][:1]})


def test_answers_depend_on_the_pixels(task):
    model, processor = tiny_vlm.model().eval(), tiny_vlm.processor()
    row = next(row for row in task.test if row["images"])
    other = [{"images": [tiny_vlm.picture(i)] * len(row["images"])} for i in range(5)]
    asked = [messages_of(row), *(messages_of({**row, **images}) for images in other)]
    answers = sample(model, processor, asked, max_new_tokens=6, temperature=0)
    assert len(set(map(tuple, answers))) > 1


def test_evaluation_shows_every_row_its_images(task):
    model, processor = tiny_vlm.model().eval(), tiny_vlm.processor()
    how = {"max_new_tokens": 4, "num_samples": 2, "seed": 3}
    results = evaluate(model, processor, task, batch_size=5, **how)
    assert len(results) == 2 * len(task.test)
    same = evaluate(model, processor, task, batch_size=5, **how)
    assert results["completion"].tolist() == same["completion"].tolist()
    template = "{prompt}|{privileged_context}"
    seen = evaluate(model, processor, tiny.as_teacher(task, template), batch_size=5, **how)
    assert seen["completion"].tolist() != results["completion"].tolist()


@pytest.mark.parametrize("family", tiny_vlm.FAMILIES)
def test_the_lens_sees_no_gap_where_both_read_the_same(task, family, tmp_path):
    model, processor = tiny_vlm.model(family).eval(), tiny_vlm.processor(family)
    row = next(row for row in task.test if len(row["images"]) == 2)
    config = tiny.config(
        tmp_path,
        num_generations=2,
        max_completion_length=5,
        privileged_template="{prompt}{privileged_context}",
    )
    for context in ("", row["privileged_context"]):
        shown = replace(task, test=[{**row, "privileged_context": context}])
        rollouts = lens.look(model, processor, shown, 0, config)
        assert all(any(rollout.gap) == bool(context) for rollout in rollouts)
    json.dumps([asdict(rollout) for rollout in rollouts])
    kinds = [part["type"] for part in rollouts[0].teacher_prompt[0]["content"]]
    assert kinds.count("image") == 2


def test_text_models_are_encoded_as_before():
    tokenizer, prompt = tiny.tokenizer(), [{"role": "user", "content": "1+1"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    encoded = encode(tokenizer, [prompt])
    assert encoded["input_ids"].tolist() == [ids["input_ids"]]
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encode(tokenizer, ["1+1", "2"])["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_images_leave_the_prompt_or_only_their_pixels_do():
    parts = [{"type": "image", "image": object()}, {"type": "text", "text": "a"}]
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    assert with_images(prompt, [])[1]["content"] == [parts[1]]
    bare = [{"type": "image"}]
    assert with_images(prompt, bare)[1]["content"] == [*bare, parts[1]]
    assert with_images("text", bare) == "text"
    assert parts[0]["image"] is not None


def test_a_folder_is_loaded_with_its_processor(tmp_path):
    """Of the three families the one whose processor needs no torchvision to be loaded."""
    tiny_vlm.model("gemma3").save_pretrained(tmp_path / "m")
    tiny_vlm.processor("gemma3").save_pretrained(tmp_path / "m")
    model, processor = load_model(str(tmp_path / "m"), tmp_path, sees_images=True)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert (model.dtype, model.training) == (torch.float32, False)
    assert processor.tokenizer.padding_side == "left"
    assert type(processor).__name__ == "Gemma3Processor"
