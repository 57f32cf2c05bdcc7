"""Figures as a person reads them."""


def size_text(nbytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} TB" if nbytes >= 1000 else f"{nbytes:.3g} TB"
