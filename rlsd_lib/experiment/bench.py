"""`rlsd bench`: what a step of each trainer costs beside GRPO's, measured.

Trainers, TRL's own among them, take turns. All train on the same rollouts, those of each step
generated once, and at a learning rate of 0, so that they differ only in what they compute from them.
The task is a preset's, or a random Qwen3 reads prompts and writes completions of exact length;
nothing is downloaded.
"""

import contextlib
import copy
import gc
import os
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Annotated, Any
from unittest.mock import Mock

import pandas as pd
import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rlsd_lib.experiment.experiment import Experiment
from rlsd_lib.experiment.plan import GIB, MEASURED, NO_TEACHER, RESERVED, Plan, shape_of
from rlsd_lib.experiment.presets import OUR_WEIGHT
from rlsd_lib.methods import METHODS, PROMPT, Method, from_caller
from rlsd_lib.names import check_fields, look_up
from rlsd_lib.report.plots import costs
from rlsd_lib.tasks.encode import word_tokenizer
from rlsd_lib.tasks.models import config_named
from rlsd_lib.trainer.config import RLSDConfig
from rlsd_lib.trainer.trainer import RLSDTrainer

BASE = "GRPO"
SYNTHETIC = "synthetic"  # a model in `SHAPES` that is nobody's
STILL = {"learning_rate": 0.0, "save_strategy": "no"}
SPECIAL = ("<pad>", "</s>", "<unk>")
Build = Callable[[str, Path, int], Trainer]  # contender, folder, number of steps -> its trainer
Rollouts = dict[int, tuple[float, list]]  # seconds and ids, by the number of the step
# Trainer, configuration, what its plan changes of RLSD's (None: no plan).
Contender = tuple[type[Trainer], Callable[..., Any], dict[str, Any] | None]
Turn = tuple[list[dict[str, float]], Rollouts]  # of each timed step seconds by part, peak MiB
STEP, GENERATION, REST = "step, s", "generation, s", "without generation, s"
TEACHER, PEAK = "teacher pass, s", "peak MiB"
RATIOS = {STEP: "step / GRPO", REST: "without generation / GRPO", PEAK: "peak MiB / GRPO"}
MIB = 2**20
LORA = ", LoRA"  # ends the name of a contender that trains an adapter
# Settings without which a row of the methods table does not run, or not with all that it computes.
NEEDS = OUR_WEIGHT | {"sdpg": {"beta": 1e-3}, "sdpo": {"success_reward_threshold": 0.5}}
Whole = Annotated[int, lambda n: isinstance(n, int) and n >= 1, "a whole number >= 1"]
Group = Annotated[int, lambda n: isinstance(n, int) and n >= 2, "2 or more, a group"]


def contenders(*rows: str) -> dict[str, Contender]:
    """By name, `rows` of the methods table last. TRL's SDPO sees the same teacher prompt as ours."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    template = "{prompt} {privileged_context}"
    ours = partial(RLSDConfig, privileged_template=template, lambda_decay_steps=0)
    headed = partial(ours, method="grpo", completion_head=True)
    plain = partial(ours, teacher_pass="plain")
    # Feedback instead of a demonstration, so that the teacher's prompt is as long as RLSD's.
    seen = {"reprompt_template": "{prompt}{solution}{feedback}", "max_prompt_length": None}
    seen |= {"feedback_template": " {feedback_raw}", "include_environment_feedback": True}
    theirs = partial(SDPOConfig, **seen, success_reward_threshold=2.0)
    alone, lora = {"teacher_model_kind": NO_TEACHER}, {"lora_rank": LoraConfig().r}
    return {
        BASE: (GRPOTrainer, GRPOConfig, alone),
        "GRPO, completion head": (RLSDTrainer, headed, alone),
        "RLSD": (RLSDTrainer, ours, {}),
        "RLSD, plain pass": (RLSDTrainer, plain, {"num_generations": 1}),  # no prompt is shared
        "OPSD": (RLSDTrainer, partial(ours, method="opsd"), None),
        BASE + LORA: (GRPOTrainer, GRPOConfig, alone | lora),
        "RLSD" + LORA: (RLSDTrainer, ours, lora),
        "TRL SDPO": (SDPOTrainer, theirs, None),
        **{n: (RLSDTrainer, partial(ours, method=n, **NEEDS.get(n, {})), None) for n in rows},
    }


@dataclass(frozen=True)
class Sizes:
    """A random Qwen3 on prompts and completions of exact length, in tokens; a group is a step.

    Models of real size are in bf16, with gradient checkpointing, and read two rollouts at a time.
    Raises ValueError for a size that cannot be.
    """

    prompt: Whole = 1024
    completion: Whole = 256
    generations: Group = 8
    vocabulary: Whole = 4096
    reference: Whole = 64
    model: str = SYNTHETIC

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, name: str, folder: Path, steps: int) -> Trainer:
        """The trainer of a contender, for `steps` steps of a group each; ValueError for a wrong name."""
        table = contenders(*METHODS)
        trainer, configure, _ = table[look_up(name, table, "contender")]
        plan, on_gpu = self.plan, torch.cuda.is_available()
        config = configure(
            output_dir=str(folder),
            max_steps=steps,
            num_generations=self.generations,
            max_completion_length=self.completion,
            per_device_train_batch_size=plan.per_device_train_batch_size,
            gradient_accumulation_steps=self.generations // plan.per_device_train_batch_size,
            gradient_checkpointing=plan.gradient_checkpointing,
            # No end of sequence before the last token: completions of one length are equal work.
            generation_kwargs={"min_new_tokens": self.completion},
            shuffle_dataset=False,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            disable_tqdm=True,
            **STILL,
        )
        # Always the same weights.
        with torch.random.fork_rng(), torch.device("cuda" if on_gpu else "cpu"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(self.config(), dtype=plan.dtype)
        # One token per word: a text of n words is n tokens.
        words = [*SPECIAL, *(f"w{i}" for i in range(model.config.vocab_size - len(SPECIAL)))]
        if config.beta or not issubclass(trainer, GRPOTrainer):
            # TRL loads a reference model, and its self-distiller a teacher, from where it came from.
            model.save_pretrained(folder / "model")
            model.config._name_or_path = str(folder / "model")
        return trainer(
            model=model,
            reward_funcs=_reward,
            args=config,
            train_dataset=self.make_rows(steps),
            processing_class=word_tokenizer(words, WhitespaceSplit()),
            peft_config=LoraConfig(task_type="CAUSAL_LM") if name.endswith(LORA) else None,
            **(_from_outside(METHODS[name], model) if name in METHODS else {}),
        )

    def config(self) -> Any:
        """The transformers config of the model."""
        config = config_named(self.model)
        if self.model == SYNTHETIC:
            config.vocab_size = self.vocabulary + len(SPECIAL)
        config.pad_token_id, config.eos_token_id = 0, 1
        return config

    @property
    def plan(self) -> Plan:
        """RLSD on these sizes, as `rlsd plan` describes it."""
        rows, how = 2, {"dtype": "bfloat16"}
        if self.model == SYNTHETIC:
            rows, how = self.generations, {"gradient_checkpointing": False}
        group, work = self.generations, (self.prompt, self.completion)
        return Plan(shape_of(self.config()), 1, *work, group, group, rows, self.reference, **how)

    def make_rows(self, count: int) -> Dataset:
        """`count` prompts and references of exact length, in `vocabulary` words."""
        draw = partial(Random(0).choices, [f"w{i}" for i in range(self.vocabulary)])
        lengths = {"prompt": self.prompt, "privileged_context": self.reference}
        rows = [{k: " ".join(draw(k=n)) for k, n in lengths.items()} for _ in range(count)]
        return Dataset.from_list(rows)


def _from_outside(row: Method, model: Any) -> dict[str, Any]:
    """What a row needs of its caller: another model, or signals, which here mean nothing."""
    names, ends = from_caller(row.credit), ("first_error", "success_before")

    def signals(_: Any, __: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: mask[:, 0] if name in ends else mask for name in names}

    other = copy.deepcopy(model) if row.teacher_sees == PROMPT else None
    return {"teacher_model": other, "signals": signals if names else None}


def _reward(completions: list[str], **_: Any) -> list[float]:
    """Differs within a group, and depends on nothing but the text."""
    return [zlib.crc32(text.encode()) % 7 / 7 for text in completions]


def preset_trainer(preset: str, name: str, folder: Path, steps: int) -> Trainer:
    """The trainer of a run of "GRPO" or "RLSD"; ValueError for an unknown preset."""
    how = {
        "overrides": STILL | {"lambda_decay_steps": 0},
        "max_steps": steps,
        "run_dir": str(folder / "run"),
    }
    return Experiment(method=name.lower(), preset=preset, **how).trainer()


class Clock(TrainerCallback):
    """Seconds of each optimiser step without its generation, of generation and of the teacher pass.

    `rollouts` that are absent are generated and added; the first step, to warm up, has the second's.
    """

    def __init__(self, trainer: Any, rollouts: Rollouts) -> None:
        self.steps: list[dict[str, float]] = []
        self.rollouts = rollouts
        # The narrowest function of TRL's that returns completions: of one turn, and of SDPO's.
        if isinstance(trainer, GRPOTrainer):
            turn = trainer._generate_single_turn
            trainer._generate_single_turn = lambda *a: (self._rollouts(lambda: turn(*a)[0]), None)
        else:
            made = trainer._generate
            trainer._generate = lambda ids: (ids, self._rollouts(lambda: made(ids)[1]))
        if isinstance(trainer, RLSDTrainer):
            score = trainer.teacher_scores
            trainer.teacher_scores = lambda *a, **k: self._teacher(lambda: score(*a, **k))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append({REST: -now()})

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps[-1][REST] += now()

    def _teacher(self, score: Callable[[], Any]) -> Any:
        seconds, scores = timed(score)
        self.steps[-1][TEACHER] = self.steps[-1].get(TEACHER, 0.0) + seconds
        return scores

    def _rollouts(self, generate: Callable[[], list]) -> list:
        step, number = self.steps[-1], max(len(self.steps), 2)
        if number not in self.rollouts:
            torch.manual_seed(number)
            self.rollouts[number] = timed(generate)
            step[REST] -= self.rollouts[number][0]
        step[GENERATION], ids = self.rollouts[number]
        return copy.deepcopy(ids)


def train(build: Build, name: str, steps: int, rollouts: Rollouts) -> Turn:
    """Train one step to warm up and `steps` more, on `rollouts` where they are given, see `Clock`.

    The peak is the device's; without a GPU it is this process's. Neither counts what was held before.
    """
    contenders()  # the imports
    gc.collect()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(name, Path(folder), steps + 1)
        clock = Clock(trainer, rollouts)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    unit = 1 if sys.platform == "darwin" else 2**10
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = torch.cuda.max_memory_allocated() if on_gpu else own
    return [{**step, PEAK: (peak - before) / MIB} for step in clock.steps[1:]], clock.rollouts


def train_apart(*turn: Any) -> Turn:
    """`train` in a process of its own, whose peak is of no other trainer; a GPU's can be reset."""
    if torch.cuda.is_available():
        return train(*turn)
    # It has only imported this file. A spawned process would begin with the peak of its parent.
    server = get_context("forkserver")
    server.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=server) as pool:
        return pool.submit(train, *turn).result()


def now() -> float:
    """Seconds of the wall's clock; of the processor, which others disturb least, for one thread."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that `run` takes, and what it returns."""
    begun = now()
    result = run()
    return now() - begun, result


def race(build: Build, names: Sequence[str], steps: int = 3, rounds: int = 1) -> pd.DataFrame:
    """A row for each trainer, GRPO first: medians over all steps, peak memory, both over GRPO's.

    They take turns, `rounds` times, each on the same rollouts. NaN where device memory did not do.
    """
    found, rollouts = [], [Rollouts() for _ in range(rounds)]
    turns = tqdm([*product(range(rounds), (BASE, *names))], unit="turn", disable=None)
    for number, name in turns:
        turns.set_description(name)  # on a terminal alone
        with contextlib.suppress(torch.OutOfMemoryError):
            made, rollouts[number] = train_apart(build, name, steps, rollouts[number])
            found += [{"trainer": name, **step} for step in made]
    table = pd.DataFrame(found, columns=["trainer", GENERATION, REST, TEACHER, PEAK])
    table = table.set_index("trainer").astype(float).groupby(level=0).median()
    table = table.reindex([BASE, *names]).rename_axis(None)
    table.insert(0, STEP, table[GENERATION] + table[REST])
    for column, ratio in RATIOS.items():
        table[ratio] = table[column] / table.loc[BASE, column]
    return table


def in_words(table: pd.DataFrame) -> str:
    """Every trainer's step time over GRPO's, from a table of `race` or `measure`."""
    ratios = table[RATIOS[STEP]].dropna().drop(BASE, errors="ignore")
    return f"of {BASE}'s step: {'; '.join(f'{name} {x:.3f}' for name, x in ratios.items())}"


REAL = [Sizes(completion=1024, model=f"Qwen/Qwen3-{size}") for size in ("1.7B", "0.6B", "8B")]
BUDGET = 200  # seconds for all of them: of four minutes, less what a larger one takes longer


def bench_gpu(folder: Path, models: Sequence[Sizes] = REAL) -> Iterator[tuple[str, pd.DataFrame]]:
    """Name and table of each model, at once also in bench_gpu.csv, which plans read, and .png.

    Left out is what would end after `BUDGET`, at the mean time so far. ValueError without a GPU.
    """
    if not torch.cuda.is_available() and any(sizes.model != SYNTHETIC for sizes in models):
        instead = "--against, on synthetic rollouts, or `rlsd plan`, by arithmetic"
        raise ValueError(f"--gpu needs an NVIDIA GPU, of 40 GB or more. Without one: {instead}.")
    folder.mkdir(parents=True, exist_ok=True)
    found, begun = {}, time.monotonic()
    for done, sizes in enumerate(models):
        spent = time.monotonic() - begun
        if done and spent * (done + 1) / done > BUDGET:
            left = ", ".join(other.model for other in models[done:])
            return tqdm.write(f"left out after {spent:.0f} s of {BUDGET}: {left}")
        found[sizes.model] = measure(sizes)
        table = pd.concat([t.rename(index=f"{name}, {{}}".format) for name, t in found.items()])
        table.to_csv(folder / "bench_gpu.csv", index_label="trainer")
        costs(table[[RATIOS[REST], RATIOS[PEAK]]]).savefig(
            folder / "bench_gpu.png", bbox_inches="tight"
        )
        yield sizes.model, found[sizes.model]


def measure(sizes: Sizes) -> pd.DataFrame:
    """The race of all contenders beside what plans say of those that `Plan` describes.

    Planned seconds are at the `mfu` that GRPO reached, of `Plan.tflops` (its own agree by
    construction), those of generation at the assumed speeds. GRPO's row has all of `MEASURED`.
    """
    plans = {n: replace(sizes.plan, **c) for n, (*_, c) in contenders().items() if c is not None}
    table = race(sizes.build, list(contenders())[1:], steps=1)
    planned = pd.DataFrame(index=list(plans))
    planned[REST] = [sum(p.flops().values()) - p.flops()["generation"] for p in plans.values()]
    planned[GENERATION] = [plan.seconds()["generation"] for plan in plans.values()]
    planned[PEAK] = [(p.peak("update") - RESERVED) * GIB / MIB for p in plans.values()]
    ours, theirs = table.loc[BASE], planned.loc[BASE]
    mfu = theirs[REST] / ours[REST] / Plan.tflops / 1e12
    mbu = theirs[GENERATION] / ours[GENERATION] * Plan.mbu  # where decoding waits for memory
    more = (ours[PEAK] - theirs[PEAK]) * MIB / GIB  # activations, and what the plan leaves out
    kept = 1 + more / sizes.plan.memory()["update"]["activations"]
    table.loc[BASE, list(MEASURED)] = mfu, mbu, kept
    planned[REST] *= ours[REST] / theirs[REST]
    return table.join(planned.add_prefix("planned "))


def profile_teacher_pass(sizes: Sizes, trace: Path) -> str:
    """One shared pass: its seconds beside its floor, its operators by time, and a `trace` of it all.

    The floor is the bare model over as many positions and scored tokens in calls of the same shape,
    where no completion reads its prompt; the pass skips a prompt's last layer, the floor does not. The
    trace is for chrome://tracing or ui.perfetto.dev.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = sizes.build("RLSD", Path(folder), 1)
        trainer.args.teacher_pass = "shared"
        score = trainer.teacher_scores = Mock(wraps=trainer.teacher_scores)
        ids = torch.randint(sizes.vocabulary, (sizes.generations, sizes.completion)) + len(SPECIAL)
        trainer._generate_single_turn = lambda *_: (ids.tolist(), None)  # any words, at no cost
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        args, kwargs = score.call_args
        with trainer.completion_head.applied(True):
            passes = (partial(score, *args, **kwargs), partial(_read_once, trainer, sizes, ids))
            # In turn, so that a slow moment meets both; the first round warms up.
            rounds = pd.DataFrame([[timed(once)[0] for once in passes] for _ in range(21)][1:])
            spent, floor, over = *rounds.median(), (rounds[0] / rounds[1]).median()
            with torch.profiler.profile(with_stack=True) as found:
                score(*args, **kwargs)
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))
    by = f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total"
    table = found.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=40)
    told = (
        f"teacher pass {spent:.4f} s, floor {floor:.4f} s (medians); ratio of a round: {over:.2f}"
    )
    return f"{sizes}\n{table}\n{told}\ntrace: {trace}"


@torch.no_grad()
def _read_once(trainer: Any, sizes: Sizes, completions: torch.Tensor) -> None:
    """The model's own forward of a prompt, and of completions (G, T) without it, all scored."""
    device = trainer.accelerator.device
    prompt = torch.randint(sizes.vocabulary, (1, sizes.prompt + sizes.reference - 1), device=device)
    with trainer.accelerator.autocast():
        trainer.model.base_model(prompt)
        for rows in completions.to(device).split(trainer.args.per_device_train_batch_size):
            trainer.model(rows, shift_labels=rows, fused_lm_head=True, use_cache=False)
