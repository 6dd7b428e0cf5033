"""The archive of a project that is sent to a cluster: what belongs in it, and what stays here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from pathspec import GitIgnoreSpec

# Ray 2.60's job server answers requests of more than 100 MiB with status 413. (The 500 MiB in its
# documentation are the limit of ray.init.)
LIMIT_BYTES = 100 * 1024**2

_EXCLUDED = {".git", ".venv", "venv", "__pycache__", "node_modules", ".ipynb_checkpoints"}
_MARKERS = "pyvenv.cfg", "journal.jsonl"  # files of a virtual environment, of a run directory
_RAYIGNORE = ".rayignore"

_SECRET_FOLDERS = {".aws", ".azure", ".docker", ".gcloud", ".gnupg", ".kube", ".ssh"}
_SECRET_FILES = (
    *(".env", ".env.*", "*.env", ".netrc", "_netrc", ".git-credentials", ".pgpass", ".pypirc"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.keystore", "*.jks", "*.ppk", "*.kdbx"),
    *("credentials", "credentials.json", "application_default_credentials.json"),
    *("*service-account*.json", "*service_account*.json", "client_secret*.json"),
    *(".boto", ".s3cfg", "kubeconfig", ".htpasswd", "auth_token"),
)
_SSH_KEYS = "id_*"
_SSH_SUFFIXES = "", ".pub"  # id_mapping.py is no key


@dataclass(frozen=True, kw_only=True)
class ProjectFiles:
    """The files of a project's folder, divided into those that are sent and those that are not."""

    sent: tuple[str, ...]
    """Paths relative to the folder, sorted."""
    secrets: tuple[str, ...] = ()
    """Files that stay here because their names say that they hold keys or passwords."""
    outside: tuple[str, ...] = ()
    """Links that stay here because they lead to places outside of the folder."""
    ignored: tuple[str, ...] = ()
    """Files and folders that stay here because ``.rayignore`` or the caller excludes them."""

    def __str__(self) -> str:
        """Return a phrase about what stays here; empty if nothing does."""
        reasons = {
            "may hold secrets": self.secrets,
            "out of the folder": self.outside,
            "in .rayignore or excluded": self.ignored,
        }
        return "; ".join(f"{_listed(names)} ({why})" for why, names in reasons.items() if names)


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A project packed as a zip file."""

    path: Path
    """The zip file."""
    files: ProjectFiles
    """What is in it, and what is not."""
    num_bytes: int
    """Size of the zip file."""


def pack(folder: Path, target: Path, excludes: Sequence[str] = ()) -> Archive:
    """Zip the files of a project's folder that a job may need.

    Args:
        folder: The project's folder.
        target: The zip file to write.
        excludes: Further patterns of files to leave out, as in ``.gitignore``.

    Raises:
        ValueError: the zip file is larger than Ray's job server accepts.
    """
    files = project_files(folder, excludes)
    with target.open("wb") as file, ZipFile(file, "w", ZIP_DEFLATED, strict_timestamps=False) as z:
        for name in files.sent:
            z.write(folder / name, name)
            if file.tell() > LIMIT_BYTES:
                raise ValueError(_too_large(folder, files.sent))
    return Archive(path=target, files=files, num_bytes=target.stat().st_size)


def project_files(folder: Path, excludes: Sequence[str] = ()) -> ProjectFiles:
    """Return a folder's files that git does not ignore, or all files outside a checkout.

    Run directories, virtual environments, ``.git``, caches, ``*.egg-info`` and folders of
    checkpoints are always left out. So are files that hold keys or passwords by their names, links
    that lead out of the folder, and what a ``.rayignore`` in any folder names. Links to folders are
    not followed.

    Args:
        folder: The project's folder.
        excludes: Further patterns of files to leave out, as in ``.gitignore``.
    """
    root = folder.resolve()
    ignores = _Ignores(folder, excludes)
    found: dict[str, list[Path]] = {"sent": [], "secrets": [], "outside": [], "ignored": []}
    for path in _walk(folder, ignores, found["ignored"]):
        target = path.resolve()
        if not target.is_relative_to(root):
            found["outside"].append(path)
        elif _is_secret(path.relative_to(folder)) or _is_secret(target.relative_to(root)):
            found["secrets"].append(path)
        elif path.is_file():
            found["sent"].append(path)
    known = _known_to_git(folder)
    names: dict[str, tuple[str, ...]] = {}
    for why, paths in found.items():
        files = [path.relative_to(folder) for path in paths]
        if known is not None and why != "ignored":
            # git lists a submodule's folder, but not the files in it
            files = [file for file in files if {file, *file.parents} & known]
        names[why] = tuple(sorted(file.as_posix() for file in files))
    return ProjectFiles(**names)


def _walk(folder: Path, ignores: _Ignores, ignored: list[Path]) -> Iterator[Path]:
    """Yield the files below a folder, and links to folders; add what is ignored to ``ignored``."""
    for parent, folders, names in os.walk(folder):
        ignores.read(Path(parent))
        inner = [Path(parent, name) for name in folders if not _is_excluded(Path(parent, name))]
        entries = [Path(parent, name) for name in names] + [p for p in inner if p.is_symlink()]
        left_out = [path for path in (*inner, *entries) if ignores.match(path)]
        ignored += dict.fromkeys(left_out)
        folders[:] = [path.name for path in inner if path not in left_out]
        yield from (path for path in entries if path not in left_out)


class _Ignores:
    """The patterns of all ``.rayignore`` files that were read; each counts below its own folder."""

    def __init__(self, folder: Path, excludes: Sequence[str]) -> None:
        self._specs = {folder: [GitIgnoreSpec.from_lines(excludes)]}

    def read(self, folder: Path) -> None:
        """Read the file of a folder, if it has one."""
        if (folder / _RAYIGNORE).is_file():
            lines = (folder / _RAYIGNORE).read_text(encoding="utf-8").splitlines()
            self._specs.setdefault(folder, []).append(GitIgnoreSpec.from_lines(lines))

    def match(self, path: Path) -> bool:
        """Whether a pattern matches a file, or a folder with its slash."""
        slash = "/" if path.is_dir() and not path.is_symlink() else ""
        return any(
            spec.match_file(path.relative_to(parent).as_posix() + slash)
            for parent in path.parents
            for spec in self._specs.get(parent, [])
        )


def _is_secret(path: Path) -> bool:
    """Whether the name of a file, or of a folder that it is in, says that it holds secrets."""
    name = path.name.lower()
    is_ssh_key = fnmatch(name, _SSH_KEYS) and Path(name).suffix in _SSH_SUFFIXES
    return (
        is_ssh_key
        or any(fnmatch(name, pattern) for pattern in _SECRET_FILES)
        or bool(_SECRET_FOLDERS & {part.lower() for part in path.parts[:-1]})
    )


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


def _too_large(folder: Path, files: Sequence[str]) -> str:
    sizes = sorted(((folder / name).stat().st_size, name) for name in files)
    largest = ", ".join(f"{name} ({size / 1e6:.0f} MB)" for size, name in reversed(sizes[-3:]))
    return (
        f"{folder} is more than the {LIMIT_BYTES // 1024**2} MiB that Ray's job server accepts, "
        f"even packed; put data on storage that the cluster sees and name it in .gitignore or "
        f"{_RAYIGNORE} here; the largest files are {largest}"
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    further = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + further
