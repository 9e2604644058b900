"""What a model family says of itself: how to read its Hugging Face config, and its weight map. No Megatron import.

`HFConfig` hands out a config's fields and remembers which were read: a field that nobody read, and that is not known to
be without effect on the function, is refused. So a new release that adds a switch stops with its name and does not
train a different model in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from megatron_t1.files import of_shape, read_json
from megatron_t1.models.weight_map import Op
from megatron_t1.plugins import Registry

# Fields of any Hugging Face config that do not change what the forward pass computes from its weights and tokens.
_WITHOUT_EFFECT = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_window_layers",  # read only with use_sliding_window, which is refused
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    # How to generate, of which old exporters wrote every default.
    *("bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample"),
    *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups"),
    *("num_beams", "num_return_sequences", "output_scores", "prefix", "remove_invalid_values", "repetition_penalty"),
    *("return_dict_in_generate", "sep_token_id", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
    *("finetuning_task", "task_specific_params"),
}
_HARMLESS_VALUES = {"pretraining_tp": 1}
_LARGEST, _MOST_PARTS, _MOST = 1e30, 100_000, 1 << 31


class _Architectures(TypedDict):
    architectures: NotRequired[list[str] | None]


class HFConfig:
    """A Hugging Face `config.json`, every field of which must be read or be known to be without effect."""

    def __init__(self, fields: dict[str, Any], origin: str) -> None:
        self._fields, self.origin = fields, origin
        self._read: set[str] = set()

    @classmethod
    def load(cls, model_dir: Path) -> HFConfig:
        path = model_dir / "config.json"
        try:
            return cls(read_json(path, _Architectures), str(path))
        except FileNotFoundError:
            raise ValueError(f"{model_dir} has no config.json: it is not a Hugging Face model folder") from None

    @property
    def architecture(self) -> str:
        return (self._fields.get("architectures") or ["?"])[0]

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        value = self._fields.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number; without a `default` it must be there. So for those below.

        Raises:
            ValueError: it is not, or less than `least`, or far more than any model has.
        """
        value = self._of_type(name, int, default, "a whole number")
        if not least <= value < _MOST:
            raise ValueError(f"{self.origin}: {name} = {value} must lie in [{least}, {_MOST})")
        return value

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of things of which there is a list: layers, experts."""
        value = self.size(name, default, least=least)
        if value > _MOST_PARTS:
            raise ValueError(f"{self.origin}: {name} = {value} must be at most {_MOST_PARTS}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        return self._positive(name, self._of_type(name, float, default, "a number"))

    def flag(self, name: str, default: bool) -> bool:
        return self._of_type(name, bool, default, "true or false")

    def section(self, name: str) -> dict[str, Any]:
        """An object; {} when there is none."""
        return self._of_type(name, dict[str, Any], {}, "an object")

    def _of_type(self, name: str, kind: Any, default: Any, words: str) -> Any:
        value = self.get(name, default)
        if value is None:
            raise ValueError(f"{self.origin}: field {name!r} is missing")
        try:
            return of_shape(value, kind)
        except ValueError:
            raise ValueError(f"{self.origin}: {name} = {value!r:.80} must be {words}") from None

    def _positive(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < _LARGEST:
            raise ValueError(f"{self.origin}: {name} = {value!r:.80} must be a finite number above 0")
        return float(value)

    def names(self, name: str) -> list[str]:
        """A list of text; [] when there is none."""
        return self._of_type(name, list[str], [], "a list of text")

    def places(self, name: str) -> list[int]:
        """A list of whole numbers; [] when there is none."""
        return self._of_type(name, list[int], [], "a list of whole numbers")

    def only(self, name: str, *allowed: Any) -> None:
        """The field may be absent or hold one of `allowed`; anything else changes the function in a way we lack."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise ValueError(f"{self.origin}: {name} = {value!r:.80} is not supported (supported: {list(allowed)})")

    def rotary(self, fraction: float = 1.0) -> dict[str, Any]:
        """The fields of a ModelSpec about positions: at the top or in `rope_parameters` (transformers >= 5).

        Args:
            fraction: of each head's numbers that is rotated where the config does not say.

        Raises:
            ValueError: a rotary embedding other than the plain one and YaRN.
        """
        where, kind, parameters = self._rope()
        declared, yarn = self.size("max_position_embeddings"), self.yarn()
        known = {"rope_theta", "partial_rotary_factor", *(_YARN_FIELDS if yarn else ())}
        if kind not in ("default", "yarn") or parameters.keys() - known:
            raise ValueError(
                f"{self.origin}: {where} = {self.get(where)!r:.200} is not supported: the plain rotary embedding is "
                f"(rope_type default), and yarn with {', '.join(_YARN_FIELDS)}"
            )
        values = {}
        for name, default in (("rope_theta", 10000.0), ("partial_rotary_factor", fraction)):
            inner, outer = parameters.get(name), self.get(name)
            if inner is not None and outer is not None and inner != outer:
                raise ValueError(
                    f"{self.origin}: {name} = {outer!r:.80} contradicts rope_parameters, where it is {inner!r:.80}"
                )
            values[name] = self._positive(name, next(v for v in (inner, outer, default) if v is not None))
        if not values["rope_theta"] > 1 >= values["partial_rotary_factor"]:
            raise ValueError(
                f"{self.origin}: rope_theta = {values['rope_theta']} must be above 1, and partial_rotary_factor = "
                f"{values['partial_rotary_factor']} at most 1; take the values of the model's release"
            )
        return {
            "rotary_base": values["rope_theta"],
            "rotary_fraction": values["partial_rotary_factor"],
            "max_position_embeddings": yarn.num_positions if yarn else declared,
            "yarn": yarn,
        }

    def yarn(self) -> Yarn | None:
        """How YaRN reaches beyond `max_position_embeddings`; None for any other rotary embedding."""
        where, kind, parameters = self._rope()
        if kind != "yarn":
            return None
        given = {key: self._positive(f"{where}.{key}", parameters[key]) for key in _YARN_FIELDS if key in parameters}
        if missing := {"factor", "original_max_position_embeddings"} - given.keys():
            raise ValueError(f"{self.origin}: {where} = {self.get(where)!r:.200} lacks {', '.join(sorted(missing))}")
        yarn = Yarn(**given)
        original = yarn.original_max_position_embeddings
        if yarn.factor < 1 or yarn.beta_fast <= yarn.beta_slow or yarn.num_positions >= _MOST or original % 1:
            raise ValueError(
                f"{self.origin}: {where} = {self.get(where)!r:.200}: factor must be at least 1, beta_fast above "
                f"beta_slow, original_max_position_embeddings a whole number, and the product of it and factor below "
                f"{_MOST}"
            )
        return yarn

    def _rope(self) -> tuple[str, Any, dict[str, Any]]:
        """The section about the rotary embedding, its kind there, and the rest of it."""
        where, parameters = "rope_parameters", self.section("rope_parameters")
        scaling = self.section("rope_scaling")  # its older name
        if scaling and not parameters:
            where, parameters = "rope_scaling", scaling
        elif scaling and scaling != parameters:
            raise ValueError(
                f"{self.origin}: rope_scaling = {scaling!r:.200} beside rope_parameters, which transformers would drop "
                "for it; say all in rope_parameters"
            )
        given = {key: value for key, value in parameters.items() if value is not None}
        kind, older = given.pop("rope_type", None), given.pop("type", None)
        if None not in (kind, older) and kind != older:
            raise ValueError(
                f"{self.origin}: {where}.rope_type = {kind!r:.80} contradicts its older name, {where}.type = "
                f"{older!r:.80}; remove one of them"
            )
        return where, "default" if kind is older is None else kind or older, given

    def refuse_unread(self) -> None:
        unread = sorted(
            name
            for name, value in self._fields.items()
            if name not in self._read
            and name not in _WITHOUT_EFFECT
            and value not in (None, False, {}, [], _HARMLESS_VALUES.get(name))
        )
        if "quantization_config" in unread:
            raise ValueError(
                f"{self.origin}: quantization_config = {self._fields['quantization_config']!r:.80}: quantised weights "
                "can't be trained; take the release that is not quantised"
            )
        if unread:
            listed = ", ".join(f"{name:.80} = {self._fields[name]!r:.80}" for name in unread)
            raise ValueError(f"{self.origin}: fields that this family does not know and that may matter: {listed}")


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """A rotary embedding that reaches further than the positions a model was trained on first (arXiv 2309.00071)."""

    factor: float
    """How many times further."""
    original_max_position_embeddings: float
    beta_fast: float = 32.0
    """Numbers that turn more often than this over the original positions are left as they are,"""
    beta_slow: float = 1.0
    """those that turn less often are slowed down by `factor`; a ramp lies between."""
    attention_factor: float = 0.0
    """Queries and keys are multiplied by it; 0: 0.1 ln(factor) + 1, as the paper has it."""

    @property
    def num_positions(self) -> int:
        return round(self.factor * self.original_max_position_embeddings)

    @property
    def scale(self) -> float:
        return self.attention_factor or 0.1 * math.log(max(self.factor, 1.0)) + 1.0


_YARN_FIELDS = tuple(field.name for field in fields(Yarn))


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One checkpoint's architecture in Megatron's terms."""

    architecture: str
    """Hugging Face class name, for example `Qwen2ForCausalLM`."""
    transformer: dict[str, Any]
    """Fields of Megatron's TransformerConfig."""
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    rotary_fraction: float
    """Of each head's numbers, the first ones, that are rotated."""
    yarn: Yarn | None = None
    tied_embeddings: bool
    sandwich_norms: bool = False
    """Attention and MLP have a norm behind them too: `post_self_attn_layernorm` and `post_mlp_layernorm` of a layer."""
    carried: tuple[str, ...] = ()
    """Prefixes of Hugging Face tensors that are no part of the trained model (layers for speculative decoding, computed
    tables): an export takes them over from the folder that the training started from."""
    weights: dict[str, Op]
    """Megatron parameter or buffer name, with `{layer}` and `{expert}` for their global numbers, -> how Hugging Face
    spells it."""


Family = Callable[[HFConfig], ModelSpec]

FAMILIES: Registry[Family] = Registry("model family", home="megatron_t1.models")
"""Hugging Face architecture -> its family."""
family = FAMILIES.add
"""Registers a function as the reader of the checkpoints of an architecture."""
