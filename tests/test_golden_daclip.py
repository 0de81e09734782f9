"""DA-CLIP against the authors' code: official layouts, outputs, losses, initialisation, full-size key lists."""
import re

import pytest
import torch
import torch.nn.functional as F
from golden_data import describe, full_size, names, network, shapes

from daclip_repro.controller import DACLIP, clip_loss, daclip_loss, load_daclip_weights, make_clip, official_initialisation

INITIAL = [n for n in names('DaCLIP') if any(k.startswith('out.sd.') for k in describe(n)['tensors'])]
WHOLE = [n for n in names('DaCLIP') if n not in INITIAL]
SHAPES = [n for n in shapes('*daclip*.json') if 'unet' not in n]
CASES = [(name, out) for name in WHOLE for out in describe(name)['tensors'] if out.startswith('out.')]


def check(ours, expected, meta, out):
    tol = meta['tolerance'].get(out, meta['tolerance']['default'])
    assert ours.shape == expected.shape
    worst = ((ours - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    assert worst <= tol, f'{out}: relative error {worst:.2e}, allowed {tol:.0e}'


def streams(model, images):
    "The controls, and the frozen encoder's tokens behind each of its blocks, control added; both as N×B×width."
    tokens, (_, controls) = [], model.controls(images)
    tower = model.clip.visual
    hooks = [m.register_forward_pre_hook(lambda _, args: tokens.append(args[0])) for m in (*tower.transformer.resblocks[1:], tower.ln_post)]
    model.controlled(images, controls)
    for h in hooks: h.remove()
    return [[x.transpose(0, 1) for x in xs] for xs in (controls, tokens)]


def answer(model, images, text, out):
    "Our value for the output named `out`."
    caption, word = text.chunk(2, dim=1)
    match out.split('.')[1:]:
        case ['image_features']: return model.encode_image(images)[0]
        case ['degra_features']: return model.encode_image(images)[1]
        case ['image_features_norm']: return F.normalize(model.encode_image(images)[0], dim=-1)
        case ['degra_features_norm']: return F.normalize(model.encode_image(images)[1], dim=-1)
        case ['image_features_nocontrol']: return model.encode_image(images, control=False)
        case ['text_caption']: return model.encode_text(caption)
        case ['text_degra']: return model.encode_text(word)
        case ['fwd', key]: return model(images, text)[key]
        case ['loss', 'contrastive_loss']: return daclip_loss(**model(images, text))[0]
        case ['loss', 'degra_loss']: return daclip_loss(**model(images, text))[1]
        case ['loss', 'clip_only']:
            fwd = model(images, text)
            return clip_loss(fwd['image_features'], fwd['text_features'], fwd['logit_scale'])
        case [name] if found := re.fullmatch(r'(hidden|tokens_after_block)(\d+)', name):
            return streams(model, images)[found[1] != 'hidden'][int(found[2])]
    raise AssertionError(f'no answer to {out}')


@pytest.mark.parametrize('name,out', CASES)
def test_output(name, out):
    meta, tensors, weights = network(name)
    model = load_daclip_weights(weights, DACLIP(make_clip(meta['config'])))
    with torch.no_grad(): check(answer(model, tensors['in.image'], tensors['in.text'], out), tensors[out], meta, out)


@pytest.mark.parametrize('name', WHOLE)
def test_outputs_with_gradients_are_the_same(name):
    "PyTorch's attention takes another path in training: it must lead to the same place."
    meta, tensors, weights = network(name)
    model = load_daclip_weights(weights, DACLIP(make_clip(meta['config']))).train()
    for out in ('out.image_features', 'out.degra_features'):
        check(answer(model, tensors['in.image'], tensors['in.text'], out).detach(), tensors[out], meta, out)


@pytest.mark.parametrize('name', WHOLE)
def test_layout_is_the_official_one(name):
    meta, _, weights = network(name)
    model = DACLIP(make_clip(meta['config']))
    assert model.state_dict().keys() == weights.keys() and sum(p.numel() for p in model.parameters()) == meta['params_unique']


@pytest.mark.parametrize('name', WHOLE)
def test_of_two_copies_the_later_wins(name):
    meta, tensors, weights = network(name)
    weights = {k: torch.zeros_like(v) if k.startswith('clip.visual.') else v for k,v in weights.items()}
    model = load_daclip_weights(weights, DACLIP(make_clip(meta['config'])))
    with torch.no_grad(): check(model.encode_image(tensors['in.image'])[0], tensors['out.image_features'], meta, 'out.image_features')


@pytest.mark.parametrize('name', INITIAL)
def test_initialisation_with_the_official_mistake(name):
    meta, tensors, weights = network(name)
    clip = make_clip(meta['config'])
    clip.load_state_dict({k.removeprefix('clip.'): v for k,v in weights.items()})
    model = DACLIP(clip)
    ours, theirs = model.state_dict(), official_initialisation(DACLIP(clip)).state_dict()
    for out in (k for k in tensors if k.startswith('out.sd.')):
        key = out.removeprefix('out.sd.')
        assert torch.equal(theirs[key], tensors[out]), key
        mistaken = 'zero_modules.0' in key or 'visual_control.ln_post' in key
        assert torch.equal(ours[key], tensors[out]) != mistaken, f'without the mistake: {key}'
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == tensors['out.trainable_params'].item()


@pytest.mark.parametrize('name', SHAPES)
def test_full_size_keys_and_shapes(name):
    spec = full_size(name)
    with torch.device('meta'): model = DACLIP(make_clip(spec['meta']['config']))
    assert {k: list(v.shape) for k,v in model.state_dict().items()} == spec['shapes']
    assert sum(p.numel() for p in model.parameters()) == spec['meta']['params_unique']
    assert sum(p.numel() for p in model.visual_control.parameters()) == spec['meta']['params_controller']


@pytest.mark.parametrize('name', SHAPES)
def test_full_size_by_name(name):
    spec = full_size(name)
    with torch.device('meta'): model = DACLIP(make_clip(name))
    assert {k: list(v.shape) for k,v in model.state_dict().items()} == spec['shapes']


def test_there_is_something_to_compare():
    assert WHOLE and INITIAL and SHAPES
