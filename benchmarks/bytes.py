"""Counting the bytes of tensors that are alive; the core has it, for `zoray plan`."""

from zoray.planning.live import Peak

__all__ = ["Peak"]
