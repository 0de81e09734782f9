"""A real TeX for the tests: pdflatex and booktabs from Debian's packages (48 MB to fetch, 150 MB on the disk).

    python tests/latex.py install        # the packages (as root, on Debian or Ubuntu)
"""
import re
import shutil
import subprocess
import sys

import debian

PACKAGES = {'article.cls': 'texlive-latex-base', 'booktabs.sty': 'texlive-latex-recommended'}  # file -> its package


def find(file):
    "Does TeX find this file?"
    return shutil.which('pdflatex') and subprocess.run(['kpsewhich', file], capture_output=True, timeout=60).returncode == 0


def missing():
    "The packages that are needed and not here."
    return [package for file, package in PACKAGES.items() if not find(file)]


def install():
    "Install what is missing (Debian and Ubuntu, as root). Returns the packages."
    return debian.install('LaTeX', missing())


def typeset(file):
    "Two runs, as references need; the last one's log with its lines put together again. RuntimeError with TeX's own complaint."
    command = ['pdflatex', '-interaction=nonstopmode', '-halt-on-error', '-no-shell-escape', file.name]
    for _ in range(2):
        done = subprocess.run(command, cwd=file.parent, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
        log = re.sub(r'(?<=.{79})\n', '', done.stdout.decode(errors='replace'))
        if done.returncode: raise RuntimeError(f'{file.name}: ' + ' '.join(re.findall(r'^(?:!|l\.\d+).*', log, re.M)))
    return log


if __name__ == '__main__':
    if sys.argv[1:] != ['install']: sys.exit(f'usage: {sys.argv[0]} install')
    try: print('Installed ' + ', '.join(packages) + '.' if (packages := install()) else 'LaTeX is installed.')
    except debian.NotInstalled as e: sys.exit(f'latex: {e}')
