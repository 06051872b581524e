"""What a user gets who installs the wheel: everything that is needed, far from the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="builds the wheel (extra dev)")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = target.glob("*.whl")
    return built


def test_it_holds_both_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"m1jax/py.typed", "pallas_kernels/py.typed", "m1jax/chat/template.jinja"} <= names
    sources = {
        str(path.relative_to(ROOT))
        for package in ("m1jax", "pallas_kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if ".dist-info/" not in name} == sources


def test_it_works_in_a_fresh_environment(wheel, tmp_path):
    home = tmp_path / "environment"
    venv.create(home)  # without pip: the running one installs into it
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(home / "bin" / "python")]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    # What m1jax depends on, from the environment of this test; files like this one are not followed there, so that an
    # editable installation of the checkout stays out of sight.
    site = next((home / "lib").glob("*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    outside = tmp_path / "outside"
    outside.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [home / "bin" / program, *arguments],
            cwd=outside,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("python", "-c", "import m1jax, pallas_kernels; print(m1jax.__file__, pallas_kernels.__file__)")
    assert where.split() == [str(site / package / "__init__.py") for package in ("m1jax", "pallas_kernels")]
    assert "train sft" in run("m1jax", "--help")
    assert "parameters" in run("m1jax", "init", "m1-tiny", "model")
    answer = run("m1jax", "generate", "model", "--prompt", "a", "--max-new-tokens", "2")
    assert "[cut at --max-new-tokens 2]" in answer
