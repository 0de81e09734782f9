"Packages of Debian and Ubuntu that some tests need: installed as root, or named in one sentence."
import os
import shutil
import subprocess


class NotInstalled(RuntimeError):
    "Something cannot be had here; the message says what is missing."


def last_line(text):
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), 'no message')


def install(what, packages, error=NotInstalled):
    "Install packages, which are known to be missing. Returns them."
    if not packages: return []
    command = ['apt-get', 'install', '--no-install-recommends', *packages]
    if not shutil.which('apt-get') or os.getuid():
        raise error(f"{what} is not installed; on Debian or Ubuntu, as root: {' '.join(command)}")
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                 env=os.environ | dict(DEBIAN_FRONTEND='noninteractive'))
    subprocess.run(['apt-get', 'update', '-q'], **quiet) # where one of many sources is out of reach, the packages may yet be there
    done = subprocess.run([*command, '-q', '-y', '-o', 'DPkg::Lock::Timeout=120'], text=True, **quiet)
    if done.returncode: raise error(f"{what} could not be installed; `{' '.join(command)}` says: {last_line(done.stdout)}")
    return packages
