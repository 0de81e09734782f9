"""ConditionalNAFNet against the authors' code: official layout, official outputs, full-size key list."""
import pytest
import torch
from golden_data import describe, full_size, names, network, shapes

from daclip_repro.nafnet import ConditionalNAFNet, load_released

FIXTURES = names('DenoisingNAFNet_arch')
SHAPES = shapes('*nafnet*.json')
CASES = [(name, out) for name in FIXTURES for out in describe(name)['tensors'] if out.startswith('out.')]


@pytest.mark.parametrize('name,out', CASES)
def test_output(name, out):
    "out.SIZE.TIME, where TIME is 'int' (one number) or 'batch' (one for each image)."
    meta, tensors, weights = network(name)
    _, size, kind = out.split('.')
    time = tensors[f'in.{size}.time_{kind}']
    net = load_released(weights, ConditionalNAFNet(**meta['config']))
    with torch.no_grad(): ours = net(tensors[f'in.{size}.xt'], tensors[f'in.{size}.cond'], time.item() if kind == 'int' else time)
    expected, tol = tensors[out], meta['tolerance'].get(out, meta['tolerance']['default'])
    assert ours.shape == expected.shape
    worst = ((ours - expected).abs().max() / expected.abs().max()).item()
    assert worst <= tol, f'{name} {out}: relative error {worst:.2e}, allowed {tol:.0e}'


@pytest.mark.parametrize('name', FIXTURES)
def test_layout_is_the_official_one(name):
    meta, _, weights = network(name)
    net = ConditionalNAFNet(**meta['config'])
    assert net.load_state_dict(weights, strict=True) and sum(p.numel() for p in net.parameters()) == meta['params']


@pytest.mark.parametrize('name', FIXTURES)
def test_no_weight_is_without_effect(name):
    meta, tensors, weights = network(name)
    net = load_released(weights, ConditionalNAFNet(**meta['config']))
    net(tensors['in.odd.xt'], tensors['in.odd.cond'], tensors['in.odd.time_batch']).square().sum().backward()
    silent = {k for k,p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent <= set(meta['insensitive_keys'])


@pytest.mark.parametrize('name', SHAPES)
def test_full_size_keys_and_shapes(name):
    spec = full_size(name)
    with torch.device('meta'): net = ConditionalNAFNet(**spec['meta']['setting'])
    assert {k: list(v.shape) for k,v in net.state_dict().items()} == spec['shapes']
    assert sum(p.numel() for p in net.parameters()) == spec['meta']['params']


def test_there_is_something_to_compare():
    assert FIXTURES and SHAPES
