"""A real SLURM cluster on one machine: every node has namespaces of its own, joined by a bridge that only they see.

Needs root and Debian's slurmctld, slurmd, slurm-client, munge, iproute2 and util-linux. All nodes see this machine's
files; host name, addresses, processes and /dev/shm are each node's own. Nothing is added to the machine's own network,
no route leads out, and whatever runs in a node dies with it, also when the tests are killed.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.cluster.slurm_conf import CONF

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "unshare", "nsenter", "setpriv")
ALONE = ("unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child")
HEAD = "head"
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
"""States that a job does not leave."""
NETWORK = "10.77.0."
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CREDENTIAL_S = 10
"""How long the credential of a job's step is good for; SLURM lets a job that is requeued wait until it is not."""

# Process 1 of a node: sets it up, says its pid as the machine sees it, and from then on only buries orphans.
INIT = r"""
set -e
read -r pid _ < /proc/self/stat
mount -n -t proc proc /proc
mount -n -t tmpfs tmpfs /dev/shm
mount -n --bind "$2" /etc/hosts
hostname "$1"
ip link set lo up
echo "$pid"
exec > /dev/null
while true; do sleep 3600 & wait $! || true; done
"""


@dataclass
class Node:
    """A node that is up."""

    unshare: "subprocess.Popen[str]"
    """Its parent; the node dies with it."""
    pid: int
    """Its process 1, as this machine sees it."""


class SlurmCluster:
    """slurmctld on `head`, slurmd on n1, n2, ...; a context manager.

    folder: for configuration, state and logs.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 2) -> None:
        self.folder, self.cpus = folder, cpus
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self._up: dict[str, Node] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "SlurmCluster":
        with ExitStack() as stack:
            # The path of a unix socket has at most 107 bytes, which a folder of pytest's may well exceed.
            short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cairn-slurm-", dir="/run")))
            stack.callback(self._kill, *self.names, HEAD)
            self._configure(short)
            self._start(HEAD)
            self._in(HEAD, "ip", "link", "add", "bridge", "type", "bridge")
            self._in(HEAD, "ip", "address", "add", f"{NETWORK}254/24", "dev", "bridge")
            self._in(HEAD, "ip", "link", "set", "bridge", "up")
            munge = {"key-file": "munge.key", "seed-file": "munge.seed", "log-file": "munged.log"}
            files = [f"--{option}={self.folder / name}" for option, name in munge.items()]
            self._in(HEAD, "munged", "--force", f"--socket={short}/munge", f"--pid-file={short}/munge.pid", *files)
            self._in(HEAD, "slurmctld", "-c")
            self.boot()
            self.idle()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(
        self,
        argv: Sequence[str | Path],
        check: bool = True,
        on: str = HEAD,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> "subprocess.CompletedProcess[str]":
        """A command on a node, `head` being the one to log in to, in a bare environment and `env`.

        check: whether to raise AssertionError, with what it said, if it fails.
        """
        into = ["nsenter", "-t", str(self._up[on].pid), "-m", "-u", "-i", "-n", "-p", f"--wd={cwd or self.folder}"]
        bare = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(
            [*into, *map(str, argv)],
            env=bare | dict(env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def submit(self, *argv: str | Path, cwd: Path | None = None) -> int:
        """`sbatch ARGV`; the job's number."""
        return int(self.run(["sbatch", "--parsable", *argv], cwd=cwd).stdout)

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        return _fields(self.run(["scontrol", "-o", "show", "job", str(number)]).stdout)

    def jobs(self) -> set[str]:
        """The numbers of all jobs there have been."""
        return set(re.findall(r"^JobId=(\d+)", self.run(["scontrol", "-o", "show", "job"]).stdout, re.M))

    def hosts(self, job: Mapping[str, str]) -> list[str]:
        """The nodes that a job runs or ran on."""
        return self.run(["scontrol", "show", "hostnames", job["NodeList"]]).stdout.split()

    def wait(self, number: int | str, state: str, timeout: float) -> dict[str, str]:
        """The job once it is in this state. Raises AssertionError, with the job's log, when it ends in another or is
        not there within `timeout` seconds."""
        job: dict[str, str] = {}

        def arrived() -> bool:
            job.update(self.job(number))
            assert job["JobState"] == state or job["JobState"] not in ENDED, self.story(job)
            return job["JobState"] == state

        wait_for(arrived, timeout, lambda: f"job {number} is not {state} after {timeout:.0f} s\n{self.story(job)}")
        return job

    def crash(self, name: str) -> None:
        """A power cut: first the network goes, then every process at once."""
        self._in(HEAD, "ip", "link", "delete", name)
        self._kill(name)

    def boot(self) -> None:
        """Start every node that is down."""
        for name in self.names:
            if name in self._up:
                continue
            node = self._start(name)
            # The pair's inner end is made in the node's namespace at once: it was never the machine's.
            pair = ["type", "veth", "peer", "name", "eth0", "netns", str(node.pid)]
            network = f"--net=/proc/{self._up[HEAD].pid}/ns/net"
            subprocess.run(["nsenter", network, "ip", "link", "add", name, *pair], check=True, env={"PATH": PATH})
            self._in(HEAD, "ip", "link", "set", name, "master", "bridge", "up")
            self._in(name, "ip", "address", "add", f"{NETWORK}{name[1:]}/24", "dev", "eth0")
            self._in(name, "ip", "link", "set", "eth0", "up")
            self._in(name, "slurmd", "-N", name)

    def idle(self, *names: str, timeout: float = 60.0) -> None:
        """Wait until SLURM takes nodes, all by default, for idle."""

        def states() -> list[str]:
            query = ["sinfo", "-h", "-N", "-p", "main", "-o", "%t", "-n", ",".join(names or self.names)]
            return self.run(query, check=False).stdout.split()

        wait_for(
            lambda: set(states()) == {"idle"},
            timeout,
            lambda: f"nodes are {states()}\n{tail(self.folder, 'slurm*.log')}",
        )

    def story(self, job: Mapping[str, str]) -> str:
        """For a test that fails: a job's state, the end of its log, and of slurmctld's."""
        log = Path(job.get("StdOut", "none"))
        state = "\n".join(f"{key}={value}" for key, value in job.items())
        return f"{state}\n{tail(log.parent, log.name)}\n{tail(self.folder, 'slurmctld.log')}"

    def _configure(self, short: Path) -> None:
        (self.folder / "state").mkdir(parents=True)
        for name in self.names:
            (short / name).mkdir()
        short.chmod(0o755)
        addresses = {HEAD: f"{NETWORK}254"} | {name: f"{NETWORK}{name[1:]}" for name in self.names}
        # torch asks for the names of IPv4 addresses as IPv6 has them, and warns where there are none.
        hosts = [f"{kind}{address} {name}\n" for name, address in addresses.items() for kind in ("", "::ffff:")]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
        values = {"network": NETWORK, "nodes": len(self.names), "cpus": self.cpus, "credential": CREDENTIAL_S}
        (self.folder / "slurm.conf").write_text(CONF.format(short=short, folder=self.folder, **values))
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)

    def _start(self, name: str) -> Node:
        """A node's namespaces, with nothing but process 1 in them."""
        with (self.folder / f"init.{name}.log").open("a") as log:
            unshare = subprocess.Popen(
                [
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    *ALONE,
                    "bash",
                    "-c",
                    INIT,
                    "init",
                    name,
                    str(self.folder / "hosts"),
                ],
                env={"PATH": PATH},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop the nodes
            )
        assert unshare.stdout is not None
        with unshare.stdout as said:
            pid = said.readline().strip()
        if not pid:
            unshare.kill()
            unshare.wait()
        assert pid, f"{name} does not start\n{tail(self.folder, f'init.{name}.log')}"
        self._up[name] = Node(unshare, int(pid))
        return self._up[name]

    def _in(self, name: str, *argv: str) -> None:
        self.run(argv, on=name)

    def _kill(self, *names: str) -> None:
        """Nodes at once, each with all that runs in it."""
        nodes = [self._up.pop(name) for name in names if name in self._up]
        for node in nodes:
            node.unshare.kill()
            node.unshare.wait()
        gone = [Path(f"/proc/{node.pid}") for node in nodes]
        wait_for(lambda: not any(path.exists() for path in gone), 30.0, lambda: f"{names} do not die")


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "only root can start a SLURM cluster"
    if lacking := [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]:
        return f"not installed: {', '.join(lacking)}"
    try_it = "mount -t proc proc /proc && ip link add bridge type bridge && ip link add left type veth peer name right"
    tried = subprocess.run([*ALONE, "sh", "-c", try_it], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces, bridges or veth pairs: {tried.stderr.strip()}"


def wait_for(happened: Callable[[], bool], timeout: float, else_say: Callable[[], str]) -> None:
    """Ask every 0.1 s; after `timeout` seconds raise AssertionError with what `else_say` says."""
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, else_say()
        time.sleep(0.1)


def tail(folder: Path, pattern: str, lines: int = 40) -> str:
    """The ends of files."""
    return "\n".join(
        f"--- {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
        for path in sorted(folder.glob(pattern))
    )


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^| )([A-Z][\w/:]*)=(\S*)", line))
