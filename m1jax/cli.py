"""The command line `m1jax`: finds the command that was asked for and imports only what that one needs."""

import dataclasses
import difflib
import importlib
import logging
import os
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from m1jax.disk import FULL, NOT_PERMITTED, explained
from m1jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """What stands behind the words of a command."""

    home: str
    """module:function; the function takes one dataclass, whose fields are the options"""
    what: str
    """what it does, in a line"""
    devices: bool = False
    """whether it computes on JAX's devices"""
    wraps: bool = False
    """whether its options end where another command begins"""
    expands: str | None = None
    """module:function; says which arguments some arguments stand for"""
    basic: str | None = None
    """module:NAME; a set of options that --help lists, where --help-all lists all"""


COMMANDS: dict[str, Command] = {
    "demo": Command("m1jax.demo:main", "train a small M1 on this machine in minutes: SFT, then CISPO", True),
    "init": Command("m1jax.commands.init:main", "make a model with random weights from a preset", True),
    "train pretrain": Command("m1jax.train.pretrain:main", "pre-train a model further on documents", True),
    "train sft": Command("m1jax.train.sft:main", "fine-tune a model on conversations, or prompts and answers", True),
    "train rl": Command(
        "m1jax.rl.command:main",
        "train a model with CISPO on problems whose answers can be verified",
        True,
        expands="m1jax.rl.recipe_file:expanded",
        basic="m1jax.rl.command:BASIC",
    ),
    "eval": Command("m1jax.rl.evaluate:main", "measure a model on problems: avg@k, pass@k, majority, intervals", True),
    "generate": Command("m1jax.commands.generate:main", "let a model answer prompts", True),
    "chat": Command("m1jax.commands.chat:main", "talk to a model in the terminal, and lend it tools", True),
    "serve": Command(
        "m1jax.commands.serve:main", "serve a model as OpenAI's API does, with a page to talk to it", True
    ),
    "plan": Command(
        "m1jax.commands.plan:main", "does a model fit on hardware you do not have, how fast, at what price"
    ),
    "launch": Command(
        "m1jax.launch:main", "start a command in several processes on this machine and watch them", wraps=True
    ),
    "convert": Command(
        "m1jax.commands.convert:main", "convert between official files, Transformers' files and checkpoints", True
    ),
    "checkpoint ls": Command("m1jax.commands.checkpoint:ls", "list the checkpoints of a run"),
    "checkpoint show": Command("m1jax.commands.checkpoint:show", "show what a checkpoint holds"),
    "checkpoint verify": Command(
        "m1jax.commands.checkpoint:verify", "read every byte of a checkpoint and compare checksums"
    ),
}
HELP = ("-h", "--help")
HELP_ALL = "--help-all"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; exits with status 2 and without a traceback for what the user can put right."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        from importlib.metadata import version

        print(f"m1jax {version('m1jax')}", flush=True)
        return
    try:
        name = find(arguments)
        if name is None:
            print(_overview(arguments), flush=True)
            return
        run, config = parse(arguments)
        if COMMANDS[name].devices:
            _require_devices()
            _keep_compiled()
        run(config)
        sys.stdout.flush()
    except UserError as error:
        _stop(str(error))
    except BrokenPipeError:  # whoever read the output has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed, too
        sys.exit(1)
    except OSError as error:
        if error.errno not in (*FULL, *NOT_PERMITTED):
            raise
        _stop(str(explained(error, Path("a file"))))
    except KeyboardInterrupt:
        sys.exit(130)


def find(arguments: Sequence[str]) -> str | None:
    """The name of the command that some arguments begin with; None if they ask which there are.

    Raises:
        UserError: they begin with no command.
    """
    # The longest name first: a command may also be the first word of another.
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name
    group = [name for name in COMMANDS if name.split()[:1] == list(arguments[:1])]
    if not arguments or arguments[0] in HELP or (group and arguments[1:2] and arguments[1] in HELP):
        return None
    if group and len(arguments) == 1:
        raise UserError(f"{arguments[0]} what? There are {', '.join(map(repr, group))}; try m1jax {group[0]} --help")
    asked = " ".join(arguments[:2] if group else arguments[:1])
    # Two words first, for `trian sft`; and of `sft` and `rl` nobody need remember the first word.
    near = [n for words in (2, 1) for n in difflib.get_close_matches(" ".join(arguments[:words]), COMMANDS, 1)]
    near += [name for name in COMMANDS if asked == name.split()[-1]]
    hint = f"; did you mean {near[0]!r}?" if near else "; m1jax --help lists all"
    raise UserError(f"there is no command {asked!r}{hint}")


def parse(arguments: Sequence[str]) -> tuple[Callable[[typing.Any], None], typing.Any]:
    """The function behind a command, and what its options say; ends the program if they ask for help or are wrong."""
    import tyro  # half of the time that --help takes

    name = find(arguments)
    assert name is not None
    command, options = COMMANDS[name], list(arguments[len(name.split()) :])
    run = _named(command.home)
    (config_type,) = [t for key, t in typing.get_type_hints(run).items() if key != "return"]
    if command.wraps:
        options = _separated(options, {field.name for field in dataclasses.fields(config_type)})
    if command.expands is not None:
        options = _named(command.expands)(options)
    if command.basic is not None and not set(options).isdisjoint({*HELP, HELP_ALL}):
        if HELP_ALL in options:
            options = ["--help"]
        else:
            config_type = help_of(config_type, _named(command.basic))
    return run, tyro.cli(config_type, prog=f"m1jax {name}", args=options)


def _named(place: str) -> typing.Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def help_of(config: type, basic: Collection[str]) -> type:
    """A dataclass of options for help alone, which leaves out all those that are not basic; dataclasses within it
    likewise. What is said of the options stays."""
    import tyro

    types, shown = typing.get_type_hints(config), {}
    with_extras = typing.get_type_hints(config, include_extras=True)
    namespace: dict[str, typing.Any] = {}
    for field in dataclasses.fields(config):
        kind = types[field.name]
        options: dict[str, typing.Any] = {}
        if dataclasses.is_dataclass(kind):
            part = help_of(typing.cast(type, kind), basic)
            shown[field.name] = tyro.conf.OmitArgPrefixes[part]
            factory = typing.cast(typing.Any, field.default_factory)
            options["default_factory"] = lambda part=part, factory=factory: _as(part, factory())
        else:
            hint = with_extras[field.name]
            shown[field.name] = hint if field.name in basic else typing.Annotated[hint, tyro.conf.Suppress]
            kept = {"default": field.default, "default_factory": field.default_factory}
            options = {name: value for name, value in kept.items() if value is not dataclasses.MISSING}
        namespace[field.name] = dataclasses.field(**options)
    made = type(config.__name__, (config,), {**namespace, "__annotations__": shown, "__doc__": config.__doc__})
    return dataclasses.dataclass(frozen=True, kw_only=True)(made)


def _as(kind: type, value: typing.Any) -> typing.Any:
    """A dataclass's value as that of a subclass of `help_of`."""
    defaults = {
        field.name: field.default_factory
        for field in dataclasses.fields(kind)
        if field.default_factory is not dataclasses.MISSING
    }
    given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return kind(**{name: part for name, part in given.items() if name not in defaults})


def _separated(arguments: list[str], names: Collection[str]) -> list[str]:
    """The same with -- before the command that they wrap, where nobody wrote it; `names` of options with one value."""
    at = 0
    while at < len(arguments) and arguments[at].startswith("--"):
        option, equals, _ = arguments[at].removeprefix("--").partition("=")
        if option not in names:
            return arguments  # it is there; or tyro says what is wrong
        at += 1 if equals else 2
    return arguments if at >= len(arguments) or arguments[at] in HELP else [*arguments[:at], "--", *arguments[at:]]


def _require_devices() -> None:
    """Raises UserError where JAX has been told to use devices that are not here: before anything is read."""
    import jax

    # A plugin whose libraries are missing is reported here, with a traceback, and by the next line not at all.
    reports: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info:
            reports.append(str(record.exc_info[1]))
        return not record.exc_info

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where a plugin is installed and its driver is not
        asked, reason = os.environ.get("JAX_PLATFORMS"), " ".join((reports or [str(error)])[-1].split())
        reason = reason.partition(" (set JAX_PLATFORMS")[0][:200]
        if asked:
            raise UserError(
                f"JAX_PLATFORMS={asked} asks for devices that JAX cannot use here ({reason}); unset it to compute on "
                "what there is, or install what is missing (extras gpu and tpu)"
            ) from error
        raise UserError(
            f"JAX cannot use this machine's devices ({reason}); JAX_PLATFORMS=cpu computes on its processor"
        ) from error
    finally:
        logger.removeFilter(keep)


def _keep_compiled() -> None:
    """Keeps compiled programs in a folder of the user's, so that the next start need not compile them again.

    JAX's own persistent cache, whose keys hold the program, the versions, the flags and the chip; of a CPU its name and
    every feature, so that a home shared by different machines does no harm. JAX_COMPILATION_CACHE_DIR names another
    folder, JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
    """
    import jax

    # `sharding.empty` is a program's only custom partitioning, and the same in every process.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m1jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none to write to: JAX would complain of every program
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _stop(message: str) -> typing.NoReturn:
    print(f"m1jax: {message}", file=sys.stderr)
    sys.exit(2)


def _overview(arguments: Sequence[str]) -> str:
    """All commands, or those of a group."""
    known = [name for name in COMMANDS if name.split()[:1] == list(arguments[:1])] or list(COMMANDS)
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: m1jax COMMAND [--help] [OPTIONS], m1jax --version", ""]
    lines += [f"  {name:{width}}{COMMANDS[name].what}" for name in known]
    return "\n".join([*lines, "", "m1jax COMMAND --help lists a command's options and their defaults."])


if __name__ == "__main__":
    main()
