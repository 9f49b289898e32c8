"""Images: greyscale or RGB, any height and width, conditional on a class or on another image."""

from polydiff.core.adapter import Adapter, Condition, lazy

_here = "polydiff.modalities.image"

ADAPTER = Adapter(
    name="image",
    process=lazy("polydiff.core.processes:gaussian"),
    conditions={
        "label": Condition("class"),
        "image": Condition("field", None, read=lazy(f"{_here}.condition:read")),
        "augment": Condition("setting", None),
    },
    shape=lazy(f"{_here}.codec:shape"),
    dataset=lazy(f"{_here}.dataset:Images"),
    codec=lazy(f"{_here}.codec:Codec"),
    network={"unet": lazy(f"{_here}.network:unet"), "dit": lazy(f"{_here}.network:dit")},
    tasks={
        "inpaint": lazy(f"{_here}.tasks:inpaint"),
        "super-resolution": lazy(f"{_here}.tasks:super_resolution"),
        "colourise": lazy(f"{_here}.tasks:colourise"),
        "denoise": lazy(f"{_here}.tasks:denoise"),
        "variation": lazy(f"{_here}.tasks:variation"),
    },
    metrics=lazy(f"{_here}.metrics:metrics"),
    view=lazy(f"{_here}.view:view"),
    checks=lazy(f"{_here}.checks:checks"),
    symmetries=(),
    default_data="digits",
)
