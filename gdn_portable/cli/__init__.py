# SPDX-License-Identifier: Apache-2.0
"""The commands of ``python -m gdn_portable``."""

import typer

from gdn_portable.cli.bench import bench
from gdn_portable.cli.demo import demo
from gdn_portable.cli.doctor import doctor
from gdn_portable.cli.tune import tune
from gdn_portable.cli.verify import verify

app = typer.Typer(
    name="gdn-portable",
    help="Gated DeltaNet for inference engines: one interface, each vendor's kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(doctor)
app.command()(verify)
app.command()(bench)
app.command()(tune)
