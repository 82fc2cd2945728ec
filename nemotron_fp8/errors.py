"""Every error this library raises on purpose, under one base class.

Each class stands for one violation and carries the names and numbers of it as attributes, so that a caller
can react without parsing a message. The message itself says what, where and what to do next.
"""

from __future__ import annotations


class NemotronFp8Error(Exception):
    """Base of every error raised on purpose; the command line prints it as one ``error:`` line."""


class SourceError(NemotronFp8Error):
    """The source cannot be converted as it is."""


class MalformedHeaderError(SourceError, ValueError):
    """A safetensors header breaks a rule of the format (or of this library's stricter reading of it).

    Attributes:
        file: the shard, as it was named to the reader.
        problem: the rule that is broken, with the numbers of the case.
        tensor: the tensor's name, where the problem belongs to one.
    """

    def __init__(self, file: str, problem: str, tensor: str | None = None) -> None:
        self.file, self.problem, self.tensor = file, problem, tensor
        where = f"{file}: tensor {printable(tensor)}" if tensor is not None else file
        super().__init__(f"{where}: {problem}")


class UnknownDtypeError(MalformedHeaderError):
    """A tensor's dtype is none that safetensors defines.

    Attributes:
        dtype: the unknown name.
    """

    def __init__(self, file: str, dtype: str, tensor: str) -> None:
        self.dtype = dtype
        super().__init__(file, f"unknown dtype {printable(dtype)}", tensor)


def printable(name: str | None, limit: int = 200) -> str:
    """Quote a name from a file so that it is safe on a terminal and in one line, shortened to ``limit``."""
    text = ascii(name)
    return text if len(text) <= limit else f"{text[:limit]}...({len(text)} characters)"
