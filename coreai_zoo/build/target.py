"""What `--target` decides: the contract and the backend for the system of a machine.

A contract says which systems run it (`Contract.systems`), and a target is only compared with that, so that a contract
of a plugin takes part like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import evolve

from coreai_zoo.build.request import DEFAULT_BACKEND, DEFAULT_CONTRACT, BuildRequest
from coreai_zoo.catalogue import find_backend, find_contract
from coreai_zoo.contracts import Contract
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, listing
from coreai_zoo.plugins import Plugins
from coreai_zoo.systems import System


def aimed(request: BuildRequest, entry: Entry | None, plugins: Plugins) -> BuildRequest:
    """The request with the contract and the backend for its target; as it is where it has none.

    What it names already is kept. Of the contracts that the target runs, the one is taken that asks for the newest
    system: it is made for what that system brought. Of several such it is the entry's, or else the first in their
    order, which is that of how much has been seen of them on devices.

    Raises:
        BadInput: when the target does not run the contract or what the backend writes, or runs nothing at all.
    """
    if (target := request.target) is None:
        return request
    if request.contract is not None:
        contract = find_contract(request.contract, plugins)
        _require_run(target, contract, plugins)
    else:
        contract = _newest(target, request.backend, entry, plugins)
    return evolve(request, contract=contract.name, backend=request.backend or backend_of(contract))


def require_runnable(target: System, plugins: Plugins, backend: str | None = None) -> list[Contract]:
    """The contracts that a system runs, in their order: of all, or of those that a backend writes for.

    Raises:
        BadInput: when it runs none, with what each of them needs.
    """
    there = [found for found in plugins.contracts().values() if backend is None or backend in found.backends]
    if not there:
        raise BadInput(f"The backend {backend} writes for no contract that is installed.")
    if runs := _runnable(target, there):
        return runs
    what = "the contracts that there are" if backend is None else f"the contracts of the backend {backend}"
    raise BadInput(f"{target} is not known to run any of {what}: {_needs(there)}.", _advice(target, plugins))


def _runnable(target: System, contracts: Iterable[Contract]) -> list[Contract]:
    return [contract for contract in contracts if contract.system_of(target) is not None]


def _newest(target: System, backend: str | None, entry: Entry | None, plugins: Plugins) -> Contract:
    if backend is not None:
        find_backend(backend, plugins)
    runs = require_runnable(target, plugins, backend)
    order = {found.name: minimum.order for found in runs if (minimum := found.system_of(target)) is not None}
    newest = [found for found in runs if order[found.name] == max(order.values())]
    usual = entry.contract if entry else DEFAULT_CONTRACT
    return next((found for found in newest if found.name == usual), newest[0])


def _require_run(target: System, contract: Contract, plugins: Plugins) -> None:
    if contract.system_of(target) is None:
        raise BadInput(
            f"{target} is not known to run the contract {contract.name}: {_needs([contract])}.",
            _advice(target, plugins),
        )


def backend_of(contract: Contract) -> str:
    """The backend that writes for a contract: the usual one if it does, else the first that it names."""
    return DEFAULT_BACKEND if DEFAULT_BACKEND in contract.backends else contract.backends[0]


def _needs(contracts: Sequence[Contract]) -> str:
    """What each needs, in words."""
    names: dict[str, list[str]] = {}
    for contract in contracts:
        names.setdefault(contract.needed_system, []).append(contract.name)
    told = []
    for system, (*others, last) in names.items():
        who = f"{listing(others)} and {last} need" if others else f"{last} needs"
        told.append(f"{who} {system or 'a system that is not known'}")
    return listing(told, separator="; ")


def _advice(target: System, plugins: Plugins) -> str:
    runs = [
        contract.name if DEFAULT_BACKEND in contract.backends else f"{contract.name} ({backend_of(contract)})"
        for contract in _runnable(target, plugins.contracts().values())
    ]
    return f"It runs {listing(runs)}: name one with --contract, or none, and one is chosen." if runs else ""
