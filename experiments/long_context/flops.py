"""FLOPs of the next token after so much context, hybrid against softmax attention in every layer.

python -m experiments.long_context.flops
"""

import dataclasses
from pathlib import Path

from m1jax.config import SOFTMAX, ModelConfig
from m1jax.flops import forward_flops
from m1jax.model.cache import key_value_bytes, state_bytes

LENGTHS = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
MODELS = {"MiniMax-M1 (456 B)": "m1-456b", "m1-2b": "m1-2b"}


def twin(config: ModelConfig) -> ModelConfig:
    """Softmax attention in every layer."""
    return dataclasses.replace(config, layer_types=(SOFTMAX,) * config.num_layers)


def flops(config: ModelConfig, context: int) -> int:
    """Of one token that has `context` before it, head included."""
    return forward_flops(config, 1, start=context)


def gigabytes(config: ModelConfig, context: int) -> float:
    """States, keys and values in bfloat16 (states in float32) after so many tokens."""
    return (state_bytes(config) + context * key_value_bytes(config, "bfloat16")) / 1e9


def table() -> str:
    """Markdown."""
    lines = [
        "| model | context | GFLOPs a token, hybrid | all softmax | times | GB, hybrid | all softmax | times |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, preset in MODELS.items():
        hybrid = ModelConfig.preset(preset)
        for context in LENGTHS:
            work = [flops(config, context) / 1e9 for config in (hybrid, twin(hybrid))]
            memory = [gigabytes(config, context) for config in (hybrid, twin(hybrid))]
            lines.append(
                f"| {name} | {context:,} | {work[0]:,.1f} | {work[1]:,.1f} | {work[1] / work[0]:.1f} "
                f"| {memory[0]:.3g} | {memory[1]:.3g} | {memory[1] / memory[0]:.1f} |"
            )
    return "\n".join(lines) + "\n"


def picture(file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, (name, preset) in zip(axes, MODELS.items()):
        hybrid = ModelConfig.preset(preset)
        for label, config in (("hybrid", hybrid), ("softmax in every layer", twin(hybrid))):
            axis.loglog(LENGTHS, [flops(config, n) / 1e9 for n in LENGTHS], "o-", label=label)
        axis.set(title=name, xlabel="tokens of context", ylabel="GFLOPs of the next token")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    picture(Path(__file__).with_name("flops.png"))
    print(table())
