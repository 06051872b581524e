"""Budgets for thoughts, in M1's own words."""

from m1jax.chat import Tokenizer
from m1jax.chat.tokens import END_THINK, THINK
from m1jax.errors import UserError
from m1jax.inference.types import ThinkingBudget

PRESETS = {"40k": 40_000, "80k": 80_000}
"""The two models of the report, by the length of their thoughts."""


def thinking_budget(tokenizer: Tokenizer, tokens: int) -> ThinkingBudget:
    """A budget of so many tokens for the thought that `<think>` opens."""
    return ThinkingBudget(
        tokens=tokens,
        close=tuple(tokenizer.encode(f"\n{END_THINK}\n\n")),
        open=tuple(tokenizer.encode(THINK)),
    )


def parse_budget(text: str) -> int:
    """The tokens that an option asks for: a number, or a preset's name. Raises UserError for anything else."""
    if text in PRESETS:
        return PRESETS[text]
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"thinking_budget = {text} is none: give a number of tokens, or {' or '.join(PRESETS)}")
    return int(text)
