"""The controller: what is trained, what stays CLIP's, losses and their floors, preparation, words, files."""
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from golden_data import full_size
from safetensors.torch import load_file, save_file

from daclip_repro.controller import (
    CLIP_CONFIGS,
    DACLIP,
    Embeddings,
    clip_config,
    clip_loss,
    daclip_loss,
    load_daclip,
    load_daclip_weights,
    make_clip,
    make_tokenizer,
    save_daclip,
)
from daclip_repro.degradations import DEGRADATIONS
from daclip_repro.metrics import clip_transform
from daclip_repro.wild import WILD_COMBINATIONS

TINY = dict(embed_dim=24, vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=3, head_width=32),
            text_cfg=dict(context_length=16, vocab_size=614, width=32, heads=2, layers=1))


def tiny(seed=0, links=True):
    torch.manual_seed(seed)
    model = DACLIP(make_clip(TINY))
    if links:
        for p in model.visual_control.transformer.zero_modules.parameters(): torch.nn.init.normal_(p, std=.05)
    return model.eval()


def images(batch=3, size=32, seed=1): return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
def photos(batch=3, h=50, w=71, seed=1): return torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(seed))
def unit(*shape, seed=0): return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# what is CLIP's and what is trained

def test_zero_links_leave_clip_alone_to_the_last_bit():
    model = tiny(links=False)
    with torch.no_grad():
        content, degradation = model.encode_image(images())
        plain = model.clip.encode_image(images())
    assert torch.equal(content, plain) and torch.equal(degradation, plain)


@pytest.mark.parametrize('link', range(3))
def test_control_i_enters_behind_block_L_minus_1_minus_i(link):
    model, seen = tiny(links=False), {}
    model.visual_control.transformer.zero_modules[link].bias.data[0] = 1
    blocks = model.clip.visual.transformer.resblocks
    def keep(run):
        for i,block in enumerate(blocks): block.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__((run, i), args[0]))
    for run in ('plain', 'controlled'):
        keep(run)
        with torch.no_grad(): model.encode_image(images(), control=run == 'controlled')
        for block in blocks: block._forward_pre_hooks.clear()
    same = [torch.equal(seen['plain', i], seen['controlled', i]) for i in range(3)]
    assert same == [i <= 2 - link for i in range(3)]


def test_clip_without_control_ignores_the_controller():
    model = tiny()
    with torch.no_grad():
        assert torch.equal(model.encode_image(images(), control=False), model.clip.encode_image(images()))
        assert not torch.equal(model.encode_image(images())[0], model.clip.encode_image(images()))


def test_all_of_the_controller_learns_and_nothing_of_clip():
    model = tiny().train()
    tokens = torch.randint(0, 614, (3, 32), generator=torch.Generator().manual_seed(0))
    sum(daclip_loss(**model(images(), tokens))).backward()
    trained = {n for n,p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {n for n,_ in model.named_parameters() if n.startswith('visual_control.') or n == 'logit_scale'}
    assert trained == {n for n,p in model.named_parameters() if p.requires_grad}


def test_the_content_loss_reaches_the_controller_through_the_frozen_encoder():
    model = tiny()
    model.encode_image(images())[0].sum().backward()
    assert model.visual_control.conv1.weight.grad.any() and model.clip.visual.conv1.weight.grad is None


def test_training_mode_leaves_clip_in_evaluation():
    model = tiny().train()
    assert model.visual_control.training and not model.clip.training and not model.visual.transformer.training


def test_the_clip_that_is_given_is_copied_not_shared():
    clip = make_clip(TINY)
    model = DACLIP(clip)
    shared = {p.data_ptr() for p in clip.parameters()} & {p.data_ptr() for p in model.visual_control.parameters()}
    assert not shared and model.logit_scale.data_ptr() != clip.logit_scale.data_ptr()
    assert torch.equal(model.visual_control.ln_post.weight, clip.visual.ln_post.weight)


# embeddings

def test_an_embedding_does_not_depend_on_the_batch():
    model, lq = tiny(), photos(4)
    whole = model.embed(lq)
    for i in range(4):
        for ours, expected in zip(model.embed(lq[i:i+1]), whole): assert torch.allclose(ours, expected[i:i+1], atol=1e-5)


def test_embeddings_are_float32_without_gradient_and_not_normalised():
    model = tiny()
    for e in (*model.embed(photos()), *model.bfloat16().embed(photos())):
        assert e.dtype == torch.float32 and not e.requires_grad and (e.norm(dim=1) - 1).abs().min() > .01
    model = model.float()
    with torch.autocast('cpu', torch.bfloat16): assert all(e.dtype == torch.float32 for e in model.embed(photos()))


def test_without_control_there_is_no_degradation_embedding():
    model = tiny()
    e = model.embed(photos(), control=False)
    assert e.degradation is None and torch.equal(e.content, model.clip.encode_image(model.prepare(photos())))


@pytest.mark.parametrize('h,w', [(32, 32), (32, 47), (33, 90), (200, 64), (5, 9), (1, 1), (321, 123)])
def test_prepare_is_the_official_preparation_up_to_rounding(h, w):
    lq = F.interpolate(photos(1, 9, 9), (h, w), mode='bicubic', antialias=True).clamp(0, 1)
    ours, official = tiny().prepare(lq), clip_transform(lq[0], 32)
    assert ours.shape == (1, 3, 32, 32)
    levels = (ours[0] - official) * torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1) * 255
    assert levels.abs().max() < 4 and levels.abs().mean() < 1


def test_prepare_does_not_overshoot_at_hard_edges():
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    x = tiny().prepare(photos(1, 77, 61).round()) * std + mean
    assert x.min() > -1e-6 and x.max() < 1 + 1e-6


@pytest.mark.parametrize('shape', [(3, 32, 32), (2, 1, 32, 32), (2, 3, 0, 32)])
def test_prepare_refuses(shape):
    with pytest.raises(ValueError, match='lq must be B×3×H×W, got'): tiny().prepare(torch.zeros(shape))


@pytest.mark.parametrize('shape', [(2, 3, 64, 64), (3, 32, 32), (2, 1, 32, 32)])
def test_encode_image_refuses(shape):
    with pytest.raises(ValueError, match='images must be B×3×32×32'): tiny().encode_image(torch.zeros(shape))


def test_forward_matches_its_parts():
    model, tokens = tiny(), torch.randint(0, 614, (3, 32), generator=torch.Generator().manual_seed(0))
    out, (content, degradation) = model(images(), tokens), model.encode_image(images())
    expected = dict(image_features=content, image_degra_features=degradation, text_features=model.encode_text(tokens[:, :16]),
                    text_degra_features=model.encode_text(tokens[:, 16:]))
    assert out.keys() == {*expected, 'logit_scale'} and out['logit_scale'] == model.logit_scale.exp()
    for k,v in expected.items(): assert torch.allclose(out[k], F.normalize(v, dim=-1), atol=1e-6)
    alone = model(images())
    assert alone['text_features'] is None and alone['text_degra_features'] is None


# words

def test_classify_is_a_softmax_of_cosines():
    model, lq = tiny(), photos()
    e, text = model.embed(lq), model.embed_words()
    expected = (model.logit_scale.exp() * F.cosine_similarity(e.degradation[:, None], text[None], dim=-1)).softmax(1)
    for ours in (model.classify(lq), model.classify(lq, text), model.classify(e), model.classify(e, text)):
        assert torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(model.classify(lq, template='a {} photo'), expected, atol=1e-4)


def test_classify_without_control_is_zero_shot_clip():
    model, lq = tiny(), photos()
    model.logit_scale.data += 1
    image = F.normalize(model.clip.encode_image(model.prepare(lq)), dim=-1)
    expected = (model.clip.logit_scale.exp() * image @ model.embed_words(template='a {} photo').T).softmax(1)
    assert torch.allclose(model.classify(lq, template='a {} photo', control=False), expected, atol=1e-5)
    ready = Embeddings(model.embed(lq, control=False).content, None)
    assert torch.allclose(model.classify(ready, template='a {} photo', control=False), expected, atol=1e-5)


def test_a_template_needs_a_place_for_the_word():
    with pytest.raises(ValueError, match='a photo'): tiny().embed_words(template='a photo')


def test_the_short_tokenizer_is_a_prefix_of_the_full_one():
    full, short = make_tokenizer('ViT-B-32'), make_tokenizer('clip-miniature')
    assert list(full.encoder)[:4512] == list(short.encoder)[:4512]
    assert (short.sot_token_id, short.eot_token_id, short.vocab_size) == (4512, 4513, 4514)
    for text in (*DEGRADATIONS, 'a photo of the Eiffel tower in 1889, façade & 夜', 'antidisestablishmentarianism'):
        assert short.decode(short.encode(text)).strip() == full.decode(full.encode(text)).strip()
        assert max(short.encode(text)) < 4512
    assert torch.equal(full(['a photo of a dog']), open_clip.get_tokenizer('ViT-B-32')(['a photo of a dog']))


def test_a_text_that_is_too_long_keeps_its_end_token():
    tokens = make_tokenizer('clip-miniature')(['word ' * 100])
    assert tokens.shape == (1, 24) and tokens[0, -1] == 4513


@pytest.mark.parametrize('vocab_size', [0, 513, 49409])
def test_tokenizer_refuses_impossible_sizes(vocab_size):
    with pytest.raises(ValueError, match='vocab_size'): make_tokenizer(TINY | dict(text_cfg=TINY['text_cfg'] | dict(vocab_size=vocab_size)))


# configurations

def test_a_configuration_is_a_copy():
    clip_config('clip-miniature')['vision_cfg']['width'] = 1
    assert CLIP_CONFIGS['clip-miniature']['vision_cfg']['width'] != 1


@pytest.mark.parametrize('config,words', [('nope', "'nope' is unknown"), ('RN50', 'vision transformer'),
    ('convnext_base', 'vision transformer'), ('xlm-roberta-base-ViT-B-32', 'plain CLIP'),
    ('ViT-B-16-SigLIP', 'no custom_text'), (dict(embed_dim=3), 'lacks text_cfg, vision_cfg')])
def test_configurations_that_cannot_be_steered(config, words):
    with pytest.raises(ValueError, match=words): make_clip(config)


# losses

@pytest.mark.parametrize('batch,words', [(40, 10), (100, 10), (784, 1), (30, 30)])
def test_floor_of_the_published_loss_and_of_positives(batch, words):
    labels = torch.arange(batch) % words
    e = torch.eye(max(words, 2))[labels]
    assert clip_loss(e, e, 100).item() == pytest.approx(math.log(batch / words), abs=1e-4)
    assert clip_loss(e, e, 100, labels).item() == pytest.approx(0, abs=1e-4)


def test_no_embedding_is_below_the_floor():
    labels = torch.tensor([0]*5 + [1]*2 + [2])
    floor = (5*math.log(5) + 2*math.log(2)) / 8
    for seed in range(20): assert clip_loss(unit(8, 6, seed=seed), unit(3, 6, seed=99)[labels], 100) >= floor - 1e-5


def test_positives_with_distinct_words_are_the_published_loss():
    x, y = unit(12, 8), unit(12, 8, seed=1)
    assert clip_loss(x, y, 20, torch.randperm(12)).item() == pytest.approx(clip_loss(x, y, 20).item(), rel=1e-5)


def test_soft_targets_would_be_the_published_loss():
    labels = torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(0))
    x, y = unit(24, 8), unit(4, 8, seed=1)[labels]
    same = (labels[:, None] == labels).double()
    target, logits = same / same.sum(1, keepdim=True), 20 * x.double() @ y.double().T
    soft = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert clip_loss(x.double(), y.double(), 20).item() == pytest.approx(soft.item(), rel=1e-10)


def test_positives_by_hand():
    labels, x, y = torch.tensor([0, 1, 0]), unit(3, 5), unit(3, 5, seed=1)
    logits = (3 * x @ y.T).exp()
    terms = [-(rows[i][labels == labels[i]].sum() / rows[i].sum()).log() for rows in (logits, logits.T) for i in range(3)]
    assert clip_loss(x, y, 3, labels).item() == pytest.approx(sum(terms).item() / 6, rel=1e-5)


def test_positives_act_on_the_degradation_only_and_have_finite_gradients():
    x, y, a, b = (unit(8, 5, seed=s) for s in range(4))
    labels, a = torch.arange(8) % 3, a.requires_grad_()
    plain, grouped = daclip_loss(x, y, a, b, 100), daclip_loss(x, y, a, b, 100, labels)
    assert plain[0] == grouped[0] and grouped[1] < plain[1]
    assert torch.autograd.grad(grouped[1], a)[0].isfinite().all()


def test_losses_refuse_what_does_not_pair():
    with pytest.raises(ValueError, match='one shape'): clip_loss(unit(4, 5), unit(3, 5), 1)
    with pytest.raises(ValueError, match='4 numbers'): clip_loss(unit(4, 5), unit(4, 5), 1, torch.arange(3))


# files

@pytest.fixture
def weights(): return {k: v.clone() for k,v in tiny(seed=5).state_dict().items()}


def test_round_trip_is_exact_in_half_precision(tmp_path, weights):
    path = save_daclip(tiny(seed=5), tmp_path/'a.safetensors', TINY, steps=3)
    loaded = load_daclip(path)
    assert not loaded.training and all(torch.equal(v, weights[k].half().float()) for k,v in loaded.state_dict().items())
    assert not any(k.startswith('visual.') for k in load_file(path)) and [p.name for p in tmp_path.iterdir()] == ['a.safetensors']


def test_saving_refuses_a_wrong_configuration_and_numbers_too_large(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match='config does not describe'): save_daclip(model, tmp_path/'a.safetensors', 'clip-miniature')
    model.visual_control.proj.data[0, 0] = 1e6
    with pytest.raises(ValueError, match='half precision: visual_control.proj'): save_daclip(model, tmp_path/'a.safetensors', TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('wrap', [lambda w: w, lambda w: {'state_dict': w}, lambda w: {f'module.{k}': v for k,v in w.items()},
    lambda w: {'state_dict': {f'module.{k}': v for k,v in w.items()}, 'epoch': 3},
    lambda w: {k: v for k,v in w.items() if not k.startswith('visual.')}], ids=['plain', 'wrapped', 'module', 'both', 'one copy'])
def test_official_layouts_load(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path/'official.pt')
    loaded = load_daclip(tmp_path/'official.pt', config=TINY)
    assert all(torch.equal(v, weights[k]) for k,v in loaded.state_dict().items())


def test_the_robust_checkpoint_loads_by_name_at_full_size(tmp_path):
    "Each tensor is full of a number of its own, which takes one number on disk; half precision needs 2.5 GB of memory."
    draw = torch.Generator().manual_seed(0)
    weights = {k: torch.randn((), generator=draw).half().expand(shape) for k, shape in full_size('daclip_ViT-L-14')['shapes'].items()}
    weights |= {k: weights[f'clip.{k}'] for k in weights if k.startswith('visual.')}
    torch.save(weights, tmp_path/'wild-daclip_ViT-L-14.pt')
    torch.set_default_dtype(torch.half)
    try: loaded = load_daclip(tmp_path/'wild-daclip_ViT-L-14.pt')
    finally: torch.set_default_dtype(torch.float)
    ends = {k: v.flatten()[[0, -1]].tolist() for k,v in loaded.state_dict().items()}
    assert ends == {k: [v.max().item()]*2 for k,v in weights.items()}
    assert loaded.words == WILD_COMBINATIONS and loaded.clip.visual.output_dim == 768


@pytest.mark.parametrize('name,words', [('daclip_ViT-B-32.pt', DEGRADATIONS), ('wild-daclip_ViT-L-14.pt', WILD_COMBINATIONS)])
def test_an_official_name_says_the_words(tmp_path, monkeypatch, weights, name, words):
    monkeypatch.setitem(CLIP_CONFIGS, name[-11:-3], TINY)
    torch.save(weights, tmp_path/name)
    loaded = load_daclip(tmp_path/name)
    assert loaded.words == words and loaded.classify(photos()).shape == (3, len(words))


def test_own_words_win_over_the_name(tmp_path):
    model = DACLIP(make_clip(TINY), ('faded',))
    assert load_daclip(save_daclip(model, tmp_path/'wild-mine.safetensors', TINY)).words == ('faded',)


@pytest.mark.parametrize('change,words', [
    (lambda w: w.pop('visual_control.ln_post.bias'), '1 missing: visual_control.ln_post.bias'),
    (lambda w: w.pop('visual.proj'), '1 missing: visual.proj'),
    (lambda w: w.pop('clip.visual.proj'), '1 missing: clip.visual.proj'),
    (lambda w: w.update({'prompt': torch.zeros(2)}), '1 unexpected: prompt'),
    (lambda w: w.update({'visual.conv1.bias': torch.zeros(2)}), '1 unexpected: visual.conv1.bias'),
    (lambda w: w.update({'clip.text_projection': torch.zeros(3, 2)}),
     r'1 of the wrong shape: clip.text_projection \(3×2, expected 32×24\)'),
    (lambda w: w.update({'logit_scale': 3.}), r'logit_scale \(float, expected a scalar\)')])
def test_misfits_are_named_and_nothing_is_loaded(weights, change, words):
    change(weights)
    model = tiny()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    with pytest.raises(ValueError, match='the state_dict does not fit this DACLIP: .*' + words):
        load_daclip_weights({'state_dict': weights}, model)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())


def test_files_that_are_not_a_daclip(tmp_path, weights):
    path = save_daclip(tiny(), tmp_path/'a.safetensors', TINY)
    with pytest.raises(FileNotFoundError, match='neither a file nor packaged'): load_daclip('nowhere')
    with pytest.raises(ValueError, match='belongs to another CLIP'): load_daclip(path, config='ViT-B-32')
    torch.save(weights, tmp_path/'official.pt')
    with pytest.raises(ValueError, match='does not say which CLIP'): load_daclip(tmp_path/'official.pt')
    torch.save([1, 2], tmp_path/'list.pt')
    with pytest.raises(ValueError, match='holds a list'): load_daclip(tmp_path/'list.pt', config=TINY)
    (tmp_path/'cut.safetensors').write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match='cut.safetensors: not a readable safetensors file'): load_daclip(tmp_path/'cut.safetensors')
    save_file({'x': torch.zeros(1)}, tmp_path/'other.safetensors', {'config': '{}'})
    with pytest.raises(ValueError, match='other weights than a DA-CLIP'): load_daclip(tmp_path/'other.safetensors')
