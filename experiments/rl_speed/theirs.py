"""TRL's side of `rl_speed`: MODEL STEPS; prints a line of JSON for each step. Needs TRL and nothing of m1jax."""

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationMixin, MiniMaxForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PROMPTS, SAMPLES, LENGTH = 8, 8, 32


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    """What makes every group differ."""
    return [sum(ids) % 101 / 101 for ids in completion_ids]


class Steps(TrainerCallback):
    """Prints when a step ends."""

    def __init__(self) -> None:
        self.number, self.begin, self.generation, self.processor = 0, 0.0, 0.0, 0.0

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        if not self.begin:
            self.begin, self.processor = time.perf_counter(), time.process_time()

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        now, cpu, self.number = time.perf_counter(), time.process_time(), self.number + 1
        line = {"step": now - self.begin, "generation": self.generation, "processor": cpu - self.processor}
        print(json.dumps({"number": self.number, **line}), flush=True)
        self.begin, self.generation, self.processor = now, 0.0, cpu


def main(directory: str, steps: int) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = MiniMaxForCausalLM.from_pretrained(directory, dtype=torch.float32)
    mixin: Any = GenerationMixin
    calls, generate = Steps(), mixin.generate

    def timed(self: object, *arguments: object, **options: object) -> object:
        begin = time.perf_counter()
        try:
            return generate(self, *arguments, **options)
        finally:
            calls.generation += time.perf_counter() - begin

    mixin.generate = timed
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=LENGTH,
            max_steps=steps,
            loss_type="cispo",
            epsilon_high=5.0,
            beta=0.0,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [f"{index:010d}" for index in range(steps * PROMPTS)]}),
            processing_class=tokenizer,
            callbacks=[calls],
        ).train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
