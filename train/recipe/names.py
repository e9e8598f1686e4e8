"""Names that become files and folders: of runs, domains, tasks and suites."""

LONGEST_NAME_BYTES = 200


def unfit_as_file(name: str) -> str:
    """Returns why a name can't be that of a file or folder; empty if it can.

    Names from manifests, indexes and recipes of others must not lead out of the folder they are meant for.
    """
    if not name or name in {".", ".."}:
        return "is no name of a file"
    if "/" in name or "\\" in name:
        return "has a slash"
    if name != name.strip():
        return "begins or ends with a blank"
    if not name.isprintable():
        return "has a control character"
    if name.startswith("."):
        return "begins with a dot"
    if name.startswith("-"):
        return "begins with a dash, as an option of a command does"
    if len(name.encode()) > LONGEST_NAME_BYTES:
        return f"is longer than {LONGEST_NAME_BYTES} bytes"
    return ""
