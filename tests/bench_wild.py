"""How many crops a second the chain in the wild makes on one core, and where the time goes: `python tests/bench_wild.py`, or `make bench`.

Time is counted on the processor, so that a busy machine does not matter much; the clock on the wall stands beside it. The chain as it
is and the same with its filters summed up pixel by pixel alternate round by round, and are checked for the same result before.
"""
import argparse
import statistics
import time
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F

from daclip_repro import wild as W
from daclip_repro.photos import fit_square, packaged_photos

STAGES = ('draw_plan', 'blur', 'convolve', 'unblur', 'resize', 'add_noise', 'jpeg', 'to_8_bits')


def summed_up(x, kernel):
    r = kernel.shape[-1] // 2
    kernels = kernel.flip(-2, -1).expand(3, -1, -1)[:, None].contiguous()
    return F.conv2d(F.pad(x, (r,) * 4, mode='reflect')[None], kernels, groups=3)[0]


def timed(f, *args):
    cpu, wall = time.process_time(), time.perf_counter()
    f(*args)
    return time.process_time() - cpu, time.perf_counter() - wall


@contextmanager
def profiled(seconds, calls):
    def wrap(f):
        def g(*args, **kw):
            start = time.process_time()
            out = f(*args, **kw)
            seconds[f.__name__] += time.process_time() - start
            calls[f.__name__] += 1
            return out
        return g
    with patch.multiple(W, **{name: wrap(getattr(W, name)) for name in STAGES}): yield


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=7, help='alternating rounds (default 7)')
    parser.add_argument('--crops', type=int, default=70, help='crops of 256×256 in a round (default 70)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    photos = [fit_square(p.load(), 256) for p in packaged_photos()]
    batch = torch.stack([photos[i % len(photos)] for i in range(args.crops)])
    fourier = lambda round: W.wild(batch, round * args.crops)
    def direct(round):
        with patch.object(W, 'convolve', summed_up): return W.wild(batch, round * args.crops)
    if ((fourier(0)[0] - direct(0)[0]).abs() > 1.5 / 255).float().mean() > .001: raise SystemExit('the two ways to filter differ')
    times = [(timed(fourier, r), timed(direct, r)) for r in range(args.rounds)]
    print(f'torch {torch.__version__}, 1 thread, {args.rounds} rounds of {args.crops} crops of 256×256')
    for name, column in zip(('Fourier', 'summed up'), zip(*times)):
        cpu, wall = ([args.crops / t for t in ts] for ts in zip(*column))
        print(f'{name:10s} {statistics.median(cpu):5.1f} crops a second of the processor ({min(cpu):.1f} .. {max(cpu):.1f}), '
              f'{statistics.median(wall):.1f} of the clock')
    seconds, calls = Counter(), Counter()
    with profiled(seconds, calls):
        for r in range(args.rounds): fourier(r)
    total = args.rounds * args.crops
    print(f'{"":10s} {"ms a crop":>10s} {"calls a crop":>13s} {"ms a call":>10s}   (blur contains convolve and unblur)')
    for name, s in seconds.most_common():
        print(f'{name:10s} {s / total * 1e3:10.2f} {calls[name] / total:13.2f} {s / calls[name] * 1e3:10.2f}')


if __name__ == '__main__': main()
