# SPDX-License-Identifier: Apache-2.0
"""The entry of ``python -m gdn_portable`` and of the script ``gdn-portable``."""

import sys

CLI_PACKAGES = ("typer", "rich", "safetensors")


def main() -> None:
    """Run a command; a mistake of the caller's is one line on stderr and exit code 2."""
    try:
        from gdn_portable.cli import app
    except ModuleNotFoundError as error:
        if error.name not in CLI_PACKAGES:
            raise
        needed = "pip install 'gdn-portable[cli]'; in a checkout: pip install '.[cli]'"
        print(f"error: {error.name} is not installed, needs: {needed}", file=sys.stderr)
        sys.exit(2)
    from gdn_portable.errors import GdnError

    try:
        app()
    except GdnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
