"""Findings and refusals of the emulator."""


class EmulatorError(Exception):
    """Base of all findings and refusals."""


class UnsupportedError(EmulatorError):
    """An instruction, a modifier or a launch attribute that the emulator does not know; it skips none."""


class OutOfBoundsError(EmulatorError):
    """A lane touched bytes outside every registered tensor, or stored to bytes that it may only read."""


class MisalignedError(EmulatorError):
    """An access is not aligned to its full width."""


class RaceError(EmulatorError):
    """Two accesses conflict without happens-before, and one of them is weak."""


class BarrierError(EmulatorError):
    """Part of a warp reached ``bar.sync``, or a warp ended while others wait there."""


class DeadlockError(EmulatorError):
    """No unit can progress."""
