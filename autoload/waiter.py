"""Makes transformers know flashlm's packs in every interpreter of an environment that flashlm is installed in.

This is the content of `flashlm-autoload.pth` (`make_pth.py` writes it), which runs at every start of Python. So it imports
nothing, not even a module of its own: it adds one finder, which finds nothing and wakes when transformers is imported.
`FLASHLM_AUTOLOAD=0` leaves even that out. Whatever goes wrong here is silent: a program that does not use flashlm must not
notice it. Where flashlm is not registered, packs are refused by name.
"""

import os
import sys


class FlashlmWaiter:
    """Finds no module; sees the first one below `transformers` and registers flashlm."""

    flashlm_is_waking = False  # flashlm._registration asks: a failure is then nobody's error
    is_done = False

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Register once, when transformers is being imported.

        Not at `transformers` itself: asking whether it is installed is not importing it. The finder stays in the list
        afterwards, which the import system is walking just now.
        """
        if self.is_done or not fullname.startswith("transformers."):
            return
        self.is_done = self.flashlm_is_waking = True
        try:
            import flashlm  # noqa: F401  # registers itself
        except Exception:  # half uninstalled, or broken: see above
            pass
        finally:
            self.flashlm_is_waking = False


if os.environ.get("FLASHLM_AUTOLOAD", "1").lower() not in ("0", "false", "no", "off"):
    sys.meta_path.insert(0, FlashlmWaiter())
