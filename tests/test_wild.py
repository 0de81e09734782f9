"The chain of degradations in the wild: frequencies of its plans, its kernels and stages, the same bytes everywhere."
import hashlib
import os
import subprocess
import sys
from collections import Counter
from math import cos, factorial, pi, sin

import pytest
import torch
import torch.nn.functional as F
from scipy.special import j1
from scipy.stats import binomtest, kstest
from torch.utils.data import DataLoader

from daclip_repro.degradations import Draws, degrade
from daclip_repro.wild import (
    WILD_COMBINATIONS,
    Step,
    add_noise,
    convolve,
    display_psf,
    draw_plan,
    follow,
    lens_psf,
    make_kernel,
    resize,
    unblur,
    wild,
    wild_words,
)

N = 20_000
MIX = {'iso': .35, 'aniso': .2, 'generalised iso': .1, 'generalised aniso': .03, 'plateau iso': .1, 'plateau aniso': .03,
       'defocus': .1, 'box': .03, 'line': .03, 'psf': .03}
SIZES = {1: range(5, 20, 2), 2: range(5, 10, 2), 3: range(5, 20, 2)}


@pytest.fixture(scope='module')
def plans(): return [draw_plan(seed) for seed in range(N)]


def steps(plans, number, stage):
    "What was done in one stage of one round, plans in which it was left out not counted."
    return [s.how for p in plans for s in p if s.round == number and s.stage == stage]


def likely(found, p, trials=N):
    "An exact binomial test at 0.1 %."
    test = binomtest(found, trials, p)
    assert test.pvalue > .001, f'{found} of {trials} is {found / trials:.4f}, expected {p}'


def uniform(values, low, high):
    assert low <= min(values) and max(values) <= high and kstest(values, 'uniform', (low, high - low)).pvalue > .001


def equally_often(values, options):
    count = Counter(values)
    assert set(count) == set(options)
    for option in options: likely(count[option], 1 / len(options), len(values))


# frequencies

@pytest.mark.parametrize('number, p', [(1, .8), (2, .4), (3, .8)])
def test_blur_as_often_as_stated(plans, number, p): likely(len(steps(plans, number, 'blur')), p)


@pytest.mark.parametrize('number, p', [(1, .2), (2, .2), (3, 0)])
def test_a_display_only_where_there_is_no_blur(plans, number, p):
    without, found = N - len(steps(plans, number, 'blur')), steps(plans, number, 'display')
    assert not any({'blur', 'display'} <= {s.stage for s in plan if s.round == number} for plan in plans)
    if not p: assert not found
    else:
        likely(len(found), p, without)
        uniform([how['weight'] for how in found], .1, .5)


@pytest.mark.parametrize('number, p', [(1, .1), (2, .1), (3, .8)])
def test_sinc_given_blur(plans, number, p):
    blurs = steps(plans, number, 'blur')
    sinc = [how for how in blurs if how['kind'] == 'sinc']
    likely(len(sinc), p, len(blurs))
    equally_often([how['size'] for how in sinc], SIZES[number])
    uniform([how['cutoff'] for how in sinc if how['size'] < 13], pi / 3, pi)
    if number != 2: uniform([how['cutoff'] for how in sinc if how['size'] >= 13], pi / 5, pi)


@pytest.mark.parametrize('number', [1, 2, 3])
def test_the_mix_of_kernels_given_no_sinc(plans, number):
    kinds = Counter(how['kind'] for how in steps(plans, number, 'blur') if how['kind'] != 'sinc')
    assert set(kinds) == set(MIX)
    for kind, p in MIX.items(): likely(kinds[kind], p, kinds.total())


@pytest.mark.parametrize('number, low, high', [(1, .2, 2.2), (2, .2, 1.5), (3, .2, 1.)])
def test_the_numbers_of_kernels(plans, number, low, high):
    by_kind = {kind: [how for how in steps(plans, number, 'blur') if how['kind'] == kind] for kind in MIX}
    def column(kinds, key): return [how[key] for kind in kinds for how in by_kind[kind]]
    iso, aniso = ([kind for kind in MIX if kind.split()[-1] == o] for o in ('iso', 'aniso'))
    equally_often(column([*iso, *aniso, 'defocus', 'box'], 'size'), SIZES[number])
    uniform(column(iso, 'sigma'), low, high)
    for key in ('sigma', 'sigma2'): uniform(column(aniso, key), low, high)
    uniform(column(aniso, 'angle'), -pi, pi)
    assert not any('sigma2' in how for kind in iso for how in by_kind[kind])
    beta = column([k for k in MIX if k.startswith('generalised')], 'beta')
    likely(sum(b < 1 for b in beta), .5, len(beta))
    uniform([b for b in beta if b < 1], .5, 1), uniform([b for b in beta if b >= 1], 1, 2)
    beta = column([k for k in MIX if k.startswith('plateau')], 'beta')
    likely(beta.count(1.), .5, len(beta))
    uniform([b for b in beta if b != 1], 1, 1.5)
    assert not any('beta' in how for kind in ('iso', 'aniso', 'defocus', 'box', 'line', 'psf') for how in by_kind[kind])
    assert set(column(['line'], 'size')) == {5, 7, 9, 11, 13, 15}.intersection(SIZES[number]) # 17 and 19 are shortened
    if number != 2: likely(column(['line'], 'size').count(7), 2 / 8, len(by_kind['line']))
    assert set(column(['psf'], 'number')) <= set(range(100))


def test_lenses_come_equally_often(plans):
    numbers = [how['number'] for r in (1, 2, 3) for how in steps(plans, r, 'blur') if how['kind'] == 'psf']
    equally_often([n // 10 for n in numbers], range(10))


@pytest.mark.parametrize('number', [1, 2, 3])
def test_blurs_taken_back(plans, number):
    own_size = [how for how in steps(plans, number, 'blur') if how['kind'] not in ('line', 'psf')] # those two do not keep the drawn size
    small = [how for how in own_size if how['kind'] != 'sinc' and how['size'] < 8]
    back = [how['wiener'] for how in small if 'wiener' in how]
    likely(len(back), .1, len(small))
    assert not any('wiener' in how for how in own_size if how['kind'] == 'sinc' or how['size'] > 8)
    mixed = [share for share in back if share]
    likely(len(mixed), .1, len(back))
    assert all(.1 <= share <= .5 for share in mixed)


def test_resized_in_both_rounds_or_in_neither(plans):
    first, last = (steps(plans, r, 'resize') for r in (1, 3))
    likely(len(first), .8)
    for plan in plans: assert [s.round for s in plan if s.stage == 'resize'] in ([], [1, 3])
    uniform([how['shrink'] for how in first], .5, 1.4)
    assert {how['shrink'] for how in last} == {1.}
    for found in (first, last): equally_often([how['mode'] for how in found], ['area', 'cubic', 'linear'])


@pytest.mark.parametrize('number, p', [(1, .4), (2, .2), (3, 0)])
def test_noise(plans, number, p):
    found = steps(plans, number, 'noise')
    gauss, shot = ([how for how in found if key in how] for key in ('sigma', 'shot'))
    assert all('sigma' in how or 'shot' in how for how in found)
    if not p: assert not found
    else:
        likely(len(gauss), p * .6), likely(len(shot), p * .4), likely(sum('shot' in how for how in gauss), .4, len(gauss)) # independent
        uniform([how['sigma'] for how in gauss], 1, 5), uniform([how['shot'] for how in shot], .01, .5)
        likely(sum(how['gray'] for how in gauss), .4, len(gauss)), likely(sum(how['shot_gray'] for how in shot), .4, len(shot))


@pytest.mark.parametrize('number, p, low, high', [(1, .4, 60, 95), (2, 0, 0, 0), (3, .4, 80, 100)])
def test_jpeg(plans, number, p, low, high):
    quality = [how['quality'] for how in steps(plans, number, 'jpeg')]
    if not p: assert not quality
    else: likely(len(quality), p), equally_often(quality, range(low, high))


@pytest.mark.parametrize('number, stages', [(1, 'blur resize noise jpeg'), (2, 'blur noise'), (3, 'blur resize jpeg')])
def test_every_order_is_equally_likely(plans, number, stages):
    stages = stages.split()
    orders = [tuple(s.stage for s in plan if s.round == number) for plan in plans]
    whole = Counter(order for order in orders if set(order) == set(stages))
    assert len(whole) == factorial(len(stages))
    for found in whole.values(): likely(found, 1 / len(whole), whole.total())


def test_rounds_come_in_order(plans):
    for plan in plans[:1000]: assert [s.round for s in plan] == sorted(s.round for s in plan)


def test_stages_of_different_rounds_are_independent(plans):
    both = sum({1, 2, 3} <= {s.round for s in plan if s.stage == 'blur'} for plan in plans)
    likely(both, .8 * .4 * .8)


# words

@pytest.mark.parametrize('stage, how, word', [
    ('blur', dict(kind='iso', size=7), 'blur'), ('blur', dict(kind='sinc', size=7), 'ringing artifact'),
    ('blur', dict(kind='iso', size=7, wiener=0.), 'ringing artifact'), ('display', dict(weight=.3), 'blur'),
    ('resize', dict(shrink=1.2, mode='area'), 'blur'),
    ('noise', dict(sigma=2.), 'noise'), ('jpeg', dict(quality=70), 'jpeg block')])
def test_words_of_a_stage(stage, how, word): assert wild_words([Step(1, stage, how)]) == word


def test_words_are_combined_in_a_fixed_order(plans):
    some = [Step(1, 'jpeg', {}), Step(2, 'noise', {}), Step(3, 'blur', dict(kind='sinc')), Step(3, 'resize', {}), Step(3, 'jpeg', {})]
    assert wild_words(some) == wild_words(some[::-1]) == 'blur, ringing artifact, noise, jpeg block' and wild_words([]) == 'clean'
    said = {wild_words(plan) for plan in plans}
    assert 10 < len(said) and said <= set(WILD_COMBINATIONS) and len(set(WILD_COMBINATIONS)) == 16


# kernels

HOW = {kind: {} for kind in MIX} | {kind: dict(sigma=2., sigma2=.8, angle=.5) for kind in MIX if 'aniso' in kind} | {'line': dict(angle=.5)}
HOW['sinc'] = dict(cutoff=1.5)

def kernel(kind, size, **how): return make_kernel(Draws('test', [0]), kind, size, **HOW[kind] | how)


@pytest.mark.parametrize('kind', [k for k in HOW if k != 'psf'])
@pytest.mark.parametrize('size', [5, 7, 13, 19])
def test_kernels_sum_to_one(kind, size):
    k = kernel(kind, size)
    assert k.shape == (size, size) and k.dtype == torch.float32 and k.sum().item() == pytest.approx(1, abs=1e-5)
    assert (k.min() < 0) == (kind == 'sinc')
    grained = kind in ('iso', 'aniso', 'generalised iso', 'generalised aniso')
    assert torch.allclose(k, k.flip(0, 1), rtol=.25 if grained else 1e-4, atol=1e-6) # no shift


def test_lenses_are_of_all_sizes_and_shift_nothing():
    for number in range(100):
        k = lens_psf(number)
        g = torch.arange(len(k)) - len(k) // 2
        assert k.min() >= 0 and k.sum().item() == pytest.approx(1, abs=1e-5)
        assert ((k.sum(0) * g).sum()**2 + (k.sum(1) * g).sum()**2) < 1 and k.max() < .9
    assert {len(lens_psf(n)) for n in range(100)} == set(range(5, 30, 2))
    assert make_kernel(Draws('test', [0]), 'psf', number=4) is lens_psf(4)


def test_a_display_shows_copies_that_are_further_out_in_red_than_in_blue():
    psf = display_psf()
    assert psf.shape == (3, 41, 41) and psf.min() >= 0 and torch.allclose(psf.sum((1, 2)), torch.ones(3), atol=1e-5)
    assert torch.allclose(psf, psf.flip(1, 2), atol=1e-6) and torch.allclose(psf, psf.transpose(1, 2))
    beside = psf[:, 20, 24:] # of the image itself, which is at 20
    assert beside.argmax(1).tolist() == [5, 4, 3] and (beside.amax(1) < .3 * psf[:, 20, 20]).all()


def test_formulas_of_the_gaussian_families():
    g = torch.arange(19.) - 9
    for kind, beta in (('aniso', 1), ('generalised aniso', .7), ('plateau aniso', 1.2)):
        k = kernel(kind, 19, beta=beta)
        for y, x in ((-3, 2), (0, 4), (5, 5), (2, 0)):
            u, v = x * cos(.5) + y * sin(.5), y * cos(.5) - x * sin(.5)
            q = (u / 2)**2 + (v / .8)**2
            expected = 1 / (1 + q**beta) if 'plateau' in kind else 2.718281828**(-q**beta / 2)
            grain = k[y + 9, x + 9] / k[9, 9] / expected
            assert grain == pytest.approx(1, abs=1e-4) if 'plateau' in kind else .9 / 1.1 <= grain <= 1.1 / .9
    k = kernel('iso', 19, sigma=1.5)
    assert (k.sum(0) * g**2).sum().sqrt().item() == pytest.approx(1.5, rel=.02)
    assert not torch.equal(k, kernel('iso', 19, sigma=1.5).T) # grain


def test_the_formula_of_the_sinc_filter():
    k = kernel('sinc', 13, cutoff=2.5)
    for x in (1, 2, 6): assert (k[6, 6 + x] / k[6, 6]).item() == pytest.approx(2 * float(j1(2.5 * x)) / (2.5 * x), abs=1e-5)


def test_the_sinc_filter_keeps_what_is_below_its_cutoff():
    # Gibbs: a low-pass that is cut off after 9 pixels still has 10 % of ripple on both sides
    response = torch.fft.fft2(kernel('sinc', 19, cutoff=1.5), s=(64, 64)).abs()[0, :33]
    frequency = torch.arange(33) * 2 * pi / 64
    assert (response[frequency < 1.1] > .85).all() and (response[frequency > 1.9] < .15).all()


def test_a_line_lies_along_its_angle_and_a_disk_is_round():
    k = kernel('line', 15, angle=pi / 2)
    assert k[:, 7].sum() > .75 and k[1:-1, 7].min() > .5 * k.max()
    assert (kernel('line', 15, angle=0.)[7].sum()) > .75
    disk = kernel('defocus', 15)
    assert disk[0, 0] == 0 and disk[7, 0] > 0 and disk[7, 7] == disk[7, 10] and torch.equal(disk, disk.T)


# stages

def picture(h=40, w=56, seed=0):
    "Smooth shapes with edges, in the middle of the range."
    rough = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(rough, size=(h, w), mode='nearest')[0] * .6 + .2)


@pytest.mark.parametrize('size', [5, 19, 29])
def test_convolution_is_the_sum_that_it_stands_for(size):
    x, k, r = torch.rand(3, 33, 52), torch.rand(3, size, size), size // 2
    slow = F.conv2d(F.pad(x, (r,) * 4, mode='reflect')[None], k.flip(1, 2)[:, None], groups=3)[0]
    assert torch.allclose(convolve(x, k), slow, atol=1e-5 * size**2)
    assert torch.allclose(convolve(x, k[0])[0], slow[0], atol=1e-5 * size**2)


def test_a_blur_taken_back_is_sharper_and_rings():
    x, k = picture(), kernel('plateau iso', 7, sigma=1.2)
    blurred = convolve(x, k)
    back = unblur(blurred, k)
    assert (back - x).square().mean() < .3 * (blurred - x).square().mean()
    assert back.max() > x.max() + .005 and back.min() < x.min() - .005


def test_area_is_an_average():
    x = torch.rand(3, 30, 42)
    assert torch.allclose(resize(x, [10, 21], 'area'), F.avg_pool2d(x, (3, 2)), atol=1e-5)
    small = resize(x, [23, 31], 'area')
    assert small.shape == (3, 23, 31) and torch.allclose(small.mean((1, 2)), x.mean((1, 2)), atol=1e-5)
    assert torch.equal(resize(x, [60, 84], 'area'), resize(x, [60, 84], 'linear'))
    assert not torch.allclose(resize(x, [60, 84], 'cubic'), resize(x, [60, 84], 'linear'), atol=.01)
    for mode in ('area', 'cubic', 'linear'): assert torch.allclose(resize(x, [30, 42], mode), x, atol=1e-5)


def noise_on(level, **how): return (add_noise(torch.full((3, 200, 200), level), Draws('test', [1]), **how) - level) * 255

def test_noise_has_the_strength_that_is_asked_for():
    rounding = 1 / 12
    for sigma in (1, 5): assert noise_on(.4, sigma=sigma).var().item() == pytest.approx(sigma**2 + rounding, rel=.03)
    for level in (.2, .8): assert noise_on(level, shot=.5).var().item() == pytest.approx(.25 * level / 256 * 255**2 + rounding, rel=.03)
    assert abs(noise_on(.8, shot=.5).mean().item()) < .2 # counts that fall between two grey levels are rounded to one side
    both = noise_on(.4, sigma=3, shot=.5)
    assert both.var().item() == pytest.approx(9 + .25 * .4 / 256 * 255**2 + rounding, rel=.03)
    for gray in (dict(sigma=4, gray=True), dict(shot=.5, shot_gray=True)):
        n = noise_on(.4, **gray)
        assert torch.equal(n[0], n[1]) and torch.equal(n[0], n[2])
    assert not torch.equal(*noise_on(.4, sigma=4)[:2]) and not torch.equal(*noise_on(.4, shot=.5)[:2])


STEPS = [Step(1, 'blur', dict(kind=kind, size=9) | how) for kind, how in HOW.items() if kind != 'psf']
STEPS += [Step(1, 'blur', dict(kind='psf', number=5)), Step(1, 'blur', dict(kind='iso', size=7, sigma=1.5, wiener=.3)),
          Step(2, 'display', dict(weight=.1)), Step(1, 'noise', dict(sigma=1., gray=False)),
          Step(1, 'noise', dict(shot=.3, shot_gray=True)), Step(1, 'jpeg', dict(quality=94)), Step(3, 'jpeg', dict(quality=99))]


@pytest.mark.parametrize('step', STEPS, ids=lambda s: ' '.join(map(str, [s.stage, *s.how.values()])))
def test_every_stage_changes_the_image(step):
    x = ((picture() * 255).round() / 255)
    y = follow([step], x, 3)
    assert y.shape == x.shape and 1e-4 < (y - x).abs().mean() < .15
    assert torch.equal((y * 255).round() / 255, y) and y.min() >= 0 and y.max() <= 1


@pytest.mark.parametrize('mode', ['area', 'cubic', 'linear'])
@pytest.mark.parametrize('shrink', [.5, 1.4])
def test_resizing_there_and_back_changes_the_image(mode, shrink):
    x, there, back = picture(), dict(shrink=shrink, mode=mode), dict(shrink=1., mode=mode)
    assert follow([Step(1, 'resize', there)], x, 3).shape == (3, int(40 / shrink), int(56 / shrink))
    y = follow([Step(1, 'resize', there), Step(3, 'resize', back)], x, 3)
    assert y.shape == x.shape and (y - x).abs().mean() > 1e-3


def test_noise_differs_from_step_to_step_and_from_image_to_image():
    step, flat = Step(1, 'noise', dict(sigma=5., gray=False)), torch.full((3, 40, 40), .5)
    once, twice, other = follow([step], flat, 3) - .5, follow([step] * 2, flat, 3) - .5, follow([step], flat, 4) - .5
    assert twice.std().item() == pytest.approx(2**.5 * once.std().item(), rel=.05) # the same noise twice would be 2
    assert (once + other).std().item() == pytest.approx(2**.5 * once.std().item(), rel=.05)


# the same bytes everywhere

SCRIPT = """
import hashlib, torch
from daclip_repro.wild import wild
x = torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(5))
print(hashlib.sha256(wild(x, 100)[0].numpy().tobytes()).hexdigest())
"""

def batch(): return torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(5))


class Crops(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): return wild(batch()[i], 100 + i)[0]


def test_the_same_bytes_in_other_processes():
    expected = hashlib.sha256(wild(batch(), 100)[0].numpy().tobytes()).hexdigest()
    for threads, hashing in (('1', '0'), ('2', '1')):
        env = os.environ | dict(OMP_NUM_THREADS=threads, PYTHONHASHSEED=hashing)
        out = subprocess.run([sys.executable, '-c', SCRIPT], env=env, capture_output=True, text=True, timeout=120)
        assert out.stdout.strip() == expected, out.stderr


def test_the_same_bytes_whatever_the_batch_and_the_workers():
    whole, plans = wild(batch(), 100)
    assert not torch.equal(whole, batch()) and plans == [draw_plan(100 + i) for i in range(6)]
    for n in (1, 4): assert torch.equal(torch.cat([wild(part, 100 + n * i)[0] for i, part in enumerate(batch().split(n))]), whole)
    assert torch.equal(wild(batch().flip(0), list(range(105, 99, -1)))[0].flip(0), whole)
    for workers in (0, 2): assert torch.equal(torch.cat([*DataLoader(Crops(), batch_size=3, num_workers=workers)]), whole)


def test_global_randomness_is_neither_used_nor_changed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = wild(batch(), 7)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(wild(batch(), 7)[0], first)


def test_images_keep_their_size_and_stay_on_the_grid():
    for seed in range(40):
        y, plans = wild(picture(32, 47), seed)
        assert y.shape == (3, 32, 47) and len(plans) == 1 and y.min() >= 0 and y.max() <= 1 and torch.equal((y * 255).round() / 255, y)


# malformed input

@pytest.mark.parametrize('function', [wild, lambda hq, seed: degrade(hq, 'noisy', seed)], ids=['wild', 'degrade'])
@pytest.mark.parametrize('hq, seed, message', [
    (torch.rand(1, 40, 40), 0, r'shape \(1, 40, 40\): expected 3×H×W'), (torch.rand(40, 40), 0, 'expected 3×H×W'),
    (torch.rand(0, 3, 40, 40), 0, 'at least one pixel'), (torch.zeros(3, 40, 40).byte(), 0, 'torch.uint8: expected floating-point'),
    (torch.rand(2, 3, 40, 40), [1], 'expected 2 integers'), (torch.rand(2, 3, 40, 40), -1, 'expected 2 integers'),
    (torch.rand(3, 40, 40), 1.5, 'expected 1 integers'), (torch.rand(3, 40, 40), ['1'], 'expected 1 integers')])
def test_malformed_input_is_refused(function, hq, seed, message):
    with pytest.raises(ValueError, match=message) as e: function(hq, seed)
    assert '\n' not in str(e.value)


def test_a_small_image_is_refused():
    with pytest.raises(ValueError, match='hq has 31×40 pixels: expected at least 32×32'): wild(torch.rand(3, 31, 40))
