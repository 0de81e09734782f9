"The loop: exact resume after any interruption, batches that depend on the step alone, and what is refused in one sentence."
import multiprocessing
import signal
import time
from dataclasses import dataclass, replace
from multiprocessing import forkserver

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from daclip_repro.degradations import DEGRADATIONS
from daclip_repro.loop import (
    LoopConfig,
    Pairs,
    Trainer,
    deal_words,
    draw_pair,
    learning_rate,
    load_config,
    make_config,
    maybe_gray,
    step_rng,
    to_bytes,
)
from daclip_repro.photos import photo_folder, save_image
from daclip_repro.wild import WILD_COMBINATIONS

CONFIG = LoopConfig(steps=12, batch=2, patch=16, zoom=2., lr=1e-2, warmup=2, ema=.9, ema_every=1)
CONFIGS = dict(toy=CONFIG, other=replace(CONFIG, steps=3))


class Toy(Trainer):
    "One convolution, after another that is frozen."
    def make_model(self):
        torch.manual_seed(self.config.seed)
        model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
        model[0].requires_grad_(False)
        return model

    def draw(self, source, step):
        rng = step_rng(self.config, step)
        hq, lq, _ = zip(*(draw_pair(source, word, self.config, rng) for word in deal_words(self.config, rng)))
        return torch.stack(hq), torch.stack(lq)

    def gradients(self, batch):
        hq, lq = batch
        loss = F.l1_loss(self.model(lq), hq)
        loss.backward()
        return loss.item()


class Slow(Toy):
    def gradients(self, batch):
        time.sleep(.03)
        return super().gradients(batch)


def photos(n=3): return [(torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(i)) * 255).byte() for i in range(n)]


@pytest.fixture(scope='module')
def images(): return photos()


def weights_of(trainer): return {**trainer.model.state_dict(), **{f'average.{k}': v for k, v in trainer.average.state_dict().items()}}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k


# stopping and going on

@pytest.mark.parametrize('stops', [[5], [1, 2, 7, 11]])
def test_resume_is_exact(images, tmp_path, stops):
    straight = Toy(CONFIG, tmp_path/'straight', 'cpu')
    straight.fit(images, progress=False)
    for stop in [*stops, None]:
        again = Toy(CONFIG, tmp_path/'stopped', 'cpu')
        again.fit(images, until=stop, progress=False)
    assert again.step == CONFIG.steps
    assert_same(weights_of(straight), weights_of(again))


@pytest.mark.parametrize('workers', [1, 2])
def test_batches_that_are_made_ahead_are_the_same(images, tmp_path, workers):
    alone, helped = Toy(CONFIG, tmp_path/'alone', 'cpu'), Toy(CONFIG, tmp_path/'helped', 'cpu')
    torch.manual_seed(0)
    alone.fit(images, progress=False)
    expected = torch.rand(1)
    torch.manual_seed(0)
    helped.fit(images, until=5, workers=workers, progress=False)
    helped.fit(images, workers=workers, progress=False)
    assert_same(weights_of(alone), weights_of(helped))
    assert torch.rand(1) == expected, 'nobody else drew from the global random numbers'


def test_a_mistake_in_a_batch_made_ahead_is_told_in_its_own_words(images, tmp_path):
    class Odd(Toy):
        def draw(self, source, step):
            if step == 3: raise ValueError('photograph 7 is not readable')
            return super().draw(source, step)
    trainer = Odd(CONFIG, tmp_path, 'cpu')
    with pytest.raises(ValueError, match='^photograph 7 is not readable$'): trainer.fit(images, workers=2, progress=False)
    assert Odd(CONFIG, tmp_path, 'cpu').step == 3


def train_alone(out, steps):
    "Train in a process of its own, with a checkpoint after every step."
    torch.set_num_threads(1)
    Slow(replace(CONFIG, steps=steps), out, 'cpu').fit(photos(), save_every=1, progress=False)


@pytest.fixture(scope='module', autouse=True)
def processes():
    "Where processes of their own come from: a server that imports torch (and what its optimisers import late) during the first tests."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch._dynamo', 'daclip_repro.loop'])
    forkserver.ensure_running()
    return context


def wait_for_checkpoints(file, process, count):
    "Wait until the checkpoint was replaced `count` times; the seconds between the last two."
    seen, deadline = [file.stat().st_mtime_ns if file.exists() else 0], time.monotonic() + 60
    while len(seen) <= count and process.is_alive() and time.monotonic() < deadline:
        if file.exists() and file.stat().st_mtime_ns != seen[-1]: seen.append(file.stat().st_mtime_ns)
        time.sleep(.001)
    return (seen[-1] - seen[-2:][0]) / 1e9


def test_kill_9_loses_nothing(processes, tmp_path):
    "Kill -9 three times, in a step or in a save: the checkpoint is whole each time, and the end is that of an undisturbed training."
    steps, step = 40, 0
    def start(name):
        process = processes.Process(target=train_alone, args=(tmp_path/name, steps))
        process.start()
        return process
    runs = {name: tmp_path/name/'checkpoint.pt' for name in ('killed', 'straight')}
    for part in (0, .4, .9):
        process = start('killed')
        time.sleep(part * wait_for_checkpoints(runs['killed'], process, 2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, 'it was not killed at work'
        before, step = step, torch.load(runs['killed'], weights_only=True)['step']
        assert before + 2 <= step < steps
    for name in runs:
        process = start(name)
        process.join(60)
        assert process.exitcode == 0
    killed, straight = (torch.load(file, weights_only=True) for file in runs.values())
    assert killed['step'] == straight['step'] == steps
    assert_same(killed['model'], straight['model'])
    assert_same(killed['average'], straight['average'])


def test_what_is_frozen_is_neither_trained_nor_saved(images, tmp_path):
    trainer = Toy(CONFIG, tmp_path, 'cpu')
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.fit(images, progress=False)
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    saved = torch.load(trainer.checkpoint, weights_only=True)
    assert moved == {'1.weight', '1.bias'} == set(saved['model'])
    assert set(saved['average']) == {'module.1.weight', 'module.1.bias', 'n_averaged'}
    assert sum(len(g['params']) for g in saved['optimiser']['param_groups']) == 2
    assert_same(weights_of(trainer), weights_of(Toy(CONFIG, tmp_path, 'cpu')))


def test_the_frozen_part_comes_from_make_model_when_a_run_goes_on(images, tmp_path):
    class Other(Toy):
        def make_model(self):
            model = super().make_model()
            nn.init.ones_(model[0].bias)
            return model
    Toy(CONFIG, tmp_path, 'cpu').fit(images, until=2, progress=False)
    assert torch.equal(Other(CONFIG, tmp_path, 'cpu').model[0].bias, torch.ones(3))


def test_an_exception_in_a_step_leaves_a_checkpoint(images, tmp_path):
    def stop(trainer):
        if trainer.step == 4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): Toy(CONFIG, tmp_path, 'cpu').fit(images, log_every=2, watch=(stop,), progress=False)
    assert Toy(CONFIG, tmp_path, 'cpu').step == 4


def test_nan_loss_stops_the_run_and_keeps_the_checkpoint(images, tmp_path):
    trainer = Toy(CONFIG, tmp_path, 'cpu')
    trainer.fit(images, until=2, progress=False)
    good = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with torch.no_grad(): trainer.model[1].bias.fill_(float('nan'))
    with pytest.raises(ValueError, match='the loss is nan at step 2'): trainer.train_step(trainer.draw(images, 2))
    assert_same(good, Toy(CONFIG, tmp_path, 'cpu').model.state_dict())


@pytest.mark.parametrize('clip', [0., 1.])
def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(images, tmp_path, clip):
    class Odd(Toy):
        def gradients(self, batch):
            loss = super().gradients(batch)
            if self.step == 1: self.model[1].bias.grad[0] = float('inf')
            return loss
    trainer = Odd(replace(CONFIG, clip=clip), tmp_path, 'cpu')
    with pytest.raises(ValueError, match='the gradient is inf at step 1'): trainer.fit(images, progress=False)
    again = Odd(replace(CONFIG, clip=clip), tmp_path, 'cpu')
    assert again.step == 1 and all(v.isfinite().all() for v in again.model.state_dict().values())


def test_clip_limits_the_step_and_zero_changes_nothing(images, tmp_path):
    def gradients(clip):
        trainer = Toy(replace(CONFIG, clip=clip), tmp_path/str(clip), 'cpu')
        trainer.train_step(trainer.draw(images, 0))
        return torch.cat([p.grad.flatten() for p in trainer.model[1].parameters()])
    whole, clipped = gradients(0.), gradients(1e-3)
    assert whole.norm() > .01 and clipped.norm() == pytest.approx(1e-3, rel=1e-3)
    assert F.cosine_similarity(whole, clipped, dim=0) == pytest.approx(1)


@pytest.mark.parametrize('content', [b'', b'garbage', None])
def test_bad_checkpoint_is_refused_and_kept(tmp_path, content):
    if content is None: torch.save([1, 2], tmp_path/'checkpoint.pt')
    else: (tmp_path/'checkpoint.pt').write_bytes(content)
    before = (tmp_path/'checkpoint.pt').read_bytes()
    with pytest.raises(ValueError, match='checkpoint'): Toy(CONFIG, tmp_path, 'cpu')
    assert (tmp_path/'checkpoint.pt').read_bytes() == before


def test_checkpoint_of_another_configuration(tmp_path):
    Toy(CONFIG, tmp_path, 'cpu').save()
    with pytest.raises(ValueError, match='made with lr'): Toy(replace(CONFIG, lr=1e-5), tmp_path, 'cpu')


@pytest.mark.parametrize('model', [nn.Conv2d(3, 3, 3), nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 5))])
def test_checkpoint_of_another_model_is_refused(tmp_path, model):
    class Other(Toy):
        def make_model(self): return model
    Toy(CONFIG, tmp_path, 'cpu').save()
    with pytest.raises(ValueError, match='does not fit this model') as e: Other(CONFIG, tmp_path, 'cpu')
    assert '\n' not in str(e.value)


def test_bfloat16_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match='GPU'): Toy(replace(CONFIG, precision='bfloat16'), tmp_path, 'cpu')


def test_no_photographs(tmp_path):
    with pytest.raises(ValueError, match='no photographs'): Toy(CONFIG, tmp_path, 'cpu').fit([])


def test_a_batch_that_cannot_be_shared_out(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='multiple of the number of processes'): Toy(replace(CONFIG, batch=3), tmp_path, 'cpu')


# the learning rate

def test_learning_rate_warms_up_and_decays():
    config = replace(CONFIG, steps=1000, warmup=10, lr=1e-3, lr_min=1e-6)
    rates = [learning_rate(k, config) for k in range(1000)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == pytest.approx(1e-3) and rates[-1] < 5e-6
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_learning_rate_starts_again():
    config = replace(CONFIG, steps=100, warmup=10, restarts=(40, 70))
    rates = [learning_rate(k, config) for k in range(100)]
    assert [k for k in range(10, 100) if rates[k] == pytest.approx(config.lr)] == [10, 40, 70]
    assert rates[:40] == [learning_rate(k, replace(config, steps=40, restarts=())) for k in range(40)]


# what a step reads

def test_batches_depend_on_the_seed_and_the_step_alone(images):
    def draw(step, **changes):
        config = replace(CONFIG, **changes)
        rng = step_rng(config, step)
        return [(w, draw_pair(images, w, config, rng)) for w in deal_words(config, rng)]
    for (w, (hq, lq, i)), (w2, (hq2, lq2, i2)) in zip(draw(3), draw(3)):
        assert (w, i) == (w2, i2) and torch.equal(hq, hq2) and torch.equal(lq, lq2)
        assert hq.shape == lq.shape == (3, 16, 16) and 0 <= hq.min() and hq.max() <= 1
    for other in (draw(4), draw(3, seed=1)): assert not torch.equal(draw(3)[0][1][0], other[0][1][0])


@pytest.mark.parametrize('batch', [10, 20, 7])
def test_every_degradation_equally_often(batch):
    words = deal_words(replace(CONFIG, batch=batch), step_rng(CONFIG, 0))
    assert len(words) == batch
    assert sorted(words) == sorted(DEGRADATIONS * (batch // 10)) if batch > 7 else len(set(words)) == 7


def test_severity_is_drawn_from_its_range(images):
    def pair(severity, word='low-light'): return draw_pair(images, word, replace(CONFIG, severity=severity), step_rng(CONFIG, 5))
    (hq, none, _), (_, half, _), (_, full, _) = (pair((s, s)) for s in (0., .5, 1.))
    assert none.mean() > half.mean() > full.mean() and (none - hq).abs().mean() < .05
    assert full.mean() < pair((0., 1.))[1].mean() < none.mean()


@pytest.mark.parametrize('zoom', [1., 3., 100.])
def test_a_small_photograph_is_enlarged_to_the_patch(zoom):
    hq, lq, _ = draw_pair([torch.zeros(3, 10, 12, dtype=torch.uint8)], 'noisy', replace(CONFIG, zoom=zoom), step_rng(CONFIG, 0))
    assert hq.shape == lq.shape == (3, 16, 16)


def test_photographs_are_shrunk_to_bytes_and_never_enlarged():
    class Fake:
        def __init__(self, *size): self.size = size
        def load(self): return torch.full((3, *self.size), .5)
    large, small = to_bytes([Fake(60, 90), Fake(20, 30)], side=30)
    assert large.shape == (3, 30, 45) and small.shape == (3, 20, 30)
    assert large.dtype == torch.uint8 and large.unique().tolist() == [128]


def test_photographs_may_stay_on_disk(tmp_path):
    save_image(picture := torch.rand(3, 40, 30).mul(255).round().div(255), tmp_path/'a.png')
    lazy = to_bytes(photo_folder(tmp_path), side=0)
    assert len(lazy) == 1 and torch.equal(lazy[0], (picture * 255).round().byte()) # as large as it is
    config = replace(CONFIG, patch=16)
    assert all(torch.equal(a, b) for a, b in zip(*(draw_pair(s, 'hazy', config, step_rng(config, 0))[:2] for s in (lazy, [lazy[0]]))))
    (tmp_path/'a.png').unlink()
    with pytest.raises(FileNotFoundError, match='a.png'): lazy[0]


def test_the_wild_chain_depends_on_the_seed_and_the_step_alone(images):
    config = replace(CONFIG, chain='wild', patch=32)
    assert deal_words(config, step_rng(config, 0)) == [''] * config.batch and config.words == WILD_COMBINATIONS
    (hq, lq, i), again = (draw_pair(images, '', config, step_rng(config, 3)) for _ in range(2))
    assert torch.equal(hq, again[0]) and torch.equal(lq, again[1]) and not torch.equal(hq, lq)
    gray, _, j = draw_pair(images, '', replace(config, gray=1.), step_rng(config, 3))
    assert i == j and torch.equal(gray[0], gray[2]) and (gray[0] - hq.mean(0)).abs().max() < .3


def test_a_tenth_turns_gray():
    hq, config = torch.rand(3, 4, 4), replace(CONFIG, gray=.1)
    turned = sum(torch.equal(*maybe_gray(hq, config, step_rng(config, k))[:2]) for k in range(2000))
    assert 150 < turned < 250 # 200 are expected, with a deviation of 13
    assert not any(torch.equal(*maybe_gray(hq, CONFIG, step_rng(CONFIG, k))[:2]) for k in range(100))


# pairs with words of one's own

@pytest.fixture
def folder(tmp_path):
    for number, word in enumerate(('negative', 'red-cast')):
        for i in range(2 + number):
            hq = torch.rand(3, 24, 30, generator=torch.Generator().manual_seed(i))
            lq = 1 - hq if word == 'negative' else hq * torch.tensor([1., .5, .4]).view(3, 1, 1)
            for side, image in (('LQ', lq), ('GT', hq)): save_image(image, tmp_path/'train'/word/side/f'{i}.png')
    return tmp_path


def test_pairs_take_their_words_from_the_folders(folder):
    pairs = Pairs(folder, 'train')
    assert pairs.degradations == ('negative', 'red-cast') and len(pairs) == 5
    config = replace(CONFIG, degradations=pairs.degradations)
    hq, lq, index = draw_pair(pairs, 'negative', config, step_rng(config, 1))
    assert torch.allclose(hq + lq, torch.ones_like(hq), atol=1/255) and index in (0, 1)
    hq, lq, _ = draw_pair(pairs, 'red-cast', config, step_rng(config, 2))
    assert torch.allclose(lq[0], hq[0], atol=1/255) and torch.allclose(lq[1], hq[1] / 2, atol=1/255)


def test_pairs_are_never_shrunk(folder):
    assert {p.shape for p in Pairs(folder, 'train').by_word['negative']} == {(6, 24, 30)}


def test_pairs_train(folder, tmp_path):
    pairs = Pairs(folder, 'train')
    log = Toy(replace(CONFIG, degradations=pairs.degradations, steps=30), tmp_path, 'cpu').fit(pairs, log_every=10, progress=False)
    assert log[-1]['loss'] < log[0]['loss']


def test_pairs_of_different_sizes_are_named(folder):
    save_image(torch.rand(3, 24, 31), folder/'train'/'negative'/'GT'/'1.png')
    with pytest.raises(ValueError, match=r'1\.png: differs in size'): Pairs(folder, 'train')


def test_a_word_without_pairs_is_named(folder):
    with pytest.raises(ValueError, match="no pairs of the degradation 'hazy': expected one of negative, red-cast"):
        draw_pair(Pairs(folder, 'train'), 'hazy', CONFIG, step_rng(CONFIG, 0))


def test_words_that_must_be_there(folder):
    with pytest.raises(ValueError, match='hazy'): Pairs(folder, 'train', ('hazy', 'negative', 'red-cast'))


# configurations

BAD_CONFIGS = [
    ('learning_rate: 1', 'learning_rate'), ('steps: many', 'steps'), ('steps: 0', 'steps'), ('steps: true', 'steps'),
    ('batch: -1', 'batch'),
    ('patch: 4', 'patch'), ('lr: .nan', 'lr'), ('lr: -1.0', 'lr'), ('zoom: 0.5', 'zoom'), ('zoom: .inf', 'zoom'), ('seed: -1', 'seed'),
    ('precision: float16', 'float16'), ('base: huge', 'huge'), ('- 1', 'keys and values'),
    ('steps: [1', 'not a YAML file'), ('', 'keys and values'),
    ('degradations: 3', 'degradations'), ('degradations: []', 'degradations'), ('degradations: [1]', 'degradations'),
    ('severity: [1]', 'severity'), ('severity: [2, 1]', 'severity'), ('severity: [-1, 1]', 'severity'), ('severity: [a, b]', 'severity'),
    ('severity: [1, .inf]', 'severity'), ('betas: [0.9]', 'betas'), ('betas: [0.9, 1.0]', 'betas'), ('betas: [x, y]', 'betas'),
    ('ema: 1.0', 'ema'), ('ema_every: 0', 'ema_every'),
    ('restarts: [1]', 'restarts'), ('restarts: [a]', 'restarts'), ('restarts: [4.5]', 'restarts'),
    ('steps: !!python/object/apply:os.system ["true"]', 'not a YAML file'),
]

@pytest.mark.parametrize('text, named', BAD_CONFIGS)
def test_bad_configuration_is_refused_by_name(tmp_path, text, named):
    file = tmp_path/'c.yaml'
    file.write_text(text)
    with pytest.raises(ValueError, match=named) as e: load_config(file, CONFIGS)
    assert '\n' not in str(e.value) and 'c.yaml' in str(e.value)


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path):
    (tmp_path/'c.yaml').write_text('base: other\nseverity: [1, 2]\nlr: 1')
    assert load_config(tmp_path/'c.yaml', CONFIGS) == replace(CONFIGS['other'], severity=(1, 2), lr=1.)
    (tmp_path/'d.yaml').write_text('batch: 4')
    assert load_config(tmp_path/'d.yaml', CONFIGS) == replace(CONFIG, batch=4)
    assert load_config('other', CONFIGS) is CONFIGS['other']


def test_missing_configuration():
    with pytest.raises(FileNotFoundError, match='neither a file nor one of toy, other'): load_config('nowhere.yaml', CONFIGS)


def test_a_kind_of_training_may_refuse_what_does_not_go_together():
    @dataclass(frozen=True)
    class Picky(LoopConfig):
        depth: int = 2
        def check(self): return 'depth is odd' if self.depth % 2 else None
    assert make_config({'depth': 4}, Picky()).depth == 4
    with pytest.raises(ValueError, match='mine: depth is odd'): make_config({'depth': 3}, Picky(), 'mine')


def test_a_short_training_does_not_hand_out_its_beginning():
    from torch.optim.swa_utils import AveragedModel

    from daclip_repro.loop import moving_average
    layer = torch.nn.Linear(1, 1, bias=False)
    for decay in (0., .9, .999):
        with torch.no_grad(): layer.weight.fill_(100.)
        average, expected = AveragedModel(layer, multi_avg_fn=moving_average(decay)), 100.
        for n in range(1, 200):
            with torch.no_grad(): layer.weight.fill_(1. + n / 1000)
            average.update_parameters(layer)
            d = 0. if n == 1 else min(decay, n / (9 + n)) # the first update copies
            expected = d * expected + (1 - d) * (1. + n / 1000)
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-4)
        assert average.module.weight.item() < 1.3
