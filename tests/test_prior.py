"A prior in miniature: two trainings that go on, files that know each other, and Stable Diffusion's layout on the disk."
import csv
import json
from dataclasses import replace

import diffusers
import pytest
import torch

from daclip_repro import prior as pr
from daclip_repro.photos import Photo, packaged_photos
from daclip_repro.prior import (
    AutoencoderConfig,
    AutoencoderTrainer,
    Captioned,
    Prior,
    PriorConfig,
    PriorTrainer,
    load_autoencoder,
    load_prior,
    packaged_priors,
    save_network,
    train_prior,
)
from daclip_repro.training import packaged_weights

SMALL = dict(steps=4, batch=2, patch=32, warmup=1)
VAE, LATENT = AutoencoderConfig(**SMALL), PriorConfig(**SMALL)


def picture(i, h=40, w=52): return torch.rand(3, h, w, generator=torch.Generator().manual_seed(i))
def photos(n=6, **kw): return [Photo(f'{i}', lambda i=i: picture(i), **({'caption': f'thing {i}'} | kw)) for i in range(n)]
def source(n=5): return Captioned([(picture(i) * 255).byte() for i in range(n)], [f'thing {i}' for i in range(n)])


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    "Networks of a few thousand numbers, f = 4 as in the miniature."
    monkeypatch.setattr(pr, 'AUTOENCODER', pr.AUTOENCODER | dict(block_out_channels=(4, 4, 8), norm_num_groups=2, sample_size=32))
    monkeypatch.setattr(pr, 'UNET', pr.UNET | dict(block_out_channels=(4, 8, 8), norm_num_groups=2, sample_size=8))


@pytest.fixture
def vae(tmp_path):
    "A file with an autoencoder that has learned nothing."
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**pr.AUTOENCODER)
    model.register_to_config(scaling_factor=.7)
    return save_network(model, VAE, tmp_path/'vae.safetensors')


@pytest.fixture
def latent(vae, tmp_path):
    "A file with a prior that has learned nothing, its configuration and the network."
    config = replace(LATENT, autoencoder=str(vae))
    unet = PriorTrainer(config, tmp_path/'unused', 'cpu').model
    return save_network(unet, config, tmp_path/'latent.safetensors'), config, unet


def same(a, b, **kw):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], **kw) for k in a)


def test_what_is_saved_comes_back(latent, vae):
    path, config, unet = latent
    prior = load_prior(path)
    assert same(prior.unet, unet, atol=1e-3) and same(prior.vae, load_autoencoder(vae), atol=0)
    assert prior.vae.config.scaling_factor == .7 and not any(p.requires_grad for p in prior.parameters())
    x = torch.stack([picture(i, 32, 32) for i in range(2)])
    z = prior.encode(x)
    assert z.shape == (2, 4, 8, 8) and torch.allclose(z / .7, prior.vae.encode(2 * x - 1).latent_dist.mean)
    assert torch.allclose(prior.decode(z), (prior.vae.decode(z / .7).sample / 2 + .5).clamp(0, 1), atol=1e-6)
    drawn = prior.sample(['a', 'b'], steps=2, size=48, progress=False)
    assert drawn.shape == (2, 3, 48, 48) and 0 <= drawn.min() and drawn.max() <= 1
    alone = prior.sample(['b'], seeds=[1], steps=2, size=48, progress=False)
    assert torch.allclose(drawn[1:], alone, atol=1e-4), 'depends on its seed alone'
    assert '| autoencoder |' in path.with_suffix('.md').read_text() and 'AutoencoderKL' in vae.with_suffix('.md').read_text()


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    model = diffusers.AutoencoderKL(**pr.AUTOENCODER)
    model.encoder.conv_in.bias.data[0] = 1e6 # more than half precision holds
    with pytest.raises(ValueError, match='not finite in half precision: encoder.conv_in.bias'):
        save_network(model, VAE, tmp_path/'x.safetensors')
    assert not (tmp_path/'x.safetensors').exists()


@pytest.mark.parametrize('kind', [AutoencoderTrainer, PriorTrainer])
def test_an_interrupted_training_ends_the_same(kind, vae, tmp_path):
    config = replace(LATENT, autoencoder=str(vae)) if kind is PriorTrainer else VAE
    how, whole = dict(log_every=2, progress=False), kind(config, tmp_path/'whole', 'cpu')
    whole.fit(source(), **how)
    kind(config, tmp_path/'parts', 'cpu').fit(source(), until=2, **how)
    resumed = kind(config, tmp_path/'parts', 'cpu')
    assert resumed.step == 2 and not same(resumed.model, whole.model, atol=0)
    resumed.fit(source(), **how)
    assert same(resumed.model, whole.model, atol=0) and same(resumed.average, whole.average, atol=0)
    assert [line['loss'] for line in resumed.log] == [line['loss'] for line in whole.log]


def test_some_captions_are_dropped(vae, tmp_path):
    def tokens(**kw):
        trainer = PriorTrainer(replace(LATENT, autoencoder=str(vae), batch=40, **kw), tmp_path/str(kw), 'cpu')
        empty = trainer.text.tokenizer([''])
        return (trainer.draw(source(), 0)[1] == empty).all(1).float().mean()
    assert tokens(dropped=0.) == 0 and tokens(dropped=1.) == 1 and .2 < tokens(dropped=.5) < .8


def test_from_photographs_to_a_prior(tmp_path, capsys):
    steps = dict(steps=50, batch=1)
    vae = train_prior(photos(), tmp_path/'a', replace(VAE, **steps), 'mine', 'cpu', about='noise')
    row = list(csv.DictReader(open(tmp_path/'a'/'log.csv')))[-1]
    assert row['step'] == '50' and 0 < float(row['psnr']) < 30 and '| what they are | noise |' in vae.with_suffix('.md').read_text()
    scale = load_autoencoder(vae).config.scaling_factor
    assert scale > 0 and scale != diffusers.AutoencoderKL(**pr.AUTOENCODER).config.scaling_factor
    path = train_prior(photos(), tmp_path/'p', replace(LATENT, autoencoder=str(vae), **steps), 'drawn', 'cpu')
    row = list(csv.DictReader(open(tmp_path/'p'/'log.csv')))[-1]
    assert .1 < float(row['held_out']) < 3 and load_prior(path).sample(['x'], steps=2, progress=False).shape == (1, 3, 32, 32)
    assert 'drawn: 5 photographs to train on, 1 held out, on cpu, from step 0 of 50' in capsys.readouterr().out
    moved = tmp_path/'elsewhere' # with its autoencoder beside it
    moved.mkdir()
    for p in (path, vae): p.rename(moved/p.name)
    assert load_prior(moved/path.name).vae.config.scaling_factor == scale


def test_a_prior_refuses_what_it_was_not_trained_with(latent, vae, tmp_path):
    path, _, _ = latent
    torch.manual_seed(1)
    save_network(diffusers.AutoencoderKL(**pr.AUTOENCODER), VAE, vae)
    with pytest.raises(ValueError, match='was trained with another autoencoder than .*vae.safetensors'): load_prior(path)
    with pytest.raises(ValueError, match='holds autoencoder, expected a file of kind prior'): load_prior(vae)
    vae.unlink()
    with pytest.raises(FileNotFoundError, match=r'vae.safetensors. is neither a file nor packaged \(these are: autoencoder-min'):
        load_prior(path)
    with pytest.raises(FileNotFoundError, match="prior 'none' is neither"): load_prior('none')


def test_labels_are_needed_for_words_alone(tmp_path):
    with pytest.raises(ValueError, match='no labels: give --captions'): train_prior(photos(caption=None), tmp_path, LATENT, device='cpu')
    assert train_prior(photos(caption=None), tmp_path, replace(VAE, steps=1), device='cpu').is_file()


def test_the_packaged_ones_load_and_restore_nothing():
    names = {'autoencoder': 'autoencoder-miniature', 'prior': 'prior-miniature'}
    for kind, name in names.items(): assert name in packaged_priors(kind) and name not in packaged_weights()
    prior = load_prior()
    x = torch.stack([pr.fit_square(p.load(), 64) for p in packaged_photos()[:2]])
    assert (prior.decode(prior.encode(x)) - x).square().mean() < .01
    assert .8 < prior.encode(x).std() < 1.3, 'as wide as the noise'


@pytest.fixture
def pipeline(tmp_path):
    "A folder in the layout of Stable Diffusion, tiny."
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    folder = tmp_path/'pipeline'
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**pr.AUTOENCODER).save_pretrained(folder/'vae')
    diffusers.UNet2DConditionModel(**pr.UNET, cross_attention_dim=8).save_pretrained(folder/'unet')
    pr.stable_schedule().save_pretrained(folder/'scheduler')
    small = dict(vocab_size=600, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPTextConfig(**small, max_position_embeddings=77, eos_token_id=1, bos_token_id=0)
    CLIPTextModel(config).save_pretrained(folder/'text_encoder')
    letters = [chr(i) for i in range(97, 123)]
    words = ['<|startoftext|>', '<|endoftext|>', *letters, *(f'{c}</w>' for c in letters)]
    (tmp_path/'vocab.json').write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path/'merges.txt').write_text('#version: 0.2\n')
    CLIPTokenizer(str(tmp_path/'vocab.json'), str(tmp_path/'merges.txt'), model_max_length=77).save_pretrained(folder/'tokenizer')
    return folder


def test_stable_diffusions_layout_is_read(pipeline):
    prior = Prior.from_pretrained(str(pipeline))
    assert prior.text(['cat', 'a long caption of a dog ' * 30]).shape == (2, 77, 8)
    assert not torch.allclose(*prior.text(['cat', 'dog']), atol=1e-3) and prior.scheduler.config.prediction_type == 'epsilon'
    assert prior.sample(['cat'], steps=2, progress=False).shape == (1, 3, 32, 32)


def test_stable_diffusion_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(OSError, match='holds no Stable Diffusion that diffusers can read'): Prior.from_pretrained(str(tmp_path))
    monkeypatch.setattr(pr, 'reachable', lambda url: False)
    with pytest.raises(OSError, match='^the prior nobody/nothing is not in the cache and http.* does not answer$'):
        Prior.from_pretrained('nobody/nothing')
    class Part:
        @staticmethod
        def from_pretrained(*_, **kw): raise OSError('a page of advice') if kw.get('local_files_only') else ConnectionError('more advice')
    monkeypatch.setattr(pr, 'reachable', lambda url: True)
    monkeypatch.setattr(diffusers, 'AutoencoderKL', Part)
    with pytest.raises(OSError, match=r'^the prior nobody/nothing could not be downloaded \(ConnectionError\)$'):
        Prior.from_pretrained('nobody/nothing')
