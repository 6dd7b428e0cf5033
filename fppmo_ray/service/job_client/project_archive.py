"""What of a project's folder goes to the cluster with a job, packed as one zip file."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

# Ray's job server takes 100 MiB in one request and answers 413 beyond (Ray 2.60, whose documents
# say 500 MiB: that is the limit of ray.init).
LIMIT_BYTES = 100 * 1024**2

_LEFT_OUT = {".git", ".venv", "venv", "__pycache__", "node_modules", ".ipynb_checkpoints"}
_MARKERS = "pyvenv.cfg", "journal.jsonl"  # a virtual environment, a run directory


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A packed project."""

    path: Path
    files: tuple[str, ...]
    """Relative to the project's folder, sorted."""
    num_bytes: int


def pack(folder: Path, target: Path) -> Archive:
    """Zip what a job may need of a project's folder.

    Raises:
        ValueError: it is more than Ray's job server takes.
    """
    files = project_files(folder)
    with target.open("wb") as file, ZipFile(file, "w", ZIP_DEFLATED, strict_timestamps=False) as z:
        for name in files:
            z.write(folder / name, name)
            if file.tell() > LIMIT_BYTES:
                raise ValueError(_too_large(folder, files))
    return Archive(path=target, files=tuple(files), num_bytes=target.stat().st_size)


def project_files(folder: Path) -> list[str]:
    """The files that git does not ignore (all of them outside a checkout), sorted.

    Run directories, virtual environments, ``.git``, caches, ``*.egg-info`` and folders of
    checkpoints stay here in either case. Links to folders are not followed.
    """
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _stays_here(Path(parent, name))]
        files += [Path(parent, name).relative_to(folder) for name in names]
    known = _known_to_git(folder)
    if known is not None:  # it names a submodule's folder, not what is in it
        files = [file for file in files if {file, *file.parents} & known]
    return sorted(file.as_posix() for file in files if (folder / file).is_file())


def _stays_here(path: Path) -> bool:
    if path.name in _LEFT_OUT or fnmatch(path.name, ".*_cache") or fnmatch(path.name, "*.egg-info"):
        return True
    is_package = (path / "__init__.py").is_file()
    return any((path / marker).exists() for marker in _MARKERS) or (
        path.name == "checkpoints" and not is_package
    )


def _known_to_git(folder: Path) -> set[Path] | None:
    """Tracked and untracked paths that are not ignored; None outside a checkout."""
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        return None
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        raise RuntimeError(f"git cannot list the files of {folder}: {listing.stderr.strip()}")
    return {Path(name) for name in listing.stdout.split("\0") if name}


def _too_large(folder: Path, files: list[str]) -> str:
    sizes = sorted(((folder / name).stat().st_size, name) for name in files)
    largest = ", ".join(f"{name} ({size / 1e6:.0f} MB)" for size, name in reversed(sizes[-3:]))
    return (
        f"{folder} is more than the {LIMIT_BYTES // 1024**2} MiB that Ray's job server takes, even "
        f"packed; put data on storage that the cluster sees and let git ignore it here; the "
        f"largest files are {largest}"
    )
