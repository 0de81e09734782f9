"What experiments share: a split without overlap, training that goes on, rows that are paired."
from dataclasses import replace

import pytest
import torch

from daclip_repro.controller import DACLIP, load_daclip, make_clip
from daclip_repro.controller_training import CONTROLLER_CONFIGS
from daclip_repro.degradations import degrade
from daclip_repro.experiment import measure, train_and_test, trained, trained_daclip
from daclip_repro.irsde import IRSDE
from daclip_repro.nafnet import NAFNet
from daclip_repro.photos import packaged_photos, save_image
from daclip_repro.training import CONFIGS, Denoiser, Regressor, load_weights
from daclip_repro.wild import WILD_COMBINATIONS, wild

CLIP = dict(embed_dim=24, vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=1, head_width=32),
            text_cfg=dict(context_length=16, vocab_size=614, width=32, heads=2, layers=1))
SIZES = dict(width=16, enc_blk_nums=(1, 1), dec_blk_nums=(1, 1))
CONFIG = replace(CONFIGS['sampling-miniature'], method='nafnet', network=SIZES, condition='none', steps=6, batch=2, patch=16, warmup=1)


def photos(n=3, size=24): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


class Steps:
    "Remembers what it is told; may stop the run."
    def __init__(self, stop=None): self.told, self.stop = [], stop
    def update(self, done):
        self.told.append(done)
        if done == self.stop: raise KeyboardInterrupt


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# the split

def test_a_folder_is_split_and_the_packaged_ones_are_for_the_test(tmp_path):
    for i in range(30): save_image(torch.rand(3, 8, 8), tmp_path/f'{i:02}.png')
    train, test = train_and_test(str(tmp_path))
    assert len(train) == 28 and [p.name for p in test] == [p.name for p in packaged_photos()] + ['00', '25']
    assert len(train_and_test(str(tmp_path), held_out=1)[1]) == 8 and len(train_and_test(str(tmp_path), held_out=1)[0]) == 28


def test_without_a_folder_no_photograph_is_in_both():
    train, test = ({p.name for p in side} for side in train_and_test('packaged'))
    assert train and test and not train & test and train | test == {p.name for p in packaged_photos()}


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match='nowhere'): train_and_test('nowhere')


# training

def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path):
    train = packaged_photos()[:2]
    config = replace(CONFIG, steps=100)
    with pytest.raises(KeyboardInterrupt): trained(config, train, str(tmp_path/'stopped'), Steps(stop=50))
    rest = Steps()
    model, facts = trained(config, train, str(tmp_path/'stopped'), rest)
    straight, _ = trained(config, train)
    assert rest.told == [100] and same(model, straight) and facts['steps'] == 100
    assert facts['parameters'] == sum(p.numel() for p in model.net.parameters()) and facts['training_seconds'] > 0
    kept = load_weights(tmp_path/'stopped'/'weights.safetensors')
    lq = photos()
    assert (kept.sample(lq) - model.sample(lq)).abs().max() < 2e-3 and not kept.training


def test_a_controller_that_was_interrupted_ends_as_one_that_was_not(tmp_path):
    train, config = packaged_photos()[:2], replace(CONTROLLER_CONFIGS['wild-daclip-miniature'], steps=4, batch=2, patch=32, warmup=1)
    with pytest.raises(KeyboardInterrupt): trained_daclip(replace(config, steps=4), train, tmp_path/'stopped', Steps(stop=4))
    paths = [trained_daclip(config, train, tmp_path/folder)[0] for folder in ('stopped', 'straight')]
    one, two = map(load_daclip, paths)
    assert same(one, two) and one.words == WILD_COMBINATIONS and not same(one, load_daclip())


def test_another_seed_is_another_network():
    one, two = (trained(replace(CONFIG, seed=s), packaged_photos()[:2])[0] for s in (0, 1))
    assert not same(one, two)


# measuring

def test_the_input_is_measured_without_a_restorer():
    hq = photos()
    rows, out = measure(None, hq, list('abc'), 'hazy', seed=2, metrics=('psnr',), method='input')
    assert torch.equal(out, degrade(hq, 'hazy', 2000))
    stamps = [(r['image'], r['degradation'], r['seed'], r['method'], r['seconds']) for r in rows]
    assert stamps == [(n, 'hazy', 2, 'input', 0) for n in 'abc']
    assert not torch.equal(out, measure(None, hq, list('abc'), 'hazy', seed=3, metrics=('psnr',))[1])
    hq = photos(size=32)
    assert torch.equal(measure(None, hq, list('abc'), 'wild', seed=2, metrics=('psnr',))[1], wild(hq, 2000)[0])


class Knows(torch.nn.Module):
    "Adds the same number everywhere, and notes what it is asked."
    def __init__(self):
        super().__init__()
        self.bias, self.seen = torch.nn.Parameter(torch.zeros(1)), []
    def forward(self, x, mu, t, context=None):
        self.seen.append((x.clone(), mu.clone()))
        return 0 * x + self.bias


def test_all_methods_get_the_same_degradation_and_noise():
    hq, nets = photos(), [Knows(), Knows()]
    for net in nets: measure(Denoiser(net, IRSDE(), 'residual'), hq, list('abc'), 'noisy', seed=1, steps=2, metrics=('psnr',))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].seen[0], nets[1].seen[0]))
    assert torch.equal(nets[0].seen[0][1], degrade(hq, 'noisy', 1000))
    alone = Knows()
    measure(Denoiser(alone, IRSDE(), 'residual'), hq[:1], ['a'], 'noisy', seed=1, steps=2, metrics=('psnr',))
    assert torch.equal(alone.seen[0][0], nets[0].seen[0][0][:1]), 'the noise of a photograph depends on the batch'


@pytest.fixture(scope='module')
def daclip():
    torch.manual_seed(0)
    model = DACLIP(make_clip(CLIP))
    for p in model.visual_control.transformer.zero_modules.parameters(): torch.nn.init.normal_(p, std=.05)
    return model.eval()


def listener(daclip, condition):
    net = NAFNet(**SIZES, context_dim=24, use_degra_context=condition in ('degradation', 'both'),
                 use_image_context=condition in ('clip', 'content', 'both'))
    for p in net.parameters(): torch.nn.init.normal_(p, std=.1, generator=torch.Generator().manual_seed(0))
    return Regressor(net, condition=condition, daclip=daclip).eval()


@pytest.mark.parametrize('condition, hears', [('clip', False), ('content', False), ('degradation', True), ('both', True)])
def test_told_changes_the_degradation_embedding_alone(daclip, condition, hears):
    restorer, hq, heard = listener(daclip, condition), photos(), []
    tell = restorer.tell
    restorer.tell = lambda embeddings: heard.append(embeddings) or tell(embeddings)
    outs = [measure(restorer, hq, list('abc'), 'low-light', seed=0, told=told, metrics=('psnr',))[1] for told in (None, 'snowy')]
    assert torch.equal(outs[0], outs[1]) is not hears
    if not hears: return
    right, wrong = heard
    other = daclip.embed(degrade(hq, 'snowy', 0))
    assert torch.equal(right.content, wrong.content) and torch.equal(wrong.degradation, other.degradation)


def test_a_network_that_is_told_words_is_told_the_other_word():
    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(1))
        def precompute(self, degradation, content=None): return degradation
        def forward(self, lq, context): return lq * 0 + context.argmax(1).view(-1, 1, 1, 1) / 10
    restorer = Regressor(Words(), condition='word', words=('hazy', 'rainy', 'snowy'))
    def said(told): return measure(restorer, photos(1), ['a'], 'rainy', 0, told=told, metrics=('psnr',))[1].unique().item()
    assert said(None) == pytest.approx(.1) and said('snowy') == pytest.approx(.2)
