"""How long all figures of a large experiment take: `python tests/bench_figures.py`, or `make bench`.

A hundred thousand rows of three samplers in five numbers of steps: first the tables, then every figure that these rows allow.
"""
import tempfile
import time

from daclip_repro.tables.everything import write_results
from daclip_repro.tables.statistics import synthetic_rows
from daclip_repro.tables.tables import results


def main():
    rows = synthetic_rows(photos=210, seeds=3)
    begin, cpu = time.perf_counter(), time.process_time()
    found = results(rows, [], 'synthetic')
    middle, middle_cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as out: figures = [p for p in write_results(found, out, rows=rows) if p.suffix == '.png']
    end, end_cpu = time.perf_counter(), time.process_time()
    print(f'{len(rows):,} rows: tables {middle - begin:.1f} s ({middle_cpu - cpu:.1f} s of processor), '
          f'{len(figures)} figures {end - middle:.1f} s ({end_cpu - middle_cpu:.1f} s)')


if __name__ == '__main__': main()
