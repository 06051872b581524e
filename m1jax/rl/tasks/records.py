"""Records of data files as problems, in the shapes that public data have.

    {"prompt": "...", "answer": "..."}                                     our own
    {"question": "...", "answer": "... #### 42"}                           GSM8K: a solution, and its result at the end
    {"prompt": [{"role": "user", "content": "..."}],
     "reward_model": {"ground_truth": "34"}}                               DAPO-Math, and what else verl trains on
    {"prompt": "...", "instruction_id_list": [...], "kwargs": [...]}       IFEval: instructions that rules check
    {"prompt": "...", "cases": [{"stdin": "3", "stdout": "6"}],
     "asserts": ["assert double(2) == 4"], "setup": "", "entry": []}       code, by what it prints and what it defines

A field `verification` names the judge (`m1jax.rl.problem.Verification`) where the shape does not say it: `exact` for
answers that must agree letter by letter.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from m1jax.chat.tokenizer import check_unicode
from m1jax.errors import UserError
from m1jax.rl.problem import Problem, Verification
from m1jax.rl.rewards import constraints
from m1jax.rl.rewards.code import Case, CodeTests
from m1jax.train.data import PAIR, Source, prompt_answer

EXPECTED = f"{PAIR}, or a record as GSM8K, DAPO-Math, IFEval or code problems have it"
RESULT = "####"
_COLUMNS = (
    *("prompt", "answer", "question", "reward_model", "verification"),
    *("instruction_id_list", "kwargs", "cases", "asserts", "setup", "entry"),
)


def read_problems(path: str | Path, encode: Callable[[str], Sequence[int]], longest: int) -> list[Problem]:
    """The problem of every record of a file: JSON lines or Parquet.

    Raises:
        UserError: as `Source` raises it, also for a prompt that `encode` makes more than `longest` tokens of.
    """

    def convert(record: dict[str, Any]) -> Problem:
        problem = problem_of(record, Path(path).stem)
        if (tokens := len(encode(problem.prompt))) > longest:
            raise UserError(f"a prompt of {tokens} tokens; max_prompt_tokens is {longest}: raise it, or cut the prompt")
        return problem

    problems = Source(path, convert, EXPECTED, _COLUMNS)
    return [problems[index] for index in range(len(problems))]


def problem_of(record: Mapping[str, Any], family: str) -> Problem:
    """One record, in any of the shapes above.

    Raises:
        UserError: it has none of them.
    """
    prompt, thinking = _prompt(record), None
    if "instruction_id_list" in record:
        answer = constraints.to_json(constraints.constraints(*_lists(record, "instruction_id_list", "kwargs")))
        verification = "constraints"
    elif "cases" in record or "asserts" in record:
        answer, verification = _tests(record).to_json(), "code"
    elif "reward_model" in record:
        answer, verification = _ground_truth(record["reward_model"]), "math"
    elif "question" in record:
        thinking, answer = _solution(record.get("answer"))
        verification = "math"
    else:
        _, answer = prompt_answer({**record, "prompt": prompt})
        verification = "math"
    asked = record.get("verification", verification)
    known = get_args(Verification)
    if asked not in known:
        raise UserError(f"'verification' is {asked!r:.100}; there are {', '.join(known)}")
    if asked != verification and {asked, verification} != {"math", "exact"}:
        raise UserError(f"'verification' is {asked!r}, but the record is one of {verification}: expected its fields")
    return Problem(prompt, answer, thinking, family=family, verification=asked)


def _prompt(record: Mapping[str, Any]) -> str:
    name = "question" if "question" in record and "prompt" not in record else "prompt"
    prompt = record.get(name)
    if isinstance(prompt, list):  # a conversation in which nobody has answered yet
        if not all(map(_is_asked, prompt)):
            raise UserError('\'prompt\' is a list; expected messages {"role": "user" or "system", "content": "..."}')
        prompt = "\n\n".join(message["content"] for message in prompt)
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{name!r} is {prompt!r:.100}; it must be a text that is not empty; expected {EXPECTED}")
    check_unicode(prompt)
    return prompt


def _is_asked(message: object) -> bool:
    if not isinstance(message, Mapping) or message.get("role") not in ("user", "system"):
        return False
    return isinstance(message.get("content"), str)


def _solution(answer: object) -> tuple[str, str]:
    """GSM8K's solution and its result."""
    if not isinstance(answer, str) or RESULT not in answer:
        raise UserError(f"'answer' is {answer!r:.100}; beside a question it must end with {RESULT} and the result")
    solution, _, result = answer.rpartition(RESULT)
    if not result.strip():
        raise UserError(f"'answer' ends with {RESULT} and nothing behind it")
    return solution.strip(), result.strip().replace(",", "")


def _ground_truth(model: object) -> str:
    truth = model.get("ground_truth") if isinstance(model, Mapping) else None
    if isinstance(truth, int | float) and not isinstance(truth, bool):
        truth = str(truth)
    if not isinstance(truth, str) or not truth.strip():
        raise UserError(f'\'reward_model\' is {model!r:.100}; expected {{"ground_truth": "..."}}')
    return truth.strip()


def _tests(record: Mapping[str, Any]) -> CodeTests:
    cases, asserts = _lists(record, "cases", "asserts")
    for case in cases:
        if not isinstance(case, Mapping) or not all(isinstance(case.get(k), str) for k in ("stdin", "stdout")):
            raise UserError(f'a case is {case!r:.100}; expected {{"stdin": "...", "stdout": "..."}}')
    (entry,) = _lists(record, "entry")
    setup = record.get("setup", "")
    if not isinstance(setup, str) or not all(isinstance(text, str) for text in (*asserts, *entry)):
        raise UserError("'setup' must be a text, 'asserts' and 'entry' lists of texts")
    return CodeTests(
        cases=tuple(Case(case["stdin"], case["stdout"]) for case in cases),
        setup=setup,
        asserts=tuple(asserts),
        entry=tuple(entry),
    )


def _lists(record: Mapping[str, Any], *names: str) -> list[list[Any]]:
    found = [record.get(name, []) for name in names]
    for name, value in zip(names, found):
        if not isinstance(value, list):
            raise UserError(f"{name!r} is {value!r:.100}; it must be a list")
    return found
