"""Problems from data files, in the shapes of public data, each with its own judge."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from m1jax.chat import Tokenizer
from m1jax.errors import UserError
from m1jax.rl.tasks import Problem, ProblemFile, UserProblems, read_problems
from m1jax.rl.tasks.records import problem_of

GSM8K = {
    "question": "Ann has 3 bags of 400 nails and buys 34 more. How many are there?",
    "answer": "She has 3*400=<<3*400=1200>>1200.\n1200+34=<<1200+34=1234>>1234\n#### 1,234",
}
DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "Find the sum of 1/2 and 1/3. The last line is Answer: $Answer"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "\\frac{5}{6}", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4"},
}
IFEVAL = {
    "prompt": "Write without commas, two words at most.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"relation": "less than", "num_words": 3, "keyword": None}],
}
CODE = {
    "prompt": "Read a number and print its double; define double.",
    "verification": "code",
    "cases": [{"stdin": "3\n", "stdout": "6\n"}],
    "asserts": ["assert double(2) == 4"],
}
PROGRAM = "```python\ndef double(x): return x * {}\nif __name__ == '__main__': print(double(int(input())))\n```"


@pytest.mark.parametrize(
    ("record", "right", "wrong"),
    [
        ({"prompt": "1/2=", "answer": 0.5}, "$\\frac12$", "0.6"),
        ({"prompt": "say yes", "answer": "yes", "verification": "exact"}, " yes ", "yes!"),
        (GSM8K, "There are 1234", "1235"),
        (DAPO, "So we add.\nAnswer: $\\frac{10}{12}$", "Answer: 5"),
        (IFEVAL, "Quite short", "One, two"),
        (CODE, PROGRAM.format(2), PROGRAM.format(3)),
    ],
    ids=["plain", "exact", "gsm8k", "dapo", "ifeval", "code"],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records_are_read_and_judged(tmp_path, kind, record, right, wrong):
    path = tmp_path / f"data.{kind}"
    field = "question" if "question" in record else "prompt"
    other = json.loads(json.dumps(record).replace(json.dumps(record[field]), json.dumps("Another one, please?")))
    other[field] = [{"role": "user", "content": "Another"}] if isinstance(record[field], list) else "Another"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in (record, other)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record, other]), path)
    problems = read_problems(path, Tokenizer.tiny().encode, 200)
    assert [problem.family for problem in problems] == ["data", "data"]
    task = UserProblems([ProblemFile(str(path), problems)])
    assert task.correct(problems[0], right)
    assert not task.correct(problems[0], wrong)
    assert not task.correct(problems[0], "")


def test_what_becomes_of_the_fields():
    gsm = problem_of(GSM8K, "f")
    assert (gsm.prompt, gsm.answer, gsm.verification) == (GSM8K["question"], "1234", "math")
    assert gsm.thinking == GSM8K["answer"].partition("\n####")[0]
    assert problem_of(DAPO, "f") == Problem(DAPO["prompt"][0]["content"], "\\frac{5}{6}", family="f")
    system = {**DAPO, "prompt": [{"role": "system", "content": "Be brief."}, *DAPO["prompt"]]}
    assert problem_of(system, "f").prompt == "Be brief.\n\n" + DAPO["prompt"][0]["content"]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"answer": "1"}, "'prompt' is None"),
        ({"prompt": "a"}, "no 'answer'"),
        ({"prompt": []}, "'prompt' is ''"),
        ({"question": "a", "answer": "5"}, "must end with #### and the result"),
        ({"question": "a", "answer": "5 ####"}, "nothing behind it"),
        ({**DAPO, "prompt": [{"role": "assistant", "content": "x"}]}, "'prompt' is a list; expected messages"),
        ({**DAPO, "prompt": ["x"]}, "'prompt' is a list; expected messages"),
        ({**DAPO, "reward_model": {"style": "rule"}}, "'reward_model' is .*ground_truth"),
        ({**IFEVAL, "kwargs": [{}]}, "2 instructions with 1 sets"),
        ({**IFEVAL, "instruction_id_list": "x"}, "'instruction_id_list' is 'x'; it must be a list"),
        ({**IFEVAL, "instruction_id_list": ["no", "no"]}, "no rule for the instruction 'no'"),
        ({"prompt": "a", "cases": []}, "a code problem without tests"),
        ({"prompt": "a", "cases": [{"stdin": "x"}]}, "a case is .*expected"),
        ({"prompt": "a", "asserts": ["assert ("]}, "a test that is no Python"),
        ({"prompt": "a", "answer": "b", "verification": "maths"}, "'verification' is 'maths'; there are math, exact"),
        ({"prompt": "a", "answer": "b", "verification": "code"}, "'verification' is 'code', but the record is one of"),
    ],
)
def test_what_is_no_problem(record, says):
    with pytest.raises(UserError, match=says):
        problem_of(record, "f")


def test_prompts_that_do_not_fit_are_named(tmp_path):
    """Before the training begins, and not when that problem's turn comes."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "aaaaaaaaaa", "answer": "b"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: a prompt of 10 tokens; max_prompt_tokens is 9"):
        read_problems(path, Tokenizer.tiny().encode, 9)
