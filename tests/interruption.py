"""Stops a run after a round, as Ctrl-C would."""


class Interrupt(Exception):  # noqa: N818 -- stands for Ctrl-C
    """Raised by an observer."""


def interrupt_after(number):
    """An observer that lets so many rounds end."""

    def observe(config, figures):
        if figures["round"] == number:
            raise Interrupt

    return observe
