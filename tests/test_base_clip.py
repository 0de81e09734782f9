"The miniature's CLIP: views, the teacher's lesson, a run from labelled photographs to a file."
import csv
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from daclip_repro import base_clip as bc
from daclip_repro.base_clip import BaseCLIPConfig, BaseCLIPTrainer, Labelled, missed, taught_loss, teacher_features, train_base_clip, view
from daclip_repro.controller import CLIP_CONFIGS, clip_loss, load_daclip
from daclip_repro.photos import Photo

TINY = dict(embed_dim=24, vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=1, head_width=32),
            text_cfg=dict(context_length=16, vocab_size=614, width=32, heads=2, layers=1))
CONFIG = BaseCLIPConfig(model='tiny', steps=4, batch=3, views=2, warmup=1)


def picture(i, h=40, w=52): return torch.rand(3, h, w, generator=torch.Generator().manual_seed(i))
def unit(*shape, seed=0): return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    "A tiny CLIP, and a teacher that sees the mean colour of sixteen squares."
    monkeypatch.setitem(CLIP_CONFIGS, 'tiny', TINY)
    class Teacher:
        def encode(self, x): return F.adaptive_avg_pool2d(x, 4).flatten(1).repeat(1, 27)[:, :1280]
    monkeypatch.setattr(bc, 'lite0', Teacher())


@pytest.fixture
def source():
    images = [(picture(i) * 255).byte() for i in range(5)]
    return Labelled(images, [f'thing {i}' for i in range(5)], teacher_features(images, 2))


def test_a_view_depends_on_its_number_alone():
    image = (picture(0) * 255).byte()
    assert torch.equal(view(image, 3, 24), view(image, 3, 24)) and not torch.equal(view(image, 3, 24), view(image, 4, 24))
    assert view(image, 3, 24).shape == (3, 24, 24) and 0 <= view(image, 3, 24).min() and view(image, 3, 24).max() <= 1


def test_features_are_in_the_order_of_the_views(source):
    assert source.features.shape == (10, 1280)
    for n in (0, 4, 7): # view 1 of image 2 is number 7
        expected = F.normalize(bc.lite0.encode(view(source.images[n % 5], n, 224)[None]), dim=-1)
        assert torch.allclose(source.features[n], expected[0], atol=1e-6)
    assert torch.equal(teacher_features(source.images, 2, batch=3), source.features)


def test_without_the_teacher_it_is_clips_loss():
    u, v, f = unit(6, 24), unit(6, 24, seed=1), unit(6, 50, seed=2)
    assert taught_loss(u, v, f, 10., replace(CONFIG, teacher=0.)) == pytest.approx(clip_loss(u, v, 10.).item(), abs=1e-5)


def test_a_teacher_to_whom_all_look_alike_asks_for_equal_likeness():
    f = unit(1, 50).expand(6, 50)
    config, same = replace(CONFIG, teacher=1.), unit(1, 24).expand(6, 24)
    assert taught_loss(same, same, f, 10., config) == pytest.approx(torch.tensor(6.).log().item(), abs=1e-5)
    assert taught_loss(unit(6, 24), unit(6, 24), f, 10., config) > 2


def test_missed_is_zero_for_the_right_direction():
    f = unit(4, 50)
    assert missed(3 * f, f) == pytest.approx(0, abs=1e-6) and missed(-f, f) == pytest.approx(2)


def test_a_step_depends_on_its_number_alone(source, tmp_path):
    def loss(step):
        trainer = BaseCLIPTrainer(CONFIG, tmp_path, 'cpu')
        return trainer.gradients(trainer.draw(source, step))
    assert loss(0) == loss(0) != loss(1)


def test_everything_but_the_matrices_is_spared_the_decay(tmp_path):
    decayed, spared = BaseCLIPTrainer(CONFIG, tmp_path, 'cpu').parameter_groups()
    assert decayed['weight_decay'] == .1 and spared['weight_decay'] == 0
    assert all(p.ndim > 1 for p in decayed['params']) and all(p.ndim < 2 for p in spared['params'])


def test_labels_are_learned(source, tmp_path):
    log = BaseCLIPTrainer(replace(CONFIG, steps=30, batch=5), tmp_path, 'cpu').fit(source, log_every=5, progress=False)
    assert log[-1]['loss'] < .8 * log[0]['loss']


def photos(n=6, **kw): return [Photo(f'{i}', lambda i=i: picture(i), **({'caption': f'thing {i}'} | kw)) for i in range(n)]


def test_a_run_goes_on_and_ends_in_a_daclip(tmp_path, capsys, monkeypatch):
    config = replace(CONFIG, steps=50)
    path = train_base_clip(photos(), tmp_path, config, 'mine', 'cpu', about='noise')
    assert '5 photographs, 1 held out, on cpu, from step 0 of 50' in capsys.readouterr().out
    row = list(csv.DictReader(open(tmp_path/'log.csv')))[-1]
    assert row['step'] == '50' and 0 <= float(row['place']) <= 5 and float(row['top20']) == 1
    daclip = load_daclip(path)
    assert torch.equal(daclip.embed(picture(0)[None]).content, daclip.embed(picture(0)[None], control=False).content), 'its links are zero'
    monkeypatch.setattr(bc, 'teacher_features', None) # the teacher's look is kept
    assert train_base_clip(photos(), tmp_path, config, 'mine', 'cpu') == path
    assert 'from step 50 of 50' in capsys.readouterr().out
    with pytest.raises(ValueError, match='belongs to other photographs'): train_base_clip(photos(9), tmp_path, config, 'mine', 'cpu')


def test_labels_are_needed(tmp_path):
    with pytest.raises(ValueError, match='no labels'): train_base_clip(photos(caption=None), tmp_path, CONFIG, device='cpu')
