"""The entry point: `flashlm` and `python -m flashlm`. It imports the command line under the watch for Ctrl-C."""

from __future__ import annotations

from flashlm.cli.interrupt import InterruptWatch, leave


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: with 130 if Ctrl-C came, whatever the code that it hit made of it."""
    with InterruptWatch() as watch:
        try:
            from flashlm.cli.app import main as run

            run(arguments, is_interrupted=lambda: watch.seen)
        except BaseException:
            if not watch.seen:
                raise
    if watch.seen:
        leave()


if __name__ == "__main__":
    main()
