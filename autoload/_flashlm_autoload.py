"""Makes transformers know flashlm's packs in every interpreter of an environment that flashlm is installed in.

`flashlm-autoload.pth` imports this at every start of Python, so it costs next to nothing: it adds one finder, which finds
nothing, imports nothing and wakes when transformers is imported. `FLASHLM_AUTOLOAD=0` leaves even that out. Whatever goes
wrong here is silent: a program that does not use flashlm must not notice it. Without it packs are refused by name.
"""

import os
import sys

is_waking = False  # flashlm._registration asks: a failure is then nobody's error


class _Waiter:
    """Finds no module; sees the first one below `transformers` and registers flashlm."""

    def __init__(self) -> None:
        self.is_done = False

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        # Not `transformers` itself: asking whether it is installed is not importing it. The finder stays where it is:
        # the import system is walking the list that it would be taken from.
        if not self.is_done and fullname.startswith("transformers."):
            self.is_done = True
            _wake()


def _wake() -> None:
    global is_waking
    is_waking = True
    try:
        from flashlm._registration import register_with_transformers

        register_with_transformers()
    except Exception:  # half uninstalled, or broken: see above
        pass
    finally:
        is_waking = False


if os.environ.get("FLASHLM_AUTOLOAD", "1").lower() not in ("0", "false", "no", "off"):
    sys.meta_path.insert(0, _Waiter())
