"""Against Transformers' native ``minimax`` in PyTorch: what either saves, the other loads; same logits, same gradients.

Only where all channels rotate and the head count is a power of two; elsewhere Transformers computes another model.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig, from_pretrained, save_pretrained
from m1jax.weights.names import tensors, tree_path
from m1jax.weights.safetensors import BUFFER, Weights

torch = pytest.importorskip("torch", reason="PyTorch is an extra: make torch")
transformers = pytest.importorskip("transformers", reason="Transformers is an extra: make torch")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, not ours

CONFIG = dataclasses.replace(
    ModelConfig.preset("m1-tiny"),
    layer_types=("lightning", "lightning", "softmax") * 2,
    rotary_dim=16,
    lightning_alpha=1.7,
    softmax_beta=0.8,
    mlp_alpha=1.2,
    initializer_range=0.1,
)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 300), dtype=np.int32)  # more than one of their blocks of 256


@pytest.fixture(scope="module")
def model():
    model = MiniMaxM1(CONFIG, rngs=nnx.Rngs(3))
    graph, state = nnx.split(model)
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    # Norms start at one, where a forgotten weight would not show.
    return nnx.merge(graph, jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), state))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "hf"
    save_pretrained(model, directory, layout="transformers")
    return directory


@pytest.fixture(scope="module")
def theirs(exported):
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    # Tables of decays, which it computes from the config where a file lacks them.
    assert all(BUFFER.fullmatch(name) for name in info["missing_keys"])
    assert type(loaded).__name__ == "MiniMaxForCausalLM"
    return loaded


def test_what_we_save_gives_our_logits_there(model, theirs):
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    assert np.abs(np.asarray(model(jnp.asarray(TOKENS))) - logits).max() <= 1e-4


def test_what_they_save_gives_their_logits_here(theirs, model, tmp_path):
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    again = from_pretrained(tmp_path / "saved")
    assert again.config == CONFIG
    for x, y in zip(jax.tree.leaves(nnx.split(again)[1]), jax.tree.leaves(nnx.split(model)[1]), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_the_gradient_of_every_parameter_agrees(model, theirs, tmp_path):
    graph, parameters = nnx.split(model)
    tokens = jnp.asarray(TOKENS)

    def loss(parameters):
        logits = nnx.merge(graph, parameters)(tokens[:, :-1])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))

    gradients = jax.jit(jax.grad(loss))(parameters)
    ours = {tree_path(path): np.asarray(g) for path, g in jax.tree_util.tree_flatten_with_path(gradients)[0]}

    inputs = torch.tensor(TOKENS, dtype=torch.long)
    logits = theirs(inputs[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), inputs[:, 1:].reshape(-1)).backward()
    # Gradients saved as if they were parameters: their own writer gives them the names of the files.
    state = {name: p.grad for name, p in theirs.named_parameters()}
    theirs.save_pretrained(tmp_path / "gradients", state_dict=state)
    weights = Weights(tmp_path / "gradients")
    assert set(weights.entries) == {t.name for t in tensors(CONFIG)}
    worst = max(
        (float(np.linalg.norm(ours[t.path][t.index] - g) / np.linalg.norm(g)), t.name)
        for t in tensors(CONFIG)
        for g in [weights.array(t.name)]
    )
    assert worst[0] <= 1e-4, worst
