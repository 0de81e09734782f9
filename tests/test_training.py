"Training restorers: exact resume, what they are told, and bad files refused in one sentence."
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from golden_data import full_size
from safetensors.torch import save_file

from daclip_repro.cli import main
from daclip_repro.controller import CLIP_CONFIGS, DACLIP, make_clip
from daclip_repro.degradations import DEGRADATIONS
from daclip_repro.irsde import IRSDE
from daclip_repro.loop import load_config, make_config, to_bytes
from daclip_repro.photos import Photo, load_image, packaged_photos, save_image
from daclip_repro.restore import Restorer
from daclip_repro.training import (
    CONFIGS,
    Denoiser,
    RestorerTrainer,
    build,
    load_weights,
    make_batch,
    packaged_weights,
    save_weights,
    train_command,
)

SMALL = dict(network=dict(nf=8, ch_mult=(1, 2), scale=.5),
             steps=12, batch=2, patch=16, warmup=2, ema=.9)
TOY = make_config(SMALL, CONFIGS['sampling-miniature'])


@pytest.fixture(scope='module')
def images(): return to_bytes(packaged_photos()[:3], side=48)


def weights_of(trainer): return {**trainer.model.state_dict(), **{f'average.{k}': v for k, v in trainer.average.state_dict().items()}}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k


@pytest.mark.parametrize('parametrisation', ['noise', 'residual'])
@pytest.mark.parametrize('stops', [[5], [1, 2, 7, 11]])
def test_resume_is_exact(images, tmp_path, parametrisation, stops):
    config = replace(TOY, parametrisation=parametrisation)
    straight = RestorerTrainer(config, tmp_path/'straight', 'cpu')
    straight.fit(images, progress=False)
    for stop in [*stops, None]:
        again = RestorerTrainer(config, tmp_path/'stopped', 'cpu')
        again.fit(images, until=stop, progress=False)
    assert again.step == config.steps
    assert_same(weights_of(straight), weights_of(again))


def test_batches_depend_on_the_step_alone(images):
    *a, words = make_batch(images, TOY, 3)
    *b, again = make_batch(images, TOY, 3)
    assert words == again and all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a[0], make_batch(images, TOY, 4)[0])
    assert not torch.equal(a[0], make_batch(images, replace(TOY, seed=1), 3)[0])
    assert a[0].shape == (2, 3, 16, 16) and 0 <= a[0].min() and a[0].max() <= 1


def test_every_degradation_equally_often(images):
    words = make_batch(images, replace(TOY, batch=20), 0)[-1]
    assert sorted(words) == sorted(DEGRADATIONS * 2)


def test_untrained_residual_returns_the_input():
    lq = torch.rand(2, 3, 16, 16)
    denoiser = build(TOY)
    assert torch.allclose(denoiser.x0(torch.rand_like(lq), lq, 50, denoiser.embed(lq, 'noisy')), lq)


def test_a_residual_network_that_knows_restores_exactly():
    hq, lq = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    class Knows(torch.nn.Module):
        def forward(self, x, mu, t, context=None): return hq - mu
    denoiser = Denoiser(Knows(), IRSDE(), 'residual')
    for method in ('posterior', 'ode'):
        assert (denoiser.sample(lq, method, 20) - hq).abs().max() < (1e-5 if method == 'posterior' else .1)


def test_sampling_does_not_depend_on_the_batch():
    denoiser, lq = build(replace(TOY, parametrisation='noise')), torch.rand(3, 3, 16, 16)
    whole = denoiser.sample(lq, steps=3, seeds=[4, 5, 6], degradation=['noisy', 'rainy', 'hazy'])
    one = denoiser.sample(lq[1:2], steps=3, seeds=[5], degradation='rainy')
    assert torch.allclose(whole[1:2], one, atol=1e-5)


def test_weights_round_trip(tmp_path):
    denoiser = build(TOY)
    loaded = load_weights(save_weights(denoiser, TOY, tmp_path/'w.safetensors', steps=3))
    assert loaded.words == DEGRADATIONS and loaded.parametrisation == 'residual'
    for (k, a), b in zip(denoiser.state_dict().items(), loaded.state_dict().values()): assert torch.allclose(a, b, atol=1e-3), k
    assert 'w' in (tmp_path/'w.md').read_text() and sorted(p.name for p in tmp_path.iterdir()) == ['w.md', 'w.safetensors']


def test_packaged_weights_load_and_have_a_card():
    assert packaged_weights()
    for name, path in packaged_weights().items():
        restorer = load_weights(name)
        assert bool(restorer.words) == (restorer.condition == 'word')
        assert bool(restorer.daclip) == (restorer.condition in ('both', 'content'))
        assert name in path.with_suffix('.md').read_text()
    assert sum(p.stat().st_size for p in packaged_weights().values()) < 40e6


def test_train_command_makes_weights_card_and_log(tmp_path, capsys):
    photos = [Photo(p.name, p.load) for p in packaged_photos()]
    file = tmp_path/'tiny.yaml'
    file.write_text(yaml.safe_dump(dict(base='sampling-miniature', **json.loads(json.dumps(SMALL)))))
    path = train_command(photos, tmp_path/'out', replace(load_config(file, CONFIGS), steps=3), 'tiny', device='cpu')
    assert 'from step 0 of 3' in capsys.readouterr().out
    assert load_weights(path).words and (tmp_path/'out'/'log.csv').exists() and path.with_suffix('.md').exists()


def test_train_command_on_the_wild_chain_validates_on_other_photographs(tmp_path, capsys):
    photos = [Photo(p.name, p.load) for p in packaged_photos()[:3]]
    config = replace(CONFIGS['wild-miniature'], network=SMALL['network'], condition='none', steps=50, batch=1, patch=32, warmup=1)
    path = train_command(photos, tmp_path, config, 'wild', device='cpu', held_out=photos[:1])
    assert '3 photographs to train on, 1 held out' in capsys.readouterr().out
    assert 'gain' in (tmp_path/'log.csv').read_text() and 'daclip_repro.wild' in path.with_suffix('.md').read_text()
    pairs = tmp_path/'pairs'
    with pytest.raises(ValueError, match="pairs: pairs are degraded already, but chain is 'wild'"): train_command(pairs, tmp_path, config)
    words = replace(config, chain='words')
    with pytest.raises(ValueError, match='pairs: pairs are validated on their own'): train_command(pairs, tmp_path, words, held_out=photos)


BAD_CONFIGS = [ # what is wrong with the loop's own keys is in test_loop.py
    ('parametrisation: velocity', 'velocity'), ('network: {width: 3}', 'width'), ('sde: {schedule: quadratic}', 'quadratic'),
    ('network: {context_dim: 3}', 'context_dim'), ('condition: blind', 'blind'), ('{method: airnet, condition: both}', 'airnet'),
    ('method: unet', 'unet'), ('lr: -1.0', 'lr'), ('{chain: wild, condition: word}', 'no single word'),
]

@pytest.mark.parametrize('text, named', BAD_CONFIGS)
def test_bad_configuration_is_refused_by_name(tmp_path, text, named):
    file = tmp_path/'c.yaml'
    file.write_text(text)
    with pytest.raises(ValueError, match=named) as e: build(load_config(file, CONFIGS))
    assert '\n' not in str(e.value)


def spoiled(tmp_path, how):
    path = save_weights(build(TOY), TOY, tmp_path/'w.safetensors')
    tensors = {k: v.half() for k, v in build(TOY).net.state_dict().items()}
    header = dict(config=json.dumps(dict(network=SMALL['network'], parametrisation='residual', condition='word')))
    if how == 'cut': path.write_bytes(path.read_bytes()[:3000])
    elif how == 'text': path.write_text('not weights')
    elif how == 'empty': path.write_bytes(b'')
    elif how == 'no header': save_file(tensors, path)
    elif how == 'bad header': save_file(tensors, path, dict(config='{'))
    elif how == 'missing key': save_file({k: v for k, v in tensors.items() if k != 'final_conv.bias'}, path, header)
    elif how == 'surplus key': save_file(tensors | {'extra': torch.zeros(1)}, path, header)
    elif how == 'wrong shape': save_file(tensors | {'final_conv.bias': torch.zeros(5)}, path, header)
    elif how == 'unknown setting': save_file(tensors, path, dict(config=json.dumps(dict(depth=3))))
    return path


@pytest.mark.parametrize('how', ['cut', 'text', 'empty', 'no header', 'bad header', 'missing key', 'surplus key', 'wrong shape',
                                 'unknown setting'])
def test_bad_weights_are_refused(tmp_path, how):
    with pytest.raises(ValueError) as e: load_weights(spoiled(tmp_path, how))
    assert len(str(e.value)) > 20


# the authors' weights: file, configuration, golden list of the network, DA-CLIP and the length of its embeddings
OFFICIAL = [('wild-ir.pth', 'wild-paper', 'unet_wild_ir_train', 'wild-daclip_ViT-L-14.pt', 768),
            ('universal-ir.pth', 'unified-paper', 'unet_universal_ir_train', 'daclip_ViT-B-32.pt', 512),
            ('universal-ir-mix.pth', 'unified-paper', 'unet_universal_ir_train', 'daclip_ViT-B-32_mix.pt', 512)]


def stand_in(monkeypatch, file, length):
    "A small DA-CLIP under an official name."
    tiny = dict(embed_dim=length, vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=2, head_width=32),
                text_cfg=dict(context_length=16, vocab_size=614, width=32, heads=2, layers=1))
    monkeypatch.setitem(CLIP_CONFIGS, file.name.split('_')[1].removesuffix('.pt'), tiny)
    torch.manual_seed(7)
    daclip = DACLIP(make_clip(tiny))
    torch.save(daclip.state_dict(), file)
    return daclip.eval()


@pytest.mark.parametrize('name, config, layout, daclip, length', OFFICIAL)
def test_official_weights_load_at_full_size(tmp_path, monkeypatch, name, config, layout, daclip, length):
    stand_in(monkeypatch, tmp_path/daclip, length)
    draw = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(shape, generator=draw).half() for k, shape in full_size(layout)['shapes'].items()}
    torch.save(weights, tmp_path/name)
    restorer = load_weights(tmp_path/name)
    assert_same(restorer.net.state_dict(), {k: v.float() for k, v in weights.items()})
    assert restorer.parametrisation == 'noise' and repr(restorer.sde) == repr(IRSDE(50, 100, 'cosine', .005))
    torch.save({k: v for k, v in weights.items() if k != 'init_conv.weight'}, tmp_path/name)
    with pytest.raises(ValueError, match=f'{name} does not fit this ConditionalUNet: 1 missing: init_conv'): load_weights(tmp_path/name)


@pytest.mark.parametrize('name, config, layout, daclip, length', OFFICIAL)
def test_official_weights_restore_from_the_command_line(tmp_path, monkeypatch, capsys, name, config, layout, daclip, length):
    monkeypatch.setitem(CONFIGS, config, replace(CONFIGS[config], network=CONFIGS[config].network | dict(nf=16, ch_mult=(1, 2))))
    told = stand_in(monkeypatch, tmp_path/daclip, length)
    denoiser = build(replace(CONFIGS[config], seed=3), told)
    torch.save({'state_dict': {f'module.{k}': v for k, v in denoiser.net.state_dict().items()}}, tmp_path/name)
    save_image(packaged_photos()[0].load()[:, :40, :56], tmp_path/'photo.png')
    monkeypatch.chdir(tmp_path)
    assert main(['restore', 'photo.png', '--weights', name, '--out', 'out', '--device', 'cpu', '--steps', '2']) == 0
    restored = Restorer(denoiser, 'cpu').restore(load_image('photo.png'), steps=2)
    assert (load_image('out/photo.png') - restored).abs().max() <= .51 / 255 and .01 < restored.mean() < .99
    assert ('%)' in capsys.readouterr().out) == (config == 'unified-paper') # the wild network is not told what is wrong


@pytest.mark.parametrize('name, config, layout, daclip, length', OFFICIAL)
def test_official_weights_without_their_daclip_say_where_it_belongs(tmp_path, monkeypatch, name, config, layout, daclip, length):
    monkeypatch.chdir(tmp_path)
    torch.save({}, name)
    for source in (name, tmp_path/name):
        with pytest.raises(FileNotFoundError, match=f'put {daclip} into {tmp_path}$') as e: load_weights(source)
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['lastest_EMA.pth', 'universal-wild.pth', 'model.pt', 'weights.ckpt'])
def test_official_weights_are_known_by_name(tmp_path, name):
    torch.save({}, tmp_path/name)
    with pytest.raises(ValueError, match=f'{name}: .* wild-ir.pth and universal-ir.pth$') as e: load_weights(tmp_path/name)
    assert '\n' not in str(e.value)


def test_importing_training_is_light():
    "CLIP's classes take seconds to import: only who needs a DA-CLIP waits for them."
    heavy = {'open_clip', 'transformers', 'torchvision', 'deepinv', 'pandas'}
    load = "import sys; from daclip_repro.training import load_weights; load_weights('sampling-miniature')"
    code = f"{load}; print(*{heavy!r} & set(sys.modules))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == ''


def test_a_daclip_is_no_restorer(tmp_path):
    save_file({'x': torch.zeros(1)}, tmp_path/'d.safetensors', dict(kind='daclip', config='{}'))
    with pytest.raises(ValueError, match='holds a DA-CLIP, expected a restorer'): load_weights(tmp_path/'d.safetensors')


def test_missing_weights_name_what_is_packaged():
    with pytest.raises(FileNotFoundError, match='sampling-miniature'): load_weights('no-such-weights')


@pytest.mark.parametrize('degradation', [None, 'foggy', ['noisy']])
def test_a_network_that_is_told_must_be_told(degradation):
    with pytest.raises(ValueError): build(TOY).sample(torch.rand(2, 3, 16, 16), steps=1, degradation=degradation)


def test_a_daclip_is_known_by_its_tensors(tmp_path):
    "What its header says, and in which order, does not make it another one."
    from safetensors.torch import save_file

    from daclip_repro.training import _print
    tensors = {'a': torch.arange(4.), 'b': torch.ones(2, 2)}
    prints = set()
    for i in range(8):
        save_file(tensors, tmp_path/f'{i}.safetensors', {f'key {j}': str(i) for j in range(9)})
        prints.add(_print(tmp_path/f'{i}.safetensors'))
    save_file(tensors | {'a': torch.arange(4.).flip(0)}, tmp_path/'other.safetensors')
    save_file({'c': tensors['a'], 'b': tensors['b']}, tmp_path/'renamed.safetensors')
    assert len(prints) == 1 and not prints & {_print(tmp_path/'other.safetensors'), _print(tmp_path/'renamed.safetensors')}
