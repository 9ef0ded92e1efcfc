"""Work of a known size for `measure.peak_memory`, which runs it in a process of its own."""

MIB = 1 << 20


def touched(mebibytes: int) -> bytes:
    return b"\1" * (mebibytes * MIB)


def prepare_allocation(mebibytes: int):
    """Allocate and free."""
    return lambda: touched(mebibytes)


def prepare_after_allocation(freed: int, kept: int, mebibytes: int):
    """The same after a preparation that took more, and keeps some of it."""
    touched(freed)
    stays = touched(kept)
    return lambda: len(stays) + len(touched(mebibytes))


def prepare_failure():
    def work():
        raise ValueError("the work went wrong")

    return work
