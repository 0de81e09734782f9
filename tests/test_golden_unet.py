"""The conditional U-Net against the authors' code: official layouts, official outputs, full-size key lists."""
import pytest
import torch
from golden_data import describe, full_size, names, network, shapes

from daclip_repro.unet import ConditionalUNet, load_official

FIXTURES = names('DenoisingUNet_arch')
SHAPES = [n for n in shapes('*unet*.json') if not n.startswith('supir')]
PROMPT = ('prompt', 'text_mlp.', 'prompt_mlp.')


def build(config, source='', **changes):
    "The configuration of the JSON; the in-the-wild code attends at the last level only."
    config = {**config, **changes}
    return ConditionalUNet(**config, attend_from=-1 if 'wild' in source else 3)


CASES = [(name, out) for name in FIXTURES for out in describe(name)['tensors'] if out.startswith('out.')]


def answer(meta, tensors, weights, out):
    "Our value for the output named `out`: out.SIZE[.VARIANT][.TIME] or a named intermediate."
    parts = out.split('.')[1:]
    if parts == ['time_emb']:
        time = tensors['in.odd.time_batch']
        return load_official(weights, build(meta['config'], meta['source'])).embed_time(time, len(time))
    if parts == ['prompt_embedding']:
        return load_official(weights, build(meta['config'], meta['source'])).prompt_embedding(tensors['in.odd.text_context'])
    size, *variants = parts
    changes = {}
    if 'nodegra' in variants:
        changes, weights = dict(use_degra_context=False), {k: v for k,v in weights.items() if not k.startswith(PROMPT)}
    unet = load_official(weights, build(meta['config'], meta['source'], **changes))
    time = tensors[f'in.{size}.time_batch'] if 'batch' in variants else tensors[f'in.{size}.time_int'].item()
    text = None if 'notext' in variants else tensors.get(f'in.{size}.text_context')
    return unet(tensors[f'in.{size}.xt'], tensors[f'in.{size}.cond'], time, text, tensors.get(f'in.{size}.image_context'))


@pytest.mark.parametrize('name,out', CASES)
def test_output(name, out):
    meta, tensors, weights = network(name)
    with torch.no_grad(): ours = answer(meta, tensors, weights, out)
    expected, tol = tensors[out], meta['tolerance'].get(out, meta['tolerance']['default'])
    assert ours.shape == expected.shape
    worst = ((ours - expected).abs().max() / expected.abs().max()).item()
    assert worst <= tol, f'{name} {out}: relative error {worst:.2e}, allowed {tol:.0e}'


@pytest.mark.parametrize('name', FIXTURES)
def test_precompute_gives_the_official_output(name):
    meta, tensors, weights = network(name)
    unet = load_official(weights, build(meta['config'], meta['source']))
    get = lambda what: tensors.get(f'in.odd.{what}')
    with torch.no_grad():
        ours = unet(get('xt'), get('cond'), get('time_batch'), context=unet.precompute(get('text_context'), get('image_context')))
    expected = tensors['out.odd.batch']
    assert (ours - expected).abs().max() <= meta['tolerance']['default'] * expected.abs().max()


@pytest.mark.parametrize('name', FIXTURES)
def test_layout_is_the_official_one(name):
    meta, _, weights = network(name)
    unet = build(meta['config'], meta['source'])
    assert unet.load_state_dict(weights, strict=True) and sum(p.numel() for p in unet.parameters()) == meta['params']


@pytest.mark.parametrize('name', FIXTURES)
def test_keys_said_to_have_no_effect_have_none(name):
    "norm2, attn2.to_q and attn2.to_k of every single-token cross-attention get no gradient; nothing else is cut off."
    meta, tensors, weights = network(name)
    unet = load_official(weights, build(meta['config'], meta['source']))
    get = lambda what: tensors.get(f'in.odd.{what}')
    unet(get('xt'), get('cond'), get('time_batch'), get('text_context'), get('image_context')).square().sum().backward()
    silent = {k for k,p in unet.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent <= set(meta['insensitive_keys'])


@pytest.mark.parametrize('name', SHAPES)
def test_full_size_keys_and_shapes(name):
    spec = full_size(name)
    with torch.device('meta'): unet = build(spec['meta']['setting'], name)
    assert {k: list(v.shape) for k,v in unet.state_dict().items()} == spec['shapes']
    assert sum(p.numel() for p in unet.parameters()) == spec['meta']['params']


def test_there_is_something_to_compare():
    assert FIXTURES and SHAPES
