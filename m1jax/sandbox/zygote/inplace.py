"""Python programs in the interpreter that was forked for them: starting another takes longer than most programs run."""

import os
import sys
import types
from typing import NoReturn

import jail

NAME = "main.py"
_PATH = f"{jail.SCRATCH}/{NAME}"
_OURS = ("filter", "init", "inplace", "jail", "linux", "protocol", "supervisor", "zygote")


def run(source: bytes, environment: dict[str, str], packages: list[str]) -> NoReturn:
    """Runs a program as `python main.py` would, in the scratch folder; ends with SystemExit."""
    os.environ.clear()
    os.environ.update(environment)
    for name in _OURS:
        del sys.modules[name]
    program = types.ModuleType("__main__")
    program.__file__ = _PATH
    sys.modules["__main__"] = program
    sys.argv = [NAME]
    sys.path[:1] = [jail.SCRATCH]  # instead of the folder of this file
    sys.path += packages
    try:
        exec(compile(source, _PATH, "exec"), program.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        # As the interpreter would, but without the frame of this function.
        shown = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        sys.excepthook(type(shown), shown, shown.__traceback__)
        raise SystemExit(1) from None
    raise SystemExit(0)
