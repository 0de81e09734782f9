"Training: exact resume after any interruption, and bad files refused in one sentence."
import json
import multiprocessing
import signal
import time
from dataclasses import replace
from multiprocessing import forkserver

import pytest
import torch
import yaml
from safetensors.torch import save_file

from daclip_repro.degradations import DEGRADATIONS
from daclip_repro.irsde import IRSDE
from daclip_repro.photos import Photo, packaged_photos
from daclip_repro.training import (
    CONFIGS,
    Denoiser,
    Trainer,
    build,
    learning_rate,
    load_config,
    load_weights,
    make_batch,
    make_config,
    packaged_weights,
    save_weights,
    to_bytes,
    train_command,
)

SMALL = dict(unet=dict(nf=8, ch_mult=(1, 2), context_dim=10, use_image_context=False, scale=.5),
             steps=12, batch=2, patch=16, warmup=2, ema=.9)
TOY = make_config(SMALL, CONFIGS['sampling-miniature'])


@pytest.fixture(scope='module')
def images(): return to_bytes(packaged_photos()[:3], side=48)


def weights_of(trainer): return {**trainer.denoiser.state_dict(), **{f'average.{k}': v for k, v in trainer.average.state_dict().items()}}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k


@pytest.mark.parametrize('parametrisation', ['noise', 'residual'])
@pytest.mark.parametrize('stops', [[5], [1, 2, 7, 11]])
def test_resume_is_exact(images, tmp_path, parametrisation, stops):
    config = replace(TOY, parametrisation=parametrisation)
    straight = Trainer(config, tmp_path/'straight', 'cpu')
    straight.fit(images, progress=False)
    for stop in [*stops, None]:
        again = Trainer(config, tmp_path/'stopped', 'cpu')
        again.fit(images, until=stop, progress=False)
    assert again.step == config.steps
    assert_same(weights_of(straight), weights_of(again))


def train_alone(out, steps):
    "Train in a process of its own, with a checkpoint after every step."
    torch.set_num_threads(1)
    photos = to_bytes(packaged_photos()[:3], side=48)
    Trainer(replace(TOY, steps=steps), out, 'cpu').fit(photos, save_every=1, progress=False)


@pytest.fixture(scope='module', autouse=True)
def processes():
    "Where processes of their own come from: a server that imports torch (and what its optimisers import late) during the first tests."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch._dynamo', 'daclip_repro.training'])
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
    steps, step = 13, 0
    def start(name):
        process = processes.Process(target=train_alone, args=(tmp_path/name, steps))
        process.start()
        return process
    runs = {name: tmp_path/name/'checkpoint.pt' for name in ('killed', 'straight')}
    for part in (0, .4, .8):
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
    assert_same(killed['denoiser'], straight['denoiser'])
    assert_same(killed['average'], straight['average'])


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
    assert torch.allclose(denoiser.x0(torch.rand_like(lq), lq, 50, denoiser.context('noisy', 2)), lq)


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


def test_learning_rate_warms_up_and_decays():
    config = replace(TOY, steps=1000, warmup=10, lr=1e-3, lr_min=1e-6)
    rates = [learning_rate(k, config) for k in range(1000)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == pytest.approx(1e-3) and rates[-1] < 5e-6
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_nan_loss_stops_the_run_and_keeps_the_checkpoint(images, tmp_path):
    trainer = Trainer(TOY, tmp_path, 'cpu')
    trainer.fit(images, until=2, progress=False)
    good = {k: v.clone() for k, v in trainer.denoiser.state_dict().items()}
    with torch.no_grad(): trainer.denoiser.unet.final_conv.bias.fill_(float('nan'))
    with pytest.raises(ValueError, match='at step 2'): trainer.train_step(images)
    assert_same(good, Trainer(TOY, tmp_path, 'cpu').denoiser.state_dict())


def test_weights_round_trip(tmp_path):
    denoiser = build(TOY)
    loaded = load_weights(save_weights(denoiser, TOY, tmp_path/'w.safetensors', steps=3))
    assert loaded.words == DEGRADATIONS and loaded.parametrisation == 'residual'
    for (k, a), b in zip(denoiser.state_dict().items(), loaded.state_dict().values()): assert torch.allclose(a, b, atol=1e-3), k
    assert 'w' in (tmp_path/'w.md').read_text() and sorted(p.name for p in tmp_path.iterdir()) == ['w.md', 'w.safetensors']


def test_packaged_weights_load_and_have_a_card():
    assert packaged_weights()
    for name, path in packaged_weights().items():
        assert load_weights(name).words
        assert name in path.with_suffix('.md').read_text()
    assert sum(p.stat().st_size for p in packaged_weights().values()) < 40e6


def test_train_command_makes_weights_card_and_log(tmp_path, capsys):
    photos = [Photo(p.name, p.load) for p in packaged_photos()]
    file = tmp_path/'tiny.yaml'
    file.write_text(yaml.safe_dump(dict(base='sampling-miniature', **json.loads(json.dumps(SMALL)))))
    path = train_command(photos, tmp_path/'out', file, steps=3, device='cpu')
    assert 'from step 0 of 3' in capsys.readouterr().out
    assert load_weights(path).words and (tmp_path/'out'/'log.csv').exists() and path.with_suffix('.md').exists()


BAD_CONFIGS = [
    ('learning_rate: 1', 'learning_rate'), ('steps: many', 'steps'), ('steps: 0', 'steps'), ('steps: true', 'steps'),
    ('batch: -1', 'batch'),
    ('patch: 4', 'patch'), ('lr: .nan', 'lr'), ('lr: -1.0', 'lr'), ('degradations: [foggy]', 'foggy'),
    ('parametrisation: velocity', 'velocity'),
    ('precision: float16', 'float16'), ('base: huge', 'huge'), ('- 1', 'keys and values'), ('steps: [1', 'not a YAML file'),
    ('unet: {width: 3, context_dim: 10}', 'width'), ('sde: {schedule: quadratic}', 'quadratic'), ('degradations: [noisy]', 'context_dim'),
    ('steps: !!python/object/apply:os.system ["true"]', 'not a YAML file'),
]

@pytest.mark.parametrize('text, named', BAD_CONFIGS)
def test_bad_configuration_is_refused_by_name(tmp_path, text, named):
    file = tmp_path/'c.yaml'
    file.write_text(text)
    with pytest.raises(ValueError, match=named) as e: build(load_config(file))
    assert '\n' not in str(e.value)


def test_missing_configuration():
    with pytest.raises(FileNotFoundError, match='neither a file nor one of'): load_config('nowhere.yaml')


def spoiled(tmp_path, how):
    path = save_weights(build(TOY), TOY, tmp_path/'w.safetensors')
    tensors = {k: v.half() for k, v in build(TOY).unet.state_dict().items()}
    header = dict(config=json.dumps(dict(unet=SMALL['unet'], parametrisation='residual', told=True)))
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


def test_missing_weights_name_what_is_packaged():
    with pytest.raises(FileNotFoundError, match='sampling-miniature'): load_weights('no-such-weights')


@pytest.mark.parametrize('content', [b'', b'garbage', None])
def test_bad_checkpoint_is_refused_and_kept(images, tmp_path, content):
    if content is None: torch.save([1, 2], tmp_path/'checkpoint.pt')
    else: (tmp_path/'checkpoint.pt').write_bytes(content)
    before = (tmp_path/'checkpoint.pt').read_bytes()
    with pytest.raises(ValueError, match='checkpoint'): Trainer(TOY, tmp_path, 'cpu')
    assert (tmp_path/'checkpoint.pt').read_bytes() == before


def test_checkpoint_of_another_configuration(images, tmp_path):
    Trainer(TOY, tmp_path, 'cpu').save()
    with pytest.raises(ValueError, match='made with lr'): Trainer(replace(TOY, lr=1e-5), tmp_path, 'cpu')


@pytest.mark.parametrize('degradation', [None, 'foggy', ['noisy']])
def test_a_network_that_is_told_must_be_told(degradation):
    with pytest.raises(ValueError): build(TOY).sample(torch.rand(2, 3, 16, 16), steps=1, degradation=degradation)


def test_bfloat16_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match='GPU'): Trainer(replace(TOY, precision='bfloat16'), tmp_path, 'cpu')


def test_no_photographs(tmp_path):
    with pytest.raises(ValueError, match='no photographs'): Trainer(TOY, tmp_path, 'cpu').fit([])
