"""What every test runs under, set before jax is first imported."""

import atexit
import gc
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

# Eight devices, so that a wrong PartitionSpec fails here and not on a pod. Programs for one device are not affected.
# LLVM's optimisations are more than half of the time to compile, and compiling is most of the time of a test. XLA's own
# optimisations, and the libraries it calls, stay. JAX 0.10 can write loops through LLVM alone, which compiles a third
# faster than through MLIR; later ones cannot. That is then one module, and LLVM's own work is a sixth less if it is not
# cut into 32 for idle cores. Flags from outside come last and win.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        *(
            ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
            if metadata.version("jaxlib").startswith("0.10.")
            else []
        ),
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one process of this run has compiled, the others need not: pytest's workers, and the programs that tests start.
# Nor need the next test, which builds the same function anew. JAX would keep only what took a second, which is nothing
# here; the smallest program takes 15 to 25 ms to compile, writing included, and 3 to read.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="m1jax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Transformers and tokenizers: nothing from the network, and no warning about threads in forked workers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import jaxtyping
import pytest

from pallas_kernels.experts import grouped

# Checks the shapes and dtypes in the signatures of what works on arrays while tests run. Not those of what users call:
# that says itself what is wrong with an argument, and is tested for it.
CHECKED = [
    *(f"m1jax.rl.{name}" for name in ("advantages", "aggregation", "corrections", "losses", "sequences")),
    *(f"m1jax.model.{name}" for name in ("cache", "head", "layers", "lightning", "moe", "softmax")),
]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

# Compiling makes the first example slow and the rest fast, which no deadline per example can describe;
# derandomize: a red run must be red again when somebody looks.
hypothesis.settings.register_profile("m1jax", deadline=None, derandomize=True, max_examples=20, database=None)
hypothesis.settings.load_profile("m1jax")

# Whole trainings in processes of their own, up to a minute each. They come first, so that no worker waits in the end
# for another one's last test.
LONG = ("test_resume.py", "test_commands.py", "test_wheel.py")


def pytest_collection_finish() -> None:
    """Of the millions of objects that modules and traced programs are made of next to none is garbage. Looking for it
    as often as Python does took 6 % of the time of a test process."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


GOLDEN = Path(__file__).parent / "golden" / "m1-tiny"


@pytest.fixture(scope="session", autouse=True)
def blocks_of_experts() -> tuple[int, ...]:
    """The sizes of `expert_mlp`'s blocks on a CPU, of which a program has all that its tokens can fill.

    Tests compile two, a largest and a smaller one, which take every path: a sixth less in a model's gradient. All five
    are in the tests of the kernel itself, and in the programs that tests start.
    """
    sizes = grouped.BLOCKS
    grouped.BLOCKS = (8, 128)
    return sizes


@pytest.fixture(scope="session")
def golden() -> Path:
    """A small checkpoint in the authors' layout, with numbers that their code computed from it."""
    return GOLDEN


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the golden checkpoint that a test may damage."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in GOLDEN.iterdir():
        if file.suffix != ".npz":
            shutil.copyfile(file, target / file.name)
    return target
