"""Which part may import which, and that importing costs nothing that is not needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# One way only: a part may import what stands on its own line or above it.
LAYERS = [
    {"errors", "_compat", "collectives", "sandbox"},
    {"config", "flops"},
    {"sharding", "flops"},
    {"model"},
    {"inference", "checkpoint", "convert"},
    {"train", "agent"},
    {"rl", "serve"},
    {"plan", "demo", "launch"},
    {"cli", "commands"},
]
# Tokens and prompts stand apart: everybody may use them, they use nobody.
CHAT = "chat"
OPTIONAL = {"torch", "transformers", "fla", "reasoning_gym"}


def imports(path):
    """(line, module, whether at the top of the file) for every import in a file; relative ones are made absolute."""
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            # `from m1jax import convert` imports a part; `from m1jax.convert import f` does as well.
            for alias in node.names if module == "m1jax" else [None]:
                yield node.lineno, module + (f".{alias.name}" if alias else ""), id(node) in top


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def part(path):
    return path.relative_to(ROOT / "m1jax").with_suffix("").parts[0]


def wrong_direction(source, target):
    """Whether a file of part `source` must not import part `target` of m1jax."""
    if target == source or target == "errors":
        return False
    if source == CHAT:
        return True
    if target == CHAT:
        return False
    rank = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    return rank[target] > rank[source]


@pytest.mark.parametrize("path", files("m1jax"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    known = {CHAT}.union(*LAYERS)
    if path.parent.name == "m1jax" and path.name in ("__init__.py", "__main__.py"):
        return  # the public names: may show every part
    assert part(path) in known, f"m1jax/{part(path)} is new: give it its place in LAYERS"
    for line, module, top in imports(path):
        names = module.split(".")
        assert names[0] not in OPTIONAL or not top, f"{path}:{line}: {module} is optional: import it where it is used"
        assert names[0] not in ("tests", "experiments"), f"{path}:{line}: {module}"
        if names[0] == "m1jax" and len(names) > 1 and names[1] in known:
            assert not wrong_direction(part(path), names[1]), f"{path}:{line}: {part(path)} must not import {module}"


@pytest.mark.parametrize("path", files("pallas_kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_stand_on_jax_alone(path):
    allowed = {"jax", "jaxlib", "numpy", "jaxtyping", "pallas_kernels", *sys.stdlib_module_names}
    for line, module, _ in imports(path):
        assert module.split(".")[0] in allowed, f"{path}:{line}: pallas_kernels imports {module}"


def test_importing_is_light():
    """No device is touched, nothing optional comes along, and nothing is computed."""
    script = (
        "import sys, m1jax, pallas_kernels, m1jax.chat, m1jax.commands.plan\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'importing initialised a device'\n"
        f"loaded = {sorted(OPTIONAL | {'matplotlib', 'tensorboardX', 'grain', 'math_verify', 'libtpu'})!r}\n"
        "print([name for name in loaded if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
