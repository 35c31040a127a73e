"""The contracts of one model side by side, for `zoo plan --contracts`."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import evolve, frozen

from coreai_zoo.backend import require_room
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.build.target import backend_of, require_runnable
from coreai_zoo.catalogue import find_backend
from coreai_zoo.contracts import Contract
from coreai_zoo.errors import BadInput, PluginError, ZooError
from coreai_zoo.planning.plan import Plan, plan
from coreai_zoo.planning.prompts import Call, prompt_calls
from coreai_zoo.plugins import Plugins

PROMPT_TOKENS = 2000
"""Tokens of a prompt that nobody said the length of."""


@frozen
class Option:
    """A contract that a model could be built for.

    Attributes:
        plan: of the bundle.
        calls: those by which an engine reads the prompt with it.
    """

    plan: Plan
    calls: tuple[Call, ...]


@frozen
class Options:
    """The contracts that a model could be built for, in their order.

    Attributes:
        prompt_tokens: of the prompt that each reads.
        options: each with its plan.
        left_out: the others by name, with the reason.
    """

    prompt_tokens: int
    options: tuple[Option, ...]
    left_out: Mapping[str, str]


def compare_contracts(request: BuildRequest, plugins: Plugins, prompt_tokens: int | None = None) -> Options:
    """Every contract that the request's target runs, or every one where it has none, with a prompt of so many tokens.

    A prompt whose length is None has `PROMPT_TOKENS`, or as many as leave room for an answer in every context.

    Raises:
        BadInput: when no contract is left: what is wrong with the first one.
    """
    target = request.target
    contracts = list(plugins.contracts().values()) if target is None else require_runnable(target, plugins)
    plans, left_out = [], {}
    first: ZooError | None = None
    for contract in contracts:
        try:
            made = _plan(request, contract, plugins)
            if prompt_tokens is not None:
                require_room(prompt_tokens, made.context, f"allow more with --max-context {prompt_tokens + 1} or above")
            plans.append(made)
        except (BadInput, PluginError) as error:
            left_out[contract.name] = error.message
            first = first or error
    if not plans:
        raise first or BadInput("No contract is installed.")
    tokens = prompt_tokens or min(PROMPT_TOKENS, *(made.context - 1 for made in plans))
    return Options(tokens, tuple(Option(made, prompt_calls(made, tokens)) for made in plans), left_out)


def _plan(request: BuildRequest, contract: Contract, plugins: Plugins) -> Plan:
    backend = find_backend(backend_of(contract), plugins)
    return plan(evolve(request, contract=contract.name, backend=backend.name), plugins)
