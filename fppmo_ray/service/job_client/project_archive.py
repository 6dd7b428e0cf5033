"""Pack the files of a project's folder that a job may need into one zip file."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

# Ray 2.60's job server answers requests of more than 100 MiB with status 413. (The 500 MiB in its
# documentation are the limit of ray.init.)
LIMIT_BYTES = 100 * 1024**2

_EXCLUDED = {".git", ".venv", "venv", "__pycache__", "node_modules", ".ipynb_checkpoints"}
_MARKERS = "pyvenv.cfg", "journal.jsonl"  # files of a virtual environment, of a run directory


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A project packed as a zip file."""

    path: Path
    """The zip file."""
    files: tuple[str, ...]
    """The packed files, relative to the project's folder, sorted."""
    num_bytes: int
    """Size of the zip file."""


def pack(folder: Path, target: Path) -> Archive:
    """Zip the files of a project's folder that a job may need.

    Args:
        folder: The project's folder.
        target: The zip file to write.

    Raises:
        ValueError: the zip file is larger than Ray's job server accepts.
    """
    files = project_files(folder)
    with target.open("wb") as file, ZipFile(file, "w", ZIP_DEFLATED, strict_timestamps=False) as z:
        for name in files:
            z.write(folder / name, name)
            if file.tell() > LIMIT_BYTES:
                raise ValueError(_too_large(folder, files))
    return Archive(path=target, files=tuple(files), num_bytes=target.stat().st_size)


def project_files(folder: Path) -> list[str]:
    """Return a folder's files that git does not ignore, or all files outside a checkout, sorted.

    Run directories, virtual environments, ``.git``, caches, ``*.egg-info`` and folders of
    checkpoints are always left out. Links to folders are not followed.
    """
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_excluded(Path(parent, name))]
        files += [Path(parent, name).relative_to(folder) for name in names]
    known = _known_to_git(folder)
    if known is not None:  # git lists a submodule's folder, but not the files in it
        files = [file for file in files if {file, *file.parents} & known]
    return sorted(file.as_posix() for file in files if (folder / file).is_file())


def _is_excluded(path: Path) -> bool:
    """Whether a folder is left out of every archive."""
    if path.name in _EXCLUDED or fnmatch(path.name, ".*_cache") or fnmatch(path.name, "*.egg-info"):
        return True
    is_package = (path / "__init__.py").is_file()
    return any((path / marker).exists() for marker in _MARKERS) or (
        path.name == "checkpoints" and not is_package
    )


def _known_to_git(folder: Path) -> set[Path] | None:
    """Return the paths that git does not ignore, tracked or not; None outside a checkout."""
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
        f"{folder} is more than the {LIMIT_BYTES // 1024**2} MiB that Ray's job server accepts, "
        f"even packed; put data on storage that the cluster sees and let git ignore it here; the "
        f"largest files are {largest}"
    )
