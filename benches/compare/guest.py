"""A guest under software emulation, told what to do over its serial console."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from lab import Failed

FIRMWARE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
VARIABLES = "/usr/share/OVMF/OVMF_VARS_4M.fd"

FIRST_BOOT = ["systemctl is-system-running --wait || true", "sync"]
# What a server does in a few days: its database fills, logs grow, an archive is made, some
# libraries are replaced.
AWAY = [
    "redis-cli ping",
    "redis-benchmark -q -t set -n 40000 -r 40000 -d 300 >/dev/null",
    "redis-cli save",
    "for i in $(seq 60000); do echo \"$(( i * 7919 % 86400 )) worker[$(( i % 61 ))]: request $i took $(( i * i % 977 )) ms\"; done >/var/log/worker.log",
    "tar czf /root/backup.tar.gz /usr/bin /usr/lib/udev /etc /var/lib/dpkg",
    "cp -a /usr/lib/x86_64-linux-gnu/libc* /usr/lib/x86_64-linux-gnu/libs* /opt/",
    "rm -rf /usr/share/doc/l*",
    "sync",
]
BOOT_SECONDS = 600
COMMAND_SECONDS = 600


def boot_and_run(overlay, directory, commands):
    """Boots a root disk, runs the commands as root, shuts the guest down."""
    variables, console = directory / "variables.fd", directory / "console"
    if not variables.exists():
        shutil.copy(VARIABLES, variables)
    console.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35",
         "-accel", os.environ.get("ACCEL", "tcg,thread=multi"), "-cpu", "max", "-smp", "2", "-m", "768M",
         "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={FIRMWARE}",
         "-drive", f"if=pflash,unit=1,format=raw,file={variables}",
         "-drive", f"if=virtio,format=qcow2,file={overlay},discard=unmap",
         "-device", "virtio-rng-pci",
         "-chardev", f"socket,id=c,path={console},server=on,wait=off,logfile={directory}/console.log",
         "-serial", "chardev:c"],
        stdin=subprocess.DEVNULL, stderr=open(directory / "qemu.log", "ab"))
    try:
        for _ in range(200):
            if console.exists():
                break
            time.sleep(0.1)
        line = Console(console, process)
        line.until(b"guest ready", BOOT_SECONDS)
        # The shell comes a moment after.
        line.send("")
        line.until(b"# ", 120)
        line.send("dmesg -n 1; stty -echo cols 300")
        line.until(b"# ", 120)
        for n, command in enumerate(commands):
            line.send(f"{command}; echo en''d-{n}-$?")
            line.until(f"end-{n}-".encode(), COMMAND_SECONDS)
            line.until(b"\r", 10)
            if not line.passed.startswith(b"0"):
                raise Failed(f"failed in the guest: {command}: see {directory}/console.log")
        line.send("systemctl poweroff")
        process.wait(300)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class Console:
    def __init__(self, path, process):
        self.socket, self.process = socket.socket(socket.AF_UNIX), process
        self.socket.connect(str(path))
        self.socket.settimeout(0.5)
        self.seen = b""
        # What came before the last mark.
        self.passed = b""

    def send(self, line):
        self.socket.sendall(line.encode() + b"\n")

    def until(self, mark, seconds):
        end = time.monotonic() + seconds
        while mark not in self.seen:
            if time.monotonic() > end or self.process.poll() is not None:
                raise Failed(f"the guest did not say {mark!r}; last: {self.seen[-500:]!r}")
            try:
                self.seen += self.socket.recv(65536)
            except socket.timeout:
                pass
        self.passed, _, self.seen = self.seen.partition(mark)
