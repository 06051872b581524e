"""What would M1's RL run cost on this hardware?

    python -m experiments.plan_memory.rl_run

The report: 512 H800, three weeks, $534,700. Taken over to another chip with the same operations at the same share of
its peak (what M1's trainer reached is not published); beside it, the smallest number of chips on which an update of one
80k-token row per row-carrying device fits.
"""

from m1jax.config import ModelConfig
from m1jax.plan.hardware import CHIPS
from m1jax.plan.search import smallest, spell
from m1jax.plan.setup import Setup
from m1jax.sharding import parse_mesh

GPUS, HOURS = 512, 21 * 24


def main() -> None:
    """Prints a Markdown table."""
    update = Setup(
        model=ModelConfig.preset("m1-456b"), task="rl", mesh=parse_mesh(""), context=80 * 1024, rows=1
    )  # fmt: skip
    print("| chip | device hours | price of one | run | weeks on 512 | an update at 80k fits from |")
    print("|---|---|---|---|---|---|")
    for name, chip in CHIPS.items():
        hours = GPUS * HOURS * CHIPS["h800"].flops / chip.flops
        found = smallest(update, chip)
        where = "no slice" if found is None else f"{found.devices}, {spell(found.mesh)}"
        print(
            f"| {name} | {hours:,.0f} | ${chip.price:.2f} | ${hours * chip.price:,.0f} | {hours / 512 / 168:.1f} "
            f"| {where} |"
        )


if __name__ == "__main__":
    main()
