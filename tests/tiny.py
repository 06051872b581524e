"""The smallest model that can be trained on bytes, and its directory; what several packages' tests share."""

from pathlib import Path

from flax import nnx

from m1jax import MiniMaxM1, ModelConfig, save_pretrained
from m1jax.chat import Tokenizer

CONFIG = ModelConfig(
    vocab_size=263,
    hidden_size=16,
    intermediate_size=16,
    layer_types=("lightning", "softmax"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=4,
    num_experts=2,
    experts_per_token=1,
    initializer_range=0.1,
)


def model() -> MiniMaxM1:
    return MiniMaxM1(CONFIG, rngs=nnx.Rngs(0))


def save(directory: Path) -> Path:
    """The model and its tokenizer, as the command line takes them."""
    save_pretrained(model(), directory)
    Tokenizer.tiny().save(directory)
    return directory
