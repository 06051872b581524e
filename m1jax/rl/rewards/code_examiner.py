"""Runs in the sandbox: assertions about a program that runs in another process. A line is printed for each that holds.

Standard input is JSON: `candidate`, the source of code_candidate.py; `program`; `setup`, `asserts` and `entry`. Nothing
that the program can reach contains what is expected of it: not a file, not an environment, not this process's memory.
"""

import builtins
import ctypes
import importlib
import json
import os
import subprocess
import sys
from typing import Any

PR_SET_DUMPABLE = 4


class Remote:
    """Something that the program defines; its attributes can be had and it can be called, and it equals only itself."""

    def __init__(self, dialogue: "Dialogue", number: int):
        self._dialogue, self._number = dialogue, number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._dialogue.get(self._number, name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._dialogue.call(self._number, arguments, keywords)


class Dialogue:
    """With the program's process, in lines of JSON."""

    def __init__(self, process: "subprocess.Popen[str]"):
        assert process.stdin is not None
        assert process.stdout is not None
        self._questions, self._answers = process.stdin, process.stdout

    def reply(self) -> Any:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the program has ended")
        return json.loads(line)

    def ask(self, *question: Any) -> Any:
        self._questions.write(json.dumps(question) + "\n")
        self._questions.flush()
        reply = self.reply()
        if "error" in reply:
            kind = getattr(builtins, str(reply["error"]), None)
            if isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError:
                raise kind(reply["message"])
            raise RuntimeError(reply["message"])
        return reply

    def get(self, number: int, name: str) -> Any:
        return self.decode(self.ask(number, name, None, None)["value"])

    def call(self, number: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        encoded = [encode(argument) for argument in arguments]
        reply = self.ask(number, None, encoded, {name: encode(each) for name, each in keywords.items()})
        for argument, changed in zip(arguments, map(self.decode, reply["arguments"])):
            if isinstance(argument, list):
                argument[:] = changed
            elif isinstance(argument, dict | set):
                argument.clear()
                argument.update(changed)
        return self.decode(reply["value"])

    def decode(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "object":
            return Remote(self, inner)
        if kind == "float":
            return float(inner)
        if kind == "complex":
            return complex(*map(float, inner))
        if kind == "bytes":
            return bytes.fromhex(inner)
        if kind == "dict":
            return {self.decode(key): self.decode(each) for key, each in inner}
        make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}[kind]
        return make([self.decode(each) for each in inner])


def encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Remote):
        return {"object": value._number}
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(each)] for key, each in value.items()]}
    for name, kind in (("list", list | range), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [encode(each) for each in value]}
    raise TypeError(f"a test gives the program a {type(value).__name__}, which is no plain value")


def main() -> None:
    sys.set_int_max_str_digits(0)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # closes /proc/PID to the program
    given = json.load(sys.stdin)
    held = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # tests may print
    os.remove("main.py")
    sys.path.remove(os.getcwd())  # where the program may write
    for name in ("candidate", "program"):
        with open(f"{name}.py", "w") as file:
            file.write(given[name])
    process = subprocess.Popen(
        [sys.executable, "candidate.py", "program.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    dialogue = Dialogue(process)
    names: dict[str, Any] = {"__name__": "tests"}
    for name in dialogue.reply()["names"]:
        # What a test takes for Python's own must not be the program's, unless it is what the program was to write.
        if name in given["entry"] or not (hasattr(builtins, name) or name in sys.stdlib_module_names):
            names[name] = dialogue.get(0, name)
        elif name in sys.stdlib_module_names:
            names[name] = importlib.import_module(name)
    exec(compile(given["setup"], "setup", "exec"), names)
    for piece in given["asserts"]:
        exec(compile(piece, "test", "exec"), names)
        print(file=held, flush=True)
    os._exit(0)


main()
