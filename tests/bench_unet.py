"""How fast the U-Net is, as ratios against a baseline that is measured in the same rounds: `python tests/bench_unet.py`, or `make bench`.

Baseline and variant alternate round by round, so that a machine that is busy for a while is busy for both. The median ratio counts; its
range says how far to trust it. Before anything is timed, the variants that claim the same result are checked for it.
"""
import argparse
import statistics
import time
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import nn

from daclip_repro import unet as U
from daclip_repro.controller import DACLIP, make_clip
from daclip_repro.unet import ConditionalUNet


def textbook_attention(self, x):
    "Linear attention as its formula reads: v and the heads' outputs are made for every pixel."
    (b, _, h, w), n = x.shape, x.shape[2]*x.shape[3]
    q, k, v = (z.reshape(b, self.heads, -1, n) for z in self.to_qkv(x).chunk(3, dim=1))
    summary = torch.einsum('bhdn,bhen->bhde', k.softmax(dim=-1), v/n)
    return self.to_out(torch.einsum('bhde,bhdn->bhen', summary, q.softmax(dim=-2)*self.scale).reshape(b, -1, h, w))


def textbook_norm(self, x):
    return (x - x.mean(1, keepdim=True)) * (torch.var(x, dim=1, unbiased=False, keepdim=True) + 1e-5).rsqrt() * self.g


@contextmanager
def textbook():
    "The same network from the plain formulas, in the usual memory order."
    with patch.object(U.LinearAttention, 'forward', textbook_attention), patch.object(U.LayerNorm, 'forward', textbook_norm), \
         patch.object(U.Upsample, 'forward', nn.Sequential.forward), patch.object(U, 'pointwise', lambda layer, x: layer(x)), \
         patch.object(torch, 'channels_last', torch.contiguous_format): yield


def usual_memory_order(): return patch.object(torch, 'channels_last', torch.contiguous_format)


def miniature(scale=0.5):
    return ConditionalUNet(nf=32, ch_mult=(1, 2, 4), use_degra_context=False, use_image_context=False, scale=scale).eval()


def forward(unet, batch=8, side=64, context=nullcontext, calls=1):
    x, mu = torch.rand(2, batch, 3, side, side).unbind()
    def run():
        with torch.no_grad(), context(): return [unet(x, mu, 50) for _ in range(calls)][-1]
    return run


def training_step(unet, batch=8, side=64, context=nullcontext):
    x, mu, target = torch.rand(3, batch, 3, side, side).unbind()
    times = torch.arange(1, batch + 1)
    def run():
        unet.zero_grad()
        with context():
            loss = (unet(x, mu, times) - target).abs().mean()
            loss.backward()
        return loss.detach()
    return run


def sampling(unet, once, steps=10, side=32):
    "The steps of one image, with the constant part made once or at every step."
    x, mu = torch.rand(2, 1, 3, side, side).unbind()
    e_d, e_c = torch.randn(2, 1, unet.config['context_dim']).unbind()
    def run():
        with torch.no_grad():
            context = unet.precompute(e_d, e_c) if once else None
            return [unet(x, mu, t, context=context) if once else unet(x, mu, t, e_d, e_c) for t in range(steps, 0, -1)][-1]
    return run


def restoring(unet, daclip=None, steps=1, side=64):
    "One image from the first step to the last, with DA-CLIP's look at it before."
    x, mu = torch.rand(2, 1, 3, side, side).unbind()
    def run():
        with torch.no_grad():
            context = None if daclip is None else unet.precompute(*reversed(daclip.embed(mu)))
            return [unet(x, mu, t, context=context) for t in range(steps, 0, -1)][-1:]
    return run


def told(daclip=None, **sizes):
    "A network that is told nothing, or both embeddings."
    if daclip is None: return ConditionalUNet(**sizes, use_degra_context=False, use_image_context=False).eval()
    return ConditionalUNet(**sizes, context_dim=daclip.clip.visual.output_dim).eval()


def cases():
    "Name, baseline, variant, whether both give the same result."
    seeded = lambda make, *args, **kw: (torch.manual_seed(0), make(*args, **kw))[1]
    net, full = seeded(miniature), seeded(miniature, scale=1)
    daclip = seeded(ConditionalUNet).eval()
    pair = lambda make, unet, a={}, b={}: (seeded(make, unet, **a), seeded(make, unet, **b))
    yield 'forward: textbook -> ours', *pair(forward, net, dict(context=textbook)), True
    yield 'training step: textbook -> ours', *pair(training_step, net, dict(context=textbook)), True
    yield 'forward: usual order -> channels_last', *pair(forward, net, dict(context=usual_memory_order)), True
    yield 'training step: usual -> channels_last', *pair(training_step, net, dict(context=usual_memory_order)), True
    yield 'forward: full scale -> half scale', seeded(forward, full), seeded(forward, net), False
    yield '8 images: one by one -> one batch', seeded(forward, net, batch=1, calls=8), seeded(forward, net), False
    yield '10 steps of DA-CLIP: plain -> precompute', *pair(sampling, daclip, dict(once=False), dict(once=True)), True
    sizes, small = dict(nf=32, ch_mult=(1, 2, 4), scale=.5), seeded(lambda: DACLIP(make_clip('clip-miniature')).eval())
    for steps in (10, 100):
        yield (f'miniature, {steps} steps: told nothing -> DA-CLIP', seeded(restoring, told(**sizes), steps=steps),
               seeded(restoring, told(small, **sizes), small, steps=steps), False)
    large = seeded(lambda: DACLIP(make_clip('ViT-B-32')).eval())
    yield ('256², 1 step and look: nothing -> DA-CLIP', seeded(restoring, told(), side=256),
           seeded(restoring, told(large), large, side=256), False)
    yield ('256²: 1 step -> DA-CLIP\'s look alone', seeded(restoring, told(), side=256),
           seeded(restoring, told(large), large, steps=0, side=256), False)


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=7, help='alternating rounds for each line (default 7)')
    args = parser.parse_args()
    print(f'U-Net, torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.rounds} alternating rounds; '
          'above 1: the right-hand side is faster')
    print(f'{"":46s} {"ratio":>6s} {"range":>14s} {"left":>9s} {"right":>9s}')
    for name, base, variant, same in cases():
        a, b = base(), variant()
        if same and (a - b).abs().max() > 1e-5*a.abs().max():
            raise SystemExit(f'{name}: the two sides differ by {(a - b).abs().max():.1e}')
        times = [(seconds(base), seconds(variant)) for _ in range(args.rounds)]
        ratios = [x/y for x,y in times]
        left, right = (statistics.median(t) for t in zip(*times))
        print(f'{name:46s} {statistics.median(ratios):5.2f}x {min(ratios):6.2f} .. {max(ratios):4.2f} '
              f'{left*1e3:6.0f} ms {right*1e3:6.0f} ms', flush=True)


if __name__ == '__main__': main()
