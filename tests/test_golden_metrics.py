"""PSNR, SSIM, luminance, rounding and the two resizes against the values of the authors' code."""
import re

import pytest
import torch
from golden_data import describe, recorded

from daclip_repro.metrics import Protocol, clip_transform, imresize, psnr, rgb_to_ycbcr, ssim, to_uint8

META = describe('metrics')
TOL = META['tolerance']
ATOL = TOL['ssim'] # images in [0,1] have no tolerance of their own: held to the tighter of the two
SCORE = re.compile(r'f64\.out\.(pair\d+)\.(?:c(\d+)\.)?(psnr|ssim)(_y|_uint8)?$')
RESIZE = re.compile(r'out\.imresize_x(\d+)(down|up)$')
LUMINANCE = re.compile(r'(?:f64\.)?out\.(pair\d+)\.(y_uint8|y_float|ycbcr_float)$')
NAMES = [n for n in META['tensors'] if 'out.' in n and not n.startswith('in.')]


@pytest.fixture(scope='module')
def golden(): return recorded('metrics')


def matching(pattern): return [n for n in NAMES if pattern.match(n)]


def as_batch(bgr): # H×W×3 uint8 BGR to 1×3×H×W float RGB
    return bgr.flip(-1).permute(2, 0, 1)[None].float()/255


def test_every_array_is_covered():
    covered = {n for p in (SCORE, RESIZE, LUMINANCE) for n in matching(p)} | {'out.tensor2img', 'out.clip_transform'}
    assert covered == set(NAMES)


@pytest.mark.parametrize('name', matching(SCORE))
def test_scores(golden, name):
    pair, crop, measure, variant = SCORE.match(name).groups()
    protocol = Protocol('golden', 'y' if variant == '_y' else 'rgb', crop=int(crop or 0))
    out, hq = (as_batch(golden[f'in.{pair}.{k}']) for k in ('out', 'gt'))
    value = {'psnr': psnr, 'ssim': ssim}[measure](out, hq, protocol)
    assert value.shape == (1,) and value.dtype == torch.float64
    assert abs(value.item() - golden[name].item()) <= TOL['psnr_db' if measure == 'psnr' else 'ssim']


AS_NAMED = [('rgb', 'c0.{}'), ('rgb', '{}_uint8'), ('rgb-crop4', 'c4.{}'), ('y', 'c0.{}_y'), ('y-crop4', 'c4.{}_y')]


@pytest.mark.parametrize('name, key', AS_NAMED)
def test_named_protocols_to_the_printed_digit(golden, name, key):
    for pair in ('pair0', 'pair1'):
        out, hq = (as_batch(golden[f'in.{pair}.{k}']) for k in ('out', 'gt'))
        for measure, f, digits in (('psnr', psnr, 2), ('ssim', ssim, 3)):
            assert f'{f(out, hq, name).item():.{digits}f}' == f"{golden[f'f64.out.{pair}.{key.format(measure)}'].item():.{digits}f}"


def test_a_wrong_protocol_does_not_pass(golden):
    for name in matching(SCORE):
        pair, crop, measure, variant = SCORE.match(name).groups()
        if measure == 'psnr' and crop:
            out, hq = (as_batch(golden[f'in.{pair}.{k}']) for k in ('out', 'gt'))
            right, other = ('y', 'rgb') if variant else ('rgb', 'y')
            for wrong in (Protocol('crop', right, crop=int(crop) + 1), Protocol('channel', other, crop=int(crop))):
                assert abs(psnr(out, hq, wrong).item() - golden[name].item()) > TOL['psnr_db'], (name, wrong.name)


@pytest.mark.parametrize('name', matching(LUMINANCE))
def test_luminance(golden, name):
    pair, what = LUMINANCE.match(name).groups()
    ycbcr = [rgb_to_ycbcr(as_batch(golden[f'in.{pair}.{k}']))[0].permute(1, 2, 0) for k in ('gt', 'out')]
    read = {'y_uint8': lambda x: (x[..., 0]*255).round().to(torch.uint8), 'y_float': lambda x: x[..., 0], 'ycbcr_float': lambda x: x}[what]
    # which image of the pair was converted is not in the file: one of them must fit, to the last level
    errors = [(read(x).double() - golden[name].double()).abs().max().item() for x in ycbcr]
    assert min(errors) <= (0 if what == 'y_uint8' else ATOL)


def test_tensor2img(golden):
    ours = to_uint8(golden['in.tensor']).flip(0).permute(1, 2, 0) # theirs is H×W×BGR
    assert torch.equal(ours, golden['out.tensor2img'])


def test_clip_transform(golden):
    ours = clip_transform(golden['in.hwc_float'].permute(2, 0, 1), META['clip_res'])
    assert (ours - golden['out.clip_transform']).abs().max() <= ATOL


@pytest.mark.parametrize('name', matching(RESIZE))
def test_imresize(golden, name):
    factor, way = RESIZE.match(name).groups()
    scale, want = int(factor) if way == 'up' else 1/int(factor), golden[name]
    img = golden['in.hwc_float'].permute(2, 0, 1)
    if way == 'up': img = img[:, :want.shape[1]//scale, :want.shape[2]//scale] # enlarged from the upper left corner
    ours = imresize(img, scale)
    assert ours.shape == want.shape and (ours - want).abs().max() <= ATOL
