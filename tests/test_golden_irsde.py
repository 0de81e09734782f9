"""IR-SDE, posterior sampling and the denoising SDE against the authors' code: every tensor of the golden files."""
import re
from unittest.mock import patch

import pytest
import torch
from golden_data import describe, recorded

from daclip_repro.irsde import IRSDE, DenoisingSDE
from daclip_repro.posterior import posterior_std, posterior_step, reverse_posterior

ARRAYS = ('thetas', 'sigmas', 'thetas_cumsum', 'sigma_bars', 'dt')
TOY_A = 'model(x,mu,t) = 0.1*tanh(x-mu) + 0.01*t/100 (t is what the SDE passes: index*T/sample_T)'
TOY_B = 'x0h = 0.5+0.4*sin(3*mu); i = round(t*sample_T/T); model = 0.9*(x - mu_bar(x0h,i))/sigma_bar(i) + 0.02*cos(5*x)'
TOY_DENOISING = 'model(x,t) = 0.2*sin(2x) + 0.01*t/100'


def load(name): return describe(name), recorded(name)


def replay(noises):
    "A randn that returns recorded noise, one entry a call, from the first"
    recorded = iter(noises)
    return lambda x: next(recorded)


def tolerance(meta, name):
    "The tolerance that the JSON states for the tensor `name`"
    toy = re.search(r'\.traj([AB])\.', name)
    if toy: return meta['tolerance'][f'trajectories with toy model {toy[1]}']
    if re.search(r'\.traj\.|\.optimal_reverse$', name): return meta['tolerance']['default']
    return meta['tolerance']['schedules, marginals, single steps']


def apart(got, want): # the rule of the JSON
    got, want = torch.as_tensor(got).double(), want.double()
    return (got - want).abs().max().item() / max(want.abs().max().item(), 1e-300)


def nudged(outputs, seed):
    "The same with every exp and sqrt one unit in the last place up or down, by chance: processors of different makers disagree in them"
    rng, exp, sqrt = torch.Generator().manual_seed(seed), torch.exp, torch.sqrt
    def nudge(y): return torch.nextafter(y, torch.where(torch.rand(y.shape, generator=rng) < .5, -torch.inf, torch.inf).to(y))
    def nudged_exp(x): return torch.where(x == 0, 1., nudge(exp(x))) # all agree on exp(0)
    with patch.object(torch, 'exp', nudged_exp), patch.object(torch, 'sqrt', lambda x: nudge(sqrt(x.clamp_min(0)))):
        return outputs()


def compare(meta, golden, outputs, settings):
    "Every out tensor of `settings` within its tolerance, which grows by what another processor would change; no name more and none less"
    expected, ours = {k: v for k,v in golden.items() if k.startswith(f'{settings}.out.')}, outputs()
    assert set(ours) == set(expected)
    for name, want in expected.items(): assert torch.as_tensor(ours[name]).shape == want.shape, name
    worse = {k: error for k, want in expected.items() if not (error := apart(ours[k], want)) <= tolerance(meta, k)}
    if not worse: return
    others = [nudged(outputs, seed) for seed in range(8)]
    moved = {k: max(apart(o[k], torch.as_tensor(ours[k])) for o in others) if expected[k].is_floating_point() else 0. for k in worse}
    assert all(moved[k] < 1e-4 and error <= tolerance(meta, k) + 2 * moved[k] for k, error in worse.items()), (worse, moved)


def irsde_step(sde, g, t, xt):
    "What the official class computes at step t, by the names of the golden file"
    x0, mu, score, noise, eps = (g[f'in.{k}'] for k in ('x0', 'mu', 'score', 'noise_pred', 'step_eps'))
    real_noise = sde.noise_from_x0(xt, x0, mu, t)
    return dict(
        mu_bar=sde.mu_bar(x0, mu, t), sigma_bar=sde.sigma_bar(t, xt), xt=sde.random_states(x0, mu, t, g['in.eps']),
        weights=sde.decay(t, xt), real_noise=real_noise, real_score=sde.score_from_noise(real_noise, t),
        x0_from_noise=sde.x0_from_noise(xt, noise, mu, t), score_from_noise=sde.score_from_noise(noise, t), drift=sde.drift(xt, mu, t),
        sde_reverse_drift=sde.sde_reverse_drift(xt, score, mu, t), ode_reverse_drift=sde.ode_reverse_drift(xt, score, mu, t),
        forward_step=sde.forward_step(xt, mu, t, eps), reverse_ode_step=sde.reverse_ode_step(xt, score, mu, t),
        reverse_sde_step_mean=sde.reverse_sde_step_mean(xt, score, mu, t), reverse_sde_step=sde.reverse_sde_step(xt, score, mu, t, eps),
        reverse_optimum_step=sde.optimum_step(xt, x0, mu, t), reverse_optimum_std=posterior_std(sde, t, xt),
        reverse_posterior_step=posterior_step(sde, xt, noise, mu, t, eps))


def irsde_train(sde, g, t):
    "A training pair with its loss"
    x0, mu, noise = g['in.x0'], g['in.mu'], g['in.noise_pred']
    xt = sde.random_states(x0, mu, t, g['in.eps'])
    return dict(
        states=xt, xt_1_expectation=sde.reverse_sde_step_mean(xt, sde.score_from_noise(noise, t), mu, t),
        xt_1_optimum=sde.optimum_step(xt, x0, mu, t),
        loss_l1=sde.matching_loss(noise, xt, x0, mu, t), loss_l2=sde.matching_loss(noise, xt, x0, mu, t, norm='l2'))


def toys(meta, sde):
    "The two toy networks of the JSON"
    assert meta['toy_models'] == {'A': TOY_A, 'B': TOY_B}, 'the golden file describes toy models that this test does not know'
    def a(x, mu, t): return 0.1 * torch.tanh(x - mu) + 0.01 * t / 100
    def b(x, mu, t):
        return 0.9 * sde.noise_from_x0(x, 0.5 + 0.4 * torch.sin(3 * mu), mu, round(t * sde.sample_T / sde.T)) + 0.02 * torch.cos(5 * x)
    return {'A': a, 'B': b}


def irsde_trajectory(sde, g, net, kind):
    "A whole walk with the recorded noise; kind is ode, sde, posterior or posterior_T<k>"
    kind, _, T = kind.partition('_T')
    args = dict(noise_fn=net, mu=g['in.mu'], randn=replay(g['in.step_noise']), xT=g['in.xT'], T=int(T) if T else None)
    return {'ode': sde.reverse_ode, 'sde': sde.reverse_sde, 'posterior': lambda **kw: reverse_posterior(sde, **kw)}[kind](**args)


@pytest.mark.parametrize('settings', describe('irsde')['settings'])
def test_irsde(settings):
    meta, g = load('irsde')
    compare(meta, g, lambda: irsde_outputs(meta, g, settings), settings)


def irsde_outputs(meta, g, settings):
    sde = IRSDE(**meta['settings'][settings])
    nets, out = toys(meta, sde), f'{settings}.out.'
    ours = {out + k: getattr(sde, k) for k in ARRAYS} | {f'{out}max_sigma': torch.tensor(sde.lam)}
    ours[f'{out}noise_state'] = sde.noise_state(g['in.mu'], replay([g['in.noise_state_eps']]))
    for t in meta['t'][settings]: ours |= {f'{out}t{t}.{k}': v for k,v in irsde_step(sde, g, t, g[f'{out}t{t}.xt']).items()}
    ours |= {f'{out}train.{k}': v for k,v in irsde_train(sde, g, g[f'{settings}.in.timesteps']).items()}
    for name in g:
        if (found := re.fullmatch(re.escape(out) + r'traj([AB])\.(\w+)', name)):
            ours[name] = irsde_trajectory(sde, g, nets[found[1]], found[2])
    return ours


def denoising_step(sde, g, t, xt):
    "What the official DenoisingSDE computes at step t, by the names of the golden file"
    x0, score, noise, eps = (g[f'in.{k}'] for k in ('x0', 'score', 'noise_pred', 'step_eps'))
    real_noise = sde.noise_from_x0(xt, x0, t)
    sde_drift, ode_drift = sde.sde_reverse_drift(score, t), sde.ode_reverse_drift(score, t)
    return dict(
        sigma_bar=sde.sigma_bar(t, xt), xt=sde.random_states(x0, t, g['in.eps']), weights=sde.weights(t, xt), drift=sde.drift(xt, x0, t),
        sde_reverse_drift=sde_drift, ode_reverse_drift=ode_drift, reverse_ode_step=xt - ode_drift,
        reverse_sde_step=xt - sde_drift - sde.dispersion(eps, t), reverse_optimum_step=sde.optimum_step(xt, x0, t),
        x0_from_noise=sde.x0_from_noise(xt, noise, t), x0_from_score=sde.x0_from_score(xt, score, t),
        score_from_noise=sde.score_from_noise(noise, t), real_noise=real_noise, real_score=sde.score_from_noise(real_noise, t))


def denoising_trajectory(meta, sde, g, kind):
    "A walk from noise 25, where the JSON says it starts"
    assert meta['toy_model'] == TOY_DENOISING, 'the golden file describes a toy model that this test does not know'
    sigma = int(re.search(r'get_optimal_timestep\((\d+)\)', meta['describe_patterns']['<setting>.out.traj.ode'])[1])
    x0, xT, T = g['in.x0'], g['in.x0'] + g['in.eps'] * sigma / 255, sde.optimal_t(sigma)
    def net(x, t): return 0.2 * torch.sin(2 * x) + 0.01 * t / 100
    def exact(x, t): return sde.noise_from_x0(x, x0, t)
    if kind == 'ode': return sde.denoise(net, xT, T=T)
    return sde.denoise({'sde': net, 'sde_given_x0': exact}[kind], xT, replay(g['in.step_noise']), T)


def optimal_reverse(sde, x, x0):
    for t in range(sde.T, 0, -1): x = sde.optimum_step(x, x0, t)
    return x


@pytest.mark.parametrize('settings', describe('denoising_sde')['settings'])
def test_denoising_sde(settings):
    meta, g = load('denoising_sde')
    compare(meta, g, lambda: denoising_outputs(meta, g, settings), settings)


def denoising_outputs(meta, g, settings):
    sde, out = DenoisingSDE(**meta['settings'][settings]), f'{settings}.out.'
    ours = {out + k: getattr(sde, k) for k in ARRAYS}
    for t in meta['t'][settings]: ours |= {f'{out}t{t}.{k}': v for k,v in denoising_step(sde, g, t, g[f'{out}t{t}.xt']).items()}
    for name in g:
        if (found := re.fullmatch(re.escape(out) + r'traj\.(\w+)', name)): ours[name] = denoising_trajectory(meta, sde, g, found[1])
        if (sigma := re.fullmatch(re.escape(out) + r'optimal_timestep_sigma(\d+)', name)): ours[name] = sde.optimal_t(int(sigma[1]))
    last = meta['t'][settings][-1]
    ours[f'{out}optimal_reverse'] = optimal_reverse(sde, g[f'{out}t{last}.xt'], g['in.x0'])
    return ours


def test_the_base_repository_computes_the_same():
    "Where the golden file says that image-restoration-sde's IRSDE is bit-identical, the settings are among those compared above"
    g, compared = recorded('denoising_sde'), describe('irsde')['settings']
    markers = {k: v for k,v in g.items() if k.endswith('.out.identical_to_uir')}
    assert markers
    for name, value in markers.items():
        assert value.item() == 1, name
        assert name.split('.')[0].removeprefix('ir_') in compared


@pytest.mark.parametrize('name', ['irsde', 'denoising_sde'])
def test_every_output_is_compared(name):
    "No out tensor lies outside the settings that the tests above walk through"
    meta, g = load(name)
    known = tuple(f'{o}.out.' for o in meta['settings'])
    rest = {k for k in g if '.out.' in k and not k.startswith(known)}
    assert all(k.endswith('.identical_to_uir') for k in rest), rest
