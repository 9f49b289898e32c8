"""U-Net and DiT: sizes, conditions, padding, batch composition, memory layout, stability of their parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from polydiff.core.errors import ConfigError
from polydiff.core.nn.dit import DiT, patches, positions, unpatch
from polydiff.core.nn.unet import UNet

CONDITIONS = {"label": 10, "style": ("tensor", 6), "guide": ("field", 2)}


def redraw(network: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter off its initial value: zero-initialised outputs would pass any test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return network.eval()


def unet(axes: int = 2, **options) -> nn.Module:
    options = {"in_channels": 3, "channels": 16, "attention": (0, -1), "head_channels": 16, "blocks": 1} | options
    return UNet(axes, **options)


def dit(axes: int = 2, **options) -> nn.Module:
    options = {"in_channels": 3, "width": 32, "depth": 2, "head_channels": 16, "patch": 2} | options
    return DiT(axes, **options)


@pytest.fixture(params=[unet, dit], ids=lambda build: build.__name__)
def small(request) -> Callable[..., nn.Module]:
    """A small backbone with no parameter at its initial value."""

    def build(axes: int = 2, **options) -> nn.Module:
        torch.manual_seed(0)
        return redraw(request.param(axes, **options))

    return build


def conditions(x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "label": torch.randint(10, (len(x),), generator=generator),
        "style": torch.randn(len(x), 2, 3, generator=generator),
        "guide": torch.randn(len(x), 2, *x.shape[2:], generator=generator),
    }


def batch(b: int, *axes: int, channels: int = 3) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, channels, *axes, generator=generator)
    return x, torch.randn(b, generator=generator), generator


@pytest.mark.parametrize("size", [(1,), (7,), (32,), (8, 8), (13, 6), (1, 5), (4, 4, 4), (5, 3, 7), (1, 1, 1)])
def test_any_number_of_axes_and_any_size(small, size):
    x, c_noise, _ = batch(2, *size)
    y = small(len(size))(x, c_noise)
    assert y.shape == x.shape
    assert y.isfinite().all() and y.std() > 0.05


@pytest.mark.parametrize("build", [unet, dit])
def test_starts_at_zero_and_has_its_own_number_of_output_channels(build):
    x, c_noise, _ = batch(2, 8, 8)
    y = build(out_channels=5)(x, c_noise)
    assert y.shape == (2, 5, 8, 8)
    assert not y.any()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_gradient_reaches_every_parameter(small, axes):
    network = small(axes, conditions=CONDITIONS, dropout=0.1).train()
    x, c_noise, generator = batch(4, *(6,) * axes)
    present = {name: torch.tensor([True, False, True, False]) for name in CONDITIONS}
    network(x, c_noise, None, conditions(x, generator), present).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("name", CONDITIONS)
def test_an_absent_condition_is_the_null_embedding_whatever_its_value(small, name):
    network = small(conditions=CONDITIONS)
    x, c_noise, generator = batch(3, 6, 6)
    cond = conditions(x, generator)
    absent = {name: torch.zeros(3, dtype=torch.bool)}
    # A value that may not even be looked at: an impossible class, NaN.
    poison = cond | {name: torch.full_like(cond[name], 10**6 if name == "label" else torch.nan)}
    without = {key: value for key, value in cond.items() if key != name}
    y = network(x, c_noise, None, cond, absent)
    assert torch.equal(y, network(x, c_noise, None, poison, absent))
    assert torch.equal(y, network(x, c_noise, None, without))
    assert (y - network(x, c_noise, None, cond)).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_a_poisoned_absent_condition_leaves_the_gradient_clean(small):
    network = small(conditions={"style": ("tensor", 6)})
    x, c_noise, _ = batch(2, 4, 4)
    style = torch.stack([torch.zeros(6), torch.full((6,), torch.nan)])
    network(x, c_noise, None, {"style": style}, {"style": torch.tensor([True, False])}).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_each_item_has_its_own_noise_level_and_condition(small):
    network = small(conditions={"label": 10})
    x, c_noise, _ = batch(1, 6, 6)
    x = x.expand(3, -1, -1, -1)
    y = network(x, c_noise.repeat(3) + torch.tensor([0.0, 0.3, 0.0]), None, {"label": torch.tensor([1, 1, 2])})
    for i, j in itertools.combinations(range(3), 2):
        assert (y[i] - y[j]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(9,), (8, 8), (4, 5, 3)])
def test_a_batch_of_one_equals_a_slice_of_a_batch(small, size):
    network = small(len(size), conditions=CONDITIONS)
    x, c_noise, generator = batch(4, *size)
    cond = conditions(x, generator)
    whole = network(x, c_noise, None, cond)
    for i in range(4):
        one = network(x[i : i + 1], c_noise[i : i + 1], None, {name: v[i : i + 1] for name, v in cond.items()})
        torch.testing.assert_close(one[0], whole[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 7, 11, 16])
@pytest.mark.parametrize("size", [(16,), (3, 16), (2, 3, 16)])
def test_padding_behind_the_mask_changes_nothing(small, size, length):
    network = small(len(size))
    x, c_noise, _ = batch(2, *size)
    mask = torch.arange(16) < torch.tensor([[length], [16]])
    y = network(x, c_noise, mask)
    # As if the padding were not there at all: shorter input, no mask.
    alone = network(x[:1, ..., :length].contiguous(), c_noise[:1])
    torch.testing.assert_close(y[:1, ..., :length], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(y[1:], network(x[1:], c_noise[1:]), atol=1e-5, rtol=0)
    assert not y[0, ..., length:].any()
    x[0, ..., length:] = torch.nan
    assert torch.equal(y, network(x, c_noise, mask))


def test_an_item_that_is_all_padding_disturbs_nobody(small):
    network = small(1)
    x, c_noise, _ = batch(2, 12)
    mask = torch.tensor([[False], [True]]).expand(2, 12)
    y = network(x, c_noise, mask)
    assert not y[0].any()
    torch.testing.assert_close(y[1:], network(x[1:], c_noise[1:]), atol=1e-5, rtol=0)
    y.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(("axes", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_channels_last_gives_the_same_numbers(small, axes, layout):
    network = small(axes, conditions=CONDITIONS)
    x, c_noise, generator = batch(2, *(6,) * axes)
    cond = conditions(x, generator)
    y = network(x, c_noise, None, cond)
    other = network.to(memory_format=layout)(x.contiguous(memory_format=layout), c_noise, None, cond)
    torch.testing.assert_close(other.contiguous(), y, atol=1e-5, rtol=0)


def test_double_precision_runs_through(small):
    x, c_noise, _ = batch(2, 5, 4)
    network = small()
    exact = network.double()(x.double(), c_noise)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(network.float()(x, c_noise), exact.float(), atol=1e-4, rtol=0)


def test_parameters_keep_their_names_numbers_and_count():
    """Checkpoints live on these: a change here breaks every one that was shipped."""
    digits = UNet(2, 1, channels=32, multipliers=(1, 2), blocks=1, conditions={"label": 10})
    large = UNet(2, 3, channels=64, multipliers=(1, 2, 2, 3), blocks=(1, 2, 3, 2), middle=0, attention=(-2, -1))
    assert sum(p.numel() for p in digits.parameters()) == 394_081
    assert sum(p.numel() for p in large.parameters()) == 9_612_547
    keys = digits.state_dict().keys()
    assert {"first.weight", "down.1.conv1.weight", "middle.0.conv2.bias", "up.1.skip.weight", "last.bias"} <= keys
    assert {"modulation.weight", "embedding.conditions.label.null", "embedding.noise.0.frequencies"} <= keys
    transformer = DiT(2, 1, patch=4, width=128, depth=6, conditions={"label": 10})
    assert sum(p.numel() for p in transformer.parameters()) == 1_845_264
    keys = transformer.state_dict().keys()
    assert {"first.weight", "blocks.5.qkv.weight", "blocks.0.query_scale", "modulation.bias", "last.bias"} <= keys


def test_a_state_dict_moves_all_that_matters(small):
    one, other = small(conditions=CONDITIONS), redraw(small(conditions=CONDITIONS), seed=5)
    x, c_noise, _ = batch(2, 6, 6)
    assert not torch.equal(one(x, c_noise), other(x, c_noise))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x, c_noise), other(x, c_noise))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"axes": 4}, "axes=4"),
        ({"blocks": (1, 2)}, "blocks"),
        ({"blocks": 0}, "blocks"),
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"multipliers": (1, -2)}, "multipliers="),
        ({"head_channels": 0}, "head_channels=0 must be at least 1"),
        ({"attention": (3,)}, "0..2"),
        ({"channels": 48, "attention": (0,), "head_channels": 32}, "head_channels=32"),
        ({"conditions": {"label": 0}}, "label"),
        ({"conditions": {"label": ("image", 3)}}, "label"),
    ],
)
def test_impossible_arguments_of_the_unet_are_named(options, text):
    with pytest.raises(ConfigError, match=text):
        UNet(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"axes": 0}, "axes=0"),
        ({"patch": 0}, "patch=0 must be at least 1"),
        ({"depth": -1}, "depth=-1 must be at least 1"),
        ({"width": 100}, "width=100 is no multiple of head_channels=64"),
        ({"expansion": 0.0}, "expansion=0"),
        ({"conditions": {"label": ("class", 0)}}, "label"),
    ],
)
def test_impossible_arguments_of_the_dit_are_named(options, text):
    with pytest.raises(ConfigError, match=text):
        DiT(**options)


@pytest.mark.parametrize("lengths", [(7,), (4, 6), (5, 3, 7)])
def test_patches_come_apart_and_together(lengths):
    x = torch.randn(2, 3, *lengths, generator=torch.Generator().manual_seed(0))
    tokens, counts = patches(x, 3)
    assert counts == tuple(-(-length // 3) for length in lengths)
    assert torch.equal(tokens[1, 0].view(3, *(3,) * len(lengths))[:, 0, ...].flatten()[0], x[1, 0].flatten()[0])
    assert torch.equal(unpatch(tokens, counts, 3, lengths), x)


def test_patches_equal_those_of_unfold():
    x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    assert torch.equal(patches(x, 2)[0], expected)


def test_every_patch_has_a_position_of_its_own():
    waves = positions((5, 7), 32, torch.zeros(()))
    distance = torch.cdist(waves, waves) + 10 * torch.eye(35)
    assert waves.shape == (35, 32)
    assert distance.min() > 0.5
    # A step along an axis turns all waves by the same angle, wherever it starts.
    torch.testing.assert_close(waves[0] @ waves[1], waves[17] @ waves[18], atol=1e-5, rtol=0)


def test_patches_see_each_other_through_attention_alone():
    network = redraw(dit())
    x, c_noise, _ = batch(1, 8, 8)
    other = x.clone()
    other[..., 6:, 6:] += 1
    assert (network(other, c_noise) - network(x, c_noise))[..., :2, :2].abs().max() > 1e-3
    for block in network.blocks:
        torch.nn.init.zeros_(block.out.weight)
    assert torch.equal(network(other, c_noise)[..., :2, :2], network(x, c_noise)[..., :2, :2])


def test_an_input_of_other_channels_is_refused(small):
    with pytest.raises(ConfigError, match="the input has 5 channels, this network was built for "):
        small()(torch.zeros(1, 5, 4, 4), torch.zeros(1))


def test_an_undeclared_condition_is_refused(small):
    x, c_noise, _ = batch(1, 4, 4)
    with pytest.raises(ConfigError, match="did you mean label"):
        small(conditions={"label": 10})(x, c_noise, None, {"labl": torch.zeros(1, dtype=torch.int64)})


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_as_one_graph(small, masked, backend):
    network = small(1 if masked else 2, conditions={"label": 10})
    x, c_noise, _ = batch(2, *((12,) if masked else (7, 6)))
    mask = torch.arange(12) < torch.tensor([[5], [12]]) if masked else None
    cond, present = {"label": torch.tensor([1, 2])}, {"label": torch.tensor([True, False])}
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    y = network(x, c_noise, mask, cond, present)
    torch.testing.assert_close(compiled(x, c_noise, mask, cond, present), y, atol=1e-4, rtol=1e-4)


def test_at_the_start_the_blocks_of_the_dit_change_no_token_and_patches_know_their_place():
    torch.manual_seed(0)
    network = DiT(2, 1, width=32, depth=2, head_channels=16)
    torch.nn.init.normal_(network.last.weight)
    x, level = torch.randn(1, 1, 8, 8), torch.zeros(1)
    whole = network(x, level)
    turned = network(x.roll((2, 4), (2, 3)), level)
    assert (turned - whole.roll((2, 4), (2, 3))).abs().max() > 0.1
    network.blocks = torch.nn.ModuleList()
    network.modulation = torch.nn.Linear(32, 64)
    torch.nn.init.zeros_(network.modulation.weight)
    torch.nn.init.zeros_(network.modulation.bias)
    assert torch.equal(network(x, level), whole)
