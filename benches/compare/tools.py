"""How each tool brings a target that holds one disk to another. One function a tool.

A tool gets the corpus and the lab and returns a Row. What is made before a move at the source, and
can be used again, is `prepare`; what is needed for this one move is `move`. Every tool ends with
the needed disk at the target, and is refused if a single byte is another.
"""

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from lab import SOURCE_ADDRESS, Usage, listens, run

PORT = 8099


@dataclass
class Row:
    corpus: str
    tool: str
    wire_bytes: int = 0
    # What was made to be sent, before any transport; 0 where there is no such thing.
    artefact_bytes: int = 0
    prepare: Usage = field(default_factory=Usage)
    source: Usage = field(default_factory=Usage)
    target: Usage = field(default_factory=Usage)
    seconds: float = 0.0
    note: str = ""


class Bench:
    """One tool on one corpus: its directories, and the row it fills."""

    def __init__(self, corpus, lab, tool, settings):
        self.corpus, self.lab, self.settings = corpus, lab, settings
        self.row = Row(corpus.name, tool)
        self.dir = settings.scratch / "work" / corpus.name / tool
        shutil.rmtree(self.dir, ignore_errors=True)
        self.at_source, self.at_target = self.dir / "source", self.dir / "target"
        self.at_source.mkdir(parents=True)
        self.at_target.mkdir()

    @property
    def held(self):
        return self.corpus.held

    @property
    def needed(self):
        return self.corpus.needed

    def prepare(self, *argv, **options):
        self.row.prepare = self.row.prepare.then(self.lab.at_source(*argv, **options))

    def move_source(self, *argv, **options):
        usage = self.lab.at_source(*argv, **options)
        self.row.source = self.row.source.then(usage)
        self.row.seconds += usage.seconds

    def move_target(self, *argv, **options):
        usage = self.lab.at_target(*argv, **options)
        self.row.target = self.row.target.then(usage)
        self.row.seconds += usage.seconds

    def pull(self, server, *argv, **options):
        """Runs a server at the source and a client at the target, counting the cable."""
        with server:
            before = self.lab.wire_bytes()
            self.move_target(*argv, **options)
            self.row.wire_bytes += self.lab.wire_bytes() - before
        if server.usage:
            # Its wall clock is the client's.
            self.row.source = self.row.source.then(Usage(0, server.usage.cpu, server.usage.rss))

    def copy(self, file, to):
        """Sends a file as it is."""
        server = self.lab.serve("socat", "-u", f"FILE:{file}", f"TCP-LISTEN:{PORT},reuseaddr", ready=listens(PORT))
        self.row.artefact_bytes += file.stat().st_size
        self.pull(server, "socat", "-u", f"TCP:{SOURCE_ADDRESS}:{PORT}", f"CREATE:{to}")

    def http(self):
        """A web server over the source's directory that knows ranges and keeps connections."""
        conf = self.dir / "nginx.conf"
        conf.write_text(
            f"daemon off; master_process off; pid {self.dir}/nginx.pid; error_log stderr; user root;\n"
            "events {}\n"
            "http { access_log off; default_type application/octet-stream; sendfile on; keepalive_requests 1000000;\n"
            f"client_body_temp_path {self.dir}/body; proxy_temp_path {self.dir}/proxy; fastcgi_temp_path {self.dir}/f;"
            f"uwsgi_temp_path {self.dir}/u; scgi_temp_path {self.dir}/s;\n"
            f"server {{ listen {SOURCE_ADDRESS}:{PORT}; root {self.at_source}; }} }}\n")
        return self.lab.serve("nginx", "-c", conf, "-p", self.dir, ready=listens(PORT))

    def url(self, name):
        return f"http://{SOURCE_ADDRESS}:{PORT}/{name}"

    def same(self, made):
        run("cmp", self.needed, made)

    def done(self, made):
        self.same(made)
        shutil.rmtree(self.dir)
        return self.row


def copy_of(file, to):
    run("cp", "--sparse=always", "--reflink=auto", "-L", file, to)
    os.chmod(to, 0o644)


# ---- Cicada

def cicada(b):
    compare, scratch = b.settings.compare, b.settings.scratch
    target, offer, disks = b.at_target / "repository", b.at_source / "offer", b.at_target / "disks"
    run(compare, "seed", scratch, b.corpus.held_state, target)
    begun = time.monotonic()
    server = b.lab.serve(compare, "serve", scratch, b.corpus.needed_state, offer, f"{SOURCE_ADDRESS}:{PORT}",
                         stdin=True, ready=lambda p: "READY" in p.text())
    # The source reads its disks for every move anew.
    scan = time.monotonic() - begun
    out = b.dir / "report"
    b.pull(server, compare, "fetch", target, offer, b.corpus.held_state, disks, f"{SOURCE_ADDRESS}:{PORT}", output=out)
    b.row.seconds += scan
    report = dict(line.split(" ", 1) for line in out.read_text().splitlines())
    b.row.artefact_bytes = sum(int(report[k]) for k in
                               ("component_bytes", "map_bytes", "root_delta_bytes", "user_data_bytes"))
    b.row.note = "; ".join(f"{k} {v}" for k, v in report.items()) + f"; source_scan_seconds {scan:.2f}"
    state = json.loads(b.corpus.needed_state.read_text())
    if state.get("user_data"):
        made = disks / "user-data.raw"
    else:
        made = target / Path(state["image"]).relative_to(scratch / "repository")
        if state.get("overlay"):
            flat = b.dir / "flat.raw"
            run("qemu-img", "convert", "-O", "raw", disks / "root.qcow2", flat)
            made = flat
    return b.done(made)


# ---- rivals that transfer by themselves

def rsync(b, *options):
    conf, disk = b.dir / "rsyncd.conf", b.needed.resolve()
    conf.write_text(f"pid file = {b.dir}/rsyncd.pid\nuse chroot = no\nuid = 0\ngid = 0\n"
                    f"[disks]\npath = {disk.parent}\nread only = yes\n")
    made = b.at_target / "disk.raw"
    copy_of(b.held, made)
    server = b.lab.serve("rsync", "--daemon", "--no-detach", f"--config={conf}", f"--port={PORT}", ready=listens(PORT))
    b.pull(server, "rsync", *options, "--no-whole-file", "--ignore-times",
           f"rsync://{SOURCE_ADDRESS}:{PORT}/disks/{disk.name}", made)
    return b.done(made)


def casync(b):
    b.prepare("casync", "make", "--chunk-size=65536", f"--store={b.at_source}/store.castr",
              b.at_source / "disk.caibx", b.needed.resolve())
    copy_of(b.held, b.at_target / "held.raw")
    made = b.at_target / "disk.raw"
    b.pull(b.http(), "casync", "extract", f"--store={b.url('store.castr')}", f"--seed={b.at_target}/held.raw",
           b.url("disk.caibx"), made)
    return b.done(made)


def desync(b):
    b.prepare("desync", "make", "-m", "16:64:256", "-s", b.at_source / "store", b.at_source / "disk.caibx",
              b.needed.resolve())
    copy_of(b.held, b.at_target / "held.raw")
    # The index of what is held is made at the target, as part of the move.
    b.move_target("desync", "make", "-m", "16:64:256", b.at_target / "held.caibx", b.at_target / "held.raw")
    made = b.at_target / "disk.raw"
    b.pull(b.http(), "desync", "extract", "-s", b.url("store"), "--seed", b.at_target / "held.caibx",
           b.url("disk.caibx"), made)
    return b.done(made)


def zsync(b):
    disk = b.at_source / "disk.raw"
    copy_of(b.needed, disk)
    b.prepare("zsyncmake", "-z", "-u", b.url("disk.raw.gz"), "-o", b.at_source / "disk.zsync", disk, cwd=b.at_source)
    disk.unlink()
    copy_of(b.held, b.at_target / "held.raw")
    made = b.at_target / "disk.raw"
    b.pull(b.http(), "zsync", "-q", "-i", b.at_target / "held.raw", "-o", made, b.url("disk.zsync"), cwd=b.at_target)
    return b.done(made)


def bita(b):
    b.prepare("bita", "compress", "--input", b.needed.resolve(), b.at_source / "disk.cba")
    copy_of(b.held, b.at_target / "held.raw")
    made = b.at_target / "disk.raw"
    b.pull(b.http(), "bita", "clone", "--seed", b.at_target / "held.raw", b.url("disk.cba"), made)
    return b.done(made)


# ---- backup tools: the repository at the target already has the first disk

def files_of(directory):
    return {p.relative_to(directory) for p in directory.rglob("*") if p.is_file()}


def borg(b):
    env = {"BORG_BASE_DIR": str(b.dir), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
           "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes"}
    here, there = b.at_source / "repository", b.at_target / "repository"
    # Chunks of 64 KiB on average: the default of 2 MiB finds little inside disk images.
    create = ["borg", "create", "--chunker-params=buzhash,10,23,16,4095", "-C", "zstd,3", "--stdin-name", "disk.raw"]
    run("borg", "init", "-e", "none", here, env={**os.environ, **env})
    b.lab.at_source(*create, f"{here}::held", "-", stdin=b.held, env=env)
    run("cp", "-a", here, there)
    before = files_of(here)
    b.move_source(*create, f"{here}::needed", "-", stdin=b.needed, env=env)
    # Index and hints are remade from the segments.
    new = sorted(f for f in files_of(here) - before if f.parts[0] == "data")
    send_files(b, here, new, there)
    for stale in list(there.glob("index.*")) + list(there.glob("hints.*")) + list(there.glob("integrity.*")):
        stale.unlink()
    b.move_target("borg", "extract", f"{there}::needed", cwd=b.at_target, env=env)
    return b.done(b.at_target / "disk.raw")


def restic(b):
    env = {"RESTIC_PASSWORD": "compare", "HOME": str(b.dir)}
    here, there = b.at_source / "repository", b.at_target / "repository"
    backup = ["restic", "-q", "--no-cache", "-r", here, "backup", "--stdin", "--stdin-filename", "disk.raw"]
    run("restic", "-q", "--no-cache", "-r", here, "init", "--repository-version", "2", env={**os.environ, **env})
    b.lab.at_source(*backup, stdin=b.held, env=env)
    run("cp", "-a", here, there)
    before = files_of(here)
    b.move_source(*backup, stdin=b.needed, env=env)
    send_files(b, here, sorted(files_of(here) - before), there)
    b.move_target("restic", "-q", "--no-cache", "-r", there, "restore", "latest", "--target", b.at_target / "out", env=env)
    return b.done(b.at_target / "out" / "disk.raw")


def send_files(b, directory, names, to):
    archive = b.dir / "new.tar"
    run("tar", "-C", directory, "-cf", archive, *names)
    b.copy(archive, b.dir / "came.tar")
    run("tar", "-C", to, "-xf", b.dir / "came.tar")


# ---- artefacts that are copied

def patch_from(b):
    copy_of(b.held, b.at_target / "held.raw")
    patch, came, made = b.at_source / "patch", b.at_target / "patch", b.at_target / "disk.raw"
    # The source needs the held disk too.
    b.move_source("zstd", "-q", "-3", "--long=31", f"--patch-from={b.held.resolve()}", b.needed.resolve(), "-o", patch)
    b.copy(patch, came)
    b.move_target("zstd", "-q", "-d", "--long=31", "--memory=2048MB", f"--patch-from={b.at_target}/held.raw", came, "-o", made)
    return b.done(made)


def qemu_img(b):
    image, came = b.at_source / "disk.qcow2", b.at_target / "disk.qcow2"
    b.move_source("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", b.needed.resolve(), image)
    b.copy(image, came)
    made = b.dir / "flat.raw"
    run("qemu-img", "convert", "-O", "raw", came, made)
    return b.done(made)


@dataclass
class Tool:
    move: object
    title: str
    # Whether it counts as a rival with the same seed material.
    rival: bool = True
    needs: tuple = ()
    package: str = ""


TOOLS = {
    "cicada": Tool(cicada, "Cicada", rival=False),
    "rsync-inplace": Tool(lambda b: rsync(b, "-z", "--inplace"), "rsync -z --inplace", needs=("rsync",), package="rsync"),
    "rsync": Tool(lambda b: rsync(b, "-z"), "rsync -z (room for two images)", needs=("rsync",), package="rsync"),
    "casync": Tool(casync, "casync, 64 KiB", needs=("casync", "nginx"), package="casync nginx-light"),
    "desync": Tool(desync, "desync, 64 KiB", needs=("desync", "nginx")),
    "zsync": Tool(zsync, "zsync -z", needs=("zsync", "zsyncmake", "nginx"), package="zsync nginx-light"),
    "bita": Tool(bita, "bita (64 KiB, brotli)", needs=("bita", "nginx")),
    "borg": Tool(borg, "borg, 64 KiB, zstd", needs=("borg",), package="borgbackup"),
    "restic": Tool(restic, "restic", needs=("restic",), package="restic"),
    "patch-from": Tool(patch_from, "zstd -3 --patch-from", rival=False, needs=("zstd", "socat"), package="zstd socat"),
    "qemu-img": Tool(qemu_img, "qemu-img convert -c", rival=False, needs=("qemu-img", "socat"), package="qemu-utils socat"),
}


def missing(tool):
    return [n for n in TOOLS[tool].needs if shutil.which(n) is None]


def versions():
    """What ran, for the record."""
    asks = {"rsync": ["rsync", "--version"], "casync": ["casync", "--version"], "zsync": ["zsync", "-V"],
            "bita": ["bita", "--version"], "borg": ["borg", "--version"], "restic": ["restic", "version"],
            "zstd": ["zstd", "--version"], "qemu-img": ["qemu-img", "--version"], "desync": ["desync", "--help"]}
    out = {}
    for name, argv in asks.items():
        if shutil.which(argv[0]):
            done = subprocess.run(argv, capture_output=True, text=True)
            lines = (done.stdout + done.stderr).strip().splitlines()
            out[name] = lines[0].strip() if lines else "?"
    return out
