"""NAFNet and the baselines: one call for all, conditions that arrive, and the originals where there are any."""
import copy

import pytest
import torch
from deepinv.models import PromptIR
from spandrel.architectures.NAFNet import NAFNet as SpandrelNAFNet
from torch import nn
from torchvision.ops import deform_conv2d

from daclip_repro.baselines import MINIATURES, REGRESSORS, AirNet, deform_conv, make_baseline, narrow_promptir
from daclip_repro.nafnet import ConditionalNAFNet, NAFNet, load_released

TINY = dict(width=16, enc_blk_nums=(1, 2), dec_blk_nums=(2, 1), context_dim=24)
BOTH = dict(use_degra_context=True, use_image_context=True)


def shake(net, seed=0):
    "Random values in place of the zeros and ones of a new network, except in what is not trained."
    torch.manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad and p.unique().numel() == 1: nn.init.normal_(p, p.flatten()[0].item(), .2)
    return net


def embeddings(n=2, seed=0):
    return torch.randn(2, n, 24, generator=torch.Generator().manual_seed(seed)).unbind()


@pytest.fixture(scope='module', params=REGRESSORS)
def regressor(request):
    return REGRESSORS[request.param](**MINIATURES[request.param])


def test_miniatures_and_regressors_have_the_same_names():
    assert set(MINIATURES) == set(REGRESSORS)


@pytest.mark.parametrize('size', [(1, 1), (7, 30), (33, 16)])
def test_untrained_returns_its_input(regressor, size):
    lq = torch.rand(2, 3, *size)
    with torch.no_grad(): assert torch.equal(regressor(lq), lq)


def test_every_trained_weight_matters_and_images_do_not_mix(regressor):
    net, lq = shake(copy.deepcopy(regressor)), torch.rand(2, 3, 36, 41)
    out = net(lq)
    (out.square().mean() + net.loss_extra(lq)).backward()
    silent = {k for k,p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not {k for k in silent if 'conv_du' not in k}  # MPRNet's channel attention: a ReLU that may be off for two images
    with torch.no_grad(): torch.testing.assert_close(net(lq[:1]), out[:1], rtol=1e-3, atol=1e-4)


def test_bad_images_are_refused(regressor):
    for bad in (torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.rand(1, 3, 0, 8)):
        with pytest.raises(ValueError, match='lq must be B×3×H×W'): regressor(bad)
    with pytest.raises(ValueError, match='floating-point'): regressor(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_plain_nafnet_is_the_original():
    theirs = shake(SpandrelNAFNet(width=8, enc_blk_nums=[1, 2], middle_blk_num=2, dec_blk_nums=[2, 1]))
    ours = NAFNet(width=8, enc_blk_nums=(1, 2), middle_blk_num=2, dec_blk_nums=(2, 1))
    load_released({'params': {f'module.{k}': v for k,v in theirs.state_dict().items()}}, ours)
    lq = torch.rand(2, 3, 19, 26)
    with torch.no_grad(): torch.testing.assert_close(ours(lq), theirs(lq), rtol=1e-4, atol=1e-5)


def test_files_are_read_and_misfits_listed(tmp_path):
    net = shake(NAFNet(**TINY))
    torch.save({'params': net.state_dict()}, tmp_path/'nafnet.pth')
    twin = load_released(tmp_path/'nafnet.pth', NAFNet(**TINY))
    assert all(torch.equal(a, b) for a,b in zip(net.state_dict().values(), twin.state_dict().values()))
    with pytest.raises(ValueError, match='missing: prompt'): load_released(tmp_path/'nafnet.pth', NAFNet(**TINY, use_degra_context=True))
    with pytest.raises(FileNotFoundError, match='nowhere.pth'): load_released(tmp_path/'nowhere.pth', net)
    torch.save([1], tmp_path/'list.pth')
    with pytest.raises(ValueError, match='holds a list'): load_released(tmp_path/'list.pth', net)


def test_untaught_degradation_changes_nothing():
    plain, told = shake(NAFNet(**TINY)), NAFNet(**TINY, use_degra_context=True)
    told.load_state_dict(plain.state_dict(), strict=False)
    lq = torch.rand(2, 3, 12, 20)
    with torch.no_grad(): torch.testing.assert_close(told(lq, told.precompute(embeddings()[0])), plain(lq), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('which', [0, 1])
def test_each_embedding_moves_its_own_image(which):
    net, lq = shake(NAFNet(**TINY, **BOTH)), torch.rand(2, 3, 12, 20)
    given = list(embeddings())
    with torch.no_grad():
        before = net(lq, net.precompute(*given))
        given[which] = torch.cat([given[which][:1], -given[which][1:]])
        after = net(lq, net.precompute(*given))
    torch.testing.assert_close(after[0], before[0])
    assert (after[1] - before[1]).abs().max() > 1e-4


def test_content_alone_and_where_it_enters():
    net = NAFNet(**TINY, use_image_context=True)
    assert [hasattr(b, 'att') for b in net.blocks()] == [False, False, True, True, False, True, False]
    assert net.precompute(image_context=embeddings()[1]).prompt is None
    assert all(b.mlp is None for b in net.blocks())


def test_contexts_that_do_not_fit_are_refused():
    net, lq, (e_d, e_c) = NAFNet(**TINY, **BOTH), torch.rand(2, 3, 8, 8), embeddings()
    context = net.precompute(e_d, e_c)
    for call, words in ((lambda: net(lq), 'context is missing'),
                        (lambda: net.precompute(e_d), 'image_context is missing'),
                        (lambda: net.precompute(None, e_c), 'text_context is missing'),
                        (lambda: net.precompute(e_d[:, :5], e_c), 'must be B×24'),
                        (lambda: net.precompute(e_d, e_c[0]), 'must be B×24'),
                        (lambda: NAFNet(**TINY)(lq, context), 'another shape'),
                        (lambda: net(torch.rand(3, 3, 8, 8), context), 'describes 2 images')):
        with pytest.raises(ValueError, match=words): call()
    shaken = shake(NAFNet(**TINY, **BOTH))
    one = shaken.precompute(e_d[:1], e_c[:1])
    with torch.no_grad(): torch.testing.assert_close(shaken(lq, one)[:1], shaken(lq[:1], one))


@pytest.mark.parametrize('sizes,words', [(dict(width=0), 'width must be'), (dict(enc_blk_nums=(1,)), 'as many levels'),
    (dict(enc_blk_nums=(), dec_blk_nums=()), 'at least one'), (dict(middle_blk_num=1.5), 'middle_blk_num must hold'),
    (dict(width=8, use_image_context=True), 'multiple of 32')])
def test_impossible_sizes_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words): NAFNet(**TINY | sizes)


def test_everything_learns_from_the_zero_start():
    net, lq, target = NAFNet(**TINY, **BOTH), torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    start, optimiser = {k: v.clone() for k,v in net.state_dict().items()}, torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(8):
        optimiser.zero_grad()
        (net(lq, net.precompute(*embeddings())) - target).abs().mean().backward()
        optimiser.step()
    still = [k for k,v in net.state_dict().items() if torch.equal(v, start[k])]
    # the softmax of cross-attention to one token is 1: see unet.Attention.one_token
    assert still and all('attn2.to_q' in k or 'attn2.to_k' in k or 'norm2' in k for k in still)


def test_time_network_is_told_the_time_only():
    net, x = ConditionalNAFNet(width=8, enc_blk_nums=(1,), dec_blk_nums=(1,)), torch.rand(1, 3, 9, 9)
    with pytest.raises(ValueError, match='context must be None'): net(x, x, 5, context=())
    with pytest.raises(ValueError, match='the same shape'): net(x, x[..., :5], 5)
    assert net(x, x, 5.).shape == x.shape


def test_deform_conv_is_torchvisions():
    torch.manual_seed(0)
    args = [torch.randn(2, 4, 7, 9), 3 * torch.randn(2, 18, 7, 9), torch.rand(2, 9, 7, 9), torch.randn(5, 4, 3, 3)]
    args = [a.double().requires_grad_() for a in args]
    ours, theirs = deform_conv(*args), deform_conv2d(args[0], args[1], args[3], padding=1, mask=args[2])
    torch.testing.assert_close(ours, theirs)
    up = torch.randn_like(ours)
    for a,b in zip(torch.autograd.grad(ours, args, up), torch.autograd.grad(theirs, args, up)): torch.testing.assert_close(a, b)


def test_contrast_keeps_its_queue_and_goes_on_after_a_resume():
    torch.manual_seed(0)
    net, lq = AirNet(dim=8, groups=1, blocks=1, queue=5, momentum=.5), torch.rand(3, 3, 16, 20)
    keys = [p.clone() for p in net.key_encoder.parameters()]
    first = net.queue.clone()
    with torch.no_grad(): shake(net.encoder, 1), [p.mul_(1.1) for p in net.encoder.parameters()]
    net.loss_extra(lq).backward()
    assert net.position == 3 and not torch.equal(net.queue[:3], first[:3]) and torch.equal(net.queue[3:], first[3:])
    for now, then, fast in zip(net.key_encoder.parameters(), keys, net.encoder.parameters()):
        torch.testing.assert_close(now, (then + fast) / 2)
        assert now.grad is None
    twin = AirNet(**net.config)
    twin.load_state_dict(net.state_dict())
    assert twin.loss_extra(lq) == net.loss_extra(lq)
    assert net.position == 1 and torch.equal(twin.queue, net.queue)
    torch.testing.assert_close(net.queue.norm(dim=1), torch.ones(5))


def test_narrow_promptir_has_the_library_s_shapes_at_full_width():
    with torch.device('meta'): library, ours, narrow = PromptIR(pretrained=None), narrow_promptir(patch=64), make_baseline('promptir')
    shapes = lambda net: {k: tuple(v.shape) for k,v in net.state_dict().items() if 'prompt_param' not in k}
    assert shapes(ours) == shapes(library) == shapes(narrow.net)
    assert tuple(narrow.net.prompt1.prompt_param.shape) == tuple(library.prompt1.prompt_param.shape)
    assert ours.prompt1.prompt_param.shape[-1] == 32


@pytest.mark.parametrize('call,words', [
    (lambda: make_baseline('swinir'), "'swinir' is unknown"),
    (lambda: make_baseline('mprnet', width=3), 'mprnet: an argument'),
    (lambda: make_baseline('promptir', dim=16), 'multiple of 12'), (lambda: AirNet(dim=0), 'dim must be'),
    (lambda: AirNet(dim=8)(torch.rand(1, 3, 8, 8), context=1), 'takes no embeddings'),
    (lambda: AirNet(dim=8).precompute(torch.rand(1, 8)), 'takes no embeddings')])
def test_baselines_say_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words): call()
