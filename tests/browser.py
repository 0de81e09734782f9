"""A real, headless Chromium for the tests of the site, and for the README's picture of the gallery.

    python tests/browser.py install    # Debian's package (as root, on Debian or Ubuntu)
    python tests/browser.py picture results/daclip_unified.html low-light results/figures/gallery.webp
                                       # after `make docs`: the gallery of one degradation, as it looks in a browser
"""
import argparse
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

SITE = Path(__file__).parent.parent/'_docs'
PROGRAMS = 'chromium', 'chromium-browser', 'google-chrome'
# No sandbox: tests run as root, where it cannot be had, and open nothing but our own pages. Names of hosts lead nowhere.
OPTIONS = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking',
           '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
BYTES = 300_000  # at most, of a picture for the README


class NoBrowser(RuntimeError):
    "Chromium cannot be had here; the message says what is missing."


def find(): return next(filter(None, map(shutil.which, PROGRAMS)), None)


def install():
    "Install it where it is missing (Debian and Ubuntu, as root). Returns whether there was anything to do."
    if find(): return False
    command = ['apt-get', 'install', '--no-install-recommends', 'chromium']
    if not shutil.which('apt-get') or os.getuid():
        raise NoBrowser(f"Chromium is not installed; on Debian or Ubuntu, as root: {' '.join(command)}")
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                 env=os.environ | dict(DEBIAN_FRONTEND='noninteractive'))
    subprocess.run(['apt-get', 'update', '-q'], **quiet)  # where one of many sources is out of reach, the package may yet be there
    done = subprocess.run([*command, '-q', '-y', '-o', 'DPkg::Lock::Timeout=120'], **quiet)
    if done.returncode or not find():
        last = (done.stdout.strip().splitlines() or ['nothing'])[-1]
        raise NoBrowser(f"Chromium could not be installed; `{' '.join(command)}` says: {last}")
    return True


@contextmanager
def chromium():
    "The running browser."
    program = find()
    if not program: raise NoBrowser('Chromium is not installed; as root: python tests/browser.py install')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        try: yield browser
        finally: browser.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@contextmanager
def served(folder):
    "The address of a static server of a folder."
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_address[1]}/'
    finally: server.shutdown(); server.server_close()


def picture(page, degradation, path, site=SITE):
    "Write the gallery of one degradation as WebP, of at most `BYTES`."
    from PIL import Image
    if not (site/page).is_file(): raise ValueError(f'{site/page}: no such page; `make docs` makes the site')
    with chromium() as browser, served(site) as address:
        tab = browser.new_page(viewport=dict(width=1800, height=1200), color_scheme='light')
        tab.goto(f'{address}{page}', wait_until='networkidle')
        gallery = tab.locator(f'h3#{degradation} ~ .gallery').first
        if not gallery.count(): raise ValueError(f'{page}: no gallery of {degradation}')
        tab.add_style_tag(content='.md-sidebar, .md-header, .md-tabs { display: none !important } .md-grid { max-width: 90rem !important }'
                          '.gallery { width: max-content; padding: .4rem } .wide { overflow: visible !important }')
        for image in gallery.locator('img').all(): image.evaluate('i => { i.loading = "eager"; return i.decode() }')
        data = gallery.screenshot()
    image = Image.open(BytesIO(data)).convert('RGB')
    for quality in (90, 80, 70, 60, 50):
        image.save(buffer := BytesIO(), 'WEBP', quality=quality, method=6)
        if buffer.tell() <= BYTES: break
    else: raise ValueError(f'{path}: the picture has more than {BYTES} bytes')
    new = Path(f'{path}.tmp')
    new.write_bytes(buffer.getvalue())
    new.replace(path)
    return buffer.tell()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('install', help='install the package (Debian or Ubuntu, as root)')
    shot = commands.add_parser('picture', help='a picture of the gallery, after make docs')
    shot.add_argument('page', help='of the site, as results/daclip_unified.html')
    shot.add_argument('degradation', help='heading of the gallery, as low-light')
    shot.add_argument('path', help='WebP file to write')
    args = parser.parse_args()
    if args.command == 'install': print('Installed Chromium.' if install() else 'Chromium is installed.')
    else: print(f'{args.path}: {picture(args.page, args.degradation, args.path)} bytes')


if __name__ == '__main__':
    try: sys.exit(main())
    except (NoBrowser, ValueError, OSError) as e: sys.exit(f'browser: {e}')
