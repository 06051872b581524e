"""The command line `m1jax`: finds the command that was asked for and imports only what that one needs."""

import errno
import importlib
import sys
import typing
from collections.abc import Sequence

import tyro

from m1jax.errors import UserError

# Words of the command -> (module:function, what it does). The function takes one dataclass: its fields are the options.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("m1jax.demo:main", "train a small M1 on this machine in minutes: SFT, then CISPO"),
    "train pretrain": ("m1jax.train.pretrain:main", "pre-train a model further on documents"),
    "train sft": ("m1jax.train.sft:main", "fine-tune a model on conversations, or prompts and answers"),
    "train rl": ("m1jax.rl.trainer:main", "train a model with CISPO on problems whose answers can be verified"),
    "generate": ("m1jax.commands.generate:main", "let a model answer prompts"),
    "plan": ("m1jax.commands.plan:main", "does a model fit on hardware you do not have, how fast, at what price"),
    "launch": ("m1jax.launch:main", "start a command in several processes on this machine and watch them"),
    "convert": ("m1jax.commands.convert:main", "convert between official files, Transformers' files and checkpoints"),
    "checkpoint ls": ("m1jax.commands.checkpoint:ls", "list the checkpoints of a run"),
    "checkpoint show": ("m1jax.commands.checkpoint:show", "show what a checkpoint holds"),
    "checkpoint verify": ("m1jax.commands.checkpoint:verify", "read every byte of a checkpoint and compare checksums"),
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
        module, function = COMMANDS[name][0].split(":")
        run = getattr(importlib.import_module(module), function)
        (config_type,) = [t for key, t in typing.get_type_hints(run).items() if key != "return"]
        config = tyro.cli(config_type, prog=f"m1jax {name}", args=arguments[words:])
        run(config)
    except UserError as error:
        _stop(str(error))
    except OSError as error:
        file = f" for {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _stop(f"no space left on the disk{file}: free some and run again")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _stop(f"not permitted{file} ({error.strerror}): choose another place, or change its permissions")
        raise
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
