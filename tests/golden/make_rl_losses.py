"""Losses and gradients as verl and TRL compute them: runs their own functions, from checkouts, on random arrays.

python tests/golden/make_rl_losses.py VERL TRL      needs PyTorch; writes rl_losses.npz beside this file

Of their packages nothing is imported, because they would need what serves and trains models: the functions alone are
taken out of the files that they stand in. `rl_losses.npz` was made with verl at 1dda039 (22 August 2026), TRL at
f2cd577 (24 July 2026) and PyTorch 2.13 on CPU.
"""

import ast
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

ROWS, TIME = 6, 9
PROMPTS = np.array([0, 0, 0, 1, 1, 1])


def taken(path: Path, names: set[str], scope: dict[str, Any]) -> dict[str, Any]:
    """Functions of a file (of its classes too), without decorators and annotations, run in `scope`."""
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in found:
        node.decorator_list, node.returns = [], None
        for argument in (*node.args.args, *node.args.kwonlyargs):
            argument.annotation = None
    exec(compile(ast.Module(found, []), str(path), "exec"), scope)
    return scope


class Config:
    """verl's ActorConfig, as far as losses look at it."""

    global_batch_info: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **values: float):
        self.clip_ratio = 0.2
        self.__dict__.update(values)

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def verl(directory: Path, arrays: dict[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
    functional = taken(
        directory / "verl/utils/torch_functional.py",
        {"masked_sum", "masked_mean", "logprobs_from_logits"},
        {"torch": torch},
    )
    scope = {
        "torch": torch,
        "np": np,
        "defaultdict": defaultdict,
        "verl_F": types.SimpleNamespace(**functional),
        "ActorConfig": Config,
        "AlgoConfig": type("AlgoConfig", (), {}),
        "Optional": Any,
        "Any": Any,
    }
    names = {f"compute_policy_loss_{name}" for name in ("vanilla", "gspo", "cispo", "dppo_tv", "dppo_kl")}
    taken(directory / "verl/trainer/ppo/core_algos.py", {*names, "agg_loss", "compute_grpo_outcome_advantage"}, scope)
    rewards = torch.zeros(ROWS, TIME)
    rewards[:, -1] = torch.tensor(arrays["rewards"])
    advantages, _ = scope["compute_grpo_outcome_advantage"](rewards, torch.tensor(arrays["mask"]).float(), PROMPTS)
    out["verl_advantages"] = advantages[:, 0].numpy()
    cases = {
        "cispo": dict(clip_ratio_low=0.2, clip_ratio_high=0.28),
        "vanilla": dict(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0),
        "gspo": dict(clip_ratio_low=0.1, clip_ratio_high=0.15),
        "dppo_tv": dict(clip_ratio_low=0.15, clip_ratio_high=0.15),
        "dppo_kl": dict(clip_ratio_low=0.05, clip_ratio_high=0.05),
    }
    for name, bounds in cases.items():
        logp = torch.tensor(arrays["logp"], requires_grad=True)
        rest = (torch.tensor(arrays["advantage"])[:, None].expand(ROWS, TIME), torch.tensor(arrays["mask"]).float())
        function = scope[f"compute_policy_loss_{name}"]
        loss, _ = function(torch.tensor(arrays["old_logp"]), logp, *rest, "token-mean", Config(**bounds))
        loss.backward()
        out[f"verl_{name}_loss"], out[f"verl_{name}_grad"] = loss.detach().numpy(), logp.grad.numpy()


def trl(directory: Path, arrays: dict[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
    statistics = {"nanmin": torch.min, "nanmax": torch.max}  # of what it logs beside the loss
    scope = taken(directory / "trl/trainer/grpo_trainer.py", {"_compute_loss"}, {"torch": torch, **statistics})
    for name in ("cispo", "grpo", "dapo", "dr_grpo"):
        logp = torch.tensor(arrays["logp"], requires_grad=True)
        trainer = mock.MagicMock()
        trainer._get_per_token_logps_and_entropies = lambda *_, logp=logp, **__: (logp, torch.zeros_like(logp), None)
        for field, value in {
            "aux_loss_enabled": False,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "importance_sampling_level": "token",
            "beta": 0.0,
            "loss_type": name,
            "epsilon_low": 0.2,
            "epsilon_high": 5.0 if name == "cispo" else 0.2,
            "use_vllm": False,
            "_entropy_bonus_enabled": False,
            "current_gradient_accumulation_steps": 1,
            "max_completion_length": TIME,
        }.items():
            setattr(trainer, field, value)
        trainer.args.delta = None
        trainer.accelerator.num_processes = 1
        trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
        mask = torch.tensor(arrays["mask"]).int()
        inputs = {
            "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.int64),
            "prompt_mask": torch.ones(ROWS, 1, dtype=torch.int64),
            "completion_ids": torch.zeros(ROWS, TIME, dtype=torch.int64),
            "completion_mask": mask,
            "advantages": torch.tensor(arrays["advantage"]),
            "old_per_token_logps": torch.tensor(arrays["old_logp"]),
            "num_items_in_batch": mask.sum(),
        }
        loss = scope["_compute_loss"](trainer, mock.MagicMock(training=True), inputs)
        loss.backward()
        out[f"trl_{name}_loss"], out[f"trl_{name}_grad"] = loss.detach().numpy(), logp.grad.numpy()


def main(verl_directory: Path, trl_directory: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([9, 3, 5, 1, 9, 4])
    logp = -rng.exponential(1.0, (ROWS, TIME))
    # Ratios from e^-3 to e^3, so that every bound is met on both sides of both signs.
    arrays = {
        "logp": logp.astype(np.float32),
        "old_logp": np.minimum(logp + rng.normal(0, 1.2, (ROWS, TIME)), -1e-3).astype(np.float32),
        "advantage": rng.normal(size=ROWS).astype(np.float32),
        "mask": np.arange(TIME) < lengths[:, None],
        "rewards": rng.normal(size=ROWS).astype(np.float32),
        "prompts": PROMPTS,
    }
    out: dict[str, np.ndarray] = {}
    verl(verl_directory, arrays, out)
    trl(trl_directory, arrays, out)
    np.savez(Path(__file__).with_name("rl_losses.npz"), **arrays, **out)
    print({name: float(value) for name, value in out.items() if name.endswith("loss")})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
