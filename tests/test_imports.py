"""Which part may import which, that nothing goes in a circle, and that importing costs nothing that is not needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# One way only: a part may import those above its own line. A part is a package, or a file beside the packages.
RANKS = [
    {"errors"},
    {"disk", "processes", "peers", "collectives", "chat", "sandbox"},
    {"config"},
    {"parameters", "flops"},
    {"sharding"},
    {"model", "compiling"},
    {"weights", "inference"},
    {"checkpoint", "agent"},
    {"train", "serve", "convert", "local"},
    {"rl"},
    {"plan"},
    {"commands"},
    {"cli", "demo"},
    {"launch"},
]
RANK = {part: number for number, parts in enumerate(RANKS) for part in parts}
# Tokens and prompts stand apart.
ERRORS_ONLY = {"chat", "sandbox"}
OPTIONAL = {"torch", "transformers", "fla", "reasoning_gym", "gymnasium", "textarena", "pyarrow", "wandb"}


def imports(path, *, complete=False):
    """(line, module, whether at the top of the file) for every import in a file; relative ones are made absolute.

    `complete`: with every name that is imported from a module behind it, which may be a module too.
    """
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
            for alias in node.names if complete or module == "m1jax" else [None]:
                yield node.lineno, module + (f".{alias.name}" if alias else ""), id(node) in top


def files(*packages):
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def part(path):
    return path.relative_to(ROOT / "m1jax").with_suffix("").parts[0]


@pytest.mark.parametrize("path", files("m1jax"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    if path.parent.name == "m1jax" and path.name in ("__init__.py", "__main__.py"):
        return  # the public names: may show every part
    mine = part(path)
    assert mine in RANK, f"m1jax/{mine} is new: give it its place in RANKS"
    for line, module, top in imports(path):
        names = module.split(".")
        assert names[0] not in OPTIONAL or not top, f"{path}:{line}: {module} is optional: import it where it is used"
        assert names[0] not in ("tests", "experiments"), f"{path}:{line}: {module}"
        if names[0] == "m1jax" and len(names) > 1 and names[1] in RANK and names[1] != mine:
            assert RANK[names[1]] < RANK[mine], f"{path}:{line}: {mine} must not import {module}"
            assert mine not in ERRORS_ONLY or names[1] == "errors", f"{path}:{line}: {mine} must not import {module}"


def imported_files(path):
    """The files of the two packages that a file imports, anywhere in it: modules, or a package's __init__.py."""
    for _, module, _ in imports(path, complete=True):
        at = ROOT.joinpath(*module.split("."))
        # `from package import name`: a module of that name, else what the package itself says.
        for found in (
            at.with_suffix(".py"),
            at / "__init__.py",
            at.parent.with_suffix(".py"),
            at.parent / "__init__.py",
        ):
            if found.is_file():
                if found != path:
                    yield found
                break


def circles(graph):
    """The groups of files that import each other, by Tarjan's strongly connected components."""
    number, low, stack, found = {}, {}, [], []

    def visit(node):
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in graph[node]:
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in number:
            visit(node)
    return found


def test_no_circle_between_files():
    """Imports within functions and those for types alone count: they hide a circle, they do not open it."""
    graph = {path: sorted(set(imported_files(path))) for path in files("m1jax", "pallas_kernels")}
    assert sum(map(len, graph.values())) > 100
    assert not circles(graph)


def test_circles_are_seen():
    assert circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["a"]}) == [["b", "c"]]
    assert circles({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_no_function_shadows_a_module():
    """What a package shows under a module's name, and is not that module, hides it from `import`."""
    found = set()
    for path in files("m1jax", "pallas_kernels"):
        if path.name != "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            for alias in node.names if isinstance(node, ast.ImportFrom) else []:
                here = path.parent / (alias.asname or alias.name)
                module = here.with_suffix(".py").exists() or (here / "__init__.py").exists()
                if module and ROOT.joinpath(*str(node.module).split("."), alias.name) != here:
                    found.add(f"{path.parent.relative_to(ROOT)}: {here.name}")
    assert not found


@pytest.mark.parametrize("path", files("m1jax", "pallas_kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_versions_of_jax_differ_in_one_place(path):
    assert path.name == "_compat.py" or "__version" not in path.read_text()


def test_processes_talk_in_one_place():
    talk = [path.name for path in files("m1jax", "pallas_kernels") if "multihost_utils" in path.read_text()]
    assert talk == ["processes.py"]


@pytest.mark.parametrize("path", files("pallas_kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_stand_on_jax_alone(path):
    allowed = {"jax", "jaxlib", "numpy", "jaxtyping", "pallas_kernels", *sys.stdlib_module_names}
    for line, module, _ in imports(path):
        assert module.split(".")[0] in allowed, f"{path}:{line}: pallas_kernels imports {module}"


def test_importing_is_light():
    """No device is touched, nothing optional comes along, and nothing is computed."""
    script = (
        "import sys, jax\n"
        "theirs = set(sys.modules)  # jax brings libtpu along where it is installed\n"
        "import m1jax, pallas_kernels, m1jax.chat, m1jax.commands.plan\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'importing initialised a device'\n"
        f"loaded = {sorted(OPTIONAL | {'matplotlib', 'tensorboardX', 'grain', 'math_verify', 'libtpu'})!r}\n"
        "print([name for name in loaded if name in sys.modules and name not in theirs])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
