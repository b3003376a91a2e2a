"""The pairs of disks. A corpus is made once and kept: `held` is what the target has, `needed` what
it is to get, both as raw images and as the states Cicada knows (composition, overlay, user data).
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import guest
from lab import Failed, run

BASE = ["format-uefi-gpt", "os-debian-12-minimal", "kernel-cloud-6.1", "program-redis"]
SUITE = "bookworm"


class Skipped(Exception):
    """What a corpus needs is not to be had here; the text says what."""


class Corpus:
    def __init__(self, name, dir):
        self.name, self.dir = name, dir
        self.held, self.needed = dir / "held.raw", dir / "needed.raw"
        self.held_state, self.needed_state = dir / "held.json", dir / "needed.json"
        # What the pair consists of, with versions, for the record.
        self.facts = dir / "facts.txt"

    def facts_text(self):
        return self.facts.read_text() if self.facts.exists() else ""


class Maker:
    def __init__(self, settings):
        self.settings, self.scratch = settings, settings.scratch
        self.definitions = self.scratch / "definitions"

    def make(self, name):
        corpus = Corpus(name, self.scratch / "corpora" / name)
        if (corpus.dir / "made").exists():
            return corpus
        shutil.rmtree(corpus.dir, ignore_errors=True)
        corpus.dir.mkdir(parents=True)
        CORPORA[name].make(self, corpus)
        (corpus.dir / "made").touch()
        return corpus

    # ---- composed disks

    def variant(self, definition, suffix="", pins=None):
        """A definition, with packages pinned to versions; made beside the others."""
        if not self.definitions.exists():
            shutil.copytree(self.settings.top / "components", self.definitions)
        source = self.definitions / f"{definition}.toml"
        if not pins:
            return source
        text = source.read_text()
        packages = re.search(r"^packages = \[(.*?)\]", text, re.S | re.M)
        kept = [p for p in re.findall(r'"([^"]+)"', packages[1]) if p.split("=")[0] not in pins]
        listed = ", ".join(f'"{p}"' for p in kept + [f"{n}={v}" for n, v in pins.items()])
        text = text[:packages.start()] + f"packages = [{listed}]" + text[packages.end():]
        out = self.definitions / f"{definition}{suffix}.toml"
        out.write_text(text)
        return out

    def compose(self, corpus, side, files, main_only=False):
        """Builds and composes; `main_only` takes packages as the release had them, without fixes."""
        state = getattr(corpus, f"{side}_state")
        argv = [self.settings.compare, "image", self.scratch, ",".join(str(f) for f in files), state]
        if main_only:
            sources = self.scratch / "sources-main"
            main_sources(sources)
            shadow = 'mount --bind "$0" /etc/apt/sources.list.d; exec "$@"'
            argv = ["unshare", "-m", "sh", "-c", shadow, sources, *argv]
        print(f"  building and composing what is {side} …", flush=True)
        out = run(*argv)
        with corpus.facts.open("a") as facts:
            facts.write(f"{side}: " + ", ".join(f"{n} {v}" for _, n, v, _ in (l.split() for l in out.splitlines())) + "\n")
        image = Path(json.loads(state.read_text())["image"])
        getattr(corpus, side).symlink_to(image)

    def compose_both(self, corpus, held, needed):
        self.compose(corpus, "held", held)
        self.compose(corpus, "needed", needed)

    def base(self):
        return [self.variant(d) for d in BASE]


def main_sources(directory):
    """This machine's package sources, without updates and security fixes."""
    if directory.exists():
        return
    directory.mkdir(parents=True)
    stanzas = []
    for file in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", re.sub(r"^#.*\n", "", file.read_text(), flags=re.M)):
            if re.search(rf"^Suites:.*\b{SUITE}(\s|$)", stanza, re.M) and "main" in stanza:
                stanzas.append(re.sub(r"^Suites:.*$", f"Suites: {SUITE}", stanza.strip(), flags=re.M) + "\n")
    if not stanzas:
        raise Skipped("no .sources file names the release's main archive")
    (directory / "main.sources").write_text("\n".join(stanzas))


def two_versions(package):
    """The release's version of a package and the newest, if they differ."""
    lines = [[f.strip() for f in l.split("|")] for l in run("apt-cache", "madison", package).splitlines()]
    found = [(f[1], f[2]) for f in lines if f[2].endswith("Packages")]
    released = next((v for v, where in found if f" {SUITE}/main" in where), None)
    newest = found[0][0] if found else None
    if not released or released == newest:
        raise Skipped(f"the mirror has one version of {package} only: {newest}")
    return released, newest


# ---- a: the same base, another program

def program_small(m, corpus):
    m.compose_both(corpus, m.base(), m.base() + [m.variant("program-nginx")])


def program_large(m, corpus):
    m.compose_both(corpus, m.base(), m.base() + [m.variant("program-postgresql-15")])


# ---- b: point releases

def kernel_point(m, corpus):
    old, new = two_versions("linux-image-cloud-amd64")
    others = [m.variant(d) for d in BASE if not d.startswith("kernel")]
    kernel = lambda v, s: m.variant("kernel-cloud-6.1", s, {"linux-image-cloud-amd64": v})
    m.compose_both(corpus, others + [kernel(old, "-old")], others + [kernel(new, "-new")])


def database_point(m, corpus):
    old, new = two_versions("postgresql-15")
    pin = lambda v, s: m.variant("program-postgresql-15", s,
                                 {n: v for n in ("postgresql-15", "postgresql-client-15", "libpq5")})
    m.compose_both(corpus, m.base() + [pin(old, "-old")], m.base() + [pin(new, "-new")])


def os_point(m, corpus):
    # The same kernel on both, so that the OS alone is new (and the initial RAM disk made from it).
    old, _ = two_versions("linux-image-cloud-amd64")
    kernel = m.variant("kernel-cloud-6.1", "-old", {"linux-image-cloud-amd64": old})
    files = [m.variant(d) for d in BASE if not d.startswith("kernel")] + [kernel]
    m.compose(corpus, "needed", files)
    m.compose(corpus, "held", files, main_only=True)


# ---- c: user data that grew

USER_DATA = r"""
set -euo pipefail
dir=$1 phase=$2
disk=$dir/user-data.raw mnt=$dir/mnt bin=/usr/lib/postgresql/15/bin
mkdir -p "$mnt"
[ "$phase" = grown ] || { truncate -s 768M "$disk"; mkfs.ext4 -q -L user-data "$disk"; }
mount -o loop "$disk" "$mnt"
as() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
logs() { # lines, seed
  awk -v n="$1" -v seed="$2" 'BEGIN { srand(seed); split("GET GET GET POST PUT", verb); split("200 200 200 304 404 500", code)
    for (i = 0; i < n; i++) printf "10.%d.%d.%d - - [%02d/Nov/2026:%02d:%02d:%02d +0000] \"%s /item/%d?session=%08x HTTP/1.1\" %s %d\n",
      rand()*4, rand()*250, rand()*250, 1+i/40000, i/1700%24, rand()*60, rand()*60, verb[1+int(rand()*5)], rand()*rand()*90000,
      rand()*4294967295, code[1+int(rand()*6)], rand()*rand()*60000 }'
}
start() { as "$bin/pg_ctl" -w -s -D "$mnt/pg" -l "$mnt/log/postgresql.log" -o "-c listen_addresses= -k $mnt/pg -c fsync=off" start; }
stop() { as "$bin/pg_ctl" -w -s -D "$mnt/pg" stop; }
trap 'stop 2>/dev/null || true; umount "$mnt"' EXIT
case $phase in
first)
  install -d -o postgres -g postgres "$mnt/pg" "$mnt/log"
  as "$bin/initdb" -E UTF8 --locale=C.UTF-8 -D "$mnt/pg" >/dev/null
  start
  as pgbench -q -h "$mnt/pg" -i -s 10 postgres >/dev/null 2>&1
  as psql -q -h "$mnt/pg" postgres -c 'create table note (id serial primary key, at timestamptz, body text)' \
    -c "insert into note (at, body) select now(), md5(i::text) || repeat(' ' || md5((i % 977)::text), 3) from generate_series(1, 120000) i"
  as pgbench -h "$mnt/pg" -c 2 -t 1500 postgres >/dev/null 2>&1
  logs 500000 1 >"$mnt/log/access.log" ;;
grown)
  start
  as pgbench -h "$mnt/pg" -c 2 -t 2000 postgres >/dev/null 2>&1
  as psql -q -h "$mnt/pg" postgres -c "update note set body = upper(body) where id % 97 = 0" \
    -c "insert into note (at, body) select now(), md5((i * 7)::text) || repeat(' ' || md5((i % 977)::text), 3) from generate_series(1, 60000) i" \
    -c "delete from note where id % 501 = 0" -c vacuum
  gzip <"$mnt/log/access.log" >"$mnt/log/access.log.1.gz"
  rm "$mnt/log/access.log"
  logs 120000 2 >"$mnt/log/access.log" ;;
esac
stop
trap - EXIT
sync
umount "$mnt"
"""


def user_data(m, corpus):
    if not Path("/usr/lib/postgresql/15/bin/initdb").exists():
        install("postgresql-15")
    for phase, side in (("first", "held"), ("grown", "needed")):
        run("unshare", "-m", "bash", "-c", USER_DATA, "user-data", corpus.dir, phase)
        kept = getattr(corpus, side)
        run("cp", "--sparse=always", corpus.dir / "user-data.raw", kept)
        getattr(corpus, f"{side}_state").write_text(json.dumps({"user_data": str(kept)}))
    (corpus.dir / "user-data.raw").unlink()
    corpus.facts.write_text("held: ext4 of 768 MiB, PostgreSQL 15 with pgbench of scale 10 and a table of notes, 500,000 log lines\n"
                            "needed: the same after 4,000 transactions, 60,000 notes more, some changed or deleted, the log rotated\n")


# ---- d: an image someone else made

INDEPENDENT = r"""
set -euo pipefail
dir=$1 packages=$2 size=$3 suite=$4
tree=$dir/tree
[ -d "$tree" ] || mmdebstrap -q --variant=minbase --include="$packages" "$suite" "$tree" >/dev/null
rm -rf "$tree"/var/cache/apt/archives/*.deb "$tree"/var/lib/apt/lists/*
mkdir -p "$tree/data"
truncate -s "$size" "$dir/needed.raw"
printf 'label: gpt\nstart=2048, size=262144, type=uefi\nstart=264192, type=linux\n' | sfdisk -q "$dir/needed.raw"
root=$(( $(stat -c %s "$dir/needed.raw") - 264192 * 512 - 1048576 ))
mke2fs -q -t ext4 -L elsewhere -d "$tree" -E offset=$((264192 * 512)) "$dir/needed.raw" $((root / 1024))k
rm -rf "$tree"
"""


def independent(m, corpus):
    m.compose(corpus, "held", m.base())
    packages = []
    for definition in ("os-debian-12-minimal", "kernel-cloud-6.1", "program-redis", "program-nginx"):
        text = m.variant(definition).read_text()
        packages += re.findall(r'"([^"]+)"', re.search(r"^packages = \[(.*?)\]", text, re.S | re.M)[1])
    size = os.stat(corpus.held).st_size
    run("bash", "-c", INDEPENDENT, "independent", corpus.dir, ",".join(packages), size, SUITE)
    with corpus.facts.open("a") as facts:
        facts.write("needed: mmdebstrap and mke2fs of the same packages and nginx, other layout, UUIDs and times\n")
    adopt(m, corpus)


def adopt(m, corpus):
    """A disk that was made elsewhere becomes a VM, as `cicada vm adopt` does it."""
    overlay = corpus.dir / "needed.qcow2"
    overlay.unlink(missing_ok=True)
    found = run(m.settings.compare, "adopt", m.scratch, corpus.needed, overlay, corpus.needed_state)
    with corpus.facts.open("a") as facts:
        facts.write(f"adopted: {found}\n" if found else "")


# ---- e: a VM that comes home

def coming_home(m, corpus):
    m.compose(corpus, "held", m.base())
    state = json.loads(corpus.held_state.read_text())
    image, overlay = state["image"], corpus.dir / "running.qcow2"
    run(m.settings.compare, "delta", image, image, overlay)
    for side, work in (("held", guest.FIRST_BOOT), ("needed", guest.AWAY)):
        print(f"  a guest runs for what is {side} …", flush=True)
        guest.boot_and_run(overlay, corpus.dir, work)
        kept = corpus.dir / f"{side}.qcow2"
        run("cp", "--sparse=always", overlay, kept)
        raw = getattr(corpus, side)
        raw.unlink(missing_ok=True)
        run("qemu-img", "convert", "-O", "raw", kept, raw)
        getattr(corpus, f"{side}_state").write_text(json.dumps({**state, "overlay": str(kept)}))
    overlay.unlink()
    with corpus.facts.open("a") as facts:
        facts.write("held: the disk after its first boot\n"
                    "needed: the same after a boot that filled redis, wrote logs, an archive and copies of libraries\n")


def install(*packages):
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    policy = Path("/usr/sbin/policy-rc.d")
    # Packages must not start services of their own.
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages, env=env)
    finally:
        if ours:
            policy.unlink()


class Kind:
    def __init__(self, make, title):
        self.make, self.title = make, title


CORPORA = {
    "program-small": Kind(program_small, "another program: nginx"),
    "program-large": Kind(program_large, "another program: PostgreSQL"),
    "kernel-point": Kind(kernel_point, "kernel point release"),
    "os-point": Kind(os_point, "OS with security fixes"),
    "database-point": Kind(database_point, "PostgreSQL point release"),
    "user-data": Kind(user_data, "user data grown"),
    "independent": Kind(independent, "image made elsewhere"),
    "coming-home": Kind(coming_home, "VM comes home"),
}
