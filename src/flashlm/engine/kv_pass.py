"""Refuses a KV cache that a forward pass has left half written.

A pass that ends by an exception, a failed read or an interrupt, has put its tokens into the caches of some layers and not of
others. Whoever holds such a cache and goes on with it would get an answer of no model, and nothing would tell. So a cache
carries a mark from before its pass begins until the pass has come to its end.
"""

from __future__ import annotations

from contextlib import suppress

from flashlm.errors import ConfigError

_MARK = "_flashlm_pass_is_open"


def begin_pass(cache: object) -> None:
    """Mark `cache` (transformers' `past_key_values`, or None) as being written.

    Raises:
        ConfigError: The pass before did not come to its end.
    """
    if cache is None:
        return
    if getattr(cache, _MARK, False):
        raise ConfigError(
            "this past_key_values was left half written by a forward pass that was broken off (an interrupt, or an error):"
            " begin again with a new one, or with a copy from before that pass"
        )
    _set(cache, True)


def end_pass(cache: object) -> None:
    """Note that the pass has come to its end."""
    if cache is not None:
        _set(cache, False)


def _set(cache: object, is_open: bool) -> None:
    with suppress(AttributeError):  # tuples of old
        setattr(cache, _MARK, is_open)
