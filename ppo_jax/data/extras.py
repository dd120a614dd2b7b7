"""Packages that only some commands need: what to install when they are missing."""

from importlib import metadata

from packaging.requirements import Requirement


def install_line(extra: str) -> str:
    """Say how to install the packages of an extra of ppo_jax: `pip install 'starlette>=0.47,<2' ...`.

    They are named one by one: a clone, a wheel and an index install them alike.
    """
    wanted = []
    for line in metadata.requires("ppo_jax") or []:
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            wanted.append(f"'{requirement}'")
    return f"pip install {' '.join(wanted)}"
