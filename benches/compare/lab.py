"""Two hosts joined by one slow cable, and what a process used."""

import os
import signal
import subprocess
import time
from pathlib import Path

SOURCE_ADDRESS = "10.213.9.1"
TARGET_ADDRESS = "10.213.9.2"
# A little more than what a core sends in one go; as in tests/transfer_link.rs.
SHAPING = "burst 32kb latency 50ms"


class Failed(Exception):
    """A tool ended with an error; the text says which and where its output is."""


class Usage:
    """Seconds of wall clock and of processor, and the largest resident set in bytes."""

    def __init__(self, seconds=0.0, cpu=0.0, rss=0):
        self.seconds, self.cpu, self.rss = seconds, cpu, rss

    def then(self, other):
        return Usage(self.seconds + other.seconds, self.cpu + other.cpu, max(self.rss, other.rss))


def run(*argv, **options):
    """Runs a command that is not measured."""
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise Failed(f"{' '.join(str(a) for a in argv)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


class Lab:
    """Network namespaces for the source and the target with a veth pair that tbf shapes."""

    def __init__(self, mbit, scratch):
        self.mbit, self.scratch = mbit, Path(scratch)
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.source, self.target = (f"cicada-{os.getpid()}-{end}" for end in ("source", "target"))

    def __enter__(self):
        for space in (self.source, self.target):
            run("ip", "netns", "add", space)
            run("ip", "netns", "exec", space, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1",
                "net.ipv6.conf.default.disable_ipv6=1")
        run("ip", "-n", self.source, "link", "add", "wire", "type", "veth", "peer", "name", "wire",
            "netns", self.target)
        for space, address in ((self.source, SOURCE_ADDRESS), (self.target, TARGET_ADDRESS)):
            run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "wire")
            # Packets as they would be on a cable, so that the counters see every header.
            run("ip", "-n", space, "link", "set", "wire", "gso_max_segs", "1")
            run("ip", "-n", space, "link", "set", "wire", "up")
            run("ip", "-n", space, "link", "set", "lo", "up")
            run("tc", "-n", space, "qdisc", "add", "dev", "wire", "root", "tbf", "rate",
                f"{self.mbit}mbit", *SHAPING.split())
        return self

    def __exit__(self, *_):
        for space in (self.source, self.target):
            subprocess.run(["ip", "netns", "delete", space], stderr=subprocess.DEVNULL)

    def wire_bytes(self):
        """Bytes that passed the target's end of the cable so far, both directions."""
        counters = [f"/sys/class/net/wire/statistics/{way}_bytes" for way in ("rx", "tx")]
        out = run("ip", "netns", "exec", self.target, "cat", *counters)
        return sum(int(line) for line in out.split())

    def at_source(self, *argv, **options):
        return self._measure(self.source, argv, **options)

    def at_target(self, *argv, **options):
        return self._measure(self.target, argv, **options)

    def _measure(self, space, argv, stdin=None, cwd=None, env=None, output=None):
        """Runs to the end and returns the usage. Output goes to `output`, or to a log."""
        with Process(self, space, argv, stdin=stdin, cwd=cwd, env=env, output=output) as process:
            return process.wait()

    def serve(self, *argv, ready=None, **options):
        """A server at the source; `with` it, then `.usage` is known after the block."""
        return Process(self, self.source, argv, ready=ready, **options)


def listens(port):
    """Whether something in the namespace of a process listens on the port. (A connection that just
    ended is still listed, in another state.)"""
    return lambda process: f":{port:04X} 00000000:0000 0A" in Path(f"/proc/{process.child.pid}/net/tcp").read_text()


class Process:
    """A program in a namespace, below GNU time, which does not count this interpreter's memory."""

    number = 0

    def __init__(self, lab, space, argv, ready=None, stdin=None, cwd=None, env=None, output=None):
        Process.number += 1
        self.argv = [str(a) for a in argv]
        self.log = lab.scratch / f"log-{Process.number}-{Path(self.argv[0]).name}"
        self.times = Path(f"{self.log}.time")
        # A name in /proc may be hidden in a namespace; a file is not.
        command = ["ip", "netns", "exec", space, "/usr/bin/time", "-q", "-o", self.times, "-f", "%e %U %S %M"]
        log = open(self.log, "wb")
        self.child = subprocess.Popen(
            [str(a) for a in command] + self.argv,
            stdin=open(stdin, "rb") if isinstance(stdin, (str, Path)) else subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=open(output, "wb") if output else log,
            stderr=log, cwd=cwd, env={**os.environ, **(env or {})}, start_new_session=True)
        self.usage = None
        if ready:
            self._until(ready)

    def _until(self, ready):
        for _ in range(6000):
            if ready(self):
                return
            if self.child.poll() is not None:
                raise Failed(f"{self.argv[0]} ended early: {self.text()[-2000:]}")
            time.sleep(0.02)
        raise Failed(f"{self.argv[0]} did not become ready: {self.text()[-2000:]}")

    def text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self):
        if self.child.wait() != 0:
            raise Failed(f"{' '.join(self.argv)[:200]} (exit {self.child.returncode}): {self.text()[-2000:]}")
        return self._read()

    def _read(self):
        wall, user, system, kib = self.times.read_text().split()[-4:]
        self.usage = Usage(float(wall), float(user) + float(system), int(kib) << 10)
        return self.usage

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.child.poll() is None:
            if self.child.stdin:
                self.child.stdin.close()
            else:
                # GNU time ignores this signal while it waits, what it runs ends.
                os.killpg(self.child.pid, signal.SIGINT)
            try:
                self.child.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.child.pid, signal.SIGKILL)
                self.child.wait()
        if self.usage is None and self.times.exists() and self.times.read_text().strip():
            self._read()
