import json
import shutil
from pathlib import Path

import pytest

from m1jax import ModelConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "m1-tiny"


@pytest.fixture(scope="session")
def golden() -> Path:
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


@pytest.fixture(scope="session")
def golden_config() -> ModelConfig:
    return ModelConfig.from_hf(json.loads((GOLDEN / "config.json").read_text()))
