"The degradation-aware decoder: any autoencoder, what is trained and what is not, the full size once, a training that is interrupted."
import copy
import csv
import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from daclip_repro.diff_restorer import decoder as dd
from daclip_repro.diff_restorer.decoder import (
    DECODER_CONFIGS,
    KINDS,
    RDB,
    DecoderTrainer,
    DegradationDecoder,
    PatchDiscriminator,
    balance,
    decoder_validator,
    encode,
    hinge_loss,
    load_decoder,
    load_vae,
    perceptual,
    reconstruct,
    save_decoder,
    train_decoder,
    watch_terms,
)
from daclip_repro.loop import make_config
from daclip_repro.photos import Photo, save_image


def sizes(*channels, down='DownEncoderBlock2D', up='UpDecoderBlock2D', **more):
    n = len(channels)
    return dict(down_block_types=(down,) * n, up_block_types=(up,) * n, block_out_channels=channels, norm_num_groups=4) | more

TINY = sizes(8, 16)
AUTOENCODERS = dict(
    tiny=TINY, one_level=sizes(8), deep=sizes(4, 8, 12, 16, layers_per_block=2),
    attention=sizes(8, 8, down='AttnDownEncoderBlock2D', up='AttnUpDecoderBlock2D'),
    bare=sizes(8, 16, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, latent_channels=2),
    miniature=sizes(32, 64, 128, layers_per_block=1, norm_num_groups=16))
STABLE = sizes(128, 256, 512, 512, layers_per_block=2, norm_num_groups=32)


def autoencoder(config=TINY, seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(**config)


def picture(i, side=32, n=1): return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(i))


def embed(lq): return lq.mean((2, 3))


def make(kind='degradation', vae=None, seed=0, **more):
    torch.manual_seed(seed)
    return DegradationDecoder(vae or autoencoder(), kind, **dict(emb_dim=3, growth=4, layers=2) | more)


def trained(model): return {n for n, p in model.named_parameters() if p.requires_grad}


# the autoencoder, whatever it is made of

@pytest.mark.parametrize('name', AUTOENCODERS)
def test_features_and_latent(name):
    vae, image = autoencoder(AUTOENCODERS[name]), picture(0, 32, 2)
    channels = vae.config.block_out_channels
    q, features = encode(vae, image)
    assert [f.shape for f in features] == [(2, c, 32 >> level, 32 >> level) for level, c in enumerate(channels)]
    assert torch.equal(q.mode(), vae.encode(2 * image - 1).latent_dist.mode())
    again = vae.encoder.conv_in(2 * image - 1)
    for level, block in enumerate(vae.encoder.down_blocks):
        if level < len(channels) - 1: assert torch.equal(block(again), block.downsamplers[0](features[level]))
        again = block(again)
    assert torch.equal(again, features[-1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vae.modules())


@pytest.mark.parametrize('name', AUTOENCODERS)
@pytest.mark.parametrize('kind', KINDS)
def test_untrained_it_is_the_autoencoders_own(name, kind):
    vae, hq, lq = autoencoder(AUTOENCODERS[name]), picture(0), picture(1)
    decoder = make(kind, vae)
    z = vae.encode(2 * hq - 1).latent_dist.mode()
    assert torch.equal(decoder(z, lq, embed(lq)), (vae.decode(z).sample + 1) / 2)
    assert torch.equal(reconstruct(decoder, hq, lq, embed), decoder(z, lq, embed(lq)))


def test_hooks_go_even_when_the_encoder_fails():
    vae = autoencoder()
    with pytest.raises(RuntimeError): encode(vae, torch.rand(1, 5, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vae.modules())


def test_the_autoencoder_itself_stays_as_it_was():
    vae = autoencoder()
    before = copy.deepcopy(vae.state_dict())
    decoder = make(vae=vae)
    with torch.no_grad():
        for p in decoder.parameters(): p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items()) and all(p.requires_grad for p in vae.parameters())


@pytest.mark.parametrize('changes, named', [
    (dict(lq=None), 'lq is None: expected 2×3×16×16'),
    (dict(lq=picture(0, 8, 2)), 'lq is 2×3×8×8: expected 2×3×16×16 for a latent of 2×4×8×8'),
    (dict(lq=picture(0, 16, 1)), 'lq is 1×3×16×16'), (dict(degradation=None), 'degradation is None: expected 2×3'),
    (dict(degradation=torch.rand(2, 4)), 'degradation is 2×4')])
def test_what_does_not_belong_together_is_named(changes, named):
    given = dict(z=torch.rand(2, 4, 8, 8), lq=picture(0, 16, 2), degradation=torch.rand(2, 3)) | changes
    with pytest.raises(ValueError, match=named) as e: make()(**given)
    assert '\n' not in str(e.value)


def test_kinds_are_named():
    with pytest.raises(ValueError, match="kind 'both' is unknown"): make('both')
    with pytest.raises(ValueError, match='train_decoder is False'): make('plain', train_decoder=False)


# the block

def test_rdb_is_the_equation():
    torch.manual_seed(0)
    block, x, told = RDB(6, 3, growth=2, layers=2), torch.randn(2, 6, 5, 5), torch.randn(2, 3)
    assert torch.equal(block(x, told), x)
    for p in block.parameters(): nn.init.normal_(p, std=.3)
    scale, shift = block.modulation(told).chunk(2, dim=1)
    normed = (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    h = [normed * (1 + scale[..., None, None]) + shift[..., None, None]]
    for conv in block.dense: h.append(conv(torch.cat(h, dim=1)).relu())
    assert torch.allclose(block(x, told), x + block.fuse(torch.cat(h, dim=1)), atol=1e-5)


# what is trained

def expected(vae, kind, train_decoder):
    own = {f'vae.{n}' for n, _ in vae.named_parameters() if n.startswith(('decoder.', 'post_quant_conv.'))} if train_decoder else set()
    return own | {n for n, _ in make(kind, vae).named_parameters() if n.startswith(('links.', 'rdbs.'))}


@pytest.mark.parametrize('kind, train_decoder', [
    ('plain', True), ('skip', True), ('skip', False), ('degradation', True), ('degradation', False)])
def test_gradients_reach_what_is_trained_and_nothing_else(kind, train_decoder):
    vae, hq, lq = autoencoder(), picture(0, 16, 2), picture(1, 16, 2)
    decoder = make(kind, vae, train_decoder=train_decoder)
    names = trained(decoder)
    assert names == expected(vae, kind, train_decoder) and names
    optimiser = torch.optim.SGD([p for p in decoder.parameters() if p.requires_grad], lr=.05)
    def step():
        optimiser.zero_grad()
        (reconstruct(decoder, hq, lq, embed) - hq).square().mean().backward()
        reached = {n for n, p in decoder.named_parameters() if p.grad is not None and p.grad.any()}
        assert all(p.grad is None for n, p in decoder.named_parameters() if n not in names)
        optimiser.step()
        return reached
    # a key's bias moves all scores of a softmax alike: its gradient is zero, up to rounding
    free = {n for n in names if n.endswith('to_k.bias')}
    behind = {n for n in names if n.startswith('rdbs.')}
    last = {n for n in behind if 'fuse' in n}
    assert step() - free == names - behind - free, 'zero links stop what lies behind them'
    assert step() - free == names - (behind - last) - free
    assert step() - free == names - free


def test_training_moves_the_decoder_and_not_the_encoder(tmp_path):
    trainer = small_trainer(tmp_path, steps=4)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.fit(PHOTOS, progress=False)
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    free = {n for n in before if n.endswith('to_k.bias')}
    assert moved - free == trained(trainer.model) - free
    assert not any(k.startswith('decoder.vae.encoder') for k in torch.load(trainer.checkpoint, weights_only=True)['model'])


# the full size

def rdb_count(c, w, g, layers): # as on the page
    return (w + 1) * 2*c + sum(9 * (c + k*g) * g + g for k in range(layers)) + (c + layers*g) * c + c


def test_the_full_size_runs_once():
    "Stable Diffusion 1.5's autoencoder and the decoder with random numbers, bfloat16: a latent of 32×32, a photograph of 256×256."
    with torch.device('meta'): decoder = DegradationDecoder(AutoencoderKL(**STABLE), emb_dim=768)
    dims, count = (128, 256, 512, 512), {part: 0 for part in ('vae', 'links', 'rdbs')}
    for name, p in decoder.named_parameters():
        if p.requires_grad: count[name.split('.')[0]] += p.numel()
    links = sum(a * b + b for a, b in zip(dims, (*dims[1:], dims[-1])))
    assert count == dict(vae=49_490_199, links=links, rdbs=sum(rdb_count(c, 768, 32, 4) for c in dims))
    decoder = decoder.to(torch.bfloat16).to_empty(device='cpu')
    rng = torch.Generator().manual_seed(0)
    for p in decoder.parameters(): nn.init.normal_(p, std=.02, generator=rng)
    with torch.no_grad():
        lq, z, told = (torch.randn(*shape, generator=rng).bfloat16() for shape in ((1, 3, 256, 256), (1, 4, 32, 32), (1, 768)))
        image = decoder(z, lq, told)
    assert image.shape == (1, 3, 256, 256) and image.isfinite().all()


# the objective

def test_hinge_and_patches():
    assert hinge_loss(torch.tensor([2., 0.]), torch.tensor([-3., 1.])).item() == pytest.approx((.5 + 1) / 2)
    torch.manual_seed(0)
    judge, images = PatchDiscriminator(8).double(), torch.rand(2, 3, 96, 96).double().requires_grad_()
    answers = judge(images)
    seen = torch.autograd.grad(answers[0, 0, 5, 5], images)[0]
    assert answers.shape == (2, 1, 10, 10) and not seen[1].any(), 'an answer depends on its own image alone'
    assert torch.allclose(judge(images[:1]), answers[:1])


def test_balance_makes_gradients_equally_long():
    out = torch.rand(1, 3, 8, 8, requires_grad=True)
    near, game = out.square().mean(), 1000 * out.sum()
    length = lambda loss: torch.autograd.grad(loss, out, retain_graph=True)[0].norm()
    assert length(balance(near, game, out) * game).item() == pytest.approx(length(near).item(), rel=1e-3)


def test_the_objective_is_the_weighted_sum(tmp_path):
    trainer = small_trainer(tmp_path, perceptual='stlpips', perceptual_weight=.3, adversarial=.5)
    hq, lq = trainer.draw(PHOTOS, 0)
    out = reconstruct(trainer.model['decoder'], hq, lq, embed)
    loss, terms = trainer.objective(out, hq)
    near = (out - hq).abs().mean() + .3 * dd.STLPIPS()(out.detach(), hq).mean()
    game = -trainer.model['discriminator'](out).mean()
    assert terms['l1'] == pytest.approx((out - hq).abs().mean().item()) and terms['adversarial'] == pytest.approx(game.item())
    g = [torch.autograd.grad(x, out, retain_graph=True)[0] for x in (trainer.perceptual.network(out, hq, normalize=True).mean(), game)]
    first = torch.sign(out - hq) / out.numel() + .3 * g[0]
    assert loss.item() == pytest.approx((near + .5 * first.norm() / (g[1].norm() + 1e-4) * game).item(), rel=1e-3)


def test_the_game_trains_both_sides_with_their_own_losses(tmp_path):
    trainer = small_trainer(tmp_path, adversarial=.5)
    batch = trainer.draw(PHOTOS, 0)
    trainer.gradients(batch)
    hq, lq = batch
    decoder, judge = trainer.model['decoder'], trainer.model['discriminator']
    made = reconstruct(decoder, hq, lq, embed)
    own = torch.autograd.grad(hinge_loss(judge(hq), judge(made.detach())), list(judge.parameters()), retain_graph=True)
    for g, p in zip(own, judge.parameters()): assert torch.allclose(g, p.grad, atol=1e-6)
    loss, _ = trainer.objective(made, hq)
    found = decoder.vae.decoder.conv_out.weight
    assert torch.allclose(torch.autograd.grad(loss, found)[0], found.grad, atol=1e-6)


def test_the_game_begins_when_it_is_told(tmp_path):
    trainer = small_trainer(tmp_path, adversarial=.5, adversarial_from=2, steps=3)
    first = {n: p.clone() for n, p in trainer.model['discriminator'].named_parameters()}
    trainer.fit(PHOTOS, until=2, progress=False)
    assert all(torch.equal(p, first[n]) for n, p in trainer.model['discriminator'].named_parameters())
    assert 'adversarial' not in watch_terms(trainer)
    trainer.fit(PHOTOS, progress=False)
    assert any(not torch.equal(p, first[n]) for n, p in trainer.model['discriminator'].named_parameters())
    assert {'l1', 'adversarial', 'discriminator'} <= set(watch_terms(trainer))


def test_a_perceptual_distance_without_weights_is_refused_never_skipped(tmp_path, monkeypatch):
    def load(self): raise OSError('weights alexnet are not in the cache')
    monkeypatch.setattr(dd.LPIPS, 'load', load)
    with pytest.raises(RuntimeError, match="'lpips', which is not available .weights alexnet") as e:
        small_trainer(tmp_path, perceptual='lpips')
    assert "''" in str(e.value) and '\n' not in str(e.value)
    assert perceptual('') is None
    trainer = small_trainer(tmp_path, steps=2)
    log = trainer.fit(PHOTOS, log_every=2, watch=(watch_terms,), progress=False)
    assert log[-1]['perceptual'] == 'left out' and log[-1]['l1'] == pytest.approx(log[-1]['loss'])


# the trainer

PHOTOS = [(picture(i, 40)[0] * 255).byte() for i in range(3)]
SMALL = replace(DECODER_CONFIGS['decoder-miniature'], emb_dim=3, growth=4, layers=2, steps=6, batch=2, patch=32, zoom=1., warmup=1,
                perceptual='')


def small_trainer(folder, vae=None, **changes):
    return DecoderTrainer(replace(SMALL, **changes), folder, 'cpu', vae or autoencoder(), None if changes.get('kind') else embed)


@pytest.mark.parametrize('changes', [{}, dict(kind='skip', train_decoder=False), dict(adversarial=.5, adversarial_from=2)],
                         ids=['all', 'new', 'game'])
def test_interrupted_and_resumed_the_weights_are_the_same(tmp_path, changes):
    straight = small_trainer(tmp_path/'a', **changes)
    straight.fit(PHOTOS, progress=False)
    small_trainer(tmp_path/'b', **changes).fit(PHOTOS, until=3, progress=False)
    resumed = small_trainer(tmp_path/'b', **changes)
    assert resumed.step == 3
    resumed.fit(PHOTOS, progress=False)
    for mine, other in ((straight.model, resumed.model), (straight.average, resumed.average)):
        for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True): assert torch.equal(a, b)


def test_a_batch_is_a_function_of_the_step(tmp_path):
    first, again = (small_trainer(tmp_path).draw(PHOTOS, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for other in (small_trainer(tmp_path).draw(PHOTOS, 4), small_trainer(tmp_path, seed=1).draw(PHOTOS, 3)):
        assert not torch.equal(other[0], first[0]) and not torch.equal(other[1], first[1])


def test_training_helps(tmp_path):
    trainer = small_trainer(tmp_path, steps=60, lr=5e-3, ema=0.)
    watch = decoder_validator(PHOTOS, trainer.config, every=1)
    before = watch(trainer)
    trainer.fit(PHOTOS, progress=False)
    after = watch(trainer)
    assert after['clean'] > before['clean'] + 1 and after['degraded'] > before['degraded'] + 1
    assert decoder_validator(PHOTOS, trainer.config, every=7)(trainer) == {}


def test_the_wild_chain(tmp_path):
    trainer = small_trainer(tmp_path, chain='wild')
    assert trainer.gradients(trainer.draw(PHOTOS, 0)) > 0
    assert set(decoder_validator(PHOTOS, trainer.config, 1)(trainer)) == {'clean', 'degraded'}


def test_without_an_embedding_there_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match='give the trainer embed='):
        DecoderTrainer(replace(SMALL, daclip=''), tmp_path, 'cpu', autoencoder())
    assert DecoderTrainer(replace(SMALL, daclip='', kind='skip'), tmp_path, 'cpu', autoencoder()).embed is None


def test_daclip_tells_the_degradation(tmp_path):
    trainer = DecoderTrainer(replace(SMALL, emb_dim=128), tmp_path, 'cpu', autoencoder())
    assert trainer.embed(picture(0, 32, 2)).shape == (2, 128) and trainer.gradients(trainer.draw(PHOTOS, 0)) > 0


@pytest.mark.parametrize('changes, named', [
    (dict(kind='both'), 'kind'), (dict(perceptual='vgg'), 'perceptual'), (dict(growth=0), 'growth'), (dict(layers=0), 'layers'),
    (dict(emb_dim=0), 'emb_dim'), (dict(adversarial=-1.), 'adversarial'), (dict(perceptual_weight=float('nan')), 'perceptual_weight')])
def test_bad_settings_are_named(changes, named):
    with pytest.raises(ValueError, match=named): make_config(changes, DECODER_CONFIGS['decoder-paper'])


def test_the_papers_settings():
    config = DECODER_CONFIGS['decoder-paper']
    assert (config.lr, config.lr_min, config.batch, config.kind) == (1e-5, 1e-5, 4, 'degradation')
    assert config.steps * config.batch / 25 == pytest.approx(52_801, abs=1)


# weights

@pytest.mark.parametrize('changes', [{}, dict(kind='skip'), dict(train_decoder=False), dict(kind='plain')],
                         ids=['all', 'skip', 'new', 'plain'])
def test_weights_come_back(tmp_path, changes):
    vae, config = autoencoder(), replace(SMALL, **changes)
    decoder = make(config.kind, vae, train_decoder=config.train_decoder)
    with torch.no_grad():
        for p in decoder.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p) * .1)
    again = load_decoder(save_decoder(decoder, config, tmp_path/'own.safetensors', seconds=3.), vae)
    for (name, a), b in zip(decoder.named_parameters(), again.parameters(), strict=True): assert torch.allclose(a, b, atol=2e-3), name
    assert 'seconds of training | 3' in (tmp_path/'own.md').read_text() and not again.training


def test_strange_weights_are_refused(tmp_path, monkeypatch):
    vae = autoencoder()
    path = save_decoder(make(vae=vae), SMALL, tmp_path/'own.safetensors')
    with pytest.raises(ValueError, match='trained with another autoencoder'): load_decoder(path, autoencoder(seed=1))
    with pytest.raises(FileNotFoundError, match="decoder 'nowhere' is neither a file nor packaged"): load_decoder('nowhere', vae)
    wrong = make(vae=vae)
    wrong.links[0].weight.data.fill_(1e6)
    with pytest.raises(ValueError, match='not finite in half precision: links.0.weight'):
        save_decoder(wrong, SMALL, tmp_path/'big.safetensors')
    with monkeypatch.context() as m:
        m.setattr(dd, '_trained', lambda decoder: trained(decoder) - {'links.0.weight'})
        path = save_decoder(make(vae=vae), SMALL, tmp_path/'few.safetensors')
    with pytest.raises(ValueError, match='1 missing: links.0.weight'): load_decoder(path, vae)


def test_an_autoencoder_of_diffusers_is_found_in_its_pipeline(tmp_path):
    autoencoder().save_pretrained(tmp_path/'pipe'/'vae')
    assert load_vae(tmp_path/'pipe').config.block_out_channels == [8, 16]
    with pytest.raises(OSError, match='is not packaged, and diffusers cannot load it') as e: load_vae(tmp_path/'nowhere')
    assert '\n' not in str(e.value)


# from photographs to weights

def test_photographs_and_pairs_train_a_decoder(tmp_path, capsys):
    photos = [Photo(str(i), lambda i=i: picture(i, 40)[0]) for i in range(4)]
    config, vae = replace(SMALL, steps=50, degradations=('noisy', 'rainy')), autoencoder()
    path = train_decoder(photos, tmp_path/'photos', config, device='cpu', about='noise', vae=vae, embed=embed)
    assert '3 photographs to train on, 1 held out, on cpu, from step 0 of 50' in capsys.readouterr().out
    line = list(csv.DictReader(open(tmp_path/'photos'/'log.csv')))[-1]
    assert float(line['clean']) > 0 and float(line['degraded']) > 0 and line['perceptual'] == 'left out'
    assert load_decoder(path, vae).kind == 'degradation' and '| what they are | noise |' in path.with_suffix('.md').read_text()
    for split in ('train', 'val'):
        for side in ('LQ', 'GT'): save_image(picture(5, 40)[0], tmp_path/'pairs'/split/'negative'/side/'0.png')
    path = train_decoder(tmp_path/'pairs', tmp_path/'own', config, device='cpu', vae=vae, embed=embed)
    header = json.loads(dd.read_header(path)['config'])
    assert header['degradations'] == ['negative'] and '1 pairs to train on, 1 held out' in capsys.readouterr().out
