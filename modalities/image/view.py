"""What one looks at: generated beside real images, the way from noise, and the nearest real neighbour of each."""

from __future__ import annotations

import io
import math
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from polydiff.core.adapter import Fragment, Item
from polydiff.core.tree import State, leaves
from polydiff.modalities.image.codec import Codec
from polydiff.modalities.image.condition import NAME, same_condition

T = TypeVar("T")

COLUMNS = 8
TILES = 64  # images of a grid without classes
ROWS = 16  # classes that get a row each
STRIPS = 8
PAIRS = 16
GIVEN = 32  # pictures that samples were made of
CHUNK = 1024  # reference images compared at once
SMALL = 128  # sides up to here are drawn as crisp squares
STILL = 512  # least length of the longer side of the PNG

STYLE = """<style>
.iv-pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 28px 48px; }
.iv-row { display: grid; font-size: 13px; grid-template-columns: clamp(1.2em, var(--name), 7em) 1fr; gap: 12px; align-items: center; margin-bottom: 4px; }
.iv-row > span { color: var(--soft, #777); font-variant-numeric: tabular-nums; text-align: right; max-width: 7em; overflow-wrap: anywhere; }
.iv-tiles { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 4px; }
.iv-strips .iv-tiles { min-width: calc(var(--columns) * 34px); max-width: calc(var(--columns) * 84px); margin-bottom: 4px; }
.iv-near { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(64px, 12.5% - 14px), 1fr)); gap: 18px 14px; }
.iv-given { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); gap: 12px 36px; }
.iv-near figcaption { color: var(--soft, #777); font-size: 13px; text-align: center; font-variant-numeric: tabular-nums; }
.iv img { display: block; width: 100%; height: auto; border-radius: 2px; box-shadow: 0 0 0 1px var(--line, #ddd); }
.iv img.crisp { image-rendering: pixelated; }
.iv-near img + img { margin-top: 4px; }
.iv h4 { margin: 0 0 8px; font-size: 14px; font-weight: 550; color: var(--soft, #777); }
</style>"""


def view(samples: Sequence[Item], reference: Sequence[Item]) -> Fragment:
    """Draw samples beside real images.

    Args:
        samples: one or more; ``cond["label"]`` or ``meta["label"]`` orders them, ``meta["trajectory"]``
            (k, C, H, W) gives the filmstrip. Those made of a picture, ``cond["image"]``, are shown between it and the true
            one: ``meta["truth"]``, or the real image with the same condition.
        reference: real images; may be fewer than the samples, of other sizes, or none.
    Returns:
        HTML, and a grid of at most 64 samples as PNG.
    """
    ordered = sorted(samples, key=_order)
    given = triples(samples, reference)
    first = _given(given) if given else _beside(ordered, reference)
    html = f'<div class="iv">{STYLE}{first}{_filmstrip(ordered)}{_neighbours(ordered, reference)}</div>'
    if not given:
        return Fragment(html, png=still(_spread(ordered, TILES)))
    rows = [[condition, made[0], *truth] for condition, made, truth in given]
    rows = [row for row in _spread(rows, TILES // 3) if len(row) == len(rows[0])]
    across = max(1, round(math.sqrt(len(rows) / len(rows[0]))))
    return Fragment(html, png=still([Item(x) for row in rows for x in row], columns=across * len(rows[0])))


def still(samples: Sequence[Item], columns: int = 0) -> bytes:
    """A grid of images as PNG, enlarged without blur to 512 pixels or a little more, with transparent gaps."""
    images = [_rgb(_pixels(item.x)) for item in samples]
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    scale = max(1, math.ceil(STILL / max(rows * height, columns * width)))
    gap = max(2, round(0.06 * scale * min(height, width)))
    across, down = scale * width + gap, scale * height + gap
    grid = np.zeros((rows * down - gap, columns * across - gap, 4), np.uint8)
    for i, image in enumerate(images):
        large = image.repeat(scale, axis=0).repeat(scale, axis=1)
        top, left = i // columns * down, i % columns * across
        grid[top : top + large.shape[0], left : left + large.shape[1], :3] = large
        grid[top : top + large.shape[0], left : left + large.shape[1], 3] = 255
    return _png(grid)


def triples(samples: Sequence[Item], reference: Sequence[Item]) -> list[tuple[State, list[State], list[State]]]:
    """The pictures that samples were made of, each with those samples and with the true picture where it is known."""
    real = same_condition(reference)
    groups: list[tuple[State, list[State], list[State]]] = []
    for same, made in same_condition(samples).items():
        known = real.get(same, [])
        truth = [made[0].meta["truth"]] if "truth" in made[0].meta else [item.x for item in known[:1]]
        groups.append((made[0].cond[NAME], [item.x for item in made], truth))
    return groups


def _given(groups: Sequence[tuple[State, list[State], list[State]]]) -> str:
    """What was given, what was made of it and what is true, a row for each picture that was given."""
    shown = _spread(groups, GIVEN)
    many = min(COLUMNS - 2, max(len(made) for _, made, _ in shown))
    columns = 1 + many + any(truth for _, _, truth in shown)
    rows = "".join(
        f'<div class="iv-tiles" style="--columns:{columns}">{_image(condition, "Given")}'
        + "".join(_image(x, "Generated") for x in made[:many])
        + "<span></span>" * (many - len(made))
        + "".join(_image(x, "True") for x in truth)
        + "</div>"
        for condition, made, truth in shown
    )
    made = "the samples made of it" if many > 1 else "the sample made of it"
    true = ", last the true one" if columns > 1 + many else ""
    return (
        f'<h4>Given and generated</h4><p class="note">First the picture that was given, then {made}{true}.</p>'
        f'<div class="iv-given" style="--least:{columns * 56}px">{rows}</div>'
    )


def _beside(samples: Sequence[Item], reference: Sequence[Item]) -> str:
    """Samples and real images in the same order, by class where there are few."""
    names = list(dict.fromkeys(_label(item) for item in samples))
    parts = []
    for title, items in (("Generated", samples), ("Real", reference)):
        if not items:
            continue
        if 1 <= len(names) <= ROWS and "" not in names:
            rows = [(name, [item for item in items if _label(item) == name][:COLUMNS]) for name in names]
            columns = min(COLUMNS, max(sum(_label(item) == name for item in samples) for name in names))
            body = "".join(
                f'<div class="iv-row"><span>{escape(name)}</span>{_tiles(row[:columns], columns, title)}</div>'
                for name, row in rows
            )
        else:
            shown = _spread(items, min(TILES, len(samples)))
            body = _tiles(shown, min(COLUMNS, math.ceil(math.sqrt(len(shown)))), title)
        parts.append(f"<div><h4>{title}</h4>{body}</div>")
    longest = max(map(len, names), default=0)  # one width for all rows, so that their tiles stand below each other
    return f'<div class="iv-pair" style="--name:{longest}ch">{"".join(parts)}</div>'


def _tiles(items: Sequence[Item], columns: int, title: str) -> str:
    images = (_image(item.x, f"{title} {_label(item) or 'image'}") for item in items)
    return f'<div class="iv-tiles" style="--columns:{columns}">{"".join(images)}</div>'


def _filmstrip(samples: Sequence[Item]) -> str:
    """Predicted clean images while sampling, one row a sample."""
    strips = []
    for item in _spread([item for item in samples if "trajectory" in item.meta], STRIPS):
        states = [*leaves(item.meta["trajectory"])[0], leaves(item.x)[0]]
        if len(states) > 1 and torch.equal(states[-2].cpu(), states[-1].cpu()):
            states.pop()
        pictures = (_image(state, f"State {i + 1} of {len(states)}") for i, state in enumerate(states))
        strips.append(f'<div class="iv-tiles" style="--columns:{len(states)}">{"".join(pictures)}</div>')
    if not strips:
        return ""
    return (
        "<h3>From noise to sample</h3>"
        '<p class="note">The clean image that the model predicts along the way, one row a sample, time from left to right.</p>'
        f'<div class="iv-strips wide" tabindex="0" role="region" aria-label="Filmstrip">{"".join(strips)}</div>'
    )


def _neighbours(samples: Sequence[Item], reference: Sequence[Item]) -> str:
    """Each sample above the real image that is nearest to it, with their distance."""
    chosen = _spread(samples, PAIRS)
    shape = leaves(chosen[0].x)[0].shape
    chosen = [item for item in chosen if leaves(item.x)[0].shape == shape]
    real = [item for item in reference if leaves(item.x)[0].shape == shape]
    if not real:
        return ""
    distance, index = nearest([item.x for item in chosen], [item.x for item in real])
    typical = ""
    if len(real) > 2:
        few = _spread(range(len(real)), 64)
        among, _ = nearest([real[i].x for i in few], [item.x for item in real], exclude=few)
        typical = f" Between real images the median is {float(among.median()):.1f}; a sample far below that is most likely a copy."
    figures = "".join(
        f"<figure>{_image(item.x, 'Generated ' + _label(item))}{_image(real[int(j)].x, 'Nearest real ' + _label(real[int(j)]))}"
        f"<figcaption>{float(d):.1f}</figcaption></figure>"
        for item, d, j in zip(chosen, distance, index, strict=True)
    )
    return (
        "<h3>Nearest real neighbour</h3>"
        f'<p class="note">A sample above the nearest of {len(real):,} real images, and how far apart they are: '
        f"root-mean-square difference on the scale 0 to 255.{typical}</p>"
        f'<div class="iv-near">{figures}</div>'
    )


def nearest(queries: Sequence[State], reference: Sequence[State], exclude: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Distance to the nearest reference image, and its index.

    d(x, y) = 127.5 sqrt(mean (x - y)^2), the root-mean-square difference of 8-bit values.

    Args:
        queries: images (C, H, W) in [-1, 1], n of them.
        reference: m images of the same shape.
        exclude: for each query the index of the reference image that it is itself.
    Returns:
        distance (n,) float64 and index (n,) int64.
    """
    x = torch.stack([_flat(query) for query in queries])
    best, index = torch.full((len(x),), math.inf), torch.zeros(len(x), dtype=torch.int64)
    for start in range(0, len(reference), CHUNK):
        y = torch.stack([_flat(image) for image in reference[start : start + CHUNK]])
        d = torch.cdist(x, y)
        for row, own in enumerate(exclude):
            if start <= own < start + len(y):
                d[row, own - start] = math.inf
        low, place = d.min(1)
        index = torch.where(low < best, place + start, index)
        best = torch.minimum(low, best)
    # The fast distances above lose digits where they are small, which is where they matter.
    exact = [
        (row.double() - _flat(reference[int(j)]).double()).square().mean() for row, j in zip(x, index, strict=True)
    ]
    return 127.5 * torch.stack(exact).sqrt(), index


def _flat(image: State) -> Tensor:
    return leaves(image)[0].detach().float().cpu().flatten()


def _label(item: Item) -> str:
    if "label" in item.meta:
        return str(item.meta["label"])
    label = item.cond.get("label")
    return "" if label is None or int(label) < 0 else str(int(label))


def _order(item: Item) -> tuple[int, str]:
    label = item.cond.get("label")
    return (-1 if label is None else int(label), _label(item))


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly over all of them."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _pixels(x: State) -> np.ndarray:
    return Codec().decode(x)


def _rgb(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels


def _image(x: State, text: str) -> str:
    pixels = _pixels(x)
    height, width, _ = pixels.shape
    crisp = ' class="crisp"' if max(height, width) <= SMALL else ""
    address = f"data:image/png;base64,{b64encode(_png(pixels)).decode()}"
    return f'<img{crisp} width="{width}" height="{height}" alt="{escape(text.strip())}" src="{address}">'


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
