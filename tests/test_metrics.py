"""Scores against scikit-image and torchmetrics, what happens without weights, rows, and refusals."""
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.io import imread, imsave
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from daclip_repro import metrics as M
from daclip_repro.photos import packaged_photos

H, W = 45, 58
OFFICIAL = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1., channel_axis=2) # of scikit-image
SMALL = torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(0))
WORSE = (SMALL + .1*torch.randn(SMALL.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    "Thirty pairs of photographs, saved as PNG and read back: H×W×3 uint8."
    folder, g, photos = tmp_path_factory.mktemp('pairs'), np.random.default_rng(0), [p.load() for p in packaged_photos()]
    for i in range(30):
        photo = photos[i % len(photos)]
        y, x = g.integers(0, photo.shape[1] - H), g.integers(0, photo.shape[2] - W)
        hq = photo[:, y:y + H, x:x + W].permute(1, 2, 0).numpy()
        out = np.clip(hq*g.uniform(.7, 1) + g.normal(0, g.uniform(.01, .2), hq.shape), 0, 1)
        for name, img in (('hq', hq), ('out', out)):
            imsave(folder/f'{i}_{name}.png', np.rint(img*255).astype(np.uint8), check_contrast=False)
    return [tuple(imread(folder/f'{i}_{name}.png') for name in ('out', 'hq')) for i in range(30)]


def as_batch(imgs): return torch.stack([torch.from_numpy(i).permute(2, 0, 1).float()/255 for i in imgs])


def by_hand(img, protocol): # independent preparation: scikit-image's conversion, numpy's slicing
    c = protocol.crop
    img = (rgb2ycbcr(img)[..., :1] if protocol.channel == 'y' else img.astype(float))/255
    return img[c:img.shape[0] - c, c:img.shape[1] - c]


@pytest.mark.parametrize('name', M.PROTOCOLS)
def test_thirty_files_agree_with_scikit_image_and_torchmetrics(pairs, name):
    from torchmetrics.functional.image import peak_signal_noise_ratio as tm_psnr
    from torchmetrics.functional.image import structural_similarity_index_measure as tm_ssim
    p, outs, hqs = M.PROTOCOLS[name], *map(as_batch, zip(*pairs))
    psnrs, ssims = M.psnr(outs, hqs, p), M.ssim(outs, hqs, p)
    for i, pair in enumerate(pairs):
        out, hq = (by_hand(x, p) for x in pair)
        assert psnrs[i].item() == pytest.approx(peak_signal_noise_ratio(hq, out, data_range=1.), abs=1e-6)
        theirs = structural_similarity(hq, out, **OFFICIAL)
        assert ssims[i].item() == pytest.approx(theirs, abs=1e-8 if p.round_uint8 else 1e-7) # unrounded, a float32 is k/255 only nearly
        o, h = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (out, hq))
        assert psnrs[i].item() == pytest.approx(tm_psnr(o, h, data_range=1.).item(), abs=1e-5) # its logarithm is taken in float32
        if i < 5: # torchmetrics counts windows over the reflected border as well: compare where the window fits
            _, full = tm_ssim(o, h, data_range=1., return_full_image=True)
            assert ssims[i].item() == pytest.approx(full[..., 5:-5, 5:-5].mean().item(), abs=1e-7)


def test_real_numbers_are_rounded_only_where_the_protocol_says_so(pairs):
    hq = as_batch([hq for _, hq in pairs])
    out = (hq + .05*torch.randn(hq.shape, generator=torch.Generator().manual_seed(3))).double() # beyond [0,1] as well
    rounded = (out.clamp(0, 1)*255).round()/255
    for name, theirs, c in (('raw', out, 0), ('rgb', rounded, 0), ('rgb-crop4', rounded, 4)):
        for i, ours in enumerate(M.psnr(out, hq, name).tolist()):
            x, y = (im[i, :, c:H - c, c:W - c].double().numpy() for im in (theirs, hq))
            assert ours == pytest.approx(peak_signal_noise_ratio(y, x, data_range=1.), abs=1e-5)
            assert f'{ours:.2f}' == f'{peak_signal_noise_ratio(y, x, data_range=1.):.2f}'


def test_a_batch_is_its_images_one_by_one(pairs):
    outs, hqs = map(as_batch, zip(*pairs[:5]))
    for f in (M.psnr, M.ssim): assert torch.equal(f(outs, hqs), torch.cat([f(o, h) for o, h in zip(outs, hqs)]))


def test_ssim_of_a_large_image_crosses_tiles():
    hq = torch.rand(1, 3, 150, 211, generator=torch.Generator().manual_seed(2))
    out = (hq + .1).clamp(0, 1)
    theirs = structural_similarity(*(x[0].permute(1, 2, 0).double().numpy() for x in (hq, out)), **OFFICIAL)
    assert M.ssim(out, hq, 'raw').item() == pytest.approx(theirs, abs=1e-8)


def test_identical_images_and_nan():
    assert M.psnr(SMALL, SMALL).tolist() == [float('inf')]*3
    assert M.ssim(SMALL, SMALL).tolist() == pytest.approx([1.]*3)
    broken = SMALL.clone()
    broken[1, 0, 0, 0] = float('nan')
    assert M.psnr(broken, SMALL, 'raw').isnan().tolist() == [False, True, False]
    assert M.psnr(broken, SMALL, 'rgb').isnan().tolist() == [False, True, False]


def test_data_range_is_the_peak():
    wide = replace(M.PROTOCOLS['raw'], name='wide', data_range=2.)
    assert (M.psnr(WORSE, SMALL, wide) - M.psnr(WORSE, SMALL, 'raw')).tolist() == pytest.approx([20*np.log10(2)]*3)


@pytest.mark.parametrize('call, message', [
    (lambda: M.psnr(SMALL, SMALL[:2]), 'same size'),
    (lambda: M.psnr(SMALL[:, :1], SMALL[:, :1]), 'must be B×3×H×W'),
    (lambda: M.psnr((SMALL*255).byte(), (SMALL*255).byte()), 'must be float'),
    (lambda: M.psnr(SMALL, SMALL*255), r'must lie in \[0,1\]; it spans'),
    (lambda: M.psnr(SMALL, SMALL, 'RGB'), "'RGB' is not known"),
    (lambda: M.psnr(SMALL[..., :8], SMALL[..., :8], 'rgb-crop4'), 'nothing is left of a 32×8 image'),
    (lambda: M.ssim(SMALL[..., :18], SMALL[..., :18], 'rgb-crop4'), "at least 11×11 px; protocol 'rgb-crop4' leaves 24×10"),
    (lambda: M.METRICS['stlpips'](SMALL[..., :20], SMALL[..., :20]), 'at least 21 px, not 32×20'),
    (lambda: M.METRICS['niqe'](SMALL[..., :96]), 'two blocks of 96×96 px, not 32×40'),
    (lambda: M.METRICS['niqe'](torch.zeros(3, 191, 191)), 'two blocks of 96×96 px, not 191×191'),
    (lambda: M.METRICS['niqe'](SMALL.byte()), 'must be float'),
    (lambda: M.METRICS['niqe'](SMALL[:, :1]), 'must be B×3×H×W'),
    (lambda: M.psnr(SMALL, SMALL.byte()), 'must be float'),
    (lambda: M.score(SMALL, metrics=['psnr']), r'psnr compares with a clean image, but hq is None: .* that need none \(niqe\)'),
    (lambda: M.METRICS['lpips'](SMALL), 'lpips compares with a clean image'),
    (lambda: M.score(SMALL, SMALL, metrics=['fid']), "metric 'fid' is not known; expected psnr"),
    (lambda: M.score(SMALL, SMALL, names=['a']), '1 names were given for 3 images'),
    (lambda: M.score(SMALL, SMALL, protocol_='x', metrics=['psnr'], image='x'), "stamp 'image' would overwrite"),
    (lambda: M.score_set(SMALL, SMALL, metrics=['psnr']), "set metric 'psnr' is not known"),
    (lambda: M.frechet_distance(SMALL.flatten(1)[:1], SMALL.flatten(1)), 'at least 2 images'),
    (lambda: M.kernel_distance(SMALL.flatten(1)[:1], SMALL.flatten(1)), 'at least 2 images'),
    (lambda: M.Protocol('p', crop=-1), 'crop must be whole pixels'),
    (lambda: M.Protocol('p', data_range=0), 'data_range must be > 0'),
    (lambda: M.imresize(SMALL, .3), 'imresize takes scales such as'),
])
def test_refused_with_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as e: call()
    assert '\n' not in str(e.value)


def test_rows():
    rows = M.score(WORSE, SMALL, 'y', names=list('abc'), method='none', seed=3)
    assert [r['image'] for r in rows] == list('abc')
    assert {r['protocol'] for r in rows} == {'y'} and {r['stlpips_protocol'] for r in rows} == {'raw'} and {r['seed'] for r in rows} == {3}
    assert [r['psnr'] for r in rows] == M.psnr(WORSE, SMALL, 'y').tolist()
    json.dumps(rows, allow_nan=False)


def test_own_metric_joins():
    class MAE(M.Metric):
        name = 'mae'
        def measure(self, out, hq, protocol): return (protocol.prepare(out) - protocol.prepare(hq)).abs().mean((1, 2, 3))
    row = M.score(WORSE, SMALL, metrics=('psnr', MAE()))[0]
    assert 0 < row['mae'] < .1 and 'mae_protocol' not in row


# ---- weights

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty torch cache and no way out."
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(M, 'reachable', lambda url, timeout=0: False)
    (tmp_path/'hub'/'checkpoints').mkdir(parents=True)
    return tmp_path/'hub'/'checkpoints'


def test_without_weights_none_and_a_reason(hub, capfd):
    m = M.LPIPS()
    assert not m.available and m(WORSE, SMALL) is None
    assert m.why_not.startswith("weights alexnet-owt-7be5be79.pth are not in torch's cache") and str(hub) not in m.why_not
    rows = M.score(WORSE, SMALL, metrics=('psnr', m))
    assert [r['lpips'] for r in rows] == [None]*3 and rows[0]['lpips_protocol'] == 'raw'
    fid = M.SetMetric('fid', M.Inception(), M.frechet_distance)
    row = M.score_set(WORSE, SMALL, metrics=[fid])
    assert row['fid'] is None and 'pt_inception' in fid.why_not
    with pytest.raises(RuntimeError, match='lpips is not available: weights'): _ = m.network
    assert capfd.readouterr().err == ''


def test_loading_is_tried_once(hub, monkeypatch):
    calls = []
    monkeypatch.setattr(M, 'reachable', lambda *a: bool(calls.append(a)))
    m = M.LPIPS()
    for _ in range(3): assert not m.available and m(WORSE, SMALL) is None
    assert len(calls) == 1


def test_unreachable_is_found_out_in_time(monkeypatch):
    never = threading.Event()
    def hang(*args, **kwargs):
        never.wait(30)
        raise OSError
    monkeypatch.setattr(M, 'urlopen', hang) # a name server that never answers
    start = time.monotonic()
    assert not M.reachable('http://example.invalid/x', timeout=.3)
    assert time.monotonic() - start < 5
    never.set()


def test_lpips_runs_through_the_packages_loader(hub):
    "With a file of AlexNet's layout under the right name (random numbers: this tests the way, not the value)."
    from torchvision.models import alexnet
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), hub/'alexnet-owt-7be5be79.pth')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        m = M.LPIPS()
        assert m.available, m.why_not
    big, bad = (torch.nn.functional.interpolate(x, size=64) for x in (SMALL, WORSE))
    both = m(bad, big)
    assert both.shape == (3,) and (both > 0).all() and m(big, big).tolist() == [0.]*3
    assert torch.allclose(m(bad[1:2], big[1:2]), both[1:2], rtol=1e-4)


def test_damaged_and_malicious_weights_are_refused(hub):
    path = hub/'alexnet-owt-7be5be79.pth'
    path.write_bytes(b'not a checkpoint')
    assert 'cannot be read as tensors; delete the file' in M.LPIPS().why_not
    class Evil:
        def __reduce__(self): return os.mkdir, (str(hub/'hacked'),)
    torch.save({'a': Evil()}, path)
    assert 'cannot be read as tensors' in M.LPIPS().why_not and not (hub/'hacked').exists()


def test_importing_loads_no_metric_package():
    code = ('import sys, daclip_repro.metrics as m\n'
            'assert not m.METRICS["psnr"].why_not\n'
            'heavy = "lpips", "pytorch_fid", "stlpips_pytorch", "efficientnet_lite_pytorch", "torchmetrics"\n'
            'print([p for p in heavy if p in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# ---- ST-LPIPS

def test_stlpips_is_the_packages_value_and_keeps_no_stale_features():
    from stlpips_pytorch import stlpips
    net = stlpips.LPIPS(net='alex', variant='shift_tolerant', verbose=False)
    with torch.no_grad(): want = net(WORSE, SMALL, normalize=True).flatten().double()
    m = M.STLPIPS()
    hq = SMALL.clone()
    assert torch.allclose(m(WORSE, hq), want, atol=1e-6)
    assert torch.equal(m(WORSE, hq), m(WORSE, SMALL))
    hq.copy_(WORSE) # changed in place: must be noticed
    assert m(WORSE, hq).tolist() == [0.]*3
    m.remember_px = 0
    assert torch.allclose(m(WORSE, SMALL), want, atol=1e-6)
    assert torch.allclose(m(WORSE[2:], SMALL[2:]), want[2:], atol=1e-6)


def test_stlpips_smallest_image():
    m = M.METRICS['stlpips']
    assert m(WORSE[..., :21, :21], SMALL[..., :21, :21]).isfinite().all()


# ---- NIQE

# NaturalImageQualityEvaluator(convert_to='y') of the package mmeval 0.2.1, on the 8-bit photograph and on photograph ^ 15;
# the last two have flat parts, where the last digit of the arithmetic decides which side of zero a pixel counts on.
BY_MMEVAL = {'chelsea': (2.6255266, 4.8463743), 'coffee': (4.1153315, 6.1749337), 'rocket': (6.9709494, 6.9976936),
             'motorcycle': (2.6723735, 3.8515859), 'flower': (4.8933189, 5.5999656), 'astronaut': (3.1004469,), 'china': (4.2732560,)}


@pytest.mark.parametrize('name', BY_MMEVAL)
def test_niqe_is_the_value_of_mmeval(name):
    photo = M.to_uint8(next(p for p in packaged_photos() if p.name == name).load())
    for img, want in zip((photo, photo ^ 15), BY_MMEVAL[name]):
        assert M.METRICS['niqe'](img/255).item() == pytest.approx(want, rel=1e-4 if name in ('astronaut', 'china') else 1e-6)


def test_niqe_of_a_batch_looks_at_out_alone_and_only_at_whole_blocks():
    m, photos = M.METRICS['niqe'], torch.stack([p.load()[:, :200, :240] for p in packaged_photos()[:3]])
    both = m(photos)
    assert both.dtype == torch.float64 and torch.allclose(torch.cat([m(p) for p in photos]), both, rtol=1e-9)
    assert torch.equal(m(photos, photos[:, :, :9]*99, 'rgb-crop4'), both) # neither hq nor the caller's protocol counts
    ragged = photos.clone()
    ragged[..., 192:, :] = ragged[..., 192:] = 0
    assert torch.equal(m(ragged), both)
    assert m(photos[..., :96, :192]).isfinite().all()


def test_niqe_of_black_blocks():
    "Six of eight blocks have no contrast at all: mmeval counts only their α, the smallest of the table, and its value is 17.528182."
    m, photo = M.METRICS['niqe'], packaged_photos()[1].load()[:, :192, :384].clone()
    photo[..., 80:] = 0
    assert m(photo).item() == pytest.approx(17.528182, rel=1e-6)
    assert m(photo[:, :96]).isnan() # one block with contrast: no covariance
    assert m(torch.zeros(3, 192, 192)).isnan() and m(torch.full((3, 192, 192), torch.nan)).isnan()


def test_scores_without_clean_images():
    photos = torch.stack([p.load()[:, :192, :192] for p in packaged_photos()[:2]])
    rows = M.score(photos, metrics=['niqe'], names='ab', method='none')
    assert [list(r) for r in rows] == [['image', 'method', 'protocol', 'niqe', 'niqe_protocol']]*2
    assert [r['niqe'] for r in rows] == M.METRICS['niqe'](photos).tolist() and rows[0]['niqe_protocol'] == 'y'
    beside = M.score(photos, photos.flip(0), metrics=['psnr', 'niqe'])
    assert [r['niqe'] for r in beside] == [r['niqe'] for r in rows]
    with pytest.raises(ValueError, match='stlpips compares with a clean image'): M.score(photos, metrics=['niqe', 'stlpips'])


def test_niqe_without_its_package(monkeypatch):
    monkeypatch.setattr(M, 'find_spec', lambda name: None)
    m = M.NIQE()
    assert not m.available and m(SMALL) is None and m.why_not == "the package mmeval, which holds NIQE's parameters, is not installed"
    assert M.score(SMALL, metrics=[m])[0]['niqe'] is None


def test_niqe_imports_no_package():
    code = ('import sys, daclip_repro.metrics as m\n'
            'assert m.METRICS["niqe"].available, m.METRICS["niqe"].why_not\n'
            'print([p for p in ("mmeval", "cv2") if p in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# ---- sets

def clouds(n1, n2, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g).double()
    return torch.randn(n1, d, generator=g).double(), torch.randn(n2, d, generator=g).double() @ mix/d**.5 + .3


@pytest.mark.filterwarnings('ignore:Matrix is singular')
@pytest.mark.parametrize('n1, n2, d', [(300, 200, 12), (40, 30, 64), (64, 64, 64), (2, 200, 20)])
def test_frechet_distance_is_pytorch_fids(n1, n2, d):
    from scipy.linalg import sqrtm
    a, b = clouds(n1, n2, d)
    (m1, s1), (m2, s2) = ((x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    want = ((m1 - m2)**2).sum() + np.trace(s1 + s2) - 2*np.trace(sqrtm(s1 @ s2)).real
    assert M.frechet_distance(a, b) == pytest.approx(want, rel=1e-3 if min(n1, n2) <= d else 1e-9) # sqrtm is the inexact one when singular
    assert M.frechet_distance(a, b) == pytest.approx(M.frechet_distance(b, a), rel=1e-10)
    assert M.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_by_eigenvalues():
    a, b = clouds(40, 30, 64)
    s1, s2 = (torch.cov(x.T) for x in (a, b))
    eigen = torch.linalg.eigvals(s1 @ s2).real.clamp_min(0).sqrt().sum()
    want = (a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace() - 2*eigen
    assert M.frechet_distance(a, b) == pytest.approx(want.item(), rel=1e-6)


def test_kernel_distance_is_torchmetrics():
    from torchmetrics.image.kid import poly_mmd
    a, b = clouds(50, 50, 8)
    assert M.kernel_distance(a, b)[0] == pytest.approx(poly_mmd(a, b).item(), rel=1e-9)
    first = M.kernel_distance(a, b, subsets=20, size=25, seed=1)
    assert first == M.kernel_distance(a, b, subsets=20, size=25, seed=1) != M.kernel_distance(a, b, subsets=20, size=25, seed=2)
    assert first[1] > 0 and abs(first[0] - M.kernel_distance(a, b)[0]) < 4*first[1]


def test_kernel_distance_is_unbiased():
    g = torch.Generator().manual_seed(0)
    draws = torch.tensor([M.kernel_distance(*torch.randn(2, 12, 8, generator=g))[0] for _ in range(300)])
    assert abs(draws.mean()) < 3*draws.std()/300**.5


def test_set_scores_offline():
    with pytest.warns(UserWarning, match='fd_lite0: 2 images for 1280 features'): row = M.score_set(WORSE[:2], SMALL, seed=1)
    assert row['n'] == 2 and row['n_hq'] == 3 and row['protocol'] == 'rgb' and row['seed'] == 1
    assert row['fd_lite0'] > 0 and np.isfinite(row['kd_lite0'])
    fd = M.SET_METRICS['fd_lite0']
    assert torch.allclose(fd.features(SMALL)[1:2], fd.features(SMALL[1:2]), atol=1e-4)


def test_imresize_of_a_batch():
    both = M.imresize(SMALL, 1/4)
    assert both.shape == (3, 3, 8, 10) and torch.equal(both[1], M.imresize(SMALL[1], 1/4))
