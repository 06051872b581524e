"""What a response earns: judges, and what shapes their rewards."""

from m1jax.rl.rewards.combined import CombinedJudge, get_judge
from m1jax.rl.rewards.function import FunctionJudge
from m1jax.rl.rewards.judge import Judge, Unjudged, Verdict
from m1jax.rl.rewards.rules import RuleJudge
from m1jax.rl.rewards.scoring import RewardRecipe, score

__all__ = [
    "CombinedJudge",
    "FunctionJudge",
    "Judge",
    "RewardRecipe",
    "RuleJudge",
    "Unjudged",
    "Verdict",
    "get_judge",
    "score",
]
