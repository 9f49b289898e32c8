"""Norms, attention and embeddings against plain formulas; the perceptron."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from polydiff.core.errors import ConfigError
from polydiff.core.nn.attention import SelfAttention
from polydiff.core.nn.embeddings import Embedding, FourierFeatures
from polydiff.core.nn.mlp import MLP
from polydiff.core.nn.norms import group_norm, groups_for


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (4, 1), (7, 1), (32, 8), (48, 12), (128, 32), (192, 32), (90, 18)]
)
def test_groups_divide_the_channels(channels, groups):
    assert groups_for(channels) == groups


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("own", [False, True])
def test_group_norm_is_its_formula(layout, own):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 5, 4, generator=generator, dtype=torch.float64) * 3 + 1
    shape = (3, 8) if own else (8,)
    weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    grouped = x.view(3, 2, -1)
    mean, variance = grouped.mean(-1, keepdim=True), grouped.var(-1, correction=0, keepdim=True)
    expected = ((grouped - mean) / (variance + 1e-5).sqrt()).view(x.shape) * weight.view(-1, 8, 1, 1)
    expected = expected + bias.view(-1, 8, 1, 1)
    if layout == "last":
        x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(group_norm(x, 2, weight, bias), expected, atol=1e-12, rtol=0)
    everything = torch.ones(3, 1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(group_norm(x, 2, weight, bias, everything), expected, atol=1e-12, rtol=0)


def test_masked_group_norm_reads_valid_elements_alone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 9, generator=generator)
    weight, bias = torch.rand(2, 8, generator=generator), torch.rand(2, 8, generator=generator)
    mask = (torch.arange(9) < torch.tensor([[6], [9]])).float().unsqueeze(1)
    y = group_norm(x, 2, weight, bias, mask)
    torch.testing.assert_close(y[:1, :, :6], group_norm(x[:1, :, :6].contiguous(), 2, weight[:1], bias[:1]))
    assert not y[0, :, 6:].any()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_its_formula(masked):
    torch.manual_seed(0)
    layer = SelfAttention(8, head_channels=4).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    assert torch.equal(layer(x), x)
    torch.nn.init.normal_(layer.out.weight)
    mask = torch.ones(2, 1, 1, 4, dtype=torch.float64)
    if masked:
        mask[0, ..., 3] = 0
        x = x * mask
    tokens = group_norm(x, 2, layer.norm.weight, layer.norm.bias, mask).flatten(2).mT
    valid = mask.expand(2, 1, 3, 4).flatten(1).bool()
    y = torch.zeros_like(tokens)
    for i in range(2):
        q, k, v = layer.qkv(tokens[i]).chunk(3, dim=-1)
        for head in (slice(0, 4), slice(4, 8)):
            weights = (q[:, head] @ k[valid[i], head].mT / math.sqrt(4)).softmax(-1)
            y[i, :, head] = weights @ v[valid[i], head]
    expected = x + layer.out(y).mT.reshape(x.shape) * mask
    torch.testing.assert_close(layer(x, mask if masked else None), expected, atol=1e-12, rtol=0)


def test_fourier_features_keep_their_norm_and_tell_near_levels_apart():
    features = FourierFeatures(64)
    c = torch.linspace(-5, 5, 501)
    y = features(c)
    torch.testing.assert_close(y.square().sum(1), torch.full((501,), 64.0))
    # ... and the angle between features depends on the difference alone, falling from 1 as the kernel exp(-2 pi^2 d^2).
    kernel = (y @ features(torch.zeros(1)).mT).squeeze(1) / 64
    near = c.abs() < 0.3
    torch.testing.assert_close(kernel[near], torch.exp(-2 * math.pi**2 * c[near] ** 2), atol=0.03, rtol=0)
    with pytest.raises(ConfigError, match="even"):
        FourierFeatures(7)


@pytest.mark.parametrize("options", [{"width": 0}, {"width": -1}, {"blocks": 0}])
def test_a_perceptron_has_a_width_and_a_block(options):
    with pytest.raises(ConfigError, match="must be at least 1"):
        MLP(2, **options)


def test_embedding_refuses_a_field():
    with pytest.raises(ConfigError, match="field"):
        Embedding(8, {"guide": ("field", 3)})


def perceptron() -> MLP:
    torch.manual_seed(0)
    network = MLP(2, width=16, blocks=2, conditions={"label": 4, "style": ("tensor", 3)})
    assert not network(torch.randn(5, 2), torch.randn(5)).any()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def test_perceptron_uses_noise_level_and_conditions_item_by_item():
    network, x, c_noise = perceptron(), torch.randn(6, 2), torch.randn(6)
    cond = {"label": torch.arange(6) % 4, "style": torch.randn(6, 3)}
    present = {"label": torch.arange(6) < 3, "style": torch.arange(6) % 2 == 0}
    y = network(x, c_noise, None, cond, present)
    one = network(x[4:5], c_noise[4:5], None, {"style": cond["style"][4:5]})
    torch.testing.assert_close(y[4:5], one, atol=1e-6, rtol=0)
    assert (y - network(x, c_noise + 0.2, None, cond, present)).abs().amax(1).min() > 1e-5
    assert (y - network(x, c_noise, None, cond)).abs().amax(1).max() > 1e-4
    y.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_perceptron_ignores_padding():
    network, x, c_noise = perceptron(), torch.randn(2, 2), torch.randn(2)
    mask = torch.tensor([[True, False], [True, True]])
    y = network(x, c_noise, mask)
    assert y[0, 1] == 0
    x[0, 1] = 7
    assert torch.equal(y, network(x, c_noise, mask))


def test_perceptron_learns_a_function_of_its_condition():
    """Sign chosen by the class: impossible without reading it."""
    network = perceptron().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(150):
        x, label = torch.randn(64, 2), torch.randint(2, (64,))
        target = x * (2 * label - 1)[:, None]
        loss = F.mse_loss(network(x, torch.zeros(64), None, {"label": label}), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
