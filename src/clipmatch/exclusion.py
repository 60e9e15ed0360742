"""Placeholder until it is written."""


def shows(embedder, calibration, rows, exclude):  # type: ignore
    """Nothing yet."""
    return []
