"""The conditional U-Net: shapes, options, sizes, gradients, errors and checkpoints."""
import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from daclip_repro.unet import (
    ConditionalUNet,
    Context,
    LinearAttention,
    Upsample,
    load_official,
    pad_to_multiple,
    read_checkpoint,
    reflect_index,
    zero_last,
)


def small(seed=0, **options):
    "Every option on by default, with weights that are nowhere zero."
    torch.manual_seed(seed)
    unet = ConditionalUNet(**{**dict(nf=32, ch_mult=(1, 2), context_dim=24, attend_from=1), **options})
    for p in unet.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.1)
    return unet


def images(batch=2, h=13, w=10, seed=1):
    g = torch.Generator().manual_seed(seed)
    xt, mu = (torch.rand(batch, 3, h, w, generator=g) for _ in range(2))
    return xt, mu, torch.randn(batch, 24, generator=g), torch.randn(batch, 24, generator=g)


def close(a, b, tol=1e-5): assert (a - b).abs().max() <= tol * b.abs().max()


OPTIONS = [dict(), dict(use_degra_context=False), dict(use_image_context=False), dict(use_degra_context=False, use_image_context=False),
           dict(scale=0.5), dict(attend_from=-1), dict(attend_from=0), dict(attend_from=9)]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_precompute_equals_the_plain_call(options):
    unet, (xt, mu, e_d, e_c) = small(**options), images()
    with torch.no_grad():
        assert torch.equal(unet(xt, mu, 7, context=unet.precompute(e_d, e_c)), unet(xt, mu, 7, e_d, e_c))


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_every_parameter_learns_except_the_ones_said(options):
    unet, (xt, mu, e_d, e_c) = small(**options), images()
    unet(xt, mu, torch.tensor([3., 80.]), e_d, e_c).square().mean().backward()
    dead = {n for n,p in unet.named_parameters() if p.grad is None or not p.grad.any()}
    assert dead == {n for n,_ in unet.named_parameters() if 'norm2' in n or 'attn2.to_q' in n or 'attn2.to_k' in n}


def test_in_place_inference_equals_training_forward():
    unet, (xt, mu, e_d, e_c) = small(), images()
    kept = [v.clone() for v in (xt, mu, e_d, e_c)]
    with torch.no_grad(): quick = unet(xt, mu, 7, e_d, e_c)
    close(quick, unet(xt, mu, 7, e_d, e_c).detach())
    assert all(torch.equal(a, b) for a,b in zip(kept, (xt, mu, e_d, e_c)))


def test_gradients_are_those_of_finite_differences():
    "Of the regrouped linear attention and the merged upsampling, in float64."
    torch.manual_seed(0)
    attention, up = LinearAttention(4).double(), Upsample(3, 2).double()
    assert torch.autograd.gradcheck(attention, torch.randn(2, 4, 3, 2, dtype=torch.double, requires_grad=True), fast_mode=True)
    x = torch.randn(1, 3, 3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(up, {'1.weight': w}, (x,)), (x, up[1].weight))


@pytest.mark.parametrize('h,w', [(1, 1), (1, 5), (2, 9), (3, 3), (7, 7), (8, 8), (31, 17)])
@pytest.mark.parametrize('scale', [1, 0.5])
def test_any_size(h, w, scale):
    unet, (xt, mu, e_d, e_c) = small(scale=scale, ch_mult=(1, 1, 2)), images(1, h, w)
    with torch.no_grad(): out = unet(xt, mu, 7, e_d, e_c)
    assert out.shape == xt.shape and out.isfinite().all()


@pytest.mark.parametrize('side', range(1, 40))
def test_padding_is_reflect_padding_wherever_that_exists(side):
    x, extra = torch.randn(1, 2, side, side), -side % 16
    ours = pad_to_multiple(x, 16)
    assert ours.shape[-2:] == (side + extra, side + extra) and torch.equal(ours[..., :side, :side], x)
    if extra < side: assert torch.equal(ours, F.pad(x, [0, extra, 0, extra], mode='reflect'))
    index = reflect_index(side, 16)
    assert 0 <= index.min() and index.max() < side and (side == 1 or index.diff().abs().eq(1).all())


@pytest.mark.parametrize('time', [7, 7., torch.tensor(7), torch.tensor(7.), torch.tensor([7]), torch.tensor([7., 7.]),
                                  torch.full((2, 1, 1, 1), 7)], ids=repr)
def test_all_ways_to_give_the_time(time):
    unet, (xt, mu, e_d, e_c) = small(), images()
    with torch.no_grad(): close(unet(xt, mu, time, e_d, e_c), unet(xt, mu, torch.tensor([7, 7]), e_d, e_c))


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_an_image_does_not_depend_on_its_batch(options):
    unet, (xt, mu, e_d, e_c) = small(**options), images(3)
    t = torch.tensor([1., 50., 99.])
    with torch.no_grad():
        together = unet(xt, mu, t, e_d, e_c)
        for i in range(3): close(unet(xt[i:i+1], mu[i:i+1], t[i], e_d[i:i+1], e_c[i:i+1]), together[i:i+1])


def test_one_context_serves_a_whole_batch():
    unet, (xt, mu, e_d, e_c) = small(), images()
    with torch.no_grad():
        close(unet(xt, mu, 7, context=unet.precompute(e_d[:1], e_c[:1])), unet(xt, mu, 7, e_d[:1].expand(2, -1), e_c[:1].expand(2, -1)))


def test_contexts_matter_and_ignored_ones_do_not():
    (xt, mu, e_d, e_c), unet = images(), small()
    with torch.no_grad():
        base = unet(xt, mu, 7, e_d, e_c)
        assert not torch.equal(base, unet(xt, mu, 7, -e_d, e_c)) and not torch.equal(base, unet(xt, mu, 7, e_d, -e_c))
        assert not torch.equal(base, unet(xt, mu, 7, None, e_c))
        plain = small(use_degra_context=False, use_image_context=False)
        assert torch.equal(plain(xt, mu, 7, e_d, e_c), plain(xt, mu, 7))


def test_memory_order_of_the_input_does_not_matter():
    unet, (xt, mu, e_d, e_c) = small(), images()
    with torch.no_grad():
        base = unet(xt, mu, 7, e_d, e_c)
        other = unet(*(v.contiguous(memory_format=torch.channels_last) for v in (xt, mu)), 7, e_d, e_c)
    assert torch.equal(other, base) and base.is_contiguous()


@pytest.mark.parametrize('options,where', [(dict(attend_from=3), ['mid']), (dict(attend_from=-1), ['downs.2', 'mid', 'ups.0']),
    (dict(attend_from=1), ['downs.1', 'downs.2', 'mid', 'ups.0', 'ups.1']), (dict(use_image_context=False), [])], ids=str)
def test_where_the_content_enters(options, where):
    keys = small(ch_mult=(1, 2, 4), **options).state_dict()
    assert sorted({re.match(r'mid|(downs|ups)\.\d+', k)[0] for k in keys if 'transformer_blocks' in k}) == where


def shapes(unet): return {k: v.shape for k,v in unet.state_dict().items()}


def test_depth_is_the_doubling_layout_without_contexts():
    by_mult = ConditionalUNet(nf=8, ch_mult=(2, 4, 8), use_degra_context=False, use_image_context=False)
    assert shapes(ConditionalUNet(nf=8, depth=3)) == shapes(by_mult)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_config_rebuilds_the_network_through_json(options):
    unet = small(**options)
    twin = ConditionalUNet(**json.loads(json.dumps(unet.config)))
    assert shapes(twin) == shapes(unet) and twin.config == unet.config


def test_half_precision_follows_float32():
    "Same eps in every dtype: bfloat16 differs by its rounding, not by a different network."
    unet, (xt, mu, e_d, e_c) = small(), images()
    with torch.no_grad():
        base = unet(xt, mu, 7, e_d, e_c)
        close(unet.double()(xt.double(), mu.double(), 7, e_d.double(), e_c.double()).float(), base, 1e-5)
        with torch.autocast('cpu', torch.bfloat16): close(unet.float()(xt, mu, 7, e_d, e_c).float(), base, 0.06)


def test_meta_weights_can_be_filled_afterwards():
    "Nothing but the state_dict holds numbers: a network built without memory and then loaded is complete."
    unet, (xt, mu, e_d, e_c) = small(), images()
    with torch.device('meta'): hollow = ConditionalUNet(**unet.config)
    hollow.load_state_dict(unet.state_dict(), assign=True)
    with torch.no_grad(): assert torch.equal(hollow(xt, mu, 7, e_d, e_c), unet(xt, mu, 7, e_d, e_c))


def test_zero_last():
    unet, (xt, mu, e_d, e_c) = small(), images()
    assert zero_last(unet) is unet and not unet(xt, mu, 7, e_d, e_c).any()


BAD_CONFIGS = [
    (dict(nf=33, use_image_context=False), 'nf must be even'), (dict(nf=0), 'nf must be a whole number'), (dict(nf='64'), "got '64'"),
    (dict(in_nc=0), 'in_nc'), (dict(ch_mult=()), 'at least one level'), (dict(depth=0), 'at least one level'),
    (dict(ch_mult=(1, 0)), r'ch_mult\[1\]'), (dict(ch_mult=(1, 1.5)), r'ch_mult\[1\]'), (dict(scale=2), 'scale must be 1'),
    (dict(context_dim=None), 'context_dim must be'), (dict(attend_from=-3), 'counts back further'),
    (dict(nf=16, ch_mult=(1, 3)), 'multiple of 32'), (dict(nf=16, ch_mult=(1, 2), attend_from=0), '16 channels'),
]


@pytest.mark.parametrize('options,says', BAD_CONFIGS, ids=[str(b[0]) for b in BAD_CONFIGS])
def test_what_cannot_be_built_is_refused_in_a_sentence(options, says):
    with pytest.raises(ValueError, match=says) as e: small(**options)
    assert '\n' not in str(e.value)


BAD_CALLS = {
    'no content': (lambda u, x, m, d, c: u(x, m, 7, d), 'image_context is missing'),
    'content of another length': (lambda u, x, m, d, c: u(x, m, 7, d, c[:, :5]), 'image_context must be B×24'),
    'content without batch': (lambda u, x, m, d, c: u(x, m, 7, d, c[0]), 'image_context must be B×24'),
    'degradation of another length': (lambda u, x, m, d, c: u(x, m, 7, d.repeat(1, 2), c), r'text_context must be B×24 .* got 2×48'),
    'contexts for another batch': (lambda u, x, m, d, c: u(x, m, 7, d.repeat(2, 1), c), 'the contexts describe 4 images, xt holds 2'),
    'both': (lambda u, x, m, d, c: u(x, m, 7, d, c, context=u.precompute(d, c)), 'not both'),
    'context of another network': (lambda u, x, m, d, c: u(x, m, 7, context=Context(None, ())), 'another shape'),
    'grey': (lambda u, x, m, d, c: u(x[:, :1], m[:, :1], 7, d, c), 'xt has 1 channels'),
    'no batch': (lambda u, x, m, d, c: u(x[0], m[0], 7, d, c), 'xt must be B×3×H×W'),
    'empty': (lambda u, x, m, d, c: u(x[..., :0], m[..., :0], 7, d, c), 'no side of 0'),
    'two sizes': (lambda u, x, m, d, c: u(x, m[..., 1:], 7, d, c), 'same shape'),
    'bytes': (lambda u, x, m, d, c: u((x*255).byte(), m, 7, d, c), 'floating-point'),
    'three times for two images': (lambda u, x, m, d, c: u(x, m, torch.ones(3), d, c), 'one number or 2 numbers'),
}


@pytest.mark.parametrize('case', BAD_CALLS)
def test_wrong_calls_get_a_sentence(case):
    call, says = BAD_CALLS[case]
    with pytest.raises(ValueError, match=says) as e: call(small(), *images())
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['weights.safetensors', 'weights.pth', 'wrapped.pth', 'parallel.pth'])
def test_checkpoints_load_in_every_official_wrapping(tmp_path, name):
    unet, (xt, mu, e_d, e_c), path = small(), images(), tmp_path/name
    sd = {('module.' if name == 'parallel.pth' else '') + k: v for k,v in unet.state_dict().items()}
    if path.suffix == '.safetensors': save_file(sd, path)
    else: torch.save({'state_dict': sd} if name == 'wrapped.pth' else sd, path)
    twin = load_official(path, small(seed=5))
    with torch.no_grad(): assert torch.equal(twin(xt, mu, 7, e_d, e_c), unet(xt, mu, 7, e_d, e_c))


def test_misfit_names_the_keys_and_changes_nothing():
    unet, other = small(), small(seed=5)
    before = {k: v.clone() for k,v in other.state_dict().items()}
    weights = unet.state_dict() | {'prompt': torch.zeros(1, 3), 'extra.weight': torch.zeros(2)}
    del weights['final_conv.bias']
    with pytest.raises(ValueError) as e: load_official(weights, other)
    assert str(e.value) == ('the state_dict does not fit this ConditionalUNet: 1 missing: final_conv.bias; 1 unexpected: extra.weight; '
                            '1 of the wrong shape: prompt (1×3, expected 1×128)')
    assert all(torch.equal(before[k], v) for k,v in other.state_dict().items())


def test_misfit_of_hundreds_of_keys_stays_readable():
    with pytest.raises(ValueError, match=r'missing: .* and \d+ more') as e: load_official({}, small())
    assert len(str(e.value)) < 600


class Evil:
    def __reduce__(self): return (open, ('evil_was_here', 'w'))


def test_files_that_are_no_weights_get_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'a': Evil()}, 'evil.pth')
    torch.save([1, 2], 'list.pth')
    save_file({'a': torch.ones(1000)}, 'cut.safetensors')
    (tmp_path/'cut.safetensors').write_bytes((tmp_path/'cut.safetensors').read_bytes()[:200])
    (tmp_path/'text.pth').write_text('not weights'), (tmp_path/'empty.pth').touch(), (tmp_path/'empty.safetensors').touch()
    for name in ('evil.pth', 'list.pth', 'cut.safetensors', 'text.pth', 'empty.pth', 'empty.safetensors'):
        with pytest.raises(ValueError, match=name) as e: load_official(name, small())
        assert '\n' not in str(e.value)
    assert not (tmp_path/'evil_was_here').exists()
    with pytest.raises(FileNotFoundError, match='nowhere.pth'): read_checkpoint('nowhere.pth')
    with pytest.raises(FileNotFoundError): read_checkpoint(tmp_path)
