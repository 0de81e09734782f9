"""What tables and figures of many rows cost: `python tests/bench_tables.py`, or `make bench`.

Made-up rows to all tables in all formats, and to all figures. The baseline, measured in the same rounds, is what a plain table of means
costs, without pairs and intervals: the rows written as CSV, read again, and averaged by pandas. The median ratio counts; its range says
how far to trust it. A limit that is passed ends the program with an error.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from daclip_repro.tables.everything import write_results
from daclip_repro.tables.formats import write_tables
from daclip_repro.tables.statistics import TRUE_GAIN, synthetic_rows
from daclip_repro.tables.tables import METRICS, results

LIMITS = {'all tables': 10, 'all tables and figures': 60} # seconds for 100,000 rows
CLAIMS = [dict(name=f'{a} beats {b} in {metric}', metric=metric, better=dict(method=a, steps=100), than=dict(method=b, steps=100))
          for metric in ('psnr', 'ssim', 'stlpips') for a in TRUE_GAIN for b in ('sde', 'ode') if a != b]


def plain_means(rows, folder):
    rows.to_csv(folder/'rows.csv', index=False)
    metrics = [m for m in METRICS if m in rows]
    means = pd.read_csv(folder/'rows.csv').groupby(['degradation', 'method', 'steps'])[metrics].mean()
    means.to_csv(folder/'means.csv')


def all_tables(rows, folder):
    table, judged, by = results(rows, CLAIMS, 'synthetic')
    return write_tables(table, judged, folder, by)


def everything(rows, folder): return write_results(results(rows, CLAIMS, 'synthetic'), folder, rows=rows)


def seconds(function, rows):
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        function(rows, Path(folder))
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=3, help='alternating rounds (default 3)')
    parser.add_argument('--photos', type=int, default=210, help='photographs; 210 give 100,800 rows')
    args = parser.parse_args()
    rows, late = synthetic_rows(photos=args.photos, seed=3), []
    print(f'{len(rows):,} rows of {args.photos} photographs, pandas {pd.__version__}, {args.rounds} alternating rounds')
    times = {name: [] for name in ('plain means', *LIMITS)}
    for _ in range(args.rounds):
        for name, function in zip(times, (plain_means, all_tables, everything)): times[name].append(seconds(function, rows))
    base = times.pop('plain means')
    print(f"{'plain means':24s} {statistics.median(base):6.2f} s")
    for name, taken in times.items():
        ratios, median = [t / b for t, b in zip(taken, base)], statistics.median(taken)
        print(f'{name:24s} {median:6.2f} s, limit {LIMITS[name]} s; {statistics.median(ratios):.1f} times the plain means '
              f'({min(ratios):.1f} to {max(ratios):.1f})')
        if median > LIMITS[name] and len(rows) <= 101_000: late.append(name)
    if late: sys.exit(f"over the limit: {', '.join(late)}")


if __name__ == '__main__': main()
