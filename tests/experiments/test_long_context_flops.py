"""The README shows what is counted, and the count knows which layers look back."""

from experiments.long_context import flops
from m1jax.config import ModelConfig


def test_readme_shows_the_table():
    readme = (flops.Path(flops.__file__).parent / "README.md").read_text()
    assert flops.table() in readme


def test_only_softmax_layers_cost_more_with_context():
    hybrid = ModelConfig.preset("m1-2b")
    grown = [flops.flops(config, 8192) - flops.flops(config, 4096) for config in (hybrid, flops.twin(hybrid))]
    assert grown[1] == 8 * grown[0] > 0
