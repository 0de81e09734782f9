"""What must hold for the mean-reverting SDE and its samplers, whatever the settings."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daclip_repro.irsde import IRSDE, SCHEDULES, DenoisingSDE, image_noise
from daclip_repro.posterior import METHODS, SPACINGS, few_step, jump, posterior_std, reverse_posterior, sample, step_times

few = settings(max_examples=25, deadline=None, derandomize=True)
sdes = st.builds(IRSDE, max_sigma=st.sampled_from([0.1, 10, 30, 50, 70]), T=st.integers(2, 60), schedule=st.sampled_from(list(SCHEDULES)),
                 eps=st.sampled_from([0.001, 0.005, 0.05]))
numbers = st.floats(0, 1, width=32)


def normal(seed):
    "One generator for a whole batch of particles, in float64"
    g = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype)


def knows(sde, x0): return sde.noise_fn(lambda x, mu, t: x0)


def half_right(sde):
    "A network with its own idea of the clean image, and a wobble"
    net = sde.noise_fn(lambda x, mu, t: 0.5 + 0.4 * torch.sin(3 * mu))
    return lambda x, mu, t: 0.9 * net(x, mu, t) + 0.02 * torch.cos(5 * x)


def unsure(sde, m, s):
    "The exact eps-model of the toy x0 ~ N(m, s²) given mu"
    def x0_fn(x, mu, t):
        B, v = sde.decay(round(t), x), sde.sigma_bar(round(t), x)**2
        return m + B * s**2 / (B**2 * s**2 + v) * (x - mu - B * (m - mu))
    return sde.noise_fn(x0_fn)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_simulated_forward_marginals_equal_the_closed_form(schedule):
    "Euler–Maruyama with many small steps: within four standard errors plus the first-order error of one step"
    n, sde = 20_000, IRSDE(T=400, schedule=schedule)
    randn, x, mu, x0 = normal(0), torch.full((n,), 0.9), torch.tensor(0.2), torch.tensor(0.9)
    step = (sde.thetas.max() * sde.dt).item()
    for t in range(1, sde.T + 1):
        x = sde.forward_step(x, mu, t, randn(x))
        if t % 50: continue
        std = sde.sigma_bars[t].item()
        assert abs(x.mean() - sde.mu_bar(x0, mu, t)) < 4 * std / math.sqrt(n) + step * 0.35
        assert abs(x.std() - std) < 4 * std / math.sqrt(2 * n) + step * std


@few
@given(sde=sdes, x0=numbers, mu=numbers)
def test_two_jumps_are_one(sde, x0, mu):
    "Chapman–Kolmogorov: the exact transition s → t applied to the marginal at s is the marginal at t"
    t, s = sde.T, max(sde.T // 2, 1)
    B, C, vt, vs, _ = jump(sde, t, s) if s < t else jump(sde, t, 0)
    A = B / C
    assert mu + A * C * (x0 - mu) == pytest.approx(mu + B * (x0 - mu), abs=1e-12)
    assert A**2 * vs + sde.lam**2 * (1 - A**2) == pytest.approx(vt, rel=1e-9)
    assert math.sqrt(vt) == pytest.approx(sde.sigma_bars[t].item(), rel=1e-5)


@few
@given(sde=sdes, t=st.integers(1, 60), x0=numbers, mu=numbers, y=numbers)
def test_optimum_is_the_best_and_its_width_the_curvature(sde, t, x0, mu, y):
    "No other x_{t-1} is more likely, and the posterior variance is one over the curvature there"
    t = min(t, sde.T)
    B, C, vt, vs, var = jump(sde, t, t - 1)
    if t == 1: assert var == 0; return
    A, x0, mu, xt = B / C, *(torch.tensor([o], dtype=torch.float64) for o in (x0, mu, y))
    def cost(x): return ((xt - mu - A * (x - mu))**2 / (1 - A**2) + (x - mu - C * (x0 - mu))**2 / (1 - C**2)).item() / (2 * sde.lam**2)
    h = math.sqrt(var)
    K = 1e-5 / (1 - C**2)  # float32 arrays: relative rounding grows as 1-C² gets small
    best = sde.optimum_step(xt, x0, mu, t)
    assert cost(best) <= min(cost(best + h), cost(best - h)) + 0.5 * K
    assert cost(best + h) + cost(best - h) - 2 * cost(best) == pytest.approx(1, rel=1e-6)
    assert posterior_std(sde, t, xt).item() == pytest.approx(h, rel=K + 1e-5)


@few
@given(sde=sdes, seed=st.integers(0, 99), eta=st.sampled_from([0., 0.3, 1.]), data=st.data())
def test_posterior_with_the_true_x0_ends_at_x0(sde, seed, eta, data):
    x0, mu = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)), torch.full((2, 3, 4, 5), 0.3)
    steps, spacing = data.draw(st.integers(1, sde.T)), data.draw(st.sampled_from(SPACINGS))
    assert torch.allclose(reverse_posterior(sde, knows(sde, x0), mu, image_noise([1, 2])), x0, atol=2e-6)
    assert torch.allclose(few_step(sde, knows(sde, x0), mu, image_noise([1, 2]), steps, eta, spacing=spacing), x0, atol=1e-4)


def test_ode_and_sde_share_marginals_on_a_gaussian_toy():
    "With the exact score both ways back have, at every time looked at, the mean and spread of the forward process"
    n, T, m, s = 10_000, 400, 0.7, 0.1
    sde = IRSDE(T=T)
    mu, net = torch.full((n,), 0.2, dtype=torch.float64), unsure(sde, m, s)
    ways = {'sde': [], 'ode': []}
    sde.reverse_sde(net, mu, normal(0), states=ways['sde'])
    sde.reverse_ode(net, mu, normal(1), states=ways['ode'])
    for t in range(0, T, 50):
        B, v = (1., 0.) if t == 0 else (sde.decay(t, mu).item(), sde.sigma_bars[t].item()**2)
        mean, std = 0.2 + B * (m - 0.2), math.sqrt(B**2 * s**2 + v)
        for states in ways.values():
            assert states[T - t].mean().item() == pytest.approx(mean, abs=0.01)
            assert states[T - t].std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_every_step_with_eta_one_is_the_official_posterior(schedule):
    sde, mu = IRSDE(schedule=schedule), torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    net = half_right(sde)
    official, ours = (f(sde, net, mu, image_noise([3, 4])) for f in (reverse_posterior, lambda *a: few_step(*a, steps=sde.T)))
    assert torch.allclose(official, ours, atol=2e-5)
    for method, walk in (('sde', sde.reverse_sde), ('ode', sde.reverse_ode)):
        ours = few_step(sde, net, mu, image_noise([3, 4]), sde.T, method=method)
        assert torch.allclose(ours, walk(net, mu, image_noise([3, 4])), atol=2e-5)


@few
@given(sde=sdes, eta=st.floats(0, 1), x0=numbers, mu=numbers, data=st.data())
def test_a_jump_keeps_the_marginal_for_every_eta(sde, eta, x0, mu, data):
    "Given x0, mean m_s and variance v_s: the carried and the fresh noise are independent and add up"
    t = data.draw(st.integers(1, sde.T)); s = data.draw(st.integers(0, t - 1))
    B, C, vt, vs, var = jump(sde, t, s)
    assert -1e-15 <= var <= vs * (1 + 1e-12)
    assert max(vs - eta**2 * var, 0) + eta**2 * var == pytest.approx(vs, abs=1e-15)


@few
@given(T=st.integers(1, 300), data=st.data())
def test_step_times_fall_from_T_to_zero(T, data):
    sde, steps = IRSDE(T=T), data.draw(st.integers(1, T))
    for spacing in SPACINGS:
        times = step_times(sde, steps, spacing)
        assert len(times) == steps + 1 and times[0] == T and times[-1] == 0
        assert all(a > b for a,b in zip(times, times[1:]))


@few
@given(method=st.sampled_from(METHODS), steps=st.integers(1, 20), rediscretise=st.sampled_from([None, True, False]),
       eta=st.sampled_from([0., 1.]))
def test_the_network_is_called_once_a_step_within_the_trained_times(method, steps, rediscretise, eta):
    sde, calls, mu = IRSDE(T=20), [], torch.zeros(1, 3, 4, 4)
    def net(x, mu, t): calls.append(t); return torch.zeros_like(x)
    states, eta = [], eta if method == 'posterior' else 1.
    sample(sde, net, mu, method, steps, image_noise([0]), eta=eta, rediscretise=rediscretise, states=states)
    assert len(calls) == steps == len(states) - 1
    assert calls[0] == sde.T and all(1 <= t <= sde.T for t in calls)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('steps', [4, 20])
def test_a_result_does_not_depend_on_the_batch(method, steps):
    sde, mu = IRSDE(T=20), torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    together = sample(sde, half_right(sde), mu, method, steps, image_noise([5, 6, 7]))
    alone = sample(sde, half_right(sde), mu[1:2], method, steps, image_noise([6]))
    assert torch.allclose(together[1:2], alone, atol=1e-6)
    assert not torch.allclose(together[1], sample(sde, half_right(sde), mu[1:2], method, steps, image_noise([8]))[0], atol=1e-3)
    assert torch.equal(together, sample(sde, half_right(sde), mu, method, steps, image_noise([5, 6, 7])))


def test_the_noise_itself_is_bitwise_per_image():
    mu, pair, alone = torch.zeros(2, 3, 5, 5), image_noise([5, 6]), image_noise([6])
    for _ in range(3): assert torch.equal(pair(mu)[1], alone(mu[:1])[0])


@few
@given(sde=sdes, seed=st.integers(0, 99), data=st.data())
def test_a_batch_of_t_is_each_t_alone(sde, seed, data):
    g = torch.Generator().manual_seed(seed)
    x, x0, mu, e = torch.rand(4, 3, 2, 3, 2, generator=g)
    t = torch.tensor(data.draw(st.lists(st.integers(1, sde.T), min_size=3, max_size=3)))
    for f in (lambda x, x0, mu, t, e: sde.random_states(x0, mu, t, e), lambda x, x0, mu, t, e: sde.noise_from_x0(x, x0, mu, t),
              lambda x, x0, mu, t, e: sde.x0_from_noise(x, e, mu, t), lambda x, x0, mu, t, e: sde.optimum_step(x, x0, mu, t),
              lambda x, x0, mu, t, e: sde.reverse_sde_step(x, e, mu, t, e), lambda x, x0, mu, t, e: posterior_std(sde, t, x) * e):
        whole, shaped = f(x, x0, mu, t, e), f(x, x0, mu, t.view(3, 1, 1, 1), e)
        assert torch.equal(whole, shaped)
        for i in range(3):
            alone = f(x[i:i+1], x0[i:i+1], mu[i:i+1], t[i].item(), e[i:i+1])
            assert torch.allclose(whole[i], alone[0], rtol=1e-3, atol=1e-4)


def test_gradients_reach_the_prediction_and_samplers_keep_none():
    sde, (xt, x0, mu) = IRSDE(), torch.rand(3, 2, 3, 4, 4)
    noise = torch.zeros(2, 3, 4, 4, requires_grad=True)
    sde.matching_loss(noise, xt, x0, mu, torch.tensor([3, 90])).backward()
    assert noise.grad.abs().sum() > 0
    assert not sample(sde, lambda x, mu, t: noise, mu, 'sde', 3, image_noise([0, 1])).requires_grad


def test_the_matching_loss_is_least_for_the_noise_that_lands_on_the_optimum():
    sde, (x0, mu, e) = IRSDE(), torch.rand(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (5, 50, 100):
        xt = sde.random_states(x0, mu, t, e)
        k = sde.sigmas[t]**2 * sde.dt / sde.sigma_bars[t]
        best = (xt - sde.drift(xt, mu, t) - sde.optimum_step(xt, x0, mu, t)) / k
        assert sde.matching_loss(best, xt, x0, mu, t) < 1e-6 < sde.matching_loss(best + 0.1, xt, x0, mu, t)


def test_a_clean_prediction_is_converted_on_the_grid_that_is_walked():
    "predicts='x0' with a perfect network: every posterior ends at x0, on the trained grid and on the rebuilt one"
    sde, mu, x0 = IRSDE(), torch.full((2, 3, 4, 4), 0.3), torch.rand(2, 3, 4, 4)
    for rediscretise in (True, False):
        out = sample(sde, lambda x, mu, t: x0, mu, 'posterior', 10, image_noise([0, 1]), rediscretise=rediscretise, predicts='x0')
        assert torch.allclose(out, x0, atol=1e-5)


def test_denoising_sde_walks_back_to_the_clean_image():
    sde, x0 = DenoisingSDE(70, T=500), torch.rand(2, 3, 4, 4)
    t = sde.optimal_t(50)
    noisy = sde.random_states(x0, t, image_noise([0, 1])(x0))
    def net(x, t): return sde.noise_from_x0(x, x0, t)
    assert torch.allclose(sde.denoise(net, noisy, T=t), x0, atol=5e-3)
    assert (sde.denoise(net, noisy, image_noise([0, 1]), t) - x0).abs().mean() < 5e-3


def test_to_moves_a_copy():
    sde = IRSDE()
    moved = sde.to('meta')
    assert moved.thetas.device.type == 'meta' and sde.thetas.device.type == 'cpu'
    assert repr(moved) == repr(sde)


SDE, LQ = IRSDE(T=20), torch.zeros(2, 3, 4, 4)
def zero(x, mu, t): return torch.zeros_like(x)
def bad_at(step): return lambda x, mu, t: torch.full_like(x, math.nan if t == step else 0.)

@pytest.mark.parametrize('call,words', [
    (lambda: IRSDE(schedule='sine'), "schedule 'sine' is unknown: choose one of cosine, linear, constant"),
    (lambda: IRSDE(T=0), 'T must be a whole number of at least 1, not 0'),
    (lambda: IRSDE(T=10.5), 'T must be a whole number of at least 1, not 10.5'),
    (lambda: IRSDE(T=True), 'T must be a whole number of at least 1, not True'),
    (lambda: IRSDE(max_sigma=0), 'max_sigma must be a number above 0, not 0'),
    (lambda: IRSDE(max_sigma=math.nan), 'max_sigma must be a number above 0, not nan'),
    (lambda: IRSDE(max_sigma='50'), "max_sigma must be a number above 0, not '50'"),
    (lambda: IRSDE(eps=0), 'eps must lie between 0 and 1, not 0'),
    (lambda: IRSDE(sample_T=0), 'sample_T must be a whole number from 1 to 100, not 0'),
    (lambda: IRSDE(sample_T=-1), 'sample_T must be a whole number from 1 to 100, not -1'),
    (lambda: IRSDE(T=10, sample_T=11), 'sample_T must be a whole number from 1 to 10, not 11'),
    (lambda: SDE.mu_bar(LQ, LQ, 0), 't must be a whole number from 1 to 20, not 0'),
    (lambda: SDE.mu_bar(LQ, LQ, 21), 't must be a whole number from 1 to 20, not 21'),
    (lambda: SDE.mu_bar(LQ, LQ, torch.tensor([1, 21])), 't must lie in 1..20, not between 1 and 21'),
    (lambda: SDE.mu_bar(LQ, LQ, torch.tensor([1., 2.])), 't must hold whole numbers, not torch.float32'),
    (lambda: SDE.matching_loss(LQ, LQ, LQ, LQ, 1, norm='huber'), "norm must be 'l1' or 'l2', not 'huber'"),
    (lambda: SDE.reverse_sde(bad_at(7), LQ, image_noise([0, 1])), 'the network returned NaN or infinity at step t=7 '),
    (lambda: sample(SDE, bad_at(10), LQ, 'posterior', 4, image_noise([0, 1])), 'the network returned NaN or infinity at step t=10 '),
    (lambda: SDE.reverse_ode(lambda x, mu, t: x[:1], LQ, image_noise([0, 1])),
     r'the network returned shape \(1, 3, 4, 4\) for a state of shape \(2, 3, 4, 4\)'),
    (lambda: SDE.reverse_sde(zero, LQ, image_noise([0, 1]), T=5), 'a walk from T=5 needs its first state xT'),
    (lambda: SDE.reverse_ode(zero, LQ), 'randn is needed to draw the first state'),
    (lambda: SDE.reverse_sde(zero, LQ, image_noise([0, 1, 2])), 'the noise has 3 seeds, but the batch has 2 images'),
    (lambda: sample(SDE, zero, LQ, 'ddim', 4, image_noise([0, 1])), "method 'ddim' is unknown: choose one of sde, ode, posterior"),
    (lambda: sample(SDE, zero, LQ, 'sde', 0, image_noise([0, 1])), 'steps must be a whole number from 1 to 20, not 0'),
    (lambda: sample(SDE, zero, LQ, 'posterior', 21, image_noise([0, 1])), 'steps must be a whole number from 1 to 20, not 21'),
    (lambda: sample(SDE, zero, LQ, 'posterior', 4, image_noise([0, 1]), eta=1.5), 'eta must lie between 0'),
    (lambda: sample(SDE, zero, LQ, 'ode', 4, image_noise([0, 1]), eta=0.), "eta belongs to the method posterior, 'ode' has none"),
    (lambda: sample(SDE, zero, LQ, 'posterior', 4, image_noise([0, 1]), spacing='log'),
     "spacing 'log' is unknown: choose one of time, noise"),
    (lambda: sample(SDE, zero, LQ, 'posterior', 4, image_noise([0, 1]), predicts='score'), "predicts must be 'noise' or 'x0', not 'score'"),
    (lambda: DenoisingSDE(schedule='constant'), "schedule 'constant' is unknown to DenoisingSDE: choose cosine or linear"),
    (lambda: DenoisingSDE(max_sigma=25).optimal_t(50), 'sigma must lie between 0 and max_sigma=25, not 50'),
])
def test_a_bad_value_ends_in_one_clear_sentence(call, words):
    with pytest.raises(ValueError, match=words) as e: call()
    assert '\n' not in str(e.value)
