"""The report of a gate: one HTML file, without a script or a request, made from the transcript alone."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coreai_zoo import pages
from coreai_zoo.bounds import CONFIDENT_MARGIN
from coreai_zoo.gates.charts import STYLE, Chart, Line, Mark, Rule, decades
from coreai_zoo.gates.power import CONFIDENCE, Power, percent, percent_above
from coreai_zoo.recipes import recorded_text

_SHOWN_FLIPS = 50  # of a bundle that fails badly over a corpus; the transcript has them all

# Over a corpus: name, field, factor, unit.
_CORPUS_FIGURES = (
    ("perplexity of the oracle", "oracle_perplexity", 1.0, ""),
    ("perplexity of the bundle", "perplexity", 1.0, ""),
    ("their ratio", "perplexity_ratio", 1.0, ""),
    ("its logarithm", "log_perplexity_ratio", 1.0, ""),
    ("their difference", "perplexity_difference", 1.0, ""),
    ("KL divergence, mean", "kl_mean", 1.0, ""),
    ("median", "kl_median", 1.0, ""),
    ("99 % below", "kl_percentile_99", 1.0, ""),
    ("99.9 % below", "kl_percentile_99_9", 1.0, ""),
    ("largest", "kl_max", 1.0, ""),
    ("same top token", "top1_agreement", 100.0, " %"),
)

_SHOWN_PLACES = 8  # of those with the least headroom

_SHAPES = {"match": ("dot", "match"), "tie": ("diamond", "tie"), "FLIP": ("cross", "flip")}

# Below these nothing is drawn: rounding of the measures themselves.
_LEAST = {"margin": 1e-3, "distance": 1e-9, "hidden": 1e-5}


def render(record: Mapping[str, Any], against: Mapping[str, Any] | None = None) -> str:
    """The report as HTML.

    Args:
        record: a transcript.
        against: the transcript of another bundle on the same oracle, to show beside it.
    """
    environment = pages.environment("gates")
    environment.filters |= {
        "bytes": "{:,}".format,
        "significant": significant,
        "stored": recorded_text,
        "quoted": quoted,  # shows a token's white space; the page escapes it
    }
    judged = [prompt for prompt in record["prompts"] if prompt["judged"]]
    return environment.get_template("report.html.j2").render(
        record=record,
        against=against,
        totals=totals(record),
        confident_margin=confident_margin(record),
        power=power(record),
        corpora=[_corpus_section(one) for one in (record, against) if one is not None and one.get("corpus")],
        other=None if against is None else totals(against),
        judged=judged,
        refused=[prompt for prompt in record["prompts"] if not prompt["judged"]],
        overview=_overview(judged),
        figures={prompt["name"]: _figures(prompt) for prompt in judged},
        hidden=_hidden(judged),
        damage=damage(judged),
        headroom=None if record.get("headroom") is None else _headroom_section(record["headroom"]),
        roles=_roles(record["bundle"]["weights"] or {}),
        role_names={name: role["meaning"] for name, role in (record["bundle"].get("roles") or {}).items()},
        routed=any(position["router_margin"] is not None for prompt in judged for position in prompt["positions"]),
        command=command(record),
        token=token,
        chart_style=STYLE,
    )


def totals(record: Mapping[str, Any]) -> dict[str, Any]:
    """Counts and extremes over all judged prompts of a transcript; None where a value is not finite or not there."""
    judged = [prompt for prompt in record["prompts"] if prompt["judged"]]
    positions = [position for prompt in judged for position in prompt["positions"]]
    errors = [position["relative_error"] for position in positions]
    controls = [position["control"]["relative_error"] for position in positions if position.get("control")]
    return {
        "prompts": len(judged),
        "positions": len(positions),
        "confident": sum(
            position["margin"] >= prompt_margin(prompt) for prompt in judged for position in prompt["positions"]
        ),
        "matched": sum(prompt["matched"] for prompt in judged),
        "ties": sum(prompt["ties"] for prompt in judged),
        "flips": sum(prompt["confident_flips"] for prompt in judged),
        "near_ties": sum(position["near_tie"] for position in positions),
        "cosine": min((position["cosine"] for position in positions), default=None),
        "median_error": _median(errors),
        "control_error": _median(controls),
        "kl": _largest(position["kl_divergence"] for position in positions),
        "max_abs_logit_error": _largest(position["max_abs_logit_error"] for position in positions),
    }


def confident_margin(record: Mapping[str, Any]) -> str:
    """The margins from which a flip is an error, as text: what runs in another arithmetic may have another one."""
    margins = {prompt_margin(prompt) for prompt in record["prompts"] if prompt["judged"]} or {CONFIDENT_MARGIN}
    return " or ".join(f"{margin:.3g}" for margin in sorted(margins))


def prompt_margin(prompt: Mapping[str, Any]) -> float:
    """The margin from which a flip on a prompt is an error; a transcript of before has one for all."""
    return float((prompt["bounds"] or {}).get("margin", CONFIDENT_MARGIN))


def markdown(record: Mapping[str, Any]) -> str:
    """The card's words on a gate: the verdict, what was compared with what, and how far it is off."""
    verdict, inputs, counts = record["verdict"], record["inputs"], totals(record)
    judged = [prompt for prompt in record["prompts"] if prompt["judged"]]
    candidates = " and ".join(dict.fromkeys(prompt["candidate"] for prompt in judged)) or "nothing"
    parts = [
        f"**The gate {'passed' if verdict['passed'] else 'FAILED'}.** It compared {candidates} with "
        f"{inputs['oracle']}, both fed the same tokens."
    ]
    if judged:
        names = ", ".join(f"{prompt['name']} ({len(prompt['tokens'])})" for prompt in judged)
        cosine = min(prompt_totals(prompt)["cosine"] for prompt in judged)
        parts.append(
            f"Of {counts['positions']:,} positions, {names}, the most probable next token was the same at "
            f"{counts['matched']:,}. At {counts['ties']:,} it was another, but the reference's two best logits are "
            f"less than {confident_margin(record)} apart: a tie. At {counts['flips']:,} it was another although they "
            f"are further apart, as they are at {counts['confident']:,} positions.{_excluded(power(record))} The "
            f"lowest cosine of the logits is {cosine:.6f}, their median relative error "
            f"{significant(counts['median_error'])}, the largest KL divergence {significant(counts['kl'])}."
        )
    if record.get("headroom"):
        parts.append(headroom_line(record["headroom"]))
    if record.get("corpus"):
        parts.append(_corpus_markdown(record["corpus"]))
    if passed := [f"- {gate['gate']}: {gate['summary']}" for gate in record.get("gates", ()) if gate["passed"]]:
        parts.append("\n".join(["Other gates that it passed:\n", *passed]))
    if refused := [prompt["name"] for prompt in record["prompts"] if not prompt["judged"]]:
        parts.append(f"Not judged, because the reference is unsure of itself there: {', '.join(refused)}.")
    if verdict["weak_prompts_allowed"]:
        parts.append(f"Judged although the reference is unsure there: {', '.join(verdict['weak_prompts_allowed'])}.")
    parts += [f"Note on the checkpoint: {note}." for note in record["bundle"].get("notes", ())]
    if verdict["reasons"]:
        parts.append("\n".join(f"- {reason}" for reason in verdict["reasons"]))
    parts.append("`gate/report.html` shows every position, `gate/transcript.json` holds every number.")
    return "\n\n".join(parts)


def power(record: Mapping[str, Any]) -> Power:
    """What the judged positions of a transcript could show."""
    counts = totals(record)
    return Power(counts["confident"], counts["flips"])


def _excluded(power: Power) -> str:
    """What so many positions, and the flips among them, say of the rate of flips: a sentence or two for the card."""
    if not power.positions:
        return ""
    rate, confidence = percent_above(power.excluded_rate), percent(CONFIDENCE)
    sentence = f"That excludes, at {confidence}, that more than {rate} of such positions flip."
    if power.flips:
        sentence = f"So many flips leave possible, at {confidence}, that up to {rate} of such positions flip."
    return " ".join(["", sentence, *filter(None, [power.caution])])


def headroom_line(headroom: Mapping[str, Any]) -> str:
    """How far the oracle's values are from the end of half precision, and a warning where that is near."""
    statement = headroom["statement"]
    return " ".join(filter(None, [f"{statement[:1].upper()}{statement[1:]}.", headroom["warning"]]))


def _headroom_section(headroom: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of the places with the least headroom; null is a value that is not finite."""
    places = headroom["places"]
    rows = [(each["where"], significant(each["value"]), _factor(each), each["little"]) for each in places]
    return {
        "line": headroom_line({**headroom, "warning": None}),
        "warning": headroom["warning"],
        "rows": rows[:_SHOWN_PLACES],
        "more": len(rows[_SHOWN_PLACES:]),
    }


def _factor(place: Mapping[str, Any]) -> str:
    return "no limit" if place["factor"] is None else significant(place["factor"])


def corpus_rows(corpus: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The figures over a corpus as a table: name, value, standard error, 95 % interval; empty where there is none."""
    return [(name, *_estimate(corpus[key], scale, unit)) for name, key, scale, unit in _CORPUS_FIGURES]


def _estimate(figure: Mapping[str, float | None] | float | None, scale: float, unit: str) -> tuple[str, str, str]:
    """Value, standard error and interval as texts."""
    if not isinstance(figure, Mapping):
        return significant(figure), "", ""

    def text(key: str) -> str:
        number = figure[key]
        if number is None:
            return "no limit"
        if unit:
            return f"{scale * number:.2f}"
        return significant(number, 6 if abs(number) >= 0.1 else 3)

    value = "not finite" if figure["value"] is None else text("value") + unit
    error = "" if figure["error"] is None else text("error")
    known = figure["low"] is not None or figure["high"] is not None
    return value, error, f"{text('low')} to {text('high')}{unit}" if known else ""


def corpus_line(corpus: Mapping[str, Any]) -> str:
    """What was measured over a corpus, in a sentence."""
    windows, window = corpus["windows"], corpus["window"]
    of_each = f"of each of {windows} windows of {window}" if windows > 1 else f"of one window of {window}"
    return f"The corpus {corpus['name']}: {corpus['counted']:,} positions count, the second half {of_each} tokens."


def corpus_flips(corpus: Mapping[str, Any]) -> str:
    """What the margin rule found over a corpus, in sentences."""
    seen = Power(corpus["power"]["positions"], corpus["power"]["flips"])
    allowed = corpus["flips_allowed"]
    sentences = [f"At every position of the windows: {seen.statement}."]
    if seen.flips and corpus["passed"]:
        sentences.append(f"A routed model may have up to {allowed} of so many, see docs/gate.md.")
    return " ".join([*sentences, *filter(None, [seen.caution])])


def _corpus_section(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of one bundle over a corpus."""
    corpus = record["corpus"]
    return {
        "bundle": record["bundle"]["name"],
        "line": corpus_line(corpus),
        "ran": corpus["candidate"],
        "passed": corpus["passed"],
        "rows": corpus_rows(corpus),
        "flips": corpus_flips(corpus),
        "worst": corpus["flips"][:_SHOWN_FLIPS],
        "more": len(corpus["flips"][_SHOWN_FLIPS:]),
    }


def _corpus_markdown(corpus: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in corpus_rows(corpus))
    return (
        f"{corpus_line(corpus)} Reference and bundle, in the conventions of llama.cpp's `--kl-divergence`:\n\n"
        f"| | value | standard error | 95 % interval |\n|---|---|---|---|\n{rows}\n\n{corpus_flips(corpus)}"
    )


def prompt_totals(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Lowest cosine, median relative error and largest KL of one judged prompt."""
    positions = prompt["positions"]
    return {
        "cosine": min(position["cosine"] for position in positions),
        "median_error": _median([position["relative_error"] for position in positions]),
        "kl": _largest(position["kl_divergence"] for position in positions),
    }


def command(record: Mapping[str, Any]) -> str:
    """The command that repeats the gate; the reader fills in the checkpoint's folder."""
    return "zoo gate " + shlex.join(record["inputs"]["command"])


def damage(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The layer that adds most to the error of the residual stream, and its share; None where layers were not seen.

    Errors of layers are taken as independent, so that their squares add up.
    """
    shown = [prompt["hidden_error"] for prompt in judged if prompt.get("hidden_error")]
    if not shown or any(value is None for errors in shown for value in errors):
        return None
    errors = [_median([row[place] for row in shown]) for place in range(len(shown[0]))]
    added = [
        max(errors[place] ** 2 - errors[place - 1] ** 2, 0.0) if place else errors[0] ** 2  # type: ignore[operator]
        for place in range(len(errors))
    ]
    worst = max(range(len(added)), key=added.__getitem__)
    return {"layer": worst - 1, "share": added[worst] / (sum(added) or 1.0), "last": errors[-1]}


def quoted(text: str) -> str:
    """Text of a token in quotes, in which nothing is left that a terminal or a page would obey, or not show."""
    return "".join(
        character if character.isprintable() else json.dumps(character)[1:-1]
        for character in json.dumps(text, ensure_ascii=False)
    )


def token(position: Mapping[str, Any], whose: str) -> str:
    """The token that `oracle` or `candidate` chose at a position: its id, and its text where the transcript has one."""
    text = position.get(f"{whose}_text")
    return str(position[whose]) if text is None else f"{position[whose]} {quoted(text)}"


def significant(value: float | None, digits: int = 3) -> str:
    """A measure as text: three significant digits, "not finite" for null."""
    if value is None:
        return "not finite"
    return f"{value:.{digits}g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.{digits - 1}e}"


def _median(values: Sequence[float | None]) -> float | None:
    """The median, a null counting as infinite; None for an infinite one, or of nothing."""
    if not values:
        return None
    middle = statistics.median(math.inf if value is None else value for value in values)
    return middle if math.isfinite(middle) else None


def _largest(values: Iterable[float | None]) -> float | None:
    """The largest value, a null counting as infinite; None for an infinite one, or of nothing."""
    largest = max((math.inf if value is None else value for value in values), default=math.inf)
    return largest if math.isfinite(largest) else None


def _roles(weights: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """The counts of each role's weights and its share of the bytes, the largest first."""
    total = sum(counts["bytes"] for counts in weights.values()) or 1
    rows = [{"role": role, **counts, "share": counts["bytes"] / total} for role, counts in weights.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def _describe(prompt: Mapping[str, Any], position: Mapping[str, Any]) -> str:
    piece = prompt["pieces"][position["index"]]
    text = f"position {position['index']}, after {quoted(piece)}: {position['verdict']}, "
    if position["verdict"] != "match":
        text += f"{token(position, 'candidate')} instead of {token(position, 'oracle')}, "
    text += f"margin {position['margin']:.3f}"
    if position["max_abs_logit_error"] is not None:
        text += f", largest logit error {position['max_abs_logit_error']:.3f}"
    if position.get("attribution"):
        text += f", from {position['attribution']}"
    return text


def _told_overview(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """What the chart of every position shows, for who cannot see it."""
    positions = [position for _, position in rows]
    reach = sum(
        position["max_abs_logit_error"] is None or position["max_abs_logit_error"] >= position["margin"] / 2
        for position in positions
    )
    return (
        f"Of {len(positions)} positions the error of {reach} is at least half the margin: there the top token could "
        f"change. {_verdicts(positions)} The largest error is "
        f"{significant(_largest(position['max_abs_logit_error'] for position in positions))}."
    )


def _verdicts(positions: Sequence[Mapping[str, Any]]) -> str:
    """How many positions match, are ties or flips, as a sentence."""
    found = [position["verdict"] for position in positions]
    return (
        f"Same top token: {found.count('match')}, ties: {found.count('tie')}, confident flips: {found.count('FLIP')}."
    )


def _extent(values: Iterable[float | None]) -> str:
    """From where to where values go: "0.1 to 2.5, the largest at 7"; one that is not finite is the largest."""
    numbers = [math.inf if value is None else value for value in values]
    if not numbers:
        return "none"
    low, high = min(numbers), max(numbers)
    end = significant(high if math.isfinite(high) else None)
    return f"{significant(low if math.isfinite(low) else None)} to {end}, the largest at {numbers.index(high)}"


def _overview(judged: Sequence[Mapping[str, Any]]) -> str:
    """The chart of every position: the oracle's margin against the largest error of a logit."""
    rows = [(prompt, position) for prompt in judged for position in prompt["positions"]]
    if not rows:
        return ""
    low, high = decades((position["margin"] for _, position in rows), _LEAST["margin"])
    floor, top = decades((position["max_abs_logit_error"] for _, position in rows), 1e-4)
    marks = []
    # Flips last, so that they lie on top.
    for prompt, position in sorted(rows, key=lambda row: list(_SHAPES).index(row[1]["verdict"])):
        shape, css = _SHAPES[position["verdict"]]
        error = top if position["max_abs_logit_error"] is None else position["max_abs_logit_error"]
        title = f"{prompt['name']}, {_describe(prompt, position)}"
        marks.append(Mark(max(position["margin"], low), max(error, floor), css, shape, title))
    undecided = min(max(min(map(prompt_margin, judged)), low), high)
    steps = [low * (high / low) ** (index / 48) for index in range(49)]
    diagonal = [(margin, min(max(margin / 2, floor), top)) for margin in steps]
    return Chart(
        label="oracle margin against largest logit error, one mark for each position",
        x=(low, high, True),
        y=(floor, top),
        x_title="oracle margin: best logit minus second best",
        y_title="largest logit error",
        marks=marks,
        lines=[Line([(margin, margin / 2 if floor <= margin / 2 <= top else None) for margin in steps], "limit")],
        areas=[
            ([*diagonal, (high, top), (low, top)], "danger"),
            ([(low, floor), (undecided, floor), (undecided, top), (low, top)], "tieband"),
        ],
        told=_told_overview(rows),
        height=340,
    ).svg()


def _figures(prompt: Mapping[str, Any]) -> dict[str, str]:
    """The three charts of one prompt: margin and error, cosine, and KL, by position."""
    positions, bounds = prompt["positions"], prompt["bounds"]
    end = float(max(len(positions) - 1, 1))

    def series(key: str, of: str | None = None) -> list[float | None]:
        rows = [position if of is None else position.get(of) for position in positions]
        return [None if row is None else row[key] for row in rows]

    def line(values: Sequence[float | None], css: str, floor: float) -> Line:
        return Line([(i, None if value is None else max(value, floor)) for i, value in enumerate(values)], css)

    def distance(values: Sequence[float | None]) -> list[float | None]:
        return [None if value is None else 1 - value for value in values]

    errors, controls = series("max_abs_logit_error"), series("max_abs_logit_error", "control")
    undecided = prompt_margin(prompt)
    low, high = decades([*series("margin"), *errors, *controls, undecided], _LEAST["margin"])
    marks = []
    for position in positions:
        shape, css = _SHAPES[position["verdict"]]
        marks.append(Mark(position["index"], max(position["margin"], low), css, shape, _describe(prompt, position)))
    margin = Chart(
        label=f"{prompt['name']}: margin and error by position",
        x=(0.0, end, False),
        y=(low, high),
        x_title="position",
        y_title="logits",
        lines=[line(controls, "line control", low), line(errors, "line candidate", low)],
        marks=marks,
        areas=[([(0, low), (end, low), (end, undecided), (0, undecided)], "tieband")],
        told=f"{_verdicts(positions)} Margins: {_extent(series('margin'))}. Errors: {_extent(errors)}.",
    )

    def half_width(label: str, y_title: str, ours: list[float | None], theirs: list[float | None], bound: float) -> str:
        return Chart(
            label=f"{prompt['name']}: {label} by position",
            x=(0.0, end, False),
            y=decades([*ours, *theirs, bound], _LEAST["distance"]),
            x_title="position",
            y_title=y_title,
            lines=[
                line(theirs, "line control", _LEAST["distance"]),
                line(ours, "line candidate", _LEAST["distance"]),
            ],
            rules=[Rule(bound, "limit", "bound")],
            told=f"{y_title}: {_extent(ours)}; bound: {significant(bound)}.",
            height=220,
        ).svg()

    cosines, their_cosines = distance(series("cosine")), distance(series("cosine", "control"))
    kls, their_kls = series("kl_divergence"), series("kl_divergence", "control")
    return {
        "margin": margin.svg(),
        "cosine": half_width("cosine", "1 - cosine", cosines, their_cosines, 1 - bounds["cosine"]),
        "kl": half_width("KL divergence", "KL (nats)", kls, their_kls, bounds["kl"]),
    }


def _told_hidden(judged: Sequence[Mapping[str, Any]], lines: Sequence[tuple[Sequence[float | None], str]]) -> str:
    """What the chart of the layers shows, for who cannot see it."""
    names = {"line control": "control", "line candidate": "bundle"}
    ends = [f"{names[css]} {significant(errors[0])} to {significant(errors[-1])}" for errors, css in lines]
    worst = damage(judged)
    most = f" Layer {worst['layer'] + 1} adds the largest part." if worst and worst["layer"] >= 0 else ""
    return f"From the embedding to the last layer: {'; '.join(ends)}.{most}"


def _hidden(judged: Sequence[Mapping[str, Any]]) -> str:
    """The chart of the residual stream's relative error after each layer, one line for each prompt."""
    shown = [prompt for prompt in judged if prompt.get("hidden_error")]
    controls = [
        prompt["control"]["hidden_error"]
        for prompt in judged
        if prompt.get("control") and prompt["control"]["hidden_error"]
    ]
    if not shown and not controls:
        return ""
    lines = [(errors, "line control") for errors in controls]
    lines += [(prompt["hidden_error"], "line candidate") for prompt in shown]
    values = [value for errors, _ in lines for value in errors]
    bound = max((prompt["bounds"]["hidden_error"] for prompt in shown), default=0.0)
    return Chart(
        label="relative error of the residual stream by layer",
        x=(0.0, float(len(lines[0][0]) - 1), False),
        y=decades([*values, bound], _LEAST["hidden"]),
        x_title="after layer (0: the embedding)",
        y_title="relative error",
        lines=[
            Line([(i, None if v is None else max(v, _LEAST["hidden"])) for i, v in enumerate(errors)], css)
            for errors, css in lines
        ],
        rules=[Rule(bound, "limit", "bound")] if bound else [],
        told=_told_hidden(judged, lines),
    ).svg()
