"""The command line finds its commands, and says what a user can put right in a line or two."""

import dataclasses
import errno
import logging
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Annotated

import pytest
import tyro

import m1jax
from m1jax import cli
from m1jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Does a thing."""

    number: int = 1
    """How many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapping(Config):
    """Runs another command."""

    command: Annotated[tuple[str, ...], tyro.conf.Positional] = ()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `m1jax ARGUMENTS` with `act` behind the commands `thing` and `thing other`; (status, output, errors)."""

    def run(*arguments, act=lambda config: print(config.number)):
        def main(config: Config) -> None:
            act(config)

        module = types.ModuleType("fake_command")

        def wrap(config: Wrapping) -> None:
            print(config.number, *config.command)

        module.main, module.wrap = main, wrap  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "fake_command", module)
        commands = {
            "thing": cli.Command("fake_command:main", "does it"),
            "thing other": cli.Command("fake_command:main", "does more", devices=True),
            "group one": cli.Command("fake_command:main", "does one"),
            "group two": cli.Command("fake_command:main", "does two"),
            "wrap": cli.Command("fake_command:wrap", "runs another one", wraps=True),
        }
        monkeypatch.setattr(cli, "COMMANDS", commands)
        try:
            cli.main(arguments)
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def test_runs_the_command_with_its_options(run):
    assert run("thing", "--number", "3") == (0, "3\n", "")
    assert run("thing", "other") == (0, "1\n", "")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_overview(run, arguments):
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert "does it" in out
    assert "does more" in out


def test_version(run):
    declared = tomllib.loads(Path(m1jax.__file__).parents[1].joinpath("pyproject.toml").read_text())
    assert run("--version") == (0, f"m1jax {declared['project']['version']}\n", "")


def test_a_reader_that_leaves_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "m1jax.cli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == b""


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_overview_of_a_group(run, flag):
    status, out, err = run("group", flag)
    assert (status, err) == (0, "")
    assert "does one" in out
    assert "does two" in out
    assert "does it" not in out


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ("--number 3 -- thing --number 4", "3 thing --number 4"),
        ("--number 3 thing --number 4", "3 thing --number 4"),
        ("--number=3 x.py -h", "3 x.py -h"),
        ("x.py -- --number 4", "1 x.py -- --number 4"),
        ("--number 3", "3"),
        ("--number 3 --", "3"),
        ("", "1"),
    ],
)
def test_where_a_wrapped_command_begins(run, arguments, printed):
    assert run("wrap", *arguments.split()) == (0, printed + "\n", "")


def test_help_of_a_command_that_wraps(run):
    status, out, _ = run("wrap", "--number", "3", "--help")
    assert status == 0
    assert "usage: m1jax wrap" in out


COMPILES = """
import sys, types, jax
import m1jax
from m1jax import cli
assert jax.config.jax_compilation_cache_dir == (sys.argv[1] or None), "the library leaves JAX alone"
def main(config: cli.Command) -> None:
    print(jax.jit(lambda x: x + 1)(1))
sys.modules["fake_command"] = module = types.ModuleType("fake_command")
module.main = main
cli.parse = lambda arguments: (main, None)
cli.COMMANDS["thing"] = cli.Command("fake_command:main", "compiles", devices=True)
cli.main(["thing"])
"""


@pytest.mark.parametrize(
    ("environment", "kept"),
    [
        ({}, "cache/m1jax/xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "other"}, "other"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "0"}, None),
        ({"XDG_CACHE_HOME": "file"}, None),
    ],
)
def test_what_is_compiled_is_kept(tmp_path, environment, kept):
    (tmp_path / "file").touch()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")}
    clean |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": "cache", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, environment.get("JAX_COMPILATION_CACHE_DIR", "")],
        cwd=tmp_path,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert "Warning" not in done.stderr
    files = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*-cache")}
    assert files == ({kept} if kept else set())


def test_the_overview_waits_for_nothing():
    """Half a second, of which most went to imports: no clock is needed to see them."""
    code = (
        "import sys; from m1jax import cli\n"
        "cli.main(['--help']); cli.main(['train', '--help'])\n"
        "print([name for name in ('jax', 'flax', 'numpy', 'tyro', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_public_names():
    import m1jax

    code = (
        "import m1jax\n"
        "for name in sorted(m1jax.__all__): print(name, callable(getattr(m1jax, name)))\n"
        "print(m1jax.sharding.make_mesh.__name__, set(m1jax.__all__) < set(dir(m1jax)), hasattr(m1jax, 'nonsense'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    names = [
        "Agent",
        "Cache",
        "MiniMaxM1",
        "ModelConfig",
        "UserError",
        "from_pretrained",
        "generate",
        "save_pretrained",
    ]
    assert done.stdout.splitlines() == [*(f"{name} True" for name in names), "make_mesh True False"], done.stderr
    assert m1jax.generate.__module__.startswith("m1jax.inference")
    with pytest.raises(AttributeError, match="module 'm1jax' has no attribute 'generrate'"):
        _ = m1jax.generrate


def absent(message, kind=RuntimeError):
    def devices():
        raise kind(message)

    return devices


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        (
            "cuda",
            absent("Unable to initialize backend 'cuda': no driver\n. (set JAX_PLATFORMS='' to choose another)"),
            "JAX_PLATFORMS=cuda asks for devices that JAX cannot use here (Unable to initialize backend 'cuda': no "
            "driver .); unset it",
        ),
        ("tpu", absent("", AssertionError), "JAX_PLATFORMS=tpu asks for devices that JAX cannot use here ()"),
        ("", absent("The TPU is already in use"), "JAX cannot use this machine's devices (The TPU is already in use)"),
    ],
)
def test_devices_that_are_not_there(run, monkeypatch, asked, error, says):
    import jax

    monkeypatch.setenv("JAX_PLATFORMS", asked)
    monkeypatch.setattr(jax, "devices", error)
    assert run("thing")[0] == 0  # which needs none
    status, out, err = run("thing", "other", act=lambda config: pytest.fail("ran"))
    assert (status, out) == (2, "")
    assert err.startswith(f"m1jax: {says}")
    assert err.count("\n") == 1


def test_a_plugin_that_is_broken_is_the_reason(run, monkeypatch):
    """JAX writes a traceback into its log then, and raises an AssertionError without a word."""
    import jax

    def devices():
        try:
            raise RuntimeError("Unable to load CUDA. Is it installed?")
        except RuntimeError:
            logging.getLogger("jax._src.xla_bridge").exception("Jax plugin configuration error")
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", devices)
    status, _, err = run("thing", "other")
    assert status == 2
    assert "JAX cannot use here (Unable to load CUDA. Is it installed?)" in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", [name for name, command in cli.COMMANDS.items() if command.devices])
def test_commands_that_compute_need_devices(name, monkeypatch, capsys):
    import jax

    monkeypatch.setattr(jax, "devices", absent("gone"))
    monkeypatch.setattr(cli, "parse", lambda _: (lambda config: pytest.fail("ran"), None))
    with pytest.raises(SystemExit, match="2"):
        cli.main(name.split())
    assert "(gone)" in capsys.readouterr().err


def test_an_absent_accelerator_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "m1jax.cli", "generate", "model", "--prompt", "hello"],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "model is no directory" in done.stderr:
        pytest.skip("there is a GPU here")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "m1jax: JAX_PLATFORMS=cuda asks for devices that JAX cannot use here" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("thin",), "no command 'thin'; did you mean 'thing'?"),
        (("thing", "othr"), "othr"),
        (("group",), "group what? There are 'group one', 'group two'"),
        (("group", "tow"), "no command 'group tow'; did you mean 'group two'?"),
        (("gruop", "one"), "no command 'gruop'; did you mean 'group one'?"),
        (("two",), "did you mean 'group two'?"),
        (("zzzzz",), "m1jax --help lists all"),
        (("wrap", "--numbr", "3", "thing"), "--numbr"),
        (("--number", "3"), "no command '--number'"),
        (("thing", "--numbr", "3"), "--number"),
        (("thing", "--number", "three"), "three"),
        (("thing", "else"), "else"),
    ],
)
def test_wrong_arguments(run, arguments, says):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


def test_what_the_user_can_put_right(run):
    def act(config):
        raise UserError("data.jsonl, line 3: no 'answer'")

    assert run("thing", act=act) == (2, "", "m1jax: data.jsonl, line 3: no 'answer'\n")


@pytest.mark.parametrize("filename", [None, "runs/demo/metrics.jsonl"])
def test_a_full_disk(run, filename):
    def act(config):
        raise OSError(errno.ENOSPC, "No space left on device", filename)

    status, _, err = run("thing", act=act)
    assert status == 2
    assert err.startswith(f"m1jax: {filename or 'a file'}: the disk is full")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EACCES, "/data/runs: not permitted (No); choose another place, or change its permissions"),
        (errno.EROFS, "/data/runs: this file system is read-only; choose another place"),
    ],
)
def test_what_is_not_permitted(run, number, says):
    def act(config):
        raise OSError(number, "No", "/data/runs")

    assert run("thing", act=act)[::2] == (2, f"m1jax: {says}\n")


def test_bugs_keep_their_traceback(run):
    def act(config):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run("thing", act=act)


def test_interrupted(run):
    def act(config):
        raise KeyboardInterrupt

    assert run("thing", act=act) == (130, "", "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*name.split(), "--help"])
    assert f"usage: m1jax {name}" in capsys.readouterr().out
