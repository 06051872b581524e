"""Runs in the sandbox: a program under examination, in an interpreter of its own.

    python code_candidate.py FILE

After the program has run, a dialogue in lines of JSON: first the names that it has defined, then calls. What goes over
is plain values; any other object stays here, under a number by which its attributes can be had, and it can be called.
"""

import itertools
import json
import numbers
import os
import sys
import types
from typing import Any

ITEMS = 1_000_000


class Answers:
    """What the examiner may ask for."""

    def __init__(self, program: types.ModuleType):
        self.objects: list[Any] = [program]

    def encode(self, value: Any) -> Any:
        """As JSON: what JSON knows as itself, the rest as an object with one name."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str(value)
        if isinstance(value, numbers.Integral):  # numpy's too
            return int(value)
        if isinstance(value, float):
            return {"float": repr(float(value))}
        if isinstance(value, complex):
            return {"complex": [repr(value.real), repr(value.imag)]}
        if isinstance(value, bytes | bytearray):
            return {"bytes": bytes(value).hex()}
        for name, kind in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
            if isinstance(value, kind):
                return {name: [self.encode(each) for each in value]}
        if isinstance(value, dict):
            return {"dict": [[self.encode(key), self.encode(each)] for key, each in value.items()]}
        if hasattr(value, "__next__"):
            return {"iterator": [self.encode(each) for each in itertools.islice(value, ITEMS)]}
        self.objects.append(value)
        return {"object": len(self.objects) - 1}

    def decode(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "object":
            return self.objects[inner]
        if kind == "float":
            return float(inner)
        if kind == "complex":
            return complex(*map(float, inner))
        if kind == "bytes":
            return bytes.fromhex(inner)
        if kind == "dict":
            return {self.decode(key): self.decode(each) for key, each in inner}
        make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
        return make(map(self.decode, inner))

    def answer(self, asked: list[Any]) -> dict[str, Any]:
        number, name, arguments, keywords = asked
        found = self.objects[number]
        if name is not None:
            return {"value": self.encode(getattr(found, name))}
        arguments = [self.decode(argument) for argument in arguments]
        value = found(*arguments, **{name: self.decode(each) for name, each in keywords.items()})
        # Arguments that were changed in place are given back with it.
        return {"value": self.encode(value), "arguments": [self.encode(each) for each in arguments]}


def main() -> None:
    sys.set_int_max_str_digits(0)
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # what the program reads and prints is not part of the dialogue
        os.dup2(null, descriptor)
    with open(sys.argv[1]) as file:
        source = file.read()
    program = types.ModuleType("candidate")
    sys.modules["candidate"] = program  # where dataclasses and pickle look
    exec(compile(source, "program", "exec"), program.__dict__)
    told = Answers(program)
    reply = {"names": [name for name in vars(program) if isinstance(name, str) and not name.startswith("__")]}
    while True:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
        line = questions.readline()
        if not line:
            return
        try:
            reply = told.answer(json.loads(line))
        except Exception as error:
            reply = {"error": type(error).__name__, "message": str(error)[:200]}


main()
