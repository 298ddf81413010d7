#!/usr/bin/env python3
"""Two nodes on GlusterFS, and a proxy in front of them, on this machine: what failover.py breaks.

A host is a network namespace on a bridge. Three of them have a brick each, a copy of all files,
and two are nodes: a FUSE mount without caches, and a server on it. HAProxy asks both for
/readyz. There is no management daemon: volume files are written by hand, each translator with
the options that matter. All of it needs root, and namespaces of its own (PRIVATE): so the
kernel cleans up. A tmpfs on /run, seen by nobody else, holds bricks, mounts and logs.
"""
import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from typing import List, Optional, Sequence, Set

from power_cuts import SMALL, Skipped, run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from test_micro_queue import ServerProcess, Wire, eventually  # noqa: E402

PRIVATE = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
RUN = "/run"                                 # `ip netns` has its names there
FOLDER = os.path.join(RUN, "failover")
PACKAGES = {"glusterfsd": "glusterfs-server", "glusterfs": "glusterfs-client",
            "haproxy": "haproxy", "ip": "iproute2"}
NETWORK, PROXY, PROXY_PORT, PORT, BRICK_PORT = "10.77.0.", "10.77.0.1", 8080, 10000, 24100
NODES = {"n1": 21, "n2": 22}                 # host: last byte of its address
BRICKS = {"s1": 11, "s2": 12, "s3": 13}
CLONE_NEWNET = 0x40000000
# In a control nothing but the file system stands between an old node and what it writes to.
NOT_PROVING = ("-c", "import sys\n"
               f"sys.path.insert(0, {ROOT!r})\n"
               "import micro_queue as mq\n"
               "mq.Log.prove_lock = lambda log: None\n"
               "sys.exit(mq.main())")
START_S = 40                                 # how long anything may take to start
READY_S = 0.25                               # how long an answer to /readyz may take


def install() -> None:
    """Install the packages that are missing. Raises Skipped."""
    missing = [package for command, package in PACKAGES.items() if not shutil.which(command)]
    if missing:
        try:
            run("apt-get", "-qq", "update")
            run("apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing)
        except OSError as error:
            raise Skipped(f"could not install {' '.join(missing)}: {error}") from None


def look_for_kernel() -> None:
    """Raises Skipped if the kernel lacks something."""
    if not os.path.exists("/dev/fuse") or "fuse" not in known_filesystems():
        raise Skipped("the kernel has no FUSE")
    try:
        run(*PRIVATE, "sh", "-ec",
            "ip link add one type bridge; ip link add two type veth peer name three")
    except OSError as error:
        raise Skipped(f"the kernel has no namespaces, bridges or veth pairs: {error}") from None


def known_filesystems() -> Set[str]:
    with open("/proc/filesystems", encoding="ascii") as file:
        return set(file.read().split())


# ---- The file system ----------------------------------------------------------------------

def volume(name: str, kind: str, *below: str, **options: object) -> str:
    """Return one translator of a volume file; `__` in an option's name stands for a dot."""
    lines = [f"volume {name}", f"    type {kind}"]
    lines += [f"    option {key.replace('__', '.').replace('_', '-')} {value}"
              for key, value in options.items()]
    lines += [f"    subvolumes {' '.join(below)}"] if below else []
    return "\n".join([*lines, "end-volume\n"])


# A link that is cut is noticed, and what it locked is free, after three seconds.
LINK = {"transport_type": "tcp", "transport__address_family": "inet",
        "transport__tcp_user_timeout": 3, "transport__socket__keepalive_time": 1,
        "transport__socket__keepalive_interval": 1, "transport__socket__keepalive_count": 3}
HEALER = {"iam_self_heal_daemon": "yes", "self_heal_daemon": "on", "heal_timeout": 5,
          "data_self_heal": "on", "metadata_self_heal": "on", "entry_self_heal": "on"}


def brick_volume(path: str, address: str) -> str:
    return "".join([
        volume("posix", "storage/posix", directory=path),
        volume("locks", "features/locks", "posix"),
        volume("threads", "performance/io-threads", "locks"),
        volume("index", "features/index", "threads", index_base=f"{path}/.glusterfs/indices",
               xattrop_dirty_watchlist="trusted.afr.dirty",
               xattrop_pending_watchlist="trusted.afr.brick-"),
        volume("brick", "debug/io-stats", "index"),
        volume("server", "protocol/server", "brick", transport__socket__bind_address=address,
               transport__socket__listen_port=BRICK_PORT, transport__socket__keepalive=1,
               auth__addr__brick__allow=NETWORK + "*", **LINK)])


def client_volume(strict: bool, **replicate: object) -> str:
    """The bricks as one file system without a cache: a write or a lock is one on two bricks."""
    names = [f"brick-{host}" for host in BRICKS]
    bricks = [volume(name, "protocol/client", remote_host=f"{NETWORK}{byte}", ping_timeout=3,
                     remote_port=BRICK_PORT, remote_subvolume="brick", send_gids="true",
                     strict_locks="on" if strict else "off", **LINK)
              for name, byte in zip(names, BRICKS.values())]
    return "".join([*bricks, volume("replicate", "cluster/replicate", *names, quorum_type="auto",
                                    afr_pending_xattr=",".join(names), **replicate)])


# ---- The proxy and the network ------------------------------------------------------------

# HAProxy writes names of headers small, if it is not told otherwise; Wire wants them as sent.
NAMES = "Content-Length", "Connection", "Message-Id", "Delivery-Count", "Lease-Id", "Node"
ADJUST = "\n".join(f"    h1-case-adjust {name.lower()} {name}" for name in NAMES)
HAPROXY = f"""
global
{ADJUST}
defaults
    mode http
    option h1-case-adjust-bogus-client
    timeout connect 500ms
    timeout client 60s
    timeout server 60s
    timeout check 800ms
    retries 8
    option redispatch 1
    retry-on conn-failure
    default-server check inter 200ms fastinter 100ms downinter 200ms rise 1 fall 2
    default-server on-marked-down shutdown-sessions
    default-server observe layer4 error-limit 1 on-error mark-down
frontend clients
    bind {PROXY}:{PROXY_PORT}
    default_backend nodes
backend nodes
    option httpchk
    http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host proxy
    http-check expect status 200
    http-response set-header Node %s
    server n1 {NETWORK}{NODES['n1']}:{PORT}
    server n2 {NETWORK}{NODES['n2']}:{PORT}
"""
BRIDGE = f"""
ip link set lo up
ip link add bridge type bridge
ip link set bridge up
ip addr add {PROXY}/24 dev bridge
mkdir {RUN}/netns
"""
HOST = """
ip netns add {host}
ip link add {host} type veth peer name eth0 netns {host}
ip link set {host} master bridge up
ip -n {host} link set lo up
ip -n {host} addr add {address}/24 dev eth0
ip -n {host} link set eth0 up
"""


def make_network() -> None:
    """A bridge, on which we and the proxy are, and a host for each brick and node."""
    hosts = [HOST.format(host=host, address=f"{NETWORK}{byte}")
             for host, byte in {**BRICKS, **NODES}.items()]
    run("sh", "-ec", BRIDGE + "".join(hosts))


def on_host(host: str, *command: str) -> List[str]:
    """Return a command that runs on a host; not by `ip netns exec`, which hides the mounts."""
    return ["nsenter", f"--net={RUN}/netns/{host}", *command]


def go_to(host: str) -> None:
    """Let what this thread connects from now on come from a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"{RUN}/netns/{host}", "rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def write(name: str, text: str) -> str:
    path = os.path.join(FOLDER, name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


# ---- All parts ----------------------------------------------------------------------------

class Daemon:
    """A program that stays in the foreground."""

    def __init__(self, name: str, *command: str) -> None:
        self._name, self._command = name, command
        self.start()

    def start(self) -> None:
        with open(f"{FOLDER}/{self._name}.out", "ab") as file:
            self.process = subprocess.Popen(self._command, stdout=file, stderr=file)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Brick(Daemon):
    """One of the copies."""

    def __init__(self, host: str) -> None:
        self._path, self._address = f"{FOLDER}/{host}", f"{NETWORK}{BRICKS[host]}"
        os.makedirs(f"{self._path}/.glusterfs/indices")
        config = write(f"{host}.vol", brick_volume(self._path, self._address))
        super().__init__(host, *on_host(host, "glusterfsd", "-N", "-f", config,
                                        "-l", f"{FOLDER}/{host}.log"))

    def start(self) -> None:
        super().start()
        eventually(self._listens, START_S, "a brick did not start", pause_s=0.02)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), Wire(BRICK_PORT, 1, self._address):
            return True
        return False

    def has_pending(self) -> bool:
        """Tell whether it knows of a file that another brick does not have as it is."""
        with contextlib.suppress(FileNotFoundError):
            names = os.listdir(f"{self._path}/.glusterfs/indices/xattrop")
            return any(not name.startswith("xattrop-") for name in names)
        return False


class Node:
    """A host with a mount, and with a server on it."""

    def __init__(self, host: str, program: Sequence[str]) -> None:
        self.host, self._program = host, program
        self.address, self.path = f"{NETWORK}{NODES[host]}", f"{FOLDER}/{host}"
        os.mkdir(self.path)
        self._mount()

    def __repr__(self) -> str:
        return self.host

    def _mount(self) -> None:
        self.mounted = Daemon(f"mount-{self.host}", *on_host(
            self.host, "glusterfs", "-N", "--process-name", "fuse", "-f", f"{FOLDER}/client.vol",
            "-l", f"{FOLDER}/mount-{self.host}.log", "--attribute-timeout=0",
            "--entry-timeout=0", "--direct-io-mode=enable", self.path))
        eventually(self._is_mounted, START_S, f"{self.host} did not mount", pause_s=0.02)

    def _is_mounted(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.ismount(self.path) and os.statvfs(self.path).f_blocks > 0
        return False

    def start(self) -> None:
        """Start the server, and the mount if it ended."""
        if self.mounted.process.poll() is not None:
            run("umount", "-l", self.path)
            self._mount()
        self.server = ServerProcess(
            f"{FOLDER}/server-{self.host}", f"{self.path}/queues", host=self.address,
            program=self._program, wrapper=on_host(self.host), settings={
                "standby": True, "fsync": "always", "min_free_bytes": 0,
                "listen_address": self.address, "listen_port": PORT})

    def link(self, state: str) -> None:
        """Set its link up or down."""
        run("ip", "link", "set", self.host, state)

    def state(self) -> str:
        """Return what it answers to /readyz."""
        with contextlib.suppress(OSError):
            return self.server.ask("GET", "/readyz", timeout=READY_S).body.decode()
        return "nothing"

    @property
    def is_ready(self) -> bool:
        return self.state().startswith("ready")


class Cluster:
    """All parts, made by the first process of namespaces of its own. As a control, locks are not
    strict; servers do not prove theirs, and have the real sizes, so that what an old node writes
    to is still there."""

    def __init__(self, is_control: bool) -> None:
        self.is_control = is_control
        run("mount", "-t", "tmpfs", "tmpfs", RUN)
        os.mkdir(FOLDER)
        make_network()
        write("client.vol", client_volume(not is_control))
        self.bricks = [Brick(host) for host in BRICKS]
        self._daemons = [Daemon(
            "healer", "glusterfs", "-N", "--process-name", "glustershd", "--client-pid=-6", "-f",
            write("healer.vol", client_volume(True, **HEALER)), "-l", f"{FOLDER}/healer.log")]
        self.nodes = [Node(host, NOT_PROVING if is_control else (SMALL,)) for host in NODES]
        os.mkdir(f"{self.nodes[0].path}/queues", 0o700)
        self._daemons.append(Daemon("haproxy", "haproxy", "-db", "-f",
                                    write("haproxy.cfg", HAPROXY)))

    def active(self) -> Optional[Node]:
        """Return the node that serves, once the other one waits."""
        serving = [node for node in self.nodes if node.is_ready]
        waiting = [node for node in self.nodes if "standby" in node.state()]
        return serving[0] if len(serving) == len(waiting) == 1 else None
