"""Points in the plane: the smallest adapter, to learn from and to look at a solver with."""

from polydiff.core.adapter import Adapter, Condition, lazy

_here = "polydiff.modalities.toy2d"

ADAPTER = Adapter(
    name="toy2d",
    process=lazy("polydiff.core.processes:gaussian"),
    conditions={"label": Condition("class")},
    shape=lazy(f"{_here}.codec:shape"),
    dataset=lazy(f"{_here}.dataset:Points"),
    codec=lazy(f"{_here}.codec:Codec"),
    network={"mlp": lazy(f"{_here}.network:mlp")},
    tasks={"inpaint": lazy(f"{_here}.tasks:inpaint")},
    metrics=lazy(f"{_here}.metrics:metrics"),
    view=lazy(f"{_here}.view:view"),
    checks=lazy(f"{_here}.checks:checks"),
    default_data="moons",
)
