"""The command line `m1jax`: finds the command that was asked for and imports only what that one needs."""

import errno
import importlib
import sys
import typing
from collections.abc import Sequence

import tyro

from m1jax.errors import UserError

# Words of the command -> (module with `main(config)`, what it does). The parameter's type gives the options.
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("m1jax.commands.generate", "let a model answer prompts"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; exits with status 2 and without a traceback for what the user can put right."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # The longest name first: a command may also be the first word of another.
    words = next((n for n in (2, 1) if " ".join(arguments[:n]) in COMMANDS), 0)
    if not words:
        asked = not arguments or arguments[0] in ("-h", "--help")
        print(_overview(arguments), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    name = " ".join(arguments[:words])
    try:
        run = importlib.import_module(COMMANDS[name][0]).main
        (config_type,) = [t for key, t in typing.get_type_hints(run).items() if key != "return"]
        config = tyro.cli(config_type, prog=f"m1jax {name}", args=arguments[words:])
        run(config)
    except UserError as error:
        _stop(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _stop(f"no space left on the disk{f' for {error.filename}' if error.filename else ''}: free some and run again")
    except KeyboardInterrupt:
        sys.exit(130)


def _stop(message: str) -> typing.NoReturn:
    print(f"m1jax: {message}", file=sys.stderr)
    sys.exit(2)


def _overview(arguments: Sequence[str]) -> str:
    known = [name for name in COMMANDS if name.split()[:1] == list(arguments[:1])]
    lines = []
    if arguments and arguments[0] not in ("-h", "--help") and not known:
        lines = [f"m1jax: there is no command {arguments[0]!r}", ""]
    lines += ["usage: m1jax COMMAND [--help] [OPTIONS]", ""]
    width = max(map(len, COMMANDS)) + 2
    lines += [f"  {name:{width}}{COMMANDS[name][1]}" for name in known or COMMANDS]
    return "\n".join([*lines, "", "m1jax COMMAND --help lists a command's options and their defaults."])


if __name__ == "__main__":
    main()
