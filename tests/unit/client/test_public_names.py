"""The public names of `kvservice_client`: every name that can be imported from it is in `__all__`."""

from __future__ import annotations

import pkgutil

import kvservice_client


def test_the_public_names_are_those_that_can_be_imported() -> None:
    modules = {module.name for module in pkgutil.iter_modules(kvservice_client.__path__)}
    public = {name for name in vars(kvservice_client) if not name.startswith("_")} - modules
    assert public == set(kvservice_client.__all__)
    assert kvservice_client.__all__ == sorted(kvservice_client.__all__, key=lambda name: (not name.isupper(), name))
