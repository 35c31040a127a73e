"""How a checkpoint's makers mean its tokens to be chosen: what `generation_config.json` says of sampling.

The file need not be there, and may hold anything. A setting that nobody can sample by is not used, and said to be none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from attrs import frozen

from coreai_zoo.checkpoint.tokenizer import optional_object

FILE = "generation_config.json"

_SHOWN_CHARACTERS = 60  # of a value that is none


@frozen
class Setting:
    """A number by which tokens are sampled, and the values that it may have.

    Attributes:
        words: what people call it.
        off: the value at which it changes nothing; of a temperature, that of plain sampling.
        allowed: the values that it may have, as a phrase.
        least: the lowest of them.
        most: the highest; None where there is none.
        open: whether `least` itself is excluded.
        whole: whether they are whole numbers.
    """

    words: str
    off: float
    allowed: str
    least: float = 0
    most: float | None = None
    open: bool = False
    whole: bool = False

    def allows(self, value: object) -> bool:
        """Whether something is a number that the setting may have."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        try:
            number = float(value)
        except OverflowError:  # an integer of hundreds of digits
            return False
        above = number > self.least if self.open else number >= self.least
        return math.isfinite(number) and above and (self.most is None or number <= self.most)


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "temperature": Setting("temperature", 1.0, "a number of at least 0"),
        "top_p": Setting("top-p", 1.0, "a number above 0 and at most 1", most=1, open=True),
        "top_k": Setting("top-k", 0, "a whole number of at least 0", whole=True),
        "min_p": Setting("min-p", 0.0, "a number from 0 to 1", most=1),
        "repetition_penalty": Setting("repetition penalty", 1.0, "a number above 0", open=True),
    }
)
"""What can be set, by its name in the file."""


_IDLE: Mapping[str, float | bool | None] = MappingProxyType(
    {
        **dict.fromkeys(("typical_p", "guidance_scale", "encoder_repetition_penalty", "num_beams"), 1),
        **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "top_h", "penalty_alpha"), 0),
        **dict.fromkeys(("presence_penalty", "frequency_penalty", "no_repeat_ngram_size"), 0),
        **dict.fromkeys(("encoder_no_repeat_ngram_size", "diversity_penalty", "min_length", "min_new_tokens"), 0),
        **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids"), None),
        **dict.fromkeys(("sequence_bias", "constraints", "exponential_decay_length_penalty"), None),
        **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "stop_strings"), None),
        **dict.fromkeys(("watermarking_config", "token_healing", "renormalize_logits"), False),
    }
)
"""What else would have a say in which token comes, by its name in the file, with the value at which it has none, beside
null and what is empty. transformers heeds it (`GenerationConfig`), or servers do; no engine of a bundle does."""


@frozen
class StatedSampling:
    """What a file says of sampling.

    Attributes:
        values: `do_sample` and the settings of `SETTINGS`, as far as they are stated and can be used.
        faults: what is stated and cannot be used, one phrase each.
    """

    values: Mapping[str, bool | int | float]
    faults: tuple[str, ...] = ()


def stated_sampling(checkpoint: Path | None) -> StatedSampling:
    """What the `generation_config.json` of a folder says of sampling; nothing where there is none, or no folder."""
    content = {} if checkpoint is None else optional_object(checkpoint / FILE)
    values: dict[str, bool | int | float] = {}
    faults = []
    for name, allowed in {
        "do_sample": "true or false",
        **{key: each.allowed for key, each in SETTINGS.items()},
    }.items():
        value = content.get(name)
        if value is None:
            continue
        if SETTINGS[name].allows(value) if name in SETTINGS else isinstance(value, bool):
            values[name] = value
        else:
            faults.append(f"{name} in {FILE} is {_shown(value)}, not {allowed}: not used")
    steering = [name for name, idle in _IDLE.items() if content.get(name) not in (None, idle, [], {}, "")]
    faults += [f"{name} in {FILE} is {_shown(content[name])}: not used" for name in steering]
    return StatedSampling(values, tuple(faults))


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."
