"""Human-readable numbers: 983k tokens, 3 min 05 s."""


def short_number(value: float) -> str:
    """Formats a number to three significant digits with k, M, G or T: 983k, 1.25M."""
    units = ("", "k", "M", "G", "T")
    place = 0
    while abs(value) >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    digits = 0 if not place or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{units[place]}"


def duration(seconds: float) -> str:
    """Formats seconds in the two largest units that fit: 45 s, 3 min 05 s, 2 h 10 min, 4 d 03 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
