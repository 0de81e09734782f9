"What only a GPU can show: the same results as on the CPU, training in bfloat16, batches that other processes make. Skipped without one."
from dataclasses import replace

import pytest
import torch

from daclip_repro.controller import load_daclip
from daclip_repro.controller_training import CONTROLLER_CONFIGS, ControllerTrainer, Photographs
from daclip_repro.degradations import DEGRADATIONS, degrade
from daclip_repro.loop import to_bytes
from daclip_repro.photos import fit_square, packaged_photos
from daclip_repro.restore import Restorer
from daclip_repro.training import CONFIGS, RestorerTrainer, load_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
METHODS = dict(irsde=dict(nf=16, ch_mult=[1, 2, 4], scale=.5), nafnet=dict(width=24, enc_blk_nums=[1, 1, 2], dec_blk_nums=[1, 1, 1]),
               restormer=dict(dim=16, num_blocks=[1, 1, 1, 2], num_refinement_blocks=1), airnet=dict(dim=24, groups=2, blocks=1),
               promptir=dict(dim=12, num_blocks=[1, 1, 1, 2], num_refinement_blocks=1, patch=64))


@pytest.fixture(autouse=True)
def exact():
    "Without the shortened multiplication that would hide a difference."
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = kept


@pytest.fixture(scope='module')
def images(): return to_bytes(packaged_photos()[:4])


def config(method, **changes):
    condition = 'both' if method in ('irsde', 'nafnet') else 'none'
    own = dict(method=method, network=METHODS[method], condition=condition, steps=3, warmup=1, restarts=())
    return replace(CONFIGS['sampling-miniature'], **own, **changes)


@pytest.mark.parametrize('method', METHODS)
def test_a_training_takes_the_steps_of_the_cpu(images, tmp_path, method):
    found = {}
    for device in ('cpu', 'cuda'):
        trainer = RestorerTrainer(config(method), tmp_path/device, device)
        log = trainer.fit(images, log_every=1, progress=False)
        found[device] = [line['loss'] for line in log]
    assert found['cuda'] == pytest.approx(found['cpu'], rel=2e-3)


@pytest.mark.parametrize('method', ['irsde', 'nafnet'])
def test_bfloat16_trains_and_stays_near(images, tmp_path, method):
    found = {}
    for precision in ('float32', 'bfloat16'):
        trainer = RestorerTrainer(config(method, precision=precision), tmp_path/precision, 'cuda')
        found[precision] = [line['loss'] for line in trainer.fit(images, log_every=1, progress=False)]
        assert all(p.dtype == torch.float32 for p in trainer.model.net.parameters())
    assert found['bfloat16'] == pytest.approx(found['float32'], rel=.03)


@pytest.mark.parametrize('changes', [{}, dict(micro=8), dict(precision='bfloat16')], ids=['whole', 'in parts', 'bfloat16'])
def test_a_controller_takes_the_steps_of_the_cpu(images, tmp_path, changes):
    settings = replace(CONTROLLER_CONFIGS['daclip-miniature'], batch=20, steps=2, **changes)
    def losses(device, **others):
        trainer = ControllerTrainer(replace(settings, **others), tmp_path/device, device)
        return [line['loss'] for line in trainer.fit(Photographs(images), log_every=1, progress=False)]
    assert losses('cuda') == pytest.approx(losses('cpu', precision='float32'), rel=.05 if 'precision' in changes else 1e-3)


def test_batches_made_ahead_change_nothing(images, tmp_path):
    def losses(workers):
        trainer = RestorerTrainer(config('irsde'), tmp_path/str(workers), 'cuda')
        return [line['loss'] for line in trainer.fit(images, log_every=1, workers=workers, progress=False)]
    assert losses(0) == pytest.approx(losses(3), rel=1e-4)


@pytest.mark.parametrize('name', ['sampling-miniature'])
@pytest.mark.parametrize('method', ['posterior', 'sde', 'ode'])
def test_samples_are_those_of_the_cpu(name, method):
    hq = torch.stack([fit_square(p.load(), 64) for p in packaged_photos()[:3]])
    lq = degrade(hq, 'noisy')
    out = {d: load_weights(name, d).sample(lq.to(d), method, 10, degradation='noisy').cpu() for d in ('cpu', 'cuda')}
    assert (out['cpu'] - out['cuda']).abs().max() < 2e-3


def test_daclip_says_the_same():
    hq = torch.stack([fit_square(p.load(), 64) for p in packaged_photos()])
    for word in DEGRADATIONS:
        lq = degrade(hq, word)
        cpu, gpu = (load_daclip(device=d).classify(lq.to(d)).cpu() for d in ('cpu', 'cuda'))
        assert (cpu - gpu).abs().max() < 1e-3


def test_tiles_on_the_gpu_and_in_bfloat16():
    lq = degrade(packaged_photos()[0].load(), 'hazy')[:, :200, :280]
    out = {}
    for device, precision in (('cpu', 'float32'), ('cuda', 'float32'), ('cuda', 'bfloat16')):
        restorer = Restorer.from_weights('sampling-miniature', device, tile=128, overlap=16, precision=precision)
        out[device, precision] = restorer(lq, degradation='hazy', steps=5).cpu()
    exact = out['cpu', 'float32']
    assert (out['cuda', 'float32'] - exact).abs().max() < 5e-3
    assert (out['cuda', 'bfloat16'] - exact).abs().mean() < 2e-2
