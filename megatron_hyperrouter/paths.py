"""The rules for paths that a user writes, on a command line or in a YAML file."""

from __future__ import annotations

import errno
import os
import re

from megatron_hyperrouter.errors import BadValue


def expanded(path: str) -> str:
    """A path in which ``~`` and ``$VARIABLE`` are expanded as in a shell; ``$$`` is a dollar sign.

    Raises :class:`BadValue` if there is no such variable or user, if nothing is left of the path, or for
    what only a shell can compute: ``${NAME:-default}`` and ``$(command)``.
    """
    if "\0" in path:
        raise BadValue("must not contain a NUL character", "give the name of a file or folder")

    def fill(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name is None and found[0] == "$$":
            return "$"
        if name is None:
            what = "${...}" if found[0] == "${" else "$(...)"
            raise BadValue(
                f"contains {what}, which only a shell can expand",
                "use a plain name or $VARIABLE; for a dollar sign, write $$",
            )
        if name not in os.environ:
            raise BadValue(
                f"uses the environment variable {name}, which is not set",
                f"set {name}, or write $$ for a dollar sign",
            )
        return os.environ[name]

    full = re.sub(r"\$(?:\{(\w+)\}|(\w+)|[${(])", fill, path)
    if not full.strip():  # Path("") is the working folder
        raise BadValue(
            "must not be empty",
            "give the name of a file or folder; an unset variable in a shell leaves an empty name",
        )
    if full.startswith("~"):
        full = os.path.expanduser(full)
        if full.startswith("~"):
            raise BadValue(
                "starts with the home folder of an unknown user", "write ./~ if the name really starts with ~"
            )
    return full


def why_closed(path: str) -> str:
    """Why the system refuses to look into a folder or for it, such as "Permission denied"; empty if it does
    not refuse, and if there is no such folder.
    """
    try:
        os.stat(os.path.join(path, "."))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return error.strerror or str(error)
    return ""


def unexpanded(path: str | os.PathLike[str]) -> str:
    """The text from which :func:`expanded` makes ``path``, for the command line of another command."""
    text = os.fspath(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text
