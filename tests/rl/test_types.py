"""What passes between the phases stands alone: whoever wants a type needs no package before it."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["m1jax.rl.types", "m1jax.rl.diagnostics"])
def test_can_be_imported_first(module):
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
