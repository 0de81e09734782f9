"Training the controller: the gradient of a batch in parts and in two processes, tables of captions, the captioner, a run from a folder."
import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from daclip_repro import controller_training as ct
from daclip_repro.controller import CLIP_CONFIGS, DACLIP, load_daclip, make_clip, save_daclip
from daclip_repro.controller_training import (
    CONTROLLER_CONFIGS,
    ControllerTrainer,
    PairFiles,
    Photographs,
    blip,
    controller_validator,
    generate_captions,
    load_clip,
    one_line,
    pair_files,
    read_titles,
    train_controller,
)
from daclip_repro.loop import make_config, step_rng
from daclip_repro.photos import Photo, read_captions, save_image
from daclip_repro.unet import read_header
from daclip_repro.wild import WILD_COMBINATIONS

TINY = dict(embed_dim=24, vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=2, head_width=32),
            text_cfg=dict(context_length=16, vocab_size=614, width=32, heads=2, layers=1))


def picture(i, h=36, w=44): return torch.rand(3, h, w, generator=torch.Generator().manual_seed(i))


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    CLIP_CONFIGS['tiny'] = TINY
    torch.manual_seed(0)
    yield str(save_daclip(DACLIP(make_clip(TINY)), tmp_path_factory.mktemp('clip')/'clip.safetensors', 'tiny'))
    del CLIP_CONFIGS['tiny']


@pytest.fixture(scope='module')
def config(clip):
    return replace(CONTROLLER_CONFIGS['daclip-miniature-new'], model='tiny', pretrained=clip, content='caption', batch=12, patch=24,
                   zoom=1.5, steps=4, warmup=1, lr=1e-2)


@pytest.fixture(scope='module')
def source(): return Photographs([(picture(i) * 255).byte() for i in range(5)], [f'thing number {i}' for i in range(5)])


@pytest.fixture
def folder(tmp_path):
    "Two made-up degradations of three photographs, in train and val."
    for split in ('train', 'val'):
        for i in range(3):
            hq = picture(i + 10 * (split == 'val'))
            for word, lq in (('negative', 1 - hq), ('red-cast', hq * torch.tensor([1., .4, .3]).view(3, 1, 1))):
                for side, image in (('LQ', lq), ('GT', hq)): save_image(image, tmp_path/'pairs'/split/word/side/f'{i}.png')
    return tmp_path/'pairs'


def move_links(trainer):
    rng = torch.Generator().manual_seed(0)
    for p in trainer.model.visual_control.transformer.zero_modules.parameters(): torch.nn.init.normal_(p, std=.05, generator=rng)
    return trainer


def loss(trainer, source): return trainer.gradients(trainer.draw(source, trainer.step)) # and leaves the gradients


def gradient(trainer): return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


# the gradient of the whole batch

@pytest.mark.parametrize('changes', [{}, dict(content='image'), dict(positives=True), dict(robust=.3)],
                         ids=['caption', 'image', 'positives', 'robust'])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(config, source, tmp_path, changes):
    found = []
    for micro in (0, 1, 5, 100):
        trainer = ControllerTrainer(replace(config, micro=micro, **changes), tmp_path, 'cpu')
        found.append((loss(move_links(trainer), source), gradient(trainer)))
    (expected, whole), *parts = found
    assert whole.abs().max() > 1e-3
    for other, g in parts: assert other == pytest.approx(expected, rel=1e-5) and (g - whole).abs().max() < 1e-5 * whole.abs().max()


SCRIPT = """
import json, torch
from daclip_repro.controller_training import *
from daclip_repro.loop import make_config
config = make_config(json.load(open('config.json')), CONTROLLER_CONFIGS['daclip-miniature-new'])
trainer = ControllerTrainer(config, 'out', 'cpu')
trainer.model.visual_control.load_state_dict(torch.load('controller.pt'))
source = Photographs(torch.load('images.pt'), [f'thing number {i}' for i in range(5)])
loss = trainer.gradients(trainer.draw(source, 0))
trainer.average_gradients()
if trainer.rank == 0: torch.save((trainer.world, loss, [p.grad for p in trainer.model.parameters() if p.grad is not None]), 'found.pt')
"""

def test_two_processes_have_the_gradient_of_one(config, source, tmp_path):
    one = move_links(ControllerTrainer(replace(config, content='image', positives=True, robust=.3), tmp_path/'one', 'cpu'))
    torch.save(one.model.visual_control.state_dict(), tmp_path/'controller.pt')
    torch.save(source.images, tmp_path/'images.pt')
    (tmp_path/'train.py').write_text(SCRIPT)
    (tmp_path/'config.json').write_text(json.dumps({k: v for k, v in asdict(one.config).items() if k != 'model'} | dict(micro=4)))
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', 'train.py']
    done = subprocess.run(torchrun, cwd=tmp_path, env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    expected, (world, found, gradients) = loss(one, source), torch.load(tmp_path/'found.pt')
    whole, two = gradient(one), torch.cat([g.flatten() for g in gradients])
    assert world == 2 and found == pytest.approx(expected, rel=1e-5) and whole.abs().max() > 1e-3
    assert (two - whole).abs().max() < 1e-5 * whole.abs().max()


def test_robust_adds_the_l1_distance_to_clip_of_the_clean_photograph(config, source, tmp_path):
    plain, robust = (move_links(ControllerTrainer(replace(config, robust=weight), tmp_path, 'cpu')) for weight in (0., .3))
    batch = plain.draw(source, 0)
    seen, clean = robust.model.embed(batch.lq).content, robust.model.embed(batch.hq, control=False).content
    distance = (seen / seen.norm(dim=1, keepdim=True) - clean / clean.norm(dim=1, keepdim=True)).abs().sum() / len(batch.lq)
    assert distance > .1 and loss(robust, source) - loss(plain, source) == pytest.approx(.3 * distance.item(), rel=1e-4)
    assert plain.targets(batch)[3] is None and not robust.targets(batch)[3].requires_grad
    apart = (gradient(robust) - gradient(plain)).abs().max()
    assert apart > 1e-4 and all(p.grad is None for p in robust.model.clip.parameters())


def test_robust_training_brings_the_embeddings_together(config, source, tmp_path):
    trainer = ControllerTrainer(replace(config, robust=10., steps=30, lr=3e-3), tmp_path, 'cpu')
    batch = trainer.draw(source, 1000)
    def distance():
        with torch.no_grad(): return (trainer.embed(batch.lq).chunk(2, dim=1)[0] - trainer.targets(batch)[3]).abs().sum(1).mean().item()
    before = distance()
    trainer.fit(source, progress=False)
    assert distance() < .9 * before


def test_only_the_controller_is_trained_and_saved(config, source, tmp_path):
    trainer = ControllerTrainer(config, tmp_path, 'cpu')
    frozen = {k: v.clone() for k, v in trainer.model.clip.state_dict().items()}
    trainer.fit(source, progress=False)
    assert all(torch.equal(v, frozen[k]) for k, v in trainer.model.clip.state_dict().items())
    saved = torch.load(trainer.checkpoint, weights_only=True)
    assert saved['model'] and all(k.startswith('visual_control.') or k == 'logit_scale' for k in saved['model'])
    again = ControllerTrainer(config, tmp_path, 'cpu')
    for a, b in zip(trainer.model.state_dict().values(), again.model.state_dict().values()): assert torch.equal(a, b)


def test_weight_decay_spares_scales_biases_and_norms(config, tmp_path):
    decayed, spared = ControllerTrainer(config, tmp_path, 'cpu').parameter_groups()
    assert decayed['weight_decay'] == .05 and spared['weight_decay'] == 0
    assert all(p.ndim > 1 for p in decayed['params']) and all(p.ndim < 2 for p in spared['params'])


def test_the_scale_stays_below_a_hundred(config, source, tmp_path):
    trainer = ControllerTrainer(config, tmp_path, 'cpu')
    with torch.no_grad(): trainer.model.logit_scale.fill_(9.)
    loss(trainer, source)
    assert trainer.model.logit_scale.exp().item() == pytest.approx(100, rel=1e-4)


def test_the_image_target_is_clip_of_the_clean_photograph(config, source, tmp_path):
    trainer = ControllerTrainer(replace(config, content='image'), tmp_path, 'cpu')
    batch = source.draw(trainer.config, step_rng(config, 0))
    content, words, numbers, clean = trainer.targets(batch)
    expected = trainer.model.embed(batch.hq, control=False).content
    assert torch.allclose(content, expected / expected.norm(dim=1, keepdim=True), atol=1e-6) and numbers is None and clean is content
    assert torch.allclose(words, trainer.model.embed_words(tuple(batch.words)), atol=1e-6)


def test_without_captions_there_is_the_image_target(config, source, tmp_path):
    bare = Photographs(source.images)
    with pytest.raises(ValueError, match='no captions'): loss(ControllerTrainer(config, tmp_path, 'cpu'), bare)
    assert loss(ControllerTrainer(replace(config, content='image'), tmp_path, 'cpu'), bare) > 0


# what a step reads

def test_rows_are_those_of_the_whole_batch(config, source, folder):
    for s, c in ((source, config), (own := pair_files(folder, 'train'), replace(config, degradations=own.degradations))):
        whole, some = s.draw(c, step_rng(c, 3)), s.draw(c, step_rng(c, 3), torch.tensor([7, 2, 11]))
        assert torch.equal(some.lq, whole.lq[[7, 2, 11]]) and torch.equal(some.hq, whole.hq[[7, 2, 11]])
        assert some.words == whole.words and some.captions == whole.captions
        assert not torch.equal(whole.lq, s.draw(c, step_rng(c, 4)).lq)


def test_no_photograph_comes_twice_before_the_others(config, source):
    captions = source.draw(replace(config, batch=5), step_rng(config, 0)).captions
    assert sorted(captions) == sorted(source.captions)


def test_as_many_captions_as_photographs():
    with pytest.raises(ValueError, match='2 photographs, but 1 captions'): Photographs([None, None], ['one'])


def test_pairs_stay_pairs(config, folder):
    own = pair_files(folder, 'train')
    batch = own.draw(replace(config, batch=12), step_rng(config, 0))
    assert own.degradations == ('negative', 'red-cast') and batch.captions is None
    for hq, lq, word in zip(batch.hq, batch.lq, batch.words):
        if word == 'negative': assert (hq + lq - 1).abs().max() < .02


def test_a_pair_of_different_sizes_is_named(folder):
    save_image(picture(0, 30, 44), folder/'train'/'negative'/'GT'/'0.png')
    with pytest.raises(ValueError, match=r'LQ/0\.png: differs in size'): pair_files(folder, 'train').pair(0)


# the authors' table

def table(path, *rows, header='filepath\ttitle'):
    path.write_text('\n'.join([header, *rows]) + '\n', encoding='utf-8')
    return path


def test_titles(tmp_path):
    file = table(tmp_path/'t.csv', 'a.png\ta cat: hazy', 'b.png\t"a ""big"" dog: with tabs\t"', 'c.png\tat 5:30 a bus: rainy')
    assert read_titles(file) == [('a.png', 'a cat', 'hazy'), ('b.png', 'a "big" dog', 'with tabs\t'), ('c.png', 'at 5:30 a bus', 'rainy')]


@pytest.mark.parametrize('rows, header, named', [
    (['a.png\ta cat, hazy'], 'filepath\ttitle', 'line 2'), (['a.png\ta: b: c'], 'filepath\ttitle', 'line 2'),
    (['a.png'], 'filepath\ttitle', 'line 2'),
    (['a.png\tok: hazy', 'b.png\t: hazy'], 'filepath\ttitle', 'line 3'), (['a.png,a cat: hazy'], 'filepath,title', 'separated by a tab'),
    ([], 'filepath\ttitle', 'no rows')])
def test_bad_titles_are_refused(tmp_path, rows, header, named):
    with pytest.raises(ValueError, match=named) as e: read_titles(table(tmp_path/'t.csv', *rows, header=header))
    assert 't.csv' in str(e.value) and '\n' not in str(e.value)


def test_no_titles(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.csv'): read_titles(tmp_path/'nowhere.csv')
    (tmp_path/'t.csv').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='UTF-8'): read_titles(tmp_path/'t.csv')


def test_a_table_that_lacks_a_photograph(tmp_path, folder):
    with pytest.raises(ValueError, match="no row for 'train/negative/LQ/0.png'"):
        pair_files(folder, 'train', table(tmp_path/'t.csv', 'train/negative/LQ/1.png\ta: negative'))


# captions

@pytest.mark.parametrize('raw, clean', [('  a  cat\n', 'a cat'), ('a sign: stop', 'a sign stop'), ('a : b:\tc', 'a b c'),
                                        ('time 5:30', 'time 5:30'), ('it says:', 'it says'), (': ', '')])
def test_one_line(raw, clean): assert one_line(raw) == clean


class Counting:
    "A captioner that remembers how many photographs it saw, and may break down."
    def __init__(self, breaks=None): self.seen, self.breaks = 0, breaks
    def __call__(self, photos):
        if self.seen == self.breaks: raise RuntimeError('out of memory')
        self.seen += len(photos)
        return [f'"quoted", a sign: number\t{p.mean():.4f}' for p in photos]


def test_captions_of_pairs_are_a_table_of_the_authors(tmp_path, folder, capsys):
    out = generate_captions(folder, Counting(), tmp_path/'t.csv', batch=4)
    assert '6 captions new, 0 already there, 6 with a colon taken out' in capsys.readouterr().out
    rows = read_titles(out)
    assert {w for *_, w in rows} == {'negative', 'red-cast'} and rows[0][1].startswith('"quoted", a sign number ')
    assert pair_files(folder, 'train', out).files[0][2] == rows[0][1]
    assert {c for _, c, w in rows if w == 'negative'} == {c for _, c, w in rows if w == 'red-cast'}, 'the clean side is described'


def test_captions_go_on_where_they_stopped(tmp_path, folder):
    out, broken = tmp_path/'t.csv', Counting(breaks=4)
    with pytest.raises(RuntimeError): generate_captions(folder, broken, out, batch=1, save_every=2)
    assert len(read_titles(out)) == 4
    generate_captions(folder, rest := Counting(), out, batch=1)
    assert rest.seen == 2
    whole = generate_captions(folder, Counting(), tmp_path/'whole.csv')
    assert out.read_bytes() == whole.read_bytes() and sorted(p.name for p in tmp_path.iterdir()) == ['pairs', 't.csv', 'whole.csv']


def test_captions_of_photographs(tmp_path):
    photos = [Photo(f'sub/{i}', lambda i=i: picture(i), path=tmp_path/'sub'/f'{i}.jpg') for i in range(3)]
    captions = read_captions(generate_captions(photos, Counting(), tmp_path/'c.csv'))
    assert list(captions) == ['sub/0.jpg', 'sub/1.jpg', 'sub/2.jpg'] and captions['sub/1.jpg'].startswith('"quoted", a sign number')


def test_a_silent_captioner_and_a_strange_table_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match='says nothing about train/negative/LQ/0.png'):
        generate_captions(folder, lambda photos: [' '] * len(photos), tmp_path/'t.csv')
    strange = table(tmp_path/'s.csv', 'elsewhere.png\ta cat: hazy')
    with pytest.raises(ValueError, match="names 'elsewhere.png'"): generate_captions(folder, Counting(), strange)
    assert 'elsewhere' in strange.read_text()


def test_blip_of_transformers(tmp_path):
    "A captioner of BLIP's classes, far too small, made on the spot: loading, preparing, generating, decoding."
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor
    words = '[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] a photo of cat dog'.split()
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=16)
    text = sizes | dict(vocab_size=len(words), encoder_hidden_size=16, max_position_embeddings=40, bos_token_id=5, pad_token_id=0,
                        eos_token_id=3, sep_token_id=3)
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=sizes | dict(image_size=32, patch_size=16))
    BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(words)}, bos_token='[DEC]')
    BlipProcessor(BlipImageProcessor(size=dict(height=32, width=32)), tokenizer).save_pretrained(tmp_path)
    captions = blip(tmp_path, tokens=6)([picture(0), picture(1, 50, 20)])
    assert len(captions) == 2 and all(set(c.split()) <= set(words) for c in captions) and captions[0]


def test_without_a_hub_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(ct, 'reachable', lambda url: False)
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    with pytest.raises(OSError, match='is not in the cache and .* does not answer') as e: blip('nobody/no-such-model')
    assert '\n' not in str(e.value)
    with pytest.raises(OSError, match='holds no BLIP'): blip(tmp_path)


# CLIP's weights

def test_the_clip_comes_from_a_file_a_package_or_open_clip(clip, monkeypatch):
    assert load_clip('tiny', clip).visual.output_dim == 24
    with pytest.raises(FileNotFoundError, match='neither a packaged DA-CLIP nor a file'): load_clip('clip-miniature', 'nowhere')
    with pytest.raises(ValueError, match='open_clip has no weights'): load_clip('ViT-B-32', 'laion3b')
    def fail(*args, **kw): raise ConnectionError('a long\nstory')
    monkeypatch.setattr(ct.open_clip, 'create_model', fail)
    with pytest.raises(OSError, match='could not be downloaded') as e: load_clip('ViT-B-32', 'laion2b_s34b_b79k')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('changes, named', [(dict(content='text'), 'content'), (dict(micro=-1), 'micro'), (dict(robust=-.1), 'robust'),
                                            (dict(robust=float('nan')), 'robust'), (dict(model=3), 'model')])
def test_bad_settings_are_named(changes, named):
    with pytest.raises(ValueError, match=named): make_config(changes, CONTROLLER_CONFIGS['daclip-paper'])


# from a folder to a DA-CLIP

def test_two_degradations_of_ones_own(config, folder, tmp_path, capsys):
    titles = generate_captions(folder, Counting(), tmp_path/'t.csv')
    path = train_controller(folder, tmp_path/'out', replace(config, steps=50, batch=6, ema=.5), 'own', titles, 'cpu', about='noise')
    assert '6 pairs, 6 held out, on cpu, from step 0 of 50' in capsys.readouterr().out
    log = list(csv.DictReader(open(tmp_path/'out'/'log.csv')))
    assert float(log[-1]['accuracy']) == 1 and log[-1]['step'] == '50'
    lq = torch.stack([1 - picture(20), picture(21) * torch.tensor([1., .4, .3]).view(3, 1, 1)])
    assert load_daclip(path).words == ('negative', 'red-cast') and load_daclip(path).classify(lq).argmax(1).tolist() == [0, 1]


def test_photographs_train_a_daclip_and_an_interrupted_run_goes_on(config, tmp_path, capsys):
    photos = [Photo(str(i), lambda i=i: picture(i), f'thing {i}') for i in range(4)]
    small = replace(config, batch=10)
    train = Photographs([(picture(i) * 255).byte() for i in (1, 2, 3)], ['thing 1', 'thing 2', 'thing 3'])
    ControllerTrainer(small, tmp_path, 'cpu').fit(train, until=2, progress=False)
    path = train_controller(photos, tmp_path, small, device='cpu')
    assert '3 photographs, 1 held out, on cpu, from step 2 of 4' in capsys.readouterr().out
    assert load_daclip(path).embed(picture(0)[None]).content.shape == (1, 24)


def test_the_validator_asks_every_word(config, tmp_path):
    trainer = ControllerTrainer(config, tmp_path, 'cpu')
    trainer.step = 3
    watch = controller_validator([Photo('a', lambda: picture(0))], config, every=2)
    assert watch(trainer) == {}
    trainer.step = 4
    assert watch(trainer)['closer'] == 0 and 0 <= watch(trainer)['accuracy'] <= .3


def test_the_wild_chain_names_what_it_did(config, source, tmp_path):
    wild = replace(config, chain='wild', patch=32)
    batch = source.draw(wild, step_rng(wild, 0))
    some = source.draw(wild, step_rng(wild, 0), rows=torch.tensor([1, 4]))
    assert torch.equal(some.lq, batch.lq[[1, 4]]) and some.words == batch.words and set(batch.words) < set(WILD_COMBINATIONS)
    assert ((batch.lq - batch.hq).abs().amax((1, 2, 3)) > 0).tolist() == [w != 'clean' for w in batch.words]
    trainer = ControllerTrainer(wild, tmp_path, 'cpu')
    assert trainer.model.words == WILD_COMBINATIONS and loss(trainer, source) > 0
    assert controller_validator([Photo('a', lambda: picture(0))], wild, every=1)(trainer) == {'closer': 0}


def test_photographs_to_validate_on_are_not_for_pairs(config, folder, tmp_path):
    with pytest.raises(ValueError, match='validated on their own folder'): train_controller(folder, tmp_path, config, held_out=[])
    with pytest.raises(ValueError, match="chain is 'wild'"): train_controller(folder, tmp_path, replace(config, chain='wild', patch=32))


def test_a_word_of_the_folders_alone(folder):
    assert PairFiles(pair_files(folder, 'val').files[:1]).degradations == ('negative',)


def test_a_controller_is_gone_on_with(config, source, clip, tmp_path):
    first = ControllerTrainer(config, tmp_path/'first', 'cpu')
    first.fit(source, progress=False)
    kept = save_daclip(first.model, tmp_path/'first.safetensors', 'tiny')
    start = replace(config, start=str(kept))
    again, new = (ControllerTrainer(c, tmp_path/n, 'cpu').model for n, c in (('again', start), ('new', config)))
    for name, p in again.named_parameters():
        assert torch.allclose(p, dict(first.model.named_parameters())[name].half().float(), atol=1e-3), name
    links = [n for n, _ in new.named_parameters() if 'zero' in n]
    assert links and any(not torch.equal(dict(again.named_parameters())[n], dict(new.named_parameters())[n]) for n in links)
    other = save_daclip(DACLIP(make_clip(TINY | {'embed_dim': 16})), tmp_path/'other.safetensors', TINY | {'embed_dim': 16})
    with pytest.raises(ValueError, match='other.safetensors belongs to another CLIP'):
        ControllerTrainer(replace(config, start=str(other)), tmp_path/'o', 'cpu')


def test_a_card_tells_of_every_training_that_led_to_it(config, tmp_path):
    photos, kept = [Photo(str(i), lambda i=i: picture(i), f'thing {i}') for i in range(4)], None
    for lr in (.001, .0005, .0001):
        path = tmp_path/str(lr)
        kept = train_controller(photos, path, replace(config, steps=1, batch=10, lr=lr, start=str(kept or '')), device='cpu')
    facts = json.loads(read_header(kept)['facts'])
    assert [s['lr'] for s in facts['goes on from']] == [.001, .0005] and facts['settings']['lr'] == .0001
    assert 'lr 0.001,' in (card := kept.with_suffix('.md').read_text()) and 'lr 0.0005,' in card
