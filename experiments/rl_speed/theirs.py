"""TRL's side of `rl_speed`: JOB as JSON; prints a line of JSON for each step. Needs TRL and nothing of m1jax."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, GenerationMixin, MiniMaxForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    """What makes every group differ."""
    return [sum(ids) % 101 / 101 for ids in completion_ids]


class Steps(TrainerCallback):
    """Prints when a step ends: a batch of responses and all updates on it."""

    def __init__(self, updates: int) -> None:
        self.updates, self.made = updates, 0
        self.number, self.begin, self.generation, self.processor = 0, 0.0, 0.0, 0.0

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        if not self.begin:
            self.begin, self.processor = time.perf_counter(), time.process_time()

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        self.made += 1
        if self.made % self.updates:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, cpu, self.number = time.perf_counter(), time.process_time(), self.number + 1
        line = {"step": now - self.begin, "generation": self.generation, "processor": cpu - self.processor}
        print(json.dumps({"number": self.number, **line}), flush=True)
        self.begin, self.generation, self.processor = now, 0.0, cpu


def model_of(directory: Path, dtype: torch.dtype) -> MiniMaxForCausalLM:
    if any(directory.glob("*.safetensors")):
        return MiniMaxForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return MiniMaxForCausalLM(AutoConfig.from_pretrained(directory)).to(dtype)


def main(job: dict[str, Any]) -> None:
    directory, sizes, cuda = Path(job["model"]), job["sizes"], torch.cuda.is_available()
    prompts, updates = sizes["prompts"], sizes["updates"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model_of(directory, torch.bfloat16 if cuda else torch.float32)
    mixin: Any = GenerationMixin
    calls, generate = Steps(updates), mixin.generate

    def timed(self: object, *arguments: object, **options: object) -> object:
        begin = time.perf_counter()
        try:
            return generate(self, *arguments, **options)
        finally:
            calls.generation += time.perf_counter() - begin

    mixin.generate = timed
    texts = [f"{index:0{sizes['prompt_tokens']}d}" for index in range(job["steps"] * prompts)]
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            use_cpu=not cuda,
            bf16=cuda,
            per_device_train_batch_size=prompts * sizes["samples"] // updates,
            steps_per_generation=updates,
            num_generations=sizes["samples"],
            max_completion_length=sizes["new_tokens"],
            max_steps=job["steps"] * updates,
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
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[calls],
        ).train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
