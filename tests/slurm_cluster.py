"""A whole Slurm with accounting on this one machine, on loopback and in one folder, for the tests and for trying out sweeps.

    python tests/slurm_cluster.py install        # the packages (as root, on Debian or Ubuntu)
    python tests/slurm_cluster.py up             # say `export SLURM_CONF=...`; `up` again is harmless
    python tests/slurm_cluster.py up nodes=1 cpus=8 MaxArraySize=101 KillWait=30   # the size, and any line of slurm.conf
    python tests/slurm_cluster.py status
    python tests/slurm_cluster.py down           # stop it with all its jobs, and delete its folder

The folder is $DACLIP_SLURM, or one in the user's cache folder; each folder is a cluster of its own, and several run side by side.
Nothing outside the folder is written. All daemons run as the user who starts them and serve that user only.
"""
import argparse
import fcntl
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import debian
import psutil
from debian import last_line

PACKAGES = dict(slurmctld='slurm-wlm', slurmdbd='slurmdbd', munged='munge', mariadbd='mariadb-server-core')  # program -> its package
MARK = '.daclip-slurm'  # in each cluster's folder
PROGRAMS = 'munged', 'mariadbd', 'slurmdbd', 'slurmctld', 'slurmscriptd', 'slurmd', 'slurmstepd'

# CPUs, memory and GPUs are stated, not measured (config_overrides), so that several small jobs run at once on a small machine
CONF = """ClusterName=daclip
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/slurmctld
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={ports[1]}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
DefMemPerCPU=1024
ReturnToService=1
SlurmdTimeout=30
MessageTimeout=30
MinJobAge=3600
MaxArraySize=1001
MaxJobCount=20000
JobRequeue=1
KillWait=5
OverTimeLimit=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
NODE = 'RealMemory=65536 Gres=gpu:a100:2 Feature=a100'
# a job in `urgent` takes the place of one in `main`
PARTITIONS = """PartitionName=main Nodes={names} Default=YES PriorityTier=1
PartitionName=urgent Nodes={names} PriorityTier=10 PreemptMode=OFF
"""
DATABASE_CONF = """DbdHost=localhost
DbdPort={ports[1]}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StorageLoc=slurm
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""


class NoSlurm(debian.NotInstalled):
    "Slurm cannot be had here; the message says what is missing."


def find(program):
    return shutil.which(program, path=os.environ.get('PATH', os.defpath) + ':/usr/sbin:/sbin')  # not on every user's PATH


def missing():
    "The packages that are needed and not here."
    return [package for program, package in PACKAGES.items() if not find(program)]


def install():
    "Install what is missing (Debian and Ubuntu, as root). Returns the packages."
    return debian.install('Slurm', missing(), NoSlurm)


def user_name():
    try: return pwd.getpwuid(os.getuid()).pw_name
    except KeyError: raise NoSlurm(f'Slurm needs the name of its user, and the user number {os.getuid()} has none here') from None


def complaint(log):
    "The line of a log that tells what went wrong, as far as one can tell."
    lines = [line for line in log.splitlines() if re.search('error:|error]', line, re.I) and not re.search('pmix|MPI', line)]
    return last_line('\n'.join(lines) or log)


def answers(address):
    "Is there a server at this TCP address or socket file?"
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as s:
        return s.connect_ex(address) == 0


def free_ports(n):
    "Below the range from which systems hand out ports of their own accord."
    return [port for port in random.sample(range(20_000, 32_000), n + 100) if not answers(('127.0.0.1', port))][:n]


def wait_until(condition, what, timeout=60, every=.1):
    "The first true value of `condition()`."
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end: raise TimeoutError(f'waited {timeout} s in vain: {what}')
        time.sleep(every)
    return value


class Cluster:
    "The cluster that lives in `folder`, up or not."
    def __init__(self, folder=None):
        cache = os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache'
        self.folder = Path(folder or os.environ.get('DACLIP_SLURM') or Path(cache)/'daclip-slurm').resolve()
        self.conf = self.folder/'slurm.conf'
        self.env = dict(SLURM_CONF=str(self.conf)) # all that a Slurm command needs
        self.started = {} # daemons that are children of this process

    # --- up and down

    def up(self, nodes=None, cpus=None, **settings):
        "Start what does not run; `settings` are lines of slurm.conf. Returns whether there was anything to do."
        if packages := missing(): raise NoSlurm(f"Slurm is not installed; missing: {' '.join(packages)}")
        with self.locked():
            if not self.conf.exists(): self.make_folder(int(nodes or 2), int(cpus or 4))
            elif (nodes and int(nodes) != len(self.nodes())) or (cpus and f' CPUs={cpus} ' not in self.conf.read_text()):
                raise ValueError(f'the cluster in {self.folder} has another size: take it down first')
            if settings: self.configure(**settings)
            if self.is_up(): return False
            self.started = {daemon: process for daemon, process in self.started.items() if process.poll() is None}
            for daemon in self.daemons(): self.start(daemon)
            wait_until(self.is_up, f'the cluster does not come up (logs in {self.folder})')
            return True

    def down(self):
        "Kill all that belongs to the cluster, jobs too, and delete its folder. Returns whether there was anything to do."
        with self.locked():
            if not self.folder.exists(): return False
            self.check_ours()
            def nothing_left(): # asked again until it is so, since what is about to be killed may start something
                for process in (found := self.processes()): kill(process)
                return not found
            wait_until(nothing_left, 'some processes of the cluster survive SIGKILL')
            shutil.rmtree(self.folder)
            return True

    @contextmanager
    def locked(self):
        "One `up` or `down` at a time. The lock is on the parent folder: the folder itself comes and goes."
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        parent = os.open(self.folder.parent, os.O_RDONLY)
        try:
            fcntl.flock(parent, fcntl.LOCK_EX)
            yield
        finally: os.close(parent)

    # --- its folder

    def make_folder(self, nodes, cpus):
        "The folder with everything but the daemons in it. slurm.conf comes last: where it is, the folder is complete."
        self.check_path()
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.check_ours()
        (self.folder/MARK).touch()
        names, ports = [f'n{i + 1}' for i in range(nodes)], free_ports(2 + nodes)
        for part in ('mariadb', 'slurmctld', *names):
            shutil.rmtree(self.folder/part, ignore_errors=True)
            (self.folder/part).mkdir()
        # One clean start and end: a database that is killed in its first moments does not start again
        subprocess.run([find('mariadbd'), *self.database_options(), '--bootstrap'], check=True,
                       stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for gpu in ('gpu0', 'gpu1'): (self.folder/gpu).touch() # stand for devices: Slurm counts them, no more
        values = dict(folder=self.folder, host=socket.gethostname().split('.')[0], user=user_name(), ports=ports, names=','.join(names))
        lines = [f'NodeName={name} NodeHostname={values["host"]} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} {NODE}'
                 for name, port in zip(names, ports[2:])]
        self.write('munge.key', os.urandom(64).hex())
        self.write('gres.conf', f'Name=gpu Type=a100 File={self.folder}/gpu[0-1]\n')
        self.write('slurmdbd.conf', DATABASE_CONF.format(**values))
        self.write('slurm.conf', '\n'.join([CONF.format(**values), *lines, PARTITIONS.format(**values)]))

    def check_path(self):
        "Slurm splits at spaces and some signs, and the system cuts off the name of a socket."
        longest = self.folder/'mariadb.socket'
        if len(os.fsencode(longest)) > 107: raise ValueError(f'{longest} is too long for a socket: name a shorter folder in DACLIP_SLURM')
        if wrong := re.search(r'[^\w./+@:-]', str(self.folder)):
            raise ValueError(f'Slurm cannot work in {self.folder} because of {wrong[0]!r}: name another folder in DACLIP_SLURM')

    def check_ours(self):
        "Never write to or delete a folder of somebody else's."
        if any(self.folder.iterdir()) and not (self.folder/MARK).exists():
            raise ValueError(f'{self.folder} holds something else than a cluster: name another folder in DACLIP_SLURM')

    def write(self, name, text):
        "Whole or not at all, and for this user only (slurmdbd and munged insist)."
        new = self.folder/f'{name}.tmp'
        new.touch(mode=0o600)
        new.write_text(text)
        new.replace(self.folder/name)

    def configure(self, **settings):
        "Change lines of slurm.conf; a running cluster follows."
        text = self.conf.read_text()
        for key, value in settings.items():
            text = re.sub(rf'^{key}=.*\n', '', text, flags=re.M).replace('\nNodeName=', f'\n{key}={value}\nNodeName=', 1)
        self.write('slurm.conf.new', text)
        new = self.folder/'slurm.conf.new'
        done = self.ask('sinfo', '--version', SLURM_CONF=str(new)) # reads it
        if done.returncode: raise ValueError(f"Slurm refuses {' '.join(f'{k}={v}' for k, v in settings.items())}: {complaint(done.stderr)}")
        new.replace(self.conf)
        if 'slurmctld' in self.running():
            self.restart('slurmctld') # not everything can be changed by `scontrol reconfigure` alone
            self.run('scontrol', 'reconfigure')

    # --- its daemons

    def nodes(self):
        return re.findall(r'^NodeName=(\w+)', self.conf.read_text(), flags=re.M) if self.conf.exists() else []

    def daemons(self):
        "The command line of each daemon by its name, in the order in which they need each other."
        at, files = self.folder, [f'--{kind}-file={self.folder}/munge.{kind}' for kind in ('key', 'pid', 'seed', 'log')]
        return {
            'munged': ['munged', '--foreground', '--force', f'--socket={at}/munge.socket', *files], # force: its folder is not for others
            'mariadbd': ['mariadbd', *self.database_options(), f'--socket={at}/mariadb.socket', f'--pid-file={at}/mariadb.pid'],
            'slurmdbd': ['slurmdbd', '-D'],
            'slurmctld': ['slurmctld', '-D'],
        } | {f'slurmd-{node}': ['slurmd', '-D', '-N', node] for node in self.nodes()}

    def database_options(self):
        "No port and no table of users: whoever can enter the folder is the user."
        return ['--no-defaults', f'--datadir={self.folder}/mariadb', f'--user={os.getuid()}', '--skip-networking', '--skip-grant-tables',
                '--innodb-log-file-size=8M', '--innodb-flush-log-at-trx-commit=2']

    def answers(self, daemon):
        "Does it do its part of the work?"
        if daemon == 'munged': return answers(f'{self.folder}/munge.socket')
        if daemon == 'mariadbd': return answers(f'{self.folder}/mariadb.socket')
        if daemon == 'slurmdbd': return self.ask('sacctmgr', '-n', 'list', 'cluster').returncode == 0
        if daemon == 'slurmctld':
            known = lambda: self.ask('sacctmgr', '-n', '-P', 'list', 'cluster', 'format=controlhost').stdout.strip() # to slurmdbd
            return self.ask('scontrol', 'ping').returncode == 0 and bool(known())
        state = self.ask('sinfo', '-h', '-o', '%T', '-p', 'main', '-n', daemon.removeprefix('slurmd-')).stdout.strip()
        return bool(state) and not state.startswith('unk') and not state.endswith('*') # not heard of yet, not heard of lately

    def is_up(self):
        asked = [daemon for daemon in self.daemons() if daemon != 'slurmdbd'] # what is asked of slurmctld comes from slurmdbd
        return self.conf.exists() and set(self.daemons()) <= set(self.running()) and all(map(self.answers, asked))

    def start(self, daemon):
        "Start it where it does not run, and wait until it answers."
        if daemon in self.running(): return
        program, *args = self.daemons()[daemon]
        log = self.folder/f'{daemon}.out'
        with open(log, 'wb') as out:
            process = subprocess.Popen([find(program), *args], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.folder,
                                       start_new_session=True, # no Ctrl-C of ours reaches it
                                       env=os.environ | self.env | dict(MYSQL_UNIX_PORT=f'{self.folder}/mariadb.socket'))
        self.started[daemon] = process
        wait_until(lambda: self.ended() or self.answers(daemon), f'{daemon} does not answer (see {log})')
        if gone := self.ended():
            raise RuntimeError(f'{gone} has ended: {complaint((self.folder/f"{gone}.out").read_text(errors="replace"))}')

    def ended(self):
        "The first of the daemons started here that has ended though nobody stopped it."
        return next((daemon for daemon, process in self.started.items() if process.poll() is not None), None)

    def stop(self, daemon, sig=signal.SIGTERM):
        "Stop it as an administrator does or, with SIGKILL, as a failing machine does."
        if process := self.running().get(daemon):
            self.started.pop(daemon, None)
            kill(process, sig)
            wait_until(lambda: daemon not in self.running(), f'{daemon} does not end')

    def restart(self, daemon, sig=signal.SIGTERM):
        self.stop(daemon, sig)
        self.start(daemon)

    def running(self):
        "The daemons that run: name -> process."
        name = lambda p: 'slurmd-' + p.cmdline()[-1] if p.name() == 'slurmd' else p.name()
        found = {}
        for process in self.processes():
            with suppress(psutil.Error): found[name(process)] = process
        return {daemon: found[daemon] for daemon in self.daemons() if daemon in found}

    def processes(self):
        "All processes of this cluster: its daemons, and those of its jobs. Known by their environment, not by a file that gets old."
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error): # ended meanwhile, or somebody else's
                if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and self.owns(process): found.append(process)
        return found

    def owns(self, process):
        name = process.name()
        if name == 'slurmstepd': # hides its environment
            return any(Path(file.path).is_relative_to(self.folder) for file in process.open_files())
        environ = process.environ()
        return environ.get('SLURM_CONF') == str(self.conf) and (name in PROGRAMS or 'SLURM_JOB_ID' in environ)

    # --- its commands

    def ask(self, *command, timeout=60, **env):
        "The finished command, whatever it came to."
        return subprocess.run(list(map(str, command)), env=os.environ | self.env | env, capture_output=True, text=True, timeout=timeout)

    def run(self, *command, timeout=60):
        "What the command prints; `RuntimeError` with its complaint where it fails."
        done = self.ask(*command, timeout=timeout)
        if done.returncode: raise RuntimeError(f"`{' '.join(map(str, command))}`: {last_line(done.stderr or done.stdout)}")
        return done.stdout.strip()

    def submit(self, script, *options):
        "Submit a bash script to the queue; the number of the job. Its output goes nowhere, unless `options` name a file."
        return self.run('sbatch', '--parsable', '--output=/dev/null', *options, '--wrap', script)

    def states(self, job):
        "The states of a job's tasks, in order (of a plain job: a list of one)."
        lines = self.run('squeue', '--noheader', '--array', '--states=all', f'--jobs={job}', '--format=%K %T').splitlines()
        return [state for _, state in sorted((int(index) if index.isdigit() else 0, state) for index, state in map(str.split, lines))]

    def wait(self, job, *states, timeout=60):
        "Wait until every task of the job is in one of these states."
        wait_until(lambda: (now := self.states(job)) and set(now) <= set(states), f'job {job} is not {" or ".join(states)}', timeout)

    def set_node(self, state, *nodes):
        "Take nodes `down` as an administrator does, or `resume` them (all of them by default)."
        self.run('scontrol', 'update', f"NodeName={','.join(nodes or self.nodes())}", f'State={state}', 'Reason=tests')

    def clear(self):
        "Cancel all jobs, wait for their end, and give every node back to the queue."
        if self.run('squeue', '--noheader'): self.run('scancel', f'--user={os.getuid()}')
        if away := self.run('sinfo', '-h', '-N', '-p', 'main', '-t', 'down,drain', '-o', '%N').split(): self.set_node('resume', *away)
        wait_until(lambda: not self.run('squeue', '--noheader'), 'jobs do not end')


def kill(process, sig=signal.SIGKILL):
    with suppress(psutil.NoSuchProcess): process.send_signal(sig)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('install', help='install the packages (Debian or Ubuntu, as root)')
    up = commands.add_parser('up', help='start what does not run')
    up.add_argument('settings', nargs='*', metavar='KEY=VALUE', help='nodes=2, cpus=4 (of each), or lines of slurm.conf: MaxArraySize=101')
    commands.add_parser('status', help='say whether it is up')
    down = commands.add_parser('down', help='stop it with all its jobs, and delete its folder')
    down.add_argument('--after', type=int, metavar='PID', help='wait until this process has ended')
    args, cluster = parser.parse_args(), Cluster()
    use = f'To use it: export SLURM_CONF={cluster.conf}'
    if args.command == 'install':
        print('Installed ' + ', '.join(packages) + '.' if (packages := install()) else 'Slurm is installed.')
    elif args.command == 'up':
        for setting in args.settings:
            if not re.fullmatch(r'(nodes|cpus)=[1-9]\d*|(?!nodes=|cpus=)\w+=[^\n]+', setting): parser.error(f'{setting!r} is not KEY=VALUE')
        start, new = time.monotonic(), cluster.up(**dict(s.split('=', 1) for s in args.settings))
        print(f'Slurm is up ({time.monotonic() - start:.0f} s).' if new else 'Slurm was up.', use)
    elif args.command == 'status':
        up = cluster.is_up()
        print(f'Slurm is up. {use}' if up else f"Slurm is down in {cluster.folder}; running: {', '.join(cluster.running()) or 'nothing'}.")
        return 0 if up else 1
    else:
        if args.after:
            with suppress(psutil.NoSuchProcess): psutil.Process(args.after).wait()
        print('Slurm is down.' if cluster.down() else f'There is no cluster in {cluster.folder}.')


if __name__ == '__main__':
    try: sys.exit(main())
    except (NoSlurm, ValueError, OSError, RuntimeError, subprocess.SubprocessError) as e: sys.exit(f'slurm: {e}')
