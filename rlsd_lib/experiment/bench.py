"""`rlsd bench`: what a step of each trainer costs beside GRPO's, measured.

Trainers, TRL's own among them, take turns, each turn in a fresh process. All train on the same
rollouts, those of each step generated once, and at a learning rate of 0, so that they differ only in
what they compute from them. The task is a preset's, or a random Qwen3 reads prompts and writes
completions of exact length; nothing is downloaded.
"""

import contextlib
import copy
import gc
import os
import resource
import statistics
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import Mock

import pandas as pd
import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.profiler import profile
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from rlsd_lib.experiment.experiment import Experiment
from rlsd_lib.experiment.plan import Plan, config_named, shape_of
from rlsd_lib.names import check_fields, look_up
from rlsd_lib.tasks.encode import word_tokenizer
from rlsd_lib.trainer.config import RLSDConfig
from rlsd_lib.trainer.trainer import RLSDTrainer

BASE = "GRPO"
SYNTHETIC = "synthetic"  # a model in `SHAPES` that is nobody's
SPECIAL = ("<pad>", "</s>", "<unk>")
# A contender, a folder, a number of steps -> its trainer.
Build = Callable[[str, Path, int], Trainer]
# Seconds by part of each timed step, rollouts by step, peak MiB.
Turn = tuple[list[dict[str, float]], dict[int, list], float]
STEP, GENERATION, REST = "step, s", "generation, s", "without generation, s"
TEACHER, PEAK = "teacher pass, s", "peak MiB"
MODELS = ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")  # of `--gpu`
LORA = ", LoRA"  # ends the name of a contender that trains an adapter
Whole = Annotated[int, lambda n: isinstance(n, int) and n >= 1, "a whole number >= 1"]
Group = Annotated[int, lambda n: isinstance(n, int) and n >= 2, "2 or more, a group"]


# What is raced


def contenders() -> dict[str, tuple[type[Trainer], Callable[..., Any]]]:
    """Trainer and configuration by name. TRL's self-distiller sees the same teacher prompt as ours."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    ours = partial(
        RLSDConfig, privileged_template="{prompt} {privileged_context}", lambda_decay_steps=0
    )
    theirs = partial(
        SDPOConfig,
        # Feedback instead of a demonstration, so that the teacher's prompt is as long as RLSD's.
        include_environment_feedback=True,
        success_reward_threshold=2.0,
        reprompt_template="{prompt}{solution}{feedback}",
        feedback_template=" {feedback_raw}",
        max_prompt_length=None,
    )
    return {
        BASE: (GRPOTrainer, GRPOConfig),
        "GRPO, completion head": (RLSDTrainer, partial(ours, method="grpo", completion_head=True)),
        "RLSD": (RLSDTrainer, ours),
        "RLSD, plain pass": (RLSDTrainer, partial(ours, teacher_pass="plain")),
        "OPSD": (RLSDTrainer, partial(ours, method="opsd")),
        BASE + LORA: (GRPOTrainer, GRPOConfig),
        "RLSD" + LORA: (RLSDTrainer, ours),
        "TRL SDPO": (SDPOTrainer, theirs),
    }


@dataclass(frozen=True)
class Sizes:
    """A random Qwen3 on prompts and completions of exact length, in tokens; a group is a step.

    Other models of `SHAPES` than `SYNTHETIC` are in bf16, with gradient checkpointing.
    Raises ValueError for a size that cannot be, naming it and what was expected.
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
        """The trainer of a contender, ready for `steps` steps of one group each.

        Raises ValueError for an unknown name, with the nearest known one.
        """
        table = contenders()
        trainer, configure = table[look_up(name, table, "contender")]
        on_gpu = torch.cuda.is_available()
        config = configure(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=self.generations // self.rows,
            num_generations=self.generations,
            max_completion_length=self.completion,
            # No end of sequence before the last token: completions of one length are equal work.
            generation_kwargs={"min_new_tokens": self.completion},
            temperature=1.0,
            learning_rate=0.0,
            shuffle_dataset=False,
            gradient_checkpointing=self.is_real,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        dtype = torch.bfloat16 if self.is_real else torch.float32
        # Always the same weights.
        with torch.random.fork_rng(), torch.device("cuda" if on_gpu else "cpu"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(self.config(), dtype=dtype)
        if not issubclass(trainer, GRPOTrainer):
            # TRL's self-distiller loads its teacher from where the model came from.
            model.save_pretrained(folder / "model")
            model.config._name_or_path = str(folder / "model")
        return trainer(
            model=model,
            reward_funcs=_reward,
            args=config,
            train_dataset=self.make_rows(steps),
            processing_class=self.make_tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM") if name.endswith(LORA) else None,
        )

    def config(self) -> Any:
        """The transformers config of the model."""
        config = config_named(self.model)
        if not self.is_real:
            config.vocab_size = self.vocabulary + len(SPECIAL)
        config.pad_token_id, config.eos_token_id = 0, 1
        return config

    @property
    def is_real(self) -> bool:
        """Whether the sizes are those of a model that somebody trains."""
        return self.model != SYNTHETIC

    @property
    def words(self) -> int:
        """Words that prompts are drawn from: the vocabulary but for special tokens."""
        return self.config().vocab_size - len(SPECIAL)

    @property
    def rows(self) -> int:
        """Rollouts that share a forward."""
        return 2 if self.is_real else self.generations

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word: a text of n words is n tokens."""
        words = [*SPECIAL, *(f"w{i}" for i in range(self.words))]
        return word_tokenizer(words, WhitespaceSplit())

    def make_rows(self, count: int) -> Dataset:
        """`count` prompts and references of exact length."""
        random = torch.Generator().manual_seed(0)

        def text(length: int) -> str:
            ids = torch.randint(self.words, (length,), generator=random)
            return " ".join(f"w{i}" for i in ids.tolist())

        columns = {"prompt": self.prompt, "privileged_context": self.reference}
        return Dataset.from_dict({k: [text(n) for _ in range(count)] for k, n in columns.items()})


def _reward(completions: list[str], **_: Any) -> list[float]:
    """Differs within a group, and depends on nothing but the text."""
    return [zlib.crc32(text.encode()) % 7 / 7 for text in completions]


def preset_trainer(preset: str, name: str, folder: Path, steps: int) -> Trainer:
    """The trainer of a run of "GRPO" or "RLSD" with a preset, at a constant lambda.

    Raises ValueError for an unknown preset.
    """
    overrides = {"learning_rate": 0.0, "lambda_decay_steps": 0, "save_strategy": "no"}
    place = {"max_steps": steps, "run_dir": str(folder / "run")}
    method = name.lower()
    return Experiment(method=method, preset=preset, overrides=overrides, **place).trainer()


# Time and memory


class Clock(TrainerCallback):
    """Seconds of each optimiser step without its generation, of generation and of the teacher pass.

    Rollouts that are in `rollouts` already, under the number of their step, are used again. The
    first step, which warms up, has those of the second.
    """

    def __init__(self, trainer: Any, rollouts: dict[int, list]) -> None:
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
            trainer.teacher_scores = lambda *a, **k: self._timed(TEACHER, lambda: score(*a, **k))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(defaultdict(float, {REST: -now()}))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps[-1][REST] += now() - self.steps[-1].get(GENERATION, 0.0)

    def _timed(self, part: str, run: Callable[[], Any]) -> Any:
        begun = now()
        result = run()
        self.steps[-1][part] += now() - begun
        return result

    def _rollouts(self, generate: Callable[[], list]) -> list:
        step = max(len(self.steps), 2)
        if step not in self.rollouts:
            torch.manual_seed(step)
            self.rollouts[step] = self._timed(GENERATION, generate)
        return copy.deepcopy(self.rollouts[step])


def train(build: Build, name: str, steps: int, rollouts: dict[int, list]) -> Turn:
    """Train one step to warm up and `steps` more, on `rollouts` where they are given, see `Clock`.

    The peak in MiB is the device's; without a GPU it is this process's. Neither counts what was
    held before.
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
    warm_up, *timed = clock.steps
    timed[0] |= {GENERATION: warm_up[GENERATION]} if GENERATION in warm_up else {}
    unit = 1 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    return timed, clock.rollouts, (peak - before) / 2**20


def train_apart(*turn: Any) -> Turn:
    """`train` in a process of its own, whose peak is of no other trainer.

    A GPU's peak can be reset: there all share a process. Forked by a small server: a spawned
    process would begin with the peak of its parent.
    """
    if torch.cuda.is_available():
        return train(*turn)
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        return pool.submit(train, *turn).result()


def now() -> float:
    """Seconds: of the clock on the wall, or of the processor where one thread does all the work.

    A single thread's own seconds are what other programs on the machine lengthen least.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


# The race


def race(build: Build, names: Sequence[str], steps: int = 3, rounds: int = 1) -> pd.DataFrame:
    """A row for each trainer, GRPO first: medians over all steps, peak memory, both over GRPO's.

    The trainers take turns, `rounds` times; in a round all train on the rollouts of the first. A row
    is NaN where device memory did not suffice.
    """
    timed: dict[str, list[dict[str, float]]] = {name: [] for name in (BASE, *names)}
    turns = tqdm(total=rounds * len(timed), unit="turn", disable=None)  # on a terminal alone
    for _ in range(rounds):
        rollouts: dict[int, list] = {}
        for name, found in timed.items():
            turns.set_description(name)
            with contextlib.suppress(torch.OutOfMemoryError):
                timings, rollouts, peak = train_apart(build, name, steps, rollouts)
                found += [{**step, PEAK: peak} for step in timings]
            turns.update()
    turns.close()
    parts = (GENERATION, REST, TEACHER, PEAK)
    medians = {name: pd.DataFrame(found, columns=parts).median() for name, found in timed.items()}
    table = pd.DataFrame(medians).T.astype(float)
    table[GENERATION] = table[GENERATION].median()  # made by one of them, for all
    table.insert(0, STEP, table[GENERATION] + table[REST])
    for column in (STEP, REST, PEAK):
        table[f"{column.partition(',')[0]} / {BASE}"] = table[column] / table.loc[BASE, column]
    return table


def in_words(table: pd.DataFrame) -> str:
    """Every trainer's step time over GRPO's, from a table of `race` or `measure`."""
    ratios = table[f"step / {BASE}"].dropna()
    told = [f"{name} {ratio:.3f}" for name, ratio in ratios.items() if not name.endswith(BASE)]
    return f"of {BASE}'s step: {'; '.join(told)}"


# Models of real size


def bench_gpu(outputs: Path) -> pd.DataFrame:
    """Race the trainers on `MODELS` and write `tables/bench_gpu.csv`, whose mfu plans read.

    Raises ValueError without a GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "--gpu needs an NVIDIA GPU that torch can see, of 40 GB or more for the two smaller "
            "models. Without one: --against, on synthetic rollouts, or `rlsd plan`, by arithmetic."
        )
    (outputs / "tables").mkdir(parents=True, exist_ok=True)
    found = []
    for name in MODELS:
        found.append(measure(Sizes(prompt=1024, completion=1024, model=name)))
        table = pd.concat(found)
        # At once: what is measured stays, should a larger model not fit the time.
        table.to_csv(outputs / "tables" / "bench_gpu.csv", index_label="trainer")
    return table


def measure(sizes: Sizes) -> pd.DataFrame:
    """The race of all contenders; GRPO's row has the `mfu` it reached, relative to `Plan.tflops`."""
    table = race(sizes.build, list(contenders())[1:], steps=1)
    lengths = {"prompt_length": sizes.prompt, "max_completion_length": sizes.completion}
    step = {"rollouts": sizes.generations, "gradient_checkpointing": sizes.is_real}
    plan = Plan(shape_of(sizes.config()), gpus=1, **lengths, **step).grpo
    trained = sum(plan.flops().values()) - plan.flops()["generation"]
    table.loc[BASE, "mfu"] = trained / table.loc[BASE, REST] / plan.tflops / 1e12
    return table.rename(index=lambda name: f"{sizes.model}, {name}")


# Where the teacher pass takes its time


def profile_teacher_pass(sizes: Sizes, trace: Path) -> str:
    """One shared pass: its seconds beside its floor, and its operators by their time.

    The floor is the bare model's, over as many positions and scored tokens in calls of the same
    shape, where no completion reads its prompt: what no pass can do without. `trace` receives the
    pass with every function that it calls, for chrome://tracing or ui.perfetto.dev.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = sizes.build("RLSD", Path(folder), 1)
        trainer.args.teacher_pass = "shared"
        score = trainer.teacher_scores = Mock(wraps=trainer.teacher_scores)
        shape = (sizes.generations, sizes.completion)
        ids = torch.randint(len(SPECIAL), sizes.words, shape, generator=torch.Generator())
        # Any tokens will do, and cost no generation.
        trainer._generate_single_turn = lambda *_: (ids.tolist(), None)
        trainer.remove_callback(PrinterCallback)
        trainer.train()  # whose pass is the warm-up
        args, kwargs = score.call_args
        with trainer.completion_head.applied(True):
            spent = _median(lambda: score(*args, **kwargs))
            floor = _median(partial(_read_once, trainer, sizes, ids))
            with profile(with_stack=True) as found:
                score(*args, **kwargs)
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))
    by = f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total"
    table = found.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=40)
    told = f"teacher pass {spent:.4f} s, floor {floor:.4f} s: {spent / floor:.2f} x"
    return f"{sizes}\n{table}\n{told}\ntrace: {trace}"


def _median(run: Callable[[], Any], times: int = 5) -> float:
    """The median of the seconds that `run` takes, after one run to warm up."""
    run()
    seconds = []
    for _ in range(times):
        begun = now()
        run()
        seconds.append(now() - begun)
    return statistics.median(seconds)


@torch.no_grad()
def _read_once(trainer: RLSDTrainer, sizes: Sizes, completions: torch.Tensor) -> None:
    """The model's own forward of a prompt, and of completions (G, T) without it, all scored."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    ids = completions.to(trainer.accelerator.device)
    with trainer.accelerator.autocast():
        prompt = torch.randint(sizes.words, (1, sizes.prompt + sizes.reference - 1))
        model.base_model(prompt.to(ids.device))
        for rows in ids.split(sizes.rows):
            model(rows, shift_labels=rows, fused_lm_head=True, use_cache=False)
